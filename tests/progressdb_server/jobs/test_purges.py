"""A thread that was deleted long ago is purged: its keys, its records, and what names it. A kill at any point only
delays it, and nobody who writes the store can make it happen to another thread."""

import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api.errors import KmsUnavailableError, refusal
from progressdb_server.config import Retention
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs import purge
from progressdb_server.jobs.service import KEEP_ALL, Jobs, OldRows
from progressdb_server.jobs.states import Job
from progressdb_server.store import keyspace, record
from progressdb_server.store.check import Checker
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import NewMessage, StoreUnavailableError, ThreadNotFoundError
from progressdb_server.store.offline import LocalView
from tests.progressdb_server.jobs.rotating import UNBOUNDED, Gate, Place, backups_of, register, write
from tests.progressdb_server.jobs.test_rotations_of_many import all_jobs
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import TickingClock, becomes, disk, keys_of, messages_of, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

DAY_NS = 86_400 * 10**9
RETENTION = Retention(deleted_after="30d", rotation_backups_after="7d")


class DyingEngine(MemoryEngine):
    """Takes no write from the nth one on, or from after it, until it is opened again."""

    left = 0
    after = False
    dead = False

    def write(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None:
        if self.dead:
            raise EngineUnavailableError
        self.left -= 1
        self.dead = not self.left
        if self.dead and not self.after:
            raise EngineUnavailableError
        super().write(puts)


class DyingProvider(SealingProvider):
    """Takes no order from the nth one on, or from after it."""

    left = 0
    after = False
    dead = False

    async def _answer(self, verb: str) -> None:
        if verb in ("retire_key", "destroy_key"):
            self.left -= 1
            self.dead = self.dead or not self.left
            if self.dead and not (self.after and not self.left):
                raise KmsUnavailableError("killed")
        await super()._answer(verb)


async def deleted(store: Conversations, jobs: Jobs, place: Place) -> None:
    """The thread `gone` with versions, members and backups of two rotations, 31 days ago; `stays` is in use."""
    for thread in ("gone", "stays"):
        first, second, _ = await write(store, 3, thread)
        await store.messages.update(first.id, author="ann", body="edited", role=None, reply_to=None)
        await store.messages.set_reaction(second.id, "bob", "+1")
        await store.messages.create(NewMessage(author="bob", thread=thread, body="hello"))
        for _ in range(2):
            await jobs.wait((await jobs.rotation.rotate(thread)).id)
    await store.threads.delete("gone", author="ann", by="ann")
    place.clock.now += 31 * DAY_NS
    await write(store, 1, "stays")


def rows_of(jobs: Jobs) -> OldRows:
    (rows,) = [kind for kind in jobs.kinds if isinstance(kind, OldRows)]
    return rows


async def purged(jobs: Jobs) -> Job:
    await jobs.purge.begin()
    found = [job for job in await all_jobs(jobs) if job.kind == "purge"]
    return await jobs.wait(found[-1].id)


async def check_gone(store: Conversations, place: Place, strays: Collection[str] = ()) -> None:
    names = [key for key in await keys_of(store) if not key.startswith(("job:", "server:", "claim:"))]
    assert not [key for key in names if "gone" in key]
    assert place.keys.destroyed == {*place.keys.keys_of("gone", active=False)} - {*strays}
    assert [message.author for message in await messages_of(store, "stays")] == ["ann"] * 3 + ["bob", "ann"]
    assert await store.stats() == {"threads": 1, "messages": 7}
    with pytest.raises(ThreadNotFoundError):
        await store.threads.get("gone")


@pytest.mark.usefixtures("both_engines")
async def test_a_thread_that_was_deleted_long_ago_is_purged_with_a_receipt() -> None:
    place = Place(retention=RETENTION)

    async with opened(None, place.provider, place.clock) as store:
        given = store, place.provider, UNBOUNDED, RETENTION
        jobs = Jobs(*given, exclusive=False, now_ns=place.clock, boot_ns=place.clock)
        await jobs.start()
        await deleted(store, jobs, place)
        stray = (await place.keys.create_dek_for_thread("gone")).key_id  # of another store, perhaps
        await register(store, "/backups/b1", 1)
        job = await purged(jobs)
        assert (job.state, job.thread, job.done, job.total, job.reason) == ("done", "gone", 8, 8, "")
        assert set(job.sources) == place.keys.destroyed
        words = ["keys destroyed", *job.sources, "; backups of the store that may hold records: b1"]
        assert all(word in job.receipt for word in words), job.receipt
        await check_gone(store, place, [stray])
        await jobs.purge.begin()
        assert [one.id for one in await all_jobs(jobs) if one.kind == "purge"] == [job.id]
        await write(store, 1, "gone")
        assert (await store.threads.get("gone")).author == "ann"
        await jobs.close()


async def test_a_thread_stays_while_it_is_not_deleted_for_so_long() -> None:
    place = Place(retention=RETENTION)

    async with place.opened() as (store, jobs):
        await deleted(store, jobs, place)
        place.clock.now -= 2 * DAY_NS
        await jobs.purge.begin()
        assert not [job for job in await all_jobs(jobs) if job.kind == "purge"]
        assert (await store.threads.get("gone")).deleted


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_is_set_forward_ends_no_wait_for_a_day(restarted: bool) -> None:
    """Set while the server runs, or before its start: later than the newest record by more than a day."""
    boot = TickingClock(5 * DAY_NS)
    place = Place(retention=RETENTION, boot=boot)

    async def fill(store: Conversations, jobs: Jobs) -> None:
        await write(store, 1, "gone")
        await store.threads.delete("gone", author="ann", by="ann")
        if not restarted:
            place.clock.now += 31 * DAY_NS
            await wait(store, jobs)

    async def wait(store: Conversations, jobs: Jobs) -> None:
        await write(store, 1, "stays")
        await jobs.purge.begin()
        assert await all_jobs(jobs) == []
        boot.now += DAY_NS
        place.clock.now += DAY_NS
        assert (await purged(jobs)).state == "done"

    place.run(fill)
    if restarted:
        place.clock.now += 31 * DAY_NS
        place.run(wait)


@pytest.mark.parametrize("seen", [False, True])
def test_a_restart_neither_ends_nor_renews_the_day_of_a_clock(seen: bool) -> None:
    """Set while the server runs, before a new record; `seen`: a look at it comes before the restart. Only time in which
    the server runs counts.
    """
    boot = TickingClock(5 * DAY_NS)
    place = Place(retention=RETENTION, boot=boot)

    def pass_(days: float) -> None:
        boot.now += int(days * DAY_NS)
        place.clock.now += int(days * DAY_NS)

    async def jump(store: Conversations, jobs: Jobs) -> None:
        await write(store, 1, "gone")
        await store.threads.delete("gone", author="ann", by="ann")
        await jobs.purge.begin()
        place.clock.now += 31 * DAY_NS
        await write(store, 1, "stays")
        if seen:
            await jobs.purge.begin()

    async def wait(_: Conversations, jobs: Jobs) -> None:
        for days in (0, 0.375):
            pass_(days)
            await jobs.purge.begin()
            assert await all_jobs(jobs) == []

    async def end(store: Conversations, jobs: Jobs) -> None:
        await wait(store, jobs)
        pass_(0.25)
        assert (await purged(jobs)).state == "done"

    place.run(jump)
    place.run(wait)
    place.clock.now += int(0.75 * DAY_NS)  # set forward once more, while the server is down
    place.run(end)


def is_killed(what: str, number: int, *, after: bool) -> bool:
    """Whether the purge came so far: it was killed then, and went on."""
    engine, provider = DyingEngine(), DyingProvider()
    place = Place(engine=engine, provider=provider, retention=RETENTION)
    dying = engine if what == "write" else provider

    async def begin(store: Conversations, jobs: Jobs) -> None:
        await deleted(store, jobs, place)
        dying.left, dying.after = number, after
        with contextlib.suppress(StoreUnavailableError):
            await jobs.purge.begin()
        await becomes(lambda: dying.dead or not jobs.has_job("gone"))

    async def go_on(store: Conversations, jobs: Jobs) -> None:
        begun = [job for job in await all_jobs(jobs) if job.kind == "purge"] or [await purged(jobs)]
        job = await jobs.wait(begun[-1].id)
        assert (job.state, job.reason, job.done) == ("done", "", 8)
        assert set(job.sources) == place.keys.destroyed
        assert all(key in job.receipt for key in job.sources)
        await check_gone(store, place)
        assert [found async for found in Checker(LocalView(disk(store)), provider).run()] == []

    place.run(begin)
    died, dying.dead, dying.left = dying.dead, False, 0
    place.run(go_on)
    return died


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("what", "least"), [("write", 10), ("order", 3)])
def test_a_purge_that_is_killed_at_any_step_goes_on(
    what: str, least: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each write of the store, and each order to the key service."""
    monkeypatch.setattr(purge, "CHUNK_RECORDS", 2)
    number = 1
    while is_killed(what, number, after=after):
        number += 1
    assert number > least


async def undeleted(store: Conversations) -> None:
    """A row of the index, and a header, say that a thread was deleted, its sealed records do not."""
    key = keyspace.meta("stays")
    raw = await store.reads.get(key)
    assert raw is not None
    header, sealed = record.unpack_thread(raw)
    forged = record.pack(msgspec.structs.replace(header, deleted_ns=1), sealed)
    await store.writer.commit(Write([(key, forged), (keyspace.closed_key("stays"), b"")]))


async def younger(store: Conversations) -> None:
    """The header says that the deletion is older than the event of it says."""
    await store.threads.delete("stays", author="ann", by="ann")
    await undeleted(store)


async def under_two_keys(store: Conversations) -> None:
    """The key of the metadata is said to be a destroyed one."""
    key = keyspace.meta("gone")
    raw = await store.reads.get(key) or b""
    head, sealed = record.split(raw)
    await store.writer.commit(Write([(key, record.rekey(raw[0], head, "k_0") + sealed)]))


async def lost_message(store: Conversations) -> None:
    found = await store.reads.keys(keyspace.messages("gone"), keyspace.after(keyspace.messages("gone")), limit=1)
    await store.writer.commit(Write([(found[0], None)]))


@pytest.mark.parametrize(
    ("forge", "thread", "reason"),
    [
        (undeleted, "stays", "the metadata of thread stays is malformed"),
        (younger, "stays", "was not deleted so long ago"),
        (under_two_keys, "gone", "under two keys"),
        (lost_message, "gone", "is missing"),
    ],
)
async def test_a_purge_without_proof_destroys_nothing(
    forge: Callable[[Conversations], Awaitable[None]], thread: str, reason: str
) -> None:
    place = Place(retention=RETENTION)

    async with place.opened() as (store, jobs):
        await deleted(store, jobs, place)
        await forge(store)
        await jobs.purge.begin()
        (job,) = [one for one in await all_jobs(jobs) if (one.kind, one.thread) == ("purge", thread)]
        job = await jobs.wait(job.id)
        assert job.state == "failed"
        assert reason in job.reason
        assert not {key for key in place.keys.destroyed if place.keys.keys[key][0] == thread}
        before = len(await all_jobs(jobs))
        await jobs.purge.begin()
        assert len(await all_jobs(jobs)) == before, "it is not tried again by itself"


async def test_a_forged_header_does_not_destroy_the_key_of_another_store() -> None:
    """On a shared key service, where that store has a thread of the same name."""
    place = Place(retention=RETENTION, exclusive=False)

    async with place.opened() as (store, jobs):
        await deleted(store, jobs, place)
        other = (await place.keys.create_dek_for_thread("gone")).key_id
        prefix = keyspace.messages("gone")
        key, *_ = await store.reads.keys(prefix, keyspace.after(prefix), limit=1)
        raw = await store.reads.get(key) or b""
        head, sealed = record.split(raw)
        await store.writer.commit(Write([(key, record.rekey(raw[0], head, other) + sealed)]))
        job = await purged(jobs)
        assert (job.state, place.keys.destroyed) == ("failed", set())
        assert f"the key {other} is not destroyed" in job.reason


class Unlisting(SealingProvider):
    """Its lists leave out the keys that it can't read, as those of the key service."""

    unread: Collection[str] = ()
    code = "key_unreadable"

    async def list_keys(self, **asked: Any) -> api.KeyListAnswer:
        page = await super().list_keys(**asked)
        return msgspec.structs.replace(page, keys=[key for key in page.keys if key.key_id not in self.unread])

    async def get_key(self, key_id: str) -> api.KeyAnswer:
        if key_id in self.unread:
            raise refusal(self.code, "it is not read")
        return await super().get_key(key_id)


@pytest.mark.parametrize("code", ["key_unreadable", "key_not_found"])
@pytest.mark.parametrize("all_keys", [False, True])
def test_a_key_that_is_not_listed_is_not_taken_for_destroyed(code: str, all_keys: bool) -> None:
    provider = Unlisting()
    place = Place(provider=provider, retention=RETENTION)

    async def body(store: Conversations, jobs: Jobs) -> None:
        await deleted(store, jobs, place)
        keys = provider.keys_of("gone", active=False)
        provider.unread, provider.code = keys if all_keys else keys[:1], code
        if code == "key_not_found" and not all_keys:
            return  # of an old key, that is believed: it may have been destroyed before the key service restarted
        stored = [key for key in await keys_of(store) if not key.startswith(("job:", "store:clock"))]
        job = await purged(jobs)
        assert (job.state, provider.destroyed, job.receipt) == ("failed", set(), "")
        assert f"whether the key {keys[-1 if all_keys else 0]} is destroyed is not known" in job.reason
        assert [key for key in await keys_of(store) if not key.startswith(("job:", "store:clock"))] == stored
        provider.unread = ()
        await jobs.resume(job.id)
        assert (await jobs.wait(job.id)).state == "done"
        await check_gone(store, place)

    place.run(body)


async def test_a_key_that_is_made_after_the_keys_went_does_not_stop_a_purge() -> None:
    """As by a create of the same name between a kill and the restart; the walk of orphaned keys retires it."""
    place = Place(retention=RETENTION)

    async with place.opened() as (store, jobs):
        await deleted(store, jobs, place)
        place.keys.destroyed.update(place.keys.keys_of("gone", active=False))
        late = (await place.keys.create_dek_for_thread("gone")).key_id
        job = await purged(jobs)
        assert (job.state, job.reason) == ("done", "")
        assert late not in place.keys.destroyed
        with pytest.raises(ThreadNotFoundError):
            await store.threads.get("gone")


async def test_a_purge_that_is_cancelled_while_others_are_queued_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(retention=RETENTION)

    async with place.opened() as (store, jobs):
        await deleted(store, jobs, place)
        place.keys.holds = {"decrypt_batch"}
        job = await jobs.add(jobs.purge, "gone")
        await becomes(lambda: place.keys.held > 0)

        async def cancels() -> None:
            await jobs.cancel(job.id)

        monkeypatch.setattr(jobs, "place", cancels)
        await jobs.purge.begin()
        assert [one.id for one in await all_jobs(jobs) if one.kind == "purge"] == [job.id]


async def test_a_purge_that_was_begun_ends_when_the_setting_is_never() -> None:
    place = Place(retention=RETENTION)

    async with place.opened() as (store, jobs):
        await deleted(store, jobs, place)
        place.keys.down = True
        await jobs.add(jobs.purge, "gone")
    place.keys.down = False
    place.retention = KEEP_ALL
    async with place.opened() as (store, jobs):
        (job,) = [job for job in await all_jobs(jobs) if job.kind == "purge"]
        failed = await jobs.wait(job.id)
        assert (failed.state, place.keys.destroyed) == ("failed", set())
        assert failed.reason.startswith("retention.deleted_after is never")


async def test_backups_of_rotations_that_are_done_are_removed_by_age() -> None:
    place = Place(retention=RETENTION)

    async with place.opened() as (store, jobs):
        await write(store, 3)
        done = await jobs.wait((await jobs.rotation.rotate("t")).id)
        place.clock.now += 3 * DAY_NS
        gate = Gate(place.keys, 0)
        stopped = await jobs.rotation.rotate("t")
        await gate.reached.wait()
        await jobs.cancel(stopped.id)
        for days, kept in ((3, 4), (2, 0)):
            place.clock.now += days * DAY_NS
            await rows_of(jobs).begin()
            assert (await jobs.table.get(done.id)).backups == len(backups_of(store, done)) == kept
