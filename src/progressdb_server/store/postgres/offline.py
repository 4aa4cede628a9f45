"""A store in PostgreSQL that a command examines, changes or fills by itself: see `store.offline`.

Owns: the three ways to open it. Invariants:
- `view` is one state of the database, beside servers that write.
- `alone` is one transaction, which has the row of the schema's number locked: no server commits anything meanwhile, and
  nothing is changed unless the whole command succeeds. It is refused while a server is connected.
- `filled` is for a copy. Until it has ended the number is COPYING, with which no server starts or writes.
- Each thread has a head, whose stamp is not below that of any version of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg
import msgspec

from minikms.processes.postgresql import FAILURES
from progressdb_server.store import keyspace
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Counters, EngineUnavailableError
from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.local import begun_copy
from progressdb_server.store.model import FormatError, StoreLockedError
from progressdb_server.store.offline import WALK_BYTES_MAX, ThreadTail
from progressdb_server.store.postgres.reads import PostgresReads
from progressdb_server.store.postgres.tables import (
    COPYING,
    COUNTED,
    DELETE,
    SCHEMA,
    TKEY_HASH_BYTES,
    connected,
    number_of,
    other_schema,
    tkey,
)

LOCK_S_MAX: Final = 20
"""How long a command waits for the commits of servers."""
STOPPED_S_MAX: Final = 3.0
"""How long the connections of a server that was stopped may still be there."""

_SERVERS: Final = """
SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'progressdb' LIMIT 1"""
_WALK: Final = """
SELECT tkey, key, value FROM (
    SELECT tkey, key, value, sum(octet_length(value)) OVER (ORDER BY tkey, key) - octet_length(value) AS before
    FROM (SELECT tkey, key, value FROM store_entry WHERE (tkey, key) > ($1, $2) ORDER BY tkey, key LIMIT $3) AS few
) AS summed WHERE before < $4 ORDER BY tkey, key"""
_PUT: Final = """
INSERT INTO store_entry (tkey, key, value) SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::bytea[])
ON CONFLICT (tkey, key) DO UPDATE SET value = excluded.value"""
_NEWEST: Final = """
coalesce((SELECT substr(entry.key, octet_length(entry.key) - 26) FROM store_entry AS entry
WHERE entry.tkey = head.tkey AND entry.key > substr(head.tkey, 3) || ':msg:'::bytea
AND entry.key < substr(head.tkey, 3) || ':msg;'::bytea
AND substr(encode(entry.key, 'escape'), octet_length(head.tkey) + 4) ~ '^[0-9]{20}-[0-9]{6}$'
ORDER BY entry.key DESC LIMIT 1), '')"""
_LAST: Final = f"""
SELECT head.tkey, head.last, {_NEWEST} FROM store_head AS head WHERE head.tkey > $1 ORDER BY head.tkey LIMIT $2"""  # noqa: S608  a constant
_HEADLESS: Final = f"""
SELECT head.key, NULL, {_NEWEST} FROM store_entry AS head WHERE head.key > $1
AND head.key >= 'kms:map:thread:'::bytea AND head.key < 'kms:map:thread;'::bytea
AND NOT EXISTS (SELECT 1 FROM store_head AS there WHERE there.tkey = head.tkey) ORDER BY head.key LIMIT $2"""  # noqa: S608  a constant
_HIGHEST: Final = """
SELECT head.last FROM store_head AS head WHERE EXISTS (SELECT 1 FROM store_entry AS entry
WHERE entry.tkey = head.tkey AND entry.key = substr(head.tkey, 3) || ':msg:'::bytea || head.last)
ORDER BY head.last DESC LIMIT 1"""
_MENDED: Final = """
INSERT INTO store_head (tkey, last) SELECT * FROM unnest($1::bytea[], $2::bytea[])
ON CONFLICT (tkey) DO UPDATE SET last = excluded.last"""
_HEADS: Final = """
INSERT INTO store_head (tkey, last) SELECT * FROM unnest($1::bytea[], $2::bytea[])
ON CONFLICT (tkey) DO UPDATE SET last = greatest(store_head.last, excluded.last)"""


class PostgresEntries(PostgresReads):
    """The entries of PostgreSQL. The counters are the entry `keyspace.STATE`, as in RocksDB; a walk omits it."""

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection

    async def fetch(self, statement: str, *values: object) -> list[Any]:
        try:
            return await self._connection.fetch(statement, *values)
        except FAILURES as error:
            raise EngineUnavailableError("the database refused") from error

    async def get(self, key: bytes) -> bytes | None:
        return await self._counters() if key == keyspace.STATE else await super().get(key)

    async def _counters(self) -> bytes:
        ((threads, messages),) = await self.fetch(COUNTED)
        created = await self.keys(keyspace.CREATED, keyspace.after(keyspace.CREATED), limit=1, reverse=True)
        stamps = [last for (last,) in await self.fetch(_HIGHEST)]
        stamps += [key[len(keyspace.CREATED) :][: keyspace.STAMP_BYTES] for key in created]
        newest = Stamp(0, 0)
        for stamp in stamps:
            newest = newest.or_later(stamp)
        return msgspec.msgpack.encode(Counters.of(int(threads), int(messages), newest))

    async def walk(self) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        after = (b"", b"")
        while rows := await self.fetch(_WALK, *after, SCAN_ENTRIES_MAX, WALK_BYTES_MAX):
            yield [(key, value) for _, key, value in rows]
            after = (rows[-1][0], rows[-1][1])

    async def heads(self) -> AsyncIterator[list[ThreadTail]]:
        for statement, skipped in ((_LAST, TKEY_HASH_BYTES + len(keyspace.THREAD)), (_HEADLESS, len(keyspace.MAP))):
            place = b""
            while rows := await self.fetch(statement, place, SCAN_ENTRIES_MAX):
                yield [ThreadTail(row[0][skipped:], row[1], row[2]) for row in rows]
                place = rows[-1][0]

    async def put(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None:
        values: list[tuple[bytes, bytes, bytes]] = []
        removals: list[tuple[bytes, bytes]] = []
        heads: dict[bytes, bytes] = {}
        mended: dict[bytes, bytes] = {}
        for key, value in dict(puts).items():
            if key == keyspace.STATE:
                state = msgspec.msgpack.decode(value or b"", type=Counters)
                await self.fetch("DELETE FROM store_counter")
                await self.fetch("INSERT INTO store_counter VALUES (0, $1, $2)", state.threads, state.messages)
            elif value is None:
                removals.append((tkey(key), key))
            elif key.startswith(keyspace.HEADS):
                mended[tkey(keyspace.THREAD + key[len(keyspace.HEADS) :])] = value
            else:
                place = tkey(key)
                values.append((place, key, value))
                if key.startswith(keyspace.MAP):
                    heads.setdefault(place, b"")
                elif key.startswith(keyspace.THREAD) and keyspace.is_version(key):
                    heads[place] = max(heads.get(place, b""), key[-keyspace.STAMP_BYTES :])
        if removals:
            await self.fetch(DELETE, *zip(*removals, strict=True))
        if values:
            await self.fetch(_PUT, *zip(*values, strict=True))
        if heads:
            await self.fetch(_HEADS, list(heads), list(heads.values()))
        if mended:
            await self.fetch(_MENDED, list(mended), list(mended.values()))


@asynccontextmanager
async def view(url: str) -> AsyncIterator[PostgresEntries]:
    async with connected(url) as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        _check(await number_of(connection))
        yield PostgresEntries(connection)


@asynccontextmanager
async def alone(url: str) -> AsyncIterator[PostgresEntries]:
    async with connected(url) as connection, connection.transaction():
        await _lock(connection)
        _check(await number_of(connection))
        yield PostgresEntries(connection)


@asynccontextmanager
async def open_copy(url: str, source: str) -> AsyncIterator[PostgresEntries]:
    """For a copy of `source`. Raises StoreLockedError, FormatError for tables that hold
    something else, EngineUnavailableError."""
    copy = begun_copy(source)
    async with connected(url) as connection:
        entries = PostgresEntries(connection)
        async with connection.transaction():
            await _lock(connection)
            number = await number_of(connection)
            if number == COPYING:
                if await entries.get(keyspace.FORMAT) != copy:
                    raise FormatError("another copy into the database has not ended: end it, or make a new database")
            else:
                _check(number)
                if await connection.fetchval("SELECT 1 FROM store_entry LIMIT 1"):
                    raise FormatError("the database holds another store: make a new one")
                await connection.execute("UPDATE store_schema SET number = $1", COPYING)
                await entries.put([(keyspace.FORMAT, copy)])
        yield entries
        async with connection.transaction():
            await _lock(connection)
            await entries.put([(keyspace.FORMAT, None)])
            await connection.execute("UPDATE store_schema SET number = $1", SCHEMA)


async def _lock(connection: asyncpg.Connection[Any]) -> None:
    await number_of(connection)
    deadline = time.monotonic() + STOPPED_S_MAX
    while await connection.fetchval(_SERVERS):
        if time.monotonic() > deadline:
            raise StoreLockedError("a message server is connected to the database")
        await asyncio.sleep(0.05)
    await connection.execute(f"SET LOCAL lock_timeout = {LOCK_S_MAX * 1000:d}")
    try:
        await connection.execute("SELECT 1 FROM store_schema FOR UPDATE")
    except asyncpg.LockNotAvailableError:
        raise StoreLockedError("a server or another command uses the store") from None


def _check(number: int) -> None:
    if number != SCHEMA:
        raise FormatError(other_schema(number))
