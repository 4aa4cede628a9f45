"""Use leases: no key encrypts more often than its nonces allow, and no request waits for a disk to know that.

Owns: the event loop's side of the count of uses. A key's uses are reserved durably in leases of 2^16 (`LeaseStore`, in
a worker thread); then `UseLease.take` is a subtraction. Invariants:
- `take` is true only for uses below a reservation that is on disk, so a crash may waste a lease but never forget a use.
- All leases asked for in one turn of the loop are one append and one sync; while it runs the next group gathers.
- Each grant raises the key's one count, so any number of `UseLease` objects of a key, in any order, share no use.
- A failed write grants nothing, and later calls try again by themselves.
All of it runs in the loop's thread. It must never grant a use in memory first and write it afterwards.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Final, NamedTuple

from minikms.custody.lease_format import GROUP_RECORDS_MAX, LEASE_USES, USES_WARN
from minikms.custody.lease_store import LeaseFilesStatus, LeaseStore
from minikms.errors import KeyExhaustedError, MiniKmsError, StorageUnavailableError

LEASES_COUNT_MAX: Final = 65_536
"""Leases remembered in a run; the least recently got one is forgotten, and what is left of it wasted."""
REFILL_USES: Final = LEASE_USES // 10
"""With fewer uses left a lease is extended in the background."""


class UseLease:
    """The uses of one key that are reserved for this process. Made by `Leases`."""

    __slots__ = ("_book", "_refill_below", "key", "spent", "uses_left")

    def __init__(self, book: Leases, key: bytes, uses_left: int) -> None:
        self._book = book
        self.key = key
        self.uses_left = uses_left
        self.spent = False  # no further lease fits
        self._refill_below = REFILL_USES if uses_left else 0  # 0: whoever needs uses waits in `extend` anyway

    def __repr__(self) -> str:
        return f"<UseLease {self.uses_left} left>"

    def covers(self, uses: int) -> bool:
        """Whether `take` would not be helped by `Leases.extend`: enough is reserved, or nothing more can be."""
        return self.uses_left >= uses or self.spent

    def take(self, uses: int = 1) -> bool:
        """Take `uses` if they are covered; False if the caller must `extend` first.

        Raises KeyExhaustedError if they are not covered and never will be. On the path of every encryption.
        """
        left = self.uses_left - uses
        if left < self._refill_below:
            return self._take_low(left)
        self.uses_left = left
        return True

    @property
    def total(self) -> int:
        """An upper bound of the key's uses ever made. May read the disk."""
        return self._book.uses_max(self.key)

    @property
    def warn(self) -> bool:
        """Whether the key has had so many uses that it should be replaced. May read the disk."""
        return self.total >= USES_WARN

    def _take_low(self, left: int) -> bool:
        if left < 0:
            if self.spent:
                raise KeyExhaustedError("this key has encrypted as often as it may; it only decrypts")
            return False
        self.uses_left = left
        # If the extension fails, the next one is asked for when half of this is left.
        self._refill_below = left // 2
        self._book._extend_later(self)
        return True

    def _leases_short_of(self, uses: int) -> int:
        """How many leases to add to cover `uses`, with some to spare for who takes before the waiters wake."""
        if self.spent:
            return 0
        return max(0, -(-(uses + REFILL_USES - self.uses_left) // LEASE_USES))

    def _granted(self, total: int | None) -> None:
        if total is None:
            self.spent = True
            self._refill_below = 0
        else:
            self.uses_left += LEASE_USES
            self._refill_below = REFILL_USES


class _Asked(NamedTuple):
    wanted: tuple[tuple[UseLease, int], ...]
    done: asyncio.Future[None] | None

    @property
    def records_max(self) -> int:
        return sum(2 + uses // LEASE_USES for _, uses in self.wanted)


class Leases:
    """All leases of a run. `executor` runs one thing at a time; `store` is used in it, and closed by the caller."""

    def __init__(self, store: LeaseStore, executor: Executor) -> None:
        self._store = store
        self._executor = executor
        self._leases: OrderedDict[bytes, UseLease] = OrderedDict()
        self._asked: deque[_Asked] = deque()
        self._running: asyncio.Task[None] | None = None
        self._scheduled = False

    def get(self, key: bytes) -> UseLease:
        """The lease of a key (16 bytes). A key's first one in a run covers nothing yet. No I/O."""
        lease = self._leases.get(key)
        if lease is None:
            return self._remember(UseLease(self, key, 0))
        self._leases.move_to_end(key)
        return lease

    def granted_at_creation(self, key: bytes) -> UseLease:
        """The lease of a key that was created just now: its file, durable already, grants the first one. No I/O.

        Only once for a key, in the run that created it.
        """
        return self._remember(UseLease(self, key, LEASE_USES))

    async def extend(self, wanted: Iterable[tuple[UseLease, int]]) -> None:
        """Reserve so much that the uses that are wanted of each lease are covered; durable when this returns.

        Then `take` them in the same turn. A lease that can't be extended so far is `spent`, and `take` tells. At most
        some 2,000 leases and 2^27 uses, a multiple of a batch's (ValueError). Raises StorageUnavailableError; nothing
        has changed then.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        asked = _Asked(tuple(wanted), done)
        if asked.records_max > GROUP_RECORDS_MAX:
            raise ValueError("too much for one append")
        self._asked.append(asked)
        self._schedule(loop)
        await done

    def uses_max(self, key: bytes) -> int:
        """An upper bound of the uses of a key, for listings. May read one block from the disk."""
        return self._store.total(key)

    def status(self) -> LeaseFilesStatus:
        return self._store.status()

    async def drain(self) -> None:
        """Wait until nothing is being written: before the store is closed."""
        while self._asked or self._running is not None:
            if self._running is None:
                await asyncio.sleep(0)
            else:
                await asyncio.wait([self._running])

    def _remember(self, lease: UseLease) -> UseLease:
        self._leases[lease.key] = lease
        self._leases.move_to_end(lease.key)
        if len(self._leases) > LEASES_COUNT_MAX:
            self._leases.popitem(last=False)
        return lease

    def _extend_later(self, lease: UseLease) -> None:
        self._asked.append(_Asked(((lease, 0),), None))
        self._schedule(asyncio.get_running_loop())

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._scheduled and self._running is None:
            self._scheduled = True
            loop.call_soon(self._start_group, loop)  # after all callers of this turn

    def _start_group(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        needed: dict[UseLease, int] = {}
        waiting: list[asyncio.Future[None]] = []
        records = 0
        while self._asked and records + self._asked[0].records_max <= GROUP_RECORDS_MAX:
            asked = self._asked.popleft()
            records += asked.records_max
            for lease, uses in asked.wanted:
                needed[lease] = needed.get(lease, 0) + uses
            if asked.done is not None:
                waiting.append(asked.done)
        grants = [lease for lease, uses in needed.items() for _ in range(lease._leases_short_of(uses))]
        self._running = loop.create_task(self._reserve(loop, grants, waiting))

    async def _reserve(
        self, loop: asyncio.AbstractEventLoop, grants: list[UseLease], waiting: list[asyncio.Future[None]]
    ) -> None:
        try:
            if grants:
                keys = [lease.key for lease in grants]
                totals = await loop.run_in_executor(self._executor, self._store.reserve, keys)
                for lease, total in zip(grants, totals, strict=True):
                    lease._granted(total)
            for done in waiting:
                if not done.done():
                    done.set_result(None)
            if self._store.merge_due:
                await loop.run_in_executor(self._executor, self._store.merge)
        except MiniKmsError as error:
            # Of `reserve`; a failed merge comes after the answers, is counted by the store, and is due again later.
            for done in waiting:
                if not done.done():
                    done.set_exception(StorageUnavailableError(str(error)))
        except BaseException:
            # A defect here or a loop that is being torn down; nobody may wait for ever or be told "durable".
            for done in waiting:
                done.cancel()
            raise
        finally:
            self._running = None
            if self._asked:
                self._schedule(loop)
