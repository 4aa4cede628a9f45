"""What starts by itself, and the end of old keys: only when nothing needs them any more."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from minikms.api.errors import SealedError, refusal
from progressdb_server.config import RotationSection
from progressdb_server.jobs.rotation import Due
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import Job
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Write
from progressdb_server.store.model import StoreUnavailableError
from tests.harness.logged import capture_logs
from tests.progressdb_server.jobs.rotating import (
    Gate,
    Place,
    backups_of,
    begin_at_once,
    chunks_of,
    mapped,
    register,
    write,
)
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import TickingClock, disk, messages_of

DAY_NS = 86_400 * 1_000_000_000


async def rotated(jobs: Jobs, thread: str = "t", destroy_after_s: int = 0) -> Job:
    job = await jobs.wait((await jobs.rotation.rotate(thread, destroy_after_s=destroy_after_s)).id)
    assert job.state == "done"
    return job


async def test_an_old_key_is_destroyed_with_its_backups_when_due_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row of another job is read for it."""
    place = Place()
    async with place.opened() as (store, jobs):
        messages = await write(store, 10)
        job = await rotated(jobs, destroy_after_s=86_400)
        monkeypatch.setattr(store.rekeying, "job_rows", None)
        await jobs.destruction.begin()
        assert place.keys.destroyed == set()
        assert len(backups_of(store, job)) == 11
        place.clock.now += DAY_NS
        await jobs.destruction.begin()
        assert place.keys.destroyed == {job.old_key}
        after = await jobs.table.get(job.id)
        assert (after.destroyed_ns > 0, after.destroy_at_ns, after.backups) == (True, 0, 0)
        assert backups_of(store, job) == {}
        assert await messages_of(store, "t") == messages


@pytest.mark.parametrize("raw", [b"{", b'{"id":"\xff"}', b'{"":' + b"[" * 100_000], ids=["cut", "no UTF-8", "nested"])
async def test_no_old_key_is_destroyed_while_a_row_is_damaged(raw: bytes) -> None:
    """It may be one of the thread, with backups under the key."""
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 1)
        job = await rotated(jobs, destroy_after_s=1)
        damaged = store.rekeying.new_job_id(place.clock.now)
        await store.writer.commit(Write(((keyspace.job(damaged), raw),)))
        assert [one.id async for page in jobs.table.pages() for one in page] == [job.id]
        place.clock.now += DAY_NS
        await jobs.destruction.begin()
        assert place.keys.destroyed == set()
        assert (await jobs.table.get(job.id)).destroy_waits_for == f"the row of job {damaged} is damaged"
        await store.writer.commit(Write(((keyspace.job(damaged), None),)))
        await jobs.destruction.begin()
        assert place.keys.destroyed == {job.old_key}


async def test_after_a_cancelled_rotation_the_next_one_ends_both_older_keys() -> None:
    place = Place()
    with chunks_of(2):
        async with place.opened() as (store, jobs):
            messages = await write(store, 30)
            gate = Gate(place.keys, 3)
            first = await jobs.rotation.rotate("t")
            await gate.reached.wait()
            await jobs.cancel(first.id)
            gate.open()
            second = await rotated(jobs, destroy_after_s=60)
            place.clock.now += DAY_NS
            await jobs.destruction.begin()
            assert place.keys.destroyed == {first.old_key, second.old_key}
            assert backups_of(store, first) == backups_of(store, second) == {}
            assert await messages_of(store, "t") == messages


async def test_a_restored_backup_keeps_the_old_key_for_good() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        messages = await write(store, 5)
        job = await rotated(jobs, destroy_after_s=60)
        await jobs.rotation.restore(job.id)
        place.clock.now += DAY_NS
        await jobs.destruction.begin()
        assert place.keys.destroyed == set()
        assert await messages_of(store, "t") == messages


async def test_a_record_under_the_old_key_keeps_it_and_the_job_says_so() -> None:
    """Put back by a hand that no job knows of: the second census finds it."""
    place = Place()
    async with place.opened() as (store, jobs):
        messages = await write(store, 5)
        job = await rotated(jobs, destroy_after_s=60)
        (key, raw), *_ = backups_of(store, job).items()
        disk(store).write([(key.encode(), raw)])
        place.clock.now += DAY_NS
        await jobs.destruction.begin()
        assert place.keys.destroyed == set()
        assert "1 records are under it" in (await jobs.table.get(job.id)).destroy_waits_for
        assert len(backups_of(store, job)) == 6, "nor were the backups touched"
        assert await messages_of(store, "t") == messages


async def test_a_store_backup_older_than_the_census_keeps_the_old_key() -> None:
    """Once the backup is gone, the key is destroyed."""
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 5)
        known = await register(store, "/backups/one", place.clock())
        job = await rotated(jobs, destroy_after_s=60)
        place.clock.now += DAY_NS
        for _ in range(2):
            await jobs.destruction.begin()
            assert place.keys.destroyed == set()
        assert "/backups/one is older" in (await jobs.table.get(job.id)).destroy_waits_for
        await register(store, "/backups/two", place.clock())  # after the census: it holds nothing under the key
        await store.writer.commit(Write([(known, None)]))
        await jobs.destruction.begin()
        assert place.keys.destroyed == {job.old_key}


async def test_a_backup_that_is_not_found_still_counts(tmp_path: Path) -> None:
    """The job says how to forget it."""
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 5)
        (tmp_path / "monday").mkdir()
        await register(store, str(tmp_path / "monday"), place.clock())
        job = await rotated(jobs, destroy_after_s=60)
        place.clock.now += DAY_NS
        await jobs.destruction.begin()
        assert "monday is older" in (why := (await jobs.table.get(job.id)).destroy_waits_for)
        assert "forget" not in why
        (tmp_path / "monday").rmdir()
        await jobs.destruction.begin()
        assert place.keys.destroyed == set()
        assert (await jobs.table.get(job.id)).destroy_waits_for.endswith("progressdb backup forget monday")
        await store.backups.forget("monday")
        await jobs.destruction.begin()
        assert place.keys.destroyed == {job.old_key}


async def test_a_clock_set_back_makes_no_backup_look_newer_than_the_census() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 5)
        await register(store, "/backups/one", place.clock.now + 9 * DAY_NS)
        job = await rotated(jobs, destroy_after_s=60)
        place.clock.now += DAY_NS
        for _ in range(2):
            await jobs.destruction.begin()
        assert place.keys.destroyed == set()
        assert "/backups/one is older" in (await jobs.table.get(job.id)).destroy_waits_for


async def test_a_key_that_cannot_be_destroyed_delays_no_other_key_or_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the role `destroy` is kept from the server: keys that are worn are rotated all the same."""
    place = Place(settings=RotationSection(max_age="3650d", records_per_second=0))
    begin_at_once(monkeypatch)
    async with place.opened() as (store, jobs):
        for thread in ("a", "b", "worn"):
            await write(store, 2, thread)
        kept, gone = await rotated(jobs, "a", destroy_after_s=60), await rotated(jobs, "b", destroy_after_s=60)
        real = place.keys.destroy_key

        async def destroy(key_id: str, **given: Any) -> api.DestroyKeyAnswer:
            if key_id == kept.old_key:
                raise refusal("forbidden", "not you")
            return await real(key_id, **given)

        place.keys.destroy_key = destroy  # type: ignore[method-assign]  # the policy
        worn = mapped(store, "worn")
        place.keys.created_at = {worn: "2000-01-01T00:00:00Z"}
        place.clock.now += DAY_NS
        async with asyncio.timeout(60):
            while mapped(store, "worn") == worn or not place.keys.destroyed:
                await asyncio.sleep(0.01)
        assert place.keys.destroyed == {gone.old_key}
        assert (await jobs.table.get(kept.id)).destroy_waits_for == "the key service refused (forbidden)"


async def test_a_defect_in_what_is_done_by_itself_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(settings=RotationSection(max_age="3650d", records_per_second=0))
    begin_at_once(monkeypatch)
    async with place.opened() as (store, jobs):
        await write(store, 1)
        worn = mapped(store)
        place.keys.created_at = {worn: "2000-01-01T00:00:00Z"}

        async def broken() -> None:
            raise KeyError("private text")

        monkeypatch.setattr(jobs.destruction, "begin", broken)
        with capture_logs() as logs:
            async with asyncio.timeout(60):
                while mapped(store) == worn:
                    await asyncio.sleep(0.01)
        assert [line["error"] for line in logs if line["event"] == "jobs_tick_broken"][:1] == ["KeyError"]
        assert "private" not in str(logs)
        assert jobs.overdue == {"KeyDestruction": "internal error"}
        monkeypatch.undo()
        async with asyncio.timeout(60):
            while jobs.overdue:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("away", [SealedError("sealed"), StoreUnavailableError("the disk is full")], ids=repr)
async def test_work_that_waits_for_the_store_or_the_key_service_is_no_fault(
    away: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place()
    begin_at_once(monkeypatch)
    async with place.opened() as (_, jobs):

        async def waits() -> None:
            raise away

        monkeypatch.setattr(jobs.destruction, "begin", waits)
        async with asyncio.timeout(60):
            while not jobs.overdue:
                await asyncio.sleep(0.01)
        assert jobs.overdue == {"KeyDestruction": ""}


async def test_a_job_that_was_restored_after_it_was_found_due_keeps_its_key() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        for thread in ("a", "b"):
            await write(store, 3, thread)
        first, second = await rotated(jobs, "a", destroy_after_s=60), await rotated(jobs, "b", destroy_after_s=60)
        place.clock.now += DAY_NS
        real = place.keys.destroy_key

        async def destroy(key_id: str, **given: Any) -> api.DestroyKeyAnswer:
            await jobs.rotation.drop_backups(second.id)  # so that nothing is put back, and the census finds nothing
            await jobs.rotation.restore(second.id)
            return await real(key_id, **given)

        place.keys.destroy_key = destroy  # type: ignore[method-assign]  # an operator is faster
        await jobs.destruction.begin()
        assert place.keys.destroyed == {first.old_key}
        assert (await jobs.table.get(second.id)).destroy_at_ns == 0


async def test_a_key_of_another_purpose_is_never_destroyed() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 5)
        job = await rotated(jobs, destroy_after_s=60)
        place.keys.retired.discard(job.old_key)  # somebody has use for it
        place.clock.now += DAY_NS
        await jobs.destruction.begin()
        assert place.keys.destroyed == set()
        assert "is active" in (await jobs.table.get(job.id)).destroy_waits_for


async def test_backups_go_when_told_to_and_only_those_of_that_job() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        messages = await write(store, 5)
        first, second = await rotated(jobs), await rotated(jobs)
        assert await jobs.rotation.drop_backups(first.id) == 6
        assert await jobs.rotation.drop_backups(first.id) == 0
        assert ((await jobs.table.get(first.id)).backups, (await jobs.table.get(second.id)).backups) == (0, 6)
        assert len(backups_of(store, second)) == 6
        assert await messages_of(store, "t") == messages


async def test_a_resumption_that_the_disk_stored_and_reported_failed_is_done() -> None:
    """Or the job would hold its thread without working, until the next start."""
    place = Place()
    engine = place.engine
    assert isinstance(engine, MemoryEngine)
    with chunks_of(2):
        async with place.opened() as (store, jobs):
            await write(store, 10)
            place.keys.delay_s = 0.01
            job = await jobs.rotation.rotate("t")
            await jobs.pause(job.id)
            engine.fail_sync = engine.survives = True
            with pytest.raises(StoreUnavailableError):
                await jobs.resume(job.id)
            async with asyncio.timeout(60):
                while (await jobs.table.get(job.id)).state != "done":
                    await asyncio.sleep(0.01)


# --- by itself ----------------------------------------------------------------------------------------------------
async def settled(jobs: Jobs) -> list[Job]:
    found = [job async for page in jobs.table.pages() for job in page]
    return [await jobs.wait(job.id) for job in found]


async def test_keys_that_are_too_old_or_too_much_used_are_rotated_and_no_others() -> None:
    place = Place(
        settings=RotationSection(max_age="90d", max_uses=4, destroy_old_after="30d", records_per_second=0),
        clock=TickingClock(now=1_790_000_000_000_000_000),
    )
    async with place.opened() as (store, jobs):
        keys = {}
        for thread, records in (("old", 1), ("used", 4), ("fresh", 3)):
            await write(store, records, thread)
            keys[thread] = mapped(store, thread)
        place.keys.created_at = dict.fromkeys(keys.values(), "2026-09-20T00:00:00Z")
        place.keys.created_at[keys["old"]] = "2026-06-01T00:00:00.5Z"
        place.keys.born = "2026-09-30T00:00:00Z"
        await jobs.rotation.begin()
        done = await settled(jobs)
        assert {(job.thread, job.trigger, job.state) for job in done} == {
            ("old", "max_age", "done"),
            ("used", "max_uses", "done"),
        }
        assert mapped(store, "fresh") == keys["fresh"]
        assert all(job.destroy_at_ns for job in done)
        await jobs.rotation.begin()
        assert len(await settled(jobs)) == 2, "a rotated key is not due, though the old records are under it"


async def test_only_a_threads_current_key_counts() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 1)
        stray = (await place.keys.create_dek_for_thread("t")).key_id
        place.keys.created_at = {stray: "2020-01-01T00:00:00Z"}
        assert [
            thread async for thread, _ in jobs.rotation.due_threads(Due(age_s=2 * 365 * 86_400), place.clock())
        ] == []


async def test_rows_of_long_ago_are_removed_and_those_with_backups_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    begin_at_once(monkeypatch)
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 2)
        first, second = await rotated(jobs), await rotated(jobs)
        await jobs.rotation.drop_backups(first.id)
        place.clock.now += 100 * DAY_NS
        async with asyncio.timeout(60):
            while [job.id async for page in jobs.table.pages() for job in page] != [second.id]:
                await asyncio.sleep(0.01)
        assert disk(store).get(keyspace.key_map("t")) == second.new_key.encode()
