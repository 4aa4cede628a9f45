"""Sessions of the viewer: what stands behind a cookie.

Owns: the table of sessions and its bounds. Invariants: a cookie holds a random token and nothing else, the table only
its digest; a session ends `SESSION_SECONDS_MAX` after its login and `IDLE_SECONDS_MAX` after its last use, whichever is
first; there are at most `SESSIONS_COUNT_MAX`, and a new one then ends the one unused for longest. Time is passed in.
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


class Session:
    __slots__ = ("csrf", "key_number", "started_s", "used_s")

    def __init__(self, key_number: int, now_s: float) -> None:
        self.key_number = key_number
        """Of the admin key that began it, as in the log."""
        self.csrf = new_token()
        self.started_s = now_s
        self.used_s = now_s

    def check(self, token: str) -> bool:
        """Whether a form was made for this session."""
        return same(self.csrf, token)


class Sessions:
    def __init__(self) -> None:
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()  # unused for longest first

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, key_number: int, now_s: float) -> str:
        """The token for the cookie."""
        self._drop_old(now_s)
        while len(self._sessions) >= SESSIONS_COUNT_MAX:
            self._sessions.popitem(last=False)
        token = new_token()
        self._sessions[_digest(token)] = Session(key_number, now_s)
        return token

    def find(self, token: str, now_s: float) -> Session | None:
        digest = _digest(token)
        session = self._sessions.get(digest)
        if session is None:
            return None
        if now_s - session.started_s >= SESSION_SECONDS_MAX or now_s - session.used_s >= IDLE_SECONDS_MAX:
            del self._sessions[digest]
            return None
        session.used_s = now_s
        self._sessions.move_to_end(digest)
        return session

    def end(self, token: str) -> None:
        self._sessions.pop(_digest(token), None)

    def _drop_old(self, now_s: float) -> None:
        over = [
            digest
            for digest, session in self._sessions.items()
            if now_s - session.started_s >= SESSION_SECONDS_MAX or now_s - session.used_s >= IDLE_SECONDS_MAX
        ]
        for digest in over:
            del self._sessions[digest]


def new_token() -> str:
    return secrets.token_urlsafe(TOKEN_BYTES)


def same(expected: str, given: str) -> bool:
    return bool(expected) and hmac.compare_digest(expected.encode(), given.encode("utf-8", "surrogatepass"))


def _digest(token: str) -> bytes:
    """The token is random enough that its digest needs no key; looking it up leaks nothing of it through time."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
