"""After a power loss at any system call every promise holds, and every file is whole."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minikms.custody import files
from minikms.custody.files import (
    TEMP_PREFIX,
    FileWrite,
    open_directory,
    remove_file,
    replace_file,
    sweep_temps,
    write_files,
)
from minikms.custody.lease_format import LEASE_USES_MAX
from minikms.custody.lease_store import LeaseStore
from minikms.errors import StorageUnavailableError
from tests.minikms.custody.disk_faults import failing_os, key, quick_directory, reserve_leases
from tests.minikms.custody.power_loss import Disk

SAMPLES = 25

Allowed = dict[str, set[bytes | None]]
"""For each name the contents that it may have; None stands for absence."""


def check_at_every_call(directory: int, allowed: Allowed, change: Callable[[], object], *, seed: int) -> int:
    """Makes a change on the model disk. After `change` has returned, the old contents are not allowed."""
    rng = random.Random(seed)

    def check(disk: Disk) -> None:
        for image in disk.images(rng, SAMPLES):
            for name, contents in allowed.items():
                assert image.get(name) in contents, f"{name} after system call {disk.events}"
            assert all(name in allowed or name.startswith(TEMP_PREFIX) for name in image)

    disk = Disk(directory, check)
    with pytest.MonkeyPatch.context() as patch:
        disk.begin(patch)
        change()
    for contents in allowed.values():
        contents.difference_update({b"old", None})
    check(disk)
    assert disk.events > 2
    return disk.events


@pytest.mark.parametrize("seed", range(3))
def test_a_replaced_file_is_old_or_new_and_new_on_return(directory: int, seed: int) -> None:
    replace_file(directory, "f", b"old")
    check_at_every_call(directory, {"f": {b"old", b"new"}}, lambda: replace_file(directory, "f", b"new"), seed=seed)


def test_the_model_disk_notices_a_missing_sync(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests the model itself: without its syncs a replacement would lose the file."""
    replace_file(directory, "f", b"old")
    monkeypatch.setattr(os, "fsync", lambda _fd: None)

    class Mute(Disk):
        def _fsync(self, *_: object) -> None:
            pass

    seen: set[bytes | None] = set()
    disk = Mute(directory, lambda disk: seen.update(image.get("f") for image in disk.images(random.Random(1), 100)))
    with pytest.MonkeyPatch.context() as patch:
        disk.begin(patch)
        replace_file(directory, "f", b"new")
    assert seen > {b"old", b"new"}


@pytest.mark.parametrize("seed", range(3))
def test_an_exclusive_file_is_absent_or_whole(directory: int, seed: int) -> None:
    writes = [FileWrite("f", b"new", exclusive=True)]
    check_at_every_call(directory, {"f": {None, b"new"}}, lambda: write_files(directory, writes), seed=seed)


@pytest.mark.parametrize("way", ["syncfs", "fsync"])
@pytest.mark.parametrize("seed", range(3))
def test_files_of_a_group_are_old_or_new_and_new_on_return(
    directory: int, monkeypatch: pytest.MonkeyPatch, way: str, seed: int
) -> None:
    monkeypatch.setattr(files, "syncfs_reports", lambda _directory: way == "syncfs")
    for number in range(3):
        replace_file(directory, f"f{number}", b"old")
    writes = [FileWrite(f"f{number}", b"new") for number in range(6)]
    allowed: Allowed = {write.name: {b"old" if at < 3 else None, b"new"} for at, write in enumerate(writes)}
    check_at_every_call(directory, allowed, lambda: write_files(directory, writes), seed=seed)


def test_a_removed_file_stays_removed_after_the_return(directory: int) -> None:
    replace_file(directory, "f", b"content")
    disk = Disk(directory, lambda disk: None)
    with pytest.MonkeyPatch.context() as patch:
        disk.begin(patch)
        remove_file(directory, "f")
    assert all("f" not in image for image in disk.images(random.Random(1), SAMPLES))


class LeaseRun:
    """Lease files on the model disk: after every system call the files left by a loss of power are opened and asked."""

    def __init__(self, directory: int, scratch: Path, seed: int) -> None:
        self._directory = directory
        self._scratch = scratch
        self._rng = random.Random(seed)
        self._images = 0
        self.granted: dict[bytes, int] = {}
        self.disk = Disk(directory, self.check)

    def check(self, disk: Disk, samples: int = 4) -> None:
        for image in disk.images(self._rng, samples):
            self._images += 1
            place = self._scratch / str(self._images)
            place.mkdir()
            for name, content in image.items():
                (place / name).write_bytes(content)
            fd = open_directory(place)
            sweep_temps(fd)
            store = LeaseStore.open(fd, create=not self.granted)
            for one, granted in self.granted.items():
                assert store.total(one) >= granted, f"after system call {disk.events}"
            store.close()
            os.close(fd)

    def reserve(self, store: LeaseStore, *numbers: int) -> None:
        keys = [key(number) for number in numbers]
        for one, total in zip(keys, reserve_leases(store, keys), strict=True):
            assert total is not None
            self.granted[one] = max(total, self.granted.get(one, 0))


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Where the images of the model disk are opened."""
    with tempfile.TemporaryDirectory(dir=quick_directory()) as place:
        yield Path(place)


@pytest.mark.parametrize("seed", range(2))
def test_no_lease_that_was_granted_is_ever_forgotten(directory: int, scratch: Path, seed: int) -> None:
    run = LeaseRun(directory, scratch, seed)
    with pytest.MonkeyPatch.context() as patch:
        run.disk.begin(patch)
        store = LeaseStore.open(directory, create=True)
        run.reserve(store, 1, 2, 3)
        run.reserve(store, 1)
        store.merge()
        run.reserve(store, 1, 4)
        with failing_os(patch, "fdatasync"), contextlib.suppress(StorageUnavailableError):
            reserve_leases(store, [key(1), key(5)])
        run.reserve(store, 5)
        store.merge()
        store.close()
        store = LeaseStore.open(directory, create=False)
        run.reserve(store, 1, 6)
        store.exhaust(key(3))
        run.reserve(store, 4)
        store.close()
    run.check(run.disk, 20)
    assert run.granted[key(4)] == 3 * LEASE_USES_MAX
    assert LeaseStore.open(directory, create=False).is_exhausted(key(3))


def test_the_repair_of_a_torn_journal_may_itself_be_interrupted(directory: int, tmp_path: Path, scratch: Path) -> None:
    store = LeaseStore.open(directory, create=True)
    run = LeaseRun(directory, scratch, 7)
    run.reserve(store, 1, 2)
    store.close()
    with (tmp_path / "kms-leases").open("ab") as file:
        file.write(b"torn")
    with pytest.MonkeyPatch.context() as patch:
        run.disk.begin(patch)
        store = LeaseStore.open(directory, create=False)
        run.granted = {one: store.total(one) for one in run.granted}
        run.reserve(store, 1)
        store.close()
    run.check(run.disk, 20)
