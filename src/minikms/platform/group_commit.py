"""Group commit: requests that arrive while a group is under way form the next group.

Owns: the queue of such requests, and who gets which outcome. Invariants:
- One group at a time. The requests of one turn of the event loop form one group, up to the bounds.
- Each caller gets the outcome of its own request. An error is an object of its own for each caller.
- After a defect no caller waits for ever, or believes that its request was carried out; the next group begins.
- A request whose caller is cancelled before its group begins is not carried out; after that it is, all the same.
- The number of requests that wait is bounded.

It runs in the event loop's thread. It must never touch the disk or a connection itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

from minikms.api.errors import KmsError, KmsTimeoutError, StorageUnavailableError, copy_of

WAITING_MAX: Final = 16_384
_NEVER_S: Final = float("inf")

T = TypeVar("T")
R = TypeVar("R")


class _Request(NamedTuple, Generic[T, R]):
    item: T
    cost: int
    until_s: float
    outcome: asyncio.Future[R]


@dataclass(eq=False, repr=False)
class GroupCommit(Generic[T, R]):
    """`carry_out` carries out a group of at most `items_max` requests, or of more than one up to the sum `cost_max` of
    their costs, and returns the result or the error of each. A KmsError that it raises is the outcome of all.
    """

    carry_out: Callable[[list[T]], Awaitable[Sequence[R | KmsError]]]
    items_max: int
    cost_max: float = float("inf")

    def __post_init__(self) -> None:
        self._waiting: deque[_Request[T, R]] = deque()
        self._waiting_cost = 0
        self._running: asyncio.Task[None] | None = None

    async def submit(self, item: T) -> R:
        """The result of the request, once it was carried out. Raises its error, and StorageUnavailableError."""
        if len(self._waiting) >= WAITING_MAX:
            raise StorageUnavailableError("too many changes are waiting for the disk; try again later")
        outcome = self._enqueue(item)
        try:
            return await outcome
        finally:
            del outcome  # the traceback of its error leads to this frame

    async def drain(self) -> None:
        """Returns when no request is waiting or under way."""
        while self._waiting or self._running is not None:
            await asyncio.sleep(0)
            await self.group_ended()

    async def group_ended(self) -> None:
        """Returns when the group that is under way now has ended, if there is one."""
        if self._running is not None:
            await asyncio.wait([self._running])

    def _enqueue(self, item: T, cost: int = 0, until_s: float = _NEVER_S) -> asyncio.Future[R]:
        """Its outcome. A request whose group has not begun at `until_s`, in the loop's time, fails."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[R] = loop.create_future()
        self._waiting.append(_Request(item, cost, until_s, outcome))
        self._waiting_cost += cost
        if self._running is None:
            self._running = loop.create_task(self._run(loop))  # begins after all callers of this turn
        return outcome

    def _abandon(self, outcome: asyncio.Future[R]) -> None:
        """The outcome after a defect, or if the loop is closing."""
        outcome.cancel()

    def _next_group(self, now_s: float) -> list[_Request[T, R]]:
        group: list[_Request[T, R]] = []
        cost = 0
        while self._waiting and len(group) < self.items_max:
            request = self._waiting[0]
            if group and cost + request.cost > self.cost_max:
                break
            self._waiting.popleft()
            self._waiting_cost -= request.cost
            if request.outcome.done():
                continue
            if request.until_s < now_s:
                request.outcome.set_exception(KmsTimeoutError("the key service did not take the request in time"))
                continue
            group.append(request)
            cost += request.cost
        return group

    async def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        group = self._next_group(loop.time())
        try:
            if group:
                self._settle(group, await self.carry_out([request.item for request in group]))
        except KmsError as error:
            self._settle(group, [copy_of(error) for _ in group])
        except BaseException:
            for request in group:
                if not request.outcome.done():
                    self._abandon(request.outcome)
            raise
        finally:
            group.clear()  # the frames of an error lead to this one
            # The callers of this group run before the next one begins, and may be part of it.
            self._running = loop.create_task(self._run(loop)) if self._waiting else None

    @staticmethod
    def _settle(group: list[_Request[T, R]], outcomes: Sequence[R | KmsError]) -> None:
        for request, outcome in zip(group, outcomes, strict=True):
            if request.outcome.done():
                continue
            if isinstance(outcome, KmsError):
                request.outcome.set_exception(outcome)
            else:
                request.outcome.set_result(outcome)
