"""The store believes neither its disk nor the key service: what was moved, changed or answered wrongly is noticed."""

from collections.abc import Callable, Sequence

import msgspec
import pytest

from minikms import api
from minikms.api.errors import KmsRefusedError
from minikms.client import DecryptItem
from progressdb_server.store import record
from progressdb_server.store.model import RECORD_MALFORMED, NewMessage, RecordUnreadableError, StoreUnavailableError
from progressdb_server.store.sealer import RETRY_AFTER_S
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import bodies, fill, keys_of, messages_of, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

Change = Callable[[record.MessageHeader, bytes], tuple[record.MessageHeader, bytes]]


async def test_a_record_moved_to_another_place_does_not_open() -> None:
    engine = MemoryEngine()
    async with opened(engine) as store:
        one, two = await fill(store, 2)
        keys = await keys_of(store, "thread:t:msg:")
        raw = await store.raw_value(keys[0])
        engine.write([(keys[1].encode(), raw)])
        with pytest.raises(RecordUnreadableError) as unreadable:
            await store.reading.message(two.id)
        assert keys[1] in str(unreadable.value)
        assert (await store.reading.message(one.id)).value == 0


async def test_an_index_entry_bent_to_another_message_does_not_show_it() -> None:
    engine = MemoryEngine()
    async with opened(engine) as store:
        _, two = await fill(store, 2)
        order = await keys_of(store, "index:order:t:")
        engine.write([(order[1].encode(), order[0].rpartition(":")[2].encode())])
        with pytest.raises(RecordUnreadableError):
            await store.reading.message(two.id)


async def test_a_changed_author_in_a_header_is_noticed() -> None:
    engine = MemoryEngine()
    async with opened(engine) as store:
        (one,) = await fill(store, 1)
        (key,) = await keys_of(store, "thread:t:msg:")
        raw = await store.raw_value(key)
        assert raw is not None
        engine.write([(key.encode(), raw.replace(b"ann", b"eve", 1))])
        with pytest.raises(RecordUnreadableError):
            await store.reading.message(one.id)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, sealed: (msgspec.structs.replace(header, key_id="é" * 28), sealed),
        lambda header, sealed: (msgspec.structs.replace(header, key_id="k" * (api.ID_CHARS_MAX + 1)), sealed),
        lambda header, sealed: (header, sealed + bytes(api.PLAINTEXT_BYTES_MAX)),
    ],
    ids=["a key id that is not ASCII", "a long key id", "a long sealed part"],
)
async def test_a_record_that_no_request_can_hold_hides_no_other(change: Change) -> None:
    engine = MemoryEngine()
    async with opened(engine) as store:
        made = await fill(store, 3)
        keys = await keys_of(store, "thread:t:msg:")
        header, sealed = record.unpack_message(await store.raw_value(keys[1]) or b"")
        engine.write([(keys[1].encode(), record.pack(*change(header, sealed)))])
        listed = await messages_of(store, "t")
        assert [listed[0], listed[2]] == [made[0], made[2]]
        assert (listed[1].id, listed[1].value, listed[1].error) == (made[1].id, None, RECORD_MALFORMED)
        with pytest.raises(RecordUnreadableError):
            await store.reading.message(made[1].id)


async def test_without_a_key_service_nothing_is_stored() -> None:
    """Answers say when to retry."""
    provider, engine = SealingProvider(), MemoryEngine()
    async with opened(engine, provider) as store:
        (one,) = await fill(store, 1)
        before = await keys_of(store)
        provider.down = True
        for attempt in (
            store.messages.create(NewMessage(author="ann", thread="t", body=1)),
            store.messages.create(NewMessage(author="ann", body=1)),
            store.reading.message(one.id),
            store.messages.set_reaction(one.id, "bob", "x"),
            store.threads.create(author="ann", title="x"),
        ):
            with pytest.raises(StoreUnavailableError) as unavailable:
                await attempt
            assert unavailable.value.retry_after_s == RETRY_AFTER_S
        assert await keys_of(store) == before
        provider.down = False
        assert bodies([await store.messages.create(NewMessage(author="ann", thread="t", body=1))]) == [1]


@pytest.mark.parametrize("answer", [b"", b"{plaintext}", b"{plaintext}" + bytes(27)])
async def test_an_answer_that_can_not_be_a_sealed_record_is_never_stored(answer: bytes) -> None:
    class Echoing(SealingProvider):
        async def encrypt(
            self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str | None, request_id: str | None = None
        ) -> bytes:
            return answer.replace(b"{plaintext}", plaintext)

    async with opened(provider=Echoing()) as store:
        await fill(store, 1)
        before = await keys_of(store)
        with pytest.raises(StoreUnavailableError, match="wrongly"):
            await store.messages.create(NewMessage(author="ann", thread="t", body=1))
        assert await keys_of(store) == before


async def test_a_key_service_that_opens_a_record_to_something_else_is_noticed() -> None:
    class Wrong(SealingProvider):
        async def decrypt_batch(
            self, items: Sequence[DecryptItem], *, request_id: str | None = None
        ) -> list[bytes | KmsRefusedError]:
            return self.wrong(await super().decrypt_batch(items))

        def wrong(self, answers: list[bytes | KmsRefusedError]) -> list[bytes | KmsRefusedError]:
            return answers

    provider = Wrong()
    async with opened(provider=provider) as store:
        one, two = await fill(store, 2)
        provider.wrong = lambda answers: [b'["no record"]' for _ in answers]  # type: ignore[method-assign]  # what it does wrongly
        with pytest.raises(RecordUnreadableError):
            await store.reading.message(one.id)
        provider.wrong = lambda answers: answers[::-1]  # type: ignore[method-assign]  # what it does wrongly
        assert [message.error for message in await messages_of(store, "t")] == ["record_malformed"] * 2
        provider.wrong = lambda answers: answers[:-1]  # type: ignore[method-assign]  # what it does wrongly
        with pytest.raises(StoreUnavailableError):
            await messages_of(store, "t")
        provider.wrong = lambda answers: answers  # type: ignore[method-assign]  # what it does wrongly
        assert (await store.reading.message(two.id)).value == 1
