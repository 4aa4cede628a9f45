"""What the store does with messages: order, versions, reactions, tombstones, lists."""

import asyncio
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from minikms.api.errors import KmsRefusedError
from minikms.client import EncryptItem
from progressdb_server.conversations import reading as reading_room
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import keyspace
from progressdb_server.store.model import (
    Message,
    MessageNotFoundError,
    NewMessage,
    StoreUnavailableError,
    ThreadDeletedError,
)
from tests.harness.waiting import until
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import TickingClock, bodies, fill, messages_of, opened, versions_of
from tests.progressdb_server.store.sealing_provider import SealingProvider

pytestmark = pytest.mark.usefixtures("both_engines")


async def edit(store: Conversations, message: str, body: Any, author: str | None = "ann") -> Message:
    return await store.messages.update(message, author=author, body=body, role=None, reply_to=None)


async def test_no_reader_decodes_a_body() -> None:
    """What is listed is the text that was stored: a body's numbers cost nothing when it is read."""
    async with opened() as store:
        made = await store.messages.create(NewMessage(author="ann", thread="t", body=[1e300, {"a": "ü"}]))
        await edit(store, made.id, {"b": [1.5e-7]})
        await store.messages.set_reaction(made.id, "ann", "+1")
        read = [*await messages_of(store, "t"), *await versions_of(store, made.id)]
        read.append(await store.reading.message(made.id))
        texts = [b'{"b":[1.5e-7]}', b'[1e300,{"a":"\xc3\xbc"}]', *[b'{"b":[1.5e-7]}'] * 3]
        assert [type(message.body) for message in read] == [msgspec.Raw] * len(texts)
        assert [bytes(message.body) for message in read] == texts


@pytest.mark.parametrize(
    "body",
    ["text", "", {"a": [1, 2.5, None, True, 'ü\0"\\']}, [], 0, 2**80, "x" * 1_000_000, None],
    ids=["text", "empty", "nested", "list", "zero", "huge number", "a megabyte", "null"],
)
async def test_every_json_value_reads_back_as_it_was_written(body: Any) -> None:
    async with opened() as store:
        new = NewMessage(author="a:n/n ü", body=body, role="assistant", reply_to="msg-1", reactions={"bob": "👍"})
        made = await store.messages.create(new)
        assert (made.value, made.author, made.role, made.reply_to) == (body, "a:n/n ü", "assistant", "msg-1")
        assert await store.reading.message(made.id) == made
        assert await messages_of(store, made.thread) == [made]


async def test_ids_and_times_are_made_by_the_store() -> None:
    async with opened() as store:
        one, two = await fill(store, 2)
        assert one.id == f"msg-{one.ts}-000000"
        assert two.ts > one.ts


async def test_messages_keep_their_order_when_the_clock_steps_back() -> None:
    """They keep it across a restart too."""
    engine, provider = MemoryEngine(), SealingProvider()
    clock = TickingClock(step=0)
    async with opened(engine, provider, clock) as store:
        await fill(store, 3)
        clock.now -= 10**12
        await store.messages.create(NewMessage(author="ann", thread="t", body=3))
    async with opened(engine, provider, clock) as store:
        await store.messages.create(NewMessage(author="ann", thread="t", body=4))
        assert bodies(await messages_of(store, "t")) == [0, 1, 2, 3, 4]


async def test_a_deleted_message_leaves_the_list_and_keeps_its_body() -> None:
    """It is deleted once."""
    async with opened() as store:
        one, _two = await fill(store, 2)
        await store.messages.delete(one.id, author="ann")
        await store.messages.delete(one.id, author="ann")
        tombstone = await store.reading.message(one.id)
        assert (tombstone.deleted, tombstone.value) == (True, 0)
        assert bodies(await messages_of(store, "t")) == [1]
        assert [m.deleted for m in await messages_of(store, "t", include_deleted=True)] == [True, False]
        assert [m.deleted for m in await versions_of(store, one.id)] == [False, True]
        with pytest.raises(MessageNotFoundError):
            await edit(store, one.id, "x")
        with pytest.raises(MessageNotFoundError):
            await store.messages.set_reaction(one.id, "bob", "x")
        with pytest.raises(MessageNotFoundError):
            await store.messages.remove_reaction(one.id, "bob")


async def test_reactions_are_versions_and_removing_an_absent_one_changes_nothing() -> None:
    async with opened() as store:
        (one,) = await fill(store, 1)
        reacted = await store.messages.set_reaction(one.id, "bob", "👍")
        assert (reacted.reactions, reacted.author, reacted.value) == ({"bob": "👍"}, "ann", 0)
        await store.messages.set_reaction(one.id, "cid", "🎉")
        await store.messages.remove_reaction(one.id, "nobody")
        await store.messages.remove_reaction(one.id, "bob")
        assert (await store.reading.message(one.id)).reactions == {"cid": "🎉"}
        assert len(await versions_of(store, one.id)) == 4


async def test_concurrent_reactions_are_all_kept() -> None:
    async with opened() as store:
        (one,) = await fill(store, 1)
        await asyncio.gather(*[store.messages.set_reaction(one.id, f"u{n}", str(n)) for n in range(40)])
        assert (await store.reading.message(one.id)).reactions == {f"u{n}": str(n) for n in range(40)}
        assert len(await versions_of(store, one.id)) == 41


async def test_limit_keeps_the_most_recent_and_counts_what_is_shown() -> None:
    async with opened() as store:
        made = await fill(store, 10)
        await edit(store, made[0].id, "zero")
        await store.messages.delete(made[8].id, author="ann")
        assert bodies(await messages_of(store, "t", limit=3)) == [6, 7, 9]
        assert bodies(await messages_of(store, "t", limit=3, include_deleted=True)) == [7, 8, 9]
        assert bodies(await messages_of(store, "t", limit=100)) == ["zero", 1, 2, 3, 4, 5, 6, 7, 9]
        assert await messages_of(store, "t", limit=0) == []
        assert await messages_of(store, "unknown", limit=5) == []


async def test_a_list_comes_in_chunks_bounded_in_number_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_room, "LIST_MESSAGES_FIRST", 3)
    monkeypatch.setattr(reading_room, "LIST_MESSAGES_MAX", 4)
    monkeypatch.setattr(reading_room, "LIST_BYTES_MAX", 3000)
    async with opened() as store:
        await fill(store, 10)
        assert [len(chunk) async for chunk in store.reading.messages("t") if chunk] == [3, 4, 3]
        for n in range(6):
            await store.messages.create(NewMessage(author="ann", thread="big", body=str(n) * 2000))
        assert [len(chunk) async for chunk in store.reading.messages("big") if chunk] == [2, 2, 2]
        assert [body[0] for body in bodies(await messages_of(store, "big", limit=3))] == ["3", "4", "5"]


async def test_messages_of_several_authors_and_forms_keep_their_own_headers() -> None:
    """A header is decoded once for neighbours that share it: not for those beside them."""
    async with opened() as store:
        made = []
        for n, author in enumerate(["ann", "ann", "bob", "ann", "an", "an", "bob", "bob"]):
            made.append(await store.messages.create(NewMessage(author=author, thread="t", body=n)))
        made[1] = await edit(store, made[1].id, "again")
        await store.messages.set_reaction(made[5].id, "bob", "+1")
        made[5] = await store.reading.message(made[5].id)
        await store.messages.delete(made[6].id, author="bob")
        made[6] = await store.reading.message(made[6].id)
        assert await messages_of(store, "t", include_deleted=True) == made
        assert await messages_of(store, "t") == [*made[:6], made[7]]


@pytest.mark.parametrize("kept", [0, 2, -1], ids=["no byte", "a part of the header", "all but a byte"])
async def test_a_truncated_record_between_others_is_listed_with_an_error(kept: int) -> None:
    engine = MemoryEngine()
    async with opened(engine) as store:
        made = await fill(store, 3)
        stamp = keyspace.parse_message_id(made[1].id)
        assert stamp is not None
        key = keyspace.messages("t") + stamp.raw
        engine.write([(key, (engine.get(key) or b"")[:kept])])
        listed = await messages_of(store, "t")
        assert [listed[0], listed[2]] == [made[0], made[2]]
        assert (listed[1].id, listed[1].value, bool(listed[1].error)) == (made[1].id, None, True)


class CountingEngine(MemoryEngine):
    """Counts how often it was asked for one value."""

    gets = 0

    def get(self, key: bytes) -> bytes | None:
        self.gets += 1
        return super().get(key)


async def test_a_list_finds_its_records_in_one_pass_for_each_batch() -> None:
    """Also those of edited messages, whose records are not where the messages are in the order of creation."""
    engine = CountingEngine()
    async with opened(engine) as store:
        made = await fill(store, 300)
        for changed in (made[0], made[150], made[299]):
            await edit(store, changed.id, "again")
        await store.messages.set_reaction(made[7].id, "bob", "+1")
        engine.gets = 0
        found = await messages_of(store, "t")
        assert engine.gets < 10
        assert [message.id for message in found] == [message.id for message in made]
        assert [n for n, message in enumerate(found) if message.value == "again"] == [0, 150, 299]
        assert (found[7].value, found[7].reactions) == (made[7].value, {"bob": "+1"})


async def test_writes_during_a_list_neither_repeat_nor_hide_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_room, "LIST_MESSAGES_FIRST", 2)
    monkeypatch.setattr(reading_room, "LIST_MESSAGES_MAX", 3)
    async with opened() as store:
        made = await fill(store, 9)
        found: list[Message] = []
        async for chunk in store.reading.messages("t"):
            found += chunk
            await edit(store, made[0].id, "again")
            await store.messages.create(NewMessage(author="ann", thread="t", body="late"))
        assert [message.id for message in found] == [message.id for message in made]


async def test_a_message_appears_only_after_all_that_come_before_it() -> None:
    """Ids are given when a message arrives; a slow encryption must not let a later one overtake it on the disk."""

    go_on = asyncio.Event()

    class Slow(SealingProvider):
        async def encrypt(
            self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str | None, request_id: str | None = None
        ) -> bytes:
            if request_id == "slow":
                await go_on.wait()
            return await super().encrypt(key_id, plaintext, aad=aad, thread_id=thread_id)

    async with opened(provider=Slow()) as store:
        await fill(store, 1)
        slow = asyncio.create_task(
            store.messages.create(NewMessage(author="ann", thread="t", body="slow"), request_id="slow")
        )
        await asyncio.sleep(0)
        fast = asyncio.create_task(store.messages.create(NewMessage(author="ann", thread="t", body="fast")))
        other = await store.messages.create(NewMessage(author="ann", thread="other", body="other"))
        assert other.value == "other"
        assert bodies(await messages_of(store, "t")) == [0]
        go_on.set()
        await asyncio.gather(slow, fast)
        assert bodies(await messages_of(store, "t")) == [0, "slow", "fast"]


async def test_a_deleted_thread_takes_no_message_and_no_edit() -> None:
    async with opened() as store:
        (one,) = await fill(store, 1)
        await store.threads.delete("t", author="ann", by="ann")
        with pytest.raises(ThreadDeletedError):
            await fill(store, 1)
        with pytest.raises(ThreadDeletedError):
            await edit(store, one.id, "x")
        event = (await messages_of(store, "t", include_deleted=True))[-1]
        assert (event.value, event.author, event.deleted) == ({"_event": "thread_deleted", "by": "ann"}, "ann", True)
        assert bodies(await messages_of(store, "t")) == [0]


async def test_a_message_in_encryption_when_its_thread_is_deleted_is_refused() -> None:
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        await fill(store, 1)
        provider.delay_s = 0.02
        outcomes = await asyncio.gather(
            store.threads.delete("t", author=None, by="admin"),
            *[store.messages.create(NewMessage(author="ann", thread="t", body=n)) for n in range(20)],
            return_exceptions=True,
        )
        provider.delay_s = 0.0
        stored = await messages_of(store, "t", include_deleted=True)
        assert stored[-1].value == {"_event": "thread_deleted", "by": "admin"}
        acknowledged = [outcome for outcome in outcomes[1:] if isinstance(outcome, Message)]
        assert [m.id for m in stored[1:-1]] == sorted(m.id for m in acknowledged)
        assert all(isinstance(o, (Message, ThreadDeletedError)) for o in outcomes[1:])


async def test_a_message_during_the_write_of_its_threads_deletion_is_refused() -> None:
    class SlowDeletion(SealingProvider):
        async def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[bytes | KmsRefusedError]:
            reached.set()
            await go.wait()
            return await super().encrypt_batch(items)

    reached, go = asyncio.Event(), asyncio.Event()
    provider = SlowDeletion()
    async with opened(provider=provider) as store:
        go.set()
        await fill(store, 1)
        go.clear()
        reached.clear()
        deleting = asyncio.create_task(store.threads.delete("t", author=None, by="admin"))
        await reached.wait()
        late = asyncio.create_task(store.messages.create(NewMessage(author="ann", thread="t", body="late")))
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(ThreadDeletedError):
            await late
        await deleting
        assert bodies(await messages_of(store, "t")) == [0]


LONG = "x" * 200_000


@pytest.mark.parametrize("verb", ["decrypt", "encrypt"], ids=["reads", "changes"])
async def test_long_messages_that_wait_for_the_key_service_are_bounded_in_sum(verb: str) -> None:
    provider = SealingProvider()
    asked = 150  # more than the bound below admits
    async with opened(provider=provider) as store:
        made = [await store.messages.create(NewMessage(author="ann", thread="t", body=LONG)) for _ in range(asked)]
        provider.holds |= {verb, f"{verb}_batch"}
        tracemalloc.start()
        try:
            if verb == "decrypt":
                waiting = [asyncio.create_task(store.reading.message(one.id)) for one in made]
            else:
                waiting = [asyncio.create_task(store.messages.set_reaction(one.id, "ann", "+1")) for one in made]
            await until(lambda: provider.held > 0)
            for _ in range(100):
                await asyncio.sleep(0.001)  # until nothing more happens
            held_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held_bytes < 8 * reading_room.LONG_READS_COUNT_MAX * len(LONG)
        provider.go_on.set()
        assert [len(message.body) for message in await asyncio.gather(*waiting)] == [len(LONG) + 2] * asked


async def test_a_long_message_that_gets_no_turn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_room, "LONG_READ_WAIT_SECONDS_MAX", 0.01)
    async with opened() as store:
        long = await store.messages.create(NewMessage(author="ann", thread="t", body=LONG))
        (short,) = await fill(store, 1)
        turns = [store.reading.long_reads.acquire() for _ in range(reading_room.LONG_READS_COUNT_MAX)]
        await asyncio.gather(*turns)
        with pytest.raises(StoreUnavailableError, match="too many long messages"):
            await store.reading.message(long.id)
        assert (await store.reading.message(short.id)).id == short.id
        store.reading.long_reads.release()
        assert (await store.reading.message(long.id)).id == long.id


async def test_stats_count_threads_and_stored_versions() -> None:
    engine, provider = MemoryEngine(), SealingProvider()
    async with opened(engine, provider) as store:
        (one,) = await fill(store, 1)
        await edit(store, one.id, "x")
        await store.threads.create(author="ann", title="t2")
        await store.threads.delete("t", author="ann", by="ann")
        assert await store.stats() == {"threads": 2, "messages": 3}
    async with opened(engine, provider) as store:
        assert await store.stats() == {"threads": 2, "messages": 3}
