"""How often each verb is asked, and how long its answers take.

Owns: these counts, for `/metrics`. Invariants: every request that reaches a verb is counted once. An answer that is
given in the turn of the event loop in which it was asked counts from the turn's first request to the end of the
turn's audit write, so what is told is never less than the truth; one that is given later has its own time. It costs a
clock reading a turn, not one a request. It must never keep what a request held.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeVar

SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds; what takes longer is a rotation, or in trouble."""

T = TypeVar("T")


class Histogram:
    """How many values were at most how large. `bounds` ascend; one more count is for what is above all of them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """`count` times the same value."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


class VerbTimes:
    """Lives in the loop's thread. `clock`: seconds, never backwards."""

    def __init__(self, verbs: Iterable[str], clock: Callable[[], float] = time.perf_counter) -> None:
        self.requests = dict.fromkeys(verbs, 0)
        self.seconds = {verb: Histogram(SECONDS) for verb in self.requests}
        self._clock = clock
        self._asked: list[str] = []
        self._began_s = 0.0

    def asked(self, verb: str) -> None:
        """A request has reached the verb."""
        asked = self._asked
        if not asked:
            self._began_s = self._clock()
        asked.append(verb)

    def later(self, answer: Awaitable[T]) -> Awaitable[T]:
        """The request that was asked last is answered by `answer`, in some later turn. To be awaited in its place."""
        verb = self._asked.pop()
        self.requests[verb] += 1
        return self._timed(verb, self._clock(), answer)

    async def _timed(self, verb: str, began_s: float, answer: Awaitable[T]) -> T:
        try:
            return await answer
        finally:
            self.seconds[verb].add(self._clock() - began_s)

    def end_turn(self) -> None:
        """What was asked in this turn, and not put off, is answered."""
        if not self._asked:
            return
        seconds = self._clock() - self._began_s
        for verb, count in Counter(self._asked).items():
            self.requests[verb] += count
            self.seconds[verb].add(seconds, count)
        self._asked.clear()
