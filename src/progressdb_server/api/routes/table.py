"""The table of operations: paths, methods, the roles that may call, and the handlers.

Owns: finding the operation of a request. Invariants: a path that is not in the table is a
404, and so is one that spells a fixed part of an entry with `%`, or a `/` as `%2F` outside the identity of a reaction;
a method that is not in its entry is a 405 with `Allow`; a role that an operation does not name is a 403 before the
handler runs. Paths without parameters, and the path that appends to and
lists a thread, are found without Starlette's router, which costs more than the rest of the routing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from starlette.routing import Route, Router

from progressdb_server.api.gate import head
from progressdb_server.api.gate.errors import ApiError, forbidden, not_found
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import EXCHANGE, Exchange
from progressdb_server.api.openapi.description import Handler, Operation
from progressdb_server.http.asgi import Receive, Scope, Send


class Resource:
    """One path and its operations; an ASGI application for Starlette's router."""

    def __init__(self, path: str, operations: Iterable[Operation]) -> None:
        self.path = path
        self._operations = {operation.method: operation for operation in operations}
        self._allow = (b"allow", ", ".join(sorted(self._operations)).encode("ascii"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the handler of the method. Raises ApiError 405, 403, and what the handler raises."""
        exchange: Exchange = scope[EXCHANGE]
        request = exchange.request
        request.path_params = scope["path_params"]
        raw_path = scope.get("raw_path", b"")
        if b"%" in raw_path and not _has_fixed_parts(raw_path, self.path):
            raise not_found()
        await exchange.respond(await self.handler(request)(request))

    def handler(self, request: ApiRequest) -> Handler:
        """The handler of the request's method. Raises ApiError 405, 403."""
        request.route = self.path
        is_page = request.method == "HEAD" and self.path.startswith("/viewer")
        operation = self._operations.get("GET" if is_page else request.method)
        if operation is None:
            request.route = ""  # the method is a client's text, which must not become a label of the metrics
            raise ApiError(405, "method not allowed", (self._allow,))
        if request.caller.role not in operation.roles:
            raise forbidden()
        return operation.handler


_THREAD_PREFIX: Final = "/v1/threads/"
_MESSAGES_SUFFIX: Final = "/messages"
THREAD_MESSAGES: Final = "/v1/threads/{thread}/messages"


class Routing:
    """Finds the resource of a path."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        by_path: dict[str, list[Operation]] = {}
        for operation in operations:
            by_path.setdefault(operation.path, []).append(operation)
        resources = {path: Resource(path, on_path) for path, on_path in by_path.items()}
        self._fixed = {path: resource for path, resource in resources.items() if "{" not in path}
        self._thread_messages = resources[THREAD_MESSAGES]
        self._router = Router(
            [Route(path, endpoint=resource) for path, resource in resources.items()],
            redirect_slashes=False,
            default=_not_found,
        )

    def hot(self, request: ApiRequest, scope: Scope) -> Resource | None:
        """The resource of a path that is found without the router."""
        if b"%" in scope.get("raw_path", b""):
            return None
        path = request.path
        if path.startswith(_THREAD_PREFIX) and path.endswith(_MESSAGES_SUFFIX):
            thread_id = path[len(_THREAD_PREFIX) : -len(_MESSAGES_SUFFIX)]
            if thread_id and "/" not in thread_id:
                request.path_params = {"thread": thread_id}
                return self._thread_messages
        return self._fixed.get(path)

    async def route(self, exchange: Exchange, scope: Scope) -> None:
        """Find any other path and run its handler. Raises ApiError, also for a path that is not UTF-8, and what the
        handler raises."""
        if not head.is_utf8(scope.get("raw_path", b"")):
            raise not_found()  # the server has put other characters in the place of the malformed ones
        scope[EXCHANGE] = exchange
        try:
            await self._router(scope, exchange.receive, exchange.send)
        finally:
            del scope[EXCHANGE]  # which refers to the scope


def _has_fixed_parts(raw_path: bytes, template: str) -> bool:
    """Whether the path, not decoded, has each part of the template that is no parameter where the template has it.

    A proxy that guards `/admin` compares what was sent; RFC 3986, section 2.2: `%2F` is data, and no separator.
    """
    parts, expected = raw_path.decode("ascii").split("/"), template.split("/")
    if len(parts) != len(expected) and not expected[-1].endswith(":path}"):
        return False
    return len(parts) >= len(expected) and all(
        wanted == part for part, wanted in zip(parts, expected, strict=False) if not wanted.startswith("{")
    )


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise not_found()
