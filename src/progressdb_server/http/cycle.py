"""One request of a connection and its response, for ASGI and as an `asgi.DirectChannel`.

Owns: what waits of a body, the turn of a list, and the bytes of a response. Invariants: no header of a response can
contain a line break; a response is as long as its content-length, or the connection is closed; a body that finds no
room in the budget is refused. The module must never look into a body.

A response that is complete is one write, because each write is a system call. Complete bodies and responses bypass
ASGI's messages (`asgi.DirectChannel`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Hashable, Iterable, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from minikms.platform.logs import Log
from progressdb_server.http import framing, limits
from progressdb_server.http.asgi import BODY_REFUSED, CLOSE, Header
from progressdb_server.http.serving import ServedConnection
from progressdb_server.http.shares import BodyAccount

_log: Final = Log()
STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii") for status in HTTPStatus
}
_WITHOUT_BODY: Final = frozenset({204, 304})


class Cycle:
    def __init__(self, connection: ServedConnection, scope: MutableMapping[str, Any], fields: framing.Fields) -> None:
        self.connection = connection
        self.scope = scope
        self.keep_alive = fields.keep_alive and not connection.serving.drains
        self.waits_for_continue = fields.expects_continue
        self.task: asyncio.Task[None] | None = None
        self.disconnected = False
        self.more_body = True
        self.body_refused = False
        self._body: bytes | bytearray = b""
        self._received_bytes = 0
        self._account: BodyAccount | None = None
        self._payer: Hashable = None  # also of a caller that acts for many users
        self._identified = False
        self._has_news = False
        self._event: asyncio.Event | None = None
        self.response_started = False
        self.response_complete = False
        self._response_start: MutableMapping[str, Any] | None = None
        self._chunked: bool | None = None
        self._ends_with_connection = False
        """True for a response without a length to a client of HTTP/1.0, which knows no chunks (RFC 9112, section 6.1).
        """
        self._length_left = 0

    async def run(self) -> None:
        connection = self.connection
        try:
            await connection.serving.app(self.scope, self.receive, self.send)
        except Exception as error:  # noqa: BLE001 - whatever happens, the connection is not left without an end
            _log.error("request failed", error=type(error).__qualname__)
        finally:
            self.release()
            if self.task is not None:
                connection.serving.tasks.discard(self.task)
            if not self.response_complete and not self.disconnected:
                connection.refuse(500)

    # --- the request's body ---------------------------------------------------------------------------------------
    def notify(self) -> None:
        """More of the body was received, or the request or the connection has ended."""
        self._has_news = True
        if self._event is not None:
            self._event.set()

    async def _wait(self) -> None:
        if self._event is None:  # most requests need none
            self._event = asyncio.Event()
        self._event.clear()
        await self._event.wait()

    def identify(self, payer: Hashable) -> None:
        self._payer, self._identified = payer, True
        if self._account is not None and not self._account.identify(payer):
            self._refuse_body()

    def release(self) -> None:
        """The body is no longer kept."""
        self._body = b""
        if self._account is not None:
            self._account.close()

    def _fits(self) -> bool:
        """Whether what was received of the body fits into the budget of bodies."""
        if self._account is None:
            shares = self.connection.serving.shares
            claim = b"" if self._identified else shares.claim(self.scope["headers"])
            self._account = BodyAccount(shares, self.connection.group, claim)
            if self._identified:
                self._account.identify(self._payer)
        return self._account.grow_to(self._received_bytes)

    def _refuse_body(self) -> None:
        self.body_refused = True
        self.release()
        self.notify()

    def add(self, part: bytes) -> int:
        """Append a part of the body. Returns how many bytes wait to be read."""
        if self.body_refused or self.response_complete:
            return 0
        self._received_bytes += len(part)
        if self._received_bytes > limits.BODY_UNCOUNTED_BYTES_MAX and not self._fits():
            self._refuse_body()
            return 0
        if not self._body:
            self._body = part
        elif isinstance(self._body, bytearray):
            self._body += part
        else:
            self._body = bytearray(self._body + part)
        self.notify()
        return len(self._body)

    @property
    def waiting_bytes(self) -> int:
        """The bytes of the body that are received and not read."""
        return len(self._body)

    def end_body(self) -> None:
        self.more_body = False
        self.notify()

    def received_body(self) -> bytes | None:
        if not self._has_news or self.more_body or self.waits_for_continue:
            return None
        if self.disconnected or self.response_complete or self.body_refused:
            return None
        return self._take()

    def _take(self) -> bytes:
        self._has_news = False
        body, self._body = bytes(self._body), b""
        return body

    async def receive(self) -> MutableMapping[str, Any]:
        connection = self.connection
        if self.waits_for_continue and not self.response_started and not connection.transport.is_closing():
            connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waits_for_continue = False
        if not self.disconnected and not self.response_complete:
            if self.more_body:
                connection.resume_reading()
            if not self._has_news:
                await self._wait()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        if self.body_refused:
            self._has_news = False
            return {"type": BODY_REFUSED}
        return {"type": "http.request", "body": self._take(), "more_body": self.more_body}

    # --- the response ---------------------------------------------------------------------------------------------
    def begin_list(self) -> Awaitable[None] | None:
        connection = self.connection
        return connection.serving.shares.lists.begin(connection.group, connection)

    def end_list(self) -> None:
        connection = self.connection
        connection.serving.shares.lists.end(connection.group, connection)

    def send_response(self, status: int, headers: Sequence[Header], body: bytes) -> bool:
        connection = self.connection
        if connection.write_paused or self._response_start is not None or self.response_complete or self.disconnected:
            return False
        if status in _WITHOUT_BODY or self.scope["method"] == "HEAD":
            return False
        if CLOSE in headers:
            self.keep_alive = False
        elif not self.keep_alive or (self.waits_for_continue and not self._stays_open()):
            headers = (*headers, CLOSE)
        lines = [b"%b: %b\r\n" % header for header in headers]
        head = b"".join((STATUS_LINES[status], connection.serving.date, *lines, b"content-length: %d\r\n" % len(body)))
        _check_lines(head, len(lines) + 3)
        connection.transport.write(head + b"\r\n" + body)
        self.response_started = True
        self._complete()
        return True

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Sends one ASGI message. An invalid one is a RuntimeError."""
        if self.response_complete:
            raise RuntimeError("the response is already complete")
        if message["type"] == "http.response.start":
            if self._response_start is not None:
                raise RuntimeError("the response has already started")
            self._response_start = message
            return
        if self._response_start is None:
            raise RuntimeError("the response has not started")
        connection = self.connection
        if connection.write_paused and not self.disconnected:
            await connection.drain()
        if self.disconnected:
            return
        part: bytes = message.get("body", b"")
        more: bool = message.get("more_body", False)
        head = (
            b""
            if self.response_started
            else self._head(self._response_start["status"], self._response_start.get("headers", ()))
        )
        connection.transport.write(head + self._framed(part, more))
        self.response_started = True
        if not more:
            self._complete()

    def _stays_open(self) -> bool:
        """Whether another request may follow. Not if the client waits to hear whether it should send this one's body:
        what it sends next could be the body or a request."""
        if self.waits_for_continue and self.more_body:
            self.keep_alive = False
        return self.keep_alive

    def _head(self, status: int, headers: Iterable[Header]) -> bytes:
        lines = [STATUS_LINES[status], self.connection.serving.date]
        closes = False
        for name, value in headers:
            lines.append(b"%b: %b\r\n" % (name, value))
            if name == b"content-length":
                self._chunked = False
                self._length_left = int(value)
            elif name == b"connection" and value.lower() == b"close":
                self.keep_alive = False
                closes = True
        if not self._stays_open() and not closes:
            lines.append(b"connection: close\r\n")
        if self._chunked is None and status not in _WITHOUT_BODY and self.scope["method"] != "HEAD":
            self._chunked = True
            if self.scope["http_version"] == "1.0":
                self._ends_with_connection = True
            else:
                lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        _check_lines(head, len(lines))
        return head + b"\r\n"

    def _framed(self, part: bytes, more: bool) -> bytes:
        if self.scope["method"] == "HEAD":
            self._length_left = 0
            return b""
        if self._ends_with_connection:
            return part
        if self._chunked:
            framed = b"%x\r\n%b\r\n" % (len(part), part) if part else b""
            return framed if more else framed + b"0\r\n\r\n"
        self._length_left -= len(part)
        if self._length_left < 0 or (not more and self._length_left):
            raise RuntimeError("the response does not have the length that its head gives")
        return part

    def _complete(self) -> None:
        self.response_complete = True
        self.notify()
        self.connection.responded(self.keep_alive)


def _check_lines(head: bytes, count: int) -> None:
    if len(head.splitlines()) != count:
        raise RuntimeError("a header of the response contains a line break")
