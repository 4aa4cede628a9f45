"""Opening a store in the files of RocksDB, by its directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from progressdb_server.store import keyspace, local
from progressdb_server.store.model import FormatError
from progressdb_server.store.rocks.engine import RocksEngine, RocksReader, check_exists


async def open_engine(path: str, *, single_node: bool = True, make: bool = True) -> RocksEngine:
    """See `store.places.open_engine`."""
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
def open_offline(path: str) -> Iterator[RocksEngine]:
    """Open a store for changes, without a server. Raises StoreLockedError, StoreUnavailableError, FormatError."""
    check_exists(path)
    engine = RocksEngine(path)
    try:
        local.check(engine)
        yield engine
    finally:
        engine.close()


@contextmanager
def open_copy(path: str, begun: bytes) -> Iterator[RocksEngine]:
    """Open the target of a copy, whose format record is `begun`; it gets that of a store at the end. Raises
    StoreLockedError, StoreUnavailableError, FormatError for a directory that holds something else."""
    engine = RocksEngine(path)
    try:
        found = engine.get(keyspace.FORMAT)
        if found is None and not engine.scan(b"", keyspace.END, limit=1):
            engine.write([(keyspace.FORMAT, begun)])
            engine.sync()
        elif found != begun:
            raise FormatError(f"{path} holds another store, or another copy that has not ended")
        yield engine
        local.end_copy(engine)
    finally:
        engine.close()


@contextmanager
def open_reader(path: str) -> Iterator[RocksReader]:
    """Open a snapshot of a store to read it, even while a server has the store open. Raises StoreUnavailableError,
    FormatError."""
    reader = RocksReader(path)
    try:
        local.check(reader)
        yield reader
    finally:
        reader.close()
