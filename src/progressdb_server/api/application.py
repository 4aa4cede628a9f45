"""The ASGI application: access control, routing, errors, request ids, metrics, log.

Owns: the order of the steps of one request, and the list of all operations. Invariants: every request gets exactly one
response; no handler runs for a request that access control has not authorized; an error of any kind becomes a JSON
response with a fixed text or one written for clients. An unexpected error is logged by its type and place, never with
its text, which could contain what a user typed.
"""

from __future__ import annotations

import asyncio
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Final

from minikms.api.errors import KmsError
from minikms.platform.logs import Log
from progressdb_server.api.gate import head, limits
from progressdb_server.api.gate.access import PROBE_PATHS, AccessControl
from progressdb_server.api.gate.errors import INTERNAL, ApiError
from progressdb_server.api.gate.keys import NOT_AUTHENTICATED, payer
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import NO_CONTENT, ApiResponse, Exchange, error_response
from progressdb_server.api.openapi.description import Operation, operations_of
from progressdb_server.api.routes import admin
from progressdb_server.api.routes.admin import AdminHandlers
from progressdb_server.api.routes.documentation import with_documentation
from progressdb_server.api.routes.errors import api_error
from progressdb_server.api.routes.messages import MessageHandlers, ReactionHandlers
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.routes.table import Routing
from progressdb_server.api.routes.threads import ThreadHandlers
from progressdb_server.conversations.whole import Conversations
from progressdb_server.http.asgi import ClientGoneError, Header, Receive, Scope, Send
from progressdb_server.kms.provider import READING, RequestReads
from progressdb_server.store.model import (
    KeyServiceRefusedError,
    RecordUnreadableError,
    StoreDamagedError,
    StoreUnavailableError,
)

_log: Final = Log()
_CLIENT_GONE: Final = 499
"""The status in the metrics of a request whose client closed its connection."""


def operations(store: Conversations, metrics: ApiMetrics, more: tuple[Operation, ...] = ()) -> tuple[Operation, ...]:
    """Every operation of the API: those of the store, `more`, and the documentation of all of them."""
    of_store = (MessageHandlers(store), ReactionHandlers(store), ThreadHandlers(store), AdminHandlers(store))
    return with_documentation((*operations_of(admin.health, admin.sign, *of_store, metrics), *more))


@dataclass(eq=False)
class MessageApplication:
    """Serves one store. `more` are operations beside those of the store."""

    store: Conversations
    access: AccessControl
    metrics: ApiMetrics
    _: KW_ONLY
    more: tuple[Operation, ...] = ()
    error_page: Callable[[ApiError, ApiRequest], ApiResponse] | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.operations = operations(self.store, self.metrics, self.more)
        self._routing = Routing(self.operations)
        self._refused = RefusalLog()
        self._debugging = _log.is_enabled_for("debug")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # the server is started without lifespan and without WebSockets
        started_s = self.clock()
        self.metrics.started()
        request = ApiRequest(scope, receive)
        reading = RequestReads(request.request_id)
        READING.set(reading)  # for this request's task and the tasks that it starts
        common: tuple[Header, ...] = ((b"x-request-id", request.request_id.encode("ascii")),)
        if head.ORIGIN in request.headers:
            common += self.access.cors_headers(request.headers)
        exchange = Exchange(request, common, receive, send)
        try:
            if request.method == "OPTIONS":
                await exchange.respond(NO_CONTENT)
                return
            client = request.client_address = self.access.proxies.client(request.address, scope["headers"])
            request.caller, request.user = self.access.authorize(
                request.path, request.headers, request.repeated_header, request.address, client, now_s=started_s
            )
            if request.direct is not None:
                request.direct.identify(payer(request.caller, request.user))
            resource = self._routing.hot(request, scope)
            if resource is None:
                await self._routing.route(exchange, scope)
            else:
                response = await resource.handler(request)(request)
                if not exchange.send_at_once(response):
                    await exchange.respond(response)
        except ClientGoneError:
            return
        except Exception as error:  # noqa: BLE001 - whatever happens, the client gets a response
            if isinstance(error, RecordUnreadableError) and not error.code:  # the store notes what was refused
                self.store.sealer.note_unreadable(str(error))
            refusal = self._refusal(_error_of(error, request), request)  # no error: its traceback leads to this frame
            if not exchange.status:  # once begun, a response can only be left unfinished
                await exchange.respond(refusal)
        finally:
            if request.body_bytes >= limits.BODY_BYTES_PER_TOKEN:
                self.access.charge(request.caller, request.user, client, request.body_bytes)
            seconds = self.clock() - started_s
            self.metrics.finished(request, exchange.status or _CLIENT_GONE, seconds)
            if reading.opened:
                _log_reading(request, reading)
            if exchange.status >= 400 or not exchange.status or self._debugging:
                identified = request.caller is not NOT_AUTHENTICATED
                if exchange.status in _LOGGED_STATUSES and not identified:
                    self._refused.add(exchange.status, started_s)
                _log_response(request, exchange.status, seconds, identified=identified)

    def _refusal(self, error: ApiError, request: ApiRequest) -> ApiResponse:
        if self.error_page is not None and request.path.startswith("/viewer/"):
            return self.error_page(error, request)
        return error_response(error)


def _error_of(error: Exception, request: ApiRequest) -> ApiError:
    """The error response; logs an unreadable record, a refusal of the key service, and an unexpected error."""
    known = api_error(error)
    if known is None:
        frames = traceback.extract_tb(error.__traceback__)
        _log.error(
            "request failed",
            request_id=request.request_id,
            route=request.route,
            error=type(error).__qualname__,
            at=[f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames],
        )
        return ApiError(500, INTERNAL)
    if known.status == 503 and isinstance(error, (KmsError, StoreUnavailableError)):
        request.reason = error.explained if isinstance(error, StoreUnavailableError) else str(error)
    if isinstance(error, RecordUnreadableError):
        _log.error("record unreadable", request_id=request.request_id, reason=str(error))
    if isinstance(error, StoreDamagedError):
        _log.error("store_damaged", request_id=request.request_id, route=request.route, reason=error.explained)
    if isinstance(error, (KmsError, KeyServiceRefusedError)) and known.status == 500:
        _log.error("key_service_refused", request_id=request.request_id, route=request.route, reason=known.text)
    return known


def _log_reading(request: ApiRequest, reading: RequestReads) -> None:
    """Who had records opened. The audit log of the key service has the same request id, with the keys and the time.

    `user` has signed, `author` is whom a holder of an API key acts for, by its own word.
    """
    try:
        author = request.author()
    except ApiError:
        author = None
    _log.info(
        "records_opened",
        request_id=request.request_id,
        route=request.route,
        role=request.role.value,
        key=request.caller.number or None,
        user=request.user,
        author=author,
        viewer_key=request.viewer_key or None,
        records=reading.opened,
    )


_LOGGED_STATUSES: Final = frozenset({401, 403, 429})


class RefusalLog:
    """Logs the callers that access control refused: one line in `REFUSAL_LOG_SECONDS`, with their number by status."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._next_s = -math.inf
        self._pending: asyncio.TimerHandle | None = None

    def add(self, status: int, now_s: float) -> None:
        self._counts[status] += 1
        if now_s >= self._next_s:
            self._write(now_s)
        elif self._pending is None:
            loop = asyncio.get_running_loop()
            self._pending = loop.call_later(self._next_s - now_s, self._write, self._next_s)

    def _write(self, now_s: float) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        self._next_s = now_s + limits.REFUSAL_LOG_SECONDS
        by_status = {str(status): count for status, count in sorted(self._counts.items())}
        _log.warning("callers refused", count=self._counts.total(), statuses=by_status)
        self._counts.clear()


def _log_response(request: ApiRequest, status: int, seconds: float, *, identified: bool) -> None:
    """Failures as warnings, refused requests of known callers as information, everything else for debugging. So are
    probes: `Readiness` logs when their answer changes.

    Never a path or a query: both could contain what a user typed. (Authors are stored in plaintext, and logged.)
    """
    if status >= 500 and request.path not in PROBE_PATHS:
        level = _log.warning
    elif status in _LOGGED_STATUSES and identified:
        level = _log.info
    else:
        level = _log.debug
    level(
        "request",
        request_id=request.request_id,
        method=request.method,
        route=request.route or None,
        status=status,
        role=request.role.value,
        key=request.caller.number or None,
        ms=round(seconds * 1000, 3),
        reason=request.reason or None,
    )
