"""A lease of the daemon: what it may serve until an instant, and not after it.

Owns: until when a lease holds, and the application that asks it. Invariants: a lease counts from before the question
that was granted, by a clock that neither an administrator nor a suspended machine stops (`clock.boot_ns`); a grant
never shortens it; after its end no request is begun, and no answer leaves. It must never ask for a grant: that is
`minikms_daemon.seal.unlocking`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from minikms.http import Application, HttpRequest, Response
from minikms.platform.clock import boot_ns
from minikms_daemon.server.admission import Session

SECOND_NS: Final = 1_000_000_000
"""The second of `--root-lease`; the tests have shorter ones."""

Answer = bytes | Response | Awaitable[bytes | Response]


class Lease:
    """Over until the first grant. It reads no clock: each instant is passed in."""

    __slots__ = ("length_ns", "until_ns")

    def __init__(self, seconds: int) -> None:
        self.length_ns = seconds * SECOND_NS
        self.until_ns = 0

    def grant(self, asked_ns: int) -> None:
        """`asked_ns`: before the question was sent."""
        self.until_ns = max(self.until_ns, asked_ns + self.length_ns)

    def end(self) -> None:
        self.until_ns = 0

    def left_ns(self, now_ns: int) -> int:
        return max(0, self.until_ns - now_ns)

    def is_due(self, now_ns: int) -> bool:
        """Whether it is time to ask again: half of it is over."""
        return self.left_ns(now_ns) <= self.length_ns // 2


class LeasedApplication:
    """The engine's application in the place of `app`: see `minikms.http`. `ended` seals the daemon, replaces the
    answers that have not left, and returns the application that serves from then on.
    """

    def __init__(self, app: Application[Session], *, lease: Lease, ended: Callable[[], Application[Session]]) -> None:
        self._lease = lease
        self._ended = ended
        self._handle, self._commit = app.handle, app.commit
        self.open_session, self.close_session = app.open_session, app.close_session
        self.group, self.may_stay, self.admit, self.refused = app.group, app.may_stay, app.admit, app.refused

    def handle(self, session: Session, request: HttpRequest) -> Answer:
        if boot_ns() < self._lease.until_ns:
            return self._handle(session, request)
        return self._ended().handle(session, request)

    def commit(self) -> bool | None:
        """It checks the lease after the audit lines of the turn were written, which may have waited for the disk."""
        committed = self._commit()
        if committed is not None and boot_ns() >= self._lease.until_ns:
            self._ended()
        return committed
