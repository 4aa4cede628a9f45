"""The store of the server over PostgreSQL, with what tests of routes look at in the one in memory."""

from __future__ import annotations

import asyncio
from collections import Counter

from progressdb_server.store import keyspace
from progressdb_server.store.conversations import Conversations
from progressdb_server.store.offline import open_view
from tests.progressdb_server.store.opened_store import TickingClock, emptied
from tests.progressdb_server.store.sealing_provider import SealingProvider


class DatabaseStore(Conversations):
    url = ""
    loop: asyncio.AbstractEventLoop

    @classmethod
    def opened(cls, url: str, loop: asyncio.AbstractEventLoop) -> DatabaseStore:
        async def made() -> DatabaseStore:
            return cls(await emptied(url), SealingProvider(), now_ns=TickingClock())

        store = loop.run_until_complete(made())
        store.url, store.loop = url, loop
        return store

    def ended(self) -> None:
        self.loop.run_until_complete(self.close())
        self.loop.close()

    def _keys(self) -> list[bytes]:
        async def found() -> list[bytes]:
            async with open_view(self.url) as view:
                return [key async for page in view.walk() for key, _ in page]

        return self.loop.run_until_complete(found())

    @property
    def empty(self) -> bool:
        return not self.threads and not self.versions

    @property
    def threads(self) -> set[str]:
        return {keyspace.last_part(key) for key in self._keys() if key.startswith(keyspace.CREATED)}

    @property
    def versions(self) -> dict[str, range]:
        """Of each message: as many as it has versions."""
        found = Counter(key.split(b":")[2].decode() for key in self._keys() if key.startswith(keyspace.VERSION))
        return {message: range(count) for message, count in found.items()}
