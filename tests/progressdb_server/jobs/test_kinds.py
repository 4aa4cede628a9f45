"""A new kind of job is one class and one entry in the table: everything else knows it by its row."""

import asyncio

import msgspec
import pytest

from progressdb_server.jobs.runner import Kind, Throttle
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import Job, JobConflictError, JobFailedError, changed, move
from tests.progressdb_server.jobs.rotating import Place, begin_at_once, write

COUNT = 12


class Counting(Kind):
    """Counts to COUNT, one at a step of the disk, and stops at what `hold` says."""

    name = "counting"

    def __init__(self, jobs: Jobs, hold: int = COUNT) -> None:
        self._jobs = jobs
        self.hold = hold
        self.begun = 0

    async def begin(self) -> None:
        self.begun += 1

    async def step(self, job_id: str, pace: Throttle) -> None:
        row = await self._jobs.table.row(job_id)
        if row.job.state == "queued":
            row = await self._jobs.table.store(row, move(row.job, "start"))
        while row.job.done < COUNT:
            if row.job.done == self.hold:
                raise JobFailedError("held")
            row = await self._jobs.table.store(row, changed(row.job, done=row.job.done + 1))
            await pace.take(1)
        row = await self._jobs.table.store(row, move(row.job, "verify"))
        await self._jobs.table.store(row, move(row.job, "finish"))


def with_counting(jobs: Jobs, hold: int = COUNT) -> Counting:
    kind = Counting(jobs, hold)
    jobs.kinds = (*jobs.kinds, kind)
    return kind


async def test_a_new_kind_is_queued_fails_and_resumes_where_it_was() -> None:
    async with Place().opened() as (_, jobs):
        kind = with_counting(jobs, hold=5)
        job = await jobs.add(kind, "t", trigger="admin")
        failed = await jobs.wait(job.id)
        assert (failed.state, failed.reason, failed.done) == ("failed", "held", 5)
        assert [one.id async for page in jobs.table.standing() for one in page] == [job.id]
        kind.hold = COUNT
        await jobs.resume(job.id)
        assert (await jobs.wait(job.id)).done == COUNT
        assert [one async for page in jobs.table.standing() for one in page] == []


async def test_a_job_of_any_kind_has_its_thread_alone() -> None:
    async with Place().opened() as (store, jobs):
        await write(store, 1)
        kind = with_counting(jobs)
        job = await jobs.add(kind, "t", rate=1)
        with pytest.raises(JobConflictError, match="another job works"):
            await jobs.rotation.rotate("t")
        assert (await jobs.cancel(job.id)).state == "cancelled"
        assert (await jobs.wait((await jobs.rotation.rotate("t")).id)).state == "done"


async def test_a_start_continues_a_job_of_a_known_kind_and_leaves_another_alone() -> None:
    place = Place()
    ids: list[str] = []
    async with place.opened() as (_, jobs):
        job = await jobs.add(with_counting(jobs), "t", rate=1)
        ids.append(job.id)
        while not (await jobs.table.get(job.id)).done:
            await asyncio.sleep(0.001)
    async with place.opened() as (_, jobs):
        assert (await jobs.table.get(ids[0])).state == "running"
        assert jobs.has_job("t")
        await jobs.pause(ids[0])
        with pytest.raises(JobConflictError, match="no jobs of kind counting"):
            await jobs.resume(ids[0])
    async with place.opened() as (_, jobs):
        with_counting(jobs)
        await jobs.resume(ids[0])
        done = (await jobs.table.get(ids[0])).done
        assert 0 < done < COUNT, "it goes on where it was"


async def test_each_kind_begins_what_is_due_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begin_at_once(monkeypatch)
    async with Place().opened() as (store, jobs):
        kind = with_counting(jobs)
        await jobs.close()
        again = Jobs(store, Place().provider, Place().settings, exclusive=True)
        again.kinds = (kind,)
        await again.start()
        async with asyncio.timeout(60):
            while kind.begun < 3:
                await asyncio.sleep(0.001)
        await again.close()


def test_the_row_of_a_rotation_is_as_it_was_before_there_were_kinds() -> None:
    job = Job("job-00000000000000000001-00000000", "t", 1, 1)
    assert msgspec.json.decode(msgspec.json.encode(job)).keys() == {"id", "thread", "created_ns", "updated_ns"}
