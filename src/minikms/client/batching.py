"""Automatic batching: calls made while a batch is in flight travel together as the next one.

Owns: the batches of one verb (encrypt or decrypt), which `minikms.platform.group_commit` forms, on one connection.
There is no timer: a single call leaves in the next turn of the event loop, and batches grow with the load. Invariants:

- A batch has at most `BATCH_ITEMS_MAX` items and `BATCH_BYTES_MAX` bytes.
- The queue is bounded in items and bytes, and an item that has waited longer than its time is not sent any more.

It must never leave a caller waiting after it was closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from minikms import api
from minikms.api.errors import KmsClosedError, KmsUnavailableError
from minikms.client.items import BATCH_BYTES_MAX, DecryptItem, EncryptItem, Outcome, checked_cost_bytes
from minikms.platform.group_commit import GroupCommit

QUEUE_ITEMS_MAX: Final = 64 * api.BATCH_ITEMS_MAX
QUEUE_BYTES_MAX: Final = 256 * 1024 * 1024

ItemT = TypeVar("ItemT", bound=EncryptItem | DecryptItem)


class OneLoop:
    """The event loop in which a client was first used."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def running(self) -> asyncio.AbstractEventLoop:
        """The running loop. Raises RuntimeError in another one, whose calls would wait for the tasks of the first."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("this AsyncClient was used in another event loop: make one for each event loop")
        return loop


class Batcher(GroupCommit[ItemT, bytes]):
    """The queue of one verb. `send` sends a batch to the daemon and returns one outcome for each item."""

    def __init__(
        self, send: Callable[[list[ItemT]], Awaitable[list[Outcome]]], wait_s_max: float, loop: OneLoop
    ) -> None:
        super().__init__(send, items_max=api.BATCH_ITEMS_MAX, cost_max=BATCH_BYTES_MAX)
        self._wait_s_max = wait_s_max
        self._loop = loop
        self._closed = False

    async def submit(self, item: ItemT) -> bytes:
        """Queues the item and waits for its outcome. Raises KmsError."""
        if self._closed:
            raise KmsClosedError("the client is closed")
        until_s = self._loop.running().time() + self._wait_s_max
        cost = checked_cost_bytes(item)
        if len(self._waiting) >= QUEUE_ITEMS_MAX or self._waiting_cost + cost > QUEUE_BYTES_MAX:
            raise KmsUnavailableError("too many calls are waiting for the key service; make fewer at once")
        outcome = self._enqueue(item, cost, until_s)
        try:
            return await outcome
        finally:
            del outcome  # the traceback of its error leads to this frame

    async def close(self) -> None:
        """Fails every call that waits."""
        self._closed = True
        while self._waiting:
            outcome = self._waiting.popleft().outcome
            if not outcome.done():
                self._abandon(outcome)
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    def _abandon(self, outcome: asyncio.Future[bytes]) -> None:
        outcome.set_exception(KmsClosedError("the client was closed"))
