"""The job table: one row for each job. A row and the records of the same step change in one compare-and-put.

Owns: how a row is read and written, what is known of all rows without reading them again, and the future that wakes
tasks which wait for a change. Invariants: a row is replaced only if it is still equal to the row that was read, so a
job's worker and an operator never overwrite each other's change. A read returns the last written row, even if it is not
durable yet. A damaged row is never changed, and hides no other one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Final, NamedTuple

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.platform.logs import Log
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs.states import FINAL, Job, JobNotFoundError, ThreadBusyError, changed
from progressdb_server.store.model import ClaimLostError, OpaqueWrite, RecordUnreadableError, RowWrite, StaleRowError

LATE_ROWS_NS: Final = 600 * 1_000_000_000
"""How much older than a read of all rows the id of a row may be that is stored after that read: its write may wait, and
the clock is another one after a failover of the database. OldRows reads all rows again each hour."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Job).decode
_log = Log()


def parse(job_id: str, raw: bytes) -> Job:
    try:
        job = _decode(raw)
    except UNDECODABLE:
        job = None
    if job is None or job.id != job_id:
        raise RecordUnreadableError(f"the row of job {job_id} is damaged")
    return job


class Row(NamedTuple):
    """A job, and the bytes that it was read from."""

    raw: bytes
    job: Job


class PendingRow(NamedTuple):
    """A row whose write was submitted; `settle` waits until it is durable."""

    row: Row
    write: RowWrite


class JobTable:
    """The jobs of a store. `now_ns`: the wall clock, Unix nanoseconds."""

    def __init__(self, store: Conversations, now_ns: Callable[[], int]) -> None:
        self._store = store
        self.now_ns = now_ns
        self.changes = 0
        """How often this process has added or changed a row; removals do not count."""
        self._change_made: asyncio.Future[None] | None = None
        self._by_thread: dict[str, set[str]] = {}
        """Thread → ids of its jobs; beside other servers without those that have ended and left nothing."""
        self._all_read_ns = 0
        """When this process last began to read all rows that it did not know, 0 for never."""
        self._due: dict[str, int] = {}
        """Ids of jobs whose old keys are to be destroyed, and when."""
        self._standing: set[str] = set()
        """Ids of jobs that have failed or are unfinished."""
        self._damaged: set[str] = set()
        self.followed: dict[str, Job] = {}
        """The jobs of workers, as this process has last written them."""

    # --- reading --------------------------------------------------------------------------------------------------
    async def row(self, job_id: str) -> Row:
        raw = await self._store.rekeying.job_row(job_id)
        if raw is None:
            self._forget(job_id)
            raise JobNotFoundError
        return Row(raw, self._read(job_id, raw))

    async def get(self, job_id: str) -> Job:
        """The job of this id, from `row`."""
        return (await self.row(job_id)).job

    def _read(self, job_id: str, raw: bytes) -> Job:
        known = job_id in self._damaged
        self._forget(job_id)
        try:
            job = parse(job_id, raw)
        except RecordUnreadableError as error:
            self._damaged.add(job_id)
            if not known:
                _log.error("job_row_damaged", job=job_id, reason=str(error))
            raise
        if self._store.claims.contested and job.state in FINAL and not (job.backups or job.destroy_at_ns):
            self._drop(job)  # any server may remove the row
        else:
            self._note(job)
        return job

    def _note(self, job: Job) -> None:
        self._by_thread.setdefault(job.thread, set()).add(job.id)
        (self._standing.discard if job.state in FINAL else self._standing.add)(job.id)
        if job.destroy_at_ns:
            self._due[job.id] = job.destroy_at_ns

    def _drop(self, job: Job) -> None:
        known = self._by_thread.get(job.thread, set())
        known.discard(job.id)
        if not known:
            self._by_thread.pop(job.thread, None)

    def _forget(self, job_id: str) -> None:
        self._due.pop(job_id, None)
        self._standing.discard(job_id)
        self._damaged.discard(job_id)

    def _readable(self, rows: Sequence[tuple[str, bytes]]) -> list[Job]:
        jobs: list[Job] = []
        for job_id, raw in rows:
            with contextlib.suppress(RecordUnreadableError):
                jobs.append(self._read(job_id, raw))
        return jobs

    async def newest(self, before: str = "") -> AsyncIterator[list[Job]]:
        """The pages of jobs, the newest first; with `before`, an id, the jobs older than it."""
        async for rows in self._store.rekeying.newest_job_rows(before):
            yield self._readable(rows)

    async def pages(self, *, since_ns: int = 0) -> AsyncIterator[list[Job]]:
        """All jobs since then whose rows are not damaged, in the order of their creation. A page is read when the
        iterator reaches it."""
        began_ns = self.now_ns()
        async for rows in self._store.rekeying.job_rows(since_ns):
            yield self._readable(rows)
        if since_ns <= self._unknown_since_ns:
            self._all_read_ns = began_ns

    async def pages_of(self, job_ids: Sequence[str]) -> AsyncIterator[list[Job]]:
        """The jobs whose rows exist and are not damaged. A page is read when the iterator reaches it."""
        async for rows in self._store.rekeying.job_rows_of(job_ids):
            yield self._readable(rows)

    async def standing(self, *, reverse: bool = False) -> AsyncIterator[list[Job]]:
        """The jobs that have failed or are unfinished, as far as this process has read their rows, in the order of
        their creation, or the newest first. A page is read when the iterator reaches it."""
        job_ids = sorted(self._standing, reverse=reverse)
        unread = set(job_ids)
        async for page in self.pages_of(job_ids):
            unread.difference_update(job.id for job in page)
            jobs = sorted(page, key=lambda job: job.id, reverse=reverse)
            yield [job for job in jobs if job.state not in FINAL]
        self._standing -= unread  # another server has removed their rows

    @property
    def damaged(self) -> int:
        """The number of rows that were met damaged."""
        return len(self._damaged)

    def of_thread(self, thread: str) -> list[str]:
        """Ids of the thread's jobs as far as this process has read their rows, oldest first."""
        return sorted(self._by_thread.get(thread, ()))

    async def all_of_thread(self, thread: str) -> list[Job]:
        """The thread's jobs whose rows are not damaged, also what `of_thread` leaves out; that reads the whole table.
        Raises RecordUnreadableError."""
        jobs: list[Job] = []
        if self._store.claims.contested:
            async for page in self.pages():
                jobs += [job for job in page if job.thread == thread]
                await asyncio.sleep(0)
            return jobs
        for job_id in self.of_thread(thread):
            with contextlib.suppress(JobNotFoundError):
                jobs.append(await self.get(job_id))
        return jobs

    @property
    def _unknown_since_ns(self) -> int:
        return max(0, self._all_read_ns - LATE_ROWS_NS)

    async def due(self) -> AsyncIterator[Job]:
        """The jobs whose old keys are to be destroyed by now. A row that another server wrote counts once this process
        has read it: OldRows reads all rows each hour. Raises StoreUnavailableError."""
        now_ns = self.now_ns()
        async for page in self.pages_of(sorted(job_id for job_id, at_ns in self._due.items() if at_ns <= now_ns)):
            for job in page:
                if 0 < job.destroy_at_ns <= now_ns:
                    yield job

    async def with_backups(self, thread: str) -> list[str]:
        """Ids of the thread's jobs that have backups, oldest first. Only the first call reads the whole table. Raises
        RecordUnreadableError while any row is damaged, which may be one of the thread."""
        if not self._all_read_ns or self._store.claims.contested:  # other servers add jobs too
            async for _ in self.pages(since_ns=self._unknown_since_ns):
                await asyncio.sleep(0)
        for job_id in sorted(self._damaged):
            with contextlib.suppress(JobNotFoundError):  # removed meanwhile
                await self.row(job_id)
        threads: list[str] = []
        for job_id in self.of_thread(thread):
            with contextlib.suppress(JobNotFoundError):  # the write of its row failed
                if (await self.get(job_id)).backups:
                    threads.append(job_id)
        return threads

    async def wait_for_change(self, changes: int) -> None:
        """Wait while `self.changes` is equal to `changes`, its value when the caller last read the table."""
        while self.changes == changes:
            if self._change_made is None:
                self._change_made = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._change_made)

    # --- changing -------------------------------------------------------------------------------------------------
    async def add(self, job: Job) -> None:
        """Add a row; it is durable on return. Raises StoreUnavailableError."""
        self._note(job)
        await self._store.rekeying.settle_row(self._store.rekeying.write_row(job.id, job.thread, None, _encode(job)))
        self._wake_waiters()

    def submit(self, row: Row, job: Job, step: OpaqueWrite | None = None) -> PendingRow:
        """Replace `row` by `job` and write the step, atomically. The caller may submit a change of the returned row at
        once: it is written after this one, and fails if this one fails."""
        stored = changed(job, updated_ns=self.now_ns())
        raw = _encode(stored)
        self._note(stored)
        if job.id in self.followed:
            self.followed[job.id] = stored
        return PendingRow(Row(raw, stored), self._store.rekeying.write_row(job.id, job.thread, row.raw, raw, step))

    async def settle(self, pending: PendingRow) -> Row:
        """Wait until a submitted row is durable. Raises the errors of `Rekeying.settle_row`."""
        await self._store.rekeying.settle_row(pending.write)
        self._wake_waiters()
        return pending.row

    async def store(self, row: Row, job: Job, step: OpaqueWrite | None = None) -> Row:
        """Submit and settle."""
        return await self.settle(self.submit(row, job, step))

    async def change(self, job_id: str, how: Callable[[Job], Job | Awaitable[Job]]) -> Job:
        """Replace the job by `how(job)`; repeat it if the row was changed at the same time. Raises the errors of `how`,
        JobNotFoundError, ThreadBusyError, StoreUnavailableError."""
        while True:
            row = await self.row(job_id)
            job = how(row.job)
            try:
                return (await self.store(row, job if isinstance(job, Job) else await job)).job
            except ClaimLostError:  # it stays lost
                raise ThreadBusyError from None
            except StaleRowError:
                continue

    async def drop_backups(self, job_id: str, under: Collection[str] | None = None) -> int:
        """Remove the job's backup records, or only those under the given keys, and reduce its count of backups in the
        same writes. Returns the number of removed records. Raises StoreUnavailableError."""
        dropped = 0
        async for chunk in self._store.rekeying.kept_records(job_id):
            removals = [backup for backup in chunk if under is None or backup.key_id in under]
            if removals:
                row = await self.row(job_id)
                left = changed(row.job, backups=max(0, row.job.backups - len(removals)))
                await self.store(row, left, self._store.rekeying.kept_drop(job_id, removals))
                dropped += len(removals)
            await asyncio.sleep(0)
        return dropped

    async def remove(self, jobs: Sequence[Job]) -> None:
        """Remove the rows of `jobs`. Does not wake the tasks that wait for a change."""
        await self._store.rekeying.remove_rows([job.id for job in jobs])
        for job in jobs:
            self._forget(job.id)
            self._drop(job)

    def _wake_waiters(self) -> None:
        self.changes += 1
        if self._change_made is not None and not self._change_made.done():
            self._change_made.set_result(None)
        self._change_made = None
