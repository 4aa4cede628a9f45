"""Opening a store for a test, and reading whole lists from it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg

from progressdb_server.conversations.whole import Conversations
from progressdb_server.kms.provider import Provider
from progressdb_server.store.engine import Engine
from progressdb_server.store.local import LocalEngine
from progressdb_server.store.model import Message, MessageRange, NewMessage, Thread
from progressdb_server.store.postgres import opening as postgres
from progressdb_server.store.postgres import tables
from progressdb_server.store.postgres.engine import PostgresEngine
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.sealing_provider import SealingProvider

T = TypeVar("T")
NOW_NS = 1_800_000_000 * 10**9


class TickingClock:
    """Nanoseconds that a test sets; each reading is `step` later."""

    def __init__(self, now: int = 1_700_000_000_000_000_000, step: int = 1000) -> None:
        self.now = now
        self.step = step

    def __call__(self) -> int:
        self.now += self.step
        return self.now


database: list[str] = []
"""The URL of the PostgreSQL that is opened, emptied, where a test names no engine."""
closing: list[Callable[[], None]] = []
"""What is called at the end of such a test."""


async def emptied(url: str) -> PostgresEngine:
    """The store of a database, as `progressdb store init` makes it."""
    connection = await asyncpg.connect(url)
    try:
        if await connection.fetchval("SELECT to_regclass('store_entry')") is None:
            await tables.init(url)
        await connection.execute("DELETE FROM store_entry; DELETE FROM store_head; DELETE FROM store_counter")
        await connection.execute("UPDATE store_schema SET number = $1", tables.SCHEMA)
    finally:
        await connection.close()
    return await postgres.open_engine(url, single_node=True)


@asynccontextmanager
async def opened(
    engine: Engine | None = None, provider: Provider | None = None, now_ns: Callable[[], int] | None = None
) -> AsyncIterator[Conversations]:
    if isinstance(engine, MemoryEngine):
        engine.reopen()  # as after a power failure: what was not synced is gone
    used = engine or (await emptied(database[0]) if database else MemoryEngine())
    store = Conversations(used, provider or SealingProvider(), now_ns=now_ns or TickingClock())
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def servers(url: str, provider: Provider, *ahead_ns: int) -> AsyncIterator[list[Conversations]]:
    """Several servers on one database, which is emptied; each clock is ahead by so much."""
    await (await emptied(url)).end()
    made = [
        Conversations(await postgres.open_engine(url, single_node=True), provider, now_ns=TickingClock(NOW_NS + one))
        for one in ahead_ns
    ]
    try:
        yield made
    finally:
        for store in made:
            await store.close()


def with_store(
    body: Callable[[Conversations], Awaitable[T]],
    engine: Engine | None = None,
    provider: Provider | None = None,
    now_ns: Callable[[], int] | None = None,
) -> T:
    async def run() -> T:
        async with opened(engine, provider, now_ns) as store:
            return await body(store)

    return asyncio.run(run())


def disk(store: Conversations) -> LocalEngine:
    """The entries of a store whose engine is of this process."""
    assert isinstance(store.engine, LocalEngine)
    return store.engine


async def becomes(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; TimeoutError if it does not within a minute."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def messages_of(store: Conversations, thread: str, **asked: Any) -> list[Message]:
    chunks = store.reading.messages(thread, range_=MessageRange(**asked))
    return [message async for chunk in chunks for message in chunk]


async def versions_of(store: Conversations, message: str) -> list[Message]:
    found = await store.reading.versions(message)
    return [version async for chunk in found.chunks for version in chunk]


async def threads_of(
    store: Conversations,
    author: str | None,
    *,
    title: str | None = None,
    slug: str | None = None,
    include_deleted: bool = False,
) -> list[Thread]:
    chunks = store.threads.list_threads(author=author, title=title, slug=slug, include_deleted=include_deleted)
    return [thread async for chunk in chunks for thread in chunk]


async def keys_of(store: Conversations, prefix: str = "") -> list[str]:
    return [key async for chunk in store.stored_keys(prefix) for key in chunk]


async def fill(store: Conversations, count: int, thread: str = "t") -> list[Message]:
    return [await store.messages.create(NewMessage(author="ann", thread=thread, body=n)) for n in range(count)]


def bodies(found: list[Message]) -> list[Any]:
    return [message.value for message in found]
