"""What all connections of a server share: bytes of bodies, unread bytes of responses, lists, idle connections.

Owns: the budget of bodies with its shares, the unread responses, the turns of lists, and the idle connections of each
address. Invariants:
- The bytes of all bodies that are being received or handled are at most the budget, beside `BODY_UNCOUNTED_BYTES_MAX`
  for each connection.
- No payer, no address, and before the payer is known no claim of an address takes more than its share.
- The unread bytes of all responses are at most `UNREAD_BYTES_MAX`, beside `WRITE_BUFFER_BYTES_MAX` for each connection.
  Beyond it the address with the most of them loses the connection whose client has not read for the longest time.
- At most `LISTS_COUNT_MAX` lists are read at a time, and `ADDRESS_LISTS_COUNT_MAX` of one address. Others wait for
  their turn, one address after the other. Meanwhile a list that its client leaves unread is given up.
- Without room for a new connection, the address with the most idle ones loses the one that has been idle longest; so
  does an address beyond a bound that the configuration sets. Idle is a connection that waits for its client: for the
  first byte of a request, or for the rest of one.

An address is an IPv4 address or the /64 of an IPv6 address. A proxy that the configuration names, and a peer without an
address such as a Unix socket, stand for many clients: no bound for one address applies to them. The module knows no key
and no user: the application says who pays.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Final, NamedTuple, Protocol

from minikms.platform.addresses import address_group
from progressdb_server.config import ServerSection
from progressdb_server.http import limits
from progressdb_server.http.asgi import ClientGoneError, Header, ListsFullError

_DEFAULTS: Final = ServerSection()


class Closable(Protocol):
    def close_idle(self) -> None: ...


class Readable(Protocol):
    def close_unread(self) -> None:
        """Close the connection, whose client does not read, or is not to read on."""
        ...

    @property
    def is_closing(self) -> bool: ...


class _Unread(NamedTuple):
    group: str
    bytes: int
    since_s: float


class Shares:
    def __init__(
        self,
        server: ServerSection = _DEFAULTS,
        is_proxy: Callable[[str], bool] = lambda address: False,
        claim: Callable[[Sequence[Header]], bytes] = lambda headers: b"",
    ) -> None:
        """`is_proxy`: whether an address stands for many clients. `claim`: what the headers of a request say of its
        sender, before anyone has verified it."""
        self.bodies_bytes = 0
        """The bytes of bodies in flight."""
        self._budget_bytes = server.body_bytes
        self._used_bytes: dict[Hashable, int] = {}
        self._idle_max = server.idle_connections
        self._idle: dict[str, dict[Closable, None]] = {}  # of each address, longest idle first
        self._is_proxy = is_proxy
        self.claim = claim
        self.unread_bytes = 0
        self._unread: dict[Readable, _Unread] = {}  # longest unread first
        self.lists = Lists(self._unread)

    def group(self, address: str) -> str:
        """The key under which the bounds of one address are counted; empty for an address without bounds."""
        if not address or self._is_proxy(address):
            return ""
        return address_group(address)

    # --- idle connections -----------------------------------------------------------------------------------------
    def idle(self, group: str, connection: Closable) -> None:
        """The connection waits for its client. It may be closed in the place of another one."""
        waiting = self._idle.setdefault(group, {})
        waiting[connection] = None
        if group and 0 < self._idle_max < len(waiting):
            self._close_oldest(group)

    def make_room(self) -> bool:
        """Close an idle connection of the address that has the most. False: there is none."""
        if self._idle:
            self._close_oldest(max(self._idle, key=lambda group: len(self._idle[group])))
            return True
        return False

    def _close_oldest(self, group: str) -> None:
        oldest = next(iter(self._idle[group]))
        self.busy(group, oldest)
        oldest.close_idle()

    def busy(self, group: str, connection: Closable) -> None:
        """The connection has a request that is whole, or is closed."""
        waiting = self._idle.get(group)
        if waiting is not None:
            waiting.pop(connection, None)
            if not waiting:
                del self._idle[group]

    # --- unread responses -----------------------------------------------------------------------------------------
    def unread(self, group: str, connection: Readable, count: int) -> None:
        """`count` bytes wait until the client reads."""
        self._unread[connection] = _Unread(group, count, asyncio.get_running_loop().time())
        self.unread_bytes += count
        while self.unread_bytes > limits.UNREAD_BYTES_MAX:
            by_group: Counter[str] = Counter()
            for one in self._unread.values():
                by_group[one.group] += one.bytes
            ((most, _),) = by_group.most_common(1)
            longest = next(other for other, one in self._unread.items() if one.group == most)
            self.read(longest)
            longest.close_unread()

    def read(self, connection: Readable) -> None:
        """The client has read, or the connection is closed."""
        size = self._unread.pop(connection, None)
        if size is not None:
            self.unread_bytes -= size.bytes

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


class Lists:
    """The turns of lists, each of which occupies memory while it is read and sent."""

    def __init__(self, unread: dict[Readable, _Unread]) -> None:
        self._unread = unread
        self._by_group: Counter[str] = Counter()
        self._count = 0
        self._reading: set[Readable] = set()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # of each address, the next one first
        self._sweeper: asyncio.TimerHandle | None = None

    def begin(self, group: str, connection: Readable) -> Awaitable[None] | None:
        """Take a turn. The result is None, or waits for the turn and raises ListsFullError, or ClientGoneError if
        the client leaves meanwhile. With an error there is no turn to end."""
        if not self._take(group):
            return self._wait(group, connection)
        self._reading.add(connection)
        return None

    def end(self, group: str, connection: Readable) -> None:
        self._reading.discard(connection)
        self._give_back(group)

    def _take(self, group: str) -> bool:
        if self._count >= limits.LISTS_COUNT_MAX:
            return False
        if group:
            if self._by_group[group] >= limits.ADDRESS_LISTS_COUNT_MAX:
                return False
            self._by_group[group] += 1
        self._count += 1
        return True

    def _give_back(self, group: str) -> None:
        self._count -= 1
        if group:
            self._by_group[group] -= 1
            if not self._by_group[group]:
                del self._by_group[group]
        for other in list(self._waiting):
            if self._take(other):
                waiting = self._waiting.pop(other)
                waiting.popleft().set_result(None)
                if waiting:
                    self._waiting[other] = waiting  # behind the other addresses
                return

    async def _wait(self, group: str, connection: Readable) -> None:
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.setdefault(group, deque()).append(turn)
        if self._sweeper is None:
            self._sweeper = loop.call_later(limits.LIST_STALL_SECONDS_MAX, self._sweep)
        try:
            await asyncio.wait({turn}, timeout=limits.LIST_WAIT_SECONDS_MAX)
        except asyncio.CancelledError:
            if turn.done():
                self._give_back(group)
            raise
        finally:
            if not turn.done():
                self._waiting[group].remove(turn)
                if not self._waiting[group]:
                    del self._waiting[group]
        if not turn.done():
            raise ListsFullError
        if connection.is_closing:
            self._give_back(group)
            raise ClientGoneError
        self._reading.add(connection)

    def _sweep(self) -> None:
        """Give up the lists that their clients leave unread while others wait."""
        self._sweeper = None
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        since_s = loop.time() - limits.LIST_STALL_SECONDS_MAX
        for connection in [other for other, one in self._unread.items() if one.since_s <= since_s]:
            if connection in self._reading:
                connection.close_unread()
        self._sweeper = loop.call_later(limits.LIST_STALL_SECONDS_MAX / 2, self._sweep)


Charges = tuple[tuple[Hashable, float], ...]
"""Names and shares that a body is charged to."""


class BodyAccount:
    """What one body takes from the budget, before its sender is identified and afterwards."""

    __slots__ = ("_bytes", "_charges", "_group", "_shares")

    def __init__(self, shares: Shares, group: str, claim: bytes) -> None:
        """`group`: see `Shares.group`. `claim`: see `Shares`."""
        self._shares = shares
        self._group = group
        self._bytes = 0
        claimed = (group, hashlib.sha256(claim).digest())
        self._charges: Charges = (*self._of_address(), (claimed, limits.UNVERIFIED_BODIES_SHARE))

    def _of_address(self) -> Charges:
        return ((self._group, limits.ADDRESS_BODIES_SHARE),) if self._group else ()

    def grow_to(self, count: int) -> bool:
        """The body has `count` bytes so far. Returns False if they do not fit."""
        count = min(count, limits.REQUEST_BYTES_MAX)  # the rest of a longer body is not kept
        if count > self._bytes:
            if not self._shares.take(self._charges, count - self._bytes):
                return False
            self._bytes = count
        return True

    def identify(self, payer: Hashable) -> bool:
        """Charge the payer, or for None only the address. Returns False if a share is used up."""
        count = self._bytes
        self.close()
        own = () if payer is None else ((payer, limits.USER_BODIES_SHARE),)
        self._charges = (*self._of_address(), *own)
        return self.grow_to(count)

    def close(self) -> None:
        """The body is no longer kept."""
        if self._bytes:
            self._shares.give_back(self._charges, self._bytes)
            self._bytes = 0
