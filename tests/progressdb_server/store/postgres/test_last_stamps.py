"""The rows of a database that have the last stamp of each thread: one that is damaged concerns its thread alone."""

import asyncio
from pathlib import Path

import asyncpg
import pytest

from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import check, copying, keyspace
from progressdb_server.store.model import Message, NewMessage, RecordUnreadableError
from progressdb_server.store.postgres import opening as postgres
from tests.progressdb_server.store.opened_store import NOW_NS, fill, servers
from tests.progressdb_server.store.sealing_provider import SealingProvider

HOUR_NS = 3600 * 10**9
FUTURE = b"%020d-000000" % (NOW_NS + 365 * 24 * HOUR_NS)


@pytest.mark.parametrize(
    "last", [b"9" * 20 + b"-999999", b"9" * 19 + b"-000000", FUTURE, b"~", b"\xff\xfe"],
    ids=["no stamp follows", "cut", "a year ahead", "text", "bytes"],
)  # fmt: skip
async def test_a_damaged_last_stamp_concerns_its_thread_alone(database: str, last: bytes) -> None:
    """`check` names it, and `check --repair` mends it."""
    head = "tkey LIKE '%thread:t'::bytea"

    connection = await asyncpg.connect(database)
    async with servers(database, SealingProvider(), 0) as (one,):
        await fill(one, 2)
        await fill(one, 1, "u")
        await connection.execute(f"UPDATE store_head SET last = $1 WHERE {head}", last)
        for _ in range(2):
            outcomes = await asyncio.gather(
                *[one.messages.create(NewMessage(author="ann", thread=name, body=3)) for name in ("t", "u", "new")],
                return_exceptions=True,
            )
            assert [type(outcome) for outcome in outcomes] == [RecordUnreadableError, Message, Message]
        assert (one.clock.last.era, one.clock.ahead_ns < HOUR_NS) == (0, True)
        await connection.execute("DELETE FROM store_head WHERE tkey LIKE '%thread:u'::bytea")
    found = (await check.check(database, None, None)).findings
    assert sorted((one.kind, one.key) for one in found) == [("dangling", "head:t"), ("dangling", "head:u")]
    assert len(await check.repair_offline(database)) == 2
    assert (await check.check(database, None, None)).findings == []
    store = Conversations(await postgres.open_engine(database, single_node=True), SealingProvider())
    assert await connection.fetchval(f"SELECT changes FROM store_head WHERE {head}") == 1
    await store.close()
    await connection.close()


async def test_a_copy_does_not_follow_a_damaged_last_stamp(database: str, tmp_path: Path) -> None:
    async with servers(database, SealingProvider(), 0) as (one,):
        (message,) = await fill(one, 1)
    connection = await asyncpg.connect(database)
    await connection.execute("UPDATE store_head SET last = $1", b"9" * 20 + b"-999999")
    await connection.close()
    copied = await copying.copy(database, str(tmp_path / "copy"), lambda done, whole: None)
    assert keyspace.message_id(copied.counted.last) == message.id
