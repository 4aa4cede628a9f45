"""A start that is refused names the one flag or command that helps in that situation."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests import needs
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_daemon.service.asking import new_key

OTHER_UID = 54321
FLAG = re.compile(r"--[a-z][a-z-]+")
COMMAND = re.compile(r"`([^`]+)`")


def refused(directory: Path, *flags: str, status: int = 2) -> str:
    """The error text of a start of the data directory."""
    places = ["--socket", str(directory.parent / "other"), "--data-dir", str(directory)]
    done = forked.run("minikms", *places, *flags)
    assert done.returncode == status, done
    assert not (directory.parent / "other").exists()
    return " ".join(done.stderr.split())


def helps(text: str) -> list[str]:
    """What the text tells a person to run or to give."""
    commands = COMMAND.findall(text)
    return commands + FLAG.findall(COMMAND.sub("", text))


@pytest.fixture
def stopped(tmp_path: Path) -> LiveDaemon:
    """A daemon with a key file, which was stopped."""
    with LiveDaemon(tmp_path, "file") as daemon:
        new_key(daemon)
        new_key(daemon)
    return daemon


def test_without_a_root_key_a_new_directory_is_made_by_init(tmp_path: Path) -> None:
    text = refused(tmp_path / "d")
    assert helps(text) == [f"minikms init --data-dir {tmp_path / 'd'} --master-key-file FILE"]


def test_without_a_root_key_a_used_directory_wants_its_key_file(stopped: LiveDaemon) -> None:
    stopped.root_file.rename(stopped.root_file.with_name("elsewhere"))  # beside the directory it would be one of --dev
    assert helps(refused(stopped.data_dir)) == ["--master-key-file"]


def test_without_a_root_key_a_development_directory_wants_dev(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "dev") as daemon:
        pass
    assert helps(refused(daemon.data_dir)) == ["--dev"]


def test_a_wrong_root_key_wants_the_right_file(stopped: LiveDaemon, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.touch(0o600)
    wrong.write_text(os.urandom(32).hex())
    text = refused(stopped.data_dir, "--master-key-file", str(wrong))
    assert "wrong root key" in text
    assert helps(text) == ["--master-key-file", "--root"]


def test_what_this_user_may_not_use_is_named_with_its_owner(public: Path) -> None:
    """Root corrects that, so that no other start by itself succeeds: status 2, after which systemd makes none."""
    needs.root()
    with LiveDaemon(public, "file") as daemon:
        new_key(daemon)
    data, key_file = daemon.data_dir, daemon.root_file
    run = public / "run"
    run.mkdir(0o700)
    start = ("--data-dir", data, "--master-key-file", key_file, "--socket", run / "s")

    def refuses(path: Path) -> str:
        done = forked.run("minikms", *start, user=(OTHER_UID, OTHER_UID, ()))
        assert done.returncode == 2, done
        assert f"chown {OTHER_UID} {path} && chmod" in done.stderr, done.stderr
        return done.stderr

    for path in (run, data, *data.rglob("*")):
        os.chown(path, OTHER_UID, OTHER_UID)
    key_file.chmod(0o400)
    assert f"{key_file} belongs to uid 0 with mode 0400" in refuses(key_file)
    os.chown(key_file, OTHER_UID, OTHER_UID)
    for path, uid in ((data / "keyring.json", 0), (data / "lock", 0)):
        os.chown(path, uid, uid)
        assert f"{path} belongs to uid {uid} with mode 0600" in refuses(path)
        os.chown(path, OTHER_UID, OTHER_UID)
    data.chmod(0o500)
    assert f"{data} belongs to uid {OTHER_UID} with mode 0500" in refuses(data)
    data.chmod(0o700)
    os.chown(key_file, OTHER_UID + 1, 0)
    as_root = forked.run("minikms", "doctor", *start[:4])
    assert f"`chown 0 {key_file}`" in as_root.stdout


def test_a_locked_directory_names_the_process_to_end(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "file") as daemon:
        text = refused(daemon.data_dir, "--master-key-file", str(daemon.root_file), status=1)
        assert helps(text) == [f"kill {daemon.pid}"]
        os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.process.wait(60) == 0


def test_an_older_keyring_wants_the_restore_accepted(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "file") as daemon:
        keyring = daemon.data_dir / "keyring.json"
        shutil.copy(keyring, tmp_path / "older")
        daemon.kill()
        daemon.start()
    shutil.copy(tmp_path / "older", keyring)
    text = refused(daemon.data_dir, "--master-key-file", str(daemon.root_file))
    assert "older than the audit log" in text
    assert helps(text) == ["--accept-restore"]


@pytest.mark.parametrize("parent", [False, True])
def test_a_restored_log_wants_the_flag_of_the_program_that_expects_it(stopped: LiveDaemon, parent: bool) -> None:
    flags = ["--master-key-file", str(stopped.root_file), "--expect-audit-head", "9000:" + "A" * 43 + "="]
    text = refused(stopped.data_dir, *flags, *(["--parent-fd", "0"] if parent else []))
    assert "but line 9000 was written" in text
    assert helps(text) == (["--accept-restore"] if parent else ["--expect-audit-head"])
    assert ("message server" in text) is parent


def test_a_missing_log_wants_its_loss_accepted(stopped: LiveDaemon) -> None:
    (stopped.data_dir / "minikms-audit.log").unlink()
    text = refused(stopped.data_dir, "--master-key-file", str(stopped.root_file))
    assert helps(text) == ["--accept-audit-loss"]


def test_a_newer_format_wants_the_newer_program(stopped: LiveDaemon) -> None:
    keyring = stopped.data_dir / "keyring.json"
    text = keyring.read_text()
    keyring.write_text(re.sub(r'("version":)\d+', r"\g<1>99", text, count=1))
    refusal = refused(stopped.data_dir, "--master-key-file", str(stopped.root_file))
    assert "Start the newer version of miniKMS" in refusal
    assert helps(refusal) == []


def test_a_bound_of_the_auditors_lag_needs_a_log_that_an_auditor_can_read(stopped: LiveDaemon) -> None:
    key = ("--master-key-file", str(stopped.root_file))
    assert helps(refused(stopped.data_dir, *key, "--refuse-when-unshipped", "1000"))[1:] == ["--audit-dir"]
    assert "99" in refused(stopped.data_dir, *key, "--refuse-when-unshipped", "99", "--audit-dir", "/a")
