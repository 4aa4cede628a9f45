"""A server reads a node only while it knows that no other node has taken its place."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import asyncpg
import pytest

from progressdb_server.store import nodes, postgres, postgres_writer
from progressdb_server.store.conversations import Conversations
from progressdb_server.store.model import NewMessage, NotAMemberError, StoreUnavailableError
from tests.harness import postgres as harness
from tests.progressdb_server.store.failing_database import with_setting
from tests.progressdb_server.store.opened_store import bodies, emptied, fill, messages_of, url_of
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


async def reads(store: Conversations) -> bool:
    try:
        await store.check_reader("t", "bob")
    except StoreUnavailableError:
        return False
    except NotAMemberError:
        return True
    return True


async def until(store: Conversations, *, answered: bool) -> None:
    async with asyncio.timeout(60):
        while await reads(store) is not answered:
            await asyncio.sleep(0.02)


def test_a_node_whose_standbys_confirm_nothing_is_not_read() -> None:
    async def run(settings: str) -> None:
        url = url_of(settings)
        await (await emptied(url)).close()
        await with_standby(settings)
        with harness.receiver(settings, STANDBY) as standby:
            store = Conversations(await postgres.open_engine(url, single_node=False), SealingProvider())
            await fill(store, 1)
            await store.add_members("t", ["bob"])
            await asyncio.sleep(2 * nodes.LEASE_S)
            assert await reads(store), "an idle server renews its lease"
            standby.send_signal(signal.SIGSTOP)
            await until(store, answered=False)
            standby.send_signal(signal.SIGCONT)
            await until(store, answered=True)
            await store.create_message(NewMessage(author="ann", thread="t", body=1))
            assert bodies(await messages_of(store, "t")) == [0, 1]
            await store.close()

    with harness.running() as (settings, _):
        asyncio.run(run(settings))


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
        await left.add_members("t", ["bob"])
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
                        await moving.remove_member("t", "bob")
                        break
                    except StoreUnavailableError:
                        await asyncio.sleep(0.02)
            removed = loop.time()
            await asyncio.sleep(3 * nodes.LEASE_S)
            assert answered and max(answered) < removed
            with pytest.raises(NotAMemberError):
                await moving.check_reader("t", "bob")
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
    await (await emptied(url)).close()


async def _confirms_too(settings: str) -> None:
    """The new primary waits for a standby of the same name."""
    connection = await asyncpg.connect(url_of(settings))
    await with_setting(connection, "synchronous_standby_names", STANDBY)
    await connection.close()
