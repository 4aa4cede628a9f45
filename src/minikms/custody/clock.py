"""The wall clock of the data directory's files.

Owns: the two ways in which a time is written. Invariant: both are UTC and sort as text.
"""

from __future__ import annotations

import time


def now_ns() -> int:
    return time.time_ns()


def rfc3339(ns: int) -> str:
    """`2026-11-24T15:00:00Z` (RFC 3339), from Unix nanoseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ns // 1_000_000_000))


def stamp(ns: int) -> str:
    """`20261124T150000`, the suffix of a backup, from Unix nanoseconds."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(ns // 1_000_000_000))
