"""How fast a job may go, so that requests keep their latency.

Owns: the moment at which the next chunk may begin. Invariant: over any longer time no more than the rate is let
through; of an idle time, or of a chunk that took its time, no more than `BEHIND_S_MAX` is made up for afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

BEHIND_S_MAX: Final = 0.1
"""Beside requests every chunk begins a little late: without making up for that, a rate is never reached."""


class Pace:
    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_second` 0: as fast as it goes."""
        self._per_second = per_second
        self._clock = clock
        self._free_at = 0.0

    @property
    def bounded(self) -> bool:
        return self._per_second > 0

    async def take(self, cost: float) -> None:
        """Wait until work of this cost may begin; others always get their turn."""
        if not self.bounded:
            await asyncio.sleep(0)
            return
        now = self._clock()
        begins_at = max(now - BEHIND_S_MAX, self._free_at)
        self._free_at = begins_at + cost / self._per_second
        await asyncio.sleep(max(0.0, begins_at - now))
