"""Access control: who may call what, and how often.

Owns: API keys and their roles, signed users, the author that a request acts for, the rate of each caller, and the
order of the checks that come before routing (docs/spec/server-http.md).

Invariants:
- A check runs only after all earlier ones have passed. A refused request has reached no route.
- A presented key is compared with every configured key in constant time, whichever of them matches.
- A signature that is present is verified, whatever the role. No query or body overrides a verified user.
- A key is in no repr, no error text and no log.
- A caller is identified before a token is taken: nobody uses up the tokens of another key or user. A refused caller
  takes a token of its address, from a separate table. Probes of health and readiness take none.
- A forwarded address is believed only from a proxy that the configuration names, and only for the rates by address:
  the allow list is compared with the peer of the connection.
- A token bucket holds at most `burst` tokens, and every table of clients has a bound.

No I/O, no clock: callers pass the time in, as seconds of a monotonic clock. The module must never know the parameters
of a route, so that any handler can be served behind it.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import math
import re
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Final

from progressdb_server.api.http import head, limits
from progressdb_server.api.http.errors import (
    AUTHOR_CONTROL_CHARACTER,
    AUTHOR_TOO_LONG,
    INVALID_SIGNATURE,
    MISSING_SIGNATURE,
    OTHER_AUTHOR_IN_BODY,
    OTHER_AUTHOR_IN_QUERY,
    ApiError,
    Header,
    bad_request,
    forbidden,
    too_many_requests,
    unauthorized,
)
from progressdb_server.config import Security, parse_network


# --- API keys ---------------------------------------------------------------------------------------------------
class Role(enum.StrEnum):
    ADMIN = "admin"
    BACKEND = "backend"
    FRONTEND = "frontend"
    UNAUTHENTICATED = "unauthenticated"
    """A caller without a key, if the configuration allows that."""


ANYONE: Final = frozenset(Role)
"""Every caller that access control lets through. It lets front-end keys and callers without a key reach only the paths
for users, and only signed.
"""
OPERATORS: Final = frozenset({Role.ADMIN, Role.BACKEND})
ADMINS: Final = frozenset({Role.ADMIN})
BACKENDS: Final = frozenset({Role.BACKEND})


class Principal:
    """One API key and its role, or a caller without a key.

    The key leaves this object only as a signature or a digest.
    """

    __slots__ = ("_key", "_scope_key", "number", "role")

    def __init__(self, role: Role, number: int = 0, key: bytes = b"", scope_secret: bytes = b"") -> None:
        self.role = role
        self.number = number
        """Position among all configured keys, from 1; 0 without a key. Identifies the key in logs."""
        self._key = key
        self._scope_key = hmac.digest(scope_secret, b"progressdb scope key v1\0" + key, "sha256")

    def __repr__(self) -> str:
        return f"Principal({self.role.value}, number={self.number})"

    def sign(self, user_id: str) -> str:
        """HMAC-SHA-256 of the user id under this key, in lower-case hex."""
        return hmac.digest(self._key, user_id.encode(), "sha256").hex()

    def scope(self, author: str) -> str:
        """A keyed digest that identifies (this key, this author) and reveals neither."""
        return hmac.digest(self._scope_key, b"progressdb idempotency scope v1\0" + author.encode(), "sha256").hex()


NOT_AUTHENTICATED: Final = Principal(Role.UNAUTHENTICATED)
"""The principal of a request before its key was checked."""


class KeyTable:
    """The configured keys. A presented key is compared by digest with all of them, so that timing reveals nothing."""

    def __init__(self, *, backend: Sequence[str] = (), frontend: Sequence[str] = (), admin: Sequence[str] = ()) -> None:
        # Every browser knows a front-end key. Scopes under it are keyed by a backend key instead, which is secret.
        shared_secret = backend[0].encode() if backend else b""
        self.anonymous = Principal(Role.UNAUTHENTICATED, scope_secret=shared_secret)
        self._entries: list[tuple[bytes, Principal]] = []
        for role, keys in ((Role.BACKEND, backend), (Role.FRONTEND, frontend), (Role.ADMIN, admin)):
            for key in keys:
                raw = key.encode()
                scope_secret = shared_secret if role is Role.FRONTEND else raw
                principal = Principal(role, len(self._entries) + 1, raw, scope_secret)
                self._entries.append((hashlib.sha256(raw).digest(), principal))
        self._signers = [principal for _, principal in self._entries if principal.role is Role.BACKEND]

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, presented: bytes) -> Principal | None:
        """The principal of a presented key; None if no configured key is equal to it."""
        digest = hashlib.sha256(presented).digest()
        found = None
        for expected, principal in self._entries:
            if hmac.compare_digest(expected, digest):
                found = principal
        return found

    def verifies(self, user_id: str, signature: bytes) -> bool:
        """Whether one of the backend keys made this signature."""
        valid = False
        for signer in self._signers:
            if hmac.compare_digest(signer.sign(user_id).encode("ascii"), signature):
                valid = True
        return valid


def presented_key(headers: head.Headers) -> bytes | None:
    """The key from `Authorization: Bearer` or `X-API-Key`.

    Two that differ give an empty key, which is always unknown.
    """
    if head.AUTHORIZATION not in headers:
        return headers.get(head.API_KEY)
    bearer = None
    scheme, _, credentials = headers.get(head.AUTHORIZATION, b"").partition(b" ")
    if scheme.lower() == b"bearer":
        bearer = credentials.strip(b" ")
    plain = headers.get(head.API_KEY)
    if bearer is None or plain is None:
        return plain if bearer is None else bearer
    return bearer if hmac.compare_digest(bearer, plain) else b""


# --- users and authors ------------------------------------------------------------------------------------------
def verified_user(headers: head.Headers, keys: KeyTable, *, required: bool) -> str | None:
    """The user whose signature was verified; None if no signature was sent and none is required.

    Raises ApiError 401 for a missing or wrong signature, 400 for a user id that cannot be stored.
    """
    user_id = headers.get(head.USER_ID)
    signature = headers.get(head.USER_SIGNATURE)
    if signature is None and not required:
        return None
    if not user_id or not signature:
        raise unauthorized(MISSING_SIGNATURE)
    user = head.header_text(user_id, "X-User-ID")
    if not keys.verifies(user, signature):
        raise unauthorized(INVALID_SIGNATURE)
    return checked_author(user)


_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@lru_cache(maxsize=limits.AUTHORS_COUNT_MAX)
def checked_author(author: str) -> str:
    """The author, if it can be stored: at most 128 bytes, no control character. Raises ApiError 400."""
    if len(author.encode()) > limits.AUTHOR_BYTES_MAX:
        raise bad_request(AUTHOR_TOO_LONG)
    if _CONTROL.search(author):
        raise bad_request(AUTHOR_CONTROL_CHARACTER)
    return author


def resolve_author(
    user: str | None, headers: head.Headers, query: dict[str, str], body_author: str | None = None
) -> str | None:
    """The author that a request acts for: the verified user, or else the first of body, header and query; or None.

    Raises ApiError 403 if the query or the body contradicts a verified user, 400 for an author that cannot be stored.
    """
    in_query = query.get("author") if query else None
    if user is not None:
        if in_query and in_query != user:
            raise forbidden(OTHER_AUTHOR_IN_QUERY)
        if body_author and body_author != user:
            raise forbidden(OTHER_AUTHOR_IN_BODY)
        return user
    in_header = headers.get(head.USER_ID)
    given = (body_author, head.header_text(in_header, "X-User-ID") if in_header else None, in_query)
    # All are checked, also those that are not used: whether a value is refused must not depend on the other two.
    checked = [checked_author(author) for author in given if author]
    return checked[0] if checked else None


# --- rates ------------------------------------------------------------------------------------------------------
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


def address_group(address: str) -> str:
    """The addresses that share one bucket: an IPv4 address, or the /64 from which an IPv6 host can choose addresses."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


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
        """As `TokenBucket.wait_s`."""
        bucket = self._buckets.get(caller)
        if bucket is None:
            return self._shared.wait_s(now_s) if self._is_crowded(now_s) else 0.0
        return bucket.wait_s(now_s)

    def take(self, caller: Hashable, now_s: float) -> float:
        """As `TokenBucket.take`."""
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._new(caller, now_s)
        else:
            self._buckets.move_to_end(caller)
        return bucket.take(now_s)

    def _new(self, caller: Hashable, now_s: float) -> TokenBucket:
        if self._is_crowded(now_s):
            return self._shared
        if len(self._buckets) >= self._count_max:
            self._buckets.popitem(last=False)
        made = self._buckets[caller] = TokenBucket(self._rps, self._burst)
        return made

    def _is_crowded(self, now_s: float) -> bool:
        """Whether the table is full and no bucket in it makes room."""
        return len(self._buckets) >= self._count_max and not next(iter(self._buckets.values())).is_full(now_s)


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
    """Whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(_OPEN_PREFIXES)


def for_users(path: str) -> bool:
    """Whether a front-end key may call the path."""
    return any(path == prefix or path.startswith(prefix + "/") for prefix in _USER_PATHS)


class AllowList:
    """Networks that may call; an empty list admits every address. Caches its decisions, up to a bound."""

    def __init__(self, entries: tuple[str, ...], *, count_max: int = limits.ADDRESSES_COUNT_MAX) -> None:
        self._networks = tuple(parse_network(entry) for entry in entries)
        self._cache: OrderedDict[str, bool] = OrderedDict()
        self._count_max = count_max

    def __len__(self) -> int:
        """How many decisions are cached."""
        return len(self._cache)

    def admits(self, address: str) -> bool:
        if not self._networks:
            return True
        admitted = self._cache.get(address)
        if admitted is None:
            admitted = self._is_listed(address)
            while len(self._cache) >= self._count_max:
                self._cache.popitem(last=False)
            self._cache[address] = admitted
        return admitted

    def _is_listed(self, address: str) -> bool:
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
    ) -> tuple[Principal, str | None]:
        """Checks 3 to 7 of the contract. Returns the caller and its verified user, if any.

        `repeated` is a decisive header that was sent twice, `address` that of the peer, `client` the one for which it
        speaks (`Proxies.client`). Raises ApiError 400, 401, 403, 429.
        """
        if not self._allowed.admits(address):
            raise forbidden()
        if repeated is not None:
            raise bad_request(f"the header {repeated.decode('ascii')} is sent twice")
        try:
            principal, user = self._identified(path, headers)
        except ApiError:
            if self._limited:
                _check_wait(self._failures.take(address_group(client), now_s))
            raise
        if self._limited and path not in PROBE_PATHS:
            if principal.number or user is not None:
                _check_wait(self._users.take((principal.number, user), now_s))
            else:
                _check_wait(self._addresses.take(address_group(client), now_s))
        return principal, user

    def _identified(self, path: str, headers: head.Headers) -> tuple[Principal, str | None]:
        """Raises ApiError 400, 401, 403."""
        if is_open(path):
            return self.keys.anonymous, None
        principal = self._principal(headers)
        trusted = principal.role in OPERATORS
        if not trusted and not for_users(path):
            raise forbidden()
        return principal, verified_user(headers, self.keys, required=not trusted)

    def _principal(self, headers: head.Headers) -> Principal:
        key = presented_key(headers)
        principal = self.keys.find(key) if key else None
        if principal is not None:
            return principal
        if self._allow_unauthenticated:
            return self.keys.anonymous
        raise unauthorized()


def _check_wait(wait_s: float) -> None:
    """Raises ApiError 429 if there was no token."""
    if wait_s > 0:
        raise too_many_requests(math.ceil(wait_s))
