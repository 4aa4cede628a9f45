"""From an HTTP request to a verb.

Owns: the routes, the decoding of requests, and the session of a connection. Routes and decoding follow from
`minikms.api.VERBS`. Invariants: the caller is known from the peer credentials before a byte is parsed; a peer that is
not allowed gets 401 on every path but `/health`, and its connection is closed; a body is decoded strictly. It must
never look at an `Authorization` header: a bearer token on the Unix socket never authenticates.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import msgspec

from minikms import api
from minikms.api import Verb
from minikms.audit import Event
from minikms.audit.turns import TurnAudit
from minikms.custody.vault import Vault
from minikms.daemon import metrics, strictjson
from minikms.daemon.keybody import take_new_root
from minikms.daemon.metrics import Histogram, VerbTimes
from minikms.daemon.peer import Peer, is_overflow_uid, read_peer
from minikms.daemon.refusals import RefusalAggregator
from minikms.errors import InvalidRequestError
from minikms.http import ParsedHead, Request, Response, error_response, parse_query
from minikms.policy import Policy, Principal
from minikms.service.base import Perform, Reply, VerbTable
from minikms.service.keks import RotateToRoot

UNAUTHORISED_CONNECTIONS_MAX: Final = 64
"""Open connections of uids that are not allowed, so that they can't use up the places of the allowed ones."""
UNAUTHORISED_CONNECTIONS_SHARE: Final = 4
"""Where few connections are admitted, at most one in this many is for uids that are not allowed."""

_HEALTHY: Final = Response(200, b"ok", content_type="text/plain")
_NUMBER_DIGITS_MAX: Final = 6
"""Of a number in a query."""

Answer = Reply | Awaitable[Reply]


class Session:
    """A connection: its peer, and the principal it acts as, if any."""

    __slots__ = ("peer", "principal")

    def __init__(self, peer: Peer, principal: Principal | None) -> None:
        self.peer = peer
        self.principal = principal


class _Route(NamedTuple):
    """`read` makes the verb's request of an HTTP request, or raises InvalidRequestError or ForbiddenError."""

    verb: Verb[Any, Any]
    method: str
    name: str
    read: Callable[[Principal, Request], Any]
    perform: Perform[Any]


class Application:
    """The engine's application: see `minikms.http`. `status` makes the object that `/status` answers."""

    def __init__(
        self,
        *,
        table: VerbTable,
        status: Callable[[], dict[str, object]],
        policy: Policy,
        audit: TurnAudit,
        vault: Vault,
        connections_max: int,
    ) -> None:
        self._table = table
        self._policy = policy
        self._audit = audit
        self._vault = vault
        self._refusals = RefusalAggregator()
        self._unauthorised = 0
        self._unauthorised_max = min(UNAUTHORISED_CONNECTIONS_MAX, connections_max // UNAUTHORISED_CONNECTIONS_SHARE)
        self._times = VerbTimes(verb.name for verb in api.VERBS)
        self._asked = self._times.asked
        self._batches = {verb.name: Histogram(metrics.BATCH_SIZES) for verb in api.VERBS if verb.is_batch}
        table.now(api.STATUS, lambda request, event: status())
        table.now(api.METRICS, lambda request, event: self._metrics(status()))
        routes = {verb.path: self._route(verb) for verb in api.VERBS}
        self._routes = {path: route for path, route in routes.items() if "{" not in path}
        self._key_routes = {path: route for path, route in routes.items() if "{" in path}

    # --- the engine's side -------------------------------------------------------------------------------------------

    def open_session(self, connection: socket.socket) -> Session | None:
        """None closes the connection: its peer is unknown, or too many unauthorised peers are connected already."""
        try:
            peer = read_peer(connection)
        except OSError:
            return None
        principal = None if is_overflow_uid(peer.uid) else self._policy.principal(peer.uid, peer.pid)
        if principal is None:
            if self._unauthorised >= self._unauthorised_max:
                self._refuse(peer)
                return None
            self._unauthorised += 1
        elif not peer.pid_certain:
            detail = "the process that connected had ended: its pid may be another's by now"
            self._audit.add(Event(type="peer", actor=principal.actor, pid=peer.pid, detail=detail))
        return Session(peer, principal)

    def close_session(self, session: Session) -> None:
        if session.principal is None:
            self._unauthorised -= 1

    def admit(self, session: Session, head: ParsedHead) -> Response | None:
        """Refuses the body of an unauthorised peer before it is received, on any path."""
        return None if session.principal is not None else self._turn_away(session)

    def refused(self, session: Session | None, status: int, code: str) -> None:
        """Input that is not a request reaches no verb. The engine counts it; it is not audited."""

    def handle(self, session: Session, request: Request) -> Answer:
        who = session.principal
        head = request.head
        if who is None:
            return _HEALTHY if _is_health(head) else self._turn_away(session)
        route = self._routes.get(head.path) or self._key_routes.get(_without_key_id(head.path))
        if route is None:
            return _no_verb(head)
        verb, method, name, read, perform = route
        if head.method != method:
            return _method_not_allowed(method)
        self._asked(name)
        request_id = head.request_id or ""
        try:
            asked = read(who, request)
        except Exception as error:
            self._table.malformed(verb, who, error, request_id)
            raise
        answer = perform(who, asked, request_id)
        if isinstance(answer, (bytes, Response)):
            return answer
        return self._times.later(answer)

    def commit(self) -> bool:
        """Ends the turn: drops its ciphers and writes its audit lines."""
        self._vault.end_turn()
        committed = self._audit.commit_turn()
        self._times.end_turn()
        return committed

    # --- unauthorised peers ------------------------------------------------------------------------------------------

    def _turn_away(self, session: Session) -> Response:
        self._refuse(session.peer)
        return error_response(401, api.CODE_UNAUTHORIZED, "this uid may not use the key service", close=True)

    def _refuse(self, peer: Peer) -> None:
        event = self._refusals.note(peer.uid, time.monotonic_ns())
        if event is not None:
            self._audit.add(event)

    async def flush_refusals_every(self, seconds: float) -> None:
        """Runs until cancelled: writes the lines that stand for the refusals of the past second."""
        while True:
            await asyncio.sleep(seconds)
            for event in self._refusals.due(time.monotonic_ns()):
                self._audit.add(event)
            self._audit.write_queued()

    # --- routes ------------------------------------------------------------------------------------------------------

    def _route(self, verb: Verb[Any, Any]) -> _Route:
        if verb is api.ROTATE_KEK:
            return _Route(verb, verb.method, verb.name, self._read_rotation, self._rotate_and_release)
        read = _reader(verb)
        if verb.is_batch:
            sizes = self._batches[verb.name]

            def read_batch(who: Principal, request: Request) -> Any:
                batch = read(who, request)
                sizes.add(len(batch.items))
                return batch

            return _Route(verb, verb.method, verb.name, read_batch, self._table[verb])
        return _Route(verb, verb.method, verb.name, read, self._table[verb])

    def _metrics(self, status: dict[str, object]) -> Response:
        body = metrics.page(status, times=self._times, batches=self._batches)
        return Response(200, body, content_type=metrics.CONTENT_TYPE)

    def _read_rotation(self, who: Principal, request: Request) -> RotateToRoot:
        """Takes a new root key out of the body, once the caller is authorised, before anything else reads the body."""
        for role in api.ROTATE_KEK.roles:
            who.require(role)
        root = take_new_root(request.body, self._vault.arena)
        try:
            asked = strictjson.decode(_ROTATE_DECODER, request.body)
        except BaseException:
            if root is not None:
                root.release()
            raise
        return RotateToRoot(wait=asked.wait, verify=asked.verify, root=root)

    async def _rotate_and_release(self, who: Principal, request: RotateToRoot, request_id: str) -> Reply:
        try:
            answer = self._table[api.ROTATE_KEK](who, request, request_id)
            return answer if isinstance(answer, (bytes, Response)) else await answer
        finally:
            if request.root is not None:
                request.root.release()


_ROTATE_DECODER: Final = msgspec.json.Decoder(api.RotateKekRequest)


def _reader(verb: Verb[Any, Any]) -> Callable[[Principal, Request], Any]:
    """Reads the request of a verb: its body, the key id of its path, or its query."""
    if "{key_id}" in verb.path:
        return _path_reader(verb)
    if verb.method == "GET":
        return _query_reader(verb.request)
    decode, decoder = strictjson.decode, msgspec.json.Decoder(verb.request)
    return lambda who, request: decode(decoder, request.body)


def _path_reader(verb: Verb[Any, Any]) -> Callable[[Principal, Request], Any]:
    """Beside the key id of the path a body holds nothing, or the key id again."""
    decoder = msgspec.json.Decoder(verb.request if verb.has_body else api.Request)

    def read(who: Principal, request: Request) -> Any:
        key_id = request.path.split("/")[2]
        if verb.has_body:
            repeated = strictjson.decode(decoder, request.body).key_id
            for role in verb.roles:  # first: an attempt without the role is answered and audited as `forbidden`
                who.require(role)
            if repeated != key_id:
                raise InvalidRequestError("the key id in the body must repeat the one in the path")
        elif verb.method == "POST" and request.body:
            strictjson.decode(decoder, request.body)
        return verb.request(key_id=key_id)

    return read


def _query_reader(kind: type[api.Request]) -> Callable[[Principal, Request], Any]:
    """The parameters are the request's fields: texts, and short numbers. Without fields a query is ignored."""
    fields = msgspec.structs.fields(kind)
    names = {field.name for field in fields}
    required = [field.name for field in fields if field.required]
    numbers = {field.name for field in fields if field.type == int | msgspec.UnsetType}

    def read(who: Principal, request: Request) -> Any:
        if not fields:
            return kind()
        query = parse_query(request.query)
        if query.keys() - names:
            raise InvalidRequestError(f"the query takes {', '.join(sorted(names))} only")
        for name in required:
            if name not in query:
                raise InvalidRequestError(f"missing {name}")
        return kind(**{name: _number(name, text) if name in numbers else text for name, text in query.items()})

    return read


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _NUMBER_DIGITS_MAX):
        raise InvalidRequestError(f"{name} must be a number of at most {_NUMBER_DIGITS_MAX} digits")
    return int(text)


def _without_key_id(path: str) -> str:
    """`/keys/{key_id}` or `/keys/{key_id}/<action>` of a path with a key id, whatever it is; `""` of any other path."""
    parts = path.split("/")
    if len(parts) not in (3, 4) or parts[0] or not all(parts[1:]):
        return ""
    parts[2] = "{key_id}"
    return "/".join(parts)


def _is_health(head: ParsedHead) -> bool:
    return (head.method, head.path) == (api.HEALTH.method, api.HEALTH.path)


def _no_verb(head: ParsedHead) -> Response:
    """The answer to an authorised peer on a path that is not a verb's."""
    if head.path == api.HEALTH.path:
        return _HEALTHY if _is_health(head) else _method_not_allowed(api.HEALTH.method)
    return error_response(404, api.CODE_NOT_FOUND, "there is no such path; docs/spec/api.md lists them")


def _method_not_allowed(allowed: str) -> Response:
    body = msgspec.json.encode(api.ErrorAnswer(f"use {allowed} here", api.CODE_METHOD_NOT_ALLOWED))
    return Response(405, body, headers=(("allow", allowed),))
