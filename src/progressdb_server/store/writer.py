"""Group commit: the writer commits concurrent writes as one group, with one atomic put and one fsync.

Owns: the queue, the conditions of writes, the order of commits, the counters that are stored with every group, and the
recovery of a failed engine. Also owns the locks by name, the record of recently written keys, and the thread that calls
fsync. Invariants:
- A caller gets the result of a write after the sync of its group. A write is applied as a whole or not at all. It is
  applied only if all stored values that it expects equal those that the earlier writes left.
- Writes with one ordering key (a thread's) are applied in the order of their slots, so that a message never appears
  before one that a reader has already seen. A slot whose write fails is skipped.
- A group waits for the writes that the key service is sealing, at most `GATHER_S_MAX`. No two groups wait for the same
  write, so that a slow one delays the others once (docs/decisions/0205-a-group-waits-for-sealing.md).
- The queue is bounded in writes and in bytes. A write that does not fit is refused at once.
- After a failed write or sync, every waiter gets StoreUnavailableError (its write may be durable), and nothing is
  written until the engine is reopened.
- All methods run in the event loop's thread, except the engine's `sync` and `reopen`, which run in the disk thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from queue import SimpleQueue
from typing import Final

import msgspec

from minikms.logs import structlog
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.engine import Engine, EngineBusyError, EngineUnavailableError
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import (
    ConditionFailedError,
    FormatError,
    NotWrittenError,
    Step,
    StoreUnavailableError,
)

GROUP_WRITES_MAX: Final = 512
GROUP_BYTES_MAX: Final = 8 * 1024 * 1024
"""One call writes a group and holds the interpreter lock: for a few milliseconds at most."""
GATHER_S_MAX: Final = 0.002
"""About two exchanges with the key service, or one sync of a slow disk."""
KNOWN_MAX: Final = 32_768
KNOWN_BYTES_MAX: Final = 64
"""Bounds of the cache of stored values: their number, and the length of one."""
QUEUE_WRITES_MAX: Final = 8192
QUEUE_BYTES_MAX: Final = 64 * 1024 * 1024
BUSY_RETRY_S: Final = 0.005
BUSY_S_MAX: Final = 10.0
REOPEN_RETRY_S_MIN: Final = 0.1
REOPEN_RETRY_S_MAX: Final = 5.0
REASON_CHARS_MAX: Final = 300
"""Longer texts of the engine's errors are cut in the log."""
KEYS_REMEMBERED_MAX: Final = 32_768
"""About thirty chunks of a rotation, more than are ever in progress."""

_log = structlog.get_logger("progressdb.store")


class NamedLocks:
    """Locks by name, for read-modify-write operations. The tasks that ask for one name run one after another, in the
    order in which they asked. A lock exists only while a task holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[bytes, asyncio.Lock] = {}
        self._users: dict[bytes, int] = {}

    @asynccontextmanager
    async def hold(self, name: bytes) -> AsyncIterator[None]:
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._users[name] = self._users.get(name, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._locks[name]


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


class DiskThread:
    """A thread for calls that wait for the disk, started at the first call. It replaces a ThreadPoolExecutor with one
    worker and takes a third less processor time; the writer uses it once for each group. The calls run one after
    another, in the order of `run`. A cancelled caller does not stop a call."""

    def __init__(self) -> None:
        self._works: SimpleQueue[tuple[Callable[[], None], asyncio.Future[None]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Returns a future of the running loop, with the work's outcome."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="store-disk", daemon=True)
            self._thread.start()
        future = asyncio.get_running_loop().create_future()
        self._works.put((work, future))
        return future

    def close(self) -> None:
        """Waits until all works are done."""
        if self._thread is not None:
            self._works.put(None)
            self._thread.join()

    def _run(self) -> None:
        for work, future in iter(self._works.get, None):
            error: BaseException | None = None
            try:
                work()
            except BaseException as raised:  # noqa: BLE001  the caller gets any error
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed, and no caller waits
                future.get_loop().call_soon_threadsafe(_settle, future, error)
            del error  # its traceback leads to this frame


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


class Write(Step, frozen=True):
    """Puts that are applied together, with their conditions. `read_at` is the writer's `group` at the time when `read`
    was read. `threads` and `messages` are added to the counters."""

    threads: int = 0
    messages: int = 0


class State(msgspec.Struct, array_like=True):
    """Stored at `store:state` with every group: the counters, and the highest stamp that was issued, whose era is apart
    from its Unix nanoseconds (MessagePack has no number for both)."""

    threads: int = 0
    messages: int = 0
    last_ns: int = 0
    last_seq: int = 0
    era: int = 0

    @classmethod
    def of(cls, threads: int, messages: int, last: Stamp) -> State:
        return cls(threads, messages, last.time_ns, last.seq, last.era)

    @property
    def last(self) -> Stamp:
        return Stamp(self.era * keyspace.ERA_NS + self.last_ns, self.last_seq)


class Slot:
    """A position in the order of one ordering key. With `order_key` None, the write is not ordered."""

    __slots__ = ("expect", "future", "order_key", "period", "size", "write")

    def __init__(self, order_key: bytes | None, future: asyncio.Future[None], period: int = 0) -> None:
        self.order_key = order_key
        self.period = period
        self.future = future
        self.write: Write | None = None
        self.expect: Sequence[tuple[bytes, bytes | None]] = ()
        self.size = 0


class Writer:
    def __init__(self, engine: Engine, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]) -> None:
        """`on_reopen` is called after a recovery: cached values may be out of date."""
        self._engine = engine
        self._clock = clock
        self._metrics = metrics
        self._on_reopen = on_reopen
        self._disk = DiskThread()
        self._ordered: dict[bytes, deque[Slot]] = {}
        self._queue: deque[Slot] = deque()
        self._queue_bytes = 0
        self._drain: asyncio.Task[None] | None = None
        self._period = 0
        """The number of waits so far. A slot belongs to the period in which it was reserved; the wait that ends the
        period waits for the slot, and no later wait does."""
        self._reserved = 0
        """Slots of this period that are neither submitted nor left: their writes are being sealed."""
        self._gathered: asyncio.Future[None] | None = None
        self._missing = 0
        """Slots of the previous period that the next group still waits for."""
        self._recovery: asyncio.Task[None] | None = None
        self._closed = False
        self._last_group_failed = False
        self._recent = RecentKeys()
        self._known: dict[bytes, bytes | None] = {}
        """A cache of small stored values. All writes of a thread have conditions on the same two."""
        self.state = State()
        self.load_state()

    # --- what callers use -----------------------------------------------------------------------------------------
    @property
    def available(self) -> bool:
        return self._recovery is None and not self._closed

    @property
    def group(self) -> int:
        """The number of the latest group: see `Write.read_at`."""
        return self._recent.group

    @property
    def queued(self) -> int:
        return len(self._queue)

    def load_state(self) -> None:
        """Raises FormatError."""
        raw = self._engine.get(keyspace.STATE)
        try:
            self.state = msgspec.msgpack.decode(raw, type=State) if raw else State()
        except msgspec.DecodeError as error:
            raise FormatError("the store's counters are damaged: run progressdb check --repair") from error
        self._clock.recover(self.state.last)

    def reserve(self, order_key: bytes) -> Slot:
        """Take the next position in the order of the key. Later writes of this key wait until the caller passes the
        slot to `submit` or `leave`."""
        slot = Slot(order_key, asyncio.get_running_loop().create_future(), self._period)
        self._reserved += 1
        slots = self._ordered.get(order_key)
        if slots is None:
            self._ordered[order_key] = deque((slot,))
        else:
            slots.append(slot)
        return slot

    def submit(
        self, slot: Slot, write: Write, expect: Sequence[tuple[bytes, bytes | None]] = ()
    ) -> asyncio.Future[None]:
        """`expect` are conditions in addition to the write's own. The future's result: None once durable,
        ConditionFailedError or StoreUnavailableError."""
        slot.write = write
        slot.expect = expect
        size = 0
        for key, value in write.puts:
            size += len(key) + (len(value) if value else 0)
        slot.size = size
        order_key = slot.order_key
        if order_key is not None:
            self._end_reservation(slot.period)
        if order_key is not None and len(self._ordered[order_key]) == 1:  # the usual case
            del self._ordered[order_key]
            self._enqueue(slot)
        else:
            self._advance(slot)
        return slot.future

    def leave(self, slot: Slot) -> None:
        """Give up a position. Does nothing if the slot was submitted."""
        if slot.write is None and slot.order_key is not None:
            self._end_reservation(slot.period)
            slots = self._ordered[slot.order_key]
            slots.remove(slot)
            if slots:
                self._advance(slots[0])
            else:
                del self._ordered[slot.order_key]
            slot.order_key = None

    def commit(self, write: Write) -> asyncio.Future[None]:
        """Queue a write that is not ordered."""
        return self.submit(Slot(None, asyncio.get_running_loop().create_future()), write)

    async def barrier(self) -> None:
        """Returns after everything that is readable now is durable."""
        await self.commit(Write(()))

    async def check_writable(self) -> None:
        """Raises StoreUnavailableError if a write would be refused now. A caller that first creates something outside
        the store calls this before it. If the last group failed, this makes an empty write to test the disk."""
        why = self._refusal(0)
        if why:
            raise NotWrittenError(why)
        if self._last_group_failed:
            await self.barrier()

    async def close(self) -> None:
        """Commits the queued writes and refuses later ones."""
        self._closed = True
        if self._recovery is not None:
            self._recovery.cancel()
        while self._drain is not None:
            await asyncio.wait((self._drain,))
        self._refuse_queue("the server is shutting down")
        await asyncio.to_thread(self._disk.close)

    # --- order and queue ------------------------------------------------------------------------------------------
    def _advance(self, slot: Slot) -> None:
        if slot.order_key is None:
            self._enqueue(slot)
            return
        slots = self._ordered[slot.order_key]
        while slots and slots[0].write is not None:
            self._enqueue(slots.popleft())
        if not slots:
            del self._ordered[slot.order_key]

    def _enqueue(self, slot: Slot) -> None:
        why = self._refusal(slot.size)
        if why:
            self._refuse(slot, NotWrittenError(why))
        else:
            self._queue.append(slot)
            self._queue_bytes += slot.size
            if self._gathered is not None and self._is_full():
                _settle(self._gathered, None)
            if (
                self._drain is None
            ):  # it starts in the loop's next iteration, so that the writes of this one form a group
                self._drain = asyncio.get_running_loop().create_task(self._run())

    def _refusal(self, size: int) -> str:
        """Why a write of `size` bytes is refused now; empty if it is accepted."""
        if self._recovery is not None or self._closed:
            return "the store's disk is not available now"
        if len(self._queue) >= QUEUE_WRITES_MAX or self._queue_bytes + size > QUEUE_BYTES_MAX:
            return "too many writes are waiting"
        return ""

    def _refuse(self, slot: Slot, error: StoreUnavailableError) -> None:
        if not slot.future.done():
            slot.future.set_exception(error)

    def _refuse_queue(self, why: str) -> None:
        while self._queue:
            self._refuse(self._queue.popleft(), NotWrittenError(why))
        self._queue_bytes = 0

    # --- groups ---------------------------------------------------------------------------------------------------
    async def _run(self) -> None:
        try:
            while self._queue:
                if self._reserved and not self._is_full():
                    await self._gather()
                await self._commit_group(self._take_group())
        finally:
            self._drain = None

    async def _gather(self) -> None:
        """End the period and wait until all its slots have been submitted or left, or the group is full, at most
        `GATHER_S_MAX`."""
        loop = asyncio.get_running_loop()
        self._period += 1
        self._missing, self._reserved = self._reserved, 0
        self._gathered = loop.create_future()
        timer = loop.call_later(GATHER_S_MAX, _settle, self._gathered, None)
        try:
            await self._gathered
        finally:
            timer.cancel()
            self._gathered = None

    def _end_reservation(self, period: int) -> None:
        if period == self._period:
            self._reserved -= 1
        elif self._gathered is not None and period == self._period - 1:
            self._missing -= 1
            if not self._missing:
                _settle(self._gathered, None)

    def _is_full(self) -> bool:
        return len(self._queue) >= GROUP_WRITES_MAX or self._queue_bytes >= GROUP_BYTES_MAX

    def _take_group(self) -> list[Slot]:
        queue = self._queue
        if len(queue) <= GROUP_WRITES_MAX and self._queue_bytes <= GROUP_BYTES_MAX:
            group = list(queue)
            queue.clear()
            self._queue_bytes = 0
            return group
        group = []
        size = 0
        while queue and len(group) < GROUP_WRITES_MAX and (not group or size + queue[0].size <= GROUP_BYTES_MAX):
            slot = queue.popleft()
            size += slot.size
            group.append(slot)
        self._queue_bytes -= size
        return group

    async def _commit_group(self, group: list[Slot]) -> None:
        started = time.perf_counter()
        try:
            failed = await self._put(group)
            if len(failed) < len(group):
                await self._disk.run(self._engine.sync)
        except EngineBusyError:
            self._last_group_failed = True
            for slot in group:
                self._refuse(slot, StoreUnavailableError("the disk can't keep up with the writes"))
            return
        except Exception as error:  # noqa: BLE001  after any error the waiters must get a result and the engine must recover
            self._fail(group, error)
            return
        self._last_group_failed = False
        self._metrics.committed(len(group), time.perf_counter() - started)
        for slot in group:
            future = slot.future
            if not future.done():  # its caller may have been cancelled
                if failed and slot in failed:
                    future.set_exception(ConditionFailedError(failed[slot]))
                else:
                    future.set_result(None)

    async def _put(self, group: list[Slot]) -> dict[Slot, bytes]:
        """Write the group. Returns the slots whose conditions failed, each with the key of the failed condition."""
        deadline = time.monotonic() + BUSY_S_MAX
        while True:
            staged, failed, state = self._stage(group)
            try:
                if len(failed) < len(group):
                    self._engine.write(staged.items())
                    self._recent.add(staged)
                    for key in self._known.keys() & staged.keys():
                        del self._known[key]
                    self.state = state
                return failed
            except EngineBusyError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(BUSY_RETRY_S)

    def _stage(self, group: list[Slot]) -> tuple[dict[bytes, bytes | None], dict[Slot, bytes], State]:
        """Check the conditions of each write after the writes before it. Collect the puts of the writes that pass."""
        staged: dict[bytes, bytes | None] = {}
        read: dict[bytes, bytes | None] = {}
        failed: dict[Slot, bytes] = {}
        get, known = self._engine.get, self._known
        threads, messages = self.state.threads, self.state.messages
        for slot in group:
            write = slot.write
            if write is None:
                raise RuntimeError("a slot was queued without a write")
            conditions: Iterable[tuple[bytes, bytes | None]] = slot.expect
            if write.expect or write.read:
                conditions = chain(slot.expect, write.expect, self._in_doubt(write, staged))
            for key, expected in conditions:
                if key in staged:
                    found = staged[key]
                elif key in known:
                    found = known[key]
                elif key in read:
                    found = read[key]
                else:
                    found = read[key] = get(key)
                if found != expected:
                    failed[slot] = key
                    break
            else:
                staged.update(write.puts)
                threads += write.threads
                messages += write.messages
        if len(known) > KNOWN_MAX:
            known.clear()
        known.update((key, value) for key, value in read.items() if value is None or len(value) <= KNOWN_BYTES_MAX)
        state = State.of(threads, messages, self._clock.last)
        staged[keyspace.STATE] = msgspec.msgpack.encode(state)
        return staged, failed, state

    def _in_doubt(self, write: Write, staged: dict[bytes, bytes | None]) -> Sequence[tuple[bytes, bytes]]:
        """The values that a write has read and that must be compared again: none if no later group has written their
        keys. This check costs much less than reading them again."""
        if not write.read:
            return ()
        keys = [key for key, _ in write.read]
        untouched = staged.keys().isdisjoint(keys) and self._recent.untouched(keys, write.read_at)
        return () if untouched else write.read

    # --- failure --------------------------------------------------------------------------------------------------
    def _fail(self, group: list[Slot], error: Exception) -> None:
        _log.error("store_write_failed", **_reason(error), writes=len(group))
        self._metrics.failures += 1
        self._last_group_failed = True
        self._recovery = asyncio.get_running_loop().create_task(self._recover())
        for slot in group:
            self._refuse(slot, StoreUnavailableError("the store's disk did not take the write"))
        self._refuse_queue("the store's disk is not available now")

    async def _recover(self) -> None:
        delay = REOPEN_RETRY_S_MIN
        while True:
            try:
                await self._disk.run(self._engine.reopen)
                self._recent.forget()
                self._known.clear()
                self.load_state()
                break
            except Exception as error:  # noqa: BLE001  recovery goes on until it succeeds
                _log.warning("store_reopen_failed", **_reason(error), retry_s=delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, REOPEN_RETRY_S_MAX)
        self._on_reopen()
        self._recovery = None
        _log.info("store_reopened")


def _reason(error: Exception) -> dict[str, object]:
    """Fields for the log. An error of the engine or the kernel is logged with its text. Of any other error only the
    type and the place are logged, because its text could contain a key or a user's data."""
    if isinstance(error, EngineUnavailableError) and error.__cause__ is not None:
        return {"error": f"{type(error.__cause__).__name__}: {error.__cause__}"[:REASON_CHARS_MAX]}
    lines = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return {"error": type(error).__name__, "at": lines}
