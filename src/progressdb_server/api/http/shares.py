"""What all connections of a server share: the bytes of bodies in flight, and how many connections may be idle.

Owns: the budget of bodies with its shares, and the list of idle connections of each address. Invariants:
- The bytes of all bodies that are being received or handled are at most the budget, beside `BODY_UNCOUNTED_BYTES_MAX`
  for each connection.
- No user, no address, and before the signature is verified no API key of an address takes more than its share.
- An address with too many idle connections loses the one that has been idle longest. Idle is a connection that waits
  for its client: for the first byte of a request, or for the rest of one.

An address is an IPv4 address or the /64 of an IPv6 address. A proxy that the configuration names, and a peer without an
address such as a Unix socket, stand for many clients: no bound for one address applies to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Final, Protocol

from progressdb_server.api.http import limits
from progressdb_server.api.http.access import Principal, Proxies, Role, address_group
from progressdb_server.config import Server

_DEFAULTS: Final = Server()


class Closable(Protocol):
    def close_idle(self) -> None:
        """Close the connection, which is idle."""
        ...


class Shares:
    def __init__(self, server: Server = _DEFAULTS) -> None:
        self.bodies_bytes = 0
        """Of the bodies that are in flight."""
        self._budget_bytes = server.body_bytes
        self._used_bytes: dict[Hashable, int] = {}
        self._idle_max = server.idle_connections
        self._idle: dict[str, dict[Closable, None]] = {}  # of each address, longest idle first
        self._proxies = Proxies(server.proxies)

    def group(self, address: str) -> str:
        """By what the bounds of one address are counted; empty for an address to which none applies."""
        if not address or address in self._proxies:
            return ""
        return address_group(address)

    # --- idle connections -----------------------------------------------------------------------------------------
    def idle(self, group: str, connection: Closable) -> None:
        """The connection waits for its client. It may be closed in the place of another one."""
        if not group or not self._idle_max:
            return
        waiting = self._idle.setdefault(group, {})
        waiting[connection] = None
        if len(waiting) > self._idle_max:
            oldest = next(iter(waiting))
            del waiting[oldest]
            oldest.close_idle()

    def busy(self, group: str, connection: Closable) -> None:
        """The connection has a request that is whole, or is closed."""
        waiting = self._idle.get(group)
        if waiting is not None:
            waiting.pop(connection, None)
            if not waiting:
                del self._idle[group]

    # --- bodies ---------------------------------------------------------------------------------------------------
    def take(self, charges: Charges, count: int) -> bool:
        """Take `count` bytes from the budget and from each share. Takes none and returns False if one is used up."""
        used = self._used_bytes
        if self.bodies_bytes + count > self._budget_bytes:
            return False
        if any(used.get(name, 0) + count > share * self._budget_bytes for name, share in charges):
            return False
        self.bodies_bytes += count
        for name, _ in charges:
            used[name] = used.get(name, 0) + count
        return True

    def give_back(self, charges: Charges, count: int) -> None:
        self.bodies_bytes -= count
        for name, _ in charges:
            left = self._used_bytes[name] - count
            if left:
                self._used_bytes[name] = left
            else:
                del self._used_bytes[name]


Charges = tuple[tuple[Hashable, float], ...]
"""Names and shares that a body is charged to."""


class BodyAccount:
    """What one body takes from the budget. `key` is the API key as it was presented."""

    __slots__ = ("_bytes", "_charges", "_group", "_shares")

    def __init__(self, shares: Shares, address: str, principal: Principal | None, user: str | None, key: bytes) -> None:
        """`principal` is None until the caller was identified."""
        self._shares = shares
        self._group = shares.group(address)
        self._bytes = 0
        self._charges: Charges = self._of_unknown(key) if principal is None else self._of(principal, user)

    def _of_address(self) -> Charges:
        return ((self._group, limits.ADDRESS_BODIES_SHARE),) if self._group else ()

    def _of_unknown(self, key: bytes) -> Charges:
        caller = (self._group, hashlib.sha256(key).digest())
        return (*self._of_address(), (caller, limits.UNVERIFIED_BODIES_SHARE))

    def _of(self, principal: Principal, user: str | None) -> Charges:
        if principal.role in (Role.ADMIN, Role.BACKEND):
            return self._of_address()  # it acts for many users
        return (*self._of_address(), ((principal.number, user), limits.USER_BODIES_SHARE))

    def grow_to(self, count: int) -> bool:
        """The body has `count` bytes so far. Returns False if they do not fit."""
        count = min(count, limits.REQUEST_BYTES_MAX)  # the rest of a longer body is not kept
        if count > self._bytes:
            if not self._shares.take(self._charges, count - self._bytes):
                return False
            self._bytes = count
        return True

    def identify(self, principal: Principal, user: str | None) -> bool:
        """Charge the caller, who is known now. Returns False if its share is used up."""
        count = self._bytes
        self.close()
        self._charges = self._of(principal, user)
        return self.grow_to(count)

    def close(self) -> None:
        """The body is no longer kept."""
        if self._bytes:
            self._shares.give_back(self._charges, self._bytes)
            self._bytes = 0
