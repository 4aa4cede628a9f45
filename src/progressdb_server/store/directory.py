"""The parts of an open store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from progressdb_server.metrics import StoreMetrics
from progressdb_server.store.claims import Claims
from progressdb_server.store.engine import Engine
from progressdb_server.store.keyspace import Clock
from progressdb_server.store.validators import Validators


class NamedLocks:
    """Locks by name, for read-modify-write operations. The tasks that ask for one name run one after another, in the
    order in which they asked. A lock exists only while a task holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[bytes, asyncio.Lock] = {}
        self._users: dict[bytes, int] = {}

    @asynccontextmanager
    async def hold(self, name: bytes) -> AsyncIterator[None]:
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._users[name] = self._users.get(name, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._locks[name]


class OpenStore:
    """The engine, the writer and the locks of an open store, for one event loop. Its subclasses add the operations."""

    def __init__(self, engine: Engine, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        """Raises FormatError when the counters are damaged, StoreUnavailableError."""
        self.engine = engine
        self.metrics = StoreMetrics()
        self.clock = Clock(now_ns)
        self.reads = engine.reads
        self.writer = engine.writer(self.clock, self.metrics, self.reopened)
        self.claims = Claims(engine, self.writer)
        self.locks = NamedLocks()
        self.clock_notice = ""
        self.validators = Validators(remembers=engine.sole)

    @property
    def notices(self) -> list[str]:
        """What an operator should know although the store works."""
        return [notice for notice in (self.clock_notice, self.engine.notice) if notice]

    def reopened(self) -> None:
        """Called after the engine was reopened after a failure. Writes that were read before may have been lost."""

    async def close(self) -> None:
        """Commits the queued writes, then closes the engine."""
        await self.writer.close()
        await self.engine.end()
