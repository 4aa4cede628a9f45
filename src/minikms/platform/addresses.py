"""Shares of network addresses.

Owns: which addresses count as one, and the places of peers that have proven nothing yet. Invariant: one address takes a
place from another only while it has fewer of them. No I/O, no clock.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from typing import Generic, TypeVar

H = TypeVar("H", bound=Hashable)


def address_group(address: str) -> str:
    """The addresses that share a bound: an IPv4 address, or the /64 from which an IPv6 host can choose addresses."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class Places(Generic[H]):
    """At most `count_max` places. When all are taken, the group that has the most of them loses its oldest one."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._count = 0
        self._by_group: dict[str, dict[H, None]] = {}
        """The holders of a group, the oldest one first."""

    def __len__(self) -> int:
        return self._count

    def take(self, group: str, holder: H) -> H | None:
        """Takes a place. Returns the holder that lost its place for it, or None."""
        loser = None
        if self._count >= self._count_max:
            most = max(self._by_group, key=lambda each: (len(self._by_group[each]), each == group))
            loser = next(iter(self._by_group[most]))
            self.leave(most, loser)
        self._by_group.setdefault(group, {})[holder] = None
        self._count += 1
        return loser

    def leave(self, group: str, holder: H) -> None:
        """Gives the place back, if the holder has one."""
        holders = self._by_group.get(group, {})
        if holder in holders:
            del holders[holder]
            self._count -= 1
            if not holders:
                del self._by_group[group]
