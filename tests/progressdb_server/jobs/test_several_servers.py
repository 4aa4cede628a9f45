"""Jobs of several servers on one database: one of them works on a thread at a time."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg
import msgspec
import pytest

from progressdb_server.config import Retention
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs import runner
from progressdb_server.jobs.rotation import Due
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import Job, JobConflictError, JobNotFoundError, ThreadBusyError, changed, move
from progressdb_server.jobs.table import JobTable
from progressdb_server.kms.provider import key_pages
from progressdb_server.store import claims, keyspace
from progressdb_server.store.conditions import Write
from progressdb_server.store.model import (
    BackupExistsError,
    BackupOfDatabaseError,
    RecordUnreadableError,
    StaleRowError,
    StoreUnavailableError,
)
from progressdb_server.store.postgres.engine import PostgresEngine
from tests.progressdb_server.jobs.rotating import UNBOUNDED, Gate, chunks_of, keys_of_records, write
from tests.progressdb_server.store.opened_store import TickingClock, messages_of, servers
from tests.progressdb_server.store.sealing_provider import SealingProvider

Body = Callable[[list[Conversations], list[Jobs], SealingProvider], Awaitable[None]]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease ends within a second, and other servers look at once."""
    monkeypatch.setattr(claims, "CLAIM_S", 1)
    monkeypatch.setattr(claims, "RENEW_S", 0.1)
    monkeypatch.setattr(runner, "ADOPT_S", 0.05)
    monkeypatch.setattr(runner, "SHARED_READ_S", 0.05)
    monkeypatch.setattr(runner, "READ_RETRY_S", 0.05)


@pytest.fixture
def long_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "CLAIM_S", 10_000)


@asynccontextmanager
async def started(stores: list[Conversations], provider: SealingProvider) -> AsyncIterator[list[Jobs]]:
    made = [Jobs(store, provider, UNBOUNDED, exclusive=False, now_ns=store.clock.now_ns) for store in stores]
    keeping = [asyncio.ensure_future(store.claims.keep()) for store in stores]
    try:
        for jobs in made:
            await jobs.start()
        yield made
    finally:
        for jobs in made:
            await jobs.close()
        for task in keeping:
            task.cancel()


@asynccontextmanager
async def two_servers(url: str) -> AsyncIterator[tuple[list[Conversations], list[Jobs], SealingProvider]]:
    provider = SealingProvider()
    async with servers(url, provider, 0, 0) as stores, started(stores, provider) as jobs:
        with chunks_of(4):
            yield stores, jobs, provider


async def ended(store: Conversations, provider: SealingProvider, old: str) -> None:
    """The rotation is done, once: every record is under the new key, and the old one is retired."""
    key = await store.rekeying.key_of_thread("t")
    assert key not in (None, old)
    assert set((await keys_of_records(store)).values()) == {key}
    active = [one.key_id async for page in key_pages(provider, thread_id="t", state="active") for one in page.keys]
    assert active == [key]


def _taken_over(thread: str, job_id: str = "") -> Write:
    """By a server whose claims hold."""
    claim = (keyspace.claim(thread), b"another-1-" + job_id.encode())
    return Write((claim, (keyspace.server("another"), b"%d" % (time.time_ns() + 10**12))))


async def _ends(jobs: Jobs, job_id: str) -> Job:
    """The job tells its end before its thread is free."""
    async with asyncio.timeout(20):
        job = await jobs.wait(job_id)
        while jobs.has_job(job.thread):
            await asyncio.sleep(0.01)
        return job


async def test_a_rotation_asked_of_two_servers_is_one_job(database: str) -> None:
    async with two_servers(database) as (stores, jobs, provider):
        sent = await write(stores[0], 20)
        old = await stores[0].rekeying.key_of_thread("t") or ""
        gate = Gate(provider, 0)
        begun = [await server.rotation.rotate("t") for server in jobs]
        assert begun[0].id == begun[1].id
        gate.open()
        assert (await jobs[0].wait(begun[0].id)).state == "done"
        async with asyncio.timeout(20):
            while await stores[1].claims.job_of("t"):
                await asyncio.sleep(0.01)
        await ended(stores[1], provider, old)
        assert await messages_of(stores[1], "t") == sent
        again = await jobs[1].rotation.rotate("t")
        assert again.id != begun[0].id
        assert (await jobs[1].wait(again.id)).state == "done"


async def test_a_job_of_a_server_that_is_gone_is_continued_by_another(database: str) -> None:
    """Neither of them leaves an entry of its own."""
    async with two_servers(database) as (stores, jobs, provider):
        await write(stores[0], 20)
        old = await stores[0].rekeying.key_of_thread("t") or ""
        gate = Gate(provider, 2)
        job = await jobs[0].rotation.rotate("t")
        await gate.reached.wait()
        with pytest.raises(JobConflictError, match="unfinished"):
            async with jobs[1].alone(job):
                pass

        async def hangs() -> None:
            await asyncio.Event().wait()

        stores[0].claims.renew = hangs  # type: ignore[method-assign]  # as if its process had stopped
        async with asyncio.timeout(60):
            while not await stores[1].claims.holds("t"):
                await asyncio.sleep(0.02)
        gate.open()
        async with asyncio.timeout(60):
            while (await jobs[1].table.get(job.id)).state != "done":
                await asyncio.sleep(0.02)
        await ended(stores[1], provider, old)
        async with asyncio.timeout(60):
            while await _leases(database):
                await asyncio.sleep(0.02)


async def test_a_walk_of_a_server_that_is_gone_is_continued_by_another(database: str) -> None:
    async with two_servers(database) as (stores, jobs, provider):
        threads = [f"t{number}" for number in range(6)]
        for thread in threads:
            await write(stores[0], 1, thread)
        gate = Gate(provider, 3)
        walk = await jobs[0].many.rotate(Due())
        assert (await jobs[1].many.rotate(Due())).id == walk.id
        await gate.reached.wait()
        await jobs[0].close()
        gate.open()
        async with asyncio.timeout(60):
            while (found := await jobs[1].table.get(walk.id)).state != "done":
                await asyncio.sleep(0.02)
        assert (found.done, found.failed) == (6, 0)
        rotated = [job.thread async for page in jobs[1].table.pages() for job in page if job.trigger == walk.id]
        assert sorted(rotated) == threads, "each once"


@pytest.mark.usefixtures("long_leases")
async def test_the_entry_that_a_killed_server_left_is_removed(database: str) -> None:
    """Without a claim, which another server would take over; also a damaged one. That of a server that runs stays."""
    async with servers(database, SealingProvider(), 0, 0) as (one, two):
        left = {"killed": b"1", "damaged": b"?", "later": b"9" * 5000}
        await one.writer.commit(Write([(keyspace.server(name), value) for name, value in left.items()]))
        assert await one.claims.claim("t", "job-1", "")
        await two.start()
        async with asyncio.timeout(20):
            while await _leases(database) != 1:
                await asyncio.sleep(0.02)
        assert not await two.claims.claim("t", "job-2", "job-1")


async def test_a_claim_waits_for_the_release_of_the_one_before_it(database: str) -> None:
    """The store still has the former claim when its release begins."""
    async with servers(database, SealingProvider(), 0) as (one,):
        assert await one.claims.claim("t", "job-1", "")
        released = asyncio.ensure_future(one.claims.release("t"))
        await asyncio.sleep(0)
        assert not released.done() and await one.claims.claim("t", "job-2", "job-1")
        assert await one.claims.job_of("t") == "job-2"


async def _leases(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        found = await connection.fetchval("SELECT count(*) FROM store_entry WHERE key >= 'server:' AND key < 'server;'")
        return int(found)
    finally:
        await connection.close()


@pytest.mark.usefixtures("long_leases")
async def test_a_server_that_has_lost_its_claim_changes_nothing(database: str) -> None:
    async with two_servers(database) as (stores, jobs, provider):
        await write(stores[0], 20)
        gate = Gate(provider, 0)
        job = await jobs[0].rotation.rotate("t")
        await gate.reached.wait()
        row = await jobs[0].table.row(job.id)
        await stores[1].writer.commit(_taken_over("t"))
        with pytest.raises(StaleRowError):
            await jobs[0].table.store(row, row.job)
        assert await jobs[0].table.row(job.id) == row
        gate.open()


async def test_a_lease_from_a_clock_that_was_set_back_since_holds_no_thread(database: str) -> None:
    async with two_servers(database) as (stores, _, _):
        await stores[0].writer.commit(_taken_over("u", "job-1"))
        assert await stores[1].claims.claim("u", "job-2", "job-1")


async def test_a_job_paused_at_one_server_is_resumed_at_another(database: str) -> None:
    async with two_servers(database) as (stores, jobs, provider):
        await write(stores[0], 20)
        gate = Gate(provider, 1)
        job = await jobs[0].rotation.rotate("t")
        await gate.reached.wait()
        assert (await jobs[1].pause(job.id)).state == "paused"
        gate.open()
        async with asyncio.timeout(60):
            while await stores[0].reads.get(keyspace.claim("t")) != b"--" + job.id.encode():
                await asyncio.sleep(0.02)
        await jobs[1].resume(job.id)
        assert (await jobs[1].wait(job.id)).state == "done"


def looks_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From when on each read of rows reads them."""
    looks: list[int] = []
    real = JobTable.pages

    def pages(table: JobTable, *, since_ns: int = 0) -> AsyncIterator[list[Job]]:
        looks.append(since_ns)
        return real(table, since_ns=since_ns)

    monkeypatch.setattr(JobTable, "pages", pages)
    return looks


async def test_an_old_key_waits_for_the_registered_backups_of_the_database(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any, nobody knows what the backups need. Whichever server is asked."""
    async with two_servers(database) as (stores, jobs, provider):
        await write(stores[0], 5)
        before = stores[0].clock.now_ns()
        job = await jobs[0].rotation.rotate("t", destroy_after_s=1)
        assert (await jobs[0].wait(job.id)).state == "done"
        for store in stores:
            assert isinstance(store.clock.now_ns, TickingClock)
            store.clock.now_ns.now += 10**12

        async def kept(why: str) -> None:
            async with asyncio.timeout(60):  # the thread is released after its job has ended
                while why not in (await jobs[1].table.get(job.id)).destroy_waits_for:
                    for one in jobs:
                        await one.destruction.begin()
            assert provider.destroyed == set()

        await kept("no backup of the database is registered")
        with pytest.raises(BackupOfDatabaseError):
            await stores[1].backups.back_up("/nowhere")
        await stores[1].backups.register("old", before)
        await kept("progressdb backup forget old")
        with pytest.raises(BackupExistsError):
            await stores[0].backups.register("old")
        await stores[0].backups.register("new", stores[0].clock.now_ns() + 10**12)
        await kept("progressdb backup forget old")
        await stores[0].backups.forget("old")
        assert [known.name async for known in stores[1].backups.registered()] == ["new"]
        with monkeypatch.context() as patched:
            looks = looks_of(patched)
            await jobs[1].destruction.begin()
        assert looks and min(looks) > 0, "all rows are read"
        assert provider.destroyed == {job.old_key}


@pytest.mark.parametrize("thread", ["other", "t"])
async def test_a_forged_row_destroys_no_key_that_a_backup_needs(database: str, thread: str) -> None:
    """Whoever writes into the database makes the row of a job with an early census: of another thread than the key's,
    or of its own."""
    async with two_servers(database) as (stores, jobs, provider):
        (one, _), (runs, _) = stores, jobs
        await write(one, 5)
        await write(one, 1, "other")
        began = await runs.rotation.rotate("t")
        await one.backups.register("monday", one.clock.now_ns())
        provider.created_at[provider.keys_of("t")[0]] = "2027-06-01T00:00:00Z"  # the new key
        job = await runs.wait(began.id)
        assert isinstance(one.clock.now_ns, TickingClock)
        one.clock.now_ns.now += 365 * 86_400 * 10**9
        forged = Job(
            one.rekeying.new_job_id(one.clock.now_ns()), thread, 1, 1, state="done", old_key=job.old_key,
            sources=(job.old_key,), destroy_at_ns=1, census_ns=1,
        )  # fmt: skip
        await one.writer.commit(Write([(keyspace.job(forged.id), msgspec.json.encode(forged))]))
        async for _ in runs.table.pages():
            pass
        await runs.destruction.begin()
        assert provider.destroyed == set()
        waits = (await runs.table.get(forged.id)).destroy_waits_for
        assert ("not listed among those of the thread" if thread == "other" else "monday is older") in waits
        assert len(await messages_of(one, "t")) == 5


async def test_a_destruction_that_was_interrupted_goes_on(database: str) -> None:
    """One of its keys is destroyed already, and no longer listed."""
    async with two_servers(database) as (stores, jobs, provider):
        (one, _), (runs, _) = stores, jobs
        await write(one, 5)
        await runs.wait((await runs.rotation.rotate("t")).id)
        first = (await runs.table.get(max([job.id async for page in runs.table.pages() for job in page]))).old_key
        job = await runs.wait((await runs.rotation.rotate("t", destroy_after_s=1)).id)
        both = changed(job, sources=(first, job.old_key))
        await runs.table.change(job.id, lambda _: both)
        await one.backups.register("old", one.clock.now_ns())
        assert isinstance(one.clock.now_ns, TickingClock)
        one.clock.now_ns.now += 10**12

        async def until(condition: Callable[[Job], bool]) -> None:
            async with asyncio.timeout(60):
                while not condition(await runs.table.get(job.id)):
                    for server in jobs:  # the thread is the other's for a while, where this one was slow
                        await server.destruction.begin()

        await until(lambda now: now.census_ns > 0)
        await provider.destroy_key(first)
        await one.backups.register("new", one.clock.now_ns() + 10**13)
        await one.backups.forget("old")
        await until(lambda now: now.destroyed_ns > 0)
        assert provider.destroyed == {first, job.old_key}


async def test_a_job_without_a_claim_is_continued(database: str) -> None:
    """As after `store copy`. A paused one still has its thread."""
    provider = SealingProvider()
    async with servers(database, provider, 0, 0) as stores:
        jobs = Jobs(stores[0], provider, UNBOUNDED, exclusive=False)
        for thread in ("t", "u"):
            await write(stores[0], 5, thread)
        queued = Job(stores[0].rekeying.new_job_id(1), "t", 1, 1, kind="rotation", keying=True)
        paused = Job(stores[0].rekeying.new_job_id(1), "u", 1, 1, kind="rotation", state="paused")
        for job in (queued, paused):
            await jobs.table.add(job)
        async with started(stores, provider) as made:
            assert (await _ends(made[1], queued.id)).state == "done"
            async with asyncio.timeout(20):
                while await stores[0].reads.get(keyspace.claim("u")) != b"--" + paused.id.encode():
                    await asyncio.sleep(0.02)
            assert (await made[0].rotation.rotate("u")).id == paused.id


async def test_rows_of_jobs_that_ended_long_ago_are_not_read_again(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old one that was paused still is: another server may resume it, and die."""
    provider = SealingProvider()
    async with servers(database, provider, 0) as stores:
        jobs = Jobs(stores[0], provider, UNBOUNDED, exclusive=False)
        await write(stores[0], 5)
        paused = Job(stores[0].rekeying.new_job_id(1), "t", 1, 1, kind="rotation", state="paused", keying=True)
        await jobs.table.add(paused)
        looks = looks_of(monkeypatch)
        async with started(stores, provider) as made:
            async with asyncio.timeout(20):
                while len(looks) < 5:
                    await asyncio.sleep(0.02)
            assert looks[:2] == [0, 0], "of the start, and of the first look"
            assert min(looks[2:]) > 1
            await jobs.table.change(paused.id, lambda job: move(job, "resume"))
            assert (await _ends(made[0], paused.id)).state == "done"


async def test_a_job_whose_beginning_was_not_confirmed_is_continued(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_servers(database) as (stores, jobs, _):
        await write(stores[0], 5)
        real, added = jobs[0].table.add, []

        async def add(job: Job) -> None:
            await real(job)
            added.append(job.id)
            raise StoreUnavailableError("not confirmed")

        monkeypatch.setattr(jobs[0].table, "add", add)
        with pytest.raises(StoreUnavailableError, match="not confirmed"):
            await jobs[0].rotation.rotate("t")
        assert (await _ends(jobs[1], added[0])).state == "done"
        assert [job.id async for page in jobs[1].table.pages() for job in page] == added


async def test_each_server_sees_the_end_of_a_job_of_another(database: str) -> None:
    async with two_servers(database) as (stores, jobs, provider):
        await write(stores[0], 5)
        gate = Gate(provider, 0)
        job = await jobs[0].rotation.rotate("t")
        await gate.reached.wait()
        waiting = asyncio.ensure_future(_ends(jobs[1], job.id))
        await asyncio.sleep(0.1)
        gate.open()
        assert (await waiting).state == "done"


@pytest.mark.usefixtures("long_leases")
async def test_an_order_without_the_claim_is_answered(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queued job whose thread another server has claimed meanwhile; the next order is one of any other server."""
    async with two_servers(database) as (stores, jobs, _):
        await write(stores[0], 5)
        monkeypatch.setattr(runner, "RUNNING_MAX", 0)
        job = await jobs[0].rotation.rotate("t", later=True)
        await stores[1].writer.commit(_taken_over("t", job.id))
        async with asyncio.timeout(20):
            with pytest.raises(ThreadBusyError):
                await jobs[0].cancel(job.id)
            assert not jobs[0].has_job("t")
            assert (await jobs[0].cancel(job.id)).state == "cancelled"


@pytest.mark.usefixtures("long_leases")
async def test_other_work_that_loses_its_claim_is_refused(database: str) -> None:
    async with two_servers(database) as (stores, jobs, _):
        await write(stores[0], 5)
        job = await jobs[0].rotation.rotate("t")
        await _ends(jobs[0], job.id)
        row = await jobs[0].table.row(job.id)
        for change in (
            lambda: jobs[0].table.change(job.id, lambda now: now),
            lambda: jobs[0].table.store(row, row.job),
        ):
            with pytest.raises(ThreadBusyError):
                async with jobs[0].alone(job):
                    await stores[1].writer.commit(_taken_over("t"))
                    await change()
            await stores[1].writer.commit(Write(((keyspace.claim("t"), None),)))
        assert await jobs[0].table.row(job.id) == row


def _fails_once(jobs: Jobs, error: Exception, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """The next read of a row by its id fails; the event is set then."""
    real, met = jobs.table.get, asyncio.Event()

    async def get(job_id: str) -> Job:
        if not met.is_set():
            met.set()
            raise error
        return await real(job_id)

    monkeypatch.setattr(jobs.table, "get", get)
    return met


@pytest.mark.parametrize("keying", [True, False])
async def test_a_failed_read_strands_no_job(database: str, keying: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_servers(database) as (stores, jobs, _):
        await write(stores[0], 5)
        met = _fails_once(jobs[0], StoreUnavailableError("one read"), monkeypatch)
        job = await jobs[0].add(jobs[0].rotation, "t", keying=keying)
        async with asyncio.timeout(20):
            await met.wait()
        assert (await _ends(jobs[1], job.id)).state == "done"


async def test_a_row_removed_while_it_is_adopted_stops_no_adoption(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = SealingProvider()
    async with servers(database, provider, 0) as stores, started(stores, provider) as jobs:
        await write(stores[0], 5)
        met = _fails_once(jobs[0], JobNotFoundError(), monkeypatch)
        job = Job(stores[0].rekeying.new_job_id(stores[0].clock.now_ns()), "t", 1, 1, kind="rotation", keying=True)
        await jobs[0].table.add(job)
        async with asyncio.timeout(20):
            await met.wait()
        assert (await _ends(jobs[0], job.id)).state == "done"


async def test_a_damaged_row_or_claim_delays_no_other_job(database: str) -> None:
    provider = SealingProvider()
    async with servers(database, provider, 0) as stores, started(stores, provider) as jobs:
        for thread in ("t", "u"):
            await write(stores[0], 5, thread)
        now_ns = stores[0].clock.now_ns()
        of_t, of_u, *broken = (stores[0].rekeying.new_job_id(now_ns - number) for number in range(4))
        of_another = b'{"id":"another","thread":"t","created_ns":1,"updated_ns":1}'
        damaged = dict(zip(broken, (b"{", of_another), strict=True))
        left = [(keyspace.job(job_id), raw) for job_id, raw in damaged.items()]
        await stores[0].writer.commit(Write([*left, (keyspace.claim("u"), b"?")]))
        for job_id, thread in ((of_u, "u"), (of_t, "t")):
            await jobs[0].table.add(Job(job_id, thread, 1, 1, kind="rotation", keying=True))
        assert (await _ends(jobs[0], of_t)).state == "done"
        assert (await jobs[0].table.get(of_u)).state == "queued"
        for job_id, raw in damaged.items():
            with pytest.raises(RecordUnreadableError, match=job_id):
                await jobs[0].table.get(job_id)
            assert await stores[0].rekeying.job_row(job_id) == raw


async def _not_released(store: Conversations, thread: str) -> None:
    """As when the store is not available for a moment."""

    def commit(write: Write) -> asyncio.Future[None]:
        raise StoreUnavailableError("not written")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store.writer, "commit", commit)
        await store.claims.release(thread)


async def test_a_server_takes_its_own_claim_that_it_could_not_release(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CLAIM_S", "RENEW_S"):  # else it ends its claims, which nothing needs any more
        monkeypatch.setattr(claims, name, 10_000)
    async with two_servers(database) as (stores, _, _):
        mine = stores[0].claims
        assert await mine.claim("u", "job-1", "")
        await _not_released(stores[0], "u")
        await mine.renew()
        assert not await stores[1].claims.claim("u", "job-2", "job-1")
        assert await mine.claim("u", "job-2", "job-1")


async def test_a_job_that_another_server_ended_is_found_while_it_has_backups(database: str) -> None:
    async with two_servers(database) as (stores, jobs, _):
        now_ns = stores[0].clock.now_ns()
        begun = [Job(stores[0].rekeying.new_job_id(now_ns + number), "t", 1, 1, state="failed") for number in range(2)]
        for job in begun:
            await jobs[0].table.add(job)
        assert await jobs[1].table.with_backups("t") == []
        for job, backups in zip(begun, (0, 3), strict=True):
            row = await jobs[0].table.row(job.id)
            await jobs[0].table.store(row, changed(job, state="done", backups=backups))
        for _ in range(2):
            assert await jobs[1].table.with_backups("t") == [begun[1].id]


@pytest.mark.usefixtures("long_leases")
async def test_a_failed_release_is_repeated_while_the_server_works_on(database: str) -> None:
    async with two_servers(database) as (stores, _, _):
        mine, other = (store.claims for store in stores)
        for thread in ("u", "v"):
            assert await mine.claim(thread, "job-1", "")
        await _not_released(stores[0], "u")
        async with asyncio.timeout(20):
            while not await other.claim("u", "job-2", ""):
                await asyncio.sleep(0.02)
        assert not await other.claim("v", "job-2", "job-1")


async def test_a_server_that_stops_while_it_renews_its_lease_has_none(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked, go_on = PostgresEngine.now_ns, asyncio.Event(), asyncio.Event()

    async def now_ns(engine: PostgresEngine) -> int:
        asked.set()
        await go_on.wait()
        return await real(engine)

    async with servers(database, SealingProvider(), 0) as (store,):
        assert await store.claims.claim("t", "job-1", "")
        monkeypatch.setattr(PostgresEngine, "now_ns", now_ns)
        renewing = asyncio.ensure_future(store.claims.renew())
        await asked.wait()
        await store.claims.stop()
        go_on.set()
        await renewing
        assert not await _leases(database)


async def test_a_server_that_stops_ends_all_its_claims_at_once(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "CLAIM_S", 10_000)
    async with two_servers(database) as (stores, jobs, provider):
        await write(stores[0], 5)
        gate = Gate(provider, 0)
        job = await jobs[0].rotation.rotate("t")
        await gate.reached.wait()
        before = await stores[0].reads.get(keyspace.claim("t"))
        with monkeypatch.context() as patched:
            patched.setattr(stores[1].claims, "claim", lambda *_: asyncio.sleep(0, False))
            await jobs[0].close()
            assert await stores[1].reads.get(keyspace.claim("t")) == before
        gate.open()
        assert (await _ends(jobs[1], job.id)).state == "done"


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_purge_knows_the_jobs_of_the_thread_that_have_ended(database: str, cancelled: bool) -> None:
    """It destroys the key of a rotation that left nothing else, and a purge that was cancelled is not begun again."""
    retention, provider = Retention(deleted_after="1d", rotation_backups_after="never"), SealingProvider()
    async with servers(database, provider, 0) as [store]:
        clock = TickingClock(store.clock.now_ns())
        jobs = Jobs(store, provider, UNBOUNDED, retention, exclusive=False, now_ns=clock)
        await write(store, 3)
        rotation = await _ends(jobs, (await jobs.rotation.rotate("t")).id)
        await jobs.rotation.drop_backups(rotation.id)
        await store.threads.delete("t", author="ann", by="ann")
        clock.now += 2 * 86_400 * 10**9
        provider.holds = {"list_keys"} if cancelled else set()
        begun = await jobs.add(jobs.purge, "t")
        if cancelled:
            await jobs.cancel(begun.id)
            provider.holds = set()
            provider.go_on.set()
            await jobs.purge.begin()
            rows = [job async for page in jobs.table.pages() for job in page if job.kind == "purge"]
            assert [(job.id, job.state) for job in rows] == [(begun.id, "cancelled")]
            assert not provider.destroyed
        else:
            job = await _ends(jobs, begun.id)
            assert (job.state, job.reason) == ("done", "")
            assert provider.destroyed == {*provider.keys_of("t", active=False)}
        await jobs.close()
