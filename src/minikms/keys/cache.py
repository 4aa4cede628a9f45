"""The cache of opened keys: bounded in number and in age, and what leaves it is released.

Owns: the values given to it, each until it is evicted, dropped, replaced or too old; then it calls `release()`, which
zeroes the key. Invariants: never more than `count_max` values; after `expire(now_ns)` none is older than `age_ns_max`,
however often it was used. Single-threaded. A value got from here is good until the next `put`, `drop`, `expire` or
`clear`, so a caller uses it before it awaits anything or opens another key. It must never read a clock.

Eviction is second chance (the CLOCK algorithm; Corbato 1968): a hit only sets a bit, and the hand gives a value whose
bit is set one more round. That keeps the order up to date without touching it on every hit.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Releasable(Protocol):
    """What the cache holds: something that can wipe itself."""

    def release(self) -> None: ...


V = TypeVar("V", bound=Releasable)


class _Entry(Generic[V]):
    __slots__ = ("put_ns", "used", "value")

    def __init__(self, value: V, put_ns: int) -> None:
        self.value = value
        self.put_ns = put_ns
        self.used = False


class KeyCache(Generic[V]):
    """Values by key id. `hits`, `misses` and `evictions` (by number or age; not `drop`) count since the start."""

    def __init__(self, *, count_max: int, age_ns_max: int) -> None:
        """Raises ValueError if a bound is below one."""
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
        """The opened key, or None. This is on the path of every request."""
        entry = self._entries.get(key_id)
        if entry is None:
            self.misses += 1
            return None
        entry.used = True
        self.hits += 1
        return entry.value

    def put(self, key_id: str, value: V, now_ns: int) -> None:
        """Take `value` over. One already there under this id is released; a full cache evicts one first."""
        self.drop(key_id)
        if len(self._entries) >= self._count_max:
            self._evict_one()
        entry = _Entry(value, now_ns)
        self._entries[key_id] = entry
        self._ring[key_id] = entry

    def drop(self, key_id: str) -> bool:
        """Release the value of `key_id`; False if there was none."""
        entry = self._entries.pop(key_id, None)
        if entry is None:
            return False
        del self._ring[key_id]
        entry.value.release()
        return True

    def expire(self, now_ns: int) -> int:
        """Release every value put `age_ns_max` or longer before `now_ns`; the number of them.

        `now_ns` is of the same monotonic clock as that given to `put`.
        """
        gone = 0
        while self._entries:
            key_id = next(iter(self._entries))
            if now_ns - self._entries[key_id].put_ns < self._age_ns_max:
                break
            self.drop(key_id)
            gone += 1
        self.evictions += gone
        return gone

    def clear(self) -> None:
        """Release every value: at close, and when the keys above them change."""
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
