"""Whatever the order of changes, and wherever a power loss comes: no acknowledged change of a key's file is lost."""

import asyncio
import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import pytest

from minikms.api.errors import StorageUnavailableError
from minikms.custody import journal
from minikms.custody.deks import DekStore, KeyLocks
from minikms.custody.journal import Journal, replay
from minikms.custody.journal_format import Change
from minikms.custody.rotation_backups import RotationBackups
from minikms.keys import dek
from minikms.keys.dek import DekRecord
from minikms.platform.files import open_directory
from tests.minikms.custody.power_loss import Disk

VECTORS = Path(__file__).parents[2] / "vectors"
STAMP = "20260101T0000%02d"
STEPS = 12
SEEDS_IN_TORTURE = 20
SYNC_FAILURES = 0.1


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
        self.disk = Disk(root / "data", self.check)
        self.executor = ThreadPoolExecutor(1)
        self.store = DekStore(str(root / "data"))
        self.backups = RotationBackups(str(root / "data"))
        self.directory = open_directory(str(root / "data"))
        self.journal = Journal(self.directory, self.store, self.backups, self.executor)

    def check(self, disk: Disk) -> None:
        """A power loss, and the replay of the next start."""
        self._images += 1
        to = self.root / f"image{self._images}"
        for path in (disk.root, *disk.root.rglob("*")):
            if path.is_dir():
                (to / path.relative_to(disk.root)).mkdir(parents=True)
        [image] = disk.images(self.rng, 1)
        for name, content in image.items():
            (to / name).write_bytes(content)
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
                assert found in contents, f"{key_id} after system call {disk.events}"

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
