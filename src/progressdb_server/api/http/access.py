"""Who calls: API keys and their roles, signed users, and the author that a call acts for.

Owns: the comparison of keys, the signature of a user id, and the rules by which an author is resolved. Invariants:
every configured key is compared, in constant time, whichever of them matches; a signature that is present is
verified whatever the role; a verified user is never overruled by what a query or a body says. Keys are in no repr
and in no error text. Pure: no I/O, no clock.

Token buckets: how often a key, or an address without one, may call.

Owns: the arithmetic of one bucket and a bounded table of buckets by address. Invariants: time is passed in (seconds
of a monotonic clock); a bucket holds at most `burst` tokens; the table never grows past its bound. No I/O, no clock.

The checks that every request passes, in the order of the contract.

1. CORS headers for an allowed origin, 2. OPTIONS is answered, 3. client address, 4. API key, 5. what a front-end key
may reach, 6. rate, 7. the signed user. Invariants: a later check never runs before an earlier one has passed; every
check but the rate is a pure function of the request's head, the client's address and the configuration; time is
passed in. A refused request has reached no route. Nothing here knows a route's parameters, so that any handler can
stand behind it.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from progressdb_server.api.http import head, limits
from progressdb_server.api.http.errors import ApiError, Header, bad_request, forbidden, unauthorized
from progressdb_server.config import Security, parse_network


class Role(enum.StrEnum):
    ADMIN = "admin"
    BACKEND = "backend"
    FRONTEND = "frontend"
    UNAUTHENTICATED = "unauthenticated"
    """Without a key, where the operator allows that."""


class Principal:
    """One API key and its role, or the caller without one. The key leaves only as a signature or a keyed digest."""

    __slots__ = ("_key", "_scope_key", "number", "role")

    def __init__(self, role: Role, number: int = 0, key: bytes = b"", sponsor: bytes = b"") -> None:
        self.role = role
        self.number = number
        """Position among all keys, from 1; 0 without a key. Names a key in logs and in the table of rates."""
        self._key = key
        self._scope_key = hmac.digest(sponsor, b"progressdb scope key v1\0" + key, "sha256")

    def __repr__(self) -> str:
        return f"Principal({self.role.value}, number={self.number})"

    def sign(self, user_id: str) -> str:
        """HMAC-SHA-256 of the user id under this key, in lower-case hex."""
        return hmac.digest(self._key, user_id.encode(), "sha256").hex()

    def scope(self, author: str) -> str:
        """A keyed digest that names (this key, this author) and gives away neither."""
        return hmac.digest(self._scope_key, b"progressdb idempotency scope v1\0" + author.encode(), "sha256").hex()


NOBODY: Final = Principal(Role.UNAUTHENTICATED)
"""Before the gate has looked."""


class KeyTable:
    """The configured keys. A presented key is compared by digest with all of them, so that time tells nothing."""

    def __init__(self, *, backend: Sequence[str] = (), frontend: Sequence[str] = (), admin: Sequence[str] = ()) -> None:
        sponsor = backend[0].encode() if backend else b""
        # A front-end key is known to many: what it scopes is keyed by the backend key that its users' signatures need.
        self.anonymous = Principal(Role.UNAUTHENTICATED, sponsor=sponsor)
        self._entries: list[tuple[bytes, Principal]] = []
        for role, keys in ((Role.BACKEND, backend), (Role.FRONTEND, frontend), (Role.ADMIN, admin)):
            for key in keys:
                raw = key.encode()
                principal = Principal(role, len(self._entries) + 1, raw, sponsor if role is Role.FRONTEND else raw)
                self._entries.append((hashlib.sha256(raw).digest(), principal))
        self._signers = [principal for _, principal in self._entries if principal.role is Role.BACKEND]

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, presented: bytes) -> Principal | None:
        digest = hashlib.sha256(presented).digest()
        found = None
        for expected, principal in self._entries:
            if hmac.compare_digest(expected, digest):
                found = principal
        return found

    def verifies(self, user_id: str, signature: bytes) -> bool:
        """Whether any configured backend key made this signature."""
        valid = False
        for signer in self._signers:
            if hmac.compare_digest(signer.sign(user_id).encode("ascii"), signature):
                valid = True
        return valid


def presented_key(headers: head.Headers) -> bytes | None:
    """The key from `Authorization: Bearer` or `X-API-Key`; two that differ count as an unknown one."""
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


def signed_user(headers: head.Headers, keys: KeyTable, *, required: bool) -> str | None:
    """The verified user of a call; None where no signature was sent and none is required. Raises ApiError 401."""
    user_id = headers.get(head.USER_ID)
    signature = headers.get(head.USER_SIGNATURE)
    if signature is None and not required:
        return None
    if not user_id or not signature:
        raise unauthorized("missing signature headers")
    user = head.header_text(user_id, "X-User-ID")
    if not keys.verifies(user, signature):
        raise unauthorized("invalid signature")
    return checked_author(user)


_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@lru_cache(maxsize=limits.AUTHORS_COUNT_MAX)
def checked_author(author: str) -> str:
    """An author that may be stored: at most 128 bytes, no control character. Raises ApiError 400."""
    if len(author.encode()) > limits.AUTHOR_BYTES_MAX:
        raise bad_request("author too long")
    if _CONTROL.search(author):
        raise bad_request("author holds a control character")
    return author


def resolve_author(
    user: str | None, headers: head.Headers, query: dict[str, str], body_author: str | None = None
) -> str | None:
    """The author that a call acts for: the verified user; without one the body's, the header's, the query's; or None.

    Raises ApiError 403 where something contradicts a verified user, 400 for an author that can't be stored.
    """
    in_query = query.get("author") if query else None
    if user is not None:
        if in_query and in_query != user:
            raise _mismatch("query param")
        if body_author and body_author != user:
            raise _mismatch("body author")
        return user
    in_header = headers.get(head.USER_ID)
    given = (body_author, head.header_text(in_header, "X-User-ID") if in_header else None, in_query)
    # each is checked, that the same value is not refused or taken by what stands beside it
    checked = [checked_author(author) for author in given if author]
    return checked[0] if checked else None


def _mismatch(where: str) -> ApiError:
    return forbidden(f"author mismatch between signature and {where}")


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

    def __init__(self, entries: tuple[str, ...], *, count_max: int = limits.ADDRESSES_COUNT_MAX) -> None:
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
        self.keys = KeyTable(backend=api_keys.backend, frontend=api_keys.frontend, admin=api_keys.admin)
        self._allow_unauthenticated = api_keys.allow_unauth
        rate = security.rate_limit
        self._limited = rate.rps > 0
        self._buckets = [TokenBucket(rate.rps, rate.burst) for _ in range(len(self.keys))] if self._limited else []
        self._addresses = AddressBuckets(rate.rps, rate.burst, count_max=limits.ADDRESSES_COUNT_MAX)

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
        return principal, signed_user(headers, self.keys, required=required)

    def _principal(self, headers: head.Headers) -> Principal:
        key = presented_key(headers)
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
