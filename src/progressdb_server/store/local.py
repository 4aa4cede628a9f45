"""An engine of this process: what it answers by its ordered map, and the format record of a store's directory.

Invariants: a program version opens only a directory whose format it supports. The format record is the first write to
an empty directory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import ClassVar, Final

import msgspec

from minikms.api.decoding import UNDECODABLE
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.engine import Counters, Engine, OrderedMap, Reader, Reads, in_order
from progressdb_server.store.keyspace import Clock
from progressdb_server.store.model import FormatError
from progressdb_server.store.writer import Writer

FORMAT: Final = 3
"""The first one that was released, with version 0.2.0."""
COPYING: Final = "copying"
"""Until a copy into the directory has ended."""


class LocalReads:
    """`Reads` of an engine of this process."""

    remote: ClassVar[bool] = False

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def get(self, key: bytes) -> bytes | None:
        return self._reader.get(key)

    async def scan(
        self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        return self._reader.scan(lower, upper, limit=limit, reverse=reverse, bytes_max=bytes_max)

    async def keys(self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False) -> list[bytes]:
        return self._reader.keys(lower, upper, limit=limit, reverse=reverse)

    async def values(self, keys: Collection[bytes], *, bytes_max: int | None = None) -> dict[bytes, bytes]:
        values: dict[bytes, bytes] = {}
        size = 0
        for key in keys:
            value = self._reader.get(key)
            if value is not None:
                values[key] = value
                size += len(value)
                if bytes_max is not None and size >= bytes_max:
                    break
        return values

    async def newest(self, prefixes: Sequence[bytes]) -> list[bytes | None]:
        pages = [self._reader.keys(prefix, keyspace.after(prefix), limit=1, reverse=True) for prefix in prefixes]
        return [keys[0] if keys else None for keys in pages]

    def walk_keys(self, prefix: bytes, after: bytes = b"") -> AsyncIterator[list[bytes]]:
        return in_order(self, prefix, after)


class LocalEngine(Engine, OrderedMap):
    """A subclass is the ordered map."""

    sole: ClassVar[bool] = True
    makes_backups: ClassVar[bool] = True
    _writer: Writer

    @property
    def reads(self) -> Reads:
        return LocalReads(self)

    def writer(self, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]) -> Writer:
        claim(self)
        self._writer = Writer(self, clock, metrics, on_reopen)
        return self._writer

    async def counted(self) -> Counters:
        return self._writer.state

    async def now_ns(self) -> int:
        return time.time_ns()

    async def check_writable(self) -> None:
        await asyncio.to_thread(self.probe)

    async def end(self) -> None:
        self.close()


class _Format(msgspec.Struct, omit_defaults=True):
    format: int | str
    source: str = ""
    """The source of a copy that has not ended."""


def check(reader: Reader) -> int | str:
    """Check the format record and return the format. Raises FormatError if it is missing, damaged or of another format,
    StoreUnavailableError."""
    raw = reader.get(keyspace.FORMAT)
    if raw is None:
        raise FormatError("the directory holds no ProgressDB store")
    try:
        version = msgspec.json.decode(raw, type=_Format).format
    except UNDECODABLE as error:
        raise FormatError("the store's format record is damaged: restore a backup") from error
    if version == COPYING:
        raise FormatError("a copy into the directory has not ended: run the same progressdb store copy again")
    if isinstance(version, int) and version < FORMAT:
        raise FormatError(
            "the store was made before version 0.2.0, the first one whose formats are kept: set --db to a new directory"
        )
    if version != FORMAT:
        raise FormatError(
            f"the store has format {version}, this version reads format {FORMAT}: start the version that wrote it, or "
            "a newer one"
        )
    return version


def claim(engine: OrderedMap) -> None:
    """Write the format record if the directory is empty, then check it. Raises FormatError for a directory that is
    neither empty nor a store of this format."""
    if engine.get(keyspace.FORMAT) is None:
        if engine.scan(b"", keyspace.END, limit=1):
            raise FormatError("the directory holds something other than a ProgressDB store")
        engine.write([(keyspace.FORMAT, msgspec.json.encode(_Format(FORMAT)))])
        engine.sync()
    check(engine)


def begun_copy(source: str) -> bytes:
    """The format record until a copy of `source` has ended."""
    return msgspec.json.encode(_Format(COPYING, source))


def end_copy(engine: OrderedMap) -> None:
    """The directory is a store from here on."""
    engine.write([(keyspace.FORMAT, msgspec.json.encode(_Format(FORMAT)))])
    engine.sync()
