"""Access control: who may call which path, in the order of the checks that come before routing
(docs/spec/server-http.md).

Owns: the paths that need no key and those of users, the allow list, the proxies whose word counts, and the order of the
checks. Keys and signatures are in `api.gate.keys`, rates in `api.gate.rates`.

Invariants:
- A check runs only after all earlier ones have passed. A refused request has reached no route.
- A caller is identified before a token is taken: nobody uses up the tokens of another key or user. A refused caller
  takes a token of its address, from a separate table. Probes of health and readiness take none. A body costs a user one
  more for each BODY_BYTES_PER_TOKEN: the time that it takes grows with its length.
- A forwarded address is believed only from a proxy that the configuration names, and only for the rates by address:
  the allow list is compared with the peer of the connection.

No I/O, no clock: callers pass the time in. The module must never know the parameters of a route, so that any handler
can be served behind it.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from minikms.platform.addresses import address_group
from progressdb_server.api.gate import head, limits
from progressdb_server.api.gate.errors import RATE_LIMITED, ApiError, bad_request, forbidden, retry_after, unauthorized
from progressdb_server.api.gate.keys import OPERATORS, Caller, KeyTable, presented_key, verified_user
from progressdb_server.api.gate.rates import RateBuckets
from progressdb_server.config import Security, parse_network
from progressdb_server.http.asgi import Header

# --- paths and networks -----------------------------------------------------------------------------------------
OPEN_PATHS: Final = frozenset({"/", "/healthz", "/readyz", "/openapi.yaml", "/docs", "/viewer"})
PROBE_PATHS: Final = frozenset({"/healthz", "/readyz"})
"""Paths that take no token of a rate, so that a monitor behind the address of many clients always gets its answer. Each
answer is cheap: `/readyz` asks the disk and the key service once for all callers."""
_OPEN_PREFIXES: Final = ("/docs/", "/viewer/")
"""Paths that need no key: documentation, and the viewer, which has its own login."""
_USER_PATHS: Final = ("/v1/messages", "/v1/threads")
"""Paths that a front-end key may call, and everything below them."""

_CORS_HEADERS: Final[tuple[Header, ...]] = (
    (b"vary", b"Origin"),
    (b"access-control-allow-methods", b"GET,POST,PUT,DELETE,PATCH,OPTIONS"),
    (b"access-control-max-age", b"600"),
    (
        b"access-control-allow-headers",
        b"Authorization,Content-Type,X-API-Key,X-User-ID,X-User-Signature,Idempotency-Key,X-Identity,X-Request-Id,"
        b"If-None-Match",
    ),
    (b"access-control-expose-headers", b"X-Role-Name,Retry-After,ETag"),
)


def is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(_OPEN_PREFIXES)


def for_users(path: str) -> bool:
    """Whether a front-end key may call the path."""
    return any(path == prefix or path.startswith(prefix + "/") for prefix in _USER_PATHS)


class AllowList:
    """Networks that may call; an empty list admits every address. Caches its decisions, up to a bound."""

    def __init__(self, entries: tuple[str, ...]) -> None:
        self._networks = tuple(parse_network(entry) for entry in entries)
        self.is_listed = lru_cache(limits.ADDRESSES_COUNT_MAX)(self._look_up)

    def admits(self, address: str) -> bool:
        return not self._networks or self.is_listed(address)

    def _look_up(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        return any(parsed in network for network in self._networks)


def forwarded_address(stated: bytes) -> str | None:
    """The address in one element of `X-Forwarded-For`, with or without a port; None if there is none."""
    text = stated.strip(b" \t").decode("ascii", "replace")
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    return None if "%" in text else str(parsed)  # a zone means something on the proxy's own links only


class Proxies:
    """The proxies that the configuration names, each of which stands for many clients."""

    def __init__(self, networks: tuple[str, ...] = ()) -> None:
        self._networks = AllowList(networks) if networks else None

    def __contains__(self, address: str) -> bool:
        return self._networks is not None and self._networks.admits(address)

    def client(self, peer: str, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """The address for which the peer of a connection speaks: its own, unless it is a named proxy. Then it is the
        last address of `X-Forwarded-For`; while that is a named proxy too, the one before it. The client may have
        written the addresses further left."""
        if peer not in self:
            return peer
        stated = b",".join(value for name, value in headers if name == head.FORWARDED_FOR)
        address = peer
        for element in reversed(
            stated.rsplit(b",", limits.FORWARDED_HOPS_COUNT_MAX)[-limits.FORWARDED_HOPS_COUNT_MAX :]
        ):
            forwarded = forwarded_address(element)
            if forwarded is None:
                break
            address = forwarded
            if address not in self:
                break
        return address


# --- the checks in order ----------------------------------------------------------------------------------------
class AccessControl:
    """All checks under one configuration. A server has one instance."""

    def __init__(self, security: Security, proxies: tuple[str, ...] = ()) -> None:
        """`proxies`: those whose `X-Forwarded-For` is believed."""
        self.proxies = Proxies(proxies)
        self._origins = frozenset(origin.lower().encode() for origin in security.cors.allowed_origins)
        self._any_origin = b"*" in self._origins
        self._allowed = AllowList(security.ip_whitelist)
        api_keys = security.api_keys
        self.keys = KeyTable(backend=api_keys.backend, frontend=api_keys.frontend, admin=api_keys.admin)
        self._allow_unauthenticated = api_keys.allow_unauth
        rate = security.rate_limit
        self._limited = rate.rps > 0
        self._users = RateBuckets(rate.rps, rate.burst, count_max=limits.USERS_COUNT_MAX)
        self._addresses = RateBuckets(rate.rps, rate.burst, count_max=limits.ADDRESSES_COUNT_MAX)
        self._failures = RateBuckets(rate.rps, rate.burst, count_max=limits.ADDRESSES_COUNT_MAX)

    def cors_headers(self, headers: head.Headers) -> tuple[Header, ...]:
        """The CORS headers of a response; none unless the request names an allowed origin."""
        origin = headers.get(head.ORIGIN)
        if not origin or not (self._any_origin or origin.lower() in self._origins):
            return ()
        return ((b"access-control-allow-origin", origin), *_CORS_HEADERS)

    def authorize(
        self, path: str, headers: head.Headers, repeated: bytes | None, address: str, client: str, *, now_s: float
    ) -> tuple[Caller, str | None]:
        """Checks 3 to 7 of the contract. Returns the caller and its verified user, if any.

        `repeated` is a decisive header that was sent twice, `address` that of the peer, `client` the one for which it
        speaks (`Proxies.client`). Raises ApiError 400, 401, 403, 429.
        """
        if not self._allowed.admits(address):
            raise forbidden()
        if repeated is not None:
            raise bad_request(f"the header {repeated.decode('ascii')} is sent twice")
        try:
            caller, user = self._identified(path, headers)
        except ApiError:
            if self._limited:
                _check_wait(self._failures.take(address_group(client), now_s))
            raise
        if self._limited and path not in PROBE_PATHS:
            if caller.number or user is not None:
                _check_wait(self._users.take((caller.number, user), now_s))
            else:
                _check_wait(self._addresses.take(address_group(client), now_s))
        return caller, user

    def charge(self, caller: Caller, user: str | None, client: str, body_bytes: int) -> None:
        """Take the tokens that the body of a request costs. Those of an API key without a user cost none."""
        if not self._limited:
            return
        count = body_bytes // limits.BODY_BYTES_PER_TOKEN
        if user is not None:
            self._users.charge((caller.number, user), count)
        elif not caller.number:
            self._addresses.charge(address_group(client), count)

    def _identified(self, path: str, headers: head.Headers) -> tuple[Caller, str | None]:
        """The caller that the headers name, and a signed user's id. Raises ApiError 400, 401, 403."""
        if is_open(path):
            return self.keys.anonymous, None
        caller = self._caller(headers)
        trusted = caller.role in OPERATORS
        if not trusted and not for_users(path):
            raise forbidden()
        return caller, verified_user(headers, self.keys, required=not trusted)

    def _caller(self, headers: head.Headers) -> Caller:
        key = presented_key(headers)
        caller = self.keys.find(key) if key else None
        if caller is not None:
            return caller
        if self._allow_unauthenticated:
            return self.keys.anonymous
        raise unauthorized()


def _check_wait(wait_s: float) -> None:
    """Checks that there was a token. Raises ApiError 429."""
    if wait_s > 0:
        raise ApiError(429, RATE_LIMITED, (retry_after(math.ceil(wait_s)),))
