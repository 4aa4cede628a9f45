"""Admission: the session of a connection, the principal of each request, and the refusal of peers that may not ask.

Owns: the sessions, which outlive a seal and an unseal, because connections stay open; the bounds of the connections of
each uid and of all that are not allowed, and the places that are kept for those who may seal; the refusals of callers
that have no principal, and of those that a limit refuses. Invariants: the peer is known from its credentials before a
byte is parsed; a peer that is not allowed gets 401 on every path but `/health`, and, for the daemon's own uid,
`/ready`; its connection is closed. A peer has the rights of the policy in force, not of the one at the time when it
connected; connections of a uid that is no longer allowed are closed. A request that names a principal and is not of a
proxy, one of a proxy that names none, and one for a name that no grant has, get 403 on every other path. It must never
look into a request beyond its method, its path and the name of a principal.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from minikms import api
from minikms.api.errors import ForbiddenError, KmsRefusedError, TooLargeError
from minikms.audit import Event
from minikms.http import (
    GroupFull,
    HttpRequest,
    Link,
    ParsedHead,
    Response,
    error_response,
    raised_response,
)
from minikms.policy.policy import Policy, actor
from minikms.policy.principal import Principal
from minikms.processes.peer import PID_UNKNOWN, Peer, is_overflow_uid, read_peer
from minikms_daemon.server.refusals import ACTOR_OTHERS, PRINCIPALS_OTHERS, RefusalAggregator

if TYPE_CHECKING:
    from minikms.policy.meters import Meters

UNAUTHORISED_CONNECTIONS_MAX: Final = 64
"""Open connections of uids that are not allowed, so that they can't use up the places of the allowed ones."""
UNAUTHORISED_CONNECTIONS_SHARE: Final = 4
"""The share of connections for uids that are not allowed, where few are admitted: at most one in this many."""

UID_CONNECTIONS_SHARE: Final = 2
"""A uid gets at most one in this many of all connections."""
KEPT_CONNECTIONS_MAX: Final = 32
"""Connections that nobody gets but uids that may seal, so that an operator can do so beside any other users."""
KEPT_CONNECTIONS_SHARE: Final = 8
"""The share of connections that is kept where few are admitted: one in this many."""
SEALER_CONNECTIONS_MAX: Final = 4
"""A uid that may seal and has fewer connections gets one of those that are kept."""

LAGGING_WINDOW_NS: Final = 60 * 1_000_000_000
"""Refusals because the auditor lags are counted for this long: each line about them makes the lag larger."""

_HEADER_NAME: Final = "X-MiniKMS-Principal"
_ROOT_PATHS: Final = (api.UNSEAL.path, api.ADD_ROOT.path)
ROOT_BODY_TEXT: Final = f"the body of this request has at most {api.ROOT_BODY_BYTES_MAX} bytes"

HEALTHY: Final = Response(200, b"ok", content_type="text/plain")


class Session:
    """A connection: its peer, and the principal that the peer is under the policy of `generation`, if any.

    `counted`: it takes one of the places for uids that are not allowed.
    """

    __slots__ = ("counted", "generation", "peer", "principal")

    def __init__(self, peer: Peer, principal: Principal | None, generation: int) -> None:
        self.peer = peer
        self.principal = principal
        self.generation = generation
        self.counted = principal is None


class Admission:
    """The sessions of one process. `report` gets the audit events; the application that serves sets it. `refusals`
    counts, by reason, what the policy refused.
    """

    def __init__(self, policy: Policy, *, connections_max: int, report: Callable[[Event], None]) -> None:
        self.report = report
        self.refusals: Counter[str] = Counter()
        self._policy = policy
        self._unauthorised_peers = RefusalAggregator(api.CODE_UNAUTHORIZED, others=ACTOR_OTHERS)
        self._wrong_proxies = RefusalAggregator(api.CODE_FORBIDDEN, others=ACTOR_OTHERS)
        self._too_large = RefusalAggregator(api.CODE_TOO_LARGE, others=ACTOR_OTHERS)
        self._limited_users = RefusalAggregator(api.CODE_LIMIT_EXCEEDED, others=ACTOR_OTHERS)
        self._limited = RefusalAggregator(api.CODE_LIMIT_EXCEEDED, others=PRINCIPALS_OTHERS)
        self._lagging = RefusalAggregator(api.CODE_AUDIT_LAGGING, others=ACTOR_OTHERS, window_ns=LAGGING_WINDOW_NS)
        self._by_uid: Counter[int] = Counter()
        self._uid_max = connections_max // UID_CONNECTIONS_SHARE
        self._free_max = connections_max - min(KEPT_CONNECTIONS_MAX, connections_max // KEPT_CONNECTIONS_SHARE)
        self._unauthorised = 0
        self._unauthorised_max = min(UNAUTHORISED_CONNECTIONS_MAX, connections_max // UNAUTHORISED_CONNECTIONS_SHARE)

    @property
    def generation(self) -> int:
        """The generation of the policy in force."""
        return self._policy.generation

    def open_session(self, connection: socket.socket) -> Session | GroupFull | None:
        """None closes the connection: its peer is unknown, or too many unauthorised peers are connected already."""
        try:
            peer = read_peer(connection)
        except OSError:
            return None
        principal = self._principal(peer)
        if principal is None and self._unauthorised >= self._unauthorised_max:
            self._refuse(peer)
            return None
        if not self._has_place(peer.uid, principal):
            return GroupFull(peer.uid)
        self._by_uid[peer.uid] += 1
        if principal is None:
            self._unauthorised += 1
        elif peer.pid != PID_UNKNOWN and not peer.pid_certain:
            detail = "the process that connected had ended: its pid may be another's by now"
            self.report(Event(type="peer", actor=principal.actor, pid=peer.pid, detail=detail))
        return Session(peer, principal, self._policy.generation)

    def close_session(self, session: Session) -> None:
        self._unauthorised -= session.counted
        uid = session.peer.uid
        self._by_uid[uid] -= 1
        if not self._by_uid[uid]:
            del self._by_uid[uid]

    def _has_place(self, uid: int, principal: Principal | None) -> bool:
        """Whether one more connection of the uid is accepted. The engine has the bound of all."""
        count = self._by_uid[uid]
        if principal is not None and principal.roles.issuperset(api.SEAL.roles) and count < SEALER_CONNECTIONS_MAX:
            return True
        return count < self._uid_max and self._by_uid.total() < self._free_max

    def may_stay(self, session: Session) -> bool:
        """False for a session of a uid that was allowed when it connected, and no longer is."""
        self._renew(session)
        return session.counted or session.principal is not None

    def admit(self, session: Session, head: ParsedHead) -> Response | None:
        """Refuses a body before it is received: of a peer without a principal, on any path, and a large one on the
        paths that take a root key or a share.
        """
        try:
            if self._caller(session, head) is None:
                return self._turn_away(session)
        except KmsRefusedError as error:
            refused = raised_response(error)
            refused.close = True
            return refused
        if head.content_length > api.ROOT_BODY_BYTES_MAX and head.path.startswith(_ROOT_PATHS):
            self._report(self._too_large.note(actor(session.peer.uid), time.monotonic_ns()))
            return error_response(413, api.CODE_TOO_LARGE, ROOT_BODY_TEXT, close=True)
        return None

    def caller(self, session: Session, head: ParsedHead, ready: Callable[[], Response]) -> Principal | Response:
        """The principal of a request, under the policy in force; or the answer to one that needs or has none. `ready`
        answers `/ready`, and may raise. Raises ForbiddenError, InvalidRequestError.
        """
        self._renew(session)
        if is_request(head, api.HEALTH):
            return HEALTHY
        if is_request(head, api.READY) and (session.principal is not None or _is_own(session.peer)):
            return ready()
        who = self._caller(session, head)
        return self._turn_away(session) if who is None else who

    def _caller(self, session: Session, head: ParsedHead) -> Principal | None:
        """None: the peer is not allowed. Raises ForbiddenError, InvalidRequestError."""
        self._renew(session)
        peer, who = session.peer, session.principal
        if who is None:
            return None
        try:
            if head.principal is not None:
                named = self._policy.principal(peer.uid, peer.pid, head.principal)
                if named is not None and not named.roles:
                    raise ForbiddenError("no grant of the policy gives this principal a role that a proxy can use")
                return named
            if self._policy.is_proxy(peer.uid):
                raise ForbiddenError(f"a proxy must name the principal for whom it asks: {_HEADER_NAME}")
        except KmsRefusedError:
            self.refusals["proxy"] += 1
            self._report(self._wrong_proxies.note(actor(peer.uid), time.monotonic_ns()))
            raise
        return who

    def _renew(self, session: Session) -> None:
        """The policy may have changed since the last request of the session."""
        generation = self._policy.generation
        if session.generation != generation:
            session.principal = self._principal(session.peer)
            session.generation = generation

    def _principal(self, peer: Peer) -> Principal | None:
        return None if is_overflow_uid(peer.uid) else self._policy.principal(peer.uid, peer.pid)

    def limited(self, event: Event) -> None:
        """A limit has refused the request of this event."""
        via = str(event.facts.get("via", ""))
        refusals = self._limited if via else self._limited_users
        self._report(refusals.note(event.actor, time.monotonic_ns(), via=via))

    def lagging(self, session: Session) -> None:
        """A request of this session was refused because the auditor lags."""
        self._report(self._lagging.note(actor(session.peer.uid), time.monotonic_ns()))

    def refusals_due(self) -> list[Event]:
        """The events that stand for the refusals of the windows that have ended."""
        now_ns = time.monotonic_ns()
        return [event for refusals in self._aggregators() for event in refusals.due(now_ns)]

    def refusals_so_far(self) -> list[Event]:
        """The events for everything that was counted and not reported."""
        return [event for refusals in self._aggregators() for event in refusals.flush()]

    def _aggregators(self) -> tuple[RefusalAggregator, ...]:
        users = self._unauthorised_peers, self._wrong_proxies, self._too_large, self._limited_users, self._lagging
        return *users, self._limited

    def _turn_away(self, session: Session) -> Response:
        self._refuse(session.peer)
        text = (
            f"uid {session.peer.uid} may not use the key service; its operator can name this user in --allowed-uids, "
            "or in a grant of the policy file"
        )
        return error_response(401, api.CODE_UNAUTHORIZED, text, close=True)

    def _refuse(self, peer: Peer) -> None:
        self._report(self._unauthorised_peers.note(actor(peer.uid), time.monotonic_ns()))

    def _report(self, event: Event | None) -> None:
        if event is not None:
            self.report(event)


def _is_own(peer: Peer) -> bool:
    """Whether the peer is the daemon's own user."""
    return peer.uid == os.geteuid() and not is_overflow_uid(peer.uid)


def require_short_body(request: HttpRequest) -> None:
    """For a body with a root key or a share, which is searched in the loop's thread. `Admission.admit` is asked only
    about one that has not arrived as a whole, and does not know the size of a chunked one. Raises TooLargeError.
    """
    if len(request.body) > api.ROOT_BODY_BYTES_MAX and request.path.startswith(_ROOT_PATHS):
        raise TooLargeError(ROOT_BODY_TEXT)


@dataclass(eq=False, repr=False, kw_only=True)
class AdmittingApplication:
    """What both applications of the daemon, the unsealed and the sealed one, have of `minikms.http.Application`.

    `meters`: those of the policy file. The last requests before a seal are answered by the sealed application.
    """

    admission: Admission
    meters: Meters | None

    def open_session(self, sock: socket.socket, tls: ssl.SSLObject | None, link: Link) -> Session | GroupFull | None:
        return self.admission.open_session(sock)

    def group(self, session: Session) -> int:
        """The uid: those of one user share the bounds of incomplete requests and of unread answers."""
        return session.peer.uid

    def may_stay(self, session: Session) -> bool:
        return self.admission.may_stay(session)

    def close_session(self, session: Session) -> None:
        self.admission.close_session(session)

    def admit(self, session: Session, head: ParsedHead) -> Response | None:
        return self.admission.admit(session, head)

    def refused(self, session: Session | None, status: int, code: str) -> None:
        """Input that is not a request reaches no verb. The engine counts it; it is not audited."""


def is_request(head: ParsedHead, verb: api.Verb[api.Request, str]) -> bool:
    """Whether a request is one of the probes `HEALTH` and `READY`."""
    return (head.method, head.path) == (verb.method, verb.path)
