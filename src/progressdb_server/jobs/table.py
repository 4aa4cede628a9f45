"""The job table: one row for each job. A row and the records of the same step change in one compare-and-put.

Owns: how a row is read and written, and the future that wakes tasks which wait for a change. Invariants: a row is
replaced only if it is still equal to the row that was read, so a job's worker and an operator never overwrite each
other's change. A read returns the last written row, even if it is not durable yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import NamedTuple

import msgspec

from progressdb_server.jobs.states import Job, JobNotFoundError, ThreadBusyError, changed
from progressdb_server.store.conversations import Conversations
from progressdb_server.store.model import ClaimLostError, OpaqueWrite, RowWrite, StaleRowError

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Job).decode


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
        """Thread → ids of its jobs; complete once `_all_known`."""
        self._all_known = False
        self.followed: dict[str, Job] = {}
        """The jobs of workers, as this process has last written them."""

    # --- reading --------------------------------------------------------------------------------------------------
    async def row(self, job_id: str) -> Row:
        """Raises JobNotFoundError."""
        raw = await self._store.job_row(job_id)
        if raw is None:
            raise JobNotFoundError
        return Row(raw, _decode(raw))

    async def get(self, job_id: str) -> Job:
        """Raises JobNotFoundError."""
        return (await self.row(job_id)).job

    async def pages(self, *, newest_first: bool = False, since_ns: int = 0) -> AsyncIterator[list[Job]]:
        """All jobs since then, in the order of their creation. A page is read when the iterator reaches it."""
        async for rows in self._store.job_rows(newest_first=newest_first, since_ns=since_ns):
            yield [_decode(raw) for raw in rows]

    async def pages_of(self, job_ids: Sequence[str]) -> AsyncIterator[list[Job]]:
        """Those of the jobs whose rows are there. A page is read when the iterator reaches it."""
        async for rows in self._store.job_rows_of(job_ids):
            yield [_decode(raw) for raw in rows]

    async def of_thread(self, thread: str) -> list[Job]:
        """The thread's jobs, oldest first. Only the first call reads the whole table."""
        if not self._all_known or self._store.shared:  # other servers add jobs too
            async for page in self.pages():
                for job in page:
                    self._by_thread.setdefault(job.thread, set()).add(job.id)
                await asyncio.sleep(0)
            self._all_known = True
        found: list[Job] = []
        for job_id in sorted(self._by_thread.get(thread, ())):
            with contextlib.suppress(JobNotFoundError):  # the write of its row failed
                found.append(await self.get(job_id))
        return found

    async def wait_for_change(self, changes: int) -> None:
        """Wait while `self.changes` is equal to `changes`, its value when the caller last read the table."""
        while self.changes == changes:
            if self._change_made is None:
                self._change_made = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._change_made)

    # --- changing -------------------------------------------------------------------------------------------------
    async def add(self, job: Job) -> None:
        """Add a row; it is durable on return. Raises StoreUnavailableError."""
        self._by_thread.setdefault(job.thread, set()).add(job.id)
        await self._store.settle_row(self._store.write_row(job.id, job.thread, None, _encode(job)))
        self._wake_waiters()

    def submit(self, row: Row, job: Job, step: OpaqueWrite | None = None) -> PendingRow:
        """Replace `row` by `job` and write the step, atomically. The caller may submit a change of the returned row at
        once: it is written after this one, and fails if this one fails."""
        stored = changed(job, updated_ns=self.now_ns())
        raw = _encode(stored)
        if job.id in self.followed:
            self.followed[job.id] = stored
        return PendingRow(Row(raw, stored), self._store.write_row(job.id, job.thread, row.raw, raw, step))

    async def settle(self, pending: PendingRow) -> Row:
        """Wait until a submitted row is durable. Raises the errors of `Conversations.settle_row`."""
        await self._store.settle_row(pending.write)
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
        async for chunk in self._store.kept_records(job_id):
            gone = [kept for kept in chunk if under is None or kept.key_id in under]
            if gone:
                row = await self.row(job_id)
                left = changed(row.job, backups=max(0, row.job.backups - len(gone)))
                await self.store(row, left, self._store.kept_drop(job_id, gone))
                dropped += len(gone)
            await asyncio.sleep(0)
        return dropped

    async def remove(self, jobs: Sequence[Job]) -> None:
        """Remove the rows of `jobs`. Does not wake the tasks that wait for a change."""
        await self._store.remove_rows([job.id for job in jobs])
        for job in jobs:
            known = self._by_thread.get(job.thread, set())
            known.discard(job.id)
            if not known:
                self._by_thread.pop(job.thread, None)

    def _wake_waiters(self) -> None:
        self.changes += 1
        if self._change_made is not None and not self._change_made.done():
            self._change_made.set_result(None)
        self._change_made = None
