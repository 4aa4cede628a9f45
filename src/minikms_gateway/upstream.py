"""The connections to the key service.

Owns: a bounded pool of connections to its Unix socket, and the bytes of each request, made anew from the parsed
request. Invariants: the kernel has named the user that serves the socket before a byte is sent; a connection has one
request in flight, and one that was not answered is closed, so that no answer reaches another caller; every wait is
bounded; a request that was sent is never sent again. It must never merge the requests of callers into one, or read
what a body holds.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Collection
from typing import Final, cast

from minikms import api
from minikms.api.errors import KmsError, KmsProtocolError, RequestInterruptedError, ShuttingDownError
from minikms.client.connecting import POOL_IDLE_S_MAX, SocketEndpoint
from minikms.client.wire import JSON, Answer, AnswerParser
from minikms.http import HttpRequest, Response

CONNECTIONS_MAX: Final = 512
"""The key service gives a user half of its own bound, 1,024. Further requests wait for one of these."""
WAITING_COUNT_MAX: Final = api.CONNECTIONS_MAX
"""Requests that wait for a connection. A client that closes its connection leaves its request here, so the number of
clients does not bound them."""
ANSWER_SECONDS_MAX: Final = 60.0
SWEEP_SECONDS: Final = 1.0
_HEAD: Final = b" HTTP/1.1\r\nHost: minikms\r\n"
_PRINCIPAL: Final = api.PRINCIPAL_HEADER.encode("ascii")
_REQUEST_ID: Final = api.REQUEST_ID_HEADER.encode("ascii")


def request_bytes(method: str, target: str, request: HttpRequest, principal: str | None) -> bytes:
    """The request as the key service gets it. `method` and `target` are of this project's own table of verbs, but for
    the id of a key or a query, whose characters the engine has checked.
    """
    lines = [b"%b %b" % (method.encode("ascii"), target.encode("ascii")), _HEAD]
    if principal is not None:
        lines.append(b"%b: %b\r\n" % (_PRINCIPAL, principal.encode("ascii")))
    if request.request_id is not None:
        lines.append(b"%b: %b\r\n" % (_REQUEST_ID, request.request_id.encode("ascii")))
    if method == "POST":
        kind = api.MSGPACK if request.head.content_type.lower() == api.MSGPACK else "application/json"
        lines.append(b"Content-Type: %b\r\nContent-Length: %d\r\n" % (kind.encode("ascii"), len(request.body)))
        lines += [b"\r\n", request.body]  # type: ignore[list-item]  # join takes any buffer
    else:
        lines.append(b"\r\n")
    return b"".join(lines)


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
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._waiting: deque[tuple[bytes, asyncio.Future[bytes | Response]]] = deque()
        self.error = ""
        """Why the last attempt to connect failed; empty after a success."""

    @property
    def connections_count(self) -> int:
        return len(self._all)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def send(self, data: bytes) -> asyncio.Future[bytes | Response]:
        """The answer to one request. It raises ShuttingDownError if the request was not sent, RequestInterruptedError
        if it may have been carried out.
        """
        answer: asyncio.Future[bytes | Response] = self._loop.create_future()
        connection = self._free()
        if connection is not None:
            connection.send(data, answer)
        elif len(self._all) < CONNECTIONS_MAX:
            self._open(data, answer)
        elif len(self._waiting) < WAITING_COUNT_MAX:
            self._waiting.append((data, answer))
        else:
            _fail(answer, ShuttingDownError("too many requests wait for the key service"))
        return answer

    def sweep(self) -> None:
        """Called every SWEEP_SECONDS: closes connections that are idle or unanswered for too long."""
        now_s = time.monotonic()
        for connection in list(self._all):
            limit_s = POOL_IDLE_S_MAX if connection.is_idle else ANSWER_SECONDS_MAX
            if now_s - connection.since_s > limit_s:
                connection.close()

    def close(self) -> None:
        for connection in list(self._all):
            connection.close()
        while self._waiting:
            _fail(self._waiting.popleft()[1], ShuttingDownError("the gateway is stopping"))

    # --- for connections ----------------------------------------------------------------------------------------

    def freed(self, connection: _Connection) -> None:
        """A connection was answered, and may carry another request."""
        if self._waiting and connection.usable:
            connection.send(*self._waiting.popleft())
        else:
            self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        while self._waiting and len(self._all) < CONNECTIONS_MAX:  # each fails at once if the key service is away
            self._open(*self._waiting.popleft())

    # --- inside -------------------------------------------------------------------------------------------------

    def _free(self) -> _Connection | None:
        fresh_s = time.monotonic() - POOL_IDLE_S_MAX
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.since_s >= fresh_s:
                return connection
            connection.close()
        return None

    def _open(self, data: bytes, answer: asyncio.Future[bytes | Response]) -> None:
        try:
            sock = self._endpoint.connect(0)
        except KmsError as error:
            self.error = str(error)
            _fail(answer, ShuttingDownError("the gateway can't reach the key service"))
            return
        self.error = ""
        connection = _Connection(self)
        self._all.add(connection)
        connection.opening = (data, answer)
        task = self._loop.create_task(self._attach(connection, sock))
        connection.task = task

    async def _attach(self, connection: _Connection, sock: socket.socket) -> None:
        try:
            await self._loop.create_unix_connection(lambda: connection, sock=sock)
        except OSError:
            sock.close()
            connection.connection_lost(None)


class _Connection(asyncio.Protocol):
    """One connection. `opening`: the request that it was opened for, until it is attached to the loop."""

    def __init__(self, pool: Upstream) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = AnswerParser()
        self._answer: asyncio.Future[bytes | Response] | None = None
        self.opening: tuple[bytes, asyncio.Future[bytes | Response]] | None = None
        self.task: asyncio.Task[None] | None = None
        self.since_s = time.monotonic()
        """When it was asked, or when it was answered."""

    @property
    def is_idle(self) -> bool:
        return self._answer is None and self.opening is None

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, data: bytes, answer: asyncio.Future[bytes | Response]) -> None:
        self._parser = AnswerParser()
        self._answer = answer
        self.since_s = time.monotonic()
        cast(asyncio.Transport, self._transport).write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.opening is not None:
            request, self.opening = self.opening, None
            self.send(*request)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.close()
            return
        try:
            answers = self._parser.feed(data)
        except KmsProtocolError:
            self.close()
            return
        if answers is None:
            return
        self._answer = None
        self.since_s = time.monotonic()
        if answers.reusable:
            self._pool.freed(self)
        else:
            self.close()
        if answer.done():
            return
        try:
            answer.set_result(response_of(answers))
        except ShuttingDownError as error:
            self._pool.error = str(error)
            answer.set_exception(error)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            _fail(answer, RequestInterruptedError("the key service did not answer; the request may have taken effect"))
        if self.opening is not None:
            _fail(self.opening[1], ShuttingDownError("the gateway can't reach the key service"))
            self.opening = None
        self._pool.lost(self)


def _fail(answer: asyncio.Future[bytes | Response], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
