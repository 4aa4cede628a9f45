"""Starts, watches, pauses, resumes and cancels jobs, and starts those that are due automatically.

Owns: the running jobs, the queue of waiting jobs, which job has which thread, and the rule for keys that are due
(`Due`). Invariants: never two jobs, or a job and a restore, on one thread; at most RUNNING_MAX jobs work at once, at
most UNFINISHED_MAX are unfinished; a start of the server continues unfinished jobs, first those that were
switching a key. Only a thread's current key of purpose `thread` is ever due. The stored rows are the truth: a pause or
a cancel is written to the row, and the job's worker reads it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from minikms.api import KeyAnswer
from minikms.api.errors import KmsError
from minikms.logs import structlog
from progressdb_server.config import Rotation
from progressdb_server.jobs.destruction import KeyDestruction
from progressdb_server.jobs.rotation import KeyRotation, Pace
from progressdb_server.jobs.states import (
    AT_WORK,
    Job,
    JobConflictError,
    JobError,
    Move,
    TooManyJobsError,
    changed,
    move,
)
from progressdb_server.jobs.table import JobTable
from progressdb_server.kms.provider import Provider, is_permanent, key_pages
from progressdb_server.store.model import Restored, Store, StoreError, StoreUnavailableError, ThreadNotFoundError

COUNTED_RECORDS: Final = 1024
"""Records of a thread that are counted before other tasks get a turn."""
PAGE_PAUSE_S: Final = 0.02
"""Between two pages of keys, each of which the key service reads from files."""
RUNNING_MAX: Final = 2
UNFINISHED_MAX: Final = 65_536
KEY_WAIT_S: Final = 5.0
"""How long an answer waits for the new key. The job continues after that."""
TICK_S: Final = 60.0
SELECTION_S: Final = 3600.0
ROW_AGE_S: Final = 90 * 86_400
"""Age at which the row of a finished job is removed, if it has left no backups and no key to destroy."""
WATCH_S: Final = 0.25
"""The shortest time between two values that `Jobs.watch` yields."""
READ_RETRY_S: Final = 0.5
RESTORING: Final = "restoring"
"""In the place of a job's id while a thread's backups are restored or removed, or its old keys destroyed."""

_log = structlog.get_logger("progressdb.jobs")


class Due(msgspec.Struct, frozen=True):
    """A key is due when it is at least `age_s` old, when so many records were written under it (`uses`; those that a
    rotation has moved to it don't count), or when it is under this KEK version; None: never for that reason.
    """

    age_s: int | None = None
    uses: int | None = None
    kek_version: int | None = None

    def why(self, key: KeyAnswer, now_ns: int) -> str:
        """The reason in a word, empty when the key is not due; `uses` aside."""
        if self.age_s is not None and now_ns - _nanoseconds(key.created_at) >= self.age_s * 1_000_000_000:
            return "age"
        return "kek_version" if self.kek_version is not None and key.kek_version == self.kek_version else ""


class Jobs:
    """Made in the event loop that uses it. `stop` is set when the server stops, which ends all waiting and watching."""

    def __init__(
        self,
        store: Store,
        provider: Provider,
        settings: Rotation,
        *,
        exclusive: bool,
        destroys: bool = True,
        stop: asyncio.Event | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`exclusive`: only this server makes keys of purpose `thread` in the key service. `destroys`: it takes
        requests to destroy keys.
        """
        self._store = store
        self._provider = provider
        self._settings = settings
        self._destroys = destroys
        self._stop = stop or asyncio.Event()
        self.table = JobTable(store, now_ns)
        self._rotation = KeyRotation(store, provider, self.table, exclusive=exclusive)
        self._destruction = KeyDestruction(store, provider, self.table)
        self._pace = Pace(settings.records_per_second)
        self._beginning = asyncio.Lock()
        self._queue: deque[str] = deque()
        self._threads: dict[str, str] = {}
        """Thread → id of the job that has it, or RESTORING."""
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._others: set[asyncio.Task[Any]] = set()
        store.metrics.gauges["progressdb_jobs_running"] = ("Jobs at work.", lambda: len(self._workers))
        store.metrics.gauges["progressdb_jobs_unfinished"] = ("Jobs not finished yet.", lambda: len(self._threads))
        store.metrics.gauges["progressdb_jobs_records_left"] = (
            "Records that the jobs at work have still to re-encrypt.",
            lambda: sum(max(0, job.total - job.done - job.failed) for job in map(self.table.get, self._workers)),
        )

    async def start(self) -> None:
        """Continue unfinished jobs, and start to look for keys that are due."""
        keying: list[str] = []
        for page in self.table.pages():
            for job in page:
                if job.unfinished and job.thread in self._threads:
                    # The disk reported an error for the write of this row and stored it nevertheless; then another job
                    # was begun.
                    twin = changed(job, keying=False, reason="begun twice")
                    await self.table.store(self.table.row(job.id), move(twin, "cancel"))
                elif job.unfinished:
                    self._threads[job.thread] = job.id
                    if job.state in AT_WORK:
                        (keying if job.keying else self._queue).append(job.id)
            await asyncio.sleep(0)
        for job_id in keying:  # the map of such a thread may name a retired key
            self._spawn(self._key_then_queue(job_id))
        self._pump()
        self._spawn(self._tick())

    async def close(self) -> None:
        """Interrupts the work; the next start continues it."""
        self._stop.set()
        self._queue.clear()
        tasks = [*self._workers.values(), *self._others]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def has_job(self, thread: str) -> bool:
        """Whether a job on the thread is unfinished, or its keys are being destroyed."""
        return thread in self._threads

    # --- beginning ------------------------------------------------------------------------------------------------
    async def rotate(
        self, thread: str, *, rate: int | None = None, destroy_after_s: int = 0, trigger: str = "admin"
    ) -> Job:
        """Start a rotation, or return the unfinished one. When this returns, the thread has the new key, unless the key
        service is unavailable. Raises ThreadNotFoundError, TooManyJobsError, JobConflictError, StoreUnavailableError.
        """
        job, begun = await self._begin(thread, rate, destroy_after_s, trigger, keying=True)
        if begun:
            self._spawn(self._key_then_queue(job.id))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KEY_WAIT_S):
                async for now in self.watch(job.id, pause_s=0):
                    if not now.keying:
                        break
        return self.table.get(job.id)

    async def rotate_later(
        self, thread: str, *, rate: int | None = None, destroy_after_s: int = 0, trigger: str = "admin"
    ) -> Job:
        """As `rotate`, but the thread keeps its old key until a worker starts the job."""
        job, begun = await self._begin(thread, rate, destroy_after_s, trigger, keying=False)
        if begun:
            self._queue.append(job.id)
            self._pump()
        return job

    async def _begin(
        self, thread: str, rate: int | None, destroy_after_s: int, trigger: str, *, keying: bool
    ) -> tuple[Job, bool]:
        if destroy_after_s and not self._destroys:
            raise JobConflictError("no gateway takes a request to destroy a key: leave destroy_old_after out")
        self.require([thread])
        async with self._beginning:  # whoever joins a job finds its row
            await self._ended(self._threads.get(thread, ""))
            other = self._threads.get(thread)
            if other == RESTORING:
                raise JobConflictError("another operation is running on this thread: try again in a moment")
            if other is not None:
                return self.table.get(other), False
            return await self._add(thread, rate, destroy_after_s, trigger, keying), True

    async def _add(self, thread: str, rate: int | None, destroy_after_s: int, trigger: str, keying: bool) -> Job:
        if len(self._threads) >= UNFINISHED_MAX:
            raise TooManyJobsError
        now_ns = self.table.now_ns()
        job = Job(
            id=self._store.new_job_id(now_ns),
            thread=thread,
            created_ns=now_ns,
            updated_ns=now_ns,
            trigger=trigger,
            keying=keying,
            rate=rate,
            destroy_after_s=destroy_after_s,
        )
        self._threads[thread] = job.id
        try:
            await self.table.add(job)
        except BaseException:
            del self._threads[thread]
            raise
        _log.info("job_begun", job=job.id, thread=thread, trigger=trigger)
        return job

    async def select(self, due: Due | None, *, rate: int | None = None, destroy_after_s: int = 0) -> AsyncIterator[Job]:
        """Rotate every thread whose key is due, with None every thread. Yields each job when it is queued."""
        threads = self._store.threads_with_keys() if due is None else self._due(due)
        async for thread in threads:
            yield await self.rotate_later(thread, rate=rate, destroy_after_s=destroy_after_s)

    async def _due(self, due: Due) -> AsyncIterator[str]:
        try:
            async for thread, _ in self.due_threads(due):
                yield thread
        except KmsError as error:
            if is_permanent(error):
                raise
            raise StoreUnavailableError("the key service can't list its keys now") from error

    async def due_threads(self, due: Due) -> AsyncIterator[tuple[str, str]]:
        """Each thread whose current key is due, with the reason. Raises KmsError."""
        now_ns = self.table.now_ns()
        async for page in key_pages(self._provider, state="active"):
            for key in page.keys:
                if key.purpose != "thread" or self._store.key_of_thread(key.thread_id) != key.key_id:
                    continue
                if why := due.why(key, now_ns) or await self._worn(key, due.uses):
                    yield key.thread_id, why
            if page.next_cursor is not None:
                await asyncio.sleep(PAGE_PAUSE_S)

    async def _worn(self, key: KeyAnswer, uses: int | None) -> str:
        """`uses` if so many records were written since the thread has the key; empty if not."""
        left = uses
        if left is None:
            return ""
        since_ns = _nanoseconds(key.created_at)
        for count in self._store.count_records(key.thread_id, COUNTED_RECORDS, since_ns=since_ns):
            left -= count
            if left <= 0:
                return "uses"
            await asyncio.sleep(0)
        return ""

    def require(self, threads: Iterable[str]) -> None:
        """Raises ThreadNotFoundError unless each can be rotated."""
        if any(self._store.key_of_thread(thread) is None for thread in threads):
            raise ThreadNotFoundError("thread not found")

    # --- working --------------------------------------------------------------------------------------------------
    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)
        return task

    async def _key_then_queue(self, job_id: str) -> None:
        await self._rotation.switch_key(job_id)
        self._settle(job_id)
        self._queue.append(job_id)
        self._pump()

    def _pump(self) -> None:
        """Start queued jobs, up to RUNNING_MAX."""
        while self._queue and len(self._workers) < RUNNING_MAX and not self._stop.is_set():
            job = self.table.get(self._queue[0])
            job_id = self._queue.popleft()
            if job.state in AT_WORK and job_id not in self._workers:
                self._workers[job_id] = asyncio.get_running_loop().create_task(self._work(job))

    async def _work(self, job: Job) -> None:
        try:
            await self._rotation.run(job.id, self._pace if job.rate is None else Pace(job.rate))
        finally:
            # In the same turn as the job's last change, so that its thread is free for whoever waited for it.
            del self._workers[job.id]
            if not self._stop.is_set():
                self._worked(job.id)

    def _worked(self, job_id: str) -> None:
        try:
            self._settle(job_id)
            if self.table.get(job_id).state == "queued":  # resumed while its worker was stopping
                self._queue.append(job_id)
            self._pump()
        except StoreUnavailableError:  # unreadable for the moment
            asyncio.get_running_loop().call_later(READ_RETRY_S, self._worked, job_id)

    async def _ended(self, job_id: str) -> None:
        """A job's end can be read before it is durable. Wait until it is durable and the job's thread is free."""
        worker = self._workers.get(job_id)
        if worker is not None and self.table.get(job_id).state not in AT_WORK:
            await asyncio.wait({worker})

    def _settle(self, job_id: str) -> None:
        """Free the thread once its job is finished and no worker works on it."""
        job = self.table.get(job_id)
        if not job.unfinished and job_id not in self._workers and self._threads.get(job.thread) == job_id:
            del self._threads[job.thread]

    # --- changing -------------------------------------------------------------------------------------------------
    async def pause(self, job_id: str) -> Job:
        return await self._ordered(job_id, "pause")

    async def cancel(self, job_id: str) -> Job:
        """Re-encrypted records stay under the new key, and the old key stays retired. All records stay readable."""
        return await self._ordered(job_id, "cancel")

    async def _ordered(self, job_id: str, event: Move) -> Job:
        def how(job: Job) -> Job:
            moved = move(job, event)
            if job.keying:
                raise JobConflictError("the job is switching the thread's key: try again in a moment")
            return moved

        job = await self.table.change(job_id, how)
        _log.info("job_ordered", job=job_id, order=event)
        worker = self._workers.get(job_id)
        if worker is not None:  # it may sleep; writes that it has queued fail, since the row has changed
            worker.cancel()
            await asyncio.wait({worker})
            self._workers.pop(job_id, None)  # a worker that never began has not removed itself
            self._pump()
        self._settle(job_id)
        return job

    async def resume(self, job_id: str) -> Job:
        """A failed job tries the failed records again. Raises JobConflictError also when another job has the thread, or
        a later rotation has given it another key."""
        job = self.table.get(job_id)
        move(job, "resume")
        if self._threads.get(job.thread, job_id) != job_id:
            raise JobConflictError("another job works on this thread")
        if job.restored_ns:
            raise JobConflictError("the job's backups were restored: rotate the thread's key again")
        if job.new_key and self._store.key_of_thread(job.thread) != job.new_key:
            raise JobConflictError("a later rotation has given the thread another key")
        self._threads[job.thread] = job_id

        def how(job: Job) -> Job:
            if job.state == "failed":
                return move(job, "resume", cursor="", moved=0, failed=0, failures=(), reason="")
            return move(job, "resume")

        try:
            job = await self.table.change(job_id, how)
        except StoreUnavailableError:  # the write may have succeeded; then the job has to be queued
            asyncio.get_running_loop().call_later(READ_RETRY_S, self._worked, job_id)
            raise
        except JobError:
            self._settle(job_id)
            raise
        self._queue.append(job_id)
        self._pump()
        return job

    # --- watching -------------------------------------------------------------------------------------------------
    async def watch(self, job_id: str, *, pause_s: float = WATCH_S) -> AsyncIterator[Job]:
        """Yields the job now and after each change, until no worker works on it or the server stops. Between two values
        it waits at least `pause_s`."""
        seen = self.table.changes
        await self._ended(job_id)
        last = self.table.get(job_id)
        yield last
        stopping = asyncio.create_task(self._stop.wait())
        try:
            while last.state in AT_WORK and not self._stop.is_set():
                change = asyncio.create_task(self.table.wait_for_change(seen))
                await asyncio.wait({change, stopping}, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                seen = self.table.changes
                await self._ended(job_id)
                job = self.table.get(job_id)
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

    # --- backups --------------------------------------------------------------------------------------------------
    async def restore(self, job_id: str) -> Restored:
        """Put the old ciphertexts of the job's records back, and cancel the destruction of the old keys. Raises
        JobConflictError."""
        job = self.table.get(job_id)
        async with self._alone(job):
            if job.destroyed_ns:
                raise JobConflictError("the key of these backups was destroyed")
            keeps = {"destroy_at_ns": 0, "destroy_after_s": 0, "census_ns": 0, "destroy_waits_for": ""}
            await self.table.change(job_id, lambda now: changed(now, restored_ns=self.table.now_ns(), **keeps))
            restored = await self._store.restore_kept(job_id)
        _log.info("backups_restored", job=job_id, restored=restored.restored, kept=restored.kept)
        return restored

    async def drop_backups(self, job_id: str) -> int:
        """Remove the job's backups; returns how many there were. Raises JobConflictError."""
        async with self._alone(self.table.get(job_id)):
            dropped = await self.table.drop_backups(job_id)
        _log.info("backups_dropped", job=job_id, dropped=dropped)
        return dropped

    @asynccontextmanager
    async def _alone(self, job: Job) -> AsyncIterator[None]:
        """Let no other job use the job's thread meanwhile. Raises JobConflictError if one does."""
        await self._ended(self._threads.get(job.thread, ""))
        if job.thread in self._threads:
            raise JobConflictError("a job on this thread is unfinished")
        self._threads[job.thread] = RESTORING
        try:
            yield
        finally:
            del self._threads[job.thread]

    # --- automatic ------------------------------------------------------------------------------------------------
    async def _tick(self) -> None:
        selected_at = float("-inf")
        while True:
            await asyncio.sleep(TICK_S)
            await _attempted(self.destroy_due)
            if time.monotonic() - selected_at > SELECTION_S:
                selected_at = time.monotonic()
                await _attempted(self.rotate_due)
                await _attempted(self._sweep)

    async def rotate_due(self) -> None:
        """Queue the threads whose keys have reached the configured age or number of records."""
        settings = self._settings
        due = Due(age_s=settings.max_age_s or None, uses=settings.max_uses or None)
        if due == Due():
            return
        destroy_after_s = settings.destroy_old_after_s
        async for thread, why in self.due_threads(due):
            with contextlib.suppress(JobConflictError, ThreadNotFoundError):  # tried again in an hour
                await self.rotate_later(thread, destroy_after_s=destroy_after_s, trigger=f"max_{why}")

    async def destroy_due(self) -> None:
        """Destroy the old keys that are due. One that can't be destroyed does not delay the others."""
        for page in self.table.pages():
            for job in page:
                if 0 < job.destroy_at_ns <= self.table.now_ns() and job.thread not in self._threads:
                    with contextlib.suppress(JobError):  # a job on the thread was begun, or the row removed, meanwhile
                        async with self._alone(job):
                            await self._destruction.attempt(job.id)
            await asyncio.sleep(0)

    async def _sweep(self) -> None:
        oldest_ns = self.table.now_ns() - ROW_AGE_S * 1_000_000_000
        for page in self.table.pages():
            old = [
                job
                for job in page
                if (job.state in ("done", "cancelled") or (job.state == "failed" and not job.new_key))
                and job.updated_ns < oldest_ns
                and not (job.backups or job.destroy_at_ns)
            ]
            if old:
                await self.table.remove(old)
            await asyncio.sleep(0)


async def _attempted(work: Callable[[], Awaitable[None]]) -> None:
    """Run one automatic task. An error in it does not affect the other tasks or the next run."""
    try:
        await work()
    except (StoreError, KmsError, JobError) as error:
        _log.warning("jobs_tick_failed", reason=str(error))
    except Exception as error:  # noqa: BLE001  a defect must not stop the rotation of worn keys; logged without its text
        lines = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        _log.error("jobs_tick_broken", error=type(error).__qualname__, at=lines)


def _nanoseconds(rfc3339: str) -> int:
    moment = datetime.fromisoformat(rfc3339)
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000
