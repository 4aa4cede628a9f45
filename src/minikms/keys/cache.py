"""The cache of opened keys, bounded in number and in age.

Owns: each value from `put` until it is evicted, dropped, replaced or expired; then it calls `release()`, which zeroes
the key. Invariants: never more than `count_max` values. After `expire(now_ns)` no value is older than `age_ns_max`,
however often it was used. A value from `get` is valid until the next `put`, `drop`, `expire` or `clear`, so a caller
uses it before it awaits anything or opens another key. For one thread. It must never read a clock.

Eviction uses the CLOCK algorithm (second chance; Corbato 1968): a hit only sets a bit, and a value with its bit set is
passed over once. So a hit does not reorder anything.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Releasable(Protocol):
    """A value of the cache. `release` zeroes its key."""

    def release(self) -> None: ...


V = TypeVar("V", bound=Releasable)


class _Entry(Generic[V]):
    __slots__ = ("put_ns", "used", "value")

    def __init__(self, value: V, put_ns: int) -> None:
        self.value = value
        self.put_ns = put_ns
        self.used = False


class KeyCache(Generic[V]):
    """Values by key id. `hits`, `misses` and `evictions` (by number or age, not by `drop`) count since the start."""

    def __init__(self, *, count_max: int, age_ns_max: int) -> None:
        if count_max < 1 or age_ns_max < 1:
            raise ValueError("a cache holds at least one value for at least a nanosecond")
        self._count_max = count_max
        self._age_ns_max = age_ns_max
        self._entries: OrderedDict[str, _Entry[V]] = OrderedDict()  # oldest first
        self._ring: OrderedDict[str, _Entry[V]] = OrderedDict()  # the same entries; the hand is at its front
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key_id: str) -> V | None:
        """The opened key, or None. Every request calls this."""
        entry = self._entries.get(key_id)
        if entry is None:
            self.misses += 1
            return None
        entry.used = True
        self.hits += 1
        return entry.value

    def put(self, key_id: str, value: V, now_ns: int) -> None:
        """Adds `value`. An earlier value of this id is released; a full cache evicts one first."""
        self.drop(key_id)
        if len(self._entries) >= self._count_max:
            self._evict_one()
        entry = _Entry(value, now_ns)
        self._entries[key_id] = entry
        self._ring[key_id] = entry

    def drop(self, key_id: str) -> bool:
        """Releases the value of `key_id`; False if there was none."""
        entry = self._entries.pop(key_id, None)
        if entry is None:
            return False
        del self._ring[key_id]
        entry.value.release()
        return True

    def expire(self, now_ns: int) -> int:
        """Releases every value that was put `age_ns_max` or longer before `now_ns`; the number of them.

        `now_ns` is from the same monotonic clock as in `put`.
        """
        count = 0
        while self._entries:
            key_id = next(iter(self._entries))
            if now_ns - self._entries[key_id].put_ns < self._age_ns_max:
                break
            self.drop(key_id)
            count += 1
        self.evictions += count
        return count

    def clear(self) -> None:
        """Releases every value."""
        while self._entries:
            self.drop(next(iter(self._entries)))

    def _evict_one(self) -> None:
        while True:
            key_id, entry = next(iter(self._ring.items()))
            if not entry.used:
                self.drop(key_id)
                self.evictions += 1
                return
            entry.used = False
            self._ring.move_to_end(key_id)
