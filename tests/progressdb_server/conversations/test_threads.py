"""What the store does with threads: metadata, lists, access, deletion."""

import asyncio
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.errors import KmsRefusedError, refusal
from minikms.client import DecryptItem
from progressdb_server.api.viewer.browsing import Browser
from progressdb_server.conversations import threads as threads_room
from progressdb_server.conversations.threads import slug_of
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import engine, keyspace, record
from progressdb_server.store.model import (
    AuthorNotInThreadError,
    InvalidThreadIdError,
    NewMessage,
    Page,
    RecordUnreadableError,
    StoreUnavailableError,
    Thread,
)
from progressdb_server.store.postgres import reads
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import keys_of, opened, threads_of
from tests.progressdb_server.store.sealing_provider import SealingProvider, to_open

pytestmark = pytest.mark.usefixtures("both_engines")


@given(st.text(max_size=30))
def test_a_slug_is_made_of_a_few_safe_characters(title: str) -> None:
    slug = slug_of(title, "thread-1-000000")
    assert slug.endswith("-thread-1-000000")
    head = slug.removesuffix("-thread-1-000000")
    assert head
    assert head.isascii()
    assert head.replace("-", "a").isalnum()
    assert not head.startswith("-")
    assert "--" not in slug


async def test_every_message_and_change_touches_the_thread() -> None:
    async with opened() as store:
        thread = (await store.threads.create(author="ann", title="t")).id
        one = await store.messages.create(NewMessage(author="ann", thread=thread, body=1))
        assert (await store.threads.get(thread)).updated_ts == one.ts
        two = await store.messages.set_reaction(one.id, "bob", "x")
        assert (await store.threads.get(thread)).updated_ts == two.ts
        renamed = await store.threads.update(thread, author="ann", title="new")
        assert (await store.threads.get(thread)) == renamed
        assert renamed.updated_ts > two.ts


async def test_a_long_list_opens_one_small_batch_at_a_time_and_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a search that finds nothing: it looks at no record but those with the titles."""
    monkeypatch.setattr(threads_room, "LIST_THREADS_MAX", 20)

    class Measured(SealingProvider):
        async def decrypt_batch(
            self, items: Sequence[DecryptItem], *, request_id: str | None = None
        ) -> list[bytes | KmsRefusedError]:
            batches.append(len(items))
            at_once.append(at_once[-1] + 1)
            await asyncio.sleep(0)
            at_once.append(at_once[-1] - 1)
            return await super().decrypt_batch(items)

    batches: list[int] = []
    at_once = [0]
    async with opened(provider=Measured()) as store:
        await asyncio.gather(*[store.threads.create(author="ann", title=f"t{n}") for n in range(50)])
        newest: list[int] = []

        async def counted(prefixes: Sequence[bytes]) -> list[bytes | None]:
            newest.append(len(prefixes))
            return [None for _ in prefixes]

        monkeypatch.setattr(store.reads, "newest", counted)
        for title, found in ((None, [20, 20, 10]), ("none", [0, 0, 0])):
            batches.clear()
            chunks = store.threads.list_threads(author="ann", title=title)
            assert [len(chunk) async for chunk in chunks] == newest == found
            assert (batches, max(at_once)) == ([20, 20, 10], 1)
            newest.clear()


async def test_a_failure_in_the_middle_of_a_list_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_room, "LIST_THREADS_MAX", 2)
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        await asyncio.gather(*[store.threads.create(author="ann", title="t") for _ in range(5)])
        chunks = store.threads.list_threads(author="ann")
        assert len(await anext(chunks)) == 2
        provider.down = True
        with pytest.raises(StoreUnavailableError):
            await anext(chunks)
        provider.down = False


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
async def test_pages_begin_with_the_newest_and_have_each_thread_once(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(threads_room, "LIST_THREADS_MAX", 3)
    async with opened() as store:
        for number in range(11):
            await store.threads.create(author="ann", title=f"{'odd' if number % 2 else 'even'} {number}")
            await store.threads.create(author="bob", title="odd")
        (deleted,) = await threads_of(store, "ann", title="odd 5")
        await store.threads.delete(deleted.id, author="ann", by="ann")
        for author, title, include_deleted in (("ann", None, False), ("ann", "ODD", False), (None, "odd", True)):
            whole = await threads_of(store, author, title=title, include_deleted=include_deleted)
            found: list[Thread] = []
            page = Page(limit)
            while True:
                chunks = store.threads.list_threads(
                    author=author, title=title, include_deleted=include_deleted, page=page
                )
                part = [thread async for chunk in chunks for thread in chunk]
                assert len(part) == limit or not page.following
                found = part + found
                if not page.following:
                    break
                page = Page(limit, page.following)
            assert found == whole


async def test_a_page_opens_no_more_records_than_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened() as store:
        await asyncio.gather(*[store.threads.create(author="ann", title=f"t{n}") for n in range(50)])
        counts: list[int] = []
        monkeypatch.setattr(store.metrics, "opened", counts.append)
        assert sum([len(c) async for c in store.threads.list_threads(author="ann", page=Page(23))]) == sum(counts) == 23


async def test_a_page_of_a_search_ends_after_a_bounded_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_room, "LIST_THREADS_MAX", 2)
    monkeypatch.setattr(threads_room, "PAGE_LOOKED_MAX", 4)
    async with opened() as store:
        for number in range(7):
            await store.threads.create(author="ann", title=f"t{number}")
        page = Page(5)
        assert [c async for c in store.threads.list_threads(author="ann", title="t2", page=page)] == [[], []]
        (left,) = [c async for c in store.threads.list_threads(author="ann", title="t2", page=Page(5, page.following))][
            -1
        ]
        assert left.title == "t2"


async def test_a_walk_of_all_keys_gives_way_and_pages_have_each_key_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (engine, reads):
        monkeypatch.setattr(room, "WALK_KEYS_MAX", 4)
    async with opened() as store:
        for number in range(5):
            await store.threads.create(author="ann", title=f"t{number}")
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        whole: list[str] = []
        async for chunk in store.stored_keys(""):
            assert len(chunk) <= 4
            whole += chunk
            assert turns >= len(whole) // 4 - 1
        beside.cancel()
        for prefix in ("", "thread:", "index:author:ann:", "none:"):
            wanted = [key for key in whole if key.startswith(prefix)]
            for limit in (1, 3, 4, len(wanted) or 1, 100):
                found: list[str] = []
                page = Page(limit)
                while True:
                    part = [key async for chunk in store.stored_keys(prefix, page) for key in chunk]
                    assert len(part) == limit or not page.following
                    found += part
                    if not page.following:
                        break
                    page = Page(limit, page.following)
                assert found == wanted


async def may_read(store: Conversations, thread: str, author: str) -> bool:
    try:
        await store.members.check_reader(thread, author)
    except AuthorNotInThreadError:
        return False
    return True


async def test_the_owner_and_whoever_has_written_may_read_and_nobody_else() -> None:
    async with opened() as store:
        thread = (await store.threads.create(author="ann", title="t")).id
        await store.messages.create(NewMessage(author="bob", thread=thread, body=1))
        one = await store.messages.create(NewMessage(author="cid:x", thread=thread, body=1))
        await store.messages.set_reaction(one.id, "dan", "x")
        allowed = {author: await may_read(store, thread, author) for author in ("ann", "bob", "cid:x", "cid", "dan")}
        assert allowed == {"ann": True, "bob": True, "cid:x": True, "cid": False, "dan": False}
        assert not await may_read(store, "unknown", "ann")


async def test_an_author_of_128_bytes_of_any_kind_is_indexed_and_found() -> None:
    async with opened() as store:
        for author in (":" * 128, "ü" * 64, "a/b\0%3A", "%", "index:writer:"):
            thread = (await store.threads.create(author=author, title="t")).id
            assert [t.id for t in await threads_of(store, author)] == [thread]
            assert await may_read(store, thread, author)
        assert not await may_read(store, thread, "%3A")


@pytest.mark.parametrize("thread", ["a:b", "a/b", "ü", "x" * 129, "a b", "a\n", ".", ".."])
async def test_a_thread_id_that_not_everybody_can_use_is_refused(thread: str) -> None:
    async with opened() as store:
        with pytest.raises(InvalidThreadIdError):
            await store.messages.create(NewMessage(author="ann", thread=thread, body=1))
        assert await keys_of(store, "thread:") == []


async def test_metadata_rewritten_by_a_rotation_meanwhile_is_read_again() -> None:
    engine, provider = MemoryEngine(), SealingProvider()
    async with opened(engine, provider) as store:
        thread = (await store.threads.create(author="ann", title="old")).id
        key = keyspace.meta(thread)
        raw = engine.get(key)
        assert raw is not None
        provider.holds = {"encrypt"}
        renaming = asyncio.create_task(store.threads.update(thread, author="ann", title="new"))
        while not provider.held:  # it has read the record and is sealing the new one
            await asyncio.sleep(0)
        provider.holds = set()
        key_id, sealed = record.unpack_sealed(raw)
        [plaintext] = await provider.decrypt_batch([to_open(key_id, sealed, key, thread)])
        assert isinstance(plaintext, bytes)
        again = await provider.encrypt(key_id, plaintext, aad=key, thread_id=thread)
        engine.write([(key, record.rekey(raw[0], record.split(raw)[0], key_id) + again)])
        provider.go_on.set()
        await renaming
        assert (await store.threads.get(thread)).title == "new"


async def test_missing_metadata_is_reported_and_not_skipped() -> None:
    engine = MemoryEngine()
    async with opened(engine) as store:
        thread = (await store.threads.create(author="ann", title="t")).id
        engine.write([(keyspace.meta(thread), None)])
        (listed,) = await threads_of(store, "ann")
        assert (listed.id, listed.error) == (thread, "record_missing")


async def test_a_thread_that_does_not_open_is_listed_with_its_code() -> None:
    provider, engine = SealingProvider(), MemoryEngine()
    async with opened(engine, provider) as store:
        made = [(await store.threads.create(author="ann", title=f"title {n}")).id for n in range(6)]
        good, destroyed, altered, malformed, missing, unsendable = made
        provider.destroyed.update(provider.keys_of(destroyed))
        raw = engine.get(keyspace.meta(altered))
        assert raw is not None
        flipped = raw[:-1] + bytes([raw[-1] ^ 1])
        header, sealed = record.unpack_thread(engine.get(keyspace.meta(unsendable)) or b"")
        unknown = record.pack(msgspec.structs.replace(header, key_id="é"), sealed)
        puts = [(keyspace.meta(altered), flipped), (keyspace.meta(malformed), b"x"), (keyspace.meta(missing), None)]
        engine.write([*puts, (keyspace.meta(unsendable), unknown)])
        errors = {
            good: "",
            destroyed: "key_destroyed",
            altered: "decryption_failed",
            malformed: "record_malformed",
            missing: "record_missing",
            unsendable: "record_malformed",
        }
        for author in ("ann", None):
            listed = await threads_of(store, author, include_deleted=author is None)
            assert {thread.id: thread.error for thread in listed} == errors
            assert [thread.title for thread in listed] == ["title 0", "", "", "", "", ""]
        assert [thread.id for thread in await threads_of(store, "ann", title="title")] == [good]
        page = await Browser(store, provider).threads(author="", id_prefix="", cursor="")
        assert {thread.id: thread.error for thread in page.threads} == errors
        with pytest.raises(RecordUnreadableError):
            await store.threads.get(destroyed)


async def test_a_list_of_threads_fails_while_the_key_service_can_not_open() -> None:
    class Busy(SealingProvider):
        async def decrypt_batch(
            self, items: Sequence[DecryptItem], *, request_id: str | None = None
        ) -> list[bytes | KmsRefusedError]:
            return [refusal("audit_unavailable", "the audit log is not available")] * len(items)

    async with opened(provider=Busy()) as store:
        await store.threads.create(author="ann", title="title")
        with pytest.raises(StoreUnavailableError):
            await threads_of(store, "ann")
