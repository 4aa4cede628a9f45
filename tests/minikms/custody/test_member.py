"""The directory of a member that serves: the database has each change before it is written here."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from minikms.api.errors import (
    ConflictError,
    KeyDestroyedError,
    KmsRefusedError,
    StandbyError,
    StorageUnavailableError,
)
from minikms.custody import replica_file
from minikms.custody.journal import Journal
from minikms.custody.journal_format import Change
from minikms.custody.keyring_file import KeyringFile
from minikms.custody.replication import Written
from minikms.custody.tombstone_file import Tombstones
from minikms.keys.replica import SignedState
from minikms.platform.files import closed_after, open_directory
from tests.harness.disk_faults import failing_os, refuse
from tests.harness.members import OpenedMember, make_first, opened_member
from tests.harness.replica_database import ReplicaDatabase
from tests.harness.vaults import create


@asynccontextmanager
async def serving(tmp_path: Path, *, keys: int = 0) -> AsyncIterator[OpenedMember]:
    await make_first(tmp_path / "a", keys=keys)
    async with opened_member(tmp_path / "a", ReplicaDatabase()) as first:
        await first.serve()
        yield first


def files(one: OpenedMember) -> set[str]:
    return {path.stem for path in (one.one.directory / "kms-deks").iterdir()}


def number_on_disk(one: OpenedMember) -> int:
    with closed_after(open_directory(str(one.one.directory))) as directory_fd:
        stored = replica_file.read(directory_fd)
    assert stored is not None
    return stored.check(one.vault.unlocked).number


async def test_the_first_member_fills_an_empty_database(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=3) as first:
        assert not first.directory.fills
        await create(first.vault, "t")

    tables = first.replicator.database.tables
    assert set(tables.files) == files(first)
    assert len(tables.files) == 4
    assert tables.keyring == (tmp_path / "a" / "keyring.json").read_bytes()


async def test_a_fill_that_was_interrupted_begins_again(tmp_path: Path) -> None:
    await make_first(tmp_path / "a", keys=3)
    database = ReplicaDatabase()
    async with opened_member(tmp_path / "a", database) as first:
        first.replicator.take_over()
        filling = asyncio.create_task(first.directory.fill())
        assert await first.replicator.step(1)
        first.directory.stop_serving()
        with pytest.raises(StandbyError):
            await filling
        assert (first.directory.fills, database.tables.keyring) == (True, b"")
        await first.serve()
        assert not first.directory.fills
    assert set(database.tables.files) == files(first)


async def test_a_member_that_does_not_serve_changes_nothing(tmp_path: Path) -> None:
    await make_first(tmp_path / "a")
    async with opened_member(tmp_path / "a", ReplicaDatabase()) as first:
        with pytest.raises(StandbyError):
            await create(first.vault, "t")
        assert not files(first)


async def test_a_change_is_written_here_only_after_the_database_has_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as first:
        first.replicator.database.refuse = True
        making = asyncio.create_task(create(first.vault, "t"))
        commit = await first.directory.next_commit(1)
        assert commit is not None
        assert commit == await first.directory.next_commit(1), "the same bytes again"
        later = asyncio.create_task(create(first.vault, "later"))
        await asyncio.sleep(0.01)
        first.directory.stop_serving()
        for change, code in ((making, "interrupted"), (later, "standby")):
            with pytest.raises(StandbyError) as refused:
                await change
            assert refused.value.code == code
        assert not files(first)


async def test_a_commit_whose_answer_is_lost_is_known_from_the_head(tmp_path: Path) -> None:
    async with serving(tmp_path) as first:
        first.replicator.database.lose = [False, True]
        made = await create(first.vault, "t")
        assert first.replicator.database.lose == []
        assert files(first) == {made.id}


async def test_changes_that_wait_form_one_commit(tmp_path: Path) -> None:
    async with serving(tmp_path) as first:
        before = first.replicator.database.tables.number
        first.replicator.database.refuse = True
        making = [asyncio.create_task(create(first.vault, "t"))]
        await first.directory.next_commit(1)
        making += [asyncio.create_task(create(first.vault, f"t{number}")) for number in range(9)]
        await asyncio.sleep(0.05)
        first.replicator.database.refuse = False
        await asyncio.gather(*making)
        assert first.replicator.database.tables.number == before + 2


async def test_a_change_that_can_not_be_signed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as first:
        await first.halt()
        making = asyncio.create_task(create(first.vault, "t"))
        with monkeypatch.context() as failing, pytest.raises(StorageUnavailableError):
            failing.setattr(SignedState, "signed", refuse)
            await first.directory.next_commit(1)
        with pytest.raises(StorageUnavailableError, match="was not made"):
            async with asyncio.timeout(60):
                await making
        making = asyncio.create_task(create(first.vault, "t"))
        assert await first.replicator.step(1)
        made = await making
        assert files(first) == {made.id}


async def test_a_cancelled_change_that_the_database_has_is_written_here(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=1) as first:
        (key_id,) = files(first)
        first.replicator.database.refuse = True
        retiring = asyncio.create_task(first.vault.retire(key_id))
        await first.directory.next_commit(1)
        retiring.cancel()
        await asyncio.sleep(0.02)
        first.replicator.database.refuse = False
        with pytest.raises(asyncio.CancelledError):
            await retiring
        assert first.one.on_disk(key_id).state == "retired"
        assert not first.directory.behind


async def test_a_member_whose_disk_refuses_a_change_serves_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as first:
        await first.directory.write_mark()
        before = number_on_disk(first)
        with monkeypatch.context() as failing:
            failing.setattr(Journal, "write", refuse)
            with pytest.raises(StorageUnavailableError):
                await create(first.vault, "t")
        assert (first.directory.behind, first.directory.serves, first.directory.scanned) == (True, False, False)
        await first.directory.write_mark()
        assert number_on_disk(first) == before
        with pytest.raises(ConflictError):
            first.replicator.take_over()

        await first.stop()
        await first.directory.scan()
        await first.follow()
        assert files(first) == set(first.replicator.database.tables.files) != set()
        assert number_on_disk(first) == first.replicator.database.tables.number
        await first.serve()


@pytest.mark.parametrize("then", ["follows", "fills"])
async def test_a_member_whose_disk_was_full_has_all_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Some of them in its journal only, while it lists its files."""
    async with serving(tmp_path, keys=1) as first:
        await create(first.vault, "t")  # its journal has room from here on
        with failing_os(monkeypatch, "write"):
            await create(first.vault, "t")
            with pytest.raises(StorageUnavailableError):
                await create(first.vault, "t")
            await first.stop()
            with pytest.raises(StorageUnavailableError):
                await first.directory.scan()
        if then == "fills":
            first.replicator.database = ReplicaDatabase()
            first.directory.may_begin()
        await first.directory.scan()
        await first.serve()
        assert files(first) == set(first.replicator.database.tables.files)
        assert len(files(first)) == (4 if then == "follows" else 3)


@pytest.mark.parametrize("refused", [(Tombstones, "append"), (KeyringFile, "store_now")], ids=["records", "keyring"])
async def test_a_destruction_that_only_the_database_has_is_final_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[type, str]
) -> None:
    async with serving(tmp_path, keys=1) as first:
        (key_id,) = files(first)
        await first.vault.retire(key_id)
        first.vault.opened(key_id)
        with monkeypatch.context() as failing:
            failing.setattr(*refused, refuse)
            with pytest.raises(StorageUnavailableError, match="the key is destroyed"):
                await first.vault.destroy(key_id)
        with pytest.raises(KeyDestroyedError):
            first.vault.opened(key_id)
        assert first.directory.behind

        await first.stop()
        await first.directory.scan()
        await first.follow()
        assert (first.vault.destroyed.count, files(first)) == (1, set())


async def test_a_key_that_is_being_destroyed_gets_no_new_file(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=2) as first:
        key_id, other = sorted(files(first))
        await first.vault.retire(key_id)
        await first.one.begin()
        first.replicator.database.refuse = True
        destroying = asyncio.create_task(first.vault.destroy(key_id))
        await first.directory.next_commit(1)
        destroying.cancel()  # it goes on without the lock
        running = asyncio.create_task(first.one.rotation.run())
        while not first.one.rotation.last_error:
            await asyncio.sleep(0.01)
        assert first.one.rotation.last_error == "a key of the change is being changed or destroyed"
        first.replicator.database.refuse = False
        await running
        assert set(first.replicator.database.tables.files) == {other}
        assert first.one.on_disk(other).kek_version == 2


async def test_a_key_whose_file_is_being_changed_is_not_destroyed(tmp_path: Path) -> None:
    """By a destruction without its lock: it would take the former file from the sum, which the change takes too."""
    async with serving(tmp_path, keys=1) as first:
        (key_id,) = files(first)
        await first.halt()
        retiring = asyncio.create_task(first.vault.retire(key_id))
        assert await first.directory.next_commit(1) is not None
        with pytest.raises(ConflictError):
            async with first.directory.committed(Written(destroyed=[key_id])):
                pass
        first.directory.stop_serving()
        with pytest.raises(StandbyError):
            await retiring


async def test_the_mark_names_no_change_that_is_still_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as first:
        before, written = first.directory.mark.number, asyncio.Event()
        replace = first.vault.journal.create

        async def slow(changes: Sequence[Change]) -> None:
            await written.wait()
            await replace(changes)

        monkeypatch.setattr(first.vault.journal, "create", slow)
        making = asyncio.create_task(create(first.vault, "t"))
        while first.directory.mark.number == before:
            await asyncio.sleep(0.01)
        await first.directory.write_mark()
        assert number_on_disk(first) == before
        first.directory.stop_serving()
        with pytest.raises(StorageUnavailableError, match="still being written"):
            await first.directory.scan()
        written.set()
        await making
        await first.directory.write_mark()
        assert number_on_disk(first) == before + 1


async def test_a_change_that_no_commit_can_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as first:
        monkeypatch.setattr("minikms.api.REPLICA_BYTES_MAX", 100)
        with pytest.raises(ConflictError, match="more than a commit of the database takes"):
            await create(first.vault, "t")


async def test_a_rotation_waits_while_another_member_serves(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=2) as first:
        await first.one.begin()
        await first.stop()
        running = asyncio.create_task(first.one.rotation.run())
        await asyncio.sleep(0.05)
        assert {first.one.on_disk(key_id).kek_version for key_id in files(first)} == {1}
        await first.serve()
        await running
        assert {first.one.on_disk(key_id).kek_version for key_id in files(first)} == {2}


async def test_a_key_that_stayed_active_is_retired_by_the_next_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, keys=1) as first:
        (old,) = files(first)
        with monkeypatch.context() as failing:
            failing.setattr(first.vault, "retire", refuse)
            with pytest.raises(StorageUnavailableError):
                await create(first.vault, "t", replaces=old)
        (new,) = first.vault.replacing.values()
        assert first.vault.record(new.id).state == "active", "it stays: other members have it"
        indexing = asyncio.create_task(first.one.indexing.run())
        while first.one.on_disk(old).state == "active":
            await asyncio.sleep(0.01)
        indexing.cancel()


async def test_a_start_of_a_member_leaves_the_keyring_as_it_is(tmp_path: Path) -> None:
    async with serving(tmp_path) as first:
        database = first.replicator.database
    before = (tmp_path / "a" / "keyring.json").read_bytes()
    async with opened_member(tmp_path / "a", database):
        pass
    assert (tmp_path / "a" / "keyring.json").read_bytes() == before


async def test_a_member_does_not_begin_to_serve_while_it_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, keys=1) as first:
        await first.stop()
        reading, read = threading.Event(), first.vault.store.read_many

        def slow(key_ids: Iterable[str]) -> list[tuple[str, bytes | KmsRefusedError]]:
            reading.wait()
            return read(key_ids)

        monkeypatch.setattr(first.vault.store, "read_many", slow)
        (request,) = first.replicator.database.tables.parts(0, 0)
        following = asyncio.create_task(first.directory.follow(request))
        await asyncio.sleep(0.02)
        with pytest.raises(ConflictError, match="has to follow before it serves"):
            first.replicator.take_over()
        reading.set()
        await following
        first.replicator.take_over()
