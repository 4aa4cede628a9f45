"""Retried creates."""

import asyncio

import pytest

from progressdb_server.conversations import whole as conversations
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import idempotency as room
from progressdb_server.store.check import repair
from progressdb_server.store.model import (
    Idempotency,
    IdempotencyConflictError,
    NewMessage,
    RecordUnreadableError,
    StoreUnavailableError,
)
from progressdb_server.store.offline import LocalEntries
from tests.harness.logged import capture_logs
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import (
    TickingClock,
    keys_of,
    messages_of,
    opened,
    threads_of,
    with_store,
)
from tests.progressdb_server.store.sealing_provider import SealingProvider

pytestmark = pytest.mark.usefixtures("both_engines")

RETRY = Idempotency(scope="a-digest-under-a-secret", key="order 66 for ann@example.org")


def new(body: object, thread: str = "") -> NewMessage:
    return NewMessage(author="ann", thread=thread, body=body)


async def test_the_same_key_and_request_give_the_same_message_and_write_nothing() -> None:
    async with opened() as store:
        one = await store.messages.create(new({"a": 1, "b": 2}), idempotency=RETRY)
        again = await store.messages.create(new({"b": 2, "a": 1}), idempotency=RETRY)
        assert again == one
        assert await store.stats() == {"threads": 1, "messages": 1}


async def test_the_first_answer_is_given_again_also_after_an_edit() -> None:
    async with opened() as store:
        one = await store.messages.create(new(1, "t"), idempotency=RETRY)
        await store.messages.update(one.id, author="ann", body="edited", role=None, reply_to=None)
        assert await store.messages.create(new(1, "t"), idempotency=RETRY) == one


async def test_another_request_under_the_same_key_is_a_conflict() -> None:
    async with opened() as store:
        await store.messages.create(new(1), idempotency=RETRY)
        with pytest.raises(IdempotencyConflictError):
            await store.messages.create(new(2), idempotency=RETRY)
        with pytest.raises(IdempotencyConflictError):
            await store.threads.create(author="ann", title="x", idempotency=RETRY)
        other = Idempotency(scope="another scope", key=RETRY.key)
        assert (await store.messages.create(new(2), idempotency=other)).value == 2


async def test_a_retried_thread_is_made_once_and_answered_as_it_was_made() -> None:
    async with opened() as store:
        one = await store.threads.create(author="ann", title="t", idempotency=RETRY)
        assert await store.threads.create(author="ann", title="t", idempotency=RETRY) == one
        assert await threads_of(store, "ann") == [one]
        await store.threads.update(one.id, author="ann", title="later")
        await store.messages.create(NewMessage(author="ann", thread=one.id, body=1))
        assert await store.threads.create(author="ann", title="t", idempotency=RETRY) == one
        await store.threads.delete(one.id, author="ann", by="ann")
        assert await store.threads.create(author="ann", title="t", idempotency=RETRY) == one


async def test_concurrent_retries_make_one_message() -> None:
    async with opened() as store:
        made = await asyncio.gather(*[store.messages.create(new(1, "t"), idempotency=RETRY) for _ in range(20)])
        assert len({message.id for message in made}) == 1
        assert len(await messages_of(store, "t")) == 1


async def test_a_replayed_answer_is_durable_when_it_is_given() -> None:
    """The first attempt may have become visible and then failed to reach the disk."""
    engine = MemoryEngine()
    async with opened(engine) as store:
        await store.messages.create(new(0, "t"))
        engine.fail_sync = True
        engine.survives = True
        with pytest.raises(StoreUnavailableError):
            await store.messages.create(new(1, "t"), idempotency=RETRY)
        while not store.writer.available:
            await asyncio.sleep(0.01)
        engine.survives = False
        assert len(await messages_of(store, "t")) == 2  # it is there, and its author was told that it failed
        synced = engine.syncs
        await store.messages.create(new(1, "t"), idempotency=RETRY)
        assert engine.syncs == synced + 1
        engine.reopen()
        assert len(await messages_of(store, "t")) == 2


async def test_keys_are_remembered_across_a_restart_and_forgotten_after_a_day() -> None:
    engine, provider, clock = MemoryEngine(), SealingProvider(), TickingClock()
    async with opened(engine, provider, clock) as store:
        await store.messages.create(new(1, "t"), idempotency=RETRY)
    async with opened(engine, provider, clock) as store:
        await store.messages.create(new(1, "t"), idempotency=RETRY)
        assert len(await messages_of(store, "t")) == 1
        clock.now += (room.IDEMPOTENCY_AGE_S + 1) * 10**9
        assert await room.sweep(store.reads, store.writer, clock()) == 1
        assert await keys_of(store, "idem:") == []
        await store.messages.create(new(1, "t"), idempotency=RETRY)
        assert len(await messages_of(store, "t")) == 2
        assert await room.sweep(store.reads, store.writer, clock()) == 0


@pytest.mark.parametrize("damage", [b"", b"\xff", b"\x93\xa1m\xc4\x00\xa1x", b"\x93\xa1\xff\xc4\x00\x01"])
def test_a_damaged_entry_stays_and_hinders_no_other(damage: bytes) -> None:
    """A retry that meets it is refused: the first call may have stored something. A repair deletes it."""
    engine, clock = MemoryEngine(), TickingClock()

    async def run(store: Conversations) -> None:
        await store.messages.create(new(1, "t"), idempotency=RETRY)
        [key] = await keys_of(store, "idem:")
        engine.write([(key.encode(), damage)])
        for number in range(5):
            await store.messages.create(new(1, "t"), idempotency=Idempotency(RETRY.scope, str(number)))
        with pytest.raises(RecordUnreadableError, match="malformed"):
            await store.messages.create(new(1, "t"), idempotency=RETRY)
        clock.now += (room.IDEMPOTENCY_AGE_S + 1) * 10**9
        with capture_logs() as logs:
            assert await room.sweep(store.reads, store.writer, clock()) == 5
        assert [(line["event"], line["count"]) for line in logs] == [("retry_entries_damaged", 1)]
        assert await keys_of(store, "idem:") == [key]

    with_store(run, engine, now_ns=clock)
    engine.reopen()
    fixed, left = asyncio.run(repair(LocalEntries(engine)))
    assert ([finding.kind for finding in fixed], left) == (["damaged"], [])


async def test_a_sweep_that_fails_is_logged_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "SWEEP_S", 0.01)
    swept: list[int] = []

    async def failing(*given: object) -> int:
        swept.append(1)
        raise RuntimeError("private text")

    monkeypatch.setattr(room, "sweep", failing)
    async with opened() as store:
        with capture_logs() as logs:
            await store.start()
            async with asyncio.timeout(60):
                while len(swept) < 3:
                    await asyncio.sleep(0.001)
        failures = [line for line in logs if line["event"] == "sweep_failed"]
        assert failures[0]["error"] == "RuntimeError"
        assert "private text" not in str(failures)


async def test_neither_key_nor_scope_nor_request_is_on_the_disk() -> None:
    engine = MemoryEngine()
    async with opened(engine) as store:
        await store.messages.create(new("planted words", "t"), idempotency=RETRY)
        disk = b"".join(key + value for key, value in engine.scan(b"", b"\xff", limit=1000))
        for secret in (RETRY.scope, RETRY.key, "ann@example.org", "planted words"):
            assert secret.encode() not in disk
