"""The interface of a storage engine.

Owns: `Engine`, which each engine implements; `OrderedMap`, in which one of this process keeps its entries; the errors.
Invariants of an `OrderedMap`:
- It maps bytes to bytes; keys sort as unsigned bytes. A value of None deletes.
- `write` applies its puts atomically: all or none, also across power loss. They are visible at once, and durable
  after the next `sync` that began after them.
- `get`, `scan` and `write` are called from one thread, so that what a caller reads between two awaits is one
  consistent view; `sync`, `probe`, `checkpoint` and `reopen` block and may run in another thread meanwhile.
- After a failed `write` or `sync` its puts may or may not be there, never a part of them; the engine refuses further
  writes until `reopen` has succeeded. Reads go on. Only the writer (store/writer.py) writes to an open store; it also
  does compare-and-put.

It must never interpret a key or a value.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from typing import ClassVar, Final, Protocol

import msgspec

from minikms.api.decoding import UNDECODABLE
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import PendingWrite, Write
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import FormatError, StoreUnavailableError

SCAN_ENTRIES_MAX: Final = 4096
"""The entries of one `scan`: about a millisecond, the longest that one call may block the event loop."""

WALK_KEYS_MAX: Final = 1024
"""The keys in one page of a walk, which its caller may also decode and send at once."""
WALK_PAUSE_S: Final = 0.001
"""After a full page, which takes about as long: a walk through all keys leaves others half of the processor."""


class EngineUnavailableError(StoreUnavailableError):
    """The disk refused, or the engine is closed or being reopened. The text may be shown to clients, the cause only
    logged."""

    def __init__(self, what: str = "the store's disk is not available now") -> None:
        super().__init__(what)


class EngineBusyError(EngineUnavailableError):
    """Nothing was written, because the engine would have to stall (its compaction is behind); try again soon."""


class Reader(Protocol):
    def get(self, key: bytes) -> bytes | None: ...

    def scan(
        self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Up to `limit` (at most SCAN_ENTRIES_MAX) entries with lower <= key < upper, one consistent view; from the
        upper end downwards when `reverse`. Forwards, no more entries after the values together have `bytes_max`."""
        ...

    def keys(self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False) -> list[bytes]:
        """The keys alone of such a scan. No value is read."""
        ...


class Reads(Protocol):
    """What the store's operations read through: see `Reader`. An engine of this process never suspends the caller, so
    that what is read between two other awaits is one consistent view. What a write relies on is a condition of it
    nevertheless (`store.conditions`)."""

    remote: ClassVar[bool]
    """Whether each call is a round trip, so that one for many entries is worth more than it costs."""

    async def get(self, key: bytes) -> bytes | None: ...

    async def scan(
        self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]: ...

    async def keys(self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False) -> list[bytes]: ...

    async def values(self, keys: Collection[bytes], *, bytes_max: int | None = None) -> dict[bytes, bytes]:
        """The stored entries of these keys, in one round trip. In the order of the keys, none follows once the values
        together have `bytes_max`."""
        ...

    async def newest(self, prefixes: Sequence[bytes]) -> list[bytes | None]:
        """The last key under each prefix, in one round trip."""
        ...

    def walk_keys(self, prefix: bytes, after: bytes = b"") -> AsyncIterator[list[bytes]]:
        """All keys with this prefix, in the order of an index; with `after`, those that follow this key there. A page
        is read when the iterator reaches it."""
        ...


async def in_order(reads: Reads, prefix: bytes, after: bytes = b"") -> AsyncIterator[list[bytes]]:
    """Walks keys like `Reads.walk_keys`, in the order of the keys. Other tasks run in a pause after each page."""
    lower, upper = prefix, keyspace.after(prefix) if prefix else keyspace.END
    if after:
        lower = max(lower, keyspace.next_key(after))
    while keys := await reads.keys(lower, upper, limit=WALK_KEYS_MAX):
        lower = keyspace.next_key(keys[-1])
        yield keys
        await asyncio.sleep(WALK_PAUSE_S if len(keys) == WALK_KEYS_MAX else 0)


async def pages(
    reads: Reads, lower: bytes, upper: bytes, *, limit: int = SCAN_ENTRIES_MAX, bytes_max: int | None = None
) -> AsyncIterator[list[tuple[bytes, bytes]]]:
    """The entries of a range in pages, as `Reads.scan` gives them. A page is read when the iterator reaches it."""
    while entries := await reads.scan(lower, upper, limit=limit, bytes_max=bytes_max):
        lower = keyspace.next_key(entries[-1][0])
        yield entries


class Counters(msgspec.Struct, array_like=True):
    """Stored at `store:state` with every group: the counters, and the highest stamp that was issued, whose era is apart
    from its Unix nanoseconds (MessagePack has no number for both)."""

    threads: int = 0
    messages: int = 0
    last_ns: int = 0
    last_seq: int = 0
    era: int = 0

    def __post_init__(self) -> None:
        """Damaged counters are refused where they are decoded."""
        self.last.check()

    @classmethod
    def of(cls, threads: int, messages: int, last: Stamp) -> Counters:
        return cls(threads, messages, last.time_ns, last.seq, last.era)

    @classmethod
    def parse(cls, raw: bytes | None) -> Counters:
        try:
            return msgspec.msgpack.decode(raw, type=cls) if raw else cls()
        except UNDECODABLE as error:
            raise FormatError("the store's counters are damaged: run progressdb check --repair") from error

    @property
    def last(self) -> Stamp:
        return Stamp(self.era * keyspace.ERA_NS + self.last_ns, self.last_seq)


class Commits(Protocol):
    """What callers use of a writer: see `store.writer.StoreWriter`."""

    @property
    def available(self) -> bool: ...

    @property
    def queued(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def state(self) -> Counters: ...

    def reserve(self, order_key: bytes) -> PendingWrite: ...

    def submit(
        self, pending: PendingWrite, write: Write, expect: Sequence[tuple[bytes, bytes | None]] = ()
    ) -> asyncio.Future[None]: ...

    def leave(self, pending: PendingWrite) -> None: ...

    def commit(self, write: Write) -> asyncio.Future[None]: ...

    async def barrier(self) -> None: ...

    async def check_writable(self) -> None: ...

    async def settled(self) -> None: ...

    async def close(self) -> None: ...


class OrderedMap(Reader, Protocol):
    """What an engine of this process keeps its entries in."""

    def write(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None: ...

    def sync(self) -> None: ...

    def reopen(self) -> None:
        """Recovers after a failure: what is readable afterwards is durable. Raises EngineUnavailableError; try again
        later."""
        ...

    def probe(self) -> None:
        """Returns if the disk takes writes; changes nothing, and may run in another thread. Raises
        EngineUnavailableError, whose text says why it does not."""
        ...

    def checkpoint(self, path: str) -> None:
        """A consistent copy in a directory that does not exist yet, made beside running writes."""
        ...

    def close(self) -> None: ...


class Engine(ABC):
    """What holds a store. Whatever differs between engines is asked here."""

    sole: ClassVar[bool]
    """Whether this process alone changes what is stored, so that its own locks order all changes. Otherwise other
    servers work on the threads too, and share a clock."""
    makes_backups: ClassVar[bool]
    """Whether `checkpoint` does. Other programs back up an engine that makes none."""
    damaged: set[str]
    """The names of the files in which damage was met."""

    @property
    @abstractmethod
    def reads(self) -> Reads: ...

    @property
    def notice(self) -> str:
        """What is wrong with it although it works, for operators; empty if nothing is."""
        return ""

    @abstractmethod
    def writer(self, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]) -> Commits:
        """The writer; an empty directory becomes a store first. Raises FormatError where something else is,
        StoreUnavailableError."""

    @abstractmethod
    async def counted(self) -> Counters:
        """The counters of all servers. Call it after `writer`, whose counters an engine of this process has: no disk is
        read.
        """

    @abstractmethod
    async def now_ns(self) -> int:
        """Unix nanoseconds by the clock that all servers share."""

    @abstractmethod
    async def check_writable(self) -> None:
        """Checks the disk like `OrderedMap.probe`."""

    @abstractmethod
    def checkpoint(self, path: str) -> None:
        """Makes a checkpoint like `OrderedMap.checkpoint`."""

    @abstractmethod
    async def end(self) -> None:
        """Closes it."""
