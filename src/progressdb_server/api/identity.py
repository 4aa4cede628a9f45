"""Who calls: API keys and their roles, signed users, and the author that a call acts for.

Owns: the comparison of keys, the signature of a user id, and the rules by which an author is resolved. Invariants:
every configured key is compared, in constant time, whichever of them matches; a signature that is present is
verified whatever the role; a verified user is never overruled by what a query or a body says. Keys are in no repr
and in no error text. Pure: no I/O, no clock.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from progressdb_server.api import bounds, head
from progressdb_server.api.errors import ApiError, bad_request, forbidden, unauthorized


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


@lru_cache(maxsize=bounds.AUTHORS_COUNT_MAX)
def checked_author(author: str) -> str:
    """An author that may be stored: at most 128 bytes, no control character. Raises ApiError 400."""
    if len(author.encode()) > bounds.AUTHOR_BYTES_MAX:
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
