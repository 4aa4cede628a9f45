"""Opening a data directory: nothing missing is replaced silently, and each start raises the epoch."""

import asyncio
import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from minikms import datadir
from minikms.api.errors import StartError, StartLaterError, StorageUnavailableError
from minikms.audit import Event
from minikms.audit.chain import KeyState
from minikms.audit.epochs import EPOCH_TAIL_BYTES_MAX
from minikms.audit.log import LogLimits
from minikms.audit.reader import LOG_NAME
from minikms.cli.serve import serve
from minikms.custody import deks, keyring_file, replica_file, rotation_backups
from minikms.custody.replica_file import Mark
from minikms.custody.settled_keys import newest_key_id
from minikms.datadir import DataDir, Options
from minikms.keys import keyring
from minikms.keys.dek import make_key_id
from minikms.keys.keyring import Member
from minikms.memory.arena import SecretArena, fill_random
from minikms.offline import rotate_audit_key
from minikms.roots.providers import DevelopmentKey, KeyFile, RootProvider
from tests import needs
from tests.harness.vaults import key_file
from tests.minikms.keys.keyrings import AT


class Opener:
    """One process: a locked data directory and an arena, in which it may be opened again and again."""

    def __init__(self, directory: Path, stack: ExitStack, audit_dir: str | None = None) -> None:
        self.directory = directory
        self.lock = stack.enter_context(datadir.lock_data_dir(str(directory), audit_dir))
        self.arena = stack.enter_context(SecretArena(64, force_fallback=True))
        self._executor = stack.enter_context(ThreadPoolExecutor(1))

    def open(self, root: RootProvider | None = None, options: Options = datadir.DEFAULT_OPTIONS) -> DataDir:
        root = root or KeyFile(key_file(self.directory))
        return datadir.open_for_service(self.lock, root, arena=self.arena, disk=self._executor, options=options)

    def start(self, root: RootProvider | None = None, options: Options = datadir.DEFAULT_OPTIONS) -> int:
        """Opens and closes; the epoch of the start."""
        data = self.open(root, options)
        data.close()
        return data.vault.keyring.body.epoch


@contextmanager
def opener(directory: Path, audit_dir: str | None = None) -> Iterator[Opener]:
    with ExitStack() as stack:
        yield Opener(directory, stack, audit_dir)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Opener]:
    with opener(tmp_path / "d") as made:
        yield made


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("existing", "free_blocks", "name"),
    [(False, 1, "keyring.json"), (False, 3, "minikms-audit.log"), (True, 0, "keyring.json")],
)
def test_a_start_on_a_full_disk_names_the_file_and_the_reason(
    tmp_path: Path, existing: bool, free_blocks: int, name: str
) -> None:
    """A file system with few free blocks of 4 KiB, in a mount namespace of its own."""
    needs.root()
    unshare = needs.namespaces("mount")
    needs.program("mount")
    base = tmp_path / "small"
    base.mkdir()
    serve = shlex.join([sys.executable, "-m", "minikms", "--socket", str(tmp_path / "s"), "--data-dir", f"{base}/d"])
    serve += f" --master-key-file {key_file(tmp_path)}"
    make = shlex.join([sys.executable, "-m", "minikms", "init", "--data-dir", f"{base}/d"])
    make += f" --master-key-file {key_file(tmp_path)}"
    script = f"mount -t tmpfs -o size=8m none {base}; mkdir -m 700 {base}/d; "
    script += f"{make} >&2 && " if existing else ""
    script += f"cat /dev/zero > {base}/fill; truncate -s -{free_blocks * 4096} {base}/fill; "
    script += f"timeout 100 {serve} 2>&1; true"
    done = subprocess.run(
        [unshare, "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=200, check=True
    )
    assert re.search(rf"^minikms: {base}/d/{name} .*No space left on device\. Free space", done.stdout, re.MULTILINE), (
        done.stdout + done.stderr
    )


def test_without_a_root_key_serve_refuses_and_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROGRESSDB_MINIKMS_MASTER_KEY_FILE", raising=False)
    with pytest.raises(StartError, match=r"minikms init --data-dir .* --master-key-file FILE"):
        serve(socket=str(tmp_path / "s"), data_dir=str(tmp_path / "d"))
    assert os.listdir(tmp_path) == []


def test_every_start_raises_the_epoch_also_in_one_process(one: Opener) -> None:
    before = descriptors()
    assert [one.start(), one.start(), one.start()] == [2, 3, 4]
    assert (descriptors(), one.arena.in_use) == (before, 0)


def test_a_failed_opening_leaves_nothing_open_and_a_later_one_works(one: Opener, tmp_path: Path) -> None:
    one.start()
    before = descriptors()
    stones = one.directory / "kms-tombstones"
    stones.write_bytes(b"x" * 100)
    with pytest.raises(StartError, match="kms-tombstones"):
        one.open()
    assert (descriptors(), one.arena.in_use) == (before, 0)
    with pytest.raises(StartError, match="wrong root key"):
        one.open(KeyFile(key_file(tmp_path / "another")))
    assert (descriptors(), one.arena.in_use) == (before, 0)
    stones.unlink()
    assert one.start() == 3


def test_a_development_key_is_made_for_a_new_directory_only(one: Opener) -> None:
    root = DevelopmentKey(str(one.directory))
    one.start(root)
    text = root.path.read_text()
    one.start(root)
    assert root.path.read_text() == text
    root.path.unlink()
    with pytest.raises(StartError, match="put it back"):
        one.open(root)
    assert not root.path.exists()


def test_the_keyring_records_the_name_of_the_provider(one: Opener) -> None:
    data = one.open(DevelopmentKey(str(one.directory)))
    assert [slot.provider for slot in data.vault.keyring.body.slots] == ["dev"]
    data.close()


@pytest.mark.parametrize("left", ["kms-deks/k_01jd0000000000000000000000.json", "minikms-audit.log"])
def test_a_missing_keyring_beside_keys_or_a_log_is_never_made_anew(one: Opener, left: str) -> None:
    (one.directory / left).write_text("x")
    with pytest.raises(StartError, match=r"restore keyring\.json"):
        one.open()
    assert not (one.directory / "keyring.json").exists()


def test_reading_beside_a_daemon_takes_no_lock_and_changes_nothing(one: Opener) -> None:
    data = one.open()
    before = {path: path.read_bytes() for path in one.directory.iterdir() if path.is_file()}
    with datadir.open_for_reading(str(one.directory), KeyFile(key_file(one.directory))) as unlocked:
        assert unlocked.body == data.vault.keyring.body
    assert {path: path.read_bytes() for path in one.directory.iterdir() if path.is_file()} == before
    data.close()


@pytest.mark.parametrize("segment_bytes", [EPOCH_TAIL_BYTES_MAX * 8, 1024 * 1024])
def test_an_older_keyring_is_refused_after_any_number_of_lines(one: Opener, tmp_path: Path, segment_bytes: int) -> None:
    """After a crash too: no `stop` line. The last 32 MiB, or the last two files, hold no line of a change of keys."""
    one.start()
    shutil.copy(one.directory / "keyring.json", tmp_path / "old")
    data = one.open(options=Options(audit_limits=LogLimits(segment_bytes=segment_bytes), audit_fsync="never"))
    write_start_line(data)
    event = Event(type="encrypt", actor="peer_uid:1", detail="x" * 200)
    written = 0
    while written < EPOCH_TAIL_BYTES_MAX + 4 * 1024 * 1024:
        for _ in range(2000):
            data.log.add(event)
        data.log.commit()
        written += 2000 * 300
        if data.log.writer.file.size >= segment_bytes:
            data.log.writer.rotate(data.log.now_ns())
    data.abandon()
    shutil.copy(tmp_path / "old", one.directory / "keyring.json")
    with pytest.raises(StartError, match="its epoch is 2, the log has 3"):
        one.open()


def test_fewer_tombstones_than_the_log_counted_open_only_when_accepted(one: Opener) -> None:
    one.start()
    data = one.open()
    epoch = data.vault.keyring.body.epoch
    data.log.writer.state = lambda: KeyState(epoch, 3)
    write_start_line(data)
    data.close()
    for _ in range(2):  # a start that is refused does not sign the smaller number
        with pytest.raises(StartError, match=r"it names 0 destroyed keys, the log has counted 3.*--accept-restore"):
            one.open()
    data = one.open(options=Options(accept_restore=True))
    write_start_line(data)
    data.close()
    one.start()


def test_the_audit_key_is_not_changed_in_a_keyring_older_than_the_log(tmp_path: Path) -> None:
    """The change would raise the epoch of the older keyring, and the next start would accept it."""
    directory = tmp_path / "d"
    with opener(directory) as first:
        first.start()
        shutil.copy(directory / "keyring.json", tmp_path / "old")
        data = first.open()
        write_start_line(data)
        data.close()
    shutil.copy(tmp_path / "old", directory / "keyring.json")
    with pytest.raises(StartError, match="its epoch is 2, the log has 3"):
        rotate_audit_key(str(directory), KeyFile(key_file(directory)))
    assert (directory / "keyring.json").read_bytes() == (tmp_path / "old").read_bytes()
    with opener(directory) as again, pytest.raises(StartError, match="older than the audit log"):
        again.open()


def test_a_start_forgets_audit_keys_whose_lines_are_gone(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    with opener(directory) as first:
        first.start()
    for _ in range(2):
        rotate_audit_key(str(directory), KeyFile(key_file(directory)))
        with opener(directory) as again:
            data = again.open()
            data.log.writer.rotate(data.log.now_ns())
            data.close()
    with opener(directory) as again:
        data = again.open()
        assert [key.version for key in data.vault.keyring.body.audit_keys] == [1, 2, 3]
        data.close()
        segment = directory / f"{LOG_NAME}.1"
        content = segment.read_bytes()
        segment.write_bytes(content.replace(b'"key":1', b'"key":3', 1))
        again.start()
        os.unlink(segment)
        data = again.open()
        assert [key.version for key in data.vault.keyring.body.audit_keys] == [2, 3], "a line that verifies says so"
        data.close()
        again.start()


def test_a_host_that_joins_gets_no_keyring_of_its_own(one: Opener) -> None:
    """Its keys are those of the other hosts, and it has to fetch them first."""
    replica_file.write(one.lock.directory_fd, Mark(member_id="m7", name="b"), None)
    with pytest.raises(StartError, match="minikms-replicator fetch"):
        one.open()
    assert not (one.directory / "keyring.json").exists()


def test_the_mark_says_whose_audit_keys_are_opened(one: Opener) -> None:
    root = KeyFile(key_file(one.directory))
    data = one.open()
    audit = data.vault.unlocked.make_member_audit(fill_random, at=AT)
    member = Member("m7", "b", "s7", AT, 1, audit)
    asyncio.run(data.vault.keyring.change(lambda body: keyring.next_epoch(body, at=AT, members=(member,))))
    data.close()
    with datadir.open_for_reading(str(one.directory), root) as unlocked:
        assert unlocked.audit.current == unlocked.body.audit_keys[-1] != audit.current
    replica_file.write(one.lock.directory_fd, Mark(member_id="m7", name="b"), None)
    with datadir.open_for_reading(str(one.directory), root) as unlocked:
        assert unlocked.audit == audit
        assert datadir.audit_keys(unlocked).current.signer.public_key() == audit.current.public_key


def test_a_log_that_was_moved_aside_can_still_be_verified(tmp_path: Path) -> None:
    """The start that accepts its loss keeps the audit keys of its lines, and so does the next one."""
    directory = tmp_path / "d"
    with opener(directory) as first:
        first.start()
    rotate_audit_key(str(directory), KeyFile(key_file(directory)))
    (directory / LOG_NAME).write_bytes(b"altered\n")
    for options in (Options(accept_audit_loss=True), Options()):
        with opener(directory) as again:
            data = again.open(options=options)
            assert [key.version for key in data.vault.keyring.body.audit_keys] == [1, 2]
            data.close()


def write_start_line(data: DataDir) -> None:
    """As a daemon does when it begins."""
    data.log.add(Event(type="start", actor="minikms", facts={"epoch": data.vault.keyring.body.epoch}))


def test_the_newest_key_is_of_now_or_of_a_file_with_a_later_id(tmp_path: Path) -> None:
    """An archive may hold each key up to it."""
    now_ms = time.time_ns() // 1_000_000
    assert newest_key_id(str(tmp_path)) >= make_key_id(now_ms, b"\xff" * 10)
    (tmp_path / "kms-deks").mkdir()
    (tmp_path / "kms-deks" / "z.json").touch()
    ahead = make_key_id(now_ms + 10_000_000, bytes(10))
    (tmp_path / "kms-deks" / f"{ahead}.json").touch()
    assert newest_key_id(str(tmp_path)) == ahead


@pytest.mark.parametrize(
    ("place", "name", "error"),
    [
        (datadir, "highest_epoch", OSError(errno.EIO, os.strerror(errno.EIO))),
        (keyring_file, "read_file_bounded", StorageUnavailableError("a file cannot be read")),
        (deks, "DekStore", StorageUnavailableError("a directory cannot be opened")),
        (rotation_backups, "RotationBackups", StorageUnavailableError("a directory cannot be opened")),
    ],
)
def test_what_the_disk_refuses_at_a_start_may_succeed_later(
    one: Opener, monkeypatch: pytest.MonkeyPatch, place: object, name: str, error: Exception
) -> None:
    one.start()

    def refused(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setattr(place, name, refused)
    with pytest.raises(StartLaterError):
        one.open()
