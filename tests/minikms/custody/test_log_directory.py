"""The directory of the audit log: `--audit-dir`, and every command that reads or changes the log."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from minikms import datadir
from minikms.api.errors import StartError
from minikms.custody import log_directory as place
from minikms.platform.directory_lock import InUseError, lock_file
from minikms_daemon.audit.maintenance import compress_closed
from tests import needs
from tests.harness import forked
from tests.harness.disk_faults import failing_os
from tests.minikms.audit.logmaker import LOG, kill_log, make_segments, open_log
from tests.minikms.test_datadir import opener

AUDITOR_GID = 45_690
"""A group that belongs to nobody on the machine."""


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "log"
    directory.mkdir(mode=0o700)
    return directory


def options(log_dir: Path) -> datadir.Options:
    return datadir.Options(audit_dir=str(log_dir))


def start(data_dir: Path, log_dir: Path | None) -> None:
    """One start of a daemon and its orderly stop."""
    place_of_log = None if log_dir is None else str(log_dir)
    with opener(data_dir, place_of_log) as one:
        one.start(options=datadir.Options(audit_dir=place_of_log))


def minikms(*arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run("minikms", *arguments)


def test_the_log_lies_in_its_own_directory_and_each_command_finds_it(tmp_path: Path, log_dir: Path) -> None:
    data_dir = tmp_path / "d"
    start(data_dir, log_dir)
    assert not list(data_dir.glob("minikms-audit*"))
    assert (log_dir / LOG).exists()
    key = ("--master-key-file", f"{data_dir}.key")
    given = ("--data-dir", data_dir)
    assert minikms("audit", "verify", *given, *key).returncode == 0
    assert minikms("audit", "tail", *given).stdout.count("\n") == 2
    assert minikms("audit", "find", *given, "--actor", "minikms").returncode == 0
    made = json.loads(minikms("audit", "rotate-key", *given, *key, "--json").stdout)
    assert made["version"] == 2
    backup = minikms("backup", "create", tmp_path / "archive", *given, *key, "--json")
    assert json.loads(backup.stdout)["audit_head"]["seq"] == made["head"]["seq"], backup
    found = minikms("doctor", *given, *key)
    assert "minikms-audit.log is missing" not in found.stdout + found.stderr
    (log_dir / LOG).rename(log_dir / "away")
    assert f"minikms-audit.log is missing in {log_dir}" in minikms("doctor", *given, *key).stdout
    with pytest.raises(StartError, match="is missing, but there was one"):
        start(data_dir, log_dir)
    log_dir.rename(tmp_path / "away")
    assert f"minikms-audit.log is missing in {log_dir}" in minikms("doctor", *given, *key).stdout


def test_a_start_that_names_another_place_of_the_log_is_refused(tmp_path: Path, log_dir: Path) -> None:
    data_dir, other = tmp_path / "d", tmp_path / "other"
    other.mkdir(mode=0o700)
    start(data_dir, log_dir)
    with pytest.raises(StartError, match=f"lies in {log_dir}: start with --audit-dir {log_dir}"):
        start(data_dir, None)
    with pytest.raises(StartError, match=f"lies in {log_dir}, not in {other}"):
        start(data_dir, other)
    start(data_dir, log_dir)
    assert not os.listdir(other)


def test_a_log_in_the_data_directory_is_moved_by_hand_and_then_continued(tmp_path: Path, log_dir: Path) -> None:
    """The steps of docs/runbook.md."""
    data_dir = tmp_path / "d"
    start(data_dir, None)
    with pytest.raises(StartError, match=f"move {data_dir}/minikms-audit\\.\\* to {log_dir} first"):
        start(data_dir, log_dir)
    assert not (data_dir / place.NAME).exists()
    before = (data_dir / LOG).read_bytes()
    (log_dir / LOG).write_bytes(b"of another directory")
    with pytest.raises(StartError, match=f": rename {log_dir}, which holds another one"):
        start(data_dir, log_dir)
    (log_dir / LOG).unlink()
    for path in data_dir.glob("minikms-audit.*"):
        shutil.move(path, log_dir)
    start(data_dir, log_dir)
    assert (log_dir / LOG).read_bytes().startswith(before)
    assert minikms("audit", "verify", "--data-dir", data_dir, "--master-key-file", f"{data_dir}.key").returncode == 0


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_a_log_directory_in_or_above_the_data_directory_is_refused(tmp_path: Path, where: str) -> None:
    data_dir = tmp_path / "d"
    (data_dir / "inside").mkdir(mode=0o700, parents=True)
    data_dir.chmod(0o700)
    with (
        pytest.raises(StartError, match="beside the data directory"),
        opener(data_dir, os.path.normpath(data_dir / where)),
    ):
        pass


def test_a_link_to_a_log_directory_is_followed_before_its_place_is_judged(tmp_path: Path) -> None:
    (tmp_path / "d" / "inside").mkdir(mode=0o700, parents=True)
    (tmp_path / "d").chmod(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "d" / "inside")
    with pytest.raises(StartError, match="beside the data directory"), opener(tmp_path / "d", str(tmp_path / "link")):
        pass


def test_a_full_disk_at_the_first_start_names_the_file(
    tmp_path: Path, log_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = pytest.raises(StartError, match=f"{tmp_path}/d/{place.NAME} can't be .* written: No space left")
    with failing_os(monkeypatch, "rename"), refused:
        start(tmp_path / "d", log_dir)
    assert not (tmp_path / "d" / place.NAME).exists()
    start(tmp_path / "d", log_dir)


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o2770, 0o2755, 0o777])
def test_a_log_directory_with_other_rights_than_2750_is_refused(tmp_path: Path, log_dir: Path, mode: int) -> None:
    log_dir.chmod(mode)
    with pytest.raises(StartError, match=r"has mode 2?\d+.*install -d -m 2750"):
        start(tmp_path / "d", log_dir)
    log_dir.rmdir()
    with pytest.raises(StartError, match="No such file or directory; make it with install -d"):
        start(tmp_path / "d", log_dir)


def test_two_data_directories_never_share_a_log_directory(tmp_path: Path, log_dir: Path) -> None:
    with opener(tmp_path / "d", str(log_dir)), pytest.raises(InUseError, match=f"owns {log_dir}"):
        start(tmp_path / "e", log_dir)
    assert not (tmp_path / "e" / place.NAME).exists()


@pytest.mark.parametrize("command", [("rotate-key",), ("detach", "--yes")])
def test_keyring_and_log_do_not_change_while_the_log_is_locked(
    tmp_path: Path, log_dir: Path, command: tuple[str, ...]
) -> None:
    data_dir = tmp_path / "d"
    start(data_dir, log_dir)
    before = (data_dir / "keyring.json").read_bytes()
    descriptor = os.open(log_dir, os.O_RDONLY)
    held = lock_file(descriptor, "lock", "it")
    done = minikms("audit", *command, "--data-dir", data_dir, "--master-key-file", f"{data_dir}.key")
    os.close(held)
    os.close(descriptor)
    assert (done.returncode, (data_dir / "keyring.json").read_bytes()) == (2, before)
    assert f"owns {log_dir}" in done.stderr


def test_a_new_or_restored_directory_begins_its_log_in_the_given_place(tmp_path: Path, log_dir: Path) -> None:
    """A place that holds a log is refused, and nothing is changed."""
    data_dir, again, key = tmp_path / "d", tmp_path / "again", tmp_path / "key"
    given = ("--master-key-file", key, "--audit-dir")
    made = minikms("init", "--data-dir", data_dir, *given, log_dir)
    assert made.returncode == 0 and f"--audit-dir {log_dir}" in made.stdout, made
    archive = tmp_path / "archive"
    archived = minikms("backup", "create", archive, "--data-dir", data_dir, "--master-key-file", key)
    assert archived.returncode == 0, archived
    restore = ("backup", "restore", archive, "--data-dir", again, "--yes", *given)
    refused = minikms(*restore, log_dir)
    assert refused.returncode == 2 and f"{log_dir} holds an audit log" in refused.stderr, refused
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    restored = minikms(*restore, other)
    assert restored.returncode == 0, restored
    assert place.log_directory(str(again)) == str(other)
    assert not list(again.glob("minikms-audit*"))
    verified = minikms("audit", "verify", "--data-dir", again, "--master-key-file", key)
    assert verified.returncode == 0, verified


def test_the_group_reads_what_rotation_recovery_and_a_loss_make(tmp_path: Path, log_dir: Path) -> None:
    """With a umask of 0077, as services have it."""
    needs.root()
    os.chown(log_dir, 0, AUDITOR_GID)
    log_dir.chmod(0o2750)
    before = os.umask(0o077)
    try:
        make_segments(log_dir)
        compress_closed(str(log_dir))
        kill_log(log_dir, torn=b'{"event":{"seq":')
        open_log(log_dir).close()
        modes = {path.name: path.stat() for path in log_dir.glob(f"{LOG}*") if not path.name.endswith(".confirmed")}
        assert any(".torn-" in name for name in modes) and any(name.endswith(".zst") for name in modes)
        (log_dir / LOG).write_bytes(b"x\n")
        open_log(log_dir, accept_loss=True).close()
        [aside] = log_dir.glob("minikms-audit.aside-*")
        modes |= {"new": (log_dir / LOG).stat()}
    finally:
        os.umask(before)
    assert {(oct(status.st_mode & 0o7777), status.st_gid) for status in modes.values()} == {("0o640", AUDITOR_GID)}
    assert (aside.stat().st_mode & 0o777, aside.stat().st_gid) == (0o750, AUDITOR_GID)


def test_a_damaged_name_of_the_log_directory_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\n", b"relative\n", b"/no/newline", b"/a\0zero\n"):
        (tmp_path / place.NAME).write_bytes(content)
        with pytest.raises(StartError, match="is damaged"):
            place.log_directory(str(tmp_path))
    result: Any = minikms("audit", "tail", "--data-dir", tmp_path)
    assert result.returncode == 2 and "is damaged" in result.stderr
