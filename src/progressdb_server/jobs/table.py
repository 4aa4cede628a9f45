"""The job table: the rows of jobs, changed by compare-and-put together with the records of the same step.

Owns: how a row is read and written, and the signal by which watchers learn of a change. Invariants: a row is changed
only if it is still what was read, so that a job's worker and an operator never overwrite each other's change. A read
returns what was written last, durable or not yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from progressdb_server.jobs.states import Job, JobNotFoundError, changed
from progressdb_server.store.model import RowWrite, StaleRowError, Step, Store

_NOTHING: Final = Step()
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Job).decode


class Row(NamedTuple):
    """A job, and the bytes that it was read from."""

    raw: bytes
    job: Job


class Storing(NamedTuple):
    """A row that is being written."""

    row: Row
    write: RowWrite


class JobTable:
    def __init__(self, store: Store, now_ns: Callable[[], int]) -> None:
        self._store = store
        self.now_ns = now_ns
        self.changes = 0
        """Number of changes of jobs that this process has made."""
        self._pulse: asyncio.Future[None] | None = None
        self._by_thread: dict[str, set[str]] = {}
        """Thread → ids of its jobs; complete once `_all_known`."""
        self._all_known = False

    # --- reading --------------------------------------------------------------------------------------------------
    def row(self, job_id: str) -> Row:
        """Raises JobNotFoundError."""
        raw = self._store.job_row(job_id)
        if raw is None:
            raise JobNotFoundError
        return Row(raw, _decode(raw))

    def get(self, job_id: str) -> Job:
        """Raises JobNotFoundError."""
        return self.row(job_id).job

    def pages(self, *, newest_first: bool = False) -> Iterator[list[Job]]:
        """All jobs, in order of time; each page is read when it is asked for."""
        for rows in self._store.job_rows(newest_first=newest_first):
            yield [_decode(raw) for raw in rows]

    async def of_thread(self, thread: str) -> list[Job]:
        """The thread's jobs, oldest first. The first call walks the whole table, later ones do not."""
        if not self._all_known:
            for page in self.pages():
                for job in page:
                    self._by_thread.setdefault(job.thread, set()).add(job.id)
                await asyncio.sleep(0)
            self._all_known = True
        found: list[Job] = []
        for job_id in sorted(self._by_thread.get(thread, ())):
            with contextlib.suppress(JobNotFoundError):  # its row was never written
                found.append(self.get(job_id))
        return found

    async def later_than(self, changes: int) -> None:
        """Returns once `changes` is past this number: some job was changed."""
        while self.changes == changes:
            if self._pulse is None:
                self._pulse = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._pulse)

    # --- changing -------------------------------------------------------------------------------------------------
    async def add(self, job: Job) -> None:
        """Durable when it returns. Raises StoreUnavailableError."""
        self._by_thread.setdefault(job.thread, set()).add(job.id)
        await self._store.settle_row(self._store.write_row(job.id, None, _encode(job)))
        self._beat()

    def submit(self, row: Row, job: Job, step: Step = _NOTHING) -> Storing:
        """`job` in the place of `row`, together with the step; all or nothing. The next submission may build on it at
        once: it is written later, and not at all if this one is not."""
        stored = changed(job, updated_ns=self.now_ns())
        raw = _encode(stored)
        return Storing(Row(raw, stored), self._store.write_row(job.id, row.raw, raw, step))

    async def settle(self, storing: Storing) -> Row:
        """Durable when it returns. Raises what `Store.settle_row` raises."""
        await self._store.settle_row(storing.write)
        self._beat()
        return storing.row

    async def store(self, row: Row, job: Job, step: Step = _NOTHING) -> Row:
        """Submit and settle."""
        return await self.settle(self.submit(row, job, step))

    async def change(self, job_id: str, how: Callable[[Job], Job]) -> Job:
        """Apply `how` to whatever the job is by then. Raises what it raises, JobNotFoundError,
        StoreUnavailableError."""
        while True:
            row = self.row(job_id)
            try:
                return (await self.store(row, how(row.job))).job
            except StaleRowError:
                continue

    async def drop_kept(self, job_id: str, under: Collection[str] | None = None) -> int:
        """Remove the records that the job has kept, or only those under these keys, and change its count with them.
        Returns how many there were. Raises StoreUnavailableError."""
        dropped = 0
        for chunk in self._store.kept_records(job_id):
            gone = [kept for kept in chunk if under is None or kept.key_id in under]
            if gone:
                row = self.row(job_id)
                left = changed(row.job, backups=max(0, row.job.backups - len(gone)))
                await self.store(row, left, self._store.kept_dropped(job_id, gone))
                dropped += len(gone)
            await asyncio.sleep(0)
        return dropped

    async def remove(self, jobs: Sequence[Job]) -> None:
        await self._store.remove_rows([job.id for job in jobs])
        for job in jobs:
            known = self._by_thread.get(job.thread, set())
            known.discard(job.id)
            if not known:
                self._by_thread.pop(job.thread, None)

    def _beat(self) -> None:
        self.changes += 1
        if self._pulse is not None and not self._pulse.done():
            self._pulse.set_result(None)
        self._pulse = None
