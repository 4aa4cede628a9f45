"""Rotations of the keys of many threads, as one job that walks over the threads and begins a rotation of each.

Owns: the walk, and which threads it has done. Invariants:
- At most AHEAD_MAX rotations of a walk are unfinished, and they wait behind other jobs.
- A walk that was interrupted goes on behind its cursor, and begins no rotation of a thread that has one of this walk
  already: the rotation's row names the walk (`Job.trigger`).
- One walk at a time, of all servers: its row has the thread ALL_THREADS.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import ClassVar, Final

from minikms.platform.logs import Log
from progressdb_server.jobs.rotation import PROGRESS_S, Due, KeyRotation
from progressdb_server.jobs.runner import Throttle, WorkingKind
from progressdb_server.jobs.states import (
    ALL_THREADS,
    AT_WORK,
    Job,
    JobConflictError,
    JobError,
    JobFailedError,
    JobNotFoundError,
    changed,
    move,
)
from progressdb_server.store.model import RecordUnreadableError, ThreadNotFoundError

AHEAD_MAX: Final = 64
LOOK_S: Final = 0.02
"""Between two looks whether the oldest rotation has ended."""

_log = Log()


@dataclass(eq=False)
class RotationsOfMany(WorkingKind):
    rotation: KeyRotation
    name: ClassVar[str] = "rotations"
    beside: ClassVar[bool] = True

    async def rotate(self, due: Due, *, rate: int | None = None, destroy_after_s: int = 0) -> Job:
        """Begin to rotate every thread whose key is due, with `Due()` every thread; returns the unfinished walk if it
        is the same one. Raises JobConflictError, TooManyJobsError, StoreUnavailableError."""
        self.rotation.check_destroys(destroy_after_s)
        settings = {"rate": rate, "destroy_after_s": destroy_after_s}
        settings |= {"older_than_s": due.age_s or 0, "kek_version": due.kek_version or 0}
        job = await self.runner.add(self, ALL_THREADS, **settings)
        if any(getattr(job, name) != value for name, value in settings.items()):
            raise JobConflictError(f"{job.id} rotates other threads, or in another way: wait for it, or cancel it")
        return job

    async def resume(self, job: Job) -> Job:
        if job.state == "failed":
            return move(job, "resume", cursor="", done=0, failed=0, reason="")
        return move(job, "resume")

    async def step(self, job_id: str, pace: Throttle) -> None:
        row = await self.table.row(job_id)
        if row.job.state == "queued":
            total = 0 if _due(row.job) else (await self.store.engine.counted()).threads
            row = await self.table.store(row, move(row.job, "start", total=total))
        if self.store.claims.contested:  # which of its rotations have ended
            async for _ in self.table.pages(since_ns=row.job.created_ns):
                await asyncio.sleep(0)
        job, stored_at = row.job, time.monotonic()
        async for thread, done in self._ended(job):
            job = changed(job, cursor=thread, done=job.done + done, failed=job.failed + (not done))
            if time.monotonic() - stored_at > PROGRESS_S:
                row = await self.table.store(row, job)
                stored_at = time.monotonic()
        if job.failed:
            await self.table.store(row, job)
            raise JobFailedError(f"{job.failed} threads are not rotated: progressdb jobs list")
        row = await self.table.store(row, move(job, "verify"))
        await self.table.store(row, move(row.job, "finish", cursor="", total=job.done))
        _log.info("job_done", job=job.id, threads=job.done)

    async def _ended(self, walk: Job) -> AsyncIterator[tuple[str, bool]]:
        """Each thread whose rotation has ended, in the order of the walk, and whether it is done."""
        running: deque[tuple[str, str]] = deque()
        async for thread in self._threads(walk):
            # A walk over keys may come to the new key of a thread.
            job_id = None if any(thread == one for one, _ in running) else await self._begin(walk, thread)
            if job_id is not None:
                running.append((thread, job_id))
            if len(running) == AHEAD_MAX:
                yield await self._end(*running.popleft())
        while running:
            yield await self._end(*running.popleft())

    def _threads(self, walk: Job) -> AsyncIterator[str]:
        due = _due(walk)
        if due == Due():
            return self.store.rekeying.threads(behind=walk.cursor)
        return (thread async for thread, _ in self.rotation.due_threads(due, walk.created_ns))

    async def _begin(self, walk: Job, thread: str) -> str | None:
        """The id of the thread's rotation, empty if none can begin; None for a thread that is gone, or that a walk over
        keys has done before."""
        for job_id in self.table.of_thread(thread):
            if job_id > walk.id:
                with contextlib.suppress(JobNotFoundError, RecordUnreadableError):
                    job = await self.table.get(job_id)
                    if job.trigger == walk.id and job.state in AT_WORK:  # begun by a server that is gone
                        return job_id
                    if job.trigger == walk.id and job.state == "done":
                        return job_id if _due(walk) == Due() else None
        await self.runner.place()
        try:
            job = await self.rotation.rotate(
                thread, rate=walk.rate, destroy_after_s=walk.destroy_after_s, trigger=walk.id, later=True
            )
        except ThreadNotFoundError:
            return None
        except JobError as error:
            _log.warning("thread_not_rotated", job=walk.id, thread=thread, reason=str(error))
            return ""
        return job.id

    async def _end(self, thread: str, job_id: str) -> tuple[str, bool]:
        with contextlib.suppress(JobNotFoundError, RecordUnreadableError):
            while True:
                job = await self.table.get(job_id)
                if job.state not in AT_WORK:
                    return thread, job.state == "done"
                await asyncio.sleep(LOOK_S)
        return thread, False


def _due(walk: Job) -> Due:
    return Due(age_s=walk.older_than_s or None, kek_version=walk.kek_version or None)
