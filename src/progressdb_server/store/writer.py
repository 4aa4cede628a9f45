"""Group commit: the writer commits concurrent writes as one group, with one atomic put and one fsync.

Owns: the queue, the order of commits, the counters that are stored with every group, the recovery of a failed engine,
and the thread that calls fsync. The conditions of writes are in `store.conditions`. Invariants:
- A caller gets the result of a write after the sync of its group. A write is applied as a whole or not at all. It is
  applied only if all stored values that it expects equal those that the earlier writes left.
- Writes with one ordering key (a thread's) are applied in the order of their reservations, so that a message never
  appears before one that a reader has already seen. A write that fails is skipped.
- A group waits for the writes that the key service is sealing, at most `GATHER_S_MAX`. No two groups wait for the same
  write, so that a slow one delays the others once (docs/decisions/0020-the-store.md).
- The queue is bounded in writes and in bytes. A write that does not fit is refused at once.
- After a failed write or sync, every waiter gets StoreUnavailableError (its write may be durable), and nothing is
  written until the engine is reopened.
- After damage that RocksDB has met in the background, such as in a compaction, it takes no writes, and opening it again
  leads to the same: writes are refused for good (StoreReadOnlyError), and reads go on.
- All methods run in the event loop's thread, except the engine's `sync` and `reopen`, which run in the disk thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Final

import msgspec

from minikms.platform.logs import Log
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Conditions, Failed, PendingWrite, Write
from progressdb_server.store.engine import Counters, EngineBusyError, EngineUnavailableError, OrderedMap
from progressdb_server.store.keyspace import Clock
from progressdb_server.store.model import (
    ConditionFailedError,
    NotWrittenError,
    OutcomeUnknownError,
    StoreDamagedError,
    StoreReadOnlyError,
    StoreUnavailableError,
)

GROUP_WRITES_MAX: Final = 512
GROUP_BYTES_MAX: Final = 8 * 1024 * 1024
"""One call writes a group and holds the interpreter lock: for a few milliseconds at most."""
GATHER_S_MAX: Final = 0.002
"""About two exchanges with the key service, or one sync of a slow disk."""
QUEUE_WRITES_MAX: Final = 8192
QUEUE_BYTES_MAX: Final = 64 * 1024 * 1024
BUSY_RETRY_S: Final = 0.005
BUSY_S_MAX: Final = 10.0
REOPEN_RETRY_S_MIN: Final = 0.1
REOPEN_RETRY_S_MAX: Final = 5.0
SETTLE_S_MAX: Final = 10.0
READ_ONLY: Final = "nothing is written until it is repaired (progressdb check --repair --drop-damaged)"
REASON_CHARS_MAX: Final = 300
"""Longer texts of the engine's errors are cut in the log."""

_log = Log()


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
    if not future.done():  # its caller may have been cancelled
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class _Queue:
    """Writes that wait for their group, bounded in number and in bytes."""

    def __init__(self) -> None:
        self._writes: deque[PendingWrite] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._writes)

    def fits(self, size: int) -> bool:
        return len(self._writes) < QUEUE_WRITES_MAX and self._bytes + size <= QUEUE_BYTES_MAX

    def add(self, pending: PendingWrite) -> None:
        self._writes.append(pending)
        self._bytes += pending.size

    @property
    def fills_a_group(self) -> bool:
        return len(self._writes) >= GROUP_WRITES_MAX or self._bytes >= GROUP_BYTES_MAX

    def take_all(self) -> list[PendingWrite]:
        writes = list(self._writes)
        self._writes.clear()
        self._bytes = 0
        return writes

    def take_group(self) -> list[PendingWrite]:
        """The first ones, as many as a group may have."""
        queue = self._writes
        if len(queue) <= GROUP_WRITES_MAX and self._bytes <= GROUP_BYTES_MAX:
            return self.take_all()
        group: list[PendingWrite] = []
        size = 0
        while queue and len(group) < GROUP_WRITES_MAX and (not group or size + queue[0].size <= GROUP_BYTES_MAX):
            pending = queue.popleft()
            size += pending.size
            group.append(pending)
        self._bytes -= size
        return group


class _Gathering:
    """What a group waits for. A write belongs to the period in which it was reserved; the wait that ends the period
    waits for it, and no later wait does."""

    def __init__(self) -> None:
        self.period = 0
        """The number of waits so far."""
        self.reserved = 0
        """Reservations of this period that are neither submitted nor left: their writes are being sealed."""
        self.waiting: asyncio.Future[None] | None = None
        self._missing = 0
        """Reservations of the previous period that the wait is still for."""

    def ended(self, period: int) -> None:
        """A reservation of this period was submitted or left."""
        if period == self.period:
            self.reserved -= 1
        elif self.waiting is not None and period == self.period - 1:
            self._missing -= 1
            if not self._missing:
                _settle(self.waiting, None)

    async def wait(self) -> None:
        """End the period and wait until all its writes have been submitted or left, or `waiting` is settled, at most
        `GATHER_S_MAX`."""
        loop = asyncio.get_running_loop()
        self.period += 1
        self._missing, self.reserved = self.reserved, 0
        self.waiting = loop.create_future()
        timer = loop.call_later(GATHER_S_MAX, _settle, self.waiting, None)
        try:
            await self.waiting
        finally:
            timer.cancel()
            self.waiting = None


class StoreWriter(ABC):
    """Queue, order and groups. A subclass commits a group, and recovers after a failure."""

    unconfirmed = "the store's disk did not take the write"
    """To whoever waits for a group that failed."""
    away = "the store's disk is not available now"
    busy = "the disk can't keep up with the writes"

    def __init__(self, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]) -> None:
        """`on_reopen` is called after a recovery: cached values may be out of date."""
        self._clock = clock
        self._metrics = metrics
        self._on_reopen = on_reopen
        self._ordered: dict[bytes, deque[PendingWrite]] = {}
        self._queue = _Queue()
        self._gathering = _Gathering()
        self._drain: asyncio.Task[None] | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._closed = False
        self._read_only = ""
        self._last_group_failed = False
        self.state = Counters()
        """What this process has counted, beside what was stored when it began."""

    # --- of an engine ---------------------------------------------------------------------------------------------
    @abstractmethod
    async def _commit(self, group: list[PendingWrite]) -> Mapping[PendingWrite, Exception]:
        """The group is durable when it returns, without the writes that it names. What it removes from the group it has
        given to another writer. Raises EngineBusyError if nothing was
        written. After any other error `_reopen` is called until it succeeds; the group may be durable unless the error
        is NotWrittenError."""

    @abstractmethod
    async def _reopen(self) -> None:
        """What is readable afterwards is durable."""

    @property
    @abstractmethod
    def group(self) -> int:
        """The number of the latest group: see `Write.read_at`."""

    # --- what callers use -----------------------------------------------------------------------------------------
    @property
    def available(self) -> bool:
        return self._recovery is None and not self._closed and not self._read_only

    @property
    def queued(self) -> int:
        return len(self._queue)

    def reserve(self, order_key: bytes) -> PendingWrite:
        """Take the next position in the order of the key. Later writes of this key wait until the caller passes the
        reservation to `submit` or `leave`."""
        pending = PendingWrite(order_key, asyncio.get_running_loop().create_future(), self._gathering.period)
        self._gathering.reserved += 1
        waiting = self._ordered.get(order_key)
        if waiting is None:
            self._ordered[order_key] = deque((pending,))
        else:
            waiting.append(pending)
        return pending

    def submit(
        self, pending: PendingWrite, write: Write, expect: Sequence[tuple[bytes, bytes | None]] = ()
    ) -> asyncio.Future[None]:
        """`expect` are conditions in addition to the write's own. The future's result: None once durable,
        ConditionFailedError or StoreUnavailableError."""
        pending.write = write
        pending.expect = expect
        size = 0
        for key, value in write.puts:
            size += len(key) + (len(value) if value else 0)
        pending.size = size
        order_key = pending.order_key
        if order_key is not None:
            self._gathering.ended(pending.period)
        if order_key is not None and len(self._ordered[order_key]) == 1:  # the usual case
            del self._ordered[order_key]
            self._enqueue(pending)
        else:
            self._advance(pending)
        return pending.future

    def leave(self, pending: PendingWrite) -> None:
        """Give up a position. Does nothing if it was submitted."""
        if pending.write is None and pending.order_key is not None:
            self._gathering.ended(pending.period)
            waiting = self._ordered[pending.order_key]
            waiting.remove(pending)
            if waiting:
                self._advance(waiting[0])
            else:
                del self._ordered[pending.order_key]
            pending.order_key = None

    def commit(self, write: Write) -> asyncio.Future[None]:
        """Queue a write that is not ordered."""
        return self.submit(PendingWrite(None, asyncio.get_running_loop().create_future()), write)

    def take_over(self, pending: PendingWrite) -> None:
        """Queue a write that another writer had queued."""
        self._enqueue(pending)

    async def barrier(self) -> None:
        """Returns after everything that is readable now is durable."""
        await self.commit(Write(()))

    async def check_writable(self) -> None:
        """Checks that a write would not be refused now. Raises StoreUnavailableError. A caller that first creates
        something outside the store calls this before it. If the last group failed, this makes an empty write to test
        the disk.
        """
        reason = self._refusal(0)
        if reason is not None:
            raise self._refused(reason)
        if self._last_group_failed:
            await self.barrier()

    async def settled(self) -> None:
        """Returns after the recovery that runs, at most SETTLE_S_MAX later."""
        if self._recovery is not None:
            await asyncio.wait({self._recovery}, timeout=SETTLE_S_MAX)

    async def close(self) -> None:
        """Commits the queued writes and refuses later ones."""
        self._closed = True
        if self._recovery is not None:
            self._recovery.cancel()
        while self._drain is not None:
            await asyncio.wait((self._drain,))
        self._refuse_queue("the server is shutting down")

    # --- order and queue ------------------------------------------------------------------------------------------
    def _advance(self, pending: PendingWrite) -> None:
        if pending.order_key is None:
            self._enqueue(pending)
            return
        waiting = self._ordered[pending.order_key]
        while waiting and waiting[0].write is not None:
            self._enqueue(waiting.popleft())
        if not waiting:
            del self._ordered[pending.order_key]

    def _enqueue(self, pending: PendingWrite) -> None:
        reason = self._refusal(pending.size)
        if reason is not None:
            _settle(pending.future, self._refused(reason))
            return
        self._queue.add(pending)
        if self._gathering.waiting is not None and self._queue.fills_a_group:
            _settle(self._gathering.waiting, None)
        if self._drain is None:
            # It starts in the loop's next iteration, so that the writes of this one form a group.
            self._drain = asyncio.get_running_loop().create_task(self._run())

    def _refusal(self, size: int) -> str | None:
        """The reason for which a write of `size` bytes is refused now; None if it is accepted."""
        if self._read_only:
            return self._read_only
        if self._recovery is not None or self._closed:
            return self.away
        return None if self._queue.fits(size) else "too many writes are waiting"

    def _refused(self, reason: str) -> NotWrittenError:
        return StoreReadOnlyError(reason) if self._read_only else NotWrittenError(reason)

    def _refuse_queue(self, reason: str) -> None:
        for pending in self._queue.take_all():
            _settle(pending.future, self._refused(reason))

    # --- groups ---------------------------------------------------------------------------------------------------
    async def _run(self) -> None:
        try:
            while self._queue:
                if self._gathering.reserved and not self._queue.fills_a_group:
                    await self._gathering.wait()
                await self._commit_group(self._queue.take_group())
        finally:
            self._drain = None

    async def _commit_group(self, group: list[PendingWrite]) -> None:
        started = time.perf_counter()
        try:
            failed = await self._commit(group)
        except EngineBusyError:
            self._last_group_failed = True
            for pending in group:
                _settle(pending.future, StoreUnavailableError(self.busy))
            return
        except Exception as error:  # noqa: BLE001  after any error the waiters must get a result and the engine must recover
            self._fail(group, error)
            return
        self._last_group_failed = False
        self._metrics.committed(len(group), time.perf_counter() - started)
        for pending in group:
            _settle(pending.future, failed.get(pending))

    # --- failure --------------------------------------------------------------------------------------------------
    def _fail(self, group: list[PendingWrite], error: Exception) -> None:
        _log.error("store_write_failed", **_reason(error), writes=len(group))
        self._metrics.failures += 1
        self._last_group_failed = True
        if isinstance(error, StoreReadOnlyError):
            self._read_only = str(error)
        elif isinstance(error, StoreDamagedError):
            self._read_only = f"{error}: {READ_ONLY}"
        else:
            self._recovery = asyncio.get_running_loop().create_task(self._recover())
        for pending in group:
            known = isinstance(error, NotWrittenError)
            refusal = self._refused(str(error)) if known else OutcomeUnknownError(self.unconfirmed)
            _settle(pending.future, refusal)
        self._refuse_queue(self._read_only or self.away)

    async def _recover(self) -> None:
        delay = REOPEN_RETRY_S_MIN
        while True:
            try:
                await self._reopen()
                break
            except Exception as error:  # noqa: BLE001  recovery goes on until it succeeds
                _log.warning("store_reopen_failed", **_reason(error), retry_s=delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, REOPEN_RETRY_S_MAX)
        self._on_reopen()
        self._recovery = None
        _log.info("store_reopened")


class Writer(StoreWriter):
    """Commits to an engine of this process."""

    def __init__(self, engine: OrderedMap, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]) -> None:
        super().__init__(clock, metrics, on_reopen)
        self._engine = engine
        self._disk = DiskThread()
        self._conditions = Conditions(engine)
        self.load_state()

    def load_state(self) -> None:
        self.state = Counters.parse(self._engine.get(keyspace.STATE))
        self._clock.recover(self.state.last)

    @property
    def group(self) -> int:
        return self._conditions.recent.group

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(self._disk.close)

    async def _commit(
        self, group: list[PendingWrite]
    ) -> Mapping[PendingWrite, StoreDamagedError | ConditionFailedError]:
        failed = await self._put(group)
        if len(failed) < len(group):
            await self._disk.run(self._engine.sync)
        return failed

    async def _put(self, group: list[PendingWrite]) -> Failed:
        deadline = time.monotonic() + BUSY_S_MAX
        while True:
            staged, failed, threads, messages = self._conditions.stage(group)
            state = Counters.of(self.state.threads + threads, self.state.messages + messages, self._clock.last)
            staged[keyspace.STATE] = msgspec.msgpack.encode(state)
            try:
                if len(failed) < len(group):
                    self._engine.write(staged.items())
                    self._conditions.written(staged)
                    self.state = state
                return failed
            except StoreDamagedError as error:  # RocksDB looks for one of the background before it writes
                raise StoreReadOnlyError(f"{error}: {READ_ONLY}") from error.__cause__
            except EngineBusyError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(BUSY_RETRY_S)

    async def _reopen(self) -> None:
        await self._disk.run(self._engine.reopen)
        self._conditions.forget()
        self.load_state()


def _reason(error: Exception) -> dict[str, object]:
    """Fields for the log. An error of the engine or the kernel is logged with its text. Of any other error only the
    type and the place are logged, because its text could contain a key or a user's data."""
    if (
        isinstance(error, (EngineUnavailableError, StoreDamagedError, StoreReadOnlyError))
        and error.__cause__ is not None
    ):
        return {"error": f"{type(error.__cause__).__name__}: {error.__cause__}"[:REASON_CHARS_MAX]}
    lines = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return {"error": type(error).__name__, "at": lines}
