"""A store's directory: its format record, the functions that open it, and the parts of an open store.

Invariants: a program version opens only a directory whose format it supports. The format record is the first write to
an empty directory. Other packages do not choose a storage engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Final, TypeAlias

import msgspec

from minikms.api.decoding import UNDECODABLE
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.claims import Claims
from progressdb_server.store.engine import Engine, LocalReads, Reader, Reads
from progressdb_server.store.keyspace import Clock
from progressdb_server.store.model import FormatError, StoreUnavailableError
from progressdb_server.store.validators import Validators
from progressdb_server.store.writer import Commits, Counters, SharedEngine, Writer

FORMAT: Final = 3
"""The first one that was released, with version 0.2.0."""
COPYING: Final = "copying"
"""Until a copy into the directory has ended."""


AnyEngine: TypeAlias = Engine | SharedEngine
DRIVER_MISSING: Final = "a store in PostgreSQL needs its driver: `pip install '.[postgresql]'` in a checkout adds it"


class _Format(msgspec.Struct, omit_defaults=True):
    format: int | str
    source: str = ""
    """Of a copy that has not ended."""


def check(reader: Reader) -> int | str:
    """Check the format record and return the format. Raises FormatError if it is missing, damaged or of another format,
    StoreUnavailableError."""
    raw = reader.get(keyspace.FORMAT)
    if raw is None:
        raise FormatError("the directory holds no ProgressDB store")
    try:
        found = msgspec.json.decode(raw, type=_Format).format
    except UNDECODABLE as error:
        raise FormatError("the store's format record is damaged: restore a backup") from error
    if found == COPYING:
        raise FormatError("a copy into the directory has not ended: run the same progressdb store copy again")
    if isinstance(found, int) and found < FORMAT:
        raise FormatError(
            "the store was made before version 0.2.0, the first one whose formats are kept: set --db to a new directory"
        )
    if found != FORMAT:
        raise FormatError(
            f"the store has format {found}, this version reads format {FORMAT}: start the version that wrote it, or a "
            "newer one"
        )
    return found


def claim(engine: Engine) -> None:
    """Write the format record if the directory is empty, then check it. Raises FormatError for a directory that is
    neither empty nor a store of this format."""
    if engine.get(keyspace.FORMAT) is None:
        if engine.scan(b"", keyspace.END, limit=1):
            raise FormatError("the directory holds something other than a ProgressDB store")
        engine.write([(keyspace.FORMAT, msgspec.json.encode(_Format(FORMAT)))])
        engine.sync()
    check(engine)


def _rocks() -> ModuleType:
    return import_module("progressdb_server.store.rocks.engine")


def open_engine(path: str) -> Engine:
    """Open a store for the server, or create one in an empty directory. The caller closes it. Raises StoreLockedError,
    StoreUnavailableError, FormatError."""
    engine: Engine = _rocks().RocksEngine(path)
    try:
        claim(engine)
    except BaseException:
        engine.close()
        raise
    return engine


def of_database(module: str) -> ModuleType:
    """The module of this package, which needs the driver of PostgreSQL. Raises FormatError where that is missing."""
    try:
        return import_module(f"progressdb_server.store.{module}")  # only here: the driver is an extra
    except ImportError:
        raise FormatError(DRIVER_MISSING) from None


async def open_shared(url: str, *, single_node: bool) -> SharedEngine:
    """Open the store of a database. The caller closes it. Raises FormatError, StoreUnavailableError."""
    engine: SharedEngine = await of_database("postgres.engine").open_engine(url, single_node=single_node)
    return engine


def local(engine: AnyEngine) -> Engine | None:
    """The engine if it is of this process alone."""
    return None if isinstance(engine, SharedEngine) else engine


async def close_engine(engine: AnyEngine) -> None:
    if isinstance(engine, SharedEngine):
        await engine.close()
    else:
        engine.close()


@contextmanager
def open_offline(path: str) -> Iterator[Engine]:
    """Open a store for changes, without a server. Raises StoreLockedError, StoreUnavailableError, FormatError."""
    _rocks().check_exists(path)
    engine: Engine = _rocks().RocksEngine(path)
    try:
        check(engine)
        yield engine
    finally:
        engine.close()


def begun_copy(source: str) -> bytes:
    """The format record until a copy of `source` has ended."""
    return msgspec.json.encode(_Format(COPYING, source))


@contextmanager
def open_copy(path: str, begun: bytes) -> Iterator[Engine]:
    """Open the target of a copy, whose format record is `begun`; it gets that of a store at the end. Raises
    StoreLockedError, StoreUnavailableError, FormatError for a directory that holds something else."""
    engine: Engine = _rocks().RocksEngine(path)
    try:
        found = engine.get(keyspace.FORMAT)
        if found is None and not engine.scan(b"", keyspace.END, limit=1):
            engine.write([(keyspace.FORMAT, begun)])
            engine.sync()
        elif found != begun:
            raise FormatError(f"{path} holds another store, or another copy that has not ended")
        yield engine
        engine.write([(keyspace.FORMAT, msgspec.json.encode(_Format(FORMAT)))])
        engine.sync()
    finally:
        engine.close()


@contextmanager
def open_reader(path: str) -> Iterator[Reader]:
    """Open a snapshot of a store to read it, even while a server has the store open. Raises StoreUnavailableError,
    FormatError."""
    reader = _rocks().RocksReader(path)
    try:
        check(reader)
        yield reader
    finally:
        reader.close()


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

    def __init__(self, engine: AnyEngine, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        """Raises FormatError when the counters are damaged, StoreUnavailableError."""
        self._engine = engine
        self.metrics = StoreMetrics()
        self.clock = Clock(now_ns)
        self.reads: Reads
        self.writer: Commits
        if isinstance(engine, SharedEngine):
            self.reads = engine.reads
            self.writer = engine.writer(self.clock, self.metrics, self.reopened)
        else:
            self.reads = LocalReads(engine)
            self.writer = Writer(engine, self.clock, self.metrics, self.reopened)
        self.claims = Claims(engine if isinstance(engine, SharedEngine) else None, self.writer)
        self.locks = NamedLocks()
        self.clock_notice = ""
        self.validators = Validators()

    @property
    def shared(self) -> bool:
        """Whether other servers may change what is stored."""
        return isinstance(self._engine, SharedEngine)

    @property
    def engine(self) -> Engine:
        """The engine of this process. Raises StoreUnavailableError where there is none."""
        if isinstance(self._engine, SharedEngine):
            raise StoreUnavailableError("this can't be done with a store in a database")
        return self._engine

    @property
    def damaged(self) -> list[str]:
        """The names of the files in which this process has met damage."""
        return [] if isinstance(self._engine, SharedEngine) else sorted(self._engine.damaged)

    @property
    def notices(self) -> list[str]:
        """What an operator should know although the store works."""
        found = [self.clock_notice, self._engine.notice if isinstance(self._engine, SharedEngine) else ""]
        return [notice for notice in found if notice]

    async def counted(self) -> Counters:
        return await self._engine.counted() if isinstance(self._engine, SharedEngine) else self.writer.state

    async def now_ns(self) -> int:
        """Unix nanoseconds, by the clock that all servers of the store share."""
        return await self._engine.now_ns() if isinstance(self._engine, SharedEngine) else self.clock.now_ns()

    async def probe(self) -> None:
        """As `store.engine.Engine.probe`."""
        if isinstance(self._engine, SharedEngine):
            await self._engine.probe()
        else:
            await asyncio.to_thread(self._engine.probe)

    def reopened(self) -> None:
        """Called after the engine was reopened after a failure. Writes that were read before may have been lost."""

    async def close(self) -> None:
        """Commits the queued writes, then closes the engine."""
        await self.writer.close()
        await close_engine(self._engine)
