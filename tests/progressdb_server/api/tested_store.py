"""The store of the server over the engine in memory, or over PostgreSQL, with what tests of routes look at in it."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator

from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import keyspace
from progressdb_server.store.engine import SCAN_ENTRIES_MAX
from progressdb_server.store.model import Message
from progressdb_server.store.places import open_view
from tests.progressdb_server.store import opened_store
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import TickingClock, emptied, messages_of
from tests.progressdb_server.store.sealing_provider import SealingProvider

START_NS = TickingClock().now
in_memory: list[TestedStore] = []
"""Those that are closed at the end of the module."""


class TestedStore(Conversations):
    __test__ = False
    memory: MemoryEngine | None = None
    url = ""
    loop: asyncio.AbstractEventLoop

    @classmethod
    def opened(cls) -> TestedStore:
        """Over PostgreSQL where the test asks for `both_engines`; `loop` is then the one that must use it."""
        if not opened_store.database:
            memory = MemoryEngine()
            store = cls(memory, SealingProvider(), now_ns=TickingClock())
            store.memory = memory
            in_memory.append(store)
            return store

        async def made() -> TestedStore:
            return cls(await emptied(url), SealingProvider(), now_ns=TickingClock())

        (url,) = opened_store.database
        loop = asyncio.new_event_loop()
        store = loop.run_until_complete(made())
        store.url, store.loop = url, loop
        opened_store.closing.append(store.ended)
        return store

    def ended(self) -> None:
        self.loop.run_until_complete(self.close())
        self.loop.close()

    @property
    def stored(self) -> list[tuple[bytes, bytes]]:
        """Every key and value."""
        if self.memory is not None:
            return self.memory.scan(b"", b"\xff", limit=SCAN_ENTRIES_MAX)

        async def found() -> list[tuple[bytes, bytes]]:
            async with open_view(self.url) as view:
                return [entry async for page in view.walk() for entry in page]

        return self.loop.run_until_complete(found())

    @property
    def empty(self) -> bool:
        return not self.stored_threads and not self.stored_versions

    @property
    def stored_threads(self) -> set[str]:
        return {keyspace.last_part(key) for key, _ in self.stored if key.startswith(keyspace.CREATED)}

    @property
    def stored_versions(self) -> Counter[str]:
        """How many versions each message has."""
        return Counter(key.split(b":")[2].decode() for key, _ in self.stored if key.startswith(keyspace.VERSION))

    def stored_messages(self) -> list[Message]:
        """The newest version of every message, of one thread after the other."""

        async def found() -> list[Message]:
            return [one for thread in sorted(self.stored_threads) for one in await messages_of(self, thread)]

        return asyncio.run(found())

    def fail(self, error: Exception, *, but: str = "") -> None:
        """From now on every method raises it, but for the one of this name."""

        async def called(*given: object, **named: object) -> object:
            raise error

        async def listed(*given: object, **named: object) -> AsyncIterator[object]:
            yield await called()

        for part in (self, self.threads, self.members, self.messages, self.reading):
            for name, method in inspect.getmembers(type(part), inspect.isfunction):
                if not name.startswith("_") and name not in ("close", "locate", "open_version", "fail", "ended", but):
                    is_list = method.__annotations__.get("return", "").startswith("AsyncIterator")
                    setattr(part, name, listed if is_list else called)


def close_all_in_memory() -> None:
    async def closed() -> None:
        await asyncio.gather(*(store.close() for store in in_memory))

    asyncio.run(closed())
    in_memory.clear()
