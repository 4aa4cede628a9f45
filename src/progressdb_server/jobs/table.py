"""The job table: the rows `job:<id>`, read from the store and changed by compare-and-put.

Owns: the rows and their order (ids sort by time), and the pulse by which watchers learn of a change. Invariants: a
row is changed only when it is still what was read, so that a job's worker and an operator never overwrite each other;
a row and the records of the same step are one write. What is read is what was written last, durable or not yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from progressdb_server.jobs.model import JOB_ID_PATTERN, Job, JobNotFoundError, changed
from progressdb_server.store import keyspace
from progressdb_server.store.engine import Engine
from progressdb_server.store.writer import ConditionFailedError, Write, Writer

JOBS: Final = b"job:"
PAGE_JOBS: Final = 256

Put = tuple[bytes, bytes | None]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Job).decode


class StaleJobError(Exception):
    """The row is no longer what was read; nothing was written."""


class Row(NamedTuple):
    """A job, and the bytes that it was read from."""

    raw: bytes
    job: Job


class Storing(NamedTuple):
    """A row that is being written; `done` ends with the write."""

    row: Row
    done: asyncio.Future[None]


def row_key(job_id: str) -> bytes:
    return JOBS + job_id.encode()


class JobTable:
    def __init__(self, engine: Engine, writer: Writer, now_ns: Callable[[], int]) -> None:
        self._engine = engine
        self._writer = writer
        self.now_ns = now_ns
        self.changes = 0
        """How many changes of jobs this process has made."""
        self._pulse: asyncio.Future[None] | None = None
        self._by_thread: dict[str, set[str]] = {}
        """Ids; of every job once `_all_known`."""
        self._all_known = False

    # --- reading --------------------------------------------------------------------------------------------------
    def row(self, job_id: str) -> Row:
        """Raises JobNotFoundError."""
        raw = self._engine.get(row_key(job_id)) if JOB_ID_PATTERN.fullmatch(job_id) else None
        if raw is None:
            raise JobNotFoundError
        return Row(raw, _decode(raw))

    def get(self, job_id: str) -> Job:
        """Raises JobNotFoundError."""
        return self.row(job_id).job

    def pages(self, *, newest_first: bool = False) -> Iterator[list[Job]]:
        """All jobs; each page is read when it is asked for."""
        lower, upper = JOBS, keyspace.after(JOBS)
        while entries := self._engine.scan(lower, upper, limit=PAGE_JOBS, reverse=newest_first):
            if newest_first:
                upper = entries[-1][0]
            else:
                lower = entries[-1][0] + b"\0"
            yield [_decode(raw) for _, raw in entries]

    async def of_thread(self, thread: str) -> list[Job]:
        """The thread's jobs, oldest first. The first call walks the table, so that no other has to."""
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
    def new_id(self) -> str:
        return f"job-{self.now_ns():020d}-{os.urandom(4).hex()}"

    async def add(self, job: Job) -> None:
        """Durable when it returns. Raises StoreUnavailableError."""
        key = row_key(job.id)
        self._by_thread.setdefault(job.thread, set()).add(job.id)
        await self._writer.commit(Write(((key, _encode(job)),), ((key, None),)))
        self._beat()

    def submit(
        self,
        row: Row,
        job: Job,
        puts: Sequence[Put] = (),
        *,
        expect: Sequence[Put] = (),
        read: Sequence[tuple[bytes, bytes]] = (),
        read_at: int = 0,
    ) -> Storing:
        """`job` in the place of `row`, together with the puts; all or nothing. It may be built upon at once: what is
        submitted later is written later, and not at all if this is not. `expect`, `read`, `read_at`: conditions, see
        `store.writer.Write`."""
        key = row_key(job.id)
        stored = changed(job, updated_ns=self.now_ns())
        raw = _encode(stored)
        done = self._writer.commit(Write(((key, raw), *puts), ((key, row.raw), *expect), read=read, read_at=read_at))
        return Storing(Row(raw, stored), done)

    async def settle(self, storing: Storing) -> Row:
        """Durable when it returns. Raises StaleJobError; ConditionFailedError for a value of `expect` or `read`;
        StoreUnavailableError, after which the write may or may not be there."""
        try:
            await storing.done
        except ConditionFailedError as error:
            if error.key == row_key(storing.row.job.id):
                raise StaleJobError from None
            raise
        self._beat()
        return storing.row

    async def store(self, row: Row, job: Job, puts: Sequence[Put] = (), *, expect: Sequence[Put] = ()) -> Row:
        """Submit and settle."""
        return await self.settle(self.submit(row, job, puts, expect=expect))

    async def change(self, job_id: str, how: Callable[[Job], Job]) -> Job:
        """Apply `how` to whatever the job is by then. Raises what it raises, JobNotFoundError,
        StoreUnavailableError."""
        while True:
            row = self.row(job_id)
            try:
                return (await self.store(row, how(row.job))).job
            except StaleJobError:
                continue

    async def remove(self, jobs: Sequence[Job]) -> None:
        await self._writer.commit(Write([(row_key(job.id), None) for job in jobs]))
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
