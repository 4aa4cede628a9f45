"""From an HTTP request to a verb.

Owns: the routes, the session of a connection, and what a stranger is told. Invariants: who is asking is decided
once, from the peer credentials, before a byte is parsed; a peer that isn't allowed gets 401 on every path but
`/health`, and its connection is closed; a body is decoded strictly. It must never look at an `Authorization` header:
a bearer token on the Unix socket never authenticates.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec

from minikms import api
from minikms.audit import Event
from minikms.audit.turns import TurnAudit
from minikms.custody.vault import Vault
from minikms.daemon import metrics, strictjson
from minikms.daemon.keybody import take_new_root
from minikms.daemon.metrics import Histogram, VerbTimes
from minikms.daemon.peer import Peer, is_overflow_uid, read_peer
from minikms.daemon.refusals import RefusalAggregator
from minikms.errors import InvalidRequestError, MiniKmsError
from minikms.http import ParsedHead, Request, Response, error_response, parse_query
from minikms.memory.arena import SecretSlot
from minikms.policy import Policy, Principal
from minikms.service.keks import KekVerbs
from minikms.service.keys import KeyIssuing
from minikms.service.lifecycle import KeyLifecycle
from minikms.service.records import KeyService

FOREIGN_CONNECTIONS_MAX: Final = 64
"""Open connections of uids that aren't allowed, so that they can't use up the allowed ones' places."""
FOREIGN_CONNECTIONS_SHARE: Final = 4
"""Where few connections are admitted, at most one in this many is for uids that aren't allowed."""

LIST_LIMIT_DEFAULT: Final = 100

T = TypeVar("T")
Answer = bytes | Response | Awaitable[bytes | Response]
Handler = Callable[[Principal, Request], Answer]
KeyHandler = Callable[[Principal, str, Request], Answer]

_HEALTHY: Final = Response(200, b"ok", content_type="text/plain")


class Session:
    """A connection: its peer, and the principal it acts as, if any."""

    __slots__ = ("peer", "principal")

    def __init__(self, peer: Peer, principal: Principal | None) -> None:
        self.peer = peer
        self.principal = principal


class Application:
    """The engine's application: see `minikms.http`."""

    def __init__(
        self,
        *,
        service: KeyService,
        issuing: KeyIssuing,
        lifecycle: KeyLifecycle,
        keks: KekVerbs,
        policy: Policy,
        audit: TurnAudit,
        vault: Vault,
        connections_max: int,
    ) -> None:
        self._service = service
        self._issuing = issuing
        self._lifecycle = lifecycle
        self._keks = keks
        self._policy = policy
        self._audit = audit
        self._vault = vault
        self._refusals = RefusalAggregator()
        self._foreign = 0
        self._foreign_max = min(FOREIGN_CONNECTIONS_MAX, connections_max // FOREIGN_CONNECTIONS_SHARE)
        self.refused_count = 0
        self._create = msgspec.json.Decoder(api.CreateDekRequest)
        self._encrypt_item = msgspec.json.Decoder(api.EncryptItem)
        self._decrypt_item = msgspec.json.Decoder(api.DecryptItem)
        self._encrypt_batch = msgspec.json.Decoder(api.EncryptBatchRequest)
        self._decrypt_batch = msgspec.json.Decoder(api.DecryptBatchRequest)
        self._reencrypt_batch = msgspec.json.Decoder(api.ReencryptBatchRequest)
        self._check_batch = msgspec.json.Decoder(api.CheckBatchRequest)
        self._data_key = msgspec.json.Decoder(api.GenerateDataKeyRequest)
        self._random = msgspec.json.Decoder(api.RandomRequest)
        self._rotate = msgspec.json.Decoder(api.RotateKekRequest)
        self._prune = msgspec.json.Decoder(api.PruneKekRequest)
        self._destroy = msgspec.json.Decoder(api.DestroyKeyRequest)
        self._nothing = msgspec.json.Decoder(api.Request)
        self._routes: dict[str, tuple[str, str, Handler]] = {
            "/encrypt": ("POST", "encrypt", self._handle_encrypt),
            "/decrypt": ("POST", "decrypt", self._handle_decrypt),
            "/encrypt_batch": ("POST", "encrypt_batch", self._handle_encrypt_batch),
            "/decrypt_batch": ("POST", "decrypt_batch", self._handle_decrypt_batch),
            "/create_dek_for_thread": ("POST", "create_dek", self._handle_create),
            "/get_wrapped": ("GET", "get_wrapped", self._handle_get_wrapped),
            "/status": ("GET", "status", self._handle_status),
            "/metrics": ("GET", "metrics", self._handle_metrics),
            "/reencrypt_batch": ("POST", "reencrypt_batch", self._handle_reencrypt_batch),
            "/check_batch": ("POST", "check_batch", self._handle_check_batch),
            "/generate_data_key": ("POST", "generate_data_key", self._handle_data_key),
            "/random": ("POST", "random", self._handle_random),
            "/rotate_kek": ("POST", "rotate_kek", self._handle_rotate),
            "/kek/prune": ("POST", "prune_kek", self._handle_prune),
            "/keys": ("GET", "list_keys", self._handle_list),
        }
        self._key_routes: dict[str, tuple[str, str, KeyHandler]] = {
            "": ("GET", "get_key", self._handle_get_key),
            "retire": ("POST", "retire_key", self._handle_retire),
            "destroy": ("POST", "destroy_key", self._handle_destroy),
        }
        routes = (*self._routes.values(), *self._key_routes.values())
        self._times = VerbTimes(verb for _, verb, _ in routes)
        self._asked = self._times.asked
        batches = ("encrypt_batch", "decrypt_batch", "reencrypt_batch", "check_batch")
        self._batches = {verb: Histogram(metrics.BATCH_SIZES) for verb in batches}

    def operations(self) -> list[tuple[str, str, str]]:
        """(method, path, verb) of everything that is served to an allowed peer, beside `GET /health`."""
        fixed = [(method, path, verb) for path, (method, verb, _) in self._routes.items()]
        of_key = [
            (method, f"/keys/{{key_id}}/{action}".rstrip("/"), verb)
            for action, (method, verb, _) in self._key_routes.items()
        ]
        return fixed + of_key

    # --- the engine's side -------------------------------------------------------------------------------------------

    def open_session(self, connection: socket.socket) -> Session | None:
        """None closes the connection: its peer can't be told, or there are too many strangers already."""
        try:
            peer = read_peer(connection)
        except OSError:
            return None
        principal = None if is_overflow_uid(peer.uid) else self._policy.principal(peer.uid, peer.pid)
        if principal is None:
            if self._foreign >= self._foreign_max:
                self._refuse(peer)
                return None
            self._foreign += 1
        elif not peer.pid_certain:
            detail = "the process that connected had ended: its pid may be another's by now"
            self._audit.add(Event(type="peer", actor=principal.actor, pid=peer.pid, detail=detail))
        return Session(peer, principal)

    def close_session(self, session: Session) -> None:
        if session.principal is None:
            self._foreign -= 1

    def admit(self, session: Session, head: ParsedHead) -> Response | None:
        """A stranger's body is not waited for, nor held, even with /health, which has none."""
        return None if session.principal is not None else self._turn_away(session)

    def refused(self, session: Session | None, status: int, code: str) -> None:
        """Input that is no request reaches no verb: counted, not audited."""
        self.refused_count += 1

    def handle(self, session: Session, request: Request) -> Answer:
        principal = session.principal
        if principal is None:
            return self._handle_stranger(session, request)
        head = request.head
        route = self._routes.get(head.path)
        if route is None:
            return self._handle_rare(principal, request)
        method, verb, handler = route
        if head.method != method:
            return _method_not_allowed(method)
        self._asked(verb)
        try:
            answer = handler(principal, request)
        except _MalformedError as error:
            raise self._malformed(verb, principal, request, error) from None
        if isinstance(answer, (bytes, Response)):
            return answer
        return self._times.later(answer)

    def _malformed(self, verb: str, who: Principal, request: Request, error: _MalformedError) -> MiniKmsError:
        """A body that is not one is audited under the verb's name."""
        self._service.malformed(verb, who, error.cause, request.request_id or "")
        return error.cause

    def commit(self) -> bool:
        """The turn ends: its ciphers are dropped, and its audit lines written."""
        self._vault.end_turn()
        committed = self._audit.commit_turn()
        self._times.end_turn()
        return committed

    # --- strangers ---------------------------------------------------------------------------------------------------

    def _handle_stranger(self, session: Session, request: Request) -> Answer:
        if request.path == "/health" and request.method == "GET":
            return _HEALTHY
        return self._turn_away(session)

    def _turn_away(self, session: Session) -> Response:
        self._refuse(session.peer)
        return error_response(401, api.CODE_UNAUTHORIZED, "this uid may not use the key service", close=True)

    def _refuse(self, peer: Peer) -> None:
        event = self._refusals.note(peer.uid, time.monotonic_ns())
        if event is not None:
            self._audit.add(event)

    async def flush_refusals_every(self, seconds: float) -> None:
        """Runs until cancelled: writes the lines that stand for refusals of the past second."""
        while True:
            await asyncio.sleep(seconds)
            for event in self._refusals.due(time.monotonic_ns()):
                self._audit.add(event)
            self._audit.write_queued()

    # --- verbs -------------------------------------------------------------------------------------------------------

    def _handle_rare(self, who: Principal, request: Request) -> Answer:
        if request.path == "/health":
            return _HEALTHY if request.method == "GET" else _method_not_allowed("GET")
        prefix, key_id, action = _key_path(request.path)
        route = self._key_routes.get(action) if prefix == "keys" and key_id else None
        if route is None:
            return error_response(404, api.CODE_NOT_FOUND, "there is no such path; docs/spec/api.md lists them")
        method, verb, handler = route
        if request.method != method:
            return _method_not_allowed(method)
        self._asked(verb)
        try:
            answer = handler(who, key_id, request)
        except _MalformedError as error:
            raise self._malformed(verb, who, request, error) from None
        if isinstance(answer, (bytes, Response)):
            return answer
        return self._times.later(answer)

    def _handle_encrypt(self, who: Principal, request: Request) -> Answer:
        try:
            item = strictjson.decode(self._encrypt_item, request.body)
        except MiniKmsError as error:
            raise _MalformedError(error) from None
        return self._service.encrypt(who, item, request.head.request_id or "")

    def _handle_decrypt(self, who: Principal, request: Request) -> Answer:
        return self._service.decrypt(who, _decode(self._decrypt_item, request), request.request_id or "")

    def _handle_encrypt_batch(self, who: Principal, request: Request) -> Answer:
        batch = _decode(self._encrypt_batch, request)
        self._batches["encrypt_batch"].add(len(batch.items))
        return self._service.encrypt_batch(who, batch, request.request_id or "")

    def _handle_decrypt_batch(self, who: Principal, request: Request) -> Answer:
        batch = _decode(self._decrypt_batch, request)
        self._batches["decrypt_batch"].add(len(batch.items))
        return self._service.decrypt_batch(who, batch, request.request_id or "")

    def _handle_create(self, who: Principal, request: Request) -> Answer:
        return self._issuing.create_dek_for_thread(who, _decode(self._create, request), request.request_id or "")

    def _handle_get_wrapped(self, who: Principal, request: Request) -> Answer:
        key_id = _query(request, "key_id").get("key_id", "")
        if not key_id:
            raise _MalformedError(InvalidRequestError("missing key_id"))
        return self._issuing.get_wrapped(who, key_id, request.request_id or "")

    def _handle_status(self, who: Principal, request: Request) -> Answer:
        return self._issuing.status(who, request.request_id or "")

    def _handle_metrics(self, who: Principal, request: Request) -> Answer:
        status = self._issuing.metrics(who, request.request_id or "")
        body = metrics.page(status, times=self._times, batches=self._batches)
        return Response(200, body, content_type=metrics.CONTENT_TYPE)

    # --- the life of a key -------------------------------------------------------------------------------------------

    def _handle_reencrypt_batch(self, who: Principal, request: Request) -> Answer:
        batch = _decode(self._reencrypt_batch, request)
        self._batches["reencrypt_batch"].add(len(batch.items))
        return self._service.reencrypt_batch(who, batch, request.request_id or "")

    def _handle_check_batch(self, who: Principal, request: Request) -> Answer:
        batch = _decode(self._check_batch, request)
        self._batches["check_batch"].add(len(batch.items))
        return self._service.check_batch(who, batch, request.request_id or "")

    def _handle_data_key(self, who: Principal, request: Request) -> Answer:
        return self._issuing.generate_data_key(who, _decode(self._data_key, request), request.request_id or "")

    def _handle_random(self, who: Principal, request: Request) -> Answer:
        return self._issuing.random(who, _decode(self._random, request), request.request_id or "")

    def _handle_rotate(self, who: Principal, request: Request) -> Answer:
        try:
            who.require("rotate")  # before the key is looked at
            root = take_new_root(request.body, self._vault.arena)
        except MiniKmsError as error:
            raise _MalformedError(error) from None
        try:
            asked = _decode(self._rotate, request)
        except BaseException:
            if root is not None:
                root.release()
            raise
        return self._rotate_and_release(who, asked, root, request.request_id or "")

    async def _rotate_and_release(
        self, who: Principal, asked: api.RotateKekRequest, root: SecretSlot | None, request_id: str
    ) -> Response:
        try:
            status, body = await self._keks.rotate_kek(who, asked, root, request_id)
        finally:
            if root is not None:
                root.release()
        return Response(status, body)

    def _handle_prune(self, who: Principal, request: Request) -> Answer:
        return self._keks.prune_keks(who, _decode(self._prune, request), request.request_id or "")

    def _handle_list(self, who: Principal, request: Request) -> Answer:
        query = _query(request, "thread_id", "state", "cursor", "limit")
        try:
            limit = _parse_limit(query.get("limit"))
        except MiniKmsError as error:
            raise _MalformedError(error) from None
        return self._lifecycle.list_keys(
            who,
            thread_id=query.get("thread_id"),
            state=query.get("state"),
            cursor=query.get("cursor", ""),
            limit=limit,
            request_id=request.request_id or "",
        )

    def _handle_get_key(self, who: Principal, key_id: str, request: Request) -> Answer:
        return self._lifecycle.get_key(who, key_id, request.request_id or "")

    def _handle_retire(self, who: Principal, key_id: str, request: Request) -> Answer:
        if request.body:
            _decode(self._nothing, request)
        return self._lifecycle.retire(who, key_id, request.request_id or "")

    def _handle_destroy(self, who: Principal, key_id: str, request: Request) -> Answer:
        return self._lifecycle.destroy(who, key_id, _decode(self._destroy, request), request.request_id or "")


class _MalformedError(Exception):
    """A request that reached a verb but is not one; carries the error for the caller."""

    def __init__(self, cause: MiniKmsError) -> None:
        super().__init__()
        self.cause = cause


def _decode(decoder: msgspec.json.Decoder[T], request: Request) -> T:
    try:
        return strictjson.decode(decoder, request.body)
    except MiniKmsError as error:
        raise _MalformedError(error) from None


def _key_path(path: str) -> tuple[str, str, str]:
    """("keys", key id, action) of `/keys/<key id>` and `/keys/<key id>/<action>`; an action of "" is the key itself."""
    parts = path.split("/")
    if len(parts) not in (3, 4) or parts[0] or not all(parts[1:]):
        return "", "", ""
    return parts[1], parts[2], parts[3] if len(parts) == 4 else ""


def _query(request: Request, *names: str) -> dict[str, str]:
    """The parameters, none but these."""
    try:
        query = parse_query(request.query)
        if query.keys() - set(names):
            raise InvalidRequestError(f"the query takes {', '.join(names)} only")
    except MiniKmsError as error:
        raise _MalformedError(error) from None
    return query


def _parse_limit(text: str | None) -> int:
    if text is None:
        return LIST_LIMIT_DEFAULT
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= api.LIST_KEYS_COUNT_MAX):
        raise InvalidRequestError(f"limit must be a number from 1 to {api.LIST_KEYS_COUNT_MAX}")
    return int(text)


def _method_not_allowed(allowed: str) -> Response:
    body = msgspec.json.encode(api.ErrorAnswer(f"use {allowed} here", api.CODE_METHOD_NOT_ALLOWED))
    return Response(405, body, headers=(("allow", allowed),))
