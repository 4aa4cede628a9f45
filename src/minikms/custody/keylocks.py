"""At most one change of a key's file at a time.

Owns: who may change which key's file now, and telling a reader that read without a lock whether what it read still
holds. Invariants: a holder of several keys gets all of them or waits holding none, so holders can't block each other in
a circle; holders must not nest. Lives in the loop's thread. It must never do I/O.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager


class KeyLocks:
    """Waiting is in no order."""

    def __init__(self) -> None:
        self._held: dict[str, asyncio.Future[None]] = {}
        self._watchers: list[set[str]] = []

    @asynccontextmanager
    async def hold(self, key_ids: Iterable[str], *, announced: bool = True) -> AsyncIterator[None]:
        """Returns once no other holder has any of these keys. Watchers hear of it, unless it is the watcher itself."""
        wanted = tuple(dict.fromkeys(key_ids))
        while blocking := next((self._held[key_id] for key_id in wanted if key_id in self._held), None):
            await asyncio.shield(blocking)
        freed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.update(dict.fromkeys(wanted, freed))
        if announced:
            for watcher in self._watchers:
                watcher.update(wanted)
        try:
            yield
        finally:
            for key_id in wanted:
                del self._held[key_id]
            freed.set_result(None)

    @contextmanager
    def watch(self) -> Iterator[set[str]]:
        """A set of the keys that are held now, and of those that are announced until the block ends."""
        changed = set(self._held)
        self._watchers.append(changed)
        try:
            yield changed
        finally:
            # By identity: two watchers may hold equal sets.
            self._watchers = [watcher for watcher in self._watchers if watcher is not changed]
