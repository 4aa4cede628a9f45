"""Automatic batching: calls made while a batch is in flight travel together as the next one.

Owns: the queue of one verb (encrypt or decrypt) and the one task that empties it, on one connection. There is no timer:
a single call leaves in the next turn of the event loop, and batches grow with the load. Invariants:

- One batch is in flight at a time; a batch has at most `BATCH_ITEMS_MAX` items and `BATCH_BYTES_MAX` bytes; order is
  kept.
- Each caller gets the outcome of its own item, or the error of the whole batch, each its own exception object.
- The queue is bounded in items and bytes, and an item that has waited longer than its time is not sent any more.
- A caller that was cancelled is dropped; the others in its batch are not affected.

It must never leave a caller waiting after it was closed.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from minikms import api
from minikms.api.errors import KmsClosedError, KmsError, KmsTimeoutError, KmsUnavailableError
from minikms.client.items import BATCH_BYTES_MAX, DecryptItem, EncryptItem, Outcome, checked_cost_bytes

QUEUE_ITEMS_MAX: Final = 64 * api.BATCH_ITEMS_MAX
QUEUE_BYTES_MAX: Final = 256 * 1024 * 1024

ItemT = TypeVar("ItemT", EncryptItem, DecryptItem)


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


class _Waiting(Generic[ItemT]):
    __slots__ = ("cost_bytes", "future", "item", "until_s")

    def __init__(self, item: ItemT, cost_bytes: int, until_s: float, future: asyncio.Future[bytes]) -> None:
        self.item: ItemT = item
        self.cost_bytes = cost_bytes
        self.until_s = until_s
        self.future = future


class Batcher(Generic[ItemT]):
    """The queue of one verb. `send` sends a batch to the daemon and returns one outcome for each item."""

    def __init__(
        self, send: Callable[[list[ItemT]], Awaitable[list[Outcome]]], wait_s_max: float, loop: OneLoop
    ) -> None:
        self._send: Callable[[list[ItemT]], Awaitable[list[Outcome]]] = send
        self._wait_s_max = wait_s_max
        self._loop = loop
        self._queue: deque[_Waiting[ItemT]] = deque()
        self._queue_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def submit(self, item: ItemT) -> bytes:
        """Queues the item and waits for its outcome. Raises KmsError."""
        if self._closed:
            raise KmsClosedError("the client is closed")
        loop = self._loop.running()
        cost = checked_cost_bytes(item)
        if len(self._queue) >= QUEUE_ITEMS_MAX or self._queue_bytes + cost > QUEUE_BYTES_MAX:
            raise KmsUnavailableError("too many calls are waiting for the key service; make fewer at once")
        future: asyncio.Future[bytes] = loop.create_future()
        self._queue.append(_Waiting(item, cost, loop.time() + self._wait_s_max, future))
        self._queue_bytes += cost
        if self._task is None:
            self._task = loop.create_task(self._run(), name="minikms batching")
        try:
            return await future
        finally:
            del future  # the traceback of its error leads to this frame

    async def close(self) -> None:
        """Fails every call that waits."""
        self._closed = True
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._fail(self._take_all(), KmsClosedError("the client was closed"))  # a task that never ran caught nothing

    async def _run(self) -> None:
        try:
            while self._queue:
                batch = self._take()
                if batch:
                    await self._exchange(batch)
        except BaseException:  # cancelled, or a defect: no caller may be left waiting
            self._fail(self._take_all(), KmsClosedError("the client was closed"))
            raise
        finally:
            self._task = None

    def _take(self) -> list[_Waiting[ItemT]]:
        now_s = asyncio.get_running_loop().time()
        queue = self._queue
        batch: list[_Waiting[ItemT]] = []
        size = 0
        while queue and len(batch) < api.BATCH_ITEMS_MAX:
            waiting = queue[0]
            if batch and size + waiting.cost_bytes > BATCH_BYTES_MAX:
                break
            queue.popleft()
            self._queue_bytes -= waiting.cost_bytes
            if waiting.future.done():
                continue
            if waiting.until_s < now_s:
                waiting.future.set_exception(KmsTimeoutError("the key service did not take the request in time"))
                continue
            batch.append(waiting)
            size += waiting.cost_bytes
        return batch

    def _take_all(self) -> list[_Waiting[ItemT]]:
        everything = list(self._queue)
        self._queue.clear()
        self._queue_bytes = 0
        return everything

    async def _exchange(self, batch: list[_Waiting[ItemT]]) -> None:
        try:
            outcomes = await self._send([waiting.item for waiting in batch])
        except KmsError as error:
            self._fail(batch, error)
            return
        except BaseException:  # as in _run
            self._fail(batch, KmsClosedError("the client was closed"))
            raise
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if waiting.future.done():
                continue
            if isinstance(outcome, bytes):
                waiting.future.set_result(outcome)
            else:
                waiting.future.set_exception(outcome)

    @staticmethod
    def _fail(batch: list[_Waiting[ItemT]], error: KmsError) -> None:
        for waiting in batch:
            if not waiting.future.done():
                own = copy.copy(error)
                own.__cause__ = error
                waiting.future.set_exception(own)
        batch.clear()  # the traceback of `error` leads to the frame that has it
