"""What a server says of a database that works and is not what it was: its clock, and what it has forgotten."""

import asyncio
import contextlib
import re
import time

import asyncpg
import pytest

from progressdb_server.conversations import whole as conversations
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store.model import Idempotency, NewMessage, StoreUnavailableError
from progressdb_server.store.postgres import engine as postgres
from tests.harness.logged import capture_logs
from tests.progressdb_server.store.opened_store import becomes, fill, messages_of, servers
from tests.progressdb_server.store.sealing_provider import SealingProvider

DAY_S = 86_400
ENDED = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'progressdb'"


async def test_a_node_with_a_wrong_clock_moves_no_time(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server notices it, says so, and makes no message twice."""
    monkeypatch.setattr(conversations, "CLOCK_S", 0.02)

    async with servers(database, SealingProvider(), 0) as (one,):
        await one.start()
        retry = Idempotency("scope", "key")
        new = NewMessage(author="ann", thread="t", body=0)
        message = await one.messages.create(new, idempotency=retry)
        with monkeypatch.context() as node, capture_logs() as logs:
            node.setattr(postgres, "_NOW", f"SELECT ({postgres._NOW[7:]}) + {2 * DAY_S} * 1000000000::bigint")
            await becomes(lambda: bool(one.notices))
            assert re.search(r"jumped by 172[78]\d\d seconds", one.notices[0])
            assert (await one.messages.create(new, idempotency=retry)).id == message.id
            later = await one.messages.create(NewMessage(author="ann", thread="t", body=1))
            assert abs(later.ts - time.time_ns()) < DAY_S * 10**9
            assert [line["event"] for line in logs] == ["clock_of_node_refused"]
        await becomes(lambda: not one.notices)
        assert one.clock.last.era == 0


async def written(store: Conversations) -> None:
    """A message, once the server has another connection."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(StoreUnavailableError):
                await fill(store, 1)
                return
            await asyncio.sleep(0.01)


async def test_a_database_that_went_back_is_named(database: str) -> None:
    """As after a backup was restored under a running server. A lost connection alone is not."""
    async with servers(database, SealingProvider(), 0) as (one,):
        await fill(one, 1)
        connection = await asyncpg.connect(database)
        await connection.execute("CREATE TABLE backup AS TABLE store_entry")
        try:
            await fill(one, 1)
            await connection.execute(ENDED)
            await written(one)
            assert one.notices == []
            await connection.execute("TRUNCATE store_entry; INSERT INTO store_entry TABLE backup")
            await connection.execute(ENDED)
            with capture_logs() as logs:
                await written(one)
            assert "the database went back" in one.notices[0]
            assert [line["missing"] for line in logs if line["event"] == "database_went_back"]
            assert len(await messages_of(one, "t")) == 2
        finally:
            await connection.execute("DROP TABLE backup")
            await connection.close()
