"""The keyring in memory and its file, changed together.

Owns: the order of the keyring's changes. Invariants: one change at a time; the body in memory is the newest that is
durable, and a change that was begun ends in both or in neither, also when its caller is cancelled. Lives in the loop's
thread; only the wait for the disk runs elsewhere. It must never write a body that was made from an older one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from minikms.custody.keyringfile import KeyringFile
from minikms.keys.keyring import Body
from minikms.keys.unlocked import UnlockedKeyring


class KeyringKeeper:
    def __init__(self, unlocked: UnlockedKeyring, file: KeyringFile) -> None:
        self.unlocked = unlocked
        self._file = file
        self._lock = asyncio.Lock()

    @property
    def body(self) -> Body:
        return self.unlocked.body

    async def change(self, make: Callable[[Body], Body]) -> Body:
        """Makes the next body from the present one, in one step of the loop, and returns it once it is durable.

        `make` may return the body it was given: then there is nothing to do. What it raises passes through, and nothing
        has changed then. Raises StorageUnavailableError.
        """
        async with self._lock:
            body = make(self.body)
            if body is not self.body:
                await self._store(body)
            return body

    async def _store(self, body: Body) -> None:
        writing = asyncio.ensure_future(self._file.store(self.unlocked.encode(body)))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # The write goes on in its thread; the next change must not begin before it is known how it ended.
            await asyncio.wait([writing])
            if not writing.cancelled() and writing.exception() is None:
                self.unlocked.body = body
            raise
        self.unlocked.body = body
