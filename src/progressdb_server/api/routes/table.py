"""The table of routes: every path, its methods, the roles that may call each, and what answers.

Owns: the table and the way from a path to an entry. Invariants: a path that is not in the table is a 404, a method
that is not in its entry a 405 with `Allow`; a role that an entry does not name is a 403 before the handler runs. The
paths that append and list messages are found without Starlette's router, all others by it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple

from starlette.routing import Route, Router

from progressdb_server.api.http.access import Role
from progressdb_server.api.http.errors import ApiError, forbidden, not_found
from progressdb_server.api.http.exchange import EXCHANGE, Exchange
from progressdb_server.api.http.request import Call, Receive, Scope, Send
from progressdb_server.api.http.response import Answer, EventStream, JsonList
from progressdb_server.api.routes import admin
from progressdb_server.api.routes.admin import AdminRoutes
from progressdb_server.api.routes.messages import MessageRoutes, ReactionRoutes
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.routes.threads import ThreadRoutes
from progressdb_server.store.model import ConversationStore

Handler = Callable[[Call], Awaitable[Answer | JsonList | EventStream]]

ANYONE: Final = frozenset(Role)
"""Whom the gate admits: front ends and callers without a key come only to the routes for users, and signed."""
OPERATORS: Final = frozenset({Role.ADMIN, Role.BACKEND})
ADMINS: Final = frozenset({Role.ADMIN})
BACKENDS: Final = frozenset({Role.BACKEND})


class Operation(NamedTuple):
    handler: Handler
    roles: frozenset[Role] = ANYONE


class Resource:
    """One path and its methods; an ASGI application for Starlette's router."""

    def __init__(self, path: str, operations: Mapping[str, Operation]) -> None:
        self.path = path
        self.operations = dict(operations)
        self._allow = (b"allow", ", ".join(sorted(operations)).encode("ascii"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope[EXCHANGE]
        exchange.call.parameters = scope["path_params"]
        await self.serve(exchange)

    async def serve(self, exchange: Exchange) -> None:
        """Raises ApiError 405, 403, and what the handler raises."""
        await exchange.reply(await self.handler(exchange.call)(exchange.call))

    def handler(self, call: Call) -> Handler:
        """Raises ApiError 405, 403."""
        call.route = self.path
        operation = self.operations.get(call.method)
        if operation is None:
            call.route = ""  # the method is a client's word: no label of its own
            raise ApiError(405, "method not allowed", (self._allow,))
        if call.principal.role not in operation.roles:
            raise forbidden()
        return operation.handler


def table(store: ConversationStore, metrics: ApiMetrics) -> tuple[Resource, ...]:
    """Every route of the API."""
    message, thread, reaction, operator = (
        MessageRoutes(store),
        ThreadRoutes(store),
        ReactionRoutes(store),
        AdminRoutes(store),
    )
    one_message = {
        "GET": Operation(message.read),
        "PUT": Operation(message.update),
        "DELETE": Operation(message.delete),
    }
    return (
        Resource("/healthz", {"GET": Operation(admin.health)}),
        Resource("/v1/_sign", {"POST": Operation(admin.sign, BACKENDS)}),
        Resource("/v1/messages", {"GET": Operation(message.list_by_query), "POST": Operation(message.create)}),
        Resource("/v1/messages/{message}", one_message),
        Resource("/v1/messages/{message}/versions", {"GET": Operation(message.versions)}),
        Resource(
            "/v1/messages/{message}/reactions",
            {"GET": Operation(reaction.list), "POST": Operation(reaction.set)},
        ),
        Resource("/v1/messages/{message}/reactions/{identity}", {"DELETE": Operation(reaction.remove)}),
        Resource("/v1/threads", {"GET": Operation(thread.list), "POST": Operation(thread.create)}),
        Resource(
            "/v1/threads/{thread}",
            {
                "GET": Operation(thread.read),
                "PUT": Operation(thread.update),
                "DELETE": Operation(thread.delete),
            },
        ),
        Resource(
            "/v1/threads/{thread}/messages",
            {"GET": Operation(message.list_in_thread), "POST": Operation(message.create_in_thread)},
        ),
        Resource("/v1/threads/{thread}/messages/{message}", one_message),
        Resource("/admin/health", {"GET": Operation(operator.health, OPERATORS)}),
        Resource("/admin/stats", {"GET": Operation(operator.stats, OPERATORS)}),
        Resource("/admin/threads", {"GET": Operation(operator.threads, ADMINS)}),
        Resource("/admin/keys", {"GET": Operation(operator.keys, ADMINS)}),
        Resource("/admin/keys/{key:path}", {"GET": Operation(operator.value, ADMINS)}),
        Resource("/metrics", {"GET": Operation(metrics.answer, OPERATORS)}),
    )


_THREAD_PREFIX: Final = "/v1/threads/"
_MESSAGES_SUFFIX: Final = "/messages"


class Routing:
    """From a path to its resource."""

    def __init__(self, resources: tuple[Resource, ...]) -> None:
        self._fixed = {resource.path: resource for resource in resources if "{" not in resource.path}
        self._in_thread = next(found for found in resources if found.path == "/v1/threads/{thread}/messages")
        self._router = Router(
            [Route(resource.path, endpoint=resource) for resource in resources],
            redirect_slashes=False,
            default=_unknown,
        )

    def hot(self, call: Call) -> Resource | None:
        """The resource of a path that is found without the router."""
        path = call.path
        if path.startswith(_THREAD_PREFIX) and path.endswith(_MESSAGES_SUFFIX):
            thread_id = path[len(_THREAD_PREFIX) : -len(_MESSAGES_SUFFIX)]
            if thread_id and "/" not in thread_id:
                call.parameters = {"thread": thread_id}
                return self._in_thread
        return self._fixed.get(path)

    async def route(self, exchange: Exchange, scope: Scope) -> None:
        """By the router. Raises ApiError, and what the handler raises."""
        scope[EXCHANGE] = exchange
        await self._router(scope, exchange.receive, exchange.send)


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    raise not_found()
