"""Sessions of the viewer: the state behind a cookie.

Owns: the table of sessions and its bounds. Invariants: a cookie contains a random token and nothing else, and the table
contains only the token's digest; a session ends `SESSION_SECONDS_MAX` after its login or `IDLE_SECONDS_MAX` after its
last use, whichever is first; there are at most `SESSIONS_COUNT_MAX`, and a new one beyond that ends the oldest that
opened no page, else the least recently used. Callers pass the time in.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from typing import Final

SESSION_SECONDS_MAX: Final = 8 * 3600
IDLE_SECONDS_MAX: Final = 30 * 60
SESSIONS_COUNT_MAX: Final = 64
TOKEN_BYTES: Final = 32


class ViewerSession:
    __slots__ = ("csrf", "key_number", "started_s", "used", "used_s")

    def __init__(self, key_number: int, now_s: float) -> None:
        self.key_number = key_number
        """Position of the admin key that began the session, as in the log."""
        self.csrf = new_token()
        self.started_s = now_s
        self.used_s = now_s
        self.used = False
        """Whether a page was opened in it."""

    def check(self, token: str) -> bool:
        """Whether the token of a form belongs to this session."""
        return same(self.csrf, token)

    def has_ended(self, now_s: float) -> bool:
        return now_s - self.started_s >= SESSION_SECONDS_MAX or now_s - self.used_s >= IDLE_SECONDS_MAX


class Sessions:
    def __init__(self) -> None:
        self._sessions: OrderedDict[bytes, ViewerSession] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, key_number: int, now_s: float) -> str:
        """Begin a session. Returns the token for the cookie."""
        self._drop_ended(now_s)
        while len(self._sessions) >= SESSIONS_COUNT_MAX:
            unused = (digest for digest, session in self._sessions.items() if not session.used)
            del self._sessions[next(unused, next(iter(self._sessions)))]
        token = new_token()
        self._sessions[_digest(token)] = ViewerSession(key_number, now_s)
        return token

    def find(self, token: str, now_s: float) -> ViewerSession | None:
        """The session of a cookie, if it has not ended. Counts as a use."""
        digest = _digest(token)
        session = self._sessions.get(digest)
        if session is None:
            return None
        if session.has_ended(now_s):
            del self._sessions[digest]
            return None
        session.used_s, session.used = now_s, True
        self._sessions.move_to_end(digest)
        return session

    def end(self, token: str) -> None:
        self._sessions.pop(_digest(token), None)

    def _drop_ended(self, now_s: float) -> None:
        for digest in [digest for digest, session in self._sessions.items() if session.has_ended(now_s)]:
            del self._sessions[digest]


def new_token() -> str:
    return secrets.token_urlsafe(TOKEN_BYTES)


def same(expected: str, actual: str) -> bool:
    """Whether two tokens are equal and not empty. Takes the same time for any `actual` of one length."""
    return bool(expected) and hmac.compare_digest(expected.encode(), actual.encode("utf-8", "surrogatepass"))


def _digest(token: str) -> bytes:
    """A token has 256 random bits, so its digest needs no key, and the time of a look-up reveals nothing about it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
