"""Rates: token buckets of callers.

Owns: the buckets. Invariants: a bucket holds at most `burst` tokens and owes at most what it gains in
OWED_SECONDS_MAX; a table of buckets has a bound. No I/O, no clock: callers pass the time in, as seconds of a monotonic
clock.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

OWED_SECONDS_MAX: Final = 10


class TokenBucket:
    """Gains `rps` tokens a second, holds at most `burst`; each request takes one."""

    __slots__ = ("_at_s", "_burst", "_rps", "_tokens")

    def __init__(self, rps: float, burst: int) -> None:
        self._rps = rps
        self._burst = burst
        self._tokens = float(burst)
        self._at_s = -math.inf

    def is_full(self, now_s: float) -> bool:
        """Whether it holds as many tokens as a new bucket."""
        return self._tokens + (now_s - self._at_s) * self._rps >= self._burst

    def wait_s(self, now_s: float) -> float:
        """The seconds until there is a token; 0.0 if there is one."""
        tokens = self._tokens + max(0.0, now_s - self._at_s) * self._rps
        return 0.0 if tokens >= 1 else (1 - tokens) / self._rps

    def take(self, now_s: float) -> float:
        """Take one token and return 0.0, or take none and return the seconds until there is one."""
        if now_s > self._at_s:
            if self._at_s > -math.inf:
                self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rps)
            self._at_s = now_s
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rps

    def charge(self, count: int) -> None:
        """Take `count` more tokens for a request that has had its own. What the bucket lacks it owes."""
        self._tokens = max(self._tokens - count, -OWED_SECONDS_MAX * self._rps)


class RateBuckets:
    """A token bucket for each caller. In a full table, the least recently used bucket makes room if it is full again,
    because a new one is equal to it; otherwise all callers without a bucket share one."""

    def __init__(self, rps: float, burst: int, *, count_max: int) -> None:
        self._rps = rps
        self._burst = burst
        self._count_max = count_max
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()  # least recently used first
        self._shared = TokenBucket(rps, burst)

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, caller: Hashable, now_s: float) -> float:
        bucket = self._buckets.get(caller)
        if bucket is None:
            return self._shared.wait_s(now_s) if self._is_crowded(now_s) else 0.0
        return bucket.wait_s(now_s)

    def take(self, caller: Hashable, now_s: float) -> float:
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._new(caller, now_s)
        else:
            self._buckets.move_to_end(caller)
        return bucket.take(now_s)

    def charge(self, caller: Hashable, count: int) -> None:
        """Charges the caller's bucket. A caller without one owes nothing: it shares a bucket with others."""
        bucket = self._buckets.get(caller)
        if bucket is not None:
            bucket.charge(count)

    def _new(self, caller: Hashable, now_s: float) -> TokenBucket:
        if self._is_crowded(now_s):
            return self._shared
        if len(self._buckets) >= self._count_max:
            self._buckets.popitem(last=False)
        bucket = self._buckets[caller] = TokenBucket(self._rps, self._burst)
        return bucket

    def _is_crowded(self, now_s: float) -> bool:
        """Whether the table is full and no bucket in it makes room."""
        return len(self._buckets) >= self._count_max and not next(iter(self._buckets.values())).is_full(now_s)
