"""Step 2 of a KEK rotation under faults: no key is lost, and a failed write is tried again or reported."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from minikms.custody import rotation
from minikms.custody.files import StagedReplacements
from minikms.custody.rotation import KekRotation
from minikms.custody.rotation_backups import RotationBackups
from minikms.errors import (
    ArenaFullError,
    MiniKmsError,
)
from minikms.keys import dek, keyring
from minikms.memory.arena import SecretArena, SecretSlot
from tests.harness.vaults import opened_vault
from tests.minikms.custody.disk_faults import refuse

pytestmark = pytest.mark.usefixtures("quick_rotation")


NEW_ROOT = bytes(range(100, 132))
OTHER_ROOT = bytes(range(50, 82))


def test_an_unreadable_file_is_listed_and_does_not_stop_the_rotation(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(20)
            damaged, truncated, swapped, missing_kek = key_ids[:4]
            contents = {key_id: one.file(key_id).read_bytes() for key_id in key_ids}
            one.file(damaged).write_bytes(contents[damaged].replace(b'"thread_id":"t"', b'"thread_id":"u"'))
            one.file(truncated).write_bytes(contents[truncated][:50])
            one.file(swapped).write_bytes(contents[key_ids[5]])
            one.file(missing_kek).write_bytes(contents[missing_kek].replace(b'"kek_version":1', b'"kek_version":7'))
            await one.rotate()
            assert one.kek_states() == {1: "retired", 2: "active"}
            assert one.keks_on_disk(key_ids[4:]) == {2}
            listed = one.vault.unreadable.listed()
            assert set(listed) == set(key_ids[:4])
            assert "does not unwrap" in listed[damaged]
            assert "damaged" in listed[truncated]
            assert "another key's record" in listed[swapped]
            assert "KEK version 7" in listed[missing_kek]
            assert one.backups(damaged) == []
            # What is mended is found by the next rotation.
            one.file(damaged).write_bytes(contents[damaged])
            await one.rotate()
            assert one.keks_on_disk([damaged]) == {3}
            assert set(one.vault.unreadable.listed()) == {truncated, swapped, missing_kek}

    asyncio.run(main())


def test_a_write_that_the_disk_refuses_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = 0
    keep = RotationBackups.keep

    def failing(self: RotationBackups, *arguments: object) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= 3:
            refuse()
        keep(self, *arguments)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(RotationBackups, "keep", failing)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(20)
            keys = one.keys(key_ids)
            await one.rotation.begin(None)
            running = asyncio.create_task(one.rotation.run())
            while attempts < 2:
                await asyncio.sleep(0.001)
            told = one.rotation.status()
            assert told is not None
            assert told["last_error"] == "the disk refuses"
            await running
            assert attempts > 3
            assert one.keys(key_ids) == keys
            assert one.keks_on_disk(key_ids) == {2}
            assert one.rotation.last_error == ""

    asyncio.run(main())


def test_an_unconfirmed_replacement_is_written_again_to_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed sync proves nothing about the file: it may vanish with the power, and its KEK too."""
    failing = [2]
    placed: list[str] = []
    place, sync = StagedReplacements._place, StagedReplacements._sync

    def noting(self: StagedReplacements, name: str, temp: str) -> MiniKmsError | None:
        placed.append(name)
        return place(self, name, temp)

    def unconfirmed(self: StagedReplacements) -> None:
        sync(self)
        if failing[0] and placed:
            failing[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(StagedReplacements, "_place", noting)
    monkeypatch.setattr(StagedReplacements, "_sync", unconfirmed)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(5)
            keys = one.keys(key_ids)
            await one.rotate()
            # Twice for nothing: the first failure was of the sync that put them in place, the second of the next group.
            assert sorted(placed) == sorted(f"{key_id}.json" for key_id in key_ids for _ in range(2))
            assert failing == [0]
            assert one.rotation.rewrapped == 5
            assert one.keys(key_ids) == keys
            assert all(len(one.backups(key_id)) == 1 for key_id in key_ids)

    asyncio.run(main())


def test_a_shortage_of_descriptors_does_not_make_a_key_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without descriptors, or with a full arena for a moment, no key may stay under the old KEK."""
    failing = [10]
    open_file = os.open

    def short(path: object, flags: int, *arguments: object, **named: object) -> int:
        if failing[0] and str(path).endswith(".json") and not flags & os.O_CREAT:
            failing[0] -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_file(path, flags, *arguments, **named)  # type: ignore[arg-type]  # passed on as they came

    full = [3]
    allocate = SecretArena.allocate

    def crowded(self: SecretArena) -> SecretSlot:
        if full[0] and not failing[0]:
            full[0] -= 1
            raise ArenaFullError("all slots of the key arena are in use")
        return allocate(self)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(20)
            await one.rotation.begin(None)
            monkeypatch.setattr(os, "open", short)
            monkeypatch.setattr(SecretArena, "allocate", crowded)
            await one.rotation.run()
            monkeypatch.undo()
            assert (failing, full) == ([0], [0])
            assert one.vault.unreadable.count == 0
            assert one.keks_on_disk(key_ids) == {2}

    asyncio.run(main())


def test_a_listing_that_fails_for_a_moment_does_not_end_the_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [2]
    scandir = os.scandir

    def refusing(path: object) -> object:
        if failing[0]:
            failing[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return scandir(path)  # type: ignore[call-overload]  # passed on as it came

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(5)
            monkeypatch.setattr(os, "scandir", refusing)
            await one.rotate()
            assert one.keks_on_disk(key_ids) == {2}

    asyncio.run(main())


def test_a_rotation_is_not_promoted_while_passes_find_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "PASSES_MAX", 2)
    real = KekRotation.run_pass
    busy = [4]

    async def always_something(self: KekRotation, rotation: keyring.Rotation) -> int:
        found = await real(self, rotation)
        if busy[0]:
            busy[0] -= 1
            return found + 1
        return found

    monkeypatch.setattr(KekRotation, "run_pass", always_something)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            await one.make(2)
            await one.rotation.begin(None)
            running = asyncio.create_task(one.rotation.run())
            while busy[0]:
                assert one.rotation.running is not None
                await asyncio.sleep(0.001)
            await running
            assert one.kek_states() == {1: "retired", 2: "active"}

    asyncio.run(main())


def test_a_key_that_does_not_survive_its_rewrap_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dek.rewrap

    def spoilt(record: object, key: memoryview, *others: object) -> object:
        wrong = memoryview(bytes(32))
        return real(record, wrong, *others)  # type: ignore[arg-type]  # passed on as they came

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            [key_id] = await one.make(1)
            before = one.file(key_id).read_bytes()
            with monkeypatch.context() as patched:
                patched.setattr(dek, "rewrap", spoilt)
                await one.rotate()
            assert one.file(key_id).read_bytes() == before
            assert "did not survive" in one.vault.unreadable.listed()[key_id]

    asyncio.run(main())


@pytest.mark.parametrize("after_ms", [0, 0.5, 1, 2, 3, 4, 6, 8, 11, 15, 20])
def test_a_rotation_interrupted_anywhere_is_finished_by_the_next_start(tmp_path: Path, after_ms: float) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(40)
            keys = one.keys(key_ids)
            await one.rotation.begin(one.slot_of(NEW_ROOT))
            running = asyncio.create_task(one.rotation.run())
            await asyncio.sleep(after_ms / 1000)
            running.cancel()
            await asyncio.wait([running])
        async with opened_vault(tmp_path / "d") as again:
            await again.rotation.run()
            assert again.kek_states() == {1: "retired", 2: "active"}
            assert again.keys(key_ids) == keys
            assert again.keks_on_disk(key_ids) == {2}

    asyncio.run(main())
