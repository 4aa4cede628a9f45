"""The statements over a real PostgreSQL: conditions, rights, bounds, and what counts as confirmed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from minikms.api import ReplicaCommit, ReplicaFile
from minikms.api.base64 import encode_text
from minikms.api.errors import StartError
from minikms.processes.postgresql import FAILURES
from minikms_replicator import fetching, tables
from minikms_replicator.tables import RenewedLease, Tables, TablesError
from tests.harness import postgres
from tests.harness.postgres import url_of
from tests.minikms_replicator.fake_member import Member, content, key_id
from tests.minikms_replicator.rig import ROLE, fresh


@contextlib.asynccontextmanager
async def opened(url: str, *, single_node: bool = True) -> AsyncIterator[Tables]:
    found = Tables(url, single_node=single_node)
    try:
        yield found
    finally:
        found.close()


def commit(
    number: int, *files: int, destroyed: tuple[int, ...] = (), keyring: bytes = b"", after: int = 0
) -> ReplicaCommit:
    return ReplicaCommit(
        previous=number - 1, number=number, state=b"s", keyring=keyring, tombstones_after=after,
        tombstones=b"".join(b"%040d" % one for one in destroyed),
        files=[ReplicaFile(key_id(one), encode_text(content(one))) for one in files],
        destroyed=[key_id(one) for one in destroyed],
    )  # fmt: skip


async def taken(found: Tables, member: Member) -> RenewedLease:
    lease = await found.take_over(await found.head(), member.position())
    assert lease is not None
    return lease


async def everything(found: Tables, number: int = -1, tombstones: int = 0) -> tuple[dict[str, str], bytes]:
    files: dict[str, str] = {}
    records = b""
    async with found.snapshot():
        async for part in found.parts(number, tombstones):
            files |= {file.key_id: file.content for file in part.files}
            records += part.tombstones
    return files, records


async def test_a_change_is_made_on_its_condition_alone(database: str) -> None:
    async with opened(await fresh(database)) as found:
        lease = await taken(found, Member("m1", begins=True))
        assert lease.term == 1
        change = commit(1, 1, 2, keyring=b"k")
        assert await found.change(2, "m1", change, 0) is None
        assert await found.change(1, "m2", change, 0) is None
        assert await found.change(1, "m1", commit(2, 1), 0) is None
        assert (await found.head()).number == 0
        assert await everything(found) == ({}, b"")
        made = await found.change(1, "m1", change, 3)
        assert made is not None
        assert (made.number, made.seals) == (1, 3)
        assert await found.change(1, "m1", change, 0) is None, "the same commit again"
        assert await found.renew(1, "m1", (0,), 0) is None
        assert await found.renew(1, "m1", (0, 1), 0) is not None
        await found.change(1, "m1", commit(2, 2, 3, destroyed=(1,), after=0), 0)
        assert await everything(found) == (
            {key_id(one): encode_text(content(one)) for one in (2, 3)},
            b"%040d" % 1,
        )
        assert (await everything(found, 2, 1)) == ({}, b"")
        head = await found.head()
        assert (head.number, head.seals, head.empty, await found.keyring()) == (2, 3, False, b"k")


async def test_of_two_that_take_over_at_once_one_does(database: str) -> None:
    url = await fresh(database)
    async with opened(url) as one, opened(url) as two:
        head = await one.head()
        first, second = Member("m1", begins=True), Member("m2", begins=True)
        taken = await asyncio.gather(one.take_over(head, first.position()), two.take_over(head, second.position()))
        assert sorted(lease is None for lease in taken) == [False, True]
        (lease,) = filter(None, taken)
        await one.release(lease, "m3", 0)
        assert (await one.head()).member in ("m1", "m2"), "of another member nothing is released"


async def test_a_lease_that_was_renewed_by_another_process_is_not_released(database: str) -> None:
    """Of a replicator that stood still, while another one of the same host went on."""
    url = await fresh(database)
    async with opened(url) as one, opened(url) as two:
        lease = await taken(one, Member("m1", begins=True))
        renewed = await two.renew(lease.term, "m1", [0], 0)
        await one.release(lease, "m1", 0)
        assert (await one.head()).member == "m1"
        assert renewed is not None
        await two.release(renewed, "m1", 0)
        assert (await one.head()).member == ""


async def test_tables_of_another_keyring_are_not_taken(database: str) -> None:
    async with opened(await fresh(database)) as found:
        lease = await taken(found, Member("m1", begins=True))
        await found.change(lease.term, "m1", commit(1, keyring=b"k"), 0)
        lease = await found.renew(lease.term, "m1", [1], 0) or lease
        await found.release(lease, "m1", 0)
        connection = await asyncpg.connect(database)
        await connection.execute("UPDATE kms_head SET keyring_id = 'kr_other'")
        await connection.close()
        member = Member("m2")
        member.number = 1
        assert await found.take_over(await found.head(), member.position()) is None


async def test_tables_that_are_filled_anew_keep_no_file_of_a_broken_attempt(database: str) -> None:
    async with opened(await fresh(database)) as found:
        member = Member("m1", begins=True)
        lease = await taken(found, member)
        await found.change(lease.term, "m1", commit(1, 1, 2, destroyed=(3,)), 0)
        lease = await taken(found, member)
        assert (lease.term, lease.number) == (2, 1)
        assert await everything(found) == ({}, b"")


async def test_what_follows_comes_in_parts_of_one_snapshot(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_FILES", tables._FILES.replace(f"LIMIT {tables.PART_FILES}", "LIMIT 2"))
    monkeypatch.setattr(tables, "PART_FILES", 2)
    url = await fresh(database)
    async with opened(url) as found, opened(url) as other:
        lease = await taken(found, Member("m1", begins=True))
        await found.change(lease.term, "m1", commit(1, 1, 2, 3), 0)
        await found.change(lease.term, "m1", commit(2, 4, 5, keyring=b"k"), 0)
        async with other.snapshot():
            await other.head()
            await found.change(lease.term, "m1", commit(3, 6), 0)
            seen = [[file.key_id for file in part.files] async for part in other.parts(0, 0)]
        assert seen == [[key_id(1), key_id(2)], [key_id(3), key_id(4)], [key_id(5)]]


async def test_a_replicators_role_can_not_change_tombstones(database: str) -> None:
    url = await fresh(database)
    connection = await asyncpg.connect(url)
    for statement in (
        "UPDATE kms_tombstone SET position = 1", "DELETE FROM kms_head",
        "UPDATE kms_schema SET number = 2", "TRUNCATE kms_file", "CREATE TEMPORARY TABLE t (i integer)",
    ):  # fmt: skip
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    await connection.close()
    async with opened(url) as found:
        assert await found.examine() == [
            "fsync or full_page_writes is off: a power failure loses what was acknowledged"
        ]
    async with opened(database) as found:
        assert any("may do more" in problem for problem in await found.examine())


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("INSERT INTO kms_file VALUES ('k', 1, repeat('x', 2000000)::bytea)", "key file in the database is larger"),
        ("UPDATE kms_head SET keyring = repeat('x', 7000000)::bytea", "keyring in the database is larger"),
        ("INSERT INTO kms_tombstone VALUES (1, 'short')", "damaged at record 1"),
        ("INSERT INTO kms_tombstone VALUES (2, repeat('0', 40)::bytea)", "damaged at record 1"),
    ],
)
async def test_what_is_too_large_or_has_a_gap_is_not_passed_on(database: str, damage: str, why: str) -> None:
    url = await fresh(database)
    connection = await asyncpg.connect(database)
    await connection.execute("ALTER TABLE kms_file DROP CONSTRAINT kms_file_content_check")
    await connection.execute("ALTER TABLE kms_tombstone DROP CONSTRAINT kms_tombstone_record_check")
    await connection.execute(damage)
    await connection.close()
    async with opened(url) as found:
        with pytest.raises(TablesError, match=why):
            await everything(found)
            await found.keyring()


async def test_tables_without_standbys_are_used_on_request_alone(database: str) -> None:
    async with opened(await fresh(database), single_node=False) as found:
        with pytest.raises(TablesError, match="synchronous_standby_names is empty"):
            await found.head()


async def test_a_commit_counts_when_a_standby_has_confirmed_it() -> None:
    with postgres.running() as (settings, _):
        url = await fresh(url_of(settings))
        owner = await asyncpg.connect(url_of(settings), server_settings={"synchronous_commit": "local"})
        await owner.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        await owner.execute("SELECT pg_reload_conf()")
        with postgres.receiver(settings, "standby") as standby:
            async with opened(url, single_node=False) as found:
                lease = await taken(found, Member("m1", begins=True))
                assert found.settled_ns is not None
                standby.kill()
                changing = asyncio.ensure_future(found.change(lease.term, "m1", commit(1, 1), 0))
                waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                async with asyncio.timeout(60):
                    while not (pid := await owner.fetchval(waiting)):
                        await asyncio.sleep(0.02)
                await owner.execute("SELECT pg_cancel_backend($1)", pid)
                with pytest.raises(FAILURES):
                    await changing
                assert (await owner.fetchval("SELECT number FROM kms_head")) == 1, "it is there, and does not count"
        await owner.close()


async def test_a_reset_waits_for_the_lease_of_who_served(database: str) -> None:
    url = await fresh(database)
    async with opened(url) as found:
        lease = await taken(found, Member("m1", begins=True))
        await found.change(lease.term, "m1", commit(1, 1, keyring=b"k"), 4)
        await tables.reset(database)
        assert await found.renew(lease.term, "m1", (1, 0), 0) is None
        head = await found.head()
        assert (head.member, head.term, head.number, head.seals, head.empty) == ("m1", lease.term + 1, 0, 4, True)
        assert await everything(found) == ({}, b"")


async def test_other_tables_are_refused(database: str) -> None:
    url = await fresh(database)
    with pytest.raises(StartError, match="already"):
        await tables.init(database, ROLE)
    connection = await asyncpg.connect(database)
    await connection.execute("UPDATE kms_schema SET number = 2")
    async with opened(url) as found:
        with pytest.raises(TablesError, match="have number 2, this version has 1"):
            await found.head()
    await connection.execute("DROP TABLE kms_schema")
    await connection.close()
    async with opened(url) as found:
        with pytest.raises(TablesError, match="run minikms-replicator init"):
            await found.head()


async def test_a_directory_is_fetched_once_and_while_no_daemon_has_it(database: str, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir(0o700)
    async with opened(await fresh(database)) as found:
        with pytest.raises(StartError, match="just joined"):
            await fetching.fetch(found, str(directory))
        (directory / "kms-replica.json").write_bytes(b"")
        with pytest.raises(TablesError, match="are empty"):
            await fetching.fetch(found, str(directory))
        lease = await taken(found, Member("m1", begins=True))
        await found.change(lease.term, "m1", commit(1, 1, 2, destroyed=(3,), keyring=b"k"), 0)
        (directory / "kms-deks" / "of-an-interrupted-run.json").write_bytes(b"")
        assert await fetching.fetch(found, str(directory)) == (1, 2, 1)
        assert {path.name: path.read_bytes() for path in (directory / "kms-deks").iterdir()} == {
            f"{key_id(one)}.json": content(one) for one in (1, 2)
        }
        assert (directory / "keyring.json").read_bytes() == b"k"
        assert (directory / "kms-tombstones").read_bytes() == fetching.HEADER + b"%040d" % 3
        with pytest.raises(StartError, match="just joined"):
            await fetching.fetch(found, str(directory))


def test_the_written_header_is_that_of_a_tombstone_file() -> None:
    from minikms.keys import dek, tombstones

    assert fetching.HEADER == tombstones.HEADER
    assert (tables.RECORD_BYTES, tables.CONTENT_BYTES_MAX) == (tombstones.RECORD_BYTES, dek.FILE_BYTES)
