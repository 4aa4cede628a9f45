"""A store's directory: the version of its format, the ways to open it, and what every open store consists of.

Invariants: a directory is used only by a version that knows its format; an empty one is claimed before anything else is
put there. A store whose records are in plaintext, as a benchmark makes it (progressdb_server/unencrypted.py), has a
format of its own, which only a server without encryption takes; such a server takes no other. Nobody outside this room
chooses an engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.engine import Engine, Reader
from progressdb_server.store.keyspace import Clock
from progressdb_server.store.model import FormatError
from progressdb_server.store.rocks import RocksEngine, RocksReader, check_exists
from progressdb_server.store.writer import NamedLocks, Writer

FORMAT: Final = 1
UNENCRYPTED: Final = "unencrypted-1"
"""A text, which no version takes for one of its numbers."""


class _Format(msgspec.Struct):
    format: int | str


def check(reader: Reader, *, encrypted: bool = True) -> None:
    """Raises FormatError, StoreUnavailableError."""
    raw = reader.get(keyspace.FORMAT)
    if raw is None:
        raise FormatError("the directory holds no ProgressDB store")
    try:
        found = msgspec.json.decode(raw, type=_Format).format
    except msgspec.DecodeError as error:
        raise FormatError("the store's format record is damaged: restore a backup") from error
    if encrypted and isinstance(found, str):
        raise FormatError(
            "nothing in this store is encrypted, since `progressdb --kms none` made it: use another directory, "
            "and delete this one when the benchmark is over"
        )
    if not encrypted and isinstance(found, int):
        raise FormatError(
            "the store is encrypted, and `--kms none` would put plaintext into it: leave the flag out, or for a "
            "benchmark give --db a new directory"
        )
    if found not in (FORMAT, UNENCRYPTED):
        raise FormatError(
            f"the store has format {found}, this version reads format {FORMAT}: start the version that wrote it, "
            "or a newer one"
        )


def claim(engine: Engine, *, encrypted: bool = True) -> None:
    """Raises FormatError for a directory that is neither empty nor a store of this format and kind."""
    if engine.get(keyspace.FORMAT) is None:
        if engine.scan(b"", keyspace.END, limit=1):
            raise FormatError("the directory holds something other than a ProgressDB store")
        engine.write([(keyspace.FORMAT, msgspec.json.encode(_Format(FORMAT if encrypted else UNENCRYPTED)))])
        engine.sync()
    check(engine, encrypted=encrypted)


def open_engine(path: str, *, encrypted: bool = True) -> Engine:
    """To serve from; makes the store in an empty directory. The caller closes it. Raises StoreLockedError,
    StoreUnavailableError, FormatError."""
    engine = RocksEngine(path)
    try:
        claim(engine, encrypted=encrypted)
    except BaseException:
        engine.close()
        raise
    return engine


@contextmanager
def offline(path: str) -> Iterator[Engine]:
    """To change a store that no server has open. Raises StoreLockedError, StoreUnavailableError, FormatError."""
    check_exists(path)
    engine = RocksEngine(path)
    try:
        check(engine)
        yield engine
    finally:
        engine.close()


@contextmanager
def reading(path: str, *, encrypted: bool = True) -> Iterator[Reader]:
    """To read a store, also beside the server that has it open: a view that does not change. Raises
    StoreUnavailableError, FormatError."""
    reader = RocksReader(path)
    try:
        check(reader, encrypted=encrypted)
        yield reader
    finally:
        reader.close()


class OpenStore:
    """The parts of a store that take writes, in one event loop. What a store can do is in the classes that extend
    this."""

    def __init__(self, engine: Engine, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        """Raises FormatError when the counters are damaged, StoreUnavailableError."""
        self.engine = engine
        self.metrics = StoreMetrics()
        self.clock = Clock(now_ns)
        self.writer = Writer(engine, self.clock, self.metrics, self.reopened)
        self.locks = NamedLocks()

    def reopened(self) -> None:
        """Called after the engine has recovered from a failure: what was read before may have been lost."""

    async def close(self) -> None:
        """Commits what is queued, then closes the engine."""
        await self.writer.close()
        self.engine.close()
