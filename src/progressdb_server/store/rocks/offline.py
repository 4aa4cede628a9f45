"""A store in the files of RocksDB that a command examines, changes or fills by itself: see `store.offline`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from progressdb_server.store import keyspace, local
from progressdb_server.store.model import FormatError
from progressdb_server.store.offline import LocalEntries, LocalView
from progressdb_server.store.rocks.engine import RocksEngine
from progressdb_server.store.rocks.opening import open_engine, open_reader


@asynccontextmanager
async def view(path: str) -> AsyncIterator[LocalView]:
    with open_reader(path) as reader:
        yield LocalView(reader)


@asynccontextmanager
async def alone(path: str) -> AsyncIterator[LocalEntries]:
    engine = await open_engine(path, make=False)
    try:
        yield LocalEntries(engine)
    finally:
        engine.close()


@asynccontextmanager
async def open_copy(path: str, source: str) -> AsyncIterator[LocalEntries]:
    engine, copy = RocksEngine(path), local.begun_copy(source)
    try:
        value = engine.get(keyspace.FORMAT)
        if value is None and not engine.scan(b"", keyspace.END, limit=1):
            engine.write([(keyspace.FORMAT, copy)])
            engine.sync()
        elif value != copy:
            raise FormatError(f"{path} holds another store, or another copy that has not ended")
        yield LocalEntries(engine)
        local.end_copy(engine)
    finally:
        engine.close()
