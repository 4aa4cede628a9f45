"""A store in the files of RocksDB that a command examines, changes or fills by itself: see `store.offline`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from progressdb_server.store import local
from progressdb_server.store.offline import LocalEntries, LocalView
from progressdb_server.store.rocks import opening, salvage

__all__ = ["alone", "open_copy", "salvage", "view"]


@asynccontextmanager
async def view(path: str) -> AsyncIterator[LocalView]:
    with opening.open_reader(path) as reader:
        yield LocalView(reader)


@asynccontextmanager
async def alone(path: str) -> AsyncIterator[LocalEntries]:
    with opening.open_offline(path) as engine:
        yield LocalEntries(engine)


@asynccontextmanager
async def open_copy(path: str, source: str) -> AsyncIterator[LocalEntries]:
    with opening.open_copy(path, local.begun_copy(source)) as engine:
        yield LocalEntries(engine)
