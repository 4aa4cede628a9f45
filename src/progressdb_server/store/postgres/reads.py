"""Reads of the store in PostgreSQL.

Invariants:
- Reads are of the node that takes writes. Nothing is answered from memory.
- What a read found is answered only if the lease on its node still holds after it.
- A read has one deadline, with its waits for a connection.

It must never interpret a value.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, ClassVar, Final

import asyncpg

from minikms.processes.postgresql import FAILURES
from progressdb_server.store import keyspace
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, WALK_KEYS_MAX, EngineUnavailableError, in_order
from progressdb_server.store.postgres.nodes import UNAVAILABLE, Nodes
from progressdb_server.store.postgres.tables import tkey, within

READ_S_MAX: Final = 10
"""The time of one read: the waits for a connection and all tries of the statement together."""

_UP_TO: Final = (
    "SELECT key, value FROM (SELECT key, value, sum(octet_length(value)) OVER (ORDER BY key) - octet_length(value)"
    " AS before FROM ({}) AS few) AS summed WHERE before < ${} ORDER BY key"
)
_BYTES_MAX: Final = 2**62
_VALUES: Final = (
    "SELECT key, value FROM (SELECT entry.key, entry.value, wanted.number, sum(octet_length(entry.value))"
    " OVER (ORDER BY wanted.number) - octet_length(entry.value) AS before"
    " FROM unnest($1::bytea[], $2::bytea[]) WITH ORDINALITY AS wanted (tkey, key, number)"
    " JOIN store_entry AS entry ON entry.tkey = wanted.tkey AND entry.key = wanted.key) AS summed"
    " WHERE before < $3::bigint ORDER BY number"
)
_NEWEST: Final = (
    "SELECT (SELECT entry.key FROM store_entry AS entry WHERE entry.tkey = wanted.tkey AND entry.key >= wanted.lower"
    " AND entry.key < wanted.upper ORDER BY entry.key DESC LIMIT 1)"
    " FROM unnest($1::bytea[], $2::bytea[], $3::bytea[]) WITH ORDINALITY AS wanted (tkey, lower, upper, number)"
    " ORDER BY wanted.number"
)
_KEYS: Final = "SELECT tkey, key FROM store_entry WHERE (tkey, key) > ($1, $2) ORDER BY tkey, key LIMIT $3"
_BY_KEY: Final = (keyspace.MAP, keyspace.IDEMPOTENCY)
"""The parts of the key space whose keys have an index without `tkey`."""


class PostgresReads:
    """Reads from PostgreSQL. Each call is a statement of its own."""

    remote: ClassVar[bool] = True

    def __init__(self, nodes: Nodes, pool: asyncpg.Pool[Any]) -> None:
        self._nodes = nodes
        self._pool = pool

    async def fetch(self, statement: str, *values: object) -> list[Any]:
        end_s = asyncio.get_running_loop().time() + READ_S_MAX
        for last in (False, True):
            try:
                return await self._fetch(end_s, statement, *values)
            except FAILURES as error:
                if last or isinstance(error, TimeoutError):
                    raise EngineUnavailableError(UNAVAILABLE) from error
        raise EngineUnavailableError(UNAVAILABLE)

    async def _fetch(self, end_s: float, statement: str, *values: object) -> list[Any]:
        loop = asyncio.get_running_loop()
        while True:
            left_s = end_s - loop.time()
            if left_s <= 0:
                raise TimeoutError
            connection: Any = await self._pool.acquire(timeout=left_s)  # stands for a Connection
            node = connection.node
            if node == self._nodes.node:
                break
            await self._end(connection)
        # The driver's own timeout would send a cancel request, and wait for a node that does not answer.
        timer = loop.call_at(end_s, connection.terminate)
        try:
            rows: list[Any] = await connection.fetch(statement, *values)
        except BaseException:
            await self._end(connection)
            raise
        finally:
            timer.cancel()
        await self._pool.release(connection)
        self._nodes.check(node)
        return rows

    async def _end(self, connection: Any) -> None:
        """The pool makes another one in its place."""
        connection.terminate()
        await self._pool.release(connection)

    async def get(self, key: bytes) -> bytes | None:
        rows = await self.fetch("SELECT value FROM store_entry WHERE tkey = $1 AND key = $2", tkey(key), key)
        return rows[0][0] if rows else None

    async def scan(
        self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        rows = await self._select("key, value", lower, upper, limit, bytes_max, reverse=reverse)
        return [(key, value) for key, value in rows]

    async def keys(self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False) -> list[bytes]:
        return [key for (key,) in await self._select("key", lower, upper, limit, None, reverse=reverse)]

    async def values(self, keys: Collection[bytes], *, bytes_max: int | None = None) -> dict[bytes, bytes]:
        if not keys:
            return {}
        places = [tkey(key) for key in keys]
        return dict(await self.fetch(_VALUES, places, list(keys), _BYTES_MAX if bytes_max is None else bytes_max))

    async def newest(self, prefixes: Sequence[bytes]) -> list[bytes | None]:
        if not prefixes:
            return []
        ranges = [(tkey(prefix), prefix, keyspace.after(prefix)) for prefix in prefixes]
        return [key for (key,) in await self.fetch(_NEWEST, *zip(*ranges, strict=True))]

    async def walk_keys(self, prefix: bytes, after: bytes = b"") -> AsyncIterator[list[bytes]]:
        if prefix and (prefix.startswith(_BY_KEY) or within(prefix, keyspace.after(prefix)) is not None):
            async for page in in_order(self, prefix, after):
                yield page
            return
        place = (tkey(after), after) if after else (b"", b"")
        while rows := await self.fetch(_KEYS, *place, WALK_KEYS_MAX):
            place = (rows[-1][0], rows[-1][1])
            yield [key for _, key in rows if key.startswith(prefix)]

    async def _select(
        self, columns: str, lower: bytes, upper: bytes, limit: int, bytes_max: int | None, *, reverse: bool
    ) -> list[Any]:
        if lower >= upper or limit <= 0:
            return []
        values: list[object] = [lower, upper, min(limit, SCAN_ENTRIES_MAX)]
        where = "key >= $1 AND key < $2"
        shard = within(lower, upper)
        if shard is not None:
            values.append(shard)
            where += " AND tkey = $4"
        for first in _BY_KEY:
            if lower.startswith(first):  # literally, so that the partial index is used
                last = keyspace.after(first)
                where += f" AND key >= '{first.decode()}'::bytea AND key < '{last.decode()}'::bytea"
        order = "DESC" if reverse else "ASC"
        statement = f"SELECT {columns} FROM store_entry WHERE {where} ORDER BY key {order} LIMIT $3"  # noqa: S608  constants
        if bytes_max is not None:  # the last entry is the one that reaches the bound
            values.append(bytes_max)
            statement = _UP_TO.format(statement, len(values))
        return await self.fetch(statement, *values)
