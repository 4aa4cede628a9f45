"""Writes and their conditions: the stored values that a write expects.

Owns: checking the conditions of a group of writes against what earlier writes have left, the record of recently written
keys, and a cache of small stored values. Invariants: a write passes only if every value that it expects equals what the
writes before it have left; a value counts as unchanged only if that is known.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Final, Protocol, TypeAlias

from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.model import ConditionFailedError, OpaqueWrite, StoreDamagedError

KNOWN_MAX: Final = 32_768
KNOWN_BYTES_MAX: Final = 64
"""Bounds of the cache of stored values: their number, and the length of one."""
KEYS_REMEMBERED_MAX: Final = 32_768
"""About thirty chunks of a rotation, more than are ever in progress."""


class LateStampError(ConditionFailedError):
    """Another server has written a version whose stamp is not below this write's. `last`: the last one of the thread,
    if that is known."""

    def __init__(self, key: bytes, last: Stamp | None) -> None:
        super().__init__(key)
        self.last = last


Puts = dict[bytes, bytes | None]


class Write(OpaqueWrite, frozen=True):
    """Puts that are applied together (None deletes), with their conditions: stored values that the write relies on,
    None for absent. `read` are more of these, and `read_at` is the writer's `group` at the time when they were read.
    `threads` and `messages` are added to the counters."""

    puts: Sequence[tuple[bytes, bytes | None]] = ()
    expect: Sequence[tuple[bytes, bytes | None]] = ()
    read: Sequence[tuple[bytes, bytes]] = ()
    read_at: int = 0
    threads: int = 0
    messages: int = 0


class PendingWrite:
    """A position in the order of one ordering key. With `order_key` None, the write is not ordered."""

    __slots__ = ("expect", "future", "order_key", "period", "size", "write")

    def __init__(self, order_key: bytes | None, future: asyncio.Future[None], period: int = 0) -> None:
        self.order_key = order_key
        self.period = period
        self.future = future
        self.write: Write | None = None
        self.expect: Sequence[tuple[bytes, bytes | None]] = ()
        self.size = 0


Failed: TypeAlias = dict[PendingWrite, ConditionFailedError | StoreDamagedError]


class RecentKeys:
    """The keys that the latest groups have put or deleted. Bounded: groups that were dropped count as having written
    every key."""

    def __init__(self) -> None:
        self.group = 0
        """The number of groups so far. A value that is read now is the one after the group of this number."""
        self._groups: deque[frozenset[bytes]] = deque()
        self._keys = 0

    def add(self, keys: Iterable[bytes]) -> None:
        """Record the keys of the next group."""
        named = frozenset(keys)
        self.group += 1
        self._groups.append(named)
        self._keys += len(named)
        while self._keys > KEYS_REMEMBERED_MAX:
            self._keys -= len(self._groups.popleft())

    def forget(self) -> None:
        """Drop everything: after a recovery, values may differ from those that the groups wrote."""
        self.group += 1
        self._groups.clear()
        self._keys = 0

    def untouched(self, keys: Collection[bytes], since: int) -> bool:
        """Whether no group after number `since` has written any of the keys. False if this is not known."""
        later = self.group - since
        if later > len(self._groups):
            return False
        return all(self._groups[-number].isdisjoint(keys) for number in range(1, later + 1))


class StoredValues(Protocol):
    def get(self, key: bytes, /) -> bytes | None: ...


class Conditions:
    """Belongs to one writer."""

    def __init__(self, stored: StoredValues) -> None:
        self._stored = stored
        self.recent = RecentKeys()
        self._known: Puts = {}
        """A cache of small stored values. All writes of a thread have conditions on the same two."""

    def stage(self, group: Sequence[PendingWrite]) -> tuple[Puts, Failed, int, int]:
        """Check the conditions of each write after the writes before it. Returns the puts of those that pass, why each
        other one fails, and how many threads and messages the writes add."""
        staged: Puts = {}
        read: Puts = {}
        failed: Failed = {}
        get, known = self._stored.get, self._known
        threads = messages = 0
        for pending in group:
            write = pending.write
            if write is None:
                raise RuntimeError("a reservation was queued without a write")
            conditions: Iterable[tuple[bytes, bytes | None]] = pending.expect
            if write.expect or write.read:
                conditions = chain(pending.expect, write.expect, self._in_doubt(write, staged))
            for key, expected in conditions:
                if key in staged:
                    stored = staged[key]
                elif key in known:
                    stored = known[key]
                elif key in read:
                    stored = read[key]
                else:
                    try:
                        stored = read[key] = get(key)
                    except StoreDamagedError as error:  # it is that write's alone
                        failed[pending] = error
                        break
                if stored != expected:
                    failed[pending] = ConditionFailedError(key)
                    break
            else:
                staged.update(write.puts)
                threads += write.threads
                messages += write.messages
        if len(known) > KNOWN_MAX:
            known.clear()
        known.update((key, value) for key, value in read.items() if value is None or len(value) <= KNOWN_BYTES_MAX)
        return staged, failed, threads, messages

    def _in_doubt(self, write: Write, staged: Puts) -> Sequence[tuple[bytes, bytes]]:
        """The values that a write has read and that must be compared again: none if no later group has written their
        keys. This check costs much less than reading them again."""
        if not write.read:
            return ()
        keys = [key for key, _ in write.read]
        untouched = staged.keys().isdisjoint(keys) and self.recent.untouched(keys, write.read_at)
        return () if untouched else write.read

    def written(self, staged: Puts) -> None:
        self.recent.add(staged)
        for key in self._known.keys() & staged.keys():
            del self._known[key]

    def forget(self) -> None:
        """After a recovery, values may differ from those that the groups wrote."""
        self.recent.forget()
        self._known.clear()
