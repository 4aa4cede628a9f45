"""One request and its answer on a connection: uvicorn's cycle, with an answer that leaves in one piece.

Owns: the bytes of an answer. Invariants: head and body of a whole answer are one write, since each write is a system
call; no header can smuggle in a line of its own; an answer is as long as it said, or the connection ends. A whole
body and a whole answer go without ASGI's messages (`call.Direct`). It takes from uvicorn how an application is run, and
how a client's going is noticed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, Final

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from progressdb_server.api.errors import CLOSE, Header

_WITHOUT_BODY: Final = frozenset({204, 304})
_logger: Final = logging.getLogger("uvicorn.error")


class Cycle(RequestResponseCycle):
    def __init__(  # noqa: PLR0917  keywords cost more than the rest of it
        self,
        scope: MutableMapping[str, Any],
        transport: asyncio.Transport,
        flow: FlowControl,
        default_headers: list[Header],
        expect_100_continue: bool,
        keep_alive: bool,
        on_response: Callable[[], None],
    ) -> None:
        """All that uvicorn's own sets and uses, but for its log of accesses."""
        self.scope = scope  # type: ignore[assignment]  # uvicorn names each key
        self.transport = transport
        self.flow = flow
        self.logger = _logger
        self.default_headers = default_headers
        self.on_response = on_response
        self.disconnected = False
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = expect_100_continue
        self.more_body = True
        self.response_started = False
        self.response_complete = False
        self.chunked_encoding = None
        self.expected_content_length = 0
        self._body: bytes | bytearray = b""
        self._news = False
        self._waited: asyncio.Event | None = None
        self._start: MutableMapping[str, Any] | None = None
        self.task: asyncio.Task[None] | None = None

    async def run(self, app: Any, tasks: set[asyncio.Task[None]]) -> None:
        """`tasks` holds `self.task` for as long as it runs."""
        try:
            await self.run_asgi(app)
        finally:
            if self.task is not None:
                tasks.discard(self.task)

    # --- the request's body ---------------------------------------------------------------------------------------
    @property
    def message_event(self) -> Cycle:  # type: ignore[override]  # all that uvicorn calls is `set`
        """What uvicorn does `set` on. An event, which most requests need none of, is made when somebody waits."""
        return self

    def set(self) -> None:
        """There is more of the body, or no more to come."""
        self._news = True
        if self._waited is not None:
            self._waited.set()

    async def _wait(self) -> None:
        if self._waited is None:
            self._waited = asyncio.Event()
        self._waited.clear()
        await self._waited.wait()

    def add(self, part: bytes) -> int:
        """The bytes that wait to be read."""
        if not self._body:
            self._body = part
        elif isinstance(self._body, bytearray):
            self._body += part
        else:
            self._body = bytearray(self._body + part)
        self.set()
        return len(self._body)

    def whole_body(self) -> bytes | None:
        """See `call.Direct`."""
        if not self._news or self.more_body or self.waiting_for_100_continue:
            return None
        if self.disconnected or self.response_complete:
            return None
        if self.flow.read_paused:
            self.flow.resume_reading()
        return self._take()

    def _take(self) -> bytes:
        self._news = False
        body, self._body = bytes(self._body), b""
        return body

    async def receive(self) -> MutableMapping[str, Any]:  # type: ignore[override]  # uvicorn names each shape
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            if not self._news:
                await self._wait()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": self._take(), "more_body": self.more_body}

    # --- the answer -----------------------------------------------------------------------------------------------
    def answer(self, status: int, headers: Sequence[Header], body: bytes) -> bool:
        """See `call.Direct`."""
        if self.flow.write_paused or self._start is not None or self.response_complete or self.disconnected:
            return False
        if self.scope["method"] == "HEAD" or status in _WITHOUT_BODY:
            return False
        if CLOSE in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            headers = (*headers, CLOSE)
        lines = [b"%b: %b\r\n" % header for header in (*self.default_headers, *headers)]
        head = b"".join((STATUS_LINE[status], *lines, b"content-length: %d\r\n" % len(body)))
        _check_lines(head, len(lines) + 2)
        self.transport.write(head + b"\r\n" + body)
        self.response_started = True
        self._complete()
        return True

    async def send(self, message: MutableMapping[str, Any]) -> None:  # type: ignore[override]  # uvicorn names each shape
        """Raises RuntimeError for what is no answer; nothing of it has left then, or the connection ends."""
        if self.response_complete:
            raise RuntimeError("the answer is complete already")
        if message["type"] == "http.response.start":
            if self._start is not None:
                raise RuntimeError("the answer has started already")
            self._start = message
            return
        if self._start is None:
            raise RuntimeError("the answer has not started")
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        part: bytes = message.get("body", b"")
        more: bool = message.get("more_body", False)
        head = b"" if self.response_started else self._head(self._start["status"], self._start.get("headers", ()))
        self.transport.write(head + self._framed(part, more))
        self.response_started = True
        if not more:
            self._complete()

    def _head(self, status: int, headers: Iterable[Header]) -> bytes:
        lines = [STATUS_LINE[status]]
        closes = False
        for name, value in (*self.default_headers, *headers):
            lines.append(b"%b: %b\r\n" % (name, value))
            if name == b"content-length":
                self.chunked_encoding = False
                self.expected_content_length = int(value)
            elif name == b"connection" and value.lower() == b"close":
                self.keep_alive = False
                closes = True
        if not self.keep_alive and not closes:
            lines.append(b"connection: close\r\n")
        if self.chunked_encoding is None and status not in _WITHOUT_BODY and self.scope["method"] != "HEAD":
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        _check_lines(head, len(lines))
        return head + b"\r\n"

    def _framed(self, part: bytes, more: bool) -> bytes:
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
            return b""
        if self.chunked_encoding:
            framed = b"%x\r\n%b\r\n" % (len(part), part) if part else b""
            return framed if more else framed + b"0\r\n\r\n"
        self.expected_content_length -= len(part)
        if self.expected_content_length < 0 or (not more and self.expected_content_length):
            raise RuntimeError("the answer is not as long as it said")
        return part

    def _complete(self) -> None:
        self.response_complete = True
        self.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


def _check_lines(head: bytes, count: int) -> None:
    if len(head.splitlines()) != count:
        raise RuntimeError("a header of the answer holds a line of its own")
