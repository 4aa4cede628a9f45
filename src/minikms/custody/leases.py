"""Use leases: durable limits on the uses of each key, reserved in blocks.

Owns: the use leases in memory, and their sizes. The uses of a key are reserved durably in leases (`LeaseStore`, in a
worker thread); after that `UseLease.take` is a subtraction. Invariants:
- `take` returns true only for uses that are reserved on disk. So a crash may waste a lease, but never forgets a use.
- A use is in one place. While a key is open, its `UseLease` has what is left of its leases; `UseLease.close` moves that
  into a compact table, and `get` takes it out again. A key has never both.
- A lease grows with the use of its key: the first one of an opened key has LEASE_USES_MIN uses, or four times what was
  left when it was opened, and each further one has four times the uses of the one before, up to LEASE_USES_MAX. So a
  key that is used once in a while wastes little, and a busy one rarely waits.
- All leases that are requested in one turn of the event loop take one append and one sync. Requests that arrive during
  the sync form the next group.
- A failed write grants nothing, and the next request writes again.

Everything here runs in the event loop's thread. It must never grant a use in memory before it is on disk.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Final, NamedTuple

from minikms.custody.lease_format import GROUP_RECORDS_MAX, LEASE_USES_MAX, LEASE_USES_MIN, USES_MAX
from minikms.custody.lease_store import LeaseFilesStatus, LeaseStore
from minikms.errors import KeyExhaustedError, MiniKmsError, StorageUnavailableError

CLOSED_LEASES_KEPT: Final = 1 << 20
"""Keys that are not open and whose leases are kept in any case, those that were used last. Twice as many fit, at about
130 bytes each. What is left of the leases of further keys is wasted.
"""
GROWTH: Final = 4
"""How many times larger the next lease of an open key is."""
REFILL_SHARE: Final = 10
"""A lease is extended in the background when less than 1/REFILL_SHARE of its uses is left."""
EXTEND_ATTEMPTS_MAX: Final = 16
_USED_SHIFT: Final = 32
_LEFT_MASK: Final = (1 << _USED_SHIFT) - 1


class UseLease:
    """The uses of one key (`key`: 16 bytes) that are reserved for this process. Made by `Leases`.

    `granted`: all uses that this process was granted, so that the difference to `uses_left` is what it has used.
    """

    __slots__ = ("_leases", "_refill_below", "_size", "granted", "key", "spent", "uses_left")

    def __init__(self, leases: Leases, key: bytes, uses_left: int, used: int) -> None:
        self._leases = leases
        self.key = key
        self.uses_left = uses_left
        self.granted = uses_left + used
        self.spent = False  # the limit leaves no room for another lease
        self._size = uses_left
        self._refill_below = self.low  # 0: the next user waits in `extend` anyway

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

    def close(self) -> None:
        """Gives back what is left: the key is no longer open. The lease covers nothing from then on."""
        self._leases.closed(self)

    def empty(self) -> None:
        """After `Leases` has taken over what was left."""
        self.uses_left = self.granted = self._size = self._refill_below = 0

    def _take_low(self, left: int) -> bool:
        if left < 0:
            if self.spent:
                raise KeyExhaustedError(
                    "this key only decrypts: it has reached its limit of encryptions, or its data directory was "
                    "restored since it was made; give its thread a new key"
                )
            return False
        self.uses_left = left
        # If this extension fails, the next one is requested when half of the rest is left.
        self._refill_below = left // 2
        self._leases.extend_later(self.key)
        return True

    @property
    def next_size(self) -> int:
        """The uses of the next lease."""
        return min(LEASE_USES_MAX, max(LEASE_USES_MIN, GROWTH * self._size))

    @property
    def low(self) -> int:
        """With fewer uses left the lease is extended."""
        return self._size // REFILL_SHARE

    def grant(self, uses: int, *, last: bool) -> None:
        """Adds uses that are durable. `last`: the limit leaves no room for more."""
        self.uses_left += uses
        self.granted += uses
        self._size = min(max(uses, self._size), LEASE_USES_MAX)
        self.spent = last
        self._refill_below = 0 if last else self.low


class ClosedLeases:
    """The compact table: what is left, and what was used in this run, of the leases of keys that are not open.

    A key that was put lately is in the young half. When that is full, the old half is dropped, with what is
    left in it, and the young half becomes the old one.
    """

    def __init__(self) -> None:
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def put(self, key: bytes, left: int, used: int) -> None:
        if len(self._young) >= CLOSED_LEASES_KEPT:
            self._old, self._young = self._young, {}
        # An int of 16 bytes takes less memory than bytes, and most values are small.
        self._young[int.from_bytes(key, "big")] = left | used << _USED_SHIFT

    def pop(self, key: bytes) -> tuple[int, int]:
        """(left, used); removed from the table."""
        number = int.from_bytes(key, "big")
        value = self._young.pop(number, None)
        if value is None:
            value = self._old.pop(number, 0)
        return value & _LEFT_MASK, value >> _USED_SHIFT

    def get(self, key: bytes) -> tuple[int, int]:
        """(left, used). For any thread."""
        number = int.from_bytes(key, "big")
        value = self._young.get(number)
        if value is None:
            value = self._old.get(number, 0)
        return value & _LEFT_MASK, value >> _USED_SHIFT


class KeyUses(NamedTuple):
    """`known`: uses since the start of this run, a lower bound of all uses. `reserved`: an upper bound of all uses,
    which the limit counts. `exhausted`: the key only decrypts.
    """

    known: int
    reserved: int
    exhausted: bool


class _Request(NamedTuple):
    """`wanted`: keys with the uses that each must cover. `done`: None for a request in the background; it resolves to
    the keys that only decrypt.
    """

    wanted: tuple[tuple[bytes, int], ...]
    done: asyncio.Future[frozenset[bytes]] | None

    @property
    def records_max(self) -> int:
        """An upper bound of the journal records that the request takes."""
        return sum(2 + uses // LEASE_USES_MAX for _, uses in self.wanted)


class Leases:
    """All leases of a run. `executor` has one thread, in which `store` is used. The caller closes `store`."""

    def __init__(self, store: LeaseStore, executor: Executor) -> None:
        self._store = store
        self._executor = executor
        self._open: dict[bytes, UseLease] = {}
        self._closed = ClosedLeases()
        self._requests: deque[_Request] = deque()
        self._running: asyncio.Task[None] | None = None
        self._scheduled = False

    @property
    def first_usable_ms(self) -> int:
        """No key whose id has an earlier time (Unix ms) can encrypt: a new key must have a later one."""
        exhausted = self._store.exhausted
        return int.from_bytes(exhausted[:6], "big") + 1 if exhausted else 0

    def get(self, key: bytes) -> UseLease:
        """The lease of a key (16 bytes) that is opened, until `UseLease.close`. No I/O.

        It covers what is left of earlier leases of this run, which for the first one is nothing.
        """
        lease = self._open.get(key)
        if lease is None:
            lease = self._open[key] = UseLease(self, key, *self._closed.pop(key))
            lease.spent = self._store.is_exhausted(key)
        return lease

    def granted_at_creation(self, key: bytes) -> None:
        """Notes the first lease of a new key, which the creation of its file grants. No I/O.

        Called once for a key, in the run that creates it, before the key is opened.
        """
        self._closed.put(key, LEASE_USES_MAX, 0)

    async def extend(self, wanted: Iterable[tuple[UseLease, int]]) -> None:
        """Reserves uses until each key covers the wanted number; durable on return.

        The caller then calls `take` in the same turn of the event loop, on the lease that the key has then. A lease
        that can't be extended so far is `spent`, and `take` raises. Raises ValueError for more than about 2,000 leases
        or 2^27 uses, which is far more than a batch has, and StorageUnavailableError.
        """
        loop = asyncio.get_running_loop()
        keys = tuple((lease.key, uses) for lease, uses in wanted)
        if _Request(keys, None).records_max > GROUP_RECORDS_MAX:
            raise ValueError("too many leases for one append")
        # Uses that other requests take between the grant and this task's turn are reserved once more.
        for _ in range(EXTEND_ATTEMPTS_MAX):
            done: asyncio.Future[frozenset[bytes]] = loop.create_future()
            self._requests.append(_Request(keys, done))
            self._schedule(loop)
            try:
                exhausted = await done
            finally:
                del done  # the traceback of its error leads to this frame
            if all(key in exhausted or self._left(key) >= uses for key, uses in keys):
                return
        raise StorageUnavailableError("the uses of the key are taken faster than they can be reserved; try again")

    def uses(self, key: bytes) -> KeyUses:
        """What is known of the uses of a key (16 bytes). May read one block from the disk; for any thread."""
        lease = self._open.get(key)
        known = self._closed.get(key)[1] if lease is None else lease.granted - lease.uses_left
        reserved = self._store.total(key)
        return KeyUses(known, reserved, reserved >= USES_MAX)

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

    def closed(self, lease: UseLease) -> None:
        """Moves what is left of an open lease into the table. For `UseLease.close`."""
        if self._open.get(lease.key) is not lease:
            return
        del self._open[lease.key]
        used = lease.granted - lease.uses_left
        if lease.uses_left or used:
            self._closed.put(lease.key, lease.uses_left, used)
        lease.empty()

    def _left(self, key: bytes) -> int:
        lease = self._open.get(key)
        return self._closed.get(key)[0] if lease is None else lease.uses_left

    def extend_later(self, key: bytes) -> None:
        """Reserves the next lease of a key in the background."""
        self._requests.append(_Request(((key, 0),), None))
        self._schedule(asyncio.get_running_loop())

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._scheduled and self._running is None:
            self._scheduled = True
            loop.call_soon(self._start_group, loop)  # after all callers of this turn

    def _start_group(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        needed: dict[bytes, int] = {}
        waiting: list[asyncio.Future[frozenset[bytes]]] = []
        records = 0
        while self._requests and records + self._requests[0].records_max <= GROUP_RECORDS_MAX:
            request = self._requests.popleft()
            records += request.records_max
            for key, uses in request.wanted:
                needed[key] = needed.get(key, 0) + uses
            if request.done is not None:
                waiting.append(request.done)
        leases = [(key, size) for key, uses in needed.items() for size in self._sizes(key, uses)]
        self._running = loop.create_task(self._reserve(loop, leases, waiting))

    def _sizes(self, key: bytes, uses: int) -> list[int]:
        """The sizes of the leases that the key needs to cover `uses`."""
        lease = self._open.get(key)
        if lease is None:
            left, low, size = self._closed.get(key)[0], 0, LEASE_USES_MIN
        else:
            left, low, size = lease.uses_left, lease.low, lease.next_size
        if left >= uses + low:
            return []
        missing = max(0, uses - left)
        # As many again for requests that run before the waiters do.
        total = max(size, missing + min(missing, LEASE_USES_MAX))
        return [min(LEASE_USES_MAX, total - at) for at in range(0, total, LEASE_USES_MAX)]

    async def _reserve(
        self,
        loop: asyncio.AbstractEventLoop,
        leases: list[tuple[bytes, int]],
        waiting: list[asyncio.Future[frozenset[bytes]]],
    ) -> None:
        try:
            exhausted: frozenset[bytes] = frozenset()
            if leases:
                given = await loop.run_in_executor(self._executor, self._store.reserve, leases)
                exhausted = self._grant(leases, given)
            for done in waiting:
                if not done.done():
                    done.set_result(exhausted)
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

    def _grant(self, leases: list[tuple[bytes, int]], given: list[int]) -> frozenset[bytes]:
        """Hands out what was reserved. Returns the keys that reached their limit: they only decrypt."""
        granted: dict[bytes, int] = {}
        exhausted: set[bytes] = set()
        for (key, size), uses in zip(leases, given, strict=True):
            granted[key] = granted.get(key, 0) + uses
            if uses < size:
                exhausted.add(key)
        for key, uses in granted.items():
            lease = self._open.get(key)
            if lease is not None:
                lease.grant(uses, last=key in exhausted)
            elif uses:
                left, used = self._closed.pop(key)
                self._closed.put(key, left + uses, used)
        return frozenset(exhausted)
