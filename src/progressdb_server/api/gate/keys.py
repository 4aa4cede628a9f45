"""API keys, signatures of users, and authors.

Owns: the roles of keys, who a request's key and signature say it is, and the author that it acts for. Invariants:
- A presented key is compared with every configured key in constant time, whichever of them matches.
- A signature that is present is verified, whatever the role. No query or body overrides a verified user.
- A key is in no repr, no error text and no log.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from progressdb_server.api.gate import head, limits
from progressdb_server.api.gate.errors import (
    AUTHOR_CONTROL_CHARACTER,
    AUTHOR_TOO_LONG,
    INVALID_SIGNATURE,
    MISSING_SIGNATURE,
    OTHER_AUTHOR_IN_BODY,
    OTHER_AUTHOR_IN_QUERY,
    bad_request,
    forbidden,
    unauthorized,
)
from progressdb_server.http.asgi import Header


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


class Caller:
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
        return f"Caller({self.role.value}, number={self.number})"

    def sign(self, user_id: str) -> str:
        """HMAC-SHA-256 of the user id under this key, in lower-case hex."""
        return hmac.digest(self._key, user_id.encode(), "sha256").hex()

    def scope(self, author: str) -> str:
        """A keyed digest that identifies (this key, this author) and reveals neither."""
        return hmac.digest(self._scope_key, b"progressdb idempotency scope v1\0" + author.encode(), "sha256").hex()


NOT_AUTHENTICATED: Final = Caller(Role.UNAUTHENTICATED)
"""The caller of a request before its key was checked."""


class KeyTable:
    """The configured keys. A presented key is compared by digest with all of them, so that timing reveals nothing."""

    def __init__(self, *, backend: Sequence[str] = (), frontend: Sequence[str] = (), admin: Sequence[str] = ()) -> None:
        # Every browser knows a front-end key. Scopes under it are keyed by a backend key instead, which is secret.
        shared_secret = backend[0].encode() if backend else b""
        self.anonymous = Caller(Role.UNAUTHENTICATED, scope_secret=shared_secret)
        self._entries: list[tuple[bytes, Caller]] = []
        for role, keys in ((Role.BACKEND, backend), (Role.FRONTEND, frontend), (Role.ADMIN, admin)):
            for key in keys:
                raw = key.encode()
                scope_secret = shared_secret if role is Role.FRONTEND else raw
                caller = Caller(role, len(self._entries) + 1, raw, scope_secret)
                self._entries.append((hashlib.sha256(raw).digest(), caller))
        self._signers = [caller for _, caller in self._entries if caller.role is Role.BACKEND]

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, presented: bytes) -> Caller | None:
        """The caller of a presented key; None if no configured key is equal to it."""
        digest = hashlib.sha256(presented).digest()
        match = None
        for expected, caller in self._entries:
            if hmac.compare_digest(expected, digest):
                match = caller
        return match

    def verifies(self, user_id: str, signature: bytes) -> bool:
        """Whether one of the backend keys made this signature."""
        valid = False
        for signer in self._signers:
            if hmac.compare_digest(signer.sign(user_id).encode("ascii"), signature):
                valid = True
        return valid


def presented(headers: Sequence[Header]) -> bytes:
    """The key that a request presents, by which its body is charged before anyone has verified it; empty for none."""
    return presented_key(dict(headers)) or b""


def payer(caller: Caller, user: str | None) -> tuple[int, str | None] | None:
    """Whose share of all bodies a request takes; None for a caller that acts for many users."""
    return None if caller.role in OPERATORS else (caller.number, user)


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
    authors = (body_author, head.header_text(in_header, "X-User-ID") if in_header else None, in_query)
    # All are checked, also those that are not used: whether a value is refused must not depend on the other two.
    checked = [checked_author(author) for author in authors if author]
    return checked[0] if checked else None
