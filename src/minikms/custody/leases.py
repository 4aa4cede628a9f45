"""Use leases: durable limits on the uses of each key, reserved in blocks.

Owns: the use leases in memory. The uses of a key are reserved durably in leases of 2^16 (`LeaseStore`, in a worker
thread); after that `UseLease.take` is a subtraction. Invariants:
- `take` returns true only for uses that are reserved on disk. So a crash may waste a lease, but never forgets a use.
- All leases that are requested in one turn of the event loop take one append and one sync. Requests that arrive during
  the sync form the next group.
- Every grant raises the one count of its key, so several `UseLease` objects of a key never share a use.
- A failed write grants nothing, and the next request writes again.

Everything here runs in the event loop's thread. It must never grant a use in memory before it is on disk.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Final, NamedTuple

from minikms.custody.lease_format import GROUP_RECORDS_MAX, LEASE_USES
from minikms.custody.lease_store import LeaseFilesStatus, LeaseStore
from minikms.errors import KeyExhaustedError, MiniKmsError, StorageUnavailableError

LEASES_COUNT_MAX: Final = 65_536
"""Leases kept in memory. Beyond that the least recently used one is dropped, and its remaining uses are wasted."""
REFILL_USES: Final = LEASE_USES // 10
"""A lease with fewer uses left is extended in the background."""


class UseLease:
    """The uses of one key (`key`: 16 bytes) that are reserved for this process. Made by `Leases`."""

    __slots__ = ("_leases", "_refill_below", "key", "spent", "uses_left")

    def __init__(self, leases: Leases, key: bytes, uses_left: int) -> None:
        self._leases = leases
        self.key = key
        self.uses_left = uses_left
        self.spent = False  # the limit leaves no room for another lease
        self._refill_below = REFILL_USES if uses_left else 0  # 0: the next user waits in `extend` anyway

    def __repr__(self) -> str:
        return f"<UseLease {self.uses_left} left>"

    def covers(self, uses: int) -> bool:
        """False if `Leases.extend` must come before `take`; true if enough is reserved or no more can be."""
        return self.uses_left >= uses or self.spent

    def take(self, uses: int = 1) -> bool:
        """Takes `uses` if they are reserved; False if the caller must call `Leases.extend` first.

        Raises KeyExhaustedError if no more can be reserved. Every encryption calls this.
        """
        left = self.uses_left - uses
        if left < self._refill_below:
            return self._take_low(left)
        self.uses_left = left
        return True

    def _take_low(self, left: int) -> bool:
        if left < 0:
            if self.spent:
                raise KeyExhaustedError(
                    "this key has reached its limit of encryptions and only decrypts; give its thread a new key"
                )
            return False
        self.uses_left = left
        # If this extension fails, the next one is requested when half of the rest is left.
        self._refill_below = left // 2
        self._leases._extend_later(self)
        return True

    def _leases_short_of(self, uses: int) -> int:
        """The number of leases to add for `uses`, and REFILL_USES for requests that run before the waiters do."""
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


class _Request(NamedTuple):
    """`wanted`: leases with the uses that each must cover. `done`: None for a request in the background."""

    wanted: tuple[tuple[UseLease, int], ...]
    done: asyncio.Future[None] | None

    @property
    def records_max(self) -> int:
        """An upper bound of the journal records that the request takes."""
        return sum(2 + uses // LEASE_USES for _, uses in self.wanted)


class Leases:
    """All leases of a run. `executor` has one thread, in which `store` is used. The caller closes `store`."""

    def __init__(self, store: LeaseStore, executor: Executor) -> None:
        self._store = store
        self._executor = executor
        self._leases: OrderedDict[bytes, UseLease] = OrderedDict()
        self._requests: deque[_Request] = deque()
        self._running: asyncio.Task[None] | None = None
        self._scheduled = False

    def get(self, key: bytes) -> UseLease:
        """The lease of a key (16 bytes). The first one of a key in a run covers no use yet. No I/O."""
        lease = self._leases.get(key)
        if lease is None:
            return self._remember(UseLease(self, key, 0))
        self._leases.move_to_end(key)
        return lease

    def granted_at_creation(self, key: bytes) -> UseLease:
        """The first lease of a new key, which the creation of its file grants. No I/O.

        Called once for a key, in the run that creates it.
        """
        return self._remember(UseLease(self, key, LEASE_USES))

    async def extend(self, wanted: Iterable[tuple[UseLease, int]]) -> None:
        """Reserves uses until each lease covers the wanted number; durable on return.

        The caller then calls `take` in the same turn of the event loop. A lease that can't be extended so far is
        `spent`, and `take` raises. Raises ValueError for more than about 2,000 leases or 2^27 uses, which is far more
        than a batch has, and StorageUnavailableError; then nothing has changed.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        request = _Request(tuple(wanted), done)
        if request.records_max > GROUP_RECORDS_MAX:
            raise ValueError("too many leases for one append")
        self._requests.append(request)
        self._schedule(loop)
        await done

    def uses_max(self, key: bytes) -> int:
        """An upper bound of the uses of a key (16 bytes). May read one block from the disk; for any thread."""
        return self._store.total(key)

    def status(self) -> LeaseFilesStatus:
        """For `/status`."""
        return self._store.status()

    async def drain(self) -> None:
        """Returns when no request is waiting or under way."""
        while self._requests or self._running is not None:
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
        self._requests.append(_Request(((lease, 0),), None))
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
        while self._requests and records + self._requests[0].records_max <= GROUP_RECORDS_MAX:
            request = self._requests.popleft()
            records += request.records_max
            for lease, uses in request.wanted:
                needed[lease] = needed.get(lease, 0) + uses
            if request.done is not None:
                waiting.append(request.done)
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
            # An error of `reserve`. A failed merge comes after all waiters are answered: the store counts it, and the
            # merge is due again later.
            for done in waiting:
                if not done.done():
                    done.set_exception(StorageUnavailableError(str(error)))
        except BaseException:
            # A defect here, or the loop is closing. No caller may wait for ever or believe that its lease is durable.
            for done in waiting:
                done.cancel()
            raise
        finally:
            self._running = None
            if self._requests:
                self._schedule(loop)
