"""The wall clock, the ways to write a time, and the clock that measures leases.

Owns: how records and names show a time, in UTC, so that the texts sort as the times do. The wall clock must never be
used to measure how long something took: it may be set.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Final

HOUR_NS: Final = 3600 * 1_000_000_000
COUNTS_SUSPENSION: Final = hasattr(time, "CLOCK_BOOTTIME")
"""Whether `boot_ns` goes on while the machine is suspended."""
_BOOT_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Neither can be set."""


def now_ns() -> int:
    """The wall clock, in Unix nanoseconds."""
    return time.time_ns()


def boot_ns() -> int:
    """Nanoseconds since the machine started, with the time that it was suspended (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime_ns(_BOOT_CLOCK)


def rfc3339(ns: int) -> str:
    """`2026-11-24T15:00:00Z` (RFC 3339), from Unix nanoseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ns // 1_000_000_000))


def unix_seconds(text: str) -> int:
    """Unix seconds, from the text that `rfc3339` makes. Raises ValueError."""
    return int(datetime.fromisoformat(text).timestamp())


def stamp(ns: int) -> str:
    """`20261124T150000`, the suffix of a rotation backup, from Unix nanoseconds."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(ns // 1_000_000_000))


def now_rfc3339() -> str:
    """The wall clock as records carry it."""
    return rfc3339(now_ns())
