"""The loops of a replicator over a real PostgreSQL: what is committed, who serves, and what follows."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import pytest

from minikms.api import MemberReport
from minikms.processes.postgresql import NodeConnection
from minikms_replicator import deciding, following, process, serving, tables
from tests.harness.waiting import until
from tests.minikms_replicator import fake_member
from tests.minikms_replicator.fake_member import Member, content, key_id
from tests.minikms_replicator.rig import fresh, replicating

LEASE_NS = 10**9


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(deciding, "WAIT_NS", LEASE_NS * 17 // 16 + 2 * 10**8)
    monkeypatch.setattr(process, "POLL_S", 0.05)
    monkeypatch.setattr(process, "FAILED_S", 0.1)
    yield


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A lease of a second. A test without it has only one member that may serve."""
    for module in (tables, serving, fake_member):
        monkeypatch.setattr(module, "LEASE_NS", LEASE_NS)
    yield


def check_one_at_a_time(*members: Member) -> None:
    """No two members had a lease at one instant. A lease is granted at its first time, and ends at its second."""
    granted = sorted((*one, member.member_id) for member in members for one in member.served)
    for (_, end, _, member), (begin, _, _, other) in itertools.pairwise(granted):
        assert member == other or end <= begin, f"{member} and {other} had a lease"


async def stored(database: str) -> dict[str, bytes]:
    connection = await asyncpg.connect(database)
    try:
        return {row[0]: row[1] for row in await connection.fetch("SELECT key_id, content FROM kms_file")}
    finally:
        await connection.close()


async def filled(member: Member) -> None:
    await until(lambda: member.mode == "serving")
    member.change(1, 2, 3, keyring=b"keyring")
    await until(lambda: member.number == 1)


async def test_a_member_fills_empty_tables_and_another_one_follows(database: str) -> None:
    url = await fresh(database)
    first, second = Member("m1", begins=True), Member("m2")
    async with replicating(url, first, second):
        await filled(first)
        first.change(keyring=b"another keyring")
        first.change(4, destroyed=(2,))
        await until(lambda: second.number == 3)
        assert second.files == {key_id(one): content(one) for one in (1, 3, 4)} == first.files == await stored(database)
        assert second.tombstones == first.tombstones
        assert second.keyring == b"another keyring"
        assert second.mode == "following"
        await until(lambda: {one.member_id for one in second.members} == {"m1", "m2"})


async def test_a_member_follows_only_what_the_standbys_have(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that lost its standbys may show a change that a failover takes back. Each part has one file."""
    monkeypatch.setattr(tables, "_FILES", tables._FILES.replace(f"LIMIT {tables.PART_FILES}", "LIMIT 1"))
    monkeypatch.setattr(tables, "PART_FILES", 1)
    asked: list[str] = []
    confirm = tables.Tables.confirm

    async def unconfirmed(self: tables.Tables, report: MemberReport) -> None:
        asked.append(report.member_id)
        raise tables.TablesError("no standby confirms")

    url = await fresh(database)
    first, second = Member("m1", begins=True), Member("m2")
    monkeypatch.setattr(tables.Tables, "confirm", unconfirmed)
    async with replicating(url, first, second):
        await until(lambda: first.mode == "serving")
        first.change(1, 2, keyring=b"keyring")
        await until(lambda: len(asked) > 1)
        assert second.number == 0 and not second.files
        monkeypatch.setattr(tables.Tables, "confirm", confirm)
        await until(lambda: second.files == first.files)


async def test_a_lost_host_is_followed_by_another_one(database: str, short: None) -> None:
    url = await fresh(database)
    first, second = Member("m1", begins=True), Member("m2")
    async with replicating(url, second):
        async with replicating(url, first):
            await filled(first)
            await until(lambda: second.number == 1)
            first.change(4)
            await until(lambda: first.acknowledged[-1] == key_id(4))
        await until(lambda: second.mode == "serving")
        assert second.lease_term == 2
        assert key_id(4) in second.files
        second.change(5)
        await until(lambda: second.number == 3)
        async with replicating(url, first):
            await until(lambda: first.number == 3)
    check_one_at_a_time(first, second)


async def test_a_member_that_is_wanted_takes_over_at_once(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "WAIT_NS", 10**12)
    url = await fresh(database)
    first, second = Member("m1", begins=True), Member("m2")
    async with replicating(url, first, second):
        await filled(first)
        second.wants = True
        await until(lambda: second.mode == "serving")
        second.wants = False
        assert first.mode == "following"
        second.change(4)
        await until(lambda: first.number == 2)
    check_one_at_a_time(first, second)


async def test_a_daemon_that_ends_its_lease_serves_again_at_once(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after its restart. A lease of its own host that this replicator did not get may be that of a copy."""
    monkeypatch.setattr(deciding, "WAIT_NS", 10**12)
    first = Member("m1", begins=True)
    async with replicating(await fresh(database), first):
        await filled(first)
        first.mode = "following"
        await until(lambda: first.lease_term == 2 and first.mode == "serving")
        first.change(4)
        await until(lambda: first.number == 2)


async def test_a_replicator_that_starts_beside_a_lease_goes_on_with_it(database: str) -> None:
    url = await fresh(database)
    first = Member("m1", begins=True)
    async with replicating(url, first):
        await filled(first)
    async with replicating(url, first):
        first.change(4)
        await until(lambda: first.number == 2)
    assert first.lease_term == 1


async def test_seals_reach_the_head_from_every_member(database: str) -> None:
    url = await fresh(database)
    first, second = Member("m1", begins=True), Member("m2")
    async with replicating(url, first, second):
        await filled(first)
        second.mode, second.seals = "sealed", 3
        connection = await asyncpg.connect(database)
        async with asyncio.timeout(60):
            while await connection.fetchval("SELECT seals FROM kms_head") != 3:
                await asyncio.sleep(0.01)
            first.seals = 4
            while await connection.fetchval("SELECT seals FROM kms_head") != 4:
                await asyncio.sleep(0.01)
        await connection.close()


async def test_a_head_that_a_seal_releases_tells_of_the_seal(database: str) -> None:
    """Nobody takes it over before it has seen that."""
    first = Member("m1", begins=True)
    async with replicating(await fresh(database), first):
        await filled(first)
        first.mode, first.seals = "sealed", 1
        connection = await asyncpg.connect(database)
        async with asyncio.timeout(60):
            while await connection.fetchval("SELECT member FROM kms_head"):
                await asyncio.sleep(0.001)
        assert await connection.fetchval("SELECT seals FROM kms_head") == 1
        await connection.close()


async def test_a_member_whose_term_is_over_commits_nothing(database: str, short: None) -> None:
    first = Member("m1", begins=True)
    async with replicating(await fresh(database), first):
        await filled(first)
        connection = await asyncpg.connect(database)
        first.poll_s = 0.3
        await connection.execute("UPDATE kms_head SET term = 7, member = 'm9', renewals = renewals + 1")
        first.change(4)
        await until(lambda: first.mode == "following")
        assert first.acknowledged[-1] == key_id(3)
        assert key_id(4) not in await stored(database)
        await until(lambda: first.mode == "serving")
        assert first.lease_term == 8, "after a lease of m9, which does not renew it"
        await connection.close()


async def test_a_database_that_is_away_ends_the_lease_and_no_more(
    database: str, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Member("m1", begins=True)
    async with replicating(await fresh(database), first):
        await filled(first)
        with monkeypatch.context() as patch:

            async def lost(self: NodeConnection, *_: Any, **__: Any) -> Any:
                self.terminate()
                raise ConnectionResetError

            patch.setattr(NodeConnection, "fetchrow", lost)
            await until(lambda: first.position().mode == "following")
        await until(lambda: first.mode == "serving")
        first.change(4)
        await until(lambda: first.number == 2)


async def test_a_daemon_that_does_not_answer_keeps_no_other_member_off(database: str, short: None) -> None:
    url = await fresh(database)
    first, second = Member("m1", begins=True), Member("m2")
    async with replicating(url, first, second):
        await filled(first)
        first.away = True
        await until(lambda: second.mode == "serving")
    check_one_at_a_time(first, second)


Fault = Callable[[NodeConnection, Callable[[], Awaitable[Any]]], Awaitable[Any]]


async def before(connection: NodeConnection, _: Callable[[], Awaitable[Any]]) -> Any:
    """The connection is lost before the statement is sent."""
    connection.terminate()
    raise ConnectionResetError


async def after(connection: NodeConnection, made: Callable[[], Awaitable[Any]]) -> Any:
    """The statement is made, and its answer is lost."""
    await made()
    connection.terminate()
    raise ConnectionResetError


async def unconfirmed(connection: NodeConnection, made: Callable[[], Awaitable[Any]]) -> Any:
    """The wait for the standby is cancelled: the commit is there, and may not be on a second disk."""
    row = await made()
    connection.warned = "canceling wait for synchronous replication"
    return row


def at(monkeypatch: pytest.MonkeyPatch, fault: Fault, hits: Callable[[str], bool]) -> None:
    """Each commit that `hits` meets the fault."""
    real = NodeConnection.fetchrow

    async def fetchrow(self: NodeConnection, statement: str, *values: Any, **options: Any) -> Any:
        async def made() -> Any:
            return await real(self, statement, *values, **options)

        return await (fault(self, made) if hits(statement) else made())

    monkeypatch.setattr(NodeConnection, "fetchrow", fetchrow)


async def test_a_lease_counts_from_before_its_commit_was_sent(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still, but for a second in each commit before its answer: a daemon gets less than a lease."""
    now_ns, sent_ns = LEASE_NS, list[int]()
    for module in (tables, serving, following, fake_member):
        monkeypatch.setattr(module, "boot_ns", lambda: now_ns)

    async def slow(_: NodeConnection, made: Callable[[], Awaitable[Any]]) -> Any:
        nonlocal now_ns
        sent_ns.append(now_ns)
        row = await made()
        now_ns += LEASE_NS
        return row

    first = Member("m1", begins=True)
    at(monkeypatch, slow, lambda statement: statement != tables._REPORT)
    async with replicating(await fresh(database), first):
        await filled(first)
        first.change(4)
        await until(lambda: first.number == 2)
    ends_ns = {end_ns for _, end_ns, _ in first.served}
    assert len(ends_ns) > 2
    assert ends_ns <= {one_ns + fake_member.LEASE_NS for one_ns in sent_ns}
    assert all(end_ns - begin_ns < fake_member.LEASE_NS for begin_ns, end_ns, _ in first.served)


@pytest.mark.parametrize("fault", [before, after, unconfirmed])
async def test_a_commit_whose_outcome_is_unknown_is_made_once(
    database: str, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    first, second = Member("m1", begins=True), Member("m2")
    second.ready = False  # it follows, and never serves
    url = await fresh(database)
    async with replicating(url, first, second):
        await filled(first)
        times = itertools.count()
        at(monkeypatch, fault, lambda statement: statement == tables._CHANGE and next(times) < 2)
        first.change(4, destroyed=(2,))
        first.change(5)
        await until(lambda: first.number == 3)
        assert next(times) >= 2
        await until(lambda: second.number == 3)
    assert first.lease_term == 1
    assert first.files == second.files == await stored(database)
    assert first.tombstones == second.tombstones == [b"%040d" % 2]


@pytest.mark.parametrize("fault", [before, after])
async def test_a_replicator_killed_at_any_commit_loses_nothing(
    database: str, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """Its process ends: nothing follows what it has sent. Another one starts in its place."""
    url = await fresh(database)
    first, second = Member("m1", begins=True), Member("m2")
    second.ready = False
    killed = asyncio.Event()
    count, until_kill = itertools.count(1), 0

    async def kill(connection: NodeConnection, made: Callable[[], Awaitable[Any]]) -> Any:
        killed.set()
        try:
            return await fault(connection, made)
        except ConnectionResetError:
            await asyncio.sleep(3600)

    commits = (tables._TAKE, tables._CHANGE, tables._RENEW)
    at(monkeypatch, kill, lambda statement: statement in commits and next(count) == until_kill)
    async with replicating(url, second):
        for number in range(2, 14):
            killed.clear()
            count, until_kill = itertools.count(1), number
            async with replicating(url, first):
                if first.serves:
                    first.change(100 + number, keyring=b"keyring")
                async with asyncio.timeout(60):
                    await killed.wait()
        until_kill = 0
        async with replicating(url, first):

            def made() -> bool:
                """A change that a lease ends before is refused, and asked for again."""
                if first.serves and not first.waiting and not first.out:
                    first.change(200, keyring=b"keyring")
                return all(key_id(200) in member.files for member in (first, second))

            await until(made)
            await until(lambda: first.number == second.number)
            assert first.files == second.files
    assert set(first.acknowledged) <= set(first.files)
    check_one_at_a_time(first, second)
