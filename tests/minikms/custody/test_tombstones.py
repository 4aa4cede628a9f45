"""Tombstones: cut or altered ones are refused, and a destruction that was acknowledged holds."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from minikms.api.errors import KeyDestroyedError, StartError, StorageUnavailableError
from minikms.custody import tombstone_file
from minikms.custody.keyring_file import KeyringFile
from minikms.keys.tombstones import HEADER_BYTES, RECORD_BYTES, NumberedTombstone
from minikms.platform import files
from tests.harness.disk_faults import failing_os, flip
from tests.harness.vaults import OpenedVault, opened_vault
from tests.minikms.custody.tombstones import tombstone_path


@asynccontextmanager
async def destroyed(directory: Path, count: int) -> AsyncIterator[tuple[OpenedVault, list[str]]]:
    """An opened vault, of whose six retired keys the first `count` are destroyed, one after the other."""
    async with opened_vault(directory) as one:
        key_ids = await one.make(6)
        for key_id in key_ids:
            await one.vault.retire(key_id)
        for key_id in key_ids[:count]:
            await one.vault.destroy(key_id)
        yield one, key_ids


def counted(one: OpenedVault) -> int:
    log = one.vault.keyring.body.tombstone_log
    assert log is not None
    return log.count


def run(directory: Path, scenario: Callable[[OpenedVault, list[str]], object], *, count: int = 0) -> list[str]:
    async def main() -> list[str]:
        async with destroyed(directory, count) as (one, key_ids):
            result = scenario(one, key_ids)
            if asyncio.iscoroutine(result):
                await result
            return key_ids

    return asyncio.run(main())


def start(directory: Path) -> tuple[set[str], int]:
    """The keys that a start finds destroyed, of those that had a file, and the number that its keyring counts."""

    async def main() -> tuple[set[str], int]:
        async with opened_vault(directory) as one:
            assert counted(one) == len(one.vault.destroyed)
            listed = {path.stem for path in one.file("").parent.glob("k_*.json")}
            await one.indexing.run()
            return {key_id for key_id in listed if key_id in one.vault.destroyed}, counted(one)

    return asyncio.run(main())


# --- one destruction ----------------------------------------------------------------------------------------------


def test_a_destroyed_key_stays_destroyed_when_its_file_is_put_back(tmp_path: Path) -> None:
    kept: dict[str, bytes] = {}

    async def scenario(one: OpenedVault, key_ids: list[str]) -> None:
        kept[key_ids[0]] = one.file(key_ids[0]).read_bytes()
        await one.vault.destroy(key_ids[0])
        with pytest.raises(KeyDestroyedError):
            one.vault.opened(key_ids[0])

    [victim, *_] = run(tmp_path / "d", scenario)
    file = tmp_path / "d" / "kms-deks" / f"{victim}.json"
    file.write_bytes(kept[victim])
    assert start(tmp_path / "d") == ({victim}, 1)
    assert not file.exists()


def test_the_keyring_does_not_grow_with_the_destructions(tmp_path: Path) -> None:
    sizes: list[int] = []

    async def scenario(one: OpenedVault, key_ids: list[str]) -> None:
        for key_id in key_ids:
            await one.vault.destroy(key_id)
            sizes.append((one.directory / "keyring.json").stat().st_size)

    run(tmp_path / "d", scenario)
    assert max(sizes) - min(sizes) < 8
    assert (tmp_path / "d" / "kms-tombstones").stat().st_size == HEADER_BYTES + 6 * RECORD_BYTES


def test_a_destruction_names_its_tombstone_also_when_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a key that is not among the last ones, after a start."""
    monkeypatch.setattr(tombstone_file, "RECENT_BYTES_MAX", 2 * RECORD_BYTES)

    async def tombstones(one: OpenedVault, key_ids: list[str]) -> list[NumberedTombstone]:
        return [(await one.vault.destroy(key_id)).tombstone for key_id in key_ids]

    async def main() -> list[NumberedTombstone]:
        async with destroyed(tmp_path / "d", 0) as (one, key_ids):
            found = await tombstones(one, key_ids)
            assert await tombstones(one, key_ids) == found
        async with opened_vault(tmp_path / "d") as one:
            assert await tombstones(one, key_ids) == found
            flip(tombstone_path(one), HEADER_BYTES + 20)
            assert await tombstones(one, key_ids[-2:]) == found[-2:]
            with pytest.raises(StorageUnavailableError, match="read back"):
                await one.vault.destroy(key_ids[0])
            flip(tombstone_path(one), HEADER_BYTES + 20)
        return found

    found = asyncio.run(main())
    content = (tmp_path / "d" / "kms-tombstones").read_bytes()
    stored = [content[at : at + RECORD_BYTES] for at in range(HEADER_BYTES, len(content), RECORD_BYTES)]
    assert [(each.number, each.tag) for each in found] == [(at + 1, row[24:]) for at, row in enumerate(stored)]


def test_destructions_of_one_turn_share_one_write_of_the_keyring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    store_now = KeyringFile.store_now

    def counting(self: KeyringFile, data: bytes) -> None:
        writes.append(len(data))
        store_now(self, data)

    async def scenario(one: OpenedVault, key_ids: list[str]) -> None:
        await one.rotate()
        monkeypatch.setattr(KeyringFile, "store_now", counting)
        removed = await asyncio.gather(*map(one.vault.destroy, key_ids))
        assert ([done[:2] for done in removed], len(writes), counted(one)) == ([(1, [])] * 6, 1, 6)
        assert (await one.vault.destroy(key_ids[0])).backups == 0, "a repeated one writes nothing"
        assert len(writes) == 1

    run(tmp_path / "d", scenario)


# --- failing disks and crashes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync", "rename"])
def test_a_destruction_that_the_disk_refused_is_completed_by_a_repetition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async def scenario(one: OpenedVault, key_ids: list[str]) -> None:
        with failing_os(monkeypatch, call), pytest.raises(StorageUnavailableError):
            await one.vault.destroy(key_ids[1])
        with failing_os(monkeypatch, call), contextlib.suppress(StorageUnavailableError):
            await one.vault.destroy(key_ids[2])
        assert one.keys(key_ids[3:])
        for number in (2, 1, 0):
            await one.vault.destroy(key_ids[number])
        assert counted(one) == 3

    run(tmp_path / "d", scenario, count=1)
    assert start(tmp_path / "d") == (set(), 3)


@pytest.mark.parametrize("call", ["pwrite", "rename", "unlink"])
def test_an_error_says_whether_the_key_is_destroyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """On a full disk: the tombstone, the keyring that counts it, or the removal of the files fails."""

    async def scenario(one: OpenedVault, key_ids: list[str]) -> None:
        key_id = key_ids[1]
        with failing_os(monkeypatch, call), pytest.raises(StorageUnavailableError) as failure:
            await one.vault.destroy(key_id)
        destroyed = call != "pwrite"
        assert str(failure.value).startswith("the key is destroyed and opens no more, but ") == destroyed
        assert ("the key opens as before" in str(failure.value)) != destroyed
        assert one.vault.unfinished_destructions == ({key_id} if destroyed else set())
        if destroyed:
            with pytest.raises(KeyDestroyedError):
                one.vault.opened(key_id)
        else:
            assert one.keys([key_id])
        await one.vault.destroy(key_id)
        assert (one.vault.unfinished_destructions, one.file(key_id).exists()) == (set(), False)

    run(tmp_path / "d", scenario, count=1)


def test_of_one_group_each_key_gets_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One was destroyed before and its removal is repeated; the tombstone of the other can't be written."""

    async def scenario(one: OpenedVault, key_ids: list[str]) -> None:
        with failing_os(monkeypatch, "unlink"), pytest.raises(StorageUnavailableError):
            await one.vault.destroy(key_ids[1])
        with failing_os(monkeypatch, "pwrite"):
            failures = await asyncio.gather(*map(one.vault.destroy, key_ids[1:3]), return_exceptions=True)
        assert ["the key is destroyed" in str(failure) for failure in failures] == [True, False]
        assert one.vault.unfinished_destructions == {key_ids[1]}

    run(tmp_path / "d", scenario, count=1)


def test_a_record_that_no_keyring_counts_is_adopted_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record was durable, then the keyring could not be written. The key is destroyed in this run too."""

    def refuse(self: KeyringFile, data: bytes) -> None:
        raise StorageUnavailableError("no space")

    async def scenario(one: OpenedVault, key_ids: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(KeyringFile, "store_now", refuse)
            with pytest.raises(StorageUnavailableError):
                await one.vault.destroy(key_ids[2])
        with pytest.raises(KeyDestroyedError):
            one.vault.opened(key_ids[2])
        assert (counted(one), one.file(key_ids[2]).exists()) == (2, True)

    key_ids = run(tmp_path / "d", scenario, count=2)
    written: list[str] = []

    def spy(directory_fd: int, name: str, chunks: Iterable[bytes]) -> None:
        written.append(name)
        files.replace_file_from(directory_fd, name, chunks)

    monkeypatch.setattr(tombstone_file, "replace_file_from", spy)
    assert start(tmp_path / "d") == ({key_ids[2]}, 3)
    assert written == [tombstone_file.NAME], "it may have been in the page cache only"


def test_an_append_that_was_cut_off_is_replaced_by_the_next_one(tmp_path: Path) -> None:
    run(tmp_path / "d", lambda one, key_ids: None, count=2)
    path = tmp_path / "d" / "kms-tombstones"
    whole = path.read_bytes()
    for torn in (b"x", bytes(RECORD_BYTES), os.urandom(100)):
        path.write_bytes(whole + torn)
        assert start(tmp_path / "d") == (set(), 2)

    async def destroy_more() -> None:
        async with opened_vault(tmp_path / "d") as one:
            [key_id] = await one.make(1)
            await one.vault.retire(key_id)
            await one.vault.destroy(key_id)

    asyncio.run(destroy_more())
    assert start(tmp_path / "d") == (set(), 3)
    assert len(path.read_bytes()) == len(whole) + RECORD_BYTES


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "is damaged or is not one"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is cut short: it has 1 records.*counts 2"),
        (lambda path: path.write_bytes(path.read_bytes()[: HEADER_BYTES + RECORD_BYTES]), "is cut short"),
        (lambda path: flip(path, HEADER_BYTES + 3), "was altered"),
        (lambda path: flip(path, HEADER_BYTES + 2 * RECORD_BYTES - 1), "was altered"),
        (lambda path: flip(path, 19), "was written by another version"),
        (lambda path: path.write_bytes(path.read_bytes() + bytes(RECORD_BYTES * 4097)), "has more bytes"),
    ],
)
def test_a_start_refuses_a_file_that_was_cut_or_altered(
    tmp_path: Path, damage: Callable[[Path], object], why: str
) -> None:
    run(tmp_path / "d", lambda one, key_ids: None, count=2)
    keyring = (tmp_path / "d" / "keyring.json").read_bytes()
    damage(tmp_path / "d" / "kms-tombstones")
    with pytest.raises(StartError, match=f"kms-tombstones {why}.*(Put the newest|docs/runbook)"):
        start(tmp_path / "d")
    assert (tmp_path / "d" / "keyring.json").read_bytes() == keyring


def test_a_record_of_another_keyring_is_not_adopted(tmp_path: Path) -> None:
    for name in "ab":
        run(tmp_path / name, lambda one, key_ids: None, count=1)
    foreign = (tmp_path / "b" / "kms-tombstones").read_bytes()[HEADER_BYTES:]
    with (tmp_path / "a" / "kms-tombstones").open("ab") as file:
        file.write(foreign)
    assert start(tmp_path / "a") == (set(), 1)


def test_a_rotation_to_a_new_root_key_keeps_the_tombstones(tmp_path: Path) -> None:
    """The tombstone key is sealed again; what follows has valid tags under it."""

    async def scenario(one: OpenedVault, key_ids: list[str]) -> None:
        await one.rotate(one.slot_of(bytes(range(32))))
        await one.vault.destroy(key_ids[1])
        body = one.vault.keyring.body
        read = tombstone_file.read_tombstones(tombstone_path(one).read_bytes(), body, one.vault.unlocked.tombstone_key)
        assert (len(read.keys()), counted(one)) == (2, 2)

    run(tmp_path / "d", scenario, count=1)
    assert start(tmp_path / "d") == (set(), 2)
