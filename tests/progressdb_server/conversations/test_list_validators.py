"""A list counts as unchanged only if all of it was given and nothing that it shows can have changed since."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from progressdb_server.conversations import reading as reading_room
from progressdb_server.conversations import validators as validators_room
from progressdb_server.conversations.validators import Validators
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store.model import MessageRange, NewMessage
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import fill, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider


async def tag_of(store: Conversations, thread: str = "t", **asked: Any) -> str:
    return await store.reading.list_tag(thread, MessageRange(**asked))


async def read(store: Conversations, thread: str = "t", **asked: Any) -> str:
    """Reads the whole list under its tag."""
    tag = await tag_of(store, thread, **asked)
    async for _ in store.reading.messages(thread, range_=MessageRange(**asked), tag=tag):
        pass
    return tag


@asynccontextmanager
async def filled(provider: SealingProvider) -> AsyncIterator[tuple[Conversations, SealingProvider]]:
    async with opened(MemoryEngine(), provider) as store:
        await fill(store, 5)
        yield store, provider


async def test_a_list_that_was_given_is_unchanged_and_opens_nothing() -> None:
    async with filled(SealingProvider()) as (store, provider):
        tag = await read(store)
        opened = provider.calls["decrypt_batch"]
        assert await tag_of(store) == tag
        assert await store.reading.list_unchanged("t", tag)
        assert provider.calls["decrypt_batch"] == opened


async def test_every_change_of_a_thread_changes_the_tags_of_its_lists() -> None:
    async with filled(SealingProvider()) as (store, _):
        made = await store.messages.create(NewMessage(author="ann", thread="t", body="more"))
        changes: list[Callable[[], Awaitable[object]]] = [
            lambda: store.messages.create(NewMessage(author="ann", thread="t", body="newest")),
            lambda: store.messages.update(made.id, author="ann", body="edited", role=None, reply_to=None),
            lambda: store.messages.set_reaction(made.id, "bob", "+1"),
            lambda: store.messages.remove_reaction(made.id, "bob"),
            lambda: store.messages.delete(made.id, author="ann"),
            lambda: store.threads.delete("t", author="ann", by="ann"),
        ]
        seen = {await tag_of(store)}
        for change in changes:
            await change()
            seen.add(await tag_of(store))
        assert len(seen) == len(changes) + 1


class Counting(MemoryEngine):
    """Counts the bytes of the values that are read."""

    read_bytes = 0

    def get(self, key: bytes) -> bytes | None:
        value = super().get(key)
        self.read_bytes += len(value or b"")
        return value

    def scan(
        self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        found = super().scan(lower, upper, limit=limit, reverse=reverse, bytes_max=bytes_max)
        self.read_bytes += sum(len(value) for _, value in found)
        return found


async def test_a_tag_and_the_last_change_of_a_thread_read_no_message() -> None:
    engine = Counting()
    async with opened(engine) as store:
        await store.messages.create(NewMessage(author="ann", thread="t", body="x" * 100_000))
        engine.read_bytes = 0
        await tag_of(store)
        await store.threads.listed(["t"], opened=False)
    assert engine.read_bytes < 10_000


async def test_every_parameter_has_a_tag_of_its_own() -> None:
    async with filled(SealingProvider()) as (store, _):
        asked: list[dict[str, Any]] = [
            {},
            {"limit": 1},
            {"limit": 11},
            {"before": "msg-1-000000"},
            {"after": "msg-1-000000"},
            {"include_deleted": True},
        ]
        tags = [await tag_of(store, **one) for one in asked]
        assert len(set(tags)) == len(asked)
        await store.messages.create(NewMessage(author="ann", thread="other", body="x"))
        assert await tag_of(store, "other") not in tags
        limited = await read(store, limit=1)
        assert not await store.reading.list_unchanged("t", await tag_of(store))
        assert await store.reading.list_unchanged("t", limited)


async def test_a_list_that_was_not_read_to_its_end_counts_as_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_room, "LIST_MESSAGES_FIRST", 2)
    async with filled(SealingProvider()) as (store, _):
        tag = await tag_of(store)
        async for _ in store.reading.messages("t", tag=tag):
            break
        assert not await store.reading.list_unchanged("t", tag)


async def test_a_list_that_was_written_to_meanwhile_counts_as_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_room, "LIST_MESSAGES_FIRST", 2)
    async with filled(SealingProvider()) as (store, _):
        tag = await tag_of(store)
        async for _ in store.reading.messages("t", tag=tag):
            await store.messages.create(NewMessage(author="ann", thread="t", body="late"))
        assert not await store.reading.list_unchanged("t", tag)


async def test_a_list_with_an_item_that_does_not_open_counts_as_changed() -> None:
    async with filled(SealingProvider()) as (store, provider):
        key_id = await store.rekeying.key_of_thread("t")
        assert key_id is not None
        provider.destroyed.add(key_id)
        tag = await read(store)
        provider.destroyed.clear()
        assert not await store.reading.list_unchanged("t", tag)


async def test_a_list_whose_key_is_gone_counts_as_changed() -> None:
    async with filled(SealingProvider()) as (store, provider):
        tag = await read(store)
        key_id = await store.rekeying.key_of_thread("t")
        assert key_id is not None
        provider.destroyed.add(key_id)
        assert await tag_of(store) == tag
        assert not await store.reading.list_unchanged("t", tag)


async def test_a_list_counts_as_changed_while_the_key_service_is_away() -> None:
    async with filled(SealingProvider()) as (store, provider):
        tag = await read(store)
        provider.down = True
        assert not await store.reading.list_unchanged("t", tag)
        provider.down = False
        assert await store.reading.list_unchanged("t", tag)


async def test_every_list_counts_as_changed_after_the_engine_was_reopened() -> None:
    async with filled(SealingProvider()) as (store, _):
        tag = await read(store)
        store.reading.validators.forget()
        assert not await store.reading.list_unchanged("t", tag)


async def test_a_restart_changes_every_tag() -> None:
    engine, provider = MemoryEngine(), SealingProvider()
    tags: list[str] = []
    for _ in range(2):
        async with opened(engine, provider) as store:
            if not tags:
                await fill(store, 1)
            tags.append(await tag_of(store))
    assert tags[0] != tags[1]


def test_the_memory_of_given_lists_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validators_room, "LISTS_REMEMBERED_MAX", 2)
    validators = Validators()
    validators.remember("a", ["k"])
    validators.remember("b", ["k"])
    assert validators.keys_of("a") == frozenset("k")
    validators.remember("c", ["k"])
    assert [validators.keys_of(tag) for tag in "abc"] == [frozenset("k"), None, frozenset("k")]
    validators.remember("d", [str(n) for n in range(validators_room.KEYS_OF_A_LIST_MAX + 1)])
    assert validators.keys_of("d") is None
