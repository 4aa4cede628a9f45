"""Jobs of several servers on one database: one of them works on a thread at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from progressdb_server.jobs import runner
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import JobConflictError
from progressdb_server.kms.provider import key_pages
from progressdb_server.store import claims, keyspace
from progressdb_server.store.conditions import Write
from progressdb_server.store.conversations import Conversations
from progressdb_server.store.model import BackupExistsError, StaleRowError
from tests.progressdb_server.jobs.rotating import UNBOUNDED, Gate, chunks_of, keys_of_records, write
from tests.progressdb_server.store.opened_store import TickingClock, messages_of, servers
from tests.progressdb_server.store.sealing_provider import SealingProvider

Body = Callable[[list[Conversations], list[Jobs], SealingProvider], Awaitable[None]]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease ends within a second, and other servers look at once."""
    monkeypatch.setattr(claims, "LEASE_S", 1)
    monkeypatch.setattr(claims, "RENEW_S", 0.1)
    monkeypatch.setattr(runner, "ADOPT_S", 0.05)


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


def with_two(url: str, body: Body) -> None:
    async def run() -> None:
        provider = SealingProvider()
        async with servers(url, provider, 0, 0) as stores, started(stores, provider) as jobs:
            with chunks_of(4):
                await body(stores, jobs, provider)

    asyncio.run(run())


async def ended(store: Conversations, provider: SealingProvider, old: str) -> None:
    """The rotation is done, once: every record is under the new key, and the old one is retired."""
    key = await store.key_of_thread("t")
    assert key not in (None, old)
    assert set((await keys_of_records(store)).values()) == {key}
    active = [one.key_id async for page in key_pages(provider, thread_id="t", state="active") for one in page.keys]
    assert active == [key]


def _taken_over(thread: str) -> Write:
    return Write(((keyspace.claim(thread), b"another-1-"),))


def test_a_rotation_asked_of_two_servers_is_one_job(database: str) -> None:
    async def body(stores: list[Conversations], jobs: list[Jobs], provider: SealingProvider) -> None:
        sent = await write(stores[0], 20)
        old = await stores[0].key_of_thread("t") or ""
        begun = [await server.rotation.rotate("t") for server in jobs]
        assert begun[0].id == begun[1].id
        assert (await jobs[0].wait(begun[0].id)).state == "done"
        await ended(stores[1], provider, old)
        assert await messages_of(stores[1], "t") == sent
        again = await jobs[1].rotation.rotate("t")
        assert again.id != begun[0].id
        assert (await jobs[1].wait(again.id)).state == "done"

    with_two(database, body)


def test_a_job_of_a_server_that_is_gone_is_continued_by_another(database: str) -> None:
    async def body(stores: list[Conversations], jobs: list[Jobs], provider: SealingProvider) -> None:
        await write(stores[0], 20)
        old = await stores[0].key_of_thread("t") or ""
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

    with_two(database, body)


def test_a_server_that_has_lost_its_claim_changes_nothing(database: str) -> None:
    async def body(stores: list[Conversations], jobs: list[Jobs], provider: SealingProvider) -> None:
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

    with_two(database, body)


def test_a_job_paused_at_one_server_is_resumed_at_another(database: str) -> None:
    async def body(stores: list[Conversations], jobs: list[Jobs], provider: SealingProvider) -> None:
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

    with_two(database, body)


def test_an_old_key_waits_for_the_registered_backups_of_the_database(database: str) -> None:
    """Without any, nobody knows what the backups need. Whichever server is asked."""

    async def body(stores: list[Conversations], jobs: list[Jobs], provider: SealingProvider) -> None:
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
        await stores[1].register_backup("old", before)
        await kept("progressdb backup forget old")
        with pytest.raises(BackupExistsError):
            await stores[0].register_backup("old")
        await stores[0].register_backup("new", stores[0].clock.now_ns() + 10**12)
        await kept("progressdb backup forget old")
        await stores[0].forget_backup("old")
        assert [known.name async for page in stores[1].backups() for known in page] == ["new"]
        await jobs[1].destruction.begin()
        assert provider.destroyed == {job.old_key}

    with_two(database, body)
