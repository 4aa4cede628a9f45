"""Group commit: requests that arrive while a group is on its way to the disk form the next group.

Owns: the queue of such requests, and who gets which outcome. Invariants:
- One group at a time. The requests of one turn of the event loop form one group, up to the bound.
- Each caller gets the outcome of its own request. An error is an object of its own for each caller.
- After a defect no caller waits for ever, or believes that its request is durable; the next group begins.
- A request whose caller is cancelled before its group begins is not carried out; after that it is, all the same.
- The number of requests that wait is bounded.

It runs in the event loop's thread. It must never touch the disk itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from minikms.api.errors import KmsRefusedError, StorageUnavailableError, copy_of

WAITING_MAX: Final = 16_384

T = TypeVar("T")
R = TypeVar("R")


class GroupQueue(Generic[T, R]):
    """`commit` makes a group of at most `items_max` requests durable, and returns the result or the error of each. A
    KmsRefusedError that it raises is the outcome of all.
    """

    def __init__(
        self, commit: Callable[[list[T]], Awaitable[Sequence[R | KmsRefusedError]]], *, items_max: int
    ) -> None:
        self._commit = commit
        self._items_max = items_max
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._running: asyncio.Task[None] | None = None
        self._scheduled = False

    async def submit(self, item: T) -> R:
        """The result of the request, once it is durable. Raises its error, and StorageUnavailableError."""
        if len(self._waiting) >= WAITING_MAX:
            raise StorageUnavailableError("too many changes are waiting for the disk; try again later")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[R] = loop.create_future()
        self._waiting.append((item, done))
        self._schedule(loop)
        try:
            return await done
        finally:
            del done  # the traceback of its error leads to this frame

    async def drain(self) -> None:
        """Returns when no request is waiting or under way."""
        while self._waiting or self._running is not None:
            await asyncio.sleep(0)
            await self.group_ended()

    async def group_ended(self) -> None:
        """Returns when the group that is under way now has ended, if there is one."""
        if self._running is not None:
            await asyncio.wait([self._running])

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._scheduled and self._running is None:
            self._scheduled = True
            loop.call_soon(self._start_group, loop)  # after all callers of this turn

    def _start_group(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        group: list[tuple[T, asyncio.Future[R]]] = []
        while self._waiting and len(group) < self._items_max:
            item, done = self._waiting.popleft()
            if not done.done():
                group.append((item, done))
        if group:
            self._running = loop.create_task(self._run(loop, group))

    async def _run(self, loop: asyncio.AbstractEventLoop, group: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            outcomes = await self._commit([item for item, _ in group])
            for (_, done), outcome in zip(group, outcomes, strict=True):
                _answer(done, outcome)
        except KmsRefusedError as error:
            for _, done in group:
                _answer(done, copy_of(error))
        except BaseException:  # a defect, or the loop is closing
            for _, done in group:
                done.cancel()
            raise
        finally:
            self._running = None
            if self._waiting:
                self._schedule(loop)


def _answer(done: asyncio.Future[R], outcome: R | KmsRefusedError) -> None:
    if done.done():
        return
    if isinstance(outcome, KmsRefusedError):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)
