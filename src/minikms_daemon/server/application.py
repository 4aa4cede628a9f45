"""From an HTTP request to a verb.

Owns: the routes, and the decoding of requests. Both follow from `minikms.api.VERBS`. While the daemon is sealed,
`minikms_daemon.seal.application` serves in its place. Invariants: a body is decoded strictly; while the audit log can't
be written, only `/status` and `/metrics` are answered, and say so. It must never look at an `Authorization` header: a
bearer token on the Unix socket never authenticates.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET
from msgspec.json import Decoder

from minikms import api
from minikms.api import Verb
from minikms.api.errors import ForbiddenError, InvalidRequestError, NotSealedError
from minikms.audit import Event
from minikms.audit.record import TYPE_REFUSED
from minikms.custody.unlimited import StatusView
from minikms.custody.vault import Permit, Vault
from minikms.http import HttpRequest, ParsedHead, Response, Routes, no_route, parse_query, path_id
from minikms.policy.principal import Principal, require
from minikms_daemon.audit.turns import TurnAudit
from minikms_daemon.server import metrics, strictmsgpack
from minikms_daemon.server.admission import (
    HEALTHY,
    AdmittingApplication,
    Session,
    is_request,
    require_short_body,
)
from minikms_daemon.server.keybody import take_key
from minikms_daemon.server.metrics import VerbTimes, WeightedHistogram
from minikms_daemon.server.status import reduced, without_key_files
from minikms_daemon.server.strictjson import decode
from minikms_daemon.service.base import Perform, VerbTable, request_event
from minikms_daemon.service.encoding import Reply, json_answer
from minikms_daemon.service.roots import WITH_ROOT

if TYPE_CHECKING:
    from minikms_daemon.service.access import Keys

READY: Final = Response(200, b"ready", content_type="text/plain")
_PROBES: Final = {api.HEALTH.path: (api.HEALTH.method,), api.READY.path: (api.READY.method,)}
_NUMBER_DIGITS_MAX: Final = 6
"""Digits of a number in a query."""

Answer = Reply | Awaitable[Reply]


Seal = Callable[[Principal], Awaitable[Reply]]
"""Zeroes every key before it returns; the answer follows when the seal is durable."""


Read = Callable[[Principal, HttpRequest], Any] | Decoder[Any]
"""Makes the verb's request of an HTTP request, or raises InvalidRequestError or ForbiddenError. Where the body alone is
the request, it is a decoder for `strictjson.decode`.
"""


class _Route(msgspec.Struct, frozen=True):
    verb: Verb[Any, Any]
    method: str
    name: str
    read: Read
    perform: Perform[Any]


@dataclass(eq=False, repr=False, kw_only=True)
class KeyApplication(AdmittingApplication):
    """The engine's application: see `minikms.http`.

    `status` makes the object that `/status` answers. `seal` carries out `/seal`, `reload` reads the policy file again.
    """

    table: VerbTable
    status: Callable[[], dict[str, object]]
    audit: TurnAudit
    vault: Vault
    seal: Seal
    reload: Callable[[Event, Permit], Awaitable[api.PolicyAnswer]]

    def __post_init__(self) -> None:
        self._times = VerbTimes(verb.name for verb in api.VERBS)
        self._asked = self._times.asked
        self._held_under: int | None = None
        """The generation of the policy when the turn was first held; None while it is not."""
        self._batches = {verb.name: WeightedHistogram(metrics.BATCH_SIZES) for verb in api.VERBS if verb.is_batch}
        self.table.now_on_keys(api.STATUS, self.vault, lambda keys, request, event: self._status(self.status(), keys))
        self.table.now(api.METRICS, lambda request, event: self._metrics(self.status()))
        self.table.later(api.RELOAD_POLICY, lambda request, event, permit: self.reload(event, permit), durable=True)
        self.table.hot(api.SEAL, self._seal_at_once)
        self.table.now(api.UNSEAL_STATUS, lambda request, event: api.UnsealStatusAnswer(sealed=False))
        self.table.now(api.UNSEAL, self._refuse_unseal)
        self._routes = Routes((verb.method, verb.path, self._route(verb)) for verb in api.VERBS)

    # --- the engine's side -------------------------------------------------------------------------------------------

    def handle(self, session: Session, request: HttpRequest) -> Answer:
        who = session.principal
        head = request.head
        route = self._routes[head.path].get(head.method)
        if who is None or head.principal is not None or who.scope is not None:
            caller = self.admission.caller(session, head, self._ready)
            if isinstance(caller, Response):
                return caller
            who = caller
            if who.scope is not None:
                who = self.table.entered(who, None if route is None else route.verb)
        if route is None:
            return self._no_verb(who, head)
        self._asked(route.name)
        request_id = head.request_id or ""
        read = route.read
        try:
            body = decode(read, request.body) if isinstance(read, Decoder) else read(who, request)
        except Exception as error:
            self.table.malformed(route.verb, who, error, request_id)
            raise
        answer = route.perform(who, body, request_id)
        if type(answer) is bytes:  # of most requests
            return answer
        if isinstance(answer, (bytes, Response)):
            return answer
        answer = self._times.later(answer)
        return answer if who.entered is None or self.meters is None else self.meters.later(who.entered, answer)

    def commit(self) -> bool | None:
        """Ends the turn: drops its ciphers, writes its audit lines, and counts its requests no longer as concurrent.
        None: it is not over, see `TurnAudit`. If the policy has changed since, its answers are withheld: their callers
        may no longer read the plaintext in them.
        """
        self.vault.record_keys.end_turn()
        committed = self.audit.commit_turn()
        if committed is None:
            if self._held_under is None:
                self._held_under = self.admission.generation
            return None
        if self._held_under is not None:
            committed = committed and self._held_under == self.admission.generation
            self._held_under = None
        self._times.end_turn()
        if self.meters is not None:
            self.meters.end_turn()
        return committed

    async def flush_refusals_every(self, seconds: float) -> None:
        """Runs until cancelled: writes the lines that stand for the refusals of the past second."""
        while True:
            await asyncio.sleep(seconds)
            for event in self.admission.refusals_due():
                self.audit.add(event)
            self.audit.write_queued()

    # --- probes, seal and unseal -------------------------------------------------------------------------------------

    def _ready(self) -> Response:
        self.audit.require_writable()
        return READY

    def _no_verb(self, who: Principal, head: ParsedHead) -> Response:
        """The answer to an authorised peer on a path that is not a verb's."""
        if is_request(head, api.HEALTH):
            return HEALTHY
        if is_request(head, api.READY):
            return self._ready()
        answer = no_route(self._routes[head.path] or _PROBES.get(head.path, ()))
        self._audit_refusal(who, head, api.CODE_NOT_FOUND if answer.status == 404 else api.CODE_METHOD_NOT_ALLOWED)
        return answer

    def _audit_refusal(self, who: Principal, head: ParsedHead, outcome: str) -> None:
        """Queues the audit line of a refused request that names no verb."""
        event = request_event(TYPE_REFUSED, who, head.request_id or "")
        event.count, event.outcome = 1, outcome
        self.audit.add(event)

    def _seal_at_once(self, who: Principal, request: api.Request, request_id: str) -> Awaitable[Reply]:
        """Not audited here: the audit key is zeroed too. The next unseal writes the line."""
        try:
            require(who, api.SEAL)
        except ForbiddenError as error:
            self.table.malformed(api.SEAL, who, error, request_id)
            raise
        return self.seal(who)

    def _refuse_unseal(self, request: api.Request, event: Event) -> api.UnsealStatusAnswer:
        raise NotSealedError("the key service is not sealed; the given key was not looked at")

    # --- routes ------------------------------------------------------------------------------------------------------

    def _route(self, verb: Verb[Any, Any]) -> _Route:
        if verb in (api.SEAL, api.UNSEAL):
            # Whatever their body is: nothing may hold up a seal, and the key in the body of an unseal is not looked at.
            return _Route(verb, verb.method, verb.name, lambda who, request: verb.request(), self.table[verb])
        if verb.root_field:
            return _Route(verb, verb.method, verb.name, self._root_reader(verb), self._perform_and_release(verb))
        read = _reader(verb)
        if verb.is_batch:
            sizes, decoder = self._batches[verb.name], Decoder(verb.request)
            unpack = strictmsgpack.Decoder(verb.request).decode

            def read_batch(who: Principal, request: HttpRequest) -> Any:
                is_msgpack = request.head.content_type.lower() == api.MSGPACK
                batch = unpack(request.body) if is_msgpack else decode(decoder, request.body)
                sizes.add(len(batch.items))
                return batch

            return _Route(verb, verb.method, verb.name, read_batch, self.table[verb])
        return _Route(verb, verb.method, verb.name, read, self.table[verb])

    def _status(self, status: dict[str, object], keys: Keys) -> Response:
        return Response(200, json_answer(visible_status(status, keys.status_view)), uncommitted=_is_unavailable(status))

    def _metrics(self, status: dict[str, object]) -> Response:
        body = metrics.page(status, times=self._times, batches=self._batches, policy_refusals=self.admission.refusals)
        return Response(200, body, content_type=metrics.CONTENT_TYPE, uncommitted=_is_unavailable(status))

    def _root_reader(self, verb: Verb[Any, Any]) -> Callable[[Principal, HttpRequest], Any]:
        """Takes a root key out of the body, once the caller is authorised, before anything else reads the body."""
        decoder, kind = Decoder(verb.request), WITH_ROOT[verb]
        fields = verb.request.__struct_fields__

        def read(who: Principal, request: HttpRequest) -> Any:
            require(who, verb)
            require_short_body(request)
            root = take_key(request.body, self.vault.arena, verb.root_field)
            try:
                body = decode(decoder, request.body)
                members = {name: getattr(body, name) for name in fields} | {verb.root_field: UNSET, "root": root}
                if verb.path_field:
                    members[verb.path_field] = _only_in_path(verb, members, request)
                return kind(**members)
            except BaseException:
                if root is not None:
                    root.release()
                raise

        return read

    def _perform_and_release(self, verb: Verb[Any, Any]) -> Perform[Any]:
        async def perform(who: Principal, request: Any, request_id: str) -> Reply:
            try:
                answer = self.table[verb](who, request, request_id)
                return answer if isinstance(answer, (bytes, Response)) else await answer
            finally:
                if request.root is not None:
                    request.root.release()

        return perform


def _only_in_path(verb: Verb[Any, Any], body: dict[str, Any], request: HttpRequest) -> str:
    """The id in the path. Raises InvalidRequestError if the body has one too."""
    if body[verb.path_field] is not UNSET:
        raise InvalidRequestError(f"the path names the {verb.path_field}, and the body must not")
    return path_id(request.path)


def visible_status(status: dict[str, object], view: StatusView) -> dict[str, object]:
    """The part of the status that a caller may see."""
    if view == "reduced":
        return reduced(status)
    return status if view == "whole" else without_key_files(status)


def _is_unavailable(status: dict[str, object]) -> bool:
    """Whether the answer says that the log could not be written before this turn: then its own line may be missing."""
    return status["status"] == api.CODE_AUDIT_UNAVAILABLE


def _reader(verb: Verb[Any, Any]) -> Read:
    """Reads the request of a verb: its body, the id in its path, or its query."""
    if verb.path_field:
        return _path_reader(verb)
    if verb.method == "GET":
        return _query_reader(verb.request)
    return Decoder(verb.request)


def _path_reader(verb: Verb[Any, Any]) -> Callable[[Principal, HttpRequest], Any]:
    """Beside the id in the path a body holds nothing, or the key id again with the other fields."""
    decoder = Decoder(verb.request if verb.has_body else api.Request)

    def read(who: Principal, request: HttpRequest) -> Any:
        named = path_id(request.path)
        if verb.has_body:
            body = decode(decoder, request.body)
            require(who, verb)  # first: an attempt without the role is answered and audited as `forbidden`
            if body.key_id != named:
                raise InvalidRequestError("the key id in the body must repeat the one in the path")
            return body
        if verb.method == "POST" and request.body:
            decode(decoder, request.body)
        return verb.request(**{verb.path_field: named})

    return read


def _query_reader(kind: type[api.Request]) -> Callable[[Principal, HttpRequest], Any]:
    """The parameters are the request's fields: texts, and short numbers. Without fields a query is ignored."""
    fields = msgspec.structs.fields(kind)
    names = {field.name for field in fields}
    required = [field.name for field in fields if field.required]
    numbers = {field.name for field in fields if field.type == int | msgspec.UnsetType}

    def read(who: Principal, request: HttpRequest) -> Any:
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
