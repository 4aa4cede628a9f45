"""Step 2 of a KEK rotation under faults: no key is lost, and a failed write is tried again or reported."""

import asyncio
import errno
import itertools
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms.api.errors import ArenaFullError, KeyUnreadableError, KmsRefusedError, StorageUnavailableError
from minikms.crypto.aead import XaesCipher
from minikms.custody import deks, journal
from minikms.custody.deks import DekStore
from minikms.custody.rotation_backups import RotationBackups
from minikms.keys import dek, keyring
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.platform import files, sync
from minikms_daemon import rotation
from minikms_daemon.rotation import KekRotation
from tests.harness.disk_faults import refuse
from tests.harness.vaults import opened_vault
from tests.minikms.custody import watched_cipher
from tests.minikms.custody.watched_cipher import WatchedCipher

pytestmark = pytest.mark.usefixtures("quick_rotation")


NEW_ROOT = bytes(range(100, 132))
OTHER_ROOT = bytes(range(50, 82))


async def test_an_unreadable_file_is_listed_and_does_not_stop_the_rotation(tmp_path: Path) -> None:
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


async def test_a_write_that_the_disk_refuses_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = 0
    write = RotationBackups.adopt

    def failing(self: RotationBackups, *arguments: object) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= 3:
            refuse()
        write(self, *arguments)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(RotationBackups, "adopt", failing)

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(20)
        keys = one.keys(key_ids)
        await one.begin(None)
        running = asyncio.create_task(one.rotation.run())
        while attempts < 2:
            await asyncio.sleep(0.001)
        assert one.rotation.last_error == "the disk refuses"
        await running
        assert attempts > 3
        assert one.keys(key_ids) == keys
        assert one.keks_on_disk(key_ids) == {2}
        assert one.rotation.last_error == ""


async def test_unconfirmed_overwrites_are_written_again_to_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed sync proves nothing about the files: they may vanish with the power, and their KEK too."""
    failing = [1]
    overwritten: list[int] = []
    placed: list[str] = []
    rename, pwrite, syncfs = os.rename, os.pwrite, sync.syncfs

    def noting(temp: str, name: str, **directories: int) -> None:
        if name.endswith(".json") and name.startswith("k_"):
            placed.append(name)
        rename(temp, name, **directories)

    def overwriting(descriptor: int, data: bytes, offset: int) -> int:
        overwritten.append(descriptor)
        return pwrite(descriptor, data, offset)

    def unconfirmed(directory: int) -> None:
        syncfs(directory)
        if failing[0] and overwritten:
            failing[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(journal, "syncfs_reports", lambda _directory: True)

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(5)
        keys = one.keys(key_ids)
        await one.begin(None)
        monkeypatch.setattr(os, "rename", noting)
        monkeypatch.setattr(os, "pwrite", overwriting)
        monkeypatch.setattr(journal, "syncfs", unconfirmed)
        await one.rotation.run()
        monkeypatch.undo()
        assert len(overwritten) == 5
        assert sorted(placed) == sorted(f"{key_id}.json" for key_id in key_ids)
        assert failing == [0]
        assert one.rotation.rewrapped == 5
        assert one.keys(key_ids) == keys
        assert all(len(one.backups(key_id)) == 1 for key_id in key_ids)


async def test_while_a_batch_is_unwritten_its_keys_open_and_can_not_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the files hold a mixture, and the disk refuses every write until the end of the block."""
    pwrite = os.pwrite

    def torn(descriptor: int, data: bytes, offset: int) -> int:
        pwrite(descriptor, bytes(100), offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(5)
        keys = one.keys(key_ids)
        await one.begin(None)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", torn)
            patched.setattr(journal, "write_files", refuse)
            running = asyncio.create_task(one.rotation.run())
            while not one.rotation.last_error:
                await asyncio.sleep(0.001)
            assert one.rotation.running is not None, "the version becomes active once the files are durable"
            assert one.keys(key_ids) == keys
            with pytest.raises(StorageUnavailableError):
                await one.vault.retire(key_ids[0])
        await running
        assert one.keks_on_disk(key_ids) == {2}
        assert one.keys(key_ids) == keys
        await one.vault.retire(key_ids[0])
        assert one.on_disk(key_ids[0]).state == "retired"


async def test_a_stop_leaves_an_unwritten_batch_to_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_file(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(5)
            keys = one.keys(key_ids)
            await one.begin(None)
            patched.setattr(journal, "overwrite_file", refuse_file)
            patched.setattr(journal, "write_files", refuse)
            running = asyncio.create_task(one.rotation.run())
            while not one.rotation.last_error:
                await asyncio.sleep(0.001)
            running.cancel()
            await asyncio.wait([running], timeout=60)
            assert running.cancelled()
    assert (one.directory / journal.NAME).exists()
    async with opened_vault(tmp_path / "d") as again:
        assert again.replayed.written == 5
        assert again.keys(key_ids) == keys
        assert again.keks_on_disk(key_ids) == {2}


async def test_a_shortage_of_descriptors_does_not_make_a_key_unreadable(
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

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(20)
        await one.begin(None)
        monkeypatch.setattr(os, "open", short)
        monkeypatch.setattr(SecretArena, "allocate", crowded)
        await one.rotation.run()
        monkeypatch.undo()
        assert (failing, full) == ([0], [0])
        assert one.vault.unreadable.count == 0
        assert one.keks_on_disk(key_ids) == {2}


@pytest.mark.parametrize("where", ["reading", "wrapping"])
async def test_no_cipher_outlives_its_turn_when_a_pass_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A seal could not drop it. Somebody may keep the error: while the pass ends, it is in the list of the files."""
    errors: list[Exception] = [StorageUnavailableError("no descriptors")] if where == "reading" else [RuntimeError()]
    kept = list(errors)
    read = DekStore.read_many

    def failing(self: DekStore, key_ids: Iterable[str]) -> list[tuple[str, bytes | KmsRefusedError]]:
        found = read(self, key_ids)
        if errors and where == "wrapping":
            WatchedCipher.errors.append(errors.pop())
        elif errors:
            found[-1] = (found[-1][0], errors.pop())  # type: ignore[assignment]  # of the first kind
        return found

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(20)
        await one.begin(None)
        watched_cipher.watch(monkeypatch)
        monkeypatch.setattr(DekStore, "read_many", failing)
        running = asyncio.create_task(one.rotation.run())
        while not running.done():
            assert not watched_cipher.alive()
            await asyncio.sleep(0)
        assert not errors and not WatchedCipher.errors
        assert (kept[0].__traceback__ is None) == (where == "reading"), "an error of a file is raised as a copy"
        assert one.keks_on_disk(key_ids) == {2}


async def test_a_listing_that_fails_for_a_moment_does_not_end_the_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [2]
    scandir = os.scandir

    def refusing(path: object) -> object:
        if failing[0]:
            failing[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return scandir(path)  # type: ignore[call-overload]  # passed on as it came

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(5)
        monkeypatch.setattr(os, "scandir", refusing)
        await one.rotate()
        assert one.keks_on_disk(key_ids) == {2}


async def test_a_rotation_is_not_promoted_while_passes_find_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "PASSES_MAX", 2)
    real = KekRotation.run_pass
    busy = [4]

    async def always_something(self: KekRotation, rotation: keyring.Rotation, *, reads_all: bool) -> int:
        found = await real(self, rotation, reads_all=reads_all)
        if busy[0]:
            busy[0] -= 1
            return found + 1
        return found

    monkeypatch.setattr(KekRotation, "run_pass", always_something)

    async with opened_vault(tmp_path / "d") as one:
        await one.make(2)
        await one.begin(None)
        running = asyncio.create_task(one.rotation.run())
        while busy[0]:
            assert one.rotation.running is not None
            await asyncio.sleep(0.001)
        await running
        assert one.kek_states() == {1: "retired", 2: "active"}


async def test_a_stop_waits_for_the_disk_thread_and_so_does_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seal cancels the rotation. Reads are answered from memory while files change."""
    overwriting, go_on = threading.Event(), threading.Event()
    real = files.overwrite_file

    def slowly(directory: int, name: str, data: bytes, *, sync: bool) -> None:
        overwriting.set()
        go_on.wait(60)
        real(directory, name, data, sync=sync)

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(4)
        keys = one.keys(key_ids)
        await one.begin(None)
        monkeypatch.setattr(journal, "overwrite_file", slowly)
        running = asyncio.create_task(one.rotation.run())
        while not overwriting.is_set():
            await asyncio.sleep(0.001)
        for _ in range(3):
            running.cancel()
            await asyncio.sleep(0.005)
        retiring = asyncio.create_task(one.vault.retire(key_ids[0]))
        await asyncio.sleep(0.005)
        assert not retiring.done()
        assert one.keys(key_ids) == keys
        go_on.set()
        await asyncio.wait([running])
        assert running.cancelled()
        await retiring
        assert one.keks_on_disk(key_ids) == {2}
        assert one.on_disk(key_ids[0]).state == "retired"
        assert one.keys(key_ids) == keys


class DestroyedLate:
    """Has the key from the second question on, as if its tombstone had been written after the first."""

    def __init__(self, key_id: str) -> None:
        self._key_id = key_id
        self._asked = 0

    def __contains__(self, key_id: str) -> bool:
        self._asked += key_id == self._key_id
        return key_id == self._key_id and self._asked > 1


async def test_a_key_that_is_destroyed_after_its_rewrap_gets_no_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A destruction whose request was cancelled holds no lock. It has blanked the batch backups already."""
    async with opened_vault(tmp_path / "d") as one:
        victim, other = await one.make(2)
        await one.begin(None)
        with monkeypatch.context() as patched:
            patched.setattr(one.vault, "destroyed", DestroyedLate(victim))
            await one.rotation.run()
        assert one.backups(victim) == []
        assert one.keks_on_disk([victim]) == {1}
        assert one.keks_on_disk([other]) == {2}


async def test_a_key_that_is_destroyed_while_it_is_rewrapped_is_not_in_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike a key that the scan of the start has not read yet."""
    async with opened_vault(tmp_path / "d") as one:
        victim, unread, other = await one.make(3)
        await one.begin(None)
        index, real = one.vault.index, journal.Journal.replace

        async def meanwhile(*arguments: Any) -> None:
            await real(*arguments)
            index.remove(victim)
            index.remove(unread)
            patched.setattr(one.vault, "destroyed", {victim})

        with monkeypatch.context() as patched:
            patched.setattr(journal.Journal, "replace", meanwhile)
            await one.rotation.run()
        assert {key_id: index.kek_version(key_id) for key_id in (victim, unread, other)} == {
            victim: None,
            unread: 2,
            other: 2,
        }


async def test_a_defect_in_a_batch_blocks_no_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails once the journal is there: the batch is flushed."""
    failures: list[type[Exception]] = [MemoryError, ValueError]
    real = files.overwrite_file

    def failing(directory: int, name: str, data: bytes, *, sync: bool) -> None:
        if failures:
            raise failures.pop()
        real(directory, name, data, sync=sync)

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(3)
        monkeypatch.setattr(journal, "overwrite_file", failing)
        for kek in (2, 3, 4):
            await one.rotate()
            assert one.keks_on_disk(key_ids) == {kek}
        await one.vault.retire(key_ids[0])
        await one.vault.destroy(key_ids[0])


async def test_a_key_with_the_highest_version_stays_as_it_is(tmp_path: Path) -> None:
    """One version more, and no file of it could be read again."""
    async with opened_vault(tmp_path / "d") as one:
        last, other = await one.make(2)
        await one.vault.retire(other)
        record = msgspec.structs.replace(one.on_disk(last), version=dek.VERSION_MAX - 1)
        one.file(last).write_bytes(dek.encode(record))
        keys = one.keys([last, other])
        await one.rotate()
        assert "highest version" in one.vault.unreadable.listed()[last]
        assert one.keks_on_disk([last]) == {1}
        assert one.keks_on_disk([other]) == {2}
        with pytest.raises(KeyUnreadableError, match="highest version"):
            await one.vault.retire(last)
        assert one.keys([last, other]) == keys
        assert (await one.pruning.prune(backups=False)).destroyed == []


@pytest.mark.parametrize("root_removed", [False, True])
async def test_a_file_that_is_put_back_is_rewrapped_after_a_root_was_removed(
    tmp_path: Path, root_removed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody puts an older file of a key back after the pass that rewrapped it. The removed root key opens it."""
    real = KekRotation.run_pass
    formers: dict[Path, bytes] = {}

    async def restoring(self: KekRotation, rotation: keyring.Rotation, *, reads_all: bool) -> int:
        assert reads_all == root_removed
        while formers:
            path, content = formers.popitem()
            path.write_bytes(content)
        return await real(self, rotation, reads_all=reads_all)

    monkeypatch.setattr(KekRotation, "run_pass", restoring)

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(2)
        formers.update({one.file(key_id): one.file(key_id).read_bytes() for key_id in key_ids[:1]})
        if root_removed:
            gone = keyring.RevokingRoot("s9", "0" * 16, "file", "2026-01-01T00:00:00Z", 2)
            await one.vault.keyring.change(
                lambda body: msgspec.structs.replace(body, revoking=(gone,), epoch=body.epoch + 1)
            )
        await one.rotate()
        assert one.keks_on_disk(key_ids[:1]) == {2 if root_removed else 1}
        assert one.keks_on_disk(key_ids[1:]) == {2}


async def test_a_key_that_does_not_survive_its_rewrap_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, opened = XaesCipher.open_into, itertools.count()

    def spoilt(cipher: XaesCipher, sealed: bytes, aad: bytes, target: memoryview) -> None:
        real(cipher, sealed, aad, target)
        target[0] ^= next(opened)  # the second time, which is the new wrapping, by 1

    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        before = one.file(key_id).read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(XaesCipher, "open_into", spoilt)
            await one.rotate()
        assert one.file(key_id).read_bytes() == before
        assert "did not survive" in one.vault.unreadable.listed()[key_id]


async def test_a_key_that_a_listing_has_twice_is_rewrapped_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second content from the same old one would make the journal's old content differ from the file."""
    real = deks.list_names

    def twice(directory: str) -> Iterator[str]:
        names = sorted(real(directory))
        for at in range(0, len(names), 7):
            yield from names[at : at + 7] * 2

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(20)
        monkeypatch.setattr(deks, "list_names", twice)
        await one.begin(None)
        running = one.rotation.running
        assert running is not None
        assert await one.rotation.run_pass(running) == 20
        assert {one.on_disk(key_id).version for key_id in key_ids} == {2}
        assert all(len(one.backups(key_id)) == 1 for key_id in key_ids)
        await one.rotation.run()
