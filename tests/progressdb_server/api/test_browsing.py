"""The viewer's pages are complete and in order, and decrypt only the records that they show."""

from collections.abc import Sequence

from minikms.api.errors import KmsRefusedError
from minikms.client import DecryptItem
from progressdb_server.api.viewer.browsing import PAGE_MESSAGES, PAGE_THREADS, VERSIONS_MAX, Browser
from progressdb_server.conversations.reading import LIST_BYTES_MAX
from progressdb_server.store.model import NewMessage
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import TickingClock, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

MESSAGES = PAGE_MESSAGES * 3 + 7


async def test_paging_in_either_direction_shows_each_message_once() -> None:
    provider = SealingProvider()
    async with opened(MemoryEngine(), provider, TickingClock()) as store:
        browser = Browser(store, provider)
        made = [
            (await store.messages.create(NewMessage(author="ann", thread="t", body=number))).id
            for number in range(MESSAGES)
        ]
        await store.messages.delete(made[60], author="ann")
        page = await browser.messages("t")
        assert (page.older, page.newer) == (True, False)
        backwards = [shown.message.id for shown in page.messages]
        while page.older:
            page = await browser.messages("t", before=page.messages[0].message.id)
            assert page.newer
            backwards = [shown.message.id for shown in page.messages] + backwards
        assert backwards == made
        forwards = [shown.message.id for shown in page.messages]
        while page.newer:
            page = await browser.messages("t", after=page.messages[-1].message.id)
            forwards += [shown.message.id for shown in page.messages]
        assert forwards == made


async def test_a_page_decrypts_no_more_records_than_it_shows() -> None:
    provider = SealingProvider()
    async with opened(MemoryEngine(), provider, TickingClock()) as store:
        browser = Browser(store, provider)
        for number in range(MESSAGES):
            await store.messages.create(NewMessage(author="ann", thread="t", body=number))
        opened_records: list[int] = []
        store.metrics.opened = opened_records.append  # type: ignore[assignment]  # counts in the metrics' place
        page = await browser.messages("t")
        assert sum(opened_records) == len(page.messages) == PAGE_MESSAGES
        before = page.messages[10].message.id
        opened_records.clear()
        await browser.messages("t", before=before)
        assert sum(opened_records) == PAGE_MESSAGES


async def test_threads_are_paged_newest_first_or_by_id_prefix() -> None:
    provider = SealingProvider()
    async with opened(MemoryEngine(), provider, TickingClock()) as store:
        browser = Browser(store, provider)
        made = [
            (await store.threads.create(author=f"a{number % 2}", title=str(number))).id
            for number in range(PAGE_THREADS * 2 + 4)
        ]
        for author, id_prefix, wanted in (
            ("", "", made[::-1]),
            ("a1", "", made[1::2][::-1]),
            ("", "thread-", sorted(made)),
        ):
            found, cursor = [], ""
            while True:
                page = await browser.threads(author=author, id_prefix=id_prefix, cursor=cursor)
                found += [thread.id for thread in page.threads]
                cursor = page.next_cursor
                if not cursor:
                    break
            assert found == wanted


async def test_each_version_names_the_key_that_encrypts_it() -> None:
    provider = SealingProvider()
    async with opened(MemoryEngine(), provider, TickingClock()) as store:
        browser = Browser(store, provider)
        message = await store.messages.create(NewMessage(author="ann", thread="t", body=1))
        await store.messages.update(message.id, author="ann", body=2, role=None, reply_to=None)
        versions, older = await browser.message(message.id)
        assert not older
        assert [version.value for version, _ in versions] == [1, 2]
        (key_id,) = provider.keys_of("t")
        for version, protection in versions:
            assert (protection.key_id, protection.state) == (key_id, "active")
            assert protection.dek_since_ns >= version.ts


async def test_a_page_asks_once_for_each_key_that_it_shows_and_for_no_other() -> None:
    """However many keys the key service has: it is not asked to list them."""
    provider = SealingProvider()
    async with opened(MemoryEngine(), provider, TickingClock()) as store:
        browser = Browser(store, provider)
        for thread in ("a", "b", "t"):
            for number in range(3):
                await store.messages.create(NewMessage(author="ann", thread=thread, body=number))
        provider.calls.clear()
        page = await browser.messages("t")
        assert {shown.protection.state for shown in page.messages} == {"active"}
        assert provider.calls == {"decrypt_batch": 1, "get_key": 1, "status": 1}
        provider.destroyed.update(provider.keys_of("t"))
        page = await browser.messages("t")
        assert {shown.protection.state for shown in page.messages} == {""}


async def test_a_message_with_many_versions_shows_the_newest_of_them() -> None:
    provider = SealingProvider()
    async with opened(MemoryEngine(), provider, TickingClock()) as store:
        browser = Browser(store, provider)
        message = await store.messages.create(NewMessage(author="ann", thread="t", body=0))
        for number in range(1, VERSIONS_MAX):
            await store.messages.update(message.id, author="ann", body=number, role=None, reply_to=None)
        versions, older = await browser.message(message.id)
        assert (len(versions), older) == (VERSIONS_MAX, False)
        for number in range(VERSIONS_MAX, VERSIONS_MAX + 50):
            await store.messages.update(message.id, author="ann", body=number, role=None, reply_to=None)
        versions, older = await browser.message(message.id)
        assert [version.value for version, _ in versions] == list(range(50, VERSIONS_MAX + 50))
        assert older


async def test_a_page_of_large_messages_is_opened_in_batches_of_a_bounded_size() -> None:
    """One batch of 50 MB would keep every other request waiting while it is decoded."""

    class Measured(SealingProvider):
        async def decrypt_batch(
            self, items: Sequence[DecryptItem], *, request_id: str | None = None
        ) -> list[bytes | KmsRefusedError]:
            batches.append([len(item.ciphertext) for item in items])
            return await super().decrypt_batch(items)

    batches: list[list[int]] = []

    provider = Measured()
    async with opened(MemoryEngine(), provider, TickingClock()) as store:
        browser = Browser(store, provider)
        message = await store.messages.create(NewMessage(author="ann", thread="t", body="x" * 900_000))
        for _ in range(8):
            await store.messages.create(NewMessage(author="ann", thread="t", body="x" * 900_000))
            await store.messages.update(message.id, author="ann", body="y" * 900_000, role=None, reply_to=None)
        batches.clear()
        page = await browser.messages("t")
        versions, _ = await browser.message(message.id)
        assert [shown.versions for shown in page.messages] == [9] + [1] * 8
        assert len(versions) == 9
        assert sum(map(len, batches)) == 18
        assert all(sum(sizes[:-1]) <= LIST_BYTES_MAX for sizes in batches)
