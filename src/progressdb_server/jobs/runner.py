"""Runs jobs of every kind: starts, watches, pauses, resumes and cancels them, and begins what is due.

Owns: what a kind of job is (`Kind`), the running jobs, the queue of waiting jobs, which job has which thread, and the
pace of a job. Invariants: never two jobs, or a job and other work on its keys, on one thread; at most RUNNING_MAX jobs
work at once, at most UNFINISHED_MAX are unfinished; a start of the server continues unfinished jobs, first those that
were switching a key. The stored rows are the truth: a pause or a cancel is written to the row, and the job's worker
reads it there. What the store and the key service can't do now is tried again; what they refuse ends the job as
`failed`. Over any longer time a job works at no more than its rate; of an idle time, or of a chunk that took long, no
more than BEHIND_S_MAX is made up for.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from minikms.api.errors import KmsError, KmsRefusedError, LimitExceededError, SealedError
from minikms.platform.logs import Log
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs.states import (
    AT_WORK,
    Job,
    JobConflictError,
    JobError,
    JobFailedError,
    JobNotFoundError,
    Move,
    ThreadBusyError,
    TooManyJobsError,
    changed,
    move,
)
from progressdb_server.jobs.table import LATE_ROWS_NS, JobTable
from progressdb_server.kms.provider import Fault, Provider, fault
from progressdb_server.store.model import (
    ConditionFailedError,
    RecordUnreadableError,
    StaleRowError,
    StoreDamagedError,
    StoreError,
    StoreUnavailableError,
)

RUNNING_MAX: Final = 2
UNFINISHED_MAX: Final = 65_536
WAITING_MAX: Final = 64
PLACE_S: Final = 0.02
"""How many jobs wait for their turn while a walk over all threads adds more, and between two looks."""
WATCH_S: Final = 0.25
"""The shortest time between two values that `Runner.watch` yields."""
READ_RETRY_S: Final = 0.5
RETRY_S_MIN: Final = 0.1
RETRY_S_MAX: Final = 5.0
BEHIND_S_MAX: Final = 0.1
"""Beside requests every chunk begins a little late: without making up for that, a rate is never reached."""
ADOPT_S: Final = 10.0
ADOPT_LOOKS: Final = 360
"""Looks for jobs of other servers, of which the first one reads all rows: one in an hour."""
SHARED_READ_S: Final = 1.0
"""Beside other servers, the longest time in which `Runner.watch` does not read the row."""
OTHER_WORK: Final = "other work"
"""The text in place of a job's id while a thread's backups are restored or removed, or its old keys destroyed."""

_log = Log()


class Throttle:
    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_second` 0: without a bound."""
        self._per_second = per_second
        self._clock = clock
        self._free_at = 0.0

    @property
    def bounded(self) -> bool:
        return self._per_second > 0

    async def take(self, cost: float) -> None:
        """Wait until work of this cost may begin; other tasks always get a turn."""
        if not self.bounded:
            await asyncio.sleep(0)
            return
        now = self._clock()
        begins_at = max(now - BEHIND_S_MAX, self._free_at)
        self._free_at = begins_at + cost / self._per_second
        await asyncio.sleep(max(0.0, begins_at - now))


class Kind:
    """One kind of job. A kind overrides what it has; the table of kinds is in `jobs.service`."""

    name: ClassVar[str] = ""
    """The name in the rows of its jobs (`Job.kind`); empty for a kind without rows of its own."""
    beside: ClassVar[bool] = False
    """Whether its jobs only begin other jobs and wait for them: they count as no work."""
    first_s = 60.0
    every_s = 60.0
    """From a start until `begin` is called, and between two calls; `math.inf`: never again."""

    async def begin(self) -> None:
        """Begin what is due by now. An error is logged, and the next call is made nevertheless."""

    async def prepare(self, job_id: str) -> None:
        """For a row with `keying`: what comes before the job waits for its turn. Errors as in `step`."""

    async def step(self, job_id: str, pace: Throttle) -> None:
        """Work on a job, from where its row says, until it has ended or is paused. Called again after an error of the
        store or of the key service that can pass. Raises JobFailedError when the job can't go on."""

    async def resume(self, job: Job) -> Job:
        """The row with which a paused or failed job goes on. Raises JobConflictError."""
        return move(job, "resume")


@dataclass(eq=False)
class WorkingKind(Kind):
    """A kind of job that works on threads, with what it needs for that."""

    runner: Runner
    store: Conversations
    provider: Provider

    @property
    def table(self) -> JobTable:
        """The rows of all jobs."""
        return self.runner.table


@dataclass(eq=False)
class JobWorkers:
    """Works on the jobs whose turn it is. `threads`: of whoever begins a job; the end of its work frees its thread."""

    store: Conversations
    table: JobTable
    threads: dict[str, str]
    kind_of: Callable[[Job], Kind]
    pace: Throttle
    stop: asyncio.Event
    queue: deque[str] = field(default_factory=deque)
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    others: set[asyncio.Task[Any]] = field(default_factory=set)

    async def close(self) -> None:
        self.queue.clear()
        tasks = [*self.running.values(), *self.others]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Work beside the jobs, until `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self.others.add(task)
        task.add_done_callback(self.others.discard)

    async def begin(self, job: Job) -> None:
        """Queue a job that has its thread. A job that switches a key is prepared first."""
        if job.keying:
            self.spawn(self.prepare_then_queue(job.id))
        else:
            await self.enqueue(job.id)

    async def prepare_then_queue(self, job_id: str) -> None:
        try:
            kind = self.kind_of(await self.table.get(job_id))
            await self._persist(job_id, lambda: kind.prepare(job_id))
            await self.settle(job_id)
        except StoreUnavailableError:
            self.later(job_id)
        else:
            await self.enqueue(job_id)

    async def enqueue(self, job_id: str) -> None:
        self.queue.append(job_id)
        await self.pump()

    @property
    def at_work(self) -> list[Job]:
        """What counts for RUNNING_MAX."""
        return [job for job in self.table.followed.values() if not self.kind_of(job).beside]

    async def pump(self) -> None:
        """Start queued jobs, up to RUNNING_MAX."""
        while self.queue and len(self.at_work) < RUNNING_MAX and not self.stop.is_set():
            job_id = self.queue.popleft()
            try:
                job = await self.table.get(job_id)
            except StoreUnavailableError:
                self.queue.appendleft(job_id)
                self.later(job_id)
                return
            except RecordUnreadableError:  # it delays no other job
                continue
            except BaseException:
                self.queue.appendleft(job_id)
                raise
            if job.state not in AT_WORK or job_id in self.running or self.threads.get(job.thread) != job_id:
                continue
            if len(self.at_work) == RUNNING_MAX:  # another task has started one meanwhile
                self.queue.appendleft(job_id)
                return
            self.table.followed[job_id] = job
            self.running[job_id] = asyncio.get_running_loop().create_task(self._work(job))

    async def _work(self, job: Job) -> None:
        kind, pace = self.kind_of(job), self.pace if job.rate is None else Throttle(job.rate)
        try:
            await self._persist(job.id, lambda: kind.step(job.id, pace))
        finally:
            # In the same turn as the job's last change, so that its thread is free for whoever waited for it.
            del self.running[job.id], self.table.followed[job.id]
            if not self.stop.is_set():
                await self._after_work(job.id)

    async def _persist(self, job_id: str, work: Callable[[], Awaitable[None]]) -> None:
        delay_s, at = RETRY_S_MIN, 0
        while True:
            try:
                job = await self.table.get(job_id)
                if job.state not in AT_WORK or not await self.store.claims.holds(job.thread):
                    return
                if job.updated_ns != at:
                    delay_s, at = RETRY_S_MIN, job.updated_ns
                try:
                    await work()
                    return
                except JobFailedError as error:
                    await self._fail(job_id, str(error))
                except StoreDamagedError as error:  # trying again would find the same
                    await self._fail(job_id, str(error))
                except (StaleRowError, StoreUnavailableError, ConditionFailedError):
                    raise
                except KmsError as error:
                    if not isinstance(error, KmsRefusedError) or fault(error) is Fault.SERVICE:
                        raise
                    await self._fail(job_id, f"the key service refused ({error.code})")
                except Exception as error:  # noqa: BLE001  a defect ends this job, with a reason, and no other one
                    _log.error("job_broken", job=job_id, error=type(error).__qualname__, at=_lines(error))
                    await self._fail(job_id, f"internal error ({type(error).__qualname__})")
            except StaleRowError:  # an operator changed it, or the disk took more than it reported: read the row again
                await asyncio.sleep(0)
            except RecordUnreadableError:  # of the job's row
                return
            except (KmsError, StoreUnavailableError, ConditionFailedError) as error:
                if isinstance(error, SealedError):
                    self.store.sealer.halt_sealed()
                wait_s = max(delay_s, error.retry_after_s) if isinstance(error, LimitExceededError) else delay_s
                _log.warning("job_waits", job=job_id, reason=str(error), retry_s=wait_s)
                await asyncio.sleep(wait_s)
                delay_s = min(delay_s * 2, RETRY_S_MAX)

    async def _fail(self, job_id: str, reason: str) -> None:
        """The job has failed, unless somebody has paused or cancelled it meanwhile. Raises StaleRowError,
        StoreUnavailableError; then the work fails again."""
        row = await self.table.row(job_id)
        if row.job.state in AT_WORK:
            await self.table.store(row, move(row.job, "fail", reason=reason, keying=False))
            _log.error("job_failed", job=job_id, reason=reason)

    async def _after_work(self, job_id: str) -> None:
        try:
            with contextlib.suppress(RecordUnreadableError):
                await self.settle(job_id)
                job = await self.table.get(job_id)
                if job.state == "queued" and self.threads.get(job.thread) == job_id:
                    self.queue.append(job_id)  # resumed while its worker stopped
            await self.pump()
        except StoreUnavailableError:  # unreadable for the moment
            self.later(job_id)

    def later(self, job_id: str) -> None:
        """Look again soon whether the job has to be queued."""

        async def look() -> None:
            await asyncio.sleep(READ_RETRY_S)
            await self._after_work(job_id)

        self.spawn(look())

    async def wait_for_end(self, job_id: str) -> None:
        """A job's end can be read before it is durable. Wait until it is durable and the job's thread is free."""
        worker = self.running.get(job_id)
        if worker is not None and (await self.table.get(job_id)).state not in AT_WORK:
            await asyncio.wait({worker})

    async def settle(self, job_id: str) -> None:
        """Free the thread once its job is finished and no worker works on it."""
        job = await self.table.get(job_id)
        if job_id in self.running or self.threads.get(job.thread) != job_id:
            return
        # Beside other servers, each of them may resume a job that is paused.
        ended = job.state not in AT_WORK or not await self.store.claims.holds(job.thread)
        if ended if self.store.claims.contested else not job.unfinished:
            del self.threads[job.thread]
            await self.store.claims.release(job.thread, job_id if job.unfinished else "")

    async def stop_work(self, job_id: str) -> None:
        """The job is no longer at work, or no longer this server's."""
        worker = self.running.get(job_id)
        if worker is not None:  # it may sleep; writes that it has queued fail, since the row has changed
            worker.cancel()
            await asyncio.wait({worker})
            self.running.pop(job_id, None)
            self.table.followed.pop(job_id, None)  # a worker that never began has not removed itself
            await self.pump()
        await self.settle(job_id)


class Runner:
    """Made in the event loop that uses it. `stop` is set when the server stops, which ends all waiting and watching."""

    kinds: Sequence[Kind]

    def __init__(self, store: Conversations, rate: float, stop: asyncio.Event, now_ns: Callable[[], int]) -> None:
        """`rate`: records a second of all jobs without a rate of their own; 0: without a bound."""
        self._store = store
        self._stop = stop
        self.table = JobTable(store, now_ns)
        self._beginning = asyncio.Lock()
        self.overdue: dict[str, str] = {}
        """Kind of work → why what was due could not be begun the last time; empty while the store or the key service
        was away, which other conditions say."""
        self._threads: dict[str, str] = {}
        """Thread → id of the job that has it, or OTHER_WORK."""
        self._workers = JobWorkers(store, self.table, self._threads, self._kind, Throttle(rate), stop)
        store.metrics.gauges["progressdb_jobs_running"] = ("Jobs at work.", lambda: len(self._workers.running))
        store.metrics.gauges["progressdb_jobs_unfinished"] = ("Jobs not finished yet.", lambda: len(self._threads))
        store.metrics.gauges["progressdb_jobs_records_left"] = (
            "Records that the jobs at work have still to re-encrypt.",
            lambda: sum(max(0, job.total - job.done - job.failed) for job in self._workers.at_work),
        )

    async def start(self) -> None:
        """Continue unfinished jobs, and start to look for work that is due."""
        keying: list[str] = []
        known = {kind.name for kind in self.kinds}
        async for page in self.table.pages():
            for job in page:
                if job.unfinished and job.thread in self._threads:
                    # The disk reported an error for the write of this row and stored it nevertheless; then another job
                    # was begun.
                    twin = changed(job, keying=False, reason="begun twice")
                    await self.table.store(await self.table.row(job.id), move(twin, "cancel"))
                elif job.unfinished and not self._store.claims.contested:  # else see `_adopt`
                    self._threads[job.thread] = job.id
                    if job.state in AT_WORK and job.kind in known:
                        (keying if job.keying else self._workers.queue).append(job.id)
            await asyncio.sleep(0)
        for job_id in keying:  # the map of such a thread may name a retired key
            self._workers.spawn(self._workers.prepare_then_queue(job_id))
        await self._workers.pump()
        for kind in self.kinds:
            self._workers.spawn(self._keep(kind))
        if self._store.claims.contested:
            self._workers.spawn(self._adopt())

    async def close(self) -> None:
        """Interrupts the work; the next start continues it."""
        self._stop.set()
        await self._workers.close()
        await self._store.claims.stop()

    def has_job(self, thread: str) -> bool:
        """Whether a job on the thread is unfinished, or its keys are being destroyed."""
        return thread in self._threads

    def _kind(self, job: Job) -> Kind:
        """The kind of the job. Raises JobConflictError for a job of another version of the server."""
        if (kind := next((one for one in self.kinds if one.name == job.kind), None)) is None:
            raise JobConflictError(f"this version of the server has no jobs of kind {job.kind}")
        return kind

    # --- beside other servers ---------------------------------------------------------------------------------------
    async def _adopt(self) -> None:
        """Work on unfinished jobs that no server works on, again and again. Between two looks at all rows, only those
        that are new or had not ended are read."""
        known = {kind.name for kind in self.kinds}
        since_ns = looks = 0
        first = True
        while True:
            try:
                began_ns = self.table.now_ns()
                async for _ in self.table.pages(since_ns=since_ns):
                    pass
                looks = (looks + 1) % ADOPT_LOOKS
                since_ns = began_ns - LATE_ROWS_NS if looks else 0
                async for page in self.table.standing():
                    for job in page:
                        if job.unfinished and job.kind in known and job.thread not in self._threads:
                            await self._adopt_one(job, paused=first)
                first = False
            except StoreUnavailableError:
                pass
            except Exception as error:  # noqa: BLE001  as in `_keep`
                _log.error("jobs_tick_broken", error=type(error).__qualname__, at=_lines(error))
            await asyncio.sleep(ADOPT_S)

    async def _adopt_one(self, job: Job, *, paused: bool) -> None:
        """Take the job if it is at work; with `paused` also if it is paused and has no claim, as after `store copy`.
        Raises StoreUnavailableError."""
        try:
            if job.state in AT_WORK or (paused and not await self._store.claims.job_of(job.thread)):
                await self._take(job)
        except JobNotFoundError:  # removed since the page was read
            pass
        except StoreUnavailableError:
            raise
        except Exception as error:  # noqa: BLE001  a damaged claim, for example, delays no other job
            _log.error("job_not_adopted", job=job.id, error=type(error).__qualname__, at=_lines(error))

    async def _take(self, job: Job) -> None:
        """Queue the job if it is at work, unless another server works on its thread."""
        claims = self._store.claims
        async with self._beginning:
            if job.thread in self._threads or not await claims.claim(job.thread, job.id, job.id):
                return
            try:
                job = await self.table.get(job.id)
            except Exception:  # whatever it is, nobody works on the thread
                await claims.release(job.thread, job.id)
                raise
            if job.state not in AT_WORK:
                await claims.release(job.thread, job.id if job.unfinished else "")
                return
            self._threads[job.thread] = job.id
        await self._workers.begin(job)

    async def _other(self, thread: str) -> tuple[Job | None, str]:
        """An unfinished job on the thread, which another server may have begun; and the job that its claim names."""
        last = await self._store.claims.job_of(thread)
        job = None
        with contextlib.suppress(JobNotFoundError):  # of an entry that names a job whose row was never written
            job = await self.table.get(last) if last else None
        return (job if job is not None and job.unfinished else None), last

    # --- beginning ------------------------------------------------------------------------------------------------
    async def add(self, kind: Kind, thread: str, **fields: Any) -> Job:
        """Add a job, with these fields in its row, unless the thread has one of this kind; returns that one then.
        Raises TooManyJobsError, JobConflictError, StoreUnavailableError."""
        async with self._beginning:  # whoever joins a job finds its row
            await self._workers.wait_for_end(self._threads.get(thread, ""))
            other = self._threads.get(thread)
            if other == OTHER_WORK:
                raise JobConflictError("another operation is running on this thread: try again in a moment")
            if other is None and len(self._threads) >= UNFINISHED_MAX:
                raise TooManyJobsError
            unfinished, last = await self._other(thread) if other is None else (await self.table.get(other), other)
            if unfinished is not None:
                if unfinished.kind != kind.name:
                    raise JobConflictError("another job works on this thread")
                return unfinished
            now_ns = self.table.now_ns()
            job = Job(self._store.rekeying.new_job_id(now_ns), thread, now_ns, now_ns, kind=kind.name, **fields)
            if not await self._store.claims.claim(thread, job.id, last):
                raise ThreadBusyError
            self._threads[thread] = job.id
            try:
                await self.table.add(job)
            except BaseException:
                del self._threads[thread]
                await self._store.claims.release(thread, job.id)  # the row may be there
                raise
        _log.info("job_begun", job=job.id, thread=thread, trigger=job.trigger)
        await self._workers.begin(job)
        return job

    async def place(self) -> None:
        """Wait until few jobs wait for their turn."""
        while len(self._workers.queue) >= WAITING_MAX:  # noqa: ASYNC110  a look in PLACE_S costs less than being woken
            await asyncio.sleep(PLACE_S)

    # --- changing -------------------------------------------------------------------------------------------------
    async def pause(self, job_id: str) -> Job:
        return await self._order(job_id, "pause")

    async def cancel(self, job_id: str) -> Job:
        """Re-encrypted records stay under the new key, and the old key stays retired. All records stay readable."""
        return await self._order(job_id, "cancel")

    async def _order(self, job_id: str, event: Move) -> Job:
        def how(job: Job) -> Job:
            moved = move(job, event)
            if job.keying:
                raise JobConflictError("the job is switching the thread's key: try again in a moment")
            return moved

        try:
            job = await self.table.change(job_id, how)
        except ThreadBusyError:
            await self._workers.stop_work(job_id)
            raise
        _log.info("job_ordered", job=job_id, order=event)
        await self._workers.stop_work(job_id)
        return job

    async def resume(self, job_id: str) -> Job:
        """A failed job tries the failed records again. Raises JobConflictError also when another job has the thread, or
        the kind of job can't go on."""
        job = await self.table.get(job_id)
        move(job, "resume")
        if self._threads.get(job.thread, job_id) != job_id:
            raise JobConflictError("another job works on this thread")
        kind = self._kind(job)
        await kind.resume(job)
        other, last = await self._other(job.thread)
        if other is not None and other.id != job_id:
            raise JobConflictError("another job works on this thread")
        if not await self._store.claims.claim(job.thread, job_id, last):
            raise ThreadBusyError
        self._threads[job.thread] = job_id
        try:
            job = await self.table.change(job_id, kind.resume)
        except StoreUnavailableError:  # the write may have succeeded; then the job has to be queued
            self._workers.later(job_id)
            raise
        except JobError:
            await self._workers.settle(job_id)
            raise
        await self._workers.enqueue(job_id)
        return job

    # --- watching -------------------------------------------------------------------------------------------------
    async def watch(self, job_id: str, *, pause_s: float = WATCH_S) -> AsyncIterator[Job]:
        """Yields the job now and after each change, until no worker works on it or the server stops. Between two values
        it waits at least `pause_s`."""
        longest_s = SHARED_READ_S if self._store.claims.contested else None  # another server may work on it
        seen = self.table.changes
        await self._workers.wait_for_end(job_id)
        last = await self.table.get(job_id)
        yield last
        stopping = asyncio.create_task(self._stop.wait())
        try:
            while last.state in AT_WORK and not self._stop.is_set():
                change = asyncio.create_task(self.table.wait_for_change(seen))
                await asyncio.wait({change, stopping}, timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                seen = self.table.changes
                await self._workers.wait_for_end(job_id)
                job = await self.table.get(job_id)
                if job != last:
                    last = job
                    yield last
                if last.state in AT_WORK and pause_s:  # changes of other jobs wake a watcher too
                    await asyncio.wait({stopping}, timeout=pause_s)
        finally:
            stopping.cancel()

    async def wait(self, job_id: str) -> Job:
        """Wait until no worker works on the job. Raises StoreUnavailableError if the server stops first."""
        async for job in self.watch(job_id, pause_s=0):
            if job.state not in AT_WORK:
                return job
        raise StoreUnavailableError("the server is shutting down; the job continues after the next start")

    # --- other work -----------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def alone(self, job: Job) -> AsyncIterator[None]:
        """Let no other job use the job's thread meanwhile. Raises JobConflictError if one does."""
        await self._workers.wait_for_end(self._threads.get(job.thread, ""))
        if job.thread in self._threads:
            raise JobConflictError("a job on this thread is unfinished")
        self._threads[job.thread] = OTHER_WORK
        try:
            unfinished, last = await self._other(job.thread)
            if unfinished is not None:
                raise JobConflictError("a job on this thread is unfinished")
            if not await self._store.claims.claim(job.thread, "", last):
                raise ThreadBusyError
            yield
        except StaleRowError:
            raise ThreadBusyError from None
        finally:
            del self._threads[job.thread]
            await self._store.claims.release(job.thread)

    async def _keep(self, kind: Kind) -> None:
        """Begin what is due of a kind, again and again."""
        pause_s = kind.first_s
        while pause_s < math.inf:
            await asyncio.sleep(pause_s)
            name = type(kind).__name__
            try:
                await kind.begin()
                self.overdue.pop(name, None)
            except (StoreError, KmsError, JobError) as error:
                away = isinstance(error, KmsError) and fault(error) is Fault.SERVICE
                self.overdue[name] = "" if away or isinstance(error, StoreUnavailableError) else str(error)
                _log.warning("jobs_tick_failed", kind=name, reason=str(error))
            except Exception as error:  # noqa: BLE001  a defect must not stop the rotation of worn keys; logged without its text
                self.overdue[name] = "internal error"
                _log.error("jobs_tick_broken", error=type(error).__qualname__, at=_lines(error))
            pause_s = min(kind.first_s, kind.every_s) if name in self.overdue else kind.every_s


def _lines(error: Exception) -> list[str]:
    return [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
