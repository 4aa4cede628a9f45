"""Opening a store in the files of RocksDB, by its directory: see `store.places`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from progressdb_server.store import local
from progressdb_server.store.rocks.engine import RocksEngine, RocksReader, check_exists


async def open_engine(path: str, *, single_node: bool = True, make: bool = True) -> RocksEngine:
    if not make:
        check_exists(path)
    engine = RocksEngine(path)
    try:
        if make:
            local.claim(engine)
        else:
            local.check(engine)
    except BaseException:
        engine.close()
        raise
    return engine


@contextmanager
def open_reader(path: str) -> Iterator[RocksReader]:
    reader = RocksReader(path)
    try:
        local.check(reader)
        yield reader
    finally:
        reader.close()
