"""The ASGI application: gate, routing, errors, request ids, metrics, log.

Owns: the order of things in one request, and that every request gets exactly one answer. Invariants: nothing reaches
a route that the gate has not admitted; an error of any kind becomes a JSON answer with a fixed or a client's text;
an unexpected one is logged by its type and place, never with its text, which could hold what a user typed.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from typing import Final

import structlog

from progressdb_server.api.http import errors, head, response
from progressdb_server.api.http.access import Gate
from progressdb_server.api.http.errors import ApiError, ClientGoneError, Header
from progressdb_server.api.http.exchange import Exchange
from progressdb_server.api.http.request import Call, Receive, Scope, Send
from progressdb_server.api.openapi.documentation import with_documentation
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.routes.table import Resource, Routing, table
from progressdb_server.store.model import ConversationStore, RecordUnreadableError, StoreError

_log: Final = structlog.get_logger("progressdb.api")
_GONE: Final = 499
"""Status that the metrics give to a request whose client closed its connection."""


class Application:
    """Serve one store behind one gate; `more` are routes beside those of the store."""

    def __init__(
        self,
        store: ConversationStore,
        gate: Gate,
        metrics: ApiMetrics,
        *,
        more: tuple[Resource, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gate = gate
        self._metrics = metrics
        self.resources = with_documentation((*table(store, metrics), *more))
        self._routing = Routing(self.resources)
        self._clock = clock
        self._debugging = _log.is_enabled_for(logging.DEBUG)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # the server is started without lifespan and without WebSockets
        started_s = self._clock()
        self._metrics.started()
        call = Call(scope, receive)
        common: tuple[Header, ...] = ((b"x-request-id", call.request_id.encode("ascii")),)
        if head.ORIGIN in call.headers:
            common += self._gate.cors_headers(call.headers)
        exchange = Exchange(call, common, receive, send)
        try:
            if call.method == "OPTIONS":
                await exchange.reply(response.NO_CONTENT)
                return
            call.principal, call.user = self._gate.admit(
                call.path, call.headers, call.repeated_header, call.address, started_s
            )
            resource = self._routing.hot(call)
            if resource is None:
                await self._routing.route(exchange, scope)
            else:
                outcome = await resource.handler(call)(call)
                if not exchange.replied(outcome):
                    await exchange.reply(outcome)
        except ClientGoneError:
            return
        except ApiError as refusal:
            await self._refuse(exchange, refusal)
        except StoreError as error:
            if isinstance(error, RecordUnreadableError):
                _log.error("record unreadable", request_id=call.request_id, reason=str(error))
            await self._refuse(exchange, errors.from_store(error))
        except Exception as error:  # noqa: BLE001 - the last line: whatever went wrong, the client gets an answer
            _log.error("request failed", request_id=call.request_id, route=call.route, **_whereabouts(error))
            await self._refuse(exchange, errors.internal())
        finally:
            seconds = self._clock() - started_s
            self._metrics.finished(call, exchange.status or _GONE, seconds)
            if exchange.status >= 400 or not exchange.status or self._debugging:
                _log_answer(call, exchange.status, seconds)

    async def _refuse(self, exchange: Exchange, refusal: ApiError) -> None:
        """Nothing can be refused once an answer has started: then it is left unfinished, and the connection
        closed.
        """
        if not exchange.status:
            await exchange.reply(response.error(refusal))


def _whereabouts(error: Exception) -> dict[str, object]:
    """The type of an unexpected error and the lines that it came through; never its text."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__qualname__,
        "at": [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames],
    }


_LOGGED_STATUSES: Final = frozenset({401, 403, 429})


def _log_answer(call: Call, status: int, seconds: float) -> None:
    """Failures as warnings, refusals of callers as information, all else for debugging only. Never a path or a
    query.
    """
    if status >= 500:
        level = _log.warning
    elif status in _LOGGED_STATUSES:
        level = _log.info
    else:
        level = _log.debug
    level(
        "request",
        request_id=call.request_id,
        method=call.method,
        route=call.route or None,
        status=status,
        role=call.principal.role.value,
        key=call.principal.number or None,
        ms=round(seconds * 1000, 3),
    )
