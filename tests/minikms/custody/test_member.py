"""The directory of a member: changes that the database has first, and those that it takes from there."""

import asyncio
from pathlib import Path

import pytest

from minikms.api.errors import StandbyError
from tests.harness.members import join, make_first, opened_member
from tests.harness.replica_database import ReplicaDatabase
from tests.harness.vaults import create


async def test_the_first_member_fills_an_empty_database(tmp_path: Path) -> None:
    database = ReplicaDatabase()
    key_ids = await make_first(tmp_path / "a", keys=3)

    async with opened_member(tmp_path / "a", database) as first:
        await first.serve()
        made = await create(first.vault, "t")

    assert sorted(database.tables.files) == sorted([*key_ids, made.id])
    assert database.tables.keyring == (tmp_path / "a" / "keyring.json").read_bytes()


async def test_a_member_that_does_not_serve_changes_nothing(tmp_path: Path) -> None:
    await make_first(tmp_path / "a")
    async with opened_member(tmp_path / "a", ReplicaDatabase()) as first:
        with pytest.raises(StandbyError):
            await create(first.vault, "t")
        assert not list((tmp_path / "a" / "kms-deks").iterdir())


async def test_a_change_is_written_here_only_after_the_database_has_it(tmp_path: Path) -> None:
    database = ReplicaDatabase()
    await make_first(tmp_path / "a")
    async with opened_member(tmp_path / "a", database) as first:
        await first.serve()
        database.refuse = True
        making = asyncio.create_task(create(first.vault, "t"))
        commit = await first.directory.next_commit(1)
        assert commit is not None
        assert commit == await first.directory.next_commit(1), "the same bytes again"
        assert not list((tmp_path / "a" / "kms-deks").iterdir())
        first.directory.stop_serving()
        with pytest.raises(StandbyError):
            await making
    assert not list((tmp_path / "a" / "kms-deks").iterdir())


async def test_a_second_member_follows_the_files(tmp_path: Path) -> None:
    database = ReplicaDatabase()
    await make_first(tmp_path / "a", keys=2)
    join(tmp_path / "b", tmp_path / "a")
    async with opened_member(tmp_path / "a", database) as first, opened_member(tmp_path / "b", database) as second:
        await first.serve()
        made = [await create(first.vault, "t") for _ in range(3)]
        await first.vault.retire(made[0].id)
        await second.follow()
        assert second.vault.record(made[0].id).state == "retired"
        assert second.one.keys(one.id for one in made) == first.one.keys(one.id for one in made)
        assert second.directory.mark.number == first.directory.mark.number
