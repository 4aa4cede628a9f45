"""A store that a command examines or changes by itself, whatever holds it.

Owns: `View`, which `store.check` and `store.copying` read, and `Entries`, which they change; both for an engine of this
process. `store.postgres.offline` has them for a database. Invariants: a view does not change while it is read; nobody
else uses the store while entries are put.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Final, NamedTuple, Protocol

from progressdb_server.store import keyspace
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, EngineBusyError, OrderedMap, Reads, pages
from progressdb_server.store.local import LocalReads

WALK_BYTES_MAX: Final = 8 * 1024 * 1024
"""The bytes of the values in one page, without its last value."""
BUSY_RETRY_S: Final = 0.05
BUSY_S_MAX: Final = 60.0


class ThreadTail(NamedTuple):
    """The last stamp of a thread as its row has it, None without a row, and as its stored versions have it; empty for
    none. `thread_part` is of keys."""

    thread_part: bytes
    last: bytes | None
    newest: bytes


class Lost(NamedTuple):
    """A part of a file that can't be read. `seen`: what it holds from `lower` on, before `upper`, as far as it can be
    parsed; nothing says that it is what was written."""

    file: str
    lower: bytes
    upper: bytes
    seen: list[tuple[bytes, bytes]]


class View(Reads, Protocol):
    def walk(self) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """All entries once, in any order. Raises EngineUnavailableError."""
        ...

    def heads(self) -> AsyncIterator[list[ThreadTail]]:
        """The head of each thread in a database. Raises EngineUnavailableError."""
        ...


class Entries(View, Protocol):
    async def put(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None: ...


class LocalView(LocalReads):
    def walk(self) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        return pages(self, b"", keyspace.END, limit=SCAN_ENTRIES_MAX, bytes_max=WALK_BYTES_MAX)

    async def heads(self) -> AsyncIterator[list[ThreadTail]]:
        none: tuple[list[ThreadTail], ...] = ()
        for page in none:
            yield page


class LocalEntries(LocalView):
    """The entries of a local engine. What was put is durable."""

    def __init__(self, engine: OrderedMap) -> None:
        super().__init__(engine)
        self._engine = engine

    async def put(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None:
        batch = list(puts)
        deadline = time.monotonic() + BUSY_S_MAX
        while True:
            try:
                self._engine.write(batch)
                break
            except EngineBusyError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(BUSY_RETRY_S)
        self._engine.sync()
