"""A server reads a node only while it knows that no other node has taken its place."""

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import asyncpg
import pytest

from minikms.processes import postgresql
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import NewMessage, NotAMemberError, OutcomeUnknownError, StoreUnavailableError
from progressdb_server.store.postgres import nodes
from progressdb_server.store.postgres import opening as postgres
from progressdb_server.store.postgres import writer as postgres_writer
from tests.harness import postgres as harness
from tests.harness.postgres import url_of
from tests.progressdb_server.store.opened_store import becomes, bodies, emptied, fill, messages_of
from tests.progressdb_server.store.postgres.failing_database import waiting, with_setting
from tests.progressdb_server.store.sealing_provider import SealingProvider

STANDBY = "standby"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nodes, "LEASE_S", 0.6)
    monkeypatch.setattr(nodes, "WAIT_S", 0.8)
    monkeypatch.setattr(nodes, "BEAT_S", 0.1)
    monkeypatch.setattr(postgres_writer, "BEAT_S", 0.1)
    yield


async def with_standby(settings: str) -> None:
    connection = await asyncpg.connect(url_of(settings))
    await with_setting(connection, "synchronous_standby_names", STANDBY)
    await connection.close()


@asynccontextmanager
async def leased() -> AsyncIterator[tuple[str, subprocess.Popen[bytes], Conversations]]:
    """A node's URL, the process of its one standby, and a server on it, with a message and the member bob."""
    with harness.running() as (settings, _):
        url = url_of(settings)
        await (await emptied(url)).end()
        await with_standby(settings)
        with harness.receiver(settings, STANDBY) as standby:
            store = Conversations(await postgres.open_engine(url, single_node=False), SealingProvider())
            await fill(store, 1)
            await store.members.add("t", ["bob"])
            yield url, standby, store
            await store.close()


async def reads(store: Conversations) -> bool:
    try:
        await store.members.check_reader("t", "bob")
    except StoreUnavailableError:
        return False
    except NotAMemberError:
        return True
    return True


async def until(store: Conversations, *, answered: bool) -> None:
    async with asyncio.timeout(60):
        while await reads(store) is not answered:
            await asyncio.sleep(0.02)


async def test_a_node_without_standbys_is_neither_read_nor_written() -> None:
    async with leased() as (_, standby, store):
        await asyncio.sleep(2 * nodes.LEASE_S)
        await until(store, answered=True)  # an idle server renews its lease
        standby.send_signal(signal.SIGSTOP)
        await until(store, answered=False)
        standby.send_signal(signal.SIGCONT)
        await until(store, answered=True)
        await store.messages.create(NewMessage(author="ann", thread="t", body=1))
        assert bodies(await messages_of(store, "t")) == [0, 1]


async def test_no_commit_is_acknowledged_once_its_node_waits_for_no_standby() -> None:
    """Patroni empties the setting when it has no standby left: a commit that waits then ends with success."""
    async with leased() as (url, standby, store):
        await until(store, answered=True)
        standby.send_signal(signal.SIGSTOP)
        writing = asyncio.ensure_future(store.messages.create(NewMessage(author="ann", thread="t", body=1)))
        connection = await asyncpg.connect(url)
        async with asyncio.timeout(60):
            while len(await waiting(connection)) < 2:  # the write, and the beat
                await asyncio.sleep(0.01)
        await with_setting(connection, "synchronous_standby_names", "")
        with pytest.raises(OutcomeUnknownError, match="may be stored"):
            await writing
        await until(store, answered=False)
        with pytest.raises(StoreUnavailableError):
            await store.messages.create(NewMessage(author="ann", thread="t", body=2))
        assert not await reads(store)
        await with_setting(connection, "synchronous_standby_names", STANDBY)
        standby.send_signal(signal.SIGCONT)
        await until(store, answered=True)
        assert bodies(await messages_of(store, "t")) == [0, 1]
        await connection.close()


async def test_a_commit_whose_node_does_not_say_its_standbys_is_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the error: it is not made again."""
    async with leased() as (_, _, store):
        with monkeypatch.context() as patch:
            patch.setattr(postgresql, "_STANDBYS", "SELECT (1 / 0)::text")
            with pytest.raises(OutcomeUnknownError, match="may be stored"):
                await store.messages.create(NewMessage(author="ann", thread="t", body=1))
        await becomes(lambda: store.writer.available)
        await until(store, answered=True)
        assert bodies(await messages_of(store, "t")) == [0, 1]


async def test_a_commit_that_is_confirmed_without_a_lease_is_not_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each commit takes longer than a lease, so that the wait for an unbroken one would have no end."""
    monkeypatch.setattr(nodes, "SETTLE_S_MAX", 1.0)
    found = nodes.Nodes("postgresql:///x?host=/run", replicated=True)

    async def late() -> None:
        while True:
            found.confirmed("1", nodes.now_s() - 2 * nodes.LEASE_S)
            await asyncio.sleep(nodes.WAIT_S / 4)

    confirming = asyncio.ensure_future(late())
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        assert not await found.settled("1"), "it waits at most so long"
    confirming.cancel()
    async with asyncio.timeout(60):
        assert not await found.settled("1"), "the lease has ended"


def test_a_node_is_known_by_its_timeline_and_its_start() -> None:
    """Two standbys that are promoted apart from each other begin the same timeline."""

    async def run(settings: Sequence[str]) -> None:
        found = nodes.Nodes(",".join([url_of(settings[0]), url_of(settings[1]).partition("host=")[2]]), replicated=True)
        first = await found.find()
        found.confirmed(first.node, nodes.now_s())
        again = await found.find()
        assert again.node == first.node, "of two with one timeline it keeps the one in use"
        others = [await nodes.Nodes(url_of(one), replicated=True).find() for one in settings]
        seen = {other.node for other in others}
        assert {node.partition(" ")[0] for node in seen} == {"00000001"}
        assert len(seen) == 2
        for connection in (first, again, *others):
            connection.terminate()

    with harness.running() as (one, _), harness.running() as (two, _):
        asyncio.run(run([one, two]))


def test_a_node_is_read_after_an_unbroken_lease_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever timeline it is of: a failover may go back to the earlier one."""
    now_s = 100.0
    monkeypatch.setattr(nodes, "now_s", lambda: now_s)
    found = nodes.Nodes("postgresql:///x?host=/run", replicated=True)

    def confirmed(node: str, steps: int) -> None:
        nonlocal now_s
        for _ in range(steps):
            now_s += nodes.LEASE_S / 2
            found.confirmed(node, now_s)

    def is_read(node: str) -> bool:
        try:
            found.check(node)
        except EngineUnavailableError:
            return False
        return True

    for node in ("00000002", "00000001"):
        confirmed(node, 1)
        assert not is_read(node)
        confirmed(node, 3)
        assert is_read(node)
    assert not is_read("00000002")
    now_s += 2 * nodes.LEASE_S
    assert not is_read("00000001")
    confirmed("00000001", 1)
    assert not is_read("00000001"), "after a gap it waits again"
    confirmed("00000001", 3)
    assert is_read("00000001")


@pytest.mark.torture
def test_no_server_reads_an_old_primary_once_a_new_one_has_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one lives on, and its clients don't notice. One server can reach it alone, the other both."""
    monkeypatch.setattr(postgres_writer, "COMMIT_S_MAX", 1.0)

    async def run(old: str, new: str) -> None:
        provider = SealingProvider()
        loop = asyncio.get_running_loop()
        both = url_of(old) + "," + url_of(new).partition("host=")[2]
        left, moving = [
            Conversations(await postgres.open_engine(url, single_node=False), provider) for url in (url_of(old), both)
        ]
        await fill(left, 1)
        await left.members.add("t", ["bob"])
        assert await reads(left) and await reads(moving)
        answered: list[float] = []

        async def read_on() -> None:
            while True:
                began = loop.time()
                if await reads(left):
                    answered.append(began)
                await asyncio.sleep(0.005)

        reading = asyncio.ensure_future(read_on())
        connection = await asyncpg.connect(url_of(new))
        await connection.execute("ALTER SYSTEM SET primary_conninfo = ''")  # it follows the old one no longer
        await connection.execute("SELECT pg_reload_conf()")
        assert await connection.fetchval("SELECT pg_promote()")
        await connection.close()
        with harness.receiver(new, STANDBY):
            async with asyncio.timeout(60):
                while True:
                    try:
                        await moving.members.remove("t", "bob")
                        break
                    except StoreUnavailableError:
                        await asyncio.sleep(0.02)
            removed = loop.time()
            await asyncio.sleep(3 * nodes.LEASE_S)
            assert answered and max(answered) < removed
            with pytest.raises(NotAMemberError):
                await moving.members.check_reader("t", "bob")
            reading.cancel()
            for store in (left, moving):
                await store.close()

    with harness.running() as (old, _):
        url = url_of(old)
        asyncio.run(_made(url))
        with harness.standby(old, STANDBY) as new:
            asyncio.run(with_standby(old))
            asyncio.run(_confirms_too(new))
            asyncio.run(run(old, new))


async def _made(url: str) -> None:
    await (await emptied(url)).end()


async def _confirms_too(settings: str) -> None:
    """The new primary waits for a standby of the same name."""
    connection = await asyncpg.connect(url_of(settings))
    await with_setting(connection, "synchronous_standby_names", STANDBY)
    await connection.close()
