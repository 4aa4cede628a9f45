"""A read that the disk refuses, in every operation that reads."""

from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import Idempotency, NewMessage
from tests.progressdb_server.jobs.rotating import register
from tests.progressdb_server.store.faulty_reads import faulty
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import fill, keys_of, messages_of, opened, threads_of, versions_of
from tests.progressdb_server.store.sealing_provider import SealingProvider

RETRIED = Idempotency("scope", "key")


async def test_no_operation_takes_a_read_that_failed_for_the_end() -> None:
    """Each read of each in turn. The same operation gives the same afterwards."""
    engine = MemoryEngine()
    reads = faulty(engine)
    async with opened(engine) as store:
        messages = await fill(store, 3)
        await store.messages.set_reaction(messages[1].id, "bob", "+1")
        await store.messages.delete(messages[2].id, author="ann")
        await store.threads.create(author="ann", title="other")
        await store.members.add("t", ["bob", "eve"])
        await register(store, "/backup", 5)
        again = NewMessage(author="ann", thread="t", body="once")
        await store.messages.create(again, idempotency=RETRIED)

        async def backups() -> list[object]:
            return [known async for known in store.backups.registered()]

        async def newest_backup() -> float:
            await store.backups.look_at_newest()
            return store.backups.newest_ns

        async def chunks() -> list[object]:
            return [chunk.records async for chunk in store.rekeying.chunks("t", 100)]

        async def rekeyed_threads() -> list[str]:
            return [thread async for thread in store.rekeying.threads()]

        async def retried() -> str:
            return (await store.messages.create(again, idempotency=RETRIED)).id

        operations: list[Callable[[], Awaitable[object]]] = [
            backups,
            newest_backup,
            chunks,
            rekeyed_threads,
            retried,
            partial(keys_of, store),
            partial(messages_of, store, "t"),
            partial(messages_of, store, "t", limit=1),
            partial(messages_of, store, "t", before=messages[2].id, include_deleted=True),
            partial(messages_of, store, "t", after=messages[0].id),
            partial(versions_of, store, messages[1].id),
            partial(threads_of, store, "ann"),
            partial(threads_of, store, None, title="other"),
            partial(store.threads.get, "t"),
            partial(store.threads.is_deleted, "t"),
            partial(store.threads.page, author="ann", id_prefix="", cursor="", limit=1),
            partial(store.threads.page, author="", id_prefix="t", cursor="", limit=1),
            partial(store.reading.message, messages[1].id),
            partial(store.reading.page, "t", before="", after="", limit=2, versions_max=9),
            partial(store.reading.version_page, messages[1].id, 1),
            partial(store.members.of_thread, "t"),
            partial(store.members.check_reader, "t", "bob"),
            partial(store.rekeying.key_of_thread, "t"),
            partial(store.rekeying.count_under, "t", [""]),
            partial(store.raw_value, "kms:map:thread:t"),
        ]

        async def counted(operation: Callable[[], Awaitable[object]], fails_at: int) -> object:
            store.sealer.forget()
            reads.heal()
            reads.fails_at = fails_at
            return await operation()

        for number, operation in enumerate(operations):
            expected = await counted(operation, 0)
            for read in range(1, reads.count + 1):
                with pytest.raises(EngineUnavailableError):
                    pytest.fail(f"operation {number}, read {read}: {await counted(operation, read)}")
            assert await counted(operation, 0) == expected
            assert reads.count, operation


async def test_a_list_notes_what_its_key_does_not_open_until_it_opens() -> None:
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        await fill(store, 2)
        kept = dict(provider.keys)
        provider.keys.clear()
        assert {message.error for message in await messages_of(store, "t")} == {"key_not_found"}
        assert [sentence.endswith("(key_not_found)") for sentence in store.sealer.unreadable.values()] == [True, True]
        provider.keys |= kept
        await messages_of(store, "t")
        assert store.sealer.unreadable == {}
        provider.destroyed |= kept.keys()
        assert {message.error for message in await messages_of(store, "t")} == {"key_destroyed"}
        assert store.sealer.unreadable == {}
