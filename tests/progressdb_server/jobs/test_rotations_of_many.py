"""One job rotates the keys of many threads: it queues few at a time, goes on after a kill, and repeats nothing."""

import asyncio
from collections import Counter

import pytest

from minikms import api
from minikms.api.errors import refusal
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs import many, runner
from progressdb_server.jobs.rotation import Due
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import ALL_THREADS, Job, JobConflictError
from tests.progressdb_server.jobs.rotating import Gate, Place, mapped, write
from tests.progressdb_server.store.opened_store import TickingClock

THREADS = [f"t{n:02}" for n in range(12)]


async def all_jobs(jobs: Jobs) -> list[Job]:
    return [job async for page in jobs.table.pages() for job in page]


async def filled(store: Conversations) -> None:
    for thread in THREADS:
        await write(store, 1, thread)


@pytest.fixture(autouse=True)
def few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "AHEAD_MAX", 4)
    monkeypatch.setattr(many, "PROGRESS_S", 0.0)
    monkeypatch.setattr(runner, "WAITING_MAX", 3)


def test_a_walk_rotates_every_thread_and_queues_a_few_at_a_time() -> None:
    place = Place()
    unfinished: list[int] = []
    at_work: list[int] = []

    async def body(store: Conversations, jobs: Jobs) -> None:
        await filled(store)
        before = {thread: mapped(store, thread) for thread in THREADS}
        real = place.keys.reencrypt_batch

        async def counted(*given: object, **named: object) -> object:
            rotations = [job for job in await all_jobs(jobs) if job.kind == "rotation"]
            unfinished.append(sum(job.unfinished for job in rotations))
            at_work.append(sum(job.state == "running" for job in rotations))
            return await real(*given, **named)  # type: ignore[arg-type]  # passed on

        place.keys.reencrypt_batch = counted  # type: ignore[method-assign,assignment]  # the hook
        walk = await jobs.wait((await jobs.many.rotate(Due())).id)
        assert (walk.state, walk.thread, walk.done, walk.total) == ("done", ALL_THREADS, 12, 12)
        assert not any(mapped(store, thread) == before[thread] for thread in THREADS)
        assert max(unfinished) <= 4 + 1
        assert max(at_work) == runner.RUNNING_MAX

    place.run(body)


async def test_a_walk_that_was_interrupted_goes_on_and_repeats_nothing() -> None:
    place = Place()

    async with place.opened() as (store, jobs):
        await filled(store)
        await jobs.many.rotate(Due())
    for _ in range(3):
        async with place.opened() as (store, jobs):
            count = place.keys.calls["check_batch"]
            while place.keys.calls["check_batch"] < count + 2 and (await all_jobs(jobs))[0].unfinished:
                await asyncio.sleep(0)
    async with place.opened() as (store, jobs):
        walk, *rotations = await all_jobs(jobs)
        assert len(rotations) < len(THREADS), "it was interrupted"
        again = await jobs.many.rotate(Due())
        assert again.id == walk.id
        assert (await jobs.wait(walk.id)).done == len(THREADS)
        _, *rotations = await all_jobs(jobs)
        assert Counter(job.thread for job in rotations) == dict.fromkeys(THREADS, 1)
        assert {(job.trigger, job.state) for job in rotations} == {(walk.id, "done")}


async def test_a_walk_that_failed_tries_only_the_failed_threads_again() -> None:
    place = Place()

    async with place.opened() as (store, jobs):
        await filled(store)
        gate = Gate(place.keys, 0)
        paused = await jobs.rotation.rotate(THREADS[0])
        await gate.reached.wait()
        await jobs.pause(paused.id)
        gate.open()
        failed = await jobs.wait((await jobs.many.rotate(Due())).id)
        assert (failed.state, failed.done, failed.failed) == ("failed", 11, 1)
        assert failed.reason == "1 threads are not rotated: progressdb jobs list"
        await jobs.cancel(paused.id)
        await jobs.resume(failed.id)
        done = await jobs.wait(failed.id)
        assert (done.state, done.done, done.failed) == ("done", 12, 0)
        assert Counter(job.thread for job in await all_jobs(jobs) if job.trigger == done.id) == Counter(THREADS)


async def test_another_walk_is_refused_while_one_is_unfinished() -> None:
    place = Place()

    async with place.opened() as (store, jobs):
        await filled(store)
        walk = await jobs.many.rotate(Due())
        assert (await jobs.pause(walk.id)).state == "paused"
        assert (await jobs.many.rotate(Due())).id == walk.id
        with pytest.raises(JobConflictError, match=f"{walk.id} rotates other threads"):
            await jobs.many.rotate(Due(age_s=1))
        await jobs.cancel(walk.id)
        assert (await jobs.many.rotate(Due(age_s=1))).id != walk.id


@pytest.mark.parametrize(
    ("due", "rotated"), [(Due(age_s=90 * 86_400), THREADS[:3]), (Due(kek_version=1), THREADS), (Due(kek_version=7), [])]
)
async def test_a_walk_over_keys_rotates_those_that_are_due(due: Due, rotated: list[str]) -> None:
    place = Place(clock=TickingClock(now=1_790_000_000_000_000_000))

    async with place.opened() as (store, jobs):
        await filled(store)
        place.keys.created_at = {mapped(store, thread): "2026-06-01T00:00:00Z" for thread in THREADS[:3]}
        place.keys.born = "2026-09-20T00:00:00Z"
        walk = await jobs.wait((await jobs.many.rotate(due)).id)
        assert (walk.state, walk.done) == ("done", len(rotated))
        assert [job.thread for job in (await all_jobs(jobs))[1:]] == rotated


def test_a_rotation_costs_as_many_calls_among_many_threads_as_among_few() -> None:
    calls: list[Counter[str]] = []
    for count in (2, 40):
        place = Place()

        async def body(store: Conversations, jobs: Jobs, place: Place = place, count: int = count) -> None:
            for number in range(count):
                await write(store, 1, f"t{number}")
            place.keys.calls.clear()
            assert (await jobs.wait((await jobs.many.rotate(Due())).id)).done == count
            calls.append(place.keys.calls)

        place.run(body)
    few, many = calls
    assert {verb: number * 20 for verb, number in few.items()} == many


async def test_a_walk_that_may_not_list_keys_fails_with_the_reason() -> None:
    place = Place()

    async with place.opened() as (_store, jobs):

        async def listed(*given: object, **named: object) -> api.KeyListAnswer:
            raise refusal("forbidden", "not you")

        place.keys.list_keys = listed  # type: ignore[method-assign]  # the policy
        walk = await jobs.wait((await jobs.many.rotate(Due(age_s=1))).id)
        assert (walk.state, walk.reason) == ("failed", "the key service refused (forbidden)")
