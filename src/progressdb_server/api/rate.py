"""Token buckets: how often a key, or an address without one, may call.

Owns: the arithmetic of one bucket and a bounded table of buckets by address. Invariants: time is passed in (seconds
of a monotonic clock); a bucket holds at most `burst` tokens; the table never grows past its bound. No I/O, no clock.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict


class TokenBucket:
    """`rps` tokens a second up to `burst`; each call takes one."""

    __slots__ = ("_at_s", "_burst", "_rps", "_tokens")

    def __init__(self, rps: float, burst: int) -> None:
        self._rps = rps
        self._burst = burst
        self._tokens = float(burst)
        self._at_s = -math.inf

    def take(self, now_s: float) -> float:
        """Take one token. Returns 0.0, or the seconds until one is there (and takes none)."""
        if now_s > self._at_s:
            if self._at_s > -math.inf:
                self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rps)
            self._at_s = now_s
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rps


def address_group(address: str) -> str:
    """The unit that shares one bucket: an IPv4 address, or the /64 that one IPv6 host can choose its addresses
    from.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class AddressBuckets:
    """Buckets of callers without a key. Forgets the address that was unused for longest when it is full."""

    def __init__(self, rps: float, burst: int, *, count_max: int) -> None:
        self._rps = rps
        self._burst = burst
        self._count_max = count_max
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str, now_s: float) -> float:
        group = address_group(address)
        bucket = self._buckets.get(group)
        if bucket is None:
            while len(self._buckets) >= self._count_max:
                self._buckets.popitem(last=False)
            bucket = self._buckets[group] = TokenBucket(self._rps, self._burst)
        else:
            self._buckets.move_to_end(group)
        return bucket.take(now_s)
