"""Reads of a disk that lies: one that fails, or entries that a way of reading does not find. `faulty` gives them to all
parts of a store."""

from collections.abc import AsyncIterator, Collection, Sequence
from typing import ClassVar

from progressdb_server.store import keyspace
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Engine, EngineUnavailableError, Reads, in_order


class FaultyReads:
    """`count`: reads so far. From read `fails_at` on, `fails` of them raise. Walks do not find the keys of `walked`,
    reads of single entries not those of `single`."""

    remote: ClassVar[bool] = False

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self.walked: set[bytes] = set()
        self.single: set[bytes] = set()
        self.heal()

    def heal(self) -> None:
        """No fault from here on, and no read counted."""
        self.count = 0
        self.fails_at = 0
        self.fails = 1
        self.walked.clear()
        self.single.clear()

    @property
    def lies_for_good(self) -> bool:
        """Whether more than one read lies."""
        return self.fails > 1 or bool(self.walked or self.single)

    def _read(self) -> None:
        self.count += 1
        if self.fails_at and self.fails_at <= self.count < self.fails_at + self.fails:
            raise EngineUnavailableError

    async def get(self, key: bytes) -> bytes | None:
        self._read()
        return None if key in self.single else await self._reads.get(key)

    async def scan(
        self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        self._read()
        more = min(SCAN_ENTRIES_MAX, limit + len(self.walked))
        found = await self._reads.scan(lower, upper, limit=more, reverse=reverse, bytes_max=bytes_max)
        return [entry for entry in found if entry[0] not in self.walked][:limit]

    async def keys(self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False) -> list[bytes]:
        self._read()
        more = min(SCAN_ENTRIES_MAX, limit + len(self.walked))
        found = await self._reads.keys(lower, upper, limit=more, reverse=reverse)
        return [key for key in found if key not in self.walked][:limit]

    async def values(self, keys: Collection[bytes], *, bytes_max: int | None = None) -> dict[bytes, bytes]:
        self._read()
        return await self._reads.values([key for key in keys if key not in self.single], bytes_max=bytes_max)

    async def newest(self, prefixes: Sequence[bytes]) -> list[bytes | None]:
        found = [await self.keys(prefix, keyspace.after(prefix), limit=1, reverse=True) for prefix in prefixes]
        return [keys[0] if keys else None for keys in found]

    def walk_keys(self, prefix: bytes, after: bytes = b"") -> AsyncIterator[list[bytes]]:
        return in_order(self, prefix, after)


def faulty(engine: Engine) -> FaultyReads:
    """All reads of the store that is made of the engine afterwards."""
    reads = FaultyReads(engine.reads)
    engine.__class__ = type(type(engine).__name__, (type(engine),), {"reads": reads})
    return reads
