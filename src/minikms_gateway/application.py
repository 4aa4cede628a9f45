"""From a request on the network to a request to the key service.

Owns: the sessions, the principal of each request, the bounds of connections, and the table of the verbs that a proxy
may use. Invariants: without a principal every path but `/health` is 401, before a body is received; certificate, CA and
CRL are checked again for each request; a verb that is not `proxied` in `minikms.api.verbs` is 403 without a request to
the key service; a header that only a proxy sends is refused. A request for one principal is never made for another:
the name is decided in the turn in which the request is sent on. It must never look into a body, which
`minikms_gateway.transit` does.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Hashable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlencode

from minikms import api
from minikms.api import Verb
from minikms.api.errors import InvalidRequestError, KmsRefusedError, UnauthorizedError
from minikms.http import (
    TOO_MANY_CONNECTIONS,
    HttpRequest,
    Link,
    ParsedHead,
    Refusal,
    Response,
    Routes,
    no_route,
    parse_query,
    raised_response,
)
from minikms.platform.addresses import Places, address_group
from minikms.processes.tracing import TracedExchange, Tracing
from minikms_gateway.certificates import CertificateChain, CertificateTrust, Identity, chain_of
from minikms_gateway.reasons import (
    IssuerUnavailableError,
    Refusals,
    RefusedCertificateError,
    RefusedRequestError,
    RefusedTokenError,
    TooManyConnectionsError,
    reason_of,
)
from minikms_gateway.transit.keyring import Lifetime
from minikms_gateway.transit.table import API as TRANSIT_API
from minikms_gateway.transit.table import Transit
from minikms_gateway.transit.wire import error_response as transit_error
from minikms_gateway.upstream import Upstream, request_bytes

if TYPE_CHECKING:
    from minikms_gateway.issuers import Issuers
    from minikms_gateway.tokens import Verified

UNPROVEN_SECONDS_MAX: Final = 10.0
"""How long a connection without a good certificate stays open before it has shown a good token."""
UNPROVEN_SHARE: Final = 4
"""At most one in this many of all connections has no good certificate, and has shown no good token yet."""
NAME_SHARE: Final = 2
"""A principal gets at most one in this many of all connections. With UNPROVEN_SHARE it leaves some for others."""

HEALTHY: Final = Response(200, b"ok", content_type="text/plain")
_FETCHING: Final = "the keys of the token's issuer are being fetched"

Answer = bytes | Response | Awaitable[bytes | Response]


class GatewayState(NamedTuple):
    """What the configuration says at one time. `issuers`: None without any. `mount`: of the transit API; empty without
    it.
    """

    trust: CertificateTrust
    issuers: Issuers | None
    generation: int
    mount: str = ""


@dataclass(eq=False, slots=True)
class GatewaySession:
    """One connection, as the engine closes and counts it by `link`. `peer`: its address. `group`: its name once it has
    one, before that its addresses. `identity`: what its certificate proves under the state of `generation`. `refused`:
    why it proves nothing any more. `proven`: it has had a good certificate, or has shown a good token. `until`: when
    the last of its tokens expires.
    """

    chain: CertificateChain | None
    peer: str
    link: Link
    group: str = field(init=False)
    generation: int = -1
    identity: Identity | None = None
    refused: RefusedCertificateError | None = None
    name: str = ""
    """The name that is counted: of the certificate, or of the first token."""
    opened_s: float = field(default_factory=time.monotonic)
    proven: bool = False
    closed: bool = False
    """The connection has ended. Its last request may still wait for the keys of an issuer."""
    until: float = 0.0

    def __post_init__(self) -> None:
        self.group = address_group(self.peer)


@dataclass(eq=False)
class Gateway:
    """The engine's application: see `minikms.http`. Another `state` counts for each session before its next request."""

    state: GatewayState
    upstream: Upstream
    refusals: Refusals
    _: KW_ONLY
    connections_max: int
    tracing: Tracing | None = None

    def __post_init__(self) -> None:
        self._by_name: Counter[str] = Counter()
        self._name_max = max(1, self.connections_max // NAME_SHARE)
        self._unproven: Places[GatewaySession] = Places(max(1, self.connections_max // UNPROVEN_SHARE))
        self.requests = {verb.name: 0 for verb in api.VERBS if verb.proxied}
        """Requests that were sent on, by verb."""
        self._routes = Routes((verb.method, verb.path, verb) for verb in api.VERBS)
        self._transit = Transit(self._ask)

    # --- the engine's side --------------------------------------------------------------------------------------

    def open_session(
        self, sock: socket.socket, tls: ssl.SSLObject | None, link: Link
    ) -> GatewaySession | Refusal | None:
        session = GatewaySession(None if tls is None else chain_of(tls), _host(sock), link)
        self._check(session)
        if session.identity is None:
            loser = self._unproven.take(session.group, session)
            if loser is not None:
                self.refusals.add("connections", loser.peer)
                loser.link.abort()
        elif self._by_name[session.identity.name] >= self._name_max:
            return TOO_MANY_CONNECTIONS
        else:
            self._prove(session, session.identity.name)
        return session

    def _prove(self, session: GatewaySession, name: str) -> None:
        session.proven = True
        session.name = session.group = name
        self._by_name[name] += 1

    def group(self, session: GatewaySession) -> Hashable:
        return session.group

    def may_stay(self, session: GatewaySession) -> bool:
        """False once a certificate is no longer good, the last token has expired, or if a peer has not proven in time
        who it is.
        """
        if not session.proven:
            return time.monotonic() - session.opened_s < UNPROVEN_SECONDS_MAX
        if session.chain is None:
            return time.time() < session.until + UNPROVEN_SECONDS_MAX
        was_refused = session.refused is not None
        self._check(session)
        if session.refused is not None and not was_refused:
            self.refusals.add(session.refused.reason, session.peer)
        return session.refused is None

    def close_session(self, session: GatewaySession) -> None:
        session.closed = True
        if session.name:
            self._by_name[session.name] -= 1
            if not self._by_name[session.name]:
                del self._by_name[session.name]
        if not session.proven:
            self._unproven.leave(session.group, session)

    def admit(self, session: GatewaySession, head: ParsedHead) -> Response | None:
        """Refuses a body before it is received: of a peer without a principal, on any path."""
        try:
            self._check_head(head)
            if self._is_transit(head) and Transit.is_login(head):
                return None
            if not isinstance(self._principal(session, self._credential(head, None)), str):
                raise IssuerUnavailableError(_FETCHING)
            if not self._is_transit(head):
                self._verb(head)
        except KmsRefusedError as error:
            refused = self._counted(session, error, head)
            refused.close = True
            return refused
        return None

    def handle(self, session: GatewaySession, request: HttpRequest) -> Answer:
        head = request.head
        if (head.path, head.method) == (api.HEALTH.path, api.HEALTH.method):
            return HEALTHY
        try:
            self._check_head(head)
            credential = self._credential(head, request.body)
            who = self._principal(session, credential)
            if isinstance(who, str):
                return self._answer(who, session, request, credential)
        except KmsRefusedError as error:
            return self._counted(session, error, head)
        return self._after(who, session, HttpRequest(head, memoryview(bytes(request.body))))

    def refused(self, session: GatewaySession | None, status: int, code: str) -> None:
        """The engine counts what is no request; only a connection without a place is counted here."""
        if code == api.CODE_TOO_MANY and session is None:
            self.refusals.add("connections", "")

    def commit(self) -> bool:
        """There is nothing to write: the key service audits each request."""
        return True

    # --- principals ---------------------------------------------------------------------------------------------

    def _credential(self, head: ParsedHead, body: memoryview | None) -> str | None:
        """The header `Authorization`, or what the transit API has in its place."""
        return Transit.credential(head, body) if self._is_transit(head) else head.authorization

    def _principal(self, session: GatewaySession, credential: str | None) -> str | asyncio.Future[None]:
        """A future: the keys of an issuer are being fetched, so ask again. Raises UnauthorizedError,
        IssuerUnavailableError, TooManyConnectionsError.
        """
        if session.chain is not None:
            self._check(session)
            if session.refused is not None:
                raise RefusedCertificateError(session.refused.reason)
        if credential is not None:
            return self._of_token(session, credential)
        if session.identity is None:
            raise UnauthorizedError("show a client certificate, or a token in the header Authorization: Bearer")
        return session.identity.name

    def _of_token(self, session: GatewaySession, authorization: str) -> str | asyncio.Future[None]:
        verified = self._verified(session, authorization)
        if isinstance(verified, asyncio.Future):
            return verified
        if not session.proven and not session.closed:
            if self._by_name[verified.name] >= self._name_max:
                raise TooManyConnectionsError(TOO_MANY_CONNECTIONS.sentence)
            self._unproven.leave(session.group, session)
            self._prove(session, verified.name)
            session.link.regroup()
        session.until = max(session.until, verified.until)
        return verified.name

    def _verified(self, session: GatewaySession, authorization: str) -> Verified | asyncio.Future[None]:
        issuers = self.state.issuers
        if issuers is None:
            raise RefusedTokenError("token_issuer")
        thumbprint = None if session.chain is None else session.chain.thumbprint
        return issuers.principal(authorization, thumbprint, time.time())

    def _lifetime(self, session: GatewaySession, credential: str | None) -> Lifetime:
        """The lifetime of the credential that `_principal` accepted."""
        now = time.time()
        if credential is None:
            return Lifetime(now, now if session.identity is None else session.identity.until)
        verified = self._verified(session, credential)
        return (
            Lifetime(now, now)
            if isinstance(verified, asyncio.Future)
            else Lifetime(verified.begun or now, verified.expires)
        )

    def _check(self, session: GatewaySession) -> None:
        """Bring `identity` and `refused` up to date."""
        now = time.time()
        identity = session.identity
        if session.generation == self.state.generation and (
            session.refused is not None or (identity is not None and now < identity.until)
        ):
            return
        session.generation = self.state.generation
        session.identity, session.refused = None, None
        if session.chain is None:
            return
        try:
            session.identity = self.state.trust.identity(session.chain, now)
        except RefusedCertificateError as error:
            session.refused = error

    async def _after(
        self, fetched: asyncio.Future[None], session: GatewaySession, request: HttpRequest
    ) -> bytes | Response:
        await asyncio.shield(fetched)
        try:
            credential = self._credential(request.head, request.body)
            who = self._principal(session, credential)
            if not isinstance(who, str):  # another fetch: the issuer changed meanwhile
                raise IssuerUnavailableError(_FETCHING)
            answer = self._answer(who, session, request, credential)
        except KmsRefusedError as error:
            return self._counted(session, error, request.head)
        return answer if isinstance(answer, bytes | Response) else await answer

    # --- requests -----------------------------------------------------------------------------------------------

    def _is_transit(self, head: ParsedHead) -> bool:
        return bool(self.state.mount) and head.path.startswith(TRANSIT_API)

    def _answer(self, who: str, session: GatewaySession, request: HttpRequest, credential: str | None) -> Answer:
        if self._is_transit(request.head):
            lifetime = partial(self._lifetime, session, credential)
            return self._transit.answer(who, request, self.state.mount, lifetime)
        return self._forward(who, request)

    def _check_head(self, head: ParsedHead) -> None:
        if head.reserved:
            raise RefusedRequestError("reserved_header", "a header X-MiniKMS-* is for proxies of the key service only")

    def _verb(self, head: ParsedHead) -> Verb[Any, Any] | Response:
        """The verb of a request, or the answer to one that is for none. Raises RefusedRequestError."""
        methods = self._routes[head.path]
        verb = methods.get(head.method)
        proxied = [method for method, one in methods.items() if one.proxied]
        if methods and (not proxied or (verb is not None and not verb.proxied)):
            raise RefusedRequestError("verb", "this request is not for other hosts: make it on the host of the service")
        return no_route(proxied) if verb is None else verb

    def _forward(self, who: str, request: HttpRequest) -> Answer:
        head = request.head
        if head.path == api.READY.path:
            if head.method != api.READY.method:
                return no_route((api.READY.method,))
            return self._ask(api.READY, who, request)
        verb = self._verb(head)
        if isinstance(verb, Response):
            return verb
        target = head.path
        if head.query and verb.method == "GET":
            target += f"?{urlencode(parse_query(head.query))}"
        return self._ask(verb, who, request, target)

    def _ask(
        self, verb: Verb[Any, Any], who: str, request: HttpRequest, target: str | None = None
    ) -> asyncio.Future[bytes | Response]:
        """Sends a request of the key service, for nobody if it is READY."""
        if verb is api.READY:
            return self.upstream.send(request_bytes(verb.method, verb.path, request, None))
        self.requests[verb.name] += 1
        answer = self.upstream.send(request_bytes(verb.method, target or verb.path, request, who))
        if self.tracing is not None:
            answer.add_done_callback(partial(_trace, self.tracing, verb.name, request.head, time.time_ns()))
        return answer

    def _counted(self, session: GatewaySession, error: KmsRefusedError, head: ParsedHead) -> Response:
        """The answer to an error, whose reason is counted."""
        if not isinstance(error, InvalidRequestError):
            self.refusals.add(reason_of(error), session.peer)
        answer = transit_error(error) if self._is_transit(head) else raised_response(error)
        answer.close = answer.close or isinstance(error, TooManyConnectionsError)
        return answer


def _trace(
    tracing: Tracing, verb: str, head: ParsedHead, began_ns: int, answer: asyncio.Future[bytes | Response]
) -> None:
    ended_ns, status = time.time_ns(), 503
    if not answer.cancelled() and answer.exception() is None:
        result = answer.result()
        status = result.status if isinstance(result, Response) else 200
    tracing.request(
        verb,
        traceparent=head.traceparent,
        began_ns=began_ns,
        ended_ns=ended_ns,
        failed=status >= 500,
        attributes={"http.response.status_code": status, "progressdb.request_id": head.request_id or ""},
        exchanges=(TracedExchange(verb, began_ns, ended_ns, answered=status < 500),),
    )


def _host(sock: socket.socket) -> str:
    try:
        return str(sock.getpeername()[0])
    except OSError:  # it has closed the connection already
        return ""
