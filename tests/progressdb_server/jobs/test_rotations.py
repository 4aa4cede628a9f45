"""What may happen around a rotation, each as a sentence: nothing acknowledged is lost, none is there twice."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from minikms import api
from minikms.api.errors import KmsRefusedError, KmsUnavailableError, refusal
from minikms.client import ReencryptItem
from progressdb_server.jobs import runner
from progressdb_server.jobs.states import JobConflictError
from progressdb_server.store import keyspace
from progressdb_server.store.check import Checker
from progressdb_server.store.conditions import Write
from progressdb_server.store.model import NewMessage, StoreUnavailableError, ThreadNotFoundError
from progressdb_server.store.offline import LocalView
from tests.harness.logged import capture_logs
from tests.progressdb_server.jobs.rotating import (
    Gate,
    Place,
    backups_of,
    check,
    chunks_of,
    keys_of_records,
    mapped,
    record_key,
    write,
)
from tests.progressdb_server.store.opened_store import disk, messages_of
from tests.progressdb_server.store.sealing_provider import SealingProvider


async def test_a_rotation_moves_every_record_and_the_metadata_and_keeps_what_was() -> None:
    place = Place()
    with chunks_of(8):
        async with place.opened() as (store, jobs):
            messages = await write(store, 50)
            before = {key: disk(store).get(key.encode()) for key in await keys_of_records(store)}
            old = mapped(store)
            begun = await jobs.rotation.rotate("t")
            assert begun.new_key == mapped(store) != old
            job = await jobs.wait(begun.id)
            assert (job.state, job.done, job.total, job.failed, job.verified) == ("done", 51, 51, 0, 51)
            assert (job.old_key, job.new_key, job.sources) == (old, mapped(store), (old,))
            assert backups_of(store, job) == before
            await check(store, place.keys, messages)
            assert (await store.threads.get("t")).title == "New Thread #1"
            assert [finding async for finding in Checker(LocalView(disk(store)), place.keys).run()] == []


async def test_a_rotation_never_asks_for_plaintext() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 50)
        place.keys.calls.clear()
        job = await jobs.wait((await jobs.rotation.rotate("t")).id)
        assert (job.state, job.verified) == ("done", 51)
        assert place.keys.calls.keys() <= {"create", "reencrypt_batch", "check_batch", "list_keys"}


async def test_a_record_damaged_after_its_reencryption_is_found_and_named() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        messages = await write(store, 20)
        key = record_key(messages[4].id)
        check_batch = place.keys.check_batch

        async def damage_first(*args: Any, **named: Any) -> list[KmsRefusedError | None]:
            place.keys.check_batch = check_batch  # type: ignore[method-assign]  # once is enough
            raise KmsUnavailableError("for now")

        place.keys.check_batch = damage_first  # type: ignore[method-assign]  # the hook: the verification has begun
        begun = await jobs.rotation.rotate("t")
        while place.keys.check_batch != check_batch:
            await asyncio.sleep(0)
        raw = disk(store).get(key)
        assert raw is not None
        disk(store).write([(key, raw[:-1] + bytes([raw[-1] ^ 1]))])
        job = await jobs.wait(begun.id)
        assert (job.state, job.reason) == ("failed", "1 records do not open under the new key")
        assert [(failure.key, failure.code) for failure in job.failures] == [(key.decode(), "decryption_failed")]


async def test_a_thread_that_nobody_knows_is_refused() -> None:
    async with Place().opened() as (_, jobs):
        with pytest.raises(ThreadNotFoundError):
            await jobs.rotation.rotate("nobody")


async def test_after_a_cancel_half_way_both_keys_are_readable() -> None:
    """A second rotation moves the rest."""
    place = Place()
    with chunks_of(8):
        async with place.opened() as (store, jobs):
            messages = await write(store, 40)
            gate = Gate(place.keys, 3)
            first = await jobs.rotation.rotate("t")
            await gate.reached.wait()
            assert (await jobs.cancel(first.id)).state == "cancelled"
            gate.open()
            under = await keys_of_records(store)
            assert set(under.values()) == {first.old_key, first.new_key}
            assert place.keys.keys_of("t") == [first.new_key]
            assert await messages_of(store, "t") == messages
            cancelled = await jobs.table.get(first.id)
            assert len(backups_of(store, cancelled)) == cancelled.done == list(under.values()).count(first.new_key)

            second = await jobs.wait((await jobs.rotation.rotate("t")).id)
            assert second.state == "done"
            assert set(second.sources) == {first.old_key, first.new_key}
            await check(store, place.keys, messages)
            with pytest.raises(JobConflictError, match="cancelled can't be resumed"):
                await jobs.resume(first.id)


async def test_a_pause_stops_the_work_and_a_resume_goes_on_where_it_was() -> None:
    place = Place()
    with chunks_of(8):
        async with place.opened() as (store, jobs):
            messages = await write(store, 80)
            gate = Gate(place.keys, 2)
            begun = await jobs.rotation.rotate("t")
            await gate.reached.wait()
            while (await jobs.table.get(begun.id)).done < 16:
                await asyncio.sleep(0.001)
            paused = await jobs.pause(begun.id)
            gate.open()
            assert (paused.state, paused.done) == ("paused", 16)
            assert (await jobs.rotation.rotate("t")).id == begun.id, "the paused job keeps its thread"
            await asyncio.sleep(0.02)
            assert await jobs.table.get(begun.id) == paused
            await jobs.resume(begun.id)
            job = await jobs.wait(begun.id)
            assert (job.state, job.done, len(backups_of(store, job))) == ("done", 81, 81)
            await check(store, place.keys, messages)


async def test_a_paused_job_stays_paused_over_a_restart_and_others_go_on() -> None:
    place = Place()
    ids: list[str] = []

    with chunks_of(8):
        async with place.opened() as (store, jobs):
            for thread in ("t", "u"):
                await write(store, 20, thread)
                gate = Gate(place.keys, 1)
                ids.append((await jobs.rotation.rotate(thread)).id)
                await gate.reached.wait()
            await jobs.pause(ids[0])
        del place.keys.reencrypt_batch  # the gates
        async with place.opened() as (store, jobs):
            assert (await jobs.wait(ids[1])).state == "done"
            assert (await jobs.table.get(ids[0])).state == "paused"
            await jobs.resume(ids[0])
            assert (await jobs.wait(ids[0])).state == "done"
            for thread in ("t", "u"):
                await check(store, place.keys, await messages_of(store, thread), thread)


async def test_restored_backups_open_and_the_next_rotation_moves_them_again() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        messages = await write(store, 20)
        before = {key: disk(store).get(key.encode()) for key in await keys_of_records(store)}
        first = await jobs.wait((await jobs.rotation.rotate("t", destroy_after_s=60)).id)
        assert first.destroy_at_ns
        restored = await jobs.rotation.restore(first.id)
        assert restored == (21, 0)
        assert {key: disk(store).get(key.encode()) for key in before} == before
        assert await messages_of(store, "t") == messages
        assert (await jobs.table.get(first.id)).destroy_at_ns == 0, "the old key is needed again"
        assert (await jobs.wait((await jobs.rotation.rotate("t")).id)).state == "done"
        await check(store, place.keys, messages)


async def test_a_restore_never_brings_an_older_title_back() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 3)
        job = await jobs.wait((await jobs.rotation.rotate("t")).id)
        await store.threads.update("t", author=None, title="edited since")
        assert await jobs.rotation.restore(job.id) == (3, 1)
        assert (await store.threads.get("t")).title == "edited since"


async def test_a_restore_puts_back_what_was_lost_or_damaged() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        messages = await write(store, 3)
        job = await jobs.wait((await jobs.rotation.rotate("t")).id)
        lost, damaged, _ = [key.encode() for key in await keys_of_records(store) if ":msg:" in key]
        disk(store).write([(lost, None), (damaged, b"\x07")])
        assert await jobs.rotation.restore(job.id) == (4, 0)
        assert await messages_of(store, "t") == messages


async def test_a_title_that_is_edited_in_the_middle_stays_edited() -> None:
    place = Place()
    with chunks_of(8):
        async with place.opened() as (store, jobs):
            messages = await write(store, 20)
            gate = Gate(place.keys, 0)  # the metadata is of the first batch: read, and not yet written
            begun = await jobs.rotation.rotate("t")
            await gate.reached.wait()
            await store.threads.update("t", author=None, title="edited in the middle")
            gate.open()
            job = await jobs.wait(begun.id)
            assert (job.state, job.done) == ("done", 20)
            await check(store, place.keys, messages)
            assert (await store.threads.get("t")).title == "edited in the middle"
            assert "thread:t:meta" not in backups_of(store, job)


async def test_a_thread_deleted_during_its_rotation_stays_deleted() -> None:
    """It ends under the new key."""
    place = Place()
    with chunks_of(8):
        async with place.opened() as (store, jobs):
            await write(store, 20)
            gate = Gate(place.keys, 1)
            begun = await jobs.rotation.rotate("t")
            await gate.reached.wait()
            await store.threads.delete("t", author=None, by="ann")
            gate.open()
            assert (await jobs.wait(begun.id)).state == "done"
            assert (await store.threads.get("t")).deleted
            messages = await messages_of(store, "t", include_deleted=True)
            assert len(messages) == 21
            await check(store, place.keys, messages)


async def test_what_is_written_in_the_middle_is_under_the_new_key_and_in_order() -> None:
    place = Place()
    with chunks_of(8):
        async with place.opened() as (store, jobs):
            messages = await write(store, 20)
            place.keys.delay_s = 0.002  # so that writes are being sealed while the key is switched
            sealing = [asyncio.create_task(store.messages.create(NewMessage("ann", "t", body=n))) for n in range(10)]
            await asyncio.sleep(0)
            begun = await jobs.rotation.rotate("t")
            edited = await store.messages.update(messages[3].id, author=None, body="edited", role=None, reply_to=None)
            made = [await task for task in sealing]
            made.append(await store.messages.create(NewMessage("ann", "t", body="last")))
            assert (await jobs.wait(begun.id)).state == "done"
            place.keys.delay_s = 0
            messages[3] = edited
            await check(store, place.keys, [*messages, *sorted(made, key=lambda m: m.ts)])


async def test_a_second_request_joins_the_job_that_is_unfinished() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 10)
        begun = await asyncio.gather(*[jobs.rotation.rotate("t") for _ in range(5)])
        assert len({job.id for job in begun}) == 1
        assert (await jobs.wait(begun[0].id)).state == "done"
        assert len(place.keys.keys) == 2


async def test_a_key_service_that_is_away_only_delays_the_job() -> None:
    place = Place()
    with chunks_of(4):
        async with place.opened() as (store, jobs):
            messages = await write(store, 20)
            place.keys.down = True
            rotating = asyncio.create_task(jobs.rotation.rotate("t"))
            await asyncio.sleep(0.05)
            place.keys.down = False
            begun = await rotating
            assert begun.new_key == mapped(store)
            assert (await jobs.wait(begun.id)).state == "done"
            await check(store, place.keys, messages)


async def test_a_row_that_is_damaged_at_work_or_in_the_queue_delays_no_other_job() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        gate = Gate(place.keys, 0)
        for thread in "tuvw":
            await write(store, 1, thread)
            await jobs.rotation.rotate(thread)
        at_work: list[str] = []
        queued: list[str] = []
        while len(at_work) < runner.RUNNING_MAX or len(queued) < 2:
            await asyncio.sleep(0.001)
            made = [job async for page in jobs.table.pages() for job in page]
            at_work = [job.id for job in made if job.state == "running"]
            queued = [job.id for job in made if job.state == "queued" and not job.keying]
        await store.writer.commit(Write([(keyspace.job(job_id), b"{") for job_id in (at_work[0], queued[0])]))
        gate.open()
        for job_id in (at_work[1], queued[1]):
            assert (await jobs.wait(job_id)).state == "done"


async def test_a_job_that_meets_a_limit_asks_again_when_the_limit_says() -> None:
    """A request that is refused costs the key service as much as one that is not."""

    class Limited(SealingProvider):
        async def reencrypt_batch(
            self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
        ) -> list[bytes | KmsRefusedError]:
            error = refusal("limit_exceeded", "the limit reencrypts_per_hour is used up")
            error.retry_after_s = 1800
            raise error

    place = Place(provider=Limited())
    async with place.opened() as (store, jobs):
        await write(store, 3)
        with capture_logs() as lines:
            begun = await jobs.rotation.rotate("t")
            async with asyncio.timeout(60):
                while not (waits := [line for line in lines if line["event"] == "job_waits"]):
                    await asyncio.sleep(0.001)
        assert [line["retry_s"] for line in waits] == [1800]
        assert (await jobs.pause(begun.id)).state == "paused", "at once, although the job sleeps"


async def test_a_job_that_meets_a_seal_halts_all_encryption() -> None:
    """Until the epoch was judged: after the unseal the key service may be an older one."""

    class Sealed(SealingProvider):
        async def reencrypt_batch(
            self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
        ) -> list[bytes | KmsRefusedError]:
            return [refusal("sealed", "the key service is sealed") for _ in items]

    place = Place(provider=Sealed())
    async with place.opened() as (store, jobs):
        await write(store, 3)
        await jobs.rotation.rotate("t")
        async with asyncio.timeout(60):
            while store.sealer.halted is None:
                await asyncio.sleep(0.001)
        with pytest.raises(StoreUnavailableError, match="is sealed"):
            await write(store, 1)


async def test_a_key_whose_answer_was_lost_is_retired_in_the_end() -> None:
    class Lossy(SealingProvider):
        async def create_dek_for_thread(
            self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
        ) -> api.CreateDekAnswer:
            handle = await super().create_dek_for_thread(thread_id, replaces=replaces)
            if 1 < len(self.keys) < 4:
                raise KmsUnavailableError("the answer was lost")
            return handle

    place = Place(provider=Lossy())
    async with place.opened() as (store, jobs):
        messages = await write(store, 5)
        begun = await jobs.rotation.rotate("t")
        assert (await jobs.wait(begun.id)).state == "done"
        assert len(place.keys.keys) == 4
        await check(store, place.keys, messages)


@pytest.mark.parametrize("exclusive", [True, False])
async def test_a_rotation_retires_foreign_keys_only_where_none_are_expected(exclusive: bool) -> None:
    """On a shared key service a user could name a thread as another program named its own."""
    place = Place(exclusive=exclusive)
    async with place.opened() as (store, jobs):
        foreign = (await place.keys.create_dek_for_thread("t")).key_id
        await write(store, 1)
        begun = await jobs.rotation.rotate("t")
        assert (await jobs.wait(begun.id)).state == "done"
        assert (foreign in place.keys.retired) is exclusive


async def test_the_key_of_a_renewal_beside_the_end_of_a_rotation_stays_active() -> None:
    """The job lists the thread's active keys while a renewal has made its key and the map does not name it yet."""

    class Renewing(SealingProvider):
        """Once `ending` is set, the next list waits for a renewal, whose answer waits for `may_answer`."""

        def __init__(self) -> None:
            super().__init__()
            self.ending: Callable[[], Coroutine[Any, Any, object]] | None = None
            self.ended = ""
            self.renewed: list[str] = []
            self.made, self.may_answer = asyncio.Event(), asyncio.Event()

        async def create_dek_for_thread(
            self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
        ) -> api.CreateDekAnswer:
            made = await super().create_dek_for_thread(thread_id, replaces=replaces)
            if self.ended:
                self.renewed.append(made.key_id)
                self.made.set()
                await self.may_answer.wait()
            return made

        async def list_keys(self, **asked: Any) -> api.KeyListAnswer:
            if self.ending is not None and not self.ended:
                [self.ended] = self.keys_of("t")
                self.retired.add(self.ended)
                self.writing = asyncio.create_task(self.ending())
                await self.made.wait()
            return await super().list_keys(**asked)

    place = Place(provider=Renewing())
    async with place.opened() as (store, jobs):
        provider = place.provider
        assert isinstance(provider, Renewing)
        messages = await write(store, 5)
        provider.ending = lambda: write(store, 1)
        job = await jobs.wait((await jobs.rotation.rotate("t")).id)
        assert (job.state, mapped(store)) == ("done", job.new_key)
        [renewed] = provider.renewed
        assert provider.keys_of("t") == [renewed], "the job has not retired it"
        provider.may_answer.set()
        await provider.writing
        assert mapped(store) == renewed
        assert provider.keys_of("t") == [renewed]
        assert len(await messages_of(store, "t")) == len(messages) + 1


async def test_no_pause_is_taken_while_the_key_is_being_switched() -> None:
    """A restart switches it first."""
    place = Place()

    async with place.opened() as (store, jobs):
        await write(store, 5)
        rotating = asyncio.create_task(jobs.rotation.rotate("t"))
        await asyncio.sleep(0)
        place.keys.down = True
        while place.keys.calls["create"] < 3:
            await asyncio.sleep(0.01)
        (job,) = [job async for page in jobs.table.pages() for job in page]
        assert job.keying
        with pytest.raises(JobConflictError, match="the job is switching"):
            await jobs.pause(job.id)
        with pytest.raises(JobConflictError, match="the job is switching"):
            await jobs.cancel(job.id)
        rotating.cancel()
    place.keys.down = False
    async with place.opened() as (store, jobs):
        (job,) = [job async for page in jobs.table.pages() for job in page]
        assert (await jobs.wait(job.id)).state == "done"
        await check(store, place.keys, await messages_of(store, "t"))


async def test_a_record_that_does_not_open_is_named_and_a_resume_retries_it() -> None:
    place = Place()
    with chunks_of(8):
        async with place.opened() as (store, jobs):
            messages = await write(store, 20)
            broken = [record_key(messages[n].id) for n in (4, 9)]
            whole = [disk(store).get(key) for key in broken]
            assert whole[0] is not None
            disk(store).write([(broken[0], whole[0][:-1] + bytes([whole[0][-1] ^ 1])), (broken[1], b"\x07nonsense")])
            begun = await jobs.rotation.rotate("t")
            failed = await jobs.wait(begun.id)
            assert (failed.state, failed.done, failed.failed) == ("failed", 19, 2)
            assert failed.reason == "2 records could not be re-encrypted"
            assert [(failure.key, failure.code) for failure in failed.failures] == [
                (broken[0].decode(), "decryption_failed"),
                (broken[1].decode(), "malformed"),
            ]
            disk(store).write(list(zip(broken, whole, strict=True)))
            await jobs.resume(begun.id)
            job = await jobs.wait(begun.id)
            assert (job.state, job.done, job.failed, job.failures, job.reason) == ("done", 21, 0, (), "")
            await check(store, place.keys, messages)


async def test_a_missing_source_key_fails_records_a_retired_new_key_the_job() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        await write(store, 4)
        gate = Gate(place.keys, 0)
        begun = await jobs.rotation.rotate("t")
        await gate.reached.wait()
        place.keys.destroyed.add(begun.old_key)
        gate.open()
        failed = await jobs.wait(begun.id)
        assert (failed.state, failed.failed, failed.failures[0].code) == ("failed", 5, "key_destroyed")
        place.keys.destroyed.clear()
        place.keys.retired.add(begun.new_key)
        await jobs.resume(begun.id)
        failed = await jobs.wait(begun.id)
        assert failed.state == "failed"


async def test_a_failed_job_whose_key_was_replaced_since_is_not_resumed() -> None:
    place = Place()
    async with place.opened() as (store, jobs):
        messages = await write(store, 4)
        key = record_key(messages[0].id)
        raw = disk(store).get(key)
        disk(store).write([(key, b"\x07")])
        first = await jobs.wait((await jobs.rotation.rotate("t")).id)
        disk(store).write([(key, raw)])
        assert (await jobs.wait((await jobs.rotation.rotate("t")).id)).state == "done"
        with pytest.raises(JobConflictError, match="later rotation"):
            await jobs.resume(first.id)
        await check(store, place.keys, messages)


async def test_a_disk_that_refuses_a_step_only_delays_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RETRY_S_MIN", 0.01)
    place = Place()
    with chunks_of(8):
        async with place.opened() as (store, jobs):
            messages = await write(store, 30)
            gate = Gate(place.keys, 2)
            begun = await jobs.rotation.rotate("t")
            await gate.reached.wait()
            place.engine.fail_sync = True  # type: ignore[attr-defined]  # of the memory engine
            gate.open()
            job = await jobs.wait(begun.id)
            assert (job.state, job.done, len(backups_of(store, job))) == ("done", 31, 31)
            await check(store, place.keys, messages)
            assert store.metrics.failures == 1
