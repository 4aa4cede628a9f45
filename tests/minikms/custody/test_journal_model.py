"""Whatever the order of changes, and wherever a power loss comes: no acknowledged change of a key's file is lost."""

import asyncio
import errno
import json
import os
import random
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms.api.errors import StorageUnavailableError
from minikms.custody import journal
from minikms.custody.deks import DekStore, KeyLocks
from minikms.custody.journal import Journal, replay
from minikms.custody.journal_format import SECTOR_BYTES, Change
from minikms.custody.rotation_backups import RotationBackups
from minikms.keys import dek
from minikms.keys.dek import DekRecord
from minikms.platform import files, sync
from minikms.platform.files import open_directory
from tests.minikms.custody.power_loss import Inode

VECTORS = Path(__file__).parents[2] / "vectors"
STAMP = "20260101T0000%02d"
STEPS = 12
SEEDS_IN_TORTURE = 20
SYNC_FAILURES = 0.1
At = tuple[int, str]


class Sectors(Inode):
    """A file of which parts were overwritten has each sector (512 bytes) as before or as after. `stuck`: a sync of it
    failed, so the kernel has marked the pages clean, and no later sync writes them.
    """

    stuck = False

    def sync(self) -> None:
        if not self.stuck:
            self.durable = bytes(self.content)

    def fail(self) -> None:
        self.stuck = self.stuck or self.durable != self.content

    def after_crash(self, rng: random.Random) -> bytes:
        if len(self.content) != len(self.durable):
            return super().after_crash(rng)
        share, content = rng.choice([0, 0.5, 1]), bytearray(self.durable)
        for begin in range(0, len(content), SECTOR_BYTES):
            if rng.random() < share:
                content[begin : begin + SECTOR_BYTES] = self.content[begin : begin + SECTOR_BYTES]
        return bytes(content)


Change_ = Callable[[dict[At, Sectors]], None]


class Tree:
    """The model disk of power_loss.py for a directory with directories in it, which are durable once they are made."""

    def __init__(self, root: Path, on_event: Callable[[], None]) -> None:
        self.root = root
        self._on_event = on_event
        self._watching = True
        self._files: dict[int, Sectors] = {}
        self._names: dict[At, Sectors] = {}
        self._durable: dict[At, Sectors] = {}
        self._pending: list[tuple[int, Change_]] = []
        self.events = 0
        self.fails: Callable[[], bool] = lambda: False
        """Whether the next sync fails."""

    def begin(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("open", "write", "pwrite", "fsync", "fdatasync", "rename", "link", "unlink"):
            patch.setattr(os, name, self._recorded(getattr(os, name), getattr(self, f"_{name}")))
        recorded = self._recorded(sync.syncfs, self._syncfs)
        patch.setattr(files, "syncfs", recorded)
        patch.setattr(journal, "syncfs", recorded)

    def image(self, rng: random.Random, to: Path) -> None:
        """Writes what a power loss now may leave."""
        names = dict(self._durable)
        share = rng.choice([0, 0.5, 1])
        for _, change in self._pending:
            if rng.random() < share:
                change(names)
        places = {self.root.stat().st_ino: to}
        for path in self.root.rglob("*"):
            if path.is_dir():
                places[path.stat().st_ino] = to / path.relative_to(self.root)
        for place in places.values():
            place.mkdir(parents=True, exist_ok=True)
        for (at, name), inode in names.items():
            (places[at] / name).write_bytes(inode.after_crash(rng))

    def _recorded(self, real: Callable[..., Any], record: Callable[..., None]) -> Callable[..., Any]:
        syncs = "sync" in record.__name__  # the real disk need not be synced

        def call(*args: Any, **kwargs: Any) -> Any:
            result = None if syncs else real(*args, **kwargs)
            if self._watching and syncs and self.fails():
                for inode in [self._files[args[0]]] if args[0] in self._files else self._dirty(record):
                    inode.fail()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if self._watching:
                record(result, *args, **kwargs)
                self.events += 1
                self.check()
            return result

        return call

    def check(self) -> None:
        self._watching = False
        try:
            self._on_event()
        finally:
            self._watching = True

    def _change(self, at: int, change: Change_) -> None:
        change(self._names)
        self._pending.append((at, change))

    def _put(self, at: At, inode: Sectors) -> None:
        def put(names: dict[At, Sectors]) -> None:
            names[at] = inode

        self._change(at[0], put)

    def _take(self, at: At, inode: Sectors | None = None) -> None:
        def take(names: dict[At, Sectors]) -> None:
            if inode is None or names.get(at) is inode:
                names.pop(at, None)

        self._change(at[0], take)

    def _open(self, fd: int, name: str, flags: int, *_: Any, dir_fd: int | None = None) -> None:
        self._files.pop(fd, None)
        if dir_fd is None or stat.S_ISDIR(os.fstat(fd).st_mode):
            return
        at = (os.fstat(dir_fd).st_ino, name)
        if flags & os.O_CREAT and at not in self._names:
            self._put(at, Sectors())
        self._files[fd] = self._names[at]

    def _write(self, count: int, fd: int, data: bytes) -> None:
        self._files[fd].content += bytes(data)[:count]

    def _pwrite(self, count: int, fd: int, data: bytes, offset: int) -> None:
        content = self._files[fd].content
        assert offset <= len(content), "a hole in the file"
        content[offset : offset + count] = bytes(data)[:count]

    def _fsync(self, _: None, fd: int) -> None:
        status = os.fstat(fd)
        if not stat.S_ISDIR(status.st_mode):
            self._files[fd].sync()
            return
        at = status.st_ino
        others = {name: inode for name, inode in self._durable.items() if name[0] != at}
        self._durable = others | {name: inode for name, inode in self._names.items() if name[0] == at}
        self._pending = [pending for pending in self._pending if pending[0] != at]

    _fdatasync = _fsync

    def _syncfs(self, *_: object) -> None:
        for inode in {*self._names.values(), *self._files.values()}:
            inode.sync()
        self._durable = dict(self._names)
        self._pending.clear()

    def _dirty(self, record: Callable[..., None]) -> set[Sectors]:
        """What a failed sync of no file may lose: all files if it is one of the file system, none of a directory."""
        return {*self._names.values(), *self._files.values()} if record == self._syncfs else set()

    def _rename(self, _: None, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        source, target = (os.fstat(src_dir_fd).st_ino, old), (os.fstat(dst_dir_fd).st_ino, new)
        inode = self._names[source]
        if source[0] != target[0]:
            self._put(target, inode)
            self._take(source, inode)
            return

        def rename(names: dict[At, Sectors]) -> None:
            if names.get(source) is inode:
                del names[source]
            names[target] = inode

        self._change(source[0], rename)

    def _link(self, _: None, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int, **_named: Any) -> None:
        self._put((os.fstat(dst_dir_fd).st_ino, new), self._names[os.fstat(src_dir_fd).st_ino, old])

    def _unlink(self, _: None, name: str, *, dir_fd: int) -> None:
        self._take((os.fstat(dir_fd).st_ino, name))


class Keys:
    """The journal under test, and the dictionary of what each key's file may have after a power loss now."""

    def __init__(self, root: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.root = root
        known = json.loads((VECTORS / "formats.json").read_text())["dek"]
        self._record: DekRecord = dek.parse(known["files"][0].encode(), known["key_id"])
        self.allowed: dict[str, set[bytes | None]] = {}
        self.destroyed: set[str] = set()
        self._version = 1
        self._images = 0
        for name in ("data", "data/kms-deks", "data/kms-deks-backup"):
            (root / name).mkdir()
        self.locks = KeyLocks()
        self.disk = Tree(root / "data", self.check)
        self.executor = ThreadPoolExecutor(1)
        self.store = DekStore(str(root / "data"))
        self.backups = RotationBackups(str(root / "data"))
        self.directory = open_directory(str(root / "data"))
        self.journal = Journal(self.directory, self.store, self.backups, self.executor)

    def check(self) -> None:
        """A power loss, and the replay of the next start."""
        self._images += 1
        to = self.root / f"image{self._images}"
        self.disk.image(self.rng, to)
        store, backups = DekStore(str(to)), RotationBackups(str(to))
        directory = open_directory(str(to))
        try:
            replay(directory, store, backups, destroyed=self.destroyed, has_kek=lambda _: True, stamp=STAMP % 59)
        finally:
            os.close(directory)
            store.close()
            backups.close()
        assert not (to / journal.NAME).exists()
        for key_id, contents in self.allowed.items():
            path = to / "kms-deks" / f"{key_id}.json"
            found = path.read_bytes() if path.exists() else None
            if key_id not in self.destroyed:
                assert found in contents, f"{key_id} after system call {self.disk.events}"

    def content(self, key_id: str, state: str = "active") -> bytes:
        self._version += 1
        changed = msgspec.structs.replace(self._record, id=key_id, kek_version=self._version)
        return dek.encode(changed if state == "active" else dek.retired(changed, at="2026-01-01T00:00:00Z"))

    def present(self, count: int) -> list[str]:
        alive = sorted(key for key, found in self.allowed.items() if key not in self.destroyed and found != {None})
        return self.rng.sample(alive, min(count, len(alive)))

    def newest(self, key_id: str) -> bytes:
        [content] = self.allowed[key_id]
        assert content is not None
        return content

    # --- steps ---

    def _write(self, changes: list[Change], stamp: str = "") -> None:
        for change in changes:
            self.allowed[change.key_id] = {change.old or None, change.new}

        def durable() -> None:
            for change in changes:
                self.allowed[change.key_id] = {change.new}

        try:
            self.journal.write(changes, durable, stamp)
        except StorageUnavailableError:
            self.insist(self.journal.flush)
            for change in changes:
                self.allowed[change.key_id] = {change.old or None}

    def insist(self, work: Callable[[], object]) -> None:
        """Until the disk accepts it."""
        while True:
            try:
                work()
            except StorageUnavailableError:
                continue
            return

    async def create(self) -> None:
        key_ids = [
            dek.make_key_id(1 + len(self.allowed), self.rng.randbytes(10)) for _ in range(self.rng.randint(1, 3))
        ]
        self._write([Change(key_id, b"", self.content(key_id)) for key_id in key_ids])

    async def retire(self) -> None:
        self._write([Change(each, self.newest(each), self.content(each, "retired")) for each in self.present(1)])

    async def rotate(self) -> None:
        batch = [Change.summed(each, self.newest(each), self.content(each)) for each in self.present(3)]
        if batch:
            self._write(batch, STAMP % self.rng.randint(0, 3))

    async def destroy(self) -> None:
        for key_id in self.present(1):
            self.destroyed.add(key_id)  # its tombstone
            async with self.locks.hold([key_id]) as held:
                self.insist(partial(self.backups.blank, self.backups.files_of([key_id])))
                self.insist(partial(self.journal.forget, [key_id]))
                self.insist(partial(self.store.remove, held))
            needle = key_id.encode()
            for path in (self.root / "data").rglob("*"):
                assert not path.is_file() or needle not in path.read_bytes()

    async def flush(self) -> None:
        self.insist(self.journal.flush)


DISKS = pytest.mark.parametrize("failing", [False, True], ids=["a sound disk", "a disk whose syncs fail"])


@DISKS
@pytest.mark.parametrize("seed", range(2))
def test_no_acknowledged_change_is_lost_by_a_power_loss(
    tmp_path: Path, seed: int, failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(tmp_path, seed, failing, monkeypatch) > 50


@pytest.mark.torture
@DISKS
def test_no_acknowledged_change_is_lost_by_a_power_loss_in_new_orders(
    tmp_path: Path, failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(SEEDS_IN_TORTURE):
        seed = random.getrandbits(32)
        print(f"seed {seed}")  # pytest shows it if the test fails
        place = tmp_path / str(seed)
        place.mkdir()
        check(place, seed, failing, monkeypatch)


def check(tmp_path: Path, seed: int, failing: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """After how many system calls the power was lost."""
    monkeypatch.setattr(journal, "syncfs_reports", lambda _directory: True)
    monkeypatch.setattr(journal, "RECORDS_MAX", 6)

    async def main() -> int:
        keys = Keys(tmp_path, seed)
        with monkeypatch.context() as patch:
            keys.disk.begin(patch)
            await keys.create()
            keys.disk.fails = lambda: failing and keys.rng.random() < SYNC_FAILURES
            for _ in range(STEPS):
                step = keys.rng.choice([keys.create, keys.create, keys.retire, keys.rotate, keys.destroy, keys.flush])
                await step()
                keys.disk.check()
        return keys.disk.events

    return asyncio.run(main())
