"""PostgreSQL as the store's engine: several message servers on one database (docs/spec/store.md, "On PostgreSQL").

Owns: opening. `store.postgres.tables` has the tables, `store.postgres.reads` the reads, `store.postgres.writer` the
writes, `store.postgres.nodes` the node and the lease on it. At most READ_CONNECTIONS_MAX reads run at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import asyncpg

from progressdb_server.metrics import StoreMetrics
from progressdb_server.store.engine import EngineUnavailableError, Reads
from progressdb_server.store.keyspace import Clock
from progressdb_server.store.model import FormatError
from progressdb_server.store.postgres.nodes import CONNECT_S_MAX, FAILURES, UNAVAILABLE, Connection, Nodes
from progressdb_server.store.postgres.reads import READ_S_MAX, PostgresReads
from progressdb_server.store.postgres.tables import COUNTED, ONE_DISK, SCHEMA, number_of, other_schema
from progressdb_server.store.postgres.writer import Writers, keep_lease
from progressdb_server.store.writer import Commits, Counters, SharedEngine

READ_CONNECTIONS_MAX: Final = 8
START_S_MAX: Final = 30.0
"""Of the first lease of a server that starts."""
START_POLL_S: Final = 0.1
_NOW: Final = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000000)::bigint"


class PostgresEngine(SharedEngine):
    """Made by `open_engine`."""

    def __init__(
        self, nodes: Nodes, pool: asyncpg.Pool[Any], counted: Counters, leasing: asyncio.Task[None] | None
    ) -> None:
        self._leasing = leasing
        self._nodes = nodes
        self._pool = pool
        self._counted = counted
        self._reads = PostgresReads(nodes, pool)

    @property
    def reads(self) -> Reads:
        return self._reads

    @property
    def notice(self) -> str:
        return self._nodes.went_back

    def writer(self, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]) -> Commits:
        return Writers(self._nodes, self._counted, clock, metrics, on_reopen)

    async def counted(self) -> Counters:
        return _counters(await self._reads.fetch(COUNTED))

    async def now_ns(self) -> int:
        ((now,),) = await self._reads.fetch(_NOW)
        return int(now)

    async def probe(self) -> None:
        await self._reads.fetch("SELECT 1")

    async def close(self) -> None:
        if self._leasing is not None:
            self._leasing.cancel()
            await asyncio.wait({self._leasing})
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(CONNECT_S_MAX):
                await self._pool.close()
        self._pool.terminate()


def _counters(rows: Sequence[Any]) -> Counters:
    ((threads, messages),) = rows
    return Counters(int(threads), int(messages))


async def open_engine(url: str, *, single_node: bool) -> PostgresEngine:
    """Raises FormatError for tables of another version, and for a database that would acknowledge what one disk alone
    has, unless `single_node` says that this is enough; StoreUnavailableError."""
    nodes = Nodes(url, replicated=not single_node)
    connection = await nodes.find()
    try:
        async with asyncio.timeout(READ_S_MAX):
            number = await number_of(connection)
            if number != SCHEMA:
                raise FormatError(other_schema(number))
            if not nodes.waits_for_standbys(connection):
                raise FormatError(ONE_DISK)
            counted = _counters(await connection.fetch(COUNTED))
    except FAILURES as error:
        raise EngineUnavailableError(UNAVAILABLE) from error
    finally:
        connection.terminate()
    leasing = asyncio.get_running_loop().create_task(keep_lease(nodes)) if nodes.is_due else None

    async def connect(*_: object, **__: object) -> Connection:
        return await nodes.again(statement_timeout=str(READ_S_MAX * 1000))

    try:
        async with asyncio.timeout(START_S_MAX):
            while leasing is not None and not await nodes.settled(nodes.node or ""):  # noqa: ASYNC110  the lease is kept there
                await asyncio.sleep(START_POLL_S)
            pool = await asyncpg.create_pool(
                url, min_size=1, max_size=READ_CONNECTIONS_MAX, connection_class=Connection, connect=connect
            )
    except BaseException as error:
        if leasing is not None:
            leasing.cancel()
        if isinstance(error, FAILURES):
            raise EngineUnavailableError(UNAVAILABLE) from error
        raise
    return PostgresEngine(nodes, pool, counted, leasing)
