"""What the server has done in the last hour and day, for the charts of the overview.

Owns: the samples of running totals, and the rates between them. Invariants: memory is bounded by SAMPLES_MAX for each
period; totals only rise, and a restart begins anew. Callers pass the time in. It must never ask for anything: `take`
reads numbers that the process has counted already.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Final, NamedTuple

HOUR_S: Final = 3600
DAY_S: Final = 24 * HOUR_S
SAMPLES_MAX: Final = 240
"""The samples of one chart: one each 15 s for an hour, each 6 minutes for a day."""
SAMPLE_S: Final = HOUR_S / SAMPLES_MAX


class Totals(NamedTuple):
    """Since the start. `requests` and their `seconds` are of the API, `errors` those answered with 5xx."""

    appends: int = 0
    reads: int = 0
    encryptions: int = 0
    decryptions: int = 0
    errors: int = 0
    requests: int = 0
    seconds: float = 0.0


class Point(NamedTuple):
    """The time of a sample, and the rates or the mean since the one before."""

    at_s: float
    values: tuple[float, ...]


class _Samples:
    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next_s = 0.0
        self.taken: deque[tuple[float, Totals]] = deque(maxlen=SAMPLES_MAX + 1)

    def take(self, now_s: float, totals: Totals) -> None:
        if now_s >= self._next_s:
            self._next_s = now_s + self._every_s * 0.99  # the caller's timer may come a little early
            self.taken.append((now_s, totals))


class History:
    """`take` is called each SAMPLE_S."""

    def __init__(self) -> None:
        self._hour, self._day = _Samples(SAMPLE_S), _Samples(DAY_S / SAMPLES_MAX)

    def take(self, now_s: float, totals: Totals) -> None:
        self._hour.take(now_s, totals)
        self._day.take(now_s, totals)

    def rates(self, *names: str, day: bool = False) -> list[Point]:
        """The rates of these totals, a second."""
        return [
            Point(at_s, tuple((getattr(new, name) - getattr(old, name)) / (at_s - before_s) for name in names))
            for before_s, old, at_s, new in self._pairs(day)
        ]

    def latency(self, *, day: bool = False) -> list[Point]:
        """The mean time of a request, in milliseconds; 0 where there was none."""
        return [
            Point(at_s, (1000 * (new.seconds - old.seconds) / max(1, new.requests - old.requests),))
            for _, old, at_s, new in self._pairs(day)
        ]

    def _pairs(self, day: bool) -> list[tuple[float, Totals, float, Totals]]:
        samples = list((self._day if day else self._hour).taken)
        return [(*one, *other) for one, other in itertools.pairwise(samples)]
