"""The engine seam: all that the store asks of a key-value engine.

Owns: the protocol and its errors. Invariants:
- An engine is an ordered map from bytes to bytes; keys sort as unsigned bytes. A value of None deletes.
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

from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from typing import Final, Protocol

from progressdb_server.store import keyspace
from progressdb_server.store.model import StoreUnavailableError

SCAN_ENTRIES_MAX: Final = 4096
"""Of one `scan`: about a millisecond, the longest that one call may block the event loop."""


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

    async def get(self, key: bytes) -> bytes | None: ...

    async def scan(
        self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]: ...

    async def keys(self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False) -> list[bytes]: ...

    async def values(self, keys: Collection[bytes], *, bytes_max: int | None = None) -> dict[bytes, bytes]:
        """Those of the keys that are stored, in one round trip; no more, in their order, after the values together have
        `bytes_max`."""
        ...

    async def newest(self, prefixes: Sequence[bytes]) -> list[bytes | None]:
        """The last key under each prefix, in one round trip."""
        ...

    def walk_keys(self, prefix: bytes) -> AsyncIterator[list[bytes]]:
        """All keys that begin so, in the order of an index. A page is read when the iterator reaches it."""
        ...


class LocalReads:
    """`Reads` of an engine of this process."""

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
        found: dict[bytes, bytes] = {}
        size = 0
        for key in keys:
            value = self._reader.get(key)
            if value is not None:
                found[key] = value
                size += len(value)
                if bytes_max is not None and size >= bytes_max:
                    break
        return found

    async def newest(self, prefixes: Sequence[bytes]) -> list[bytes | None]:
        found = [self._reader.keys(prefix, keyspace.after(prefix), limit=1, reverse=True) for prefix in prefixes]
        return [keys[0] if keys else None for keys in found]

    def walk_keys(self, prefix: bytes) -> AsyncIterator[list[bytes]]:
        return in_order(self, prefix)


async def in_order(reads: Reads, prefix: bytes) -> AsyncIterator[list[bytes]]:
    """See `Reads.walk_keys`, by the keys."""
    lower, upper = prefix, keyspace.after(prefix) if prefix else keyspace.END
    while keys := await reads.keys(lower, upper, limit=SCAN_ENTRIES_MAX):
        lower = keyspace.next_key(keys[-1])
        yield keys


class Engine(Reader, Protocol):
    damaged: set[str]
    """The names of the files in which damage was met."""

    def write(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Raises EngineBusyError, EngineUnavailableError."""
        ...

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
