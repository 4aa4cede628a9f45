"""The ASGI application: access control, routing, errors, request ids, metrics, log.

Owns: the order of the steps of one request, and the list of all operations. Invariants: every request gets exactly one
response; no handler runs for a request that access control has not authorized; an error of any kind becomes a JSON
response with a fixed text or one written for clients. An unexpected error is logged by its type and place, never with
its text, which could contain what a user typed.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from typing import Final

import structlog

from progressdb_server.api.http import head
from progressdb_server.api.http.access import AccessControl
from progressdb_server.api.http.errors import ApiError, ClientGoneError, Header, internal
from progressdb_server.api.http.request import Receive, Request, Scope, Send
from progressdb_server.api.http.response import NO_CONTENT, Exchange, error_response
from progressdb_server.api.routes import admin, messages, threads
from progressdb_server.api.routes.documentation import with_documentation
from progressdb_server.api.routes.errors import api_error
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.routes.table import Operation, Routing
from progressdb_server.store.model import ConversationStore, RecordUnreadableError

_log: Final = structlog.get_logger("progressdb.api")
_CLIENT_GONE: Final = 499
"""The status in the metrics of a request whose client closed its connection."""


def operations(
    store: ConversationStore, metrics: ApiMetrics, more: tuple[Operation, ...] = ()
) -> tuple[Operation, ...]:
    """Every operation of the API: those of the store, `more`, and the documentation of all of them."""
    return with_documentation(
        (
            *admin.open_operations(),
            *messages.operations(store),
            *threads.operations(store),
            *messages.thread_operations(store),
            *admin.operations(store),
            *metrics.operations(),
            *more,
        )
    )


class Application:
    """Serves one store. `more` are operations beside those of the store."""

    def __init__(
        self,
        store: ConversationStore,
        access: AccessControl,
        metrics: ApiMetrics,
        *,
        more: tuple[Operation, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._access = access
        self._metrics = metrics
        self.operations = operations(store, metrics, more)
        self._routing = Routing(self.operations)
        self._clock = clock
        self._debugging = _log.is_enabled_for(logging.DEBUG)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # the server is started without lifespan and without WebSockets
        started_s = self._clock()
        self._metrics.started()
        request = Request(scope, receive)
        common: tuple[Header, ...] = ((b"x-request-id", request.request_id.encode("ascii")),)
        if head.ORIGIN in request.headers:
            common += self._access.cors_headers(request.headers)
        exchange = Exchange(request, common, receive, send)
        try:
            if request.method == "OPTIONS":
                await exchange.respond(NO_CONTENT)
                return
            request.principal, request.user = self._access.authorize(
                request.path, request.headers, request.repeated_header, request.address, started_s
            )
            resource = self._routing.hot(request)
            if resource is None:
                await self._routing.route(exchange, scope)
            else:
                response = await resource.handler(request)(request)
                if not exchange.send_at_once(response):
                    await exchange.respond(response)
        except ClientGoneError:
            return
        except Exception as error:  # noqa: BLE001 - whatever happens, the client gets a response
            refusal = _error_of(error, request)
            if not exchange.status:  # once begun, a response can only be left unfinished
                await exchange.respond(error_response(refusal))
        finally:
            seconds = self._clock() - started_s
            self._metrics.finished(request, exchange.status or _CLIENT_GONE, seconds)
            if exchange.status >= 400 or not exchange.status or self._debugging:
                _log_response(request, exchange.status, seconds)


def _error_of(error: Exception, request: Request) -> ApiError:
    """The error response; logs an unreadable record and an unexpected error."""
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
        return internal()
    if isinstance(error, RecordUnreadableError):
        _log.error("record unreadable", request_id=request.request_id, reason=str(error))
    return known


_LOGGED_STATUSES: Final = frozenset({401, 403, 429})


def _log_response(request: Request, status: int, seconds: float) -> None:
    """Failures as warnings, refused callers as information, everything else for debugging.

    Never a path or a query: both could contain what a user typed.
    """
    if status >= 500:
        level = _log.warning
    elif status in _LOGGED_STATUSES:
        level = _log.info
    else:
        level = _log.debug
    level(
        "request",
        request_id=request.request_id,
        method=request.method,
        route=request.route or None,
        status=status,
        role=request.principal.role.value,
        key=request.principal.number or None,
        ms=round(seconds * 1000, 3),
    )
