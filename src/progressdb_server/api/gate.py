"""The checks that every request passes, in the order of the contract.

1. CORS headers for an allowed origin, 2. OPTIONS is answered, 3. client address, 4. API key, 5. what a front-end key
may reach, 6. rate, 7. the signed user. Invariants: a later check never runs before an earlier one has passed; every
check but the rate is a pure function of the request's head, the client's address and the configuration; time is
passed in. A refused request has reached no route. Nothing here knows a route's parameters, so that any handler can
stand behind it.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from typing import Final

from progressdb_server.api import bounds, head, identity
from progressdb_server.api.errors import ApiError, Header, bad_request, forbidden, unauthorized
from progressdb_server.api.identity import Principal, Role
from progressdb_server.api.rate import AddressBuckets, TokenBucket
from progressdb_server.config import Security, parse_network

OPEN_PATHS: Final = frozenset({"/healthz", "/openapi.yaml", "/docs", "/viewer"})
_OPEN_PREFIXES: Final = ("/docs/", "/viewer/")
"""Need no key: documentation, and pages that ask for one themselves."""
_USER_PATHS: Final = ("/v1/messages", "/v1/threads")
"""What a front-end key may reach, with what is below."""

_CORS_HEADERS: Final[tuple[Header, ...]] = (
    (b"vary", b"Origin"),
    (b"access-control-allow-methods", b"GET,POST,PUT,DELETE,PATCH,OPTIONS"),
    (b"access-control-max-age", b"600"),
    (b"access-control-allow-headers", b"Authorization,Content-Type,X-API-Key,X-User-ID,X-User-Signature"),
    (b"access-control-expose-headers", b"X-Role-Name"),
)


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(_OPEN_PREFIXES)


def for_users(path: str) -> bool:
    """Whether a path belongs to the routes that front ends call."""
    return any(path == prefix or path.startswith(prefix + "/") for prefix in _USER_PATHS)


class AllowList:
    """Networks that may call. An empty list admits everybody. Remembers its answer for a bounded number of
    addresses.
    """

    def __init__(self, entries: tuple[str, ...], *, count_max: int = bounds.ADDRESSES_COUNT_MAX) -> None:
        self._networks = tuple(parse_network(entry) for entry in entries)
        self._known: OrderedDict[str, bool] = OrderedDict()
        self._count_max = count_max

    def admits(self, address: str) -> bool:
        if not self._networks:
            return True
        known = self._known.get(address)
        if known is None:
            known = self._look_up(address)
            while len(self._known) >= self._count_max:
                self._known.popitem(last=False)
            self._known[address] = known
        return known

    def _look_up(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        return any(parsed in network for network in self._networks)


class Gate:
    """All checks over one configuration. One instance for each server."""

    def __init__(self, security: Security) -> None:
        self._origins = frozenset(origin.lower().encode() for origin in security.cors.allowed_origins)
        self._any_origin = b"*" in self._origins
        self._allowed = AllowList(security.ip_whitelist)
        api_keys = security.api_keys
        self.keys = identity.KeyTable(backend=api_keys.backend, frontend=api_keys.frontend, admin=api_keys.admin)
        self._allow_unauthenticated = api_keys.allow_unauth
        rate = security.rate_limit
        self._limited = rate.rps > 0
        self._buckets = [TokenBucket(rate.rps, rate.burst) for _ in range(len(self.keys))] if self._limited else []
        self._addresses = AddressBuckets(rate.rps, rate.burst, count_max=bounds.ADDRESSES_COUNT_MAX)

    def cors_headers(self, headers: head.Headers) -> tuple[Header, ...]:
        """For an origin that is allowed; nothing for any other, or for none."""
        origin = headers.get(head.ORIGIN)
        if not origin or not (self._any_origin or origin.lower() in self._origins):
            return ()
        return ((b"access-control-allow-origin", origin), *_CORS_HEADERS)

    def admit(
        self, path: str, headers: head.Headers, repeated: bytes | None, address: str, now_s: float
    ) -> tuple[Principal, str | None]:
        """Checks 3 to 7: the caller and its verified user, if it has one. Raises ApiError."""
        if not self._allowed.admits(address):
            raise forbidden()
        if repeated is not None:
            raise bad_request(f"the header {repeated.decode('ascii')} is sent twice")
        needs_key = not is_open(path)
        principal = self._principal(headers) if needs_key else self.keys.anonymous
        if needs_key and principal.role not in (Role.ADMIN, Role.BACKEND) and not for_users(path):
            raise forbidden()
        if self._limited:
            self._check_rate(principal, address, now_s)
        if not needs_key:
            return principal, None
        required = principal.role in (Role.FRONTEND, Role.UNAUTHENTICATED)
        return principal, identity.signed_user(headers, self.keys, required=required)

    def _principal(self, headers: head.Headers) -> Principal:
        key = identity.presented_key(headers)
        principal = self.keys.find(key) if key else None
        if principal is not None:
            return principal
        if self._allow_unauthenticated:
            return self.keys.anonymous
        raise unauthorized("unauthorized")

    def _check_rate(self, principal: Principal, address: str, now_s: float) -> None:
        if principal.number:
            wait_s = self._buckets[principal.number - 1].take(now_s)
        else:
            wait_s = self._addresses.take(address, now_s)
        if wait_s > 0:
            retry_after = str(max(1, math.ceil(wait_s))).encode("ascii")
            raise ApiError(429, "rate limit exceeded", ((b"retry-after", retry_after),))
