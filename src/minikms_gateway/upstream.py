"""The connections to the key service.

Owns: a bounded pool of connections to its Unix socket, and the bytes of each request, made anew from the parsed
request. Invariants: the kernel has named the user that serves the socket before a byte is sent; a connection has one
request in flight, and one that was not answered is closed, so that no answer reaches another caller; every wait is
bounded; a request that was sent is never sent again. It must never merge the requests of callers into one, or read
what a body holds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection
from functools import partial
from typing import Final

from minikms import api
from minikms.api.errors import KmsError, KmsUnavailableError, RequestInterruptedError, ShuttingDownError
from minikms.client.connecting import POOL_IDLE_S_MAX, SocketEndpoint
from minikms.client.connection import ClientConnection
from minikms.client.wire import JSON, SOCKET_ORIGIN, Answer, request_head
from minikms.http import HttpRequest, Response

CONNECTIONS_MAX: Final = 512
"""The key service gives a user half of its own bound, 1,024. Further requests wait for one of these."""
WAITING_COUNT_MAX: Final = api.CONNECTIONS_MAX
"""Requests that wait for a connection. A client that closes its connection leaves its request here, so the number of
clients does not bound them."""
ANSWER_SECONDS_MAX: Final = 60.0
SWEEP_SECONDS: Final = 1.0
_PRINCIPAL: Final = api.PRINCIPAL_HEADER.encode("ascii")
_MSGPACK: Final = api.MSGPACK.encode("ascii")


def request_bytes(method: str, target: str, request: HttpRequest, principal: str | None) -> bytes:
    """The request as the key service gets it. `method` and `target` are of this project's own table of verbs, but for
    the id of a key or a query, whose characters the engine has checked.
    """
    origin = SOCKET_ORIGIN
    if principal is not None:
        origin += b"%b: %b\r\n" % (_PRINCIPAL, principal.encode("ascii"))
    if method == "GET":
        return request_head(target.encode("ascii"), None, request.request_id, origin=origin)
    kind = _MSGPACK if request.head.content_type.lower() == api.MSGPACK else JSON
    return b"".join(
        (request_head(target.encode("ascii"), len(request.body), request.request_id, kind, origin), request.body)
    )


def response_of(answer: Answer) -> bytes | Response:
    """An answer of the key service as the engine sends it on. Raises ShuttingDownError for one that concerns this
    gateway and not its client.
    """
    if answer.status == 200 and answer.content_type == JSON:
        return answer.body
    if answer.status == 401:
        raise ShuttingDownError("the key service does not accept this gateway")
    headers = (("retry-after", str(answer.retry_after_s)),) if answer.retry_after_s else ()
    return Response(answer.status, answer.body, answer.content_type.decode("ascii"), headers=headers)


class Upstream:
    """The pool. Used in the loop's thread."""

    def __init__(self, path: str, server_uids: Collection[int], loop: asyncio.AbstractEventLoop) -> None:
        self._endpoint = SocketEndpoint(path, server_uids)
        self._loop = loop
        self._opening: set[asyncio.Task[None]] = set()
        self._idle: list[ClientConnection] = []
        self._busy: dict[ClientConnection, float] = {}
        """When the request of each was sent, in the loop's time."""
        self._waiting: deque[tuple[bytes, asyncio.Future[bytes | Response]]] = deque()
        self.error = ""
        """Why the last attempt to connect failed; empty after a success."""

    @property
    def connections_count(self) -> int:
        return len(self._opening) + len(self._idle) + len(self._busy)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def send(self, data: bytes) -> asyncio.Future[bytes | Response]:
        """The answer to one request. It raises ShuttingDownError if the request was not sent, RequestInterruptedError
        if it may have been carried out.
        """
        answer: asyncio.Future[bytes | Response] = self._loop.create_future()
        if not self._begin(data, answer):
            if len(self._waiting) < WAITING_COUNT_MAX:
                self._waiting.append((data, answer))
            else:
                answer.set_exception(ShuttingDownError("too many requests wait for the key service"))
        return answer

    def sweep(self) -> None:
        """Called every SWEEP_SECONDS: closes connections that are idle or unanswered for too long."""
        now_s = self._loop.time()
        for connection in self._idle:
            if now_s - connection.idle_since_s > POOL_IDLE_S_MAX:
                connection.close()
        self._idle = [connection for connection in self._idle if connection.usable]
        for connection, since_s in self._busy.items():
            if now_s - since_s > ANSWER_SECONDS_MAX:
                connection.close()

    def close(self) -> None:
        for connection in (*self._idle, *self._busy):
            connection.close()
        while self._waiting:
            _, answer = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(ShuttingDownError("the gateway is stopping"))

    # --- inside -------------------------------------------------------------------------------------------------

    def _begin(self, data: bytes, answer: asyncio.Future[bytes | Response]) -> bool:
        """Sends the request on an idle connection or a new one; False if there can't be another one."""
        fresh_s = self._loop.time() - POOL_IDLE_S_MAX
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since_s >= fresh_s:
                self._send_on(connection, data, answer)
                return True
            connection.close()
        if self.connections_count >= CONNECTIONS_MAX:
            return False
        task = self._loop.create_task(self._open(data, answer))
        self._opening.add(task)
        task.add_done_callback(self._opened)
        return True

    async def _open(self, data: bytes, answer: asyncio.Future[bytes | Response]) -> None:
        try:
            connection = await ClientConnection.open(self._endpoint, 0)
        except (KmsError, OSError) as error:
            self.error = str(error)
            if not answer.done():
                answer.set_exception(ShuttingDownError("the gateway can't reach the key service"))
        else:
            self.error = ""
            self._send_on(connection, data, answer)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        self._begin_waiting()

    def _begin_waiting(self) -> None:
        """Each request fails at once if the key service is away."""
        while self._waiting and self._begin(*self._waiting[0]):
            self._waiting.popleft()

    def _send_on(self, connection: ClientConnection, data: bytes, answer: asyncio.Future[bytes | Response]) -> None:
        self._busy[connection] = self._loop.time()
        connection.begin(partial(self._ended, connection, answer), data)

    def _ended(
        self, connection: ClientConnection, answer: asyncio.Future[bytes | Response], result: Answer | KmsError
    ) -> None:
        del self._busy[connection]
        if connection.usable:
            connection.idle_since_s = self._loop.time()
            self._idle.append(connection)
        self._begin_waiting()
        if answer.done():
            return
        try:
            answer.set_result(_response(result))
        except ShuttingDownError as error:
            self.error = str(error)
            answer.set_exception(error)
        except RequestInterruptedError as error:
            answer.set_exception(error)


def _response(result: Answer | KmsError) -> bytes | Response:
    if isinstance(result, Answer):
        return response_of(result)
    if isinstance(result, KmsUnavailableError) and not result.sent:
        raise ShuttingDownError("the gateway can't reach the key service")
    raise RequestInterruptedError("the key service did not answer; the request may have taken effect")
