"""PostgreSQL as the store's engine: several message servers on one database (docs/spec/store.md, "On PostgreSQL").

Owns: the engine. `store.postgres.opening` opens it, `store.postgres.tables` has the tables, `store.postgres.reads` the
reads, `store.postgres.writer` the writes, `store.postgres.nodes` the node and the lease on it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

import asyncpg

from minikms.processes.postgresql import CONNECT_S_MAX, FAILURES
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store.engine import Commits, Counters, Engine, Reads
from progressdb_server.store.keyspace import Clock
from progressdb_server.store.model import BackupOfDatabaseError
from progressdb_server.store.postgres.nodes import Nodes
from progressdb_server.store.postgres.reads import PostgresReads
from progressdb_server.store.postgres.tables import COUNTED
from progressdb_server.store.postgres.writer import Writers

_NOW: Final = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000000)::bigint"


class PostgresEngine(Engine):
    """Made by `store.postgres.opening.open_engine`."""

    sole: ClassVar[bool] = False
    makes_backups: ClassVar[bool] = False

    def __init__(
        self, nodes: Nodes, pool: asyncpg.Pool[Any], counted: Counters, leasing: asyncio.Task[None] | None
    ) -> None:
        self.damaged = set()
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

    def checkpoint(self, path: str) -> None:
        raise BackupOfDatabaseError

    def writer(self, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]) -> Commits:
        return Writers(self._nodes, self._counted, clock, metrics, on_reopen)

    async def counted(self) -> Counters:
        return counters(await self._reads.fetch(COUNTED))

    async def now_ns(self) -> int:
        ((now,),) = await self._reads.fetch(_NOW)
        return int(now)

    async def check_writable(self) -> None:
        await self._reads.fetch("SELECT 1")

    async def end(self) -> None:
        if self._leasing is not None:
            self._leasing.cancel()
            await asyncio.wait({self._leasing})
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(CONNECT_S_MAX):
                await self._pool.close()
        self._pool.terminate()


def counters(rows: Sequence[Any]) -> Counters:
    ((threads, messages),) = rows
    return Counters(int(threads), int(messages))
