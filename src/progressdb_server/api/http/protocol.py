"""One request and its answer on a connection: uvicorn's cycle, with an answer that leaves in one piece.

Owns: the bytes of an answer. Invariants: head and body of a whole answer are one write, since each write is a system
call; no header can smuggle in a line of its own; an answer is as long as it said, or the connection ends. A whole
body and a whole answer go without ASGI's messages (`call.Direct`). It takes from uvicorn how an application is run, and
how a client's going is noticed.

HTTP/1.1 for the API: uvicorn's protocol with the bounds that it lacks.

Owns: what a connection may cost before a request is whole. Rules, each answered 4xx or by closing:

1. A head has at most `HEAD_BYTES_MAX` bytes and `HEADERS_COUNT_MAX` headers, and of a line that has not ended the
parser holds at most `HELD_BYTES_MAX`; exactly one Host (RFC 9112 section 3.2). 2. Trailers are dropped: uvicorn would
add them to the headers that the application is about to read, behind the back of whatever proxy set those. 3. A
request is whole within `REQUEST_SECONDS_MAX` of its first byte; a new connection sends one within the same time. 4. At
most `CONNECTIONS_COUNT_MAX` connections; a client that does not read its answer is cut off by the kernel.

It must never look at a body, and knows no route.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, Final

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from progressdb_server.api.http import limits
from progressdb_server.api.http.errors import CLOSE, Header
from progressdb_server.api.http.request import DIRECT

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


_SENTENCES: Final = {
    400: "malformed HTTP request",
    431: "request head too large",
}


class _RefusedError(Exception):
    """Stops the parser; the status is in the protocol."""


class BoundedProtocol(HttpToolsProtocol):
    """What is done for every request is spelled out here instead of left to uvicorn: it is done thousands of times a
    second.
    """

    __slots__ = (
        "_asgi",
        "_broken",
        "_due_s",
        "_expecting",
        "_fed_bytes",
        "_in_body",
        "_in_head",
        "_refusal_status",
        "_running",
        "_timer",
        "_timer_s",
        "_told",
    )
    cycle: Cycle
    pipeline: deque[tuple[Cycle, Any]]  # type: ignore[assignment]  # of no others

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._refusal_status = 400
        self._in_head = False
        self._in_body = False
        self._broken = False
        self._running: RequestResponseCycle | None = None
        self._fed_bytes = 0
        """Since the parser last told of something: at least as many as it holds back, and as the head has that is being
        read."""
        self._told = False
        self._asgi = {"version": self.asgi_version, "spec_version": "2.3"}
        self._expecting = False
        """A request that is not whole."""
        self._due_s = math.inf
        """When the connection ends unless something happens, by the loop's clock."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf

    # --- the connection -----------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        if len(self.connections) >= limits.CONNECTIONS_COUNT_MAX:
            transport.abort()
        super().connection_made(transport)
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # a connection that is gone already
                stall_ms = limits.STREAM_STALL_SECONDS_MAX * 1000
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall_ms)
        self._expect_more()

    def connection_lost(self, exc: Exception | None) -> None:
        self._due_s = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._broken:
            return
        self._fed_bytes += len(data)
        self._told = False
        try:
            self.parser.feed_data(data)
            if self._in_head:
                self._check_head()
            if self._told:
                self._fed_bytes = len(data)
            elif self._fed_bytes > limits.HELD_BYTES_MAX:  # one endless line
                self._refuse(431)
        except (httptools.HttpParserError, _RefusedError):
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("")
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        if self._in_head or self._in_body or self.cycle is None or self.cycle.response_complete:
            self._expect_more()
        else:
            self._expecting = False
            self._due_s = math.inf

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio takes the transport's fate from it
        """True keeps the connection, for the answer; TLS has no half-closed connections."""
        if not self._answering() or self.scheme == "https":
            return None
        self._end_after_answers()
        return True

    def _answering(self) -> bool:
        """Whether a whole request is not answered yet."""
        running = self._running
        return running is not None and not running.response_complete and not running.more_body

    def _end_after_answers(self) -> None:
        """The last whole request of the connection gets its answer; one that has not come to its end is not run."""
        if self._in_body and self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is not None:
            last.keep_alive = False

    # --- time ---------------------------------------------------------------------------------------------------
    def _expect_more(self) -> None:
        if not self._expecting:
            self._expecting = True
            self._end_at(self.loop.time() + limits.REQUEST_SECONDS_MAX)

    def _end_at(self, due_s: float) -> None:
        """One timer goes on through many requests, and looks at what is due when it fires: to set and cancel one for
        each of them costs several microseconds.
        """
        self._due_s = due_s
        if self._timer is not None:
            if self._timer_s <= due_s:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(due_s, self._look)
        self._timer_s = due_s

    def _look(self) -> None:
        self._timer = None
        if self._due_s > self.loop.time():
            if self._due_s < math.inf:
                self._end_at(self._due_s)
        elif not self._expecting:
            self.transport.close()
        elif self._answering():  # an earlier request of this connection
            self._end_at(self.loop.time() + limits.REQUEST_SECONDS_MAX)
        elif not self.transport.is_closing():
            self.transport.abort()

    # --- the parser's callbacks ---------------------------------------------------------------------------------
    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._told = True
        self._in_head = True
        self._in_body = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            headers = self.headers
            if len(headers) >= limits.HEADERS_COUNT_MAX:
                self._refuse(431)
            headers.append((name.lower(), value))

    def _check_head(self) -> None:
        if self._fed_bytes > limits.HEAD_BYTES_MAX:
            head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if head_bytes > limits.HEAD_BYTES_MAX:
                self._refuse(431)

    def on_headers_complete(self) -> None:
        self._check_head()
        headers = self.headers
        last = dict(headers)
        once = len(last) == len(headers) or [name for name, _ in headers].count(b"host") == 1
        version = self.parser.get_http_version()
        if (
            version not in ("1.1", "1.0")
            or (b"host" in last and not once)
            or (b"host" not in last and version == "1.1")
        ):
            self._refuse(400)
        if b"expect" in last:
            self.expect_100_continue = any(
                name == b"expect" and value.lower() == b"100-continue" for name, value in headers
            )
        self._begin(version)
        self._in_head = False
        self._in_body = True

    def _begin(self, version: str) -> None:
        """Hand the request to the application, after those before it. As uvicorn does, less what is never used
        here.
        """
        raw_path, query = _target(self.url)
        path = raw_path.decode("ascii")
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": self._asgi,
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": "",
            "method": self.parser.get_method().decode("ascii"),
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self.headers,
            "state": self.app_state.copy(),
        }
        earlier = self.cycle
        self.cycle = Cycle(
            scope,
            self.transport,
            self.flow,
            self.server_state.default_headers,
            self.expect_100_continue,
            version == "1.1" and self.parser.should_keep_alive(),
            self.on_response_complete,
        )
        scope[DIRECT] = self.cycle
        if earlier is None or earlier.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        self._told = True
        if not self.cycle.response_complete and self.cycle.add(body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        self._told = True
        self._in_body = False
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.set()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif not self._expecting:
            self._end_at(self.loop.time() + self.timeout_keep_alive)

    def _refuse(self, status: int) -> None:
        self._refusal_status = status
        raise _RefusedError

    # --- what can't be parsed -----------------------------------------------------------------------------------
    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the parser refuses; `msg` is its own text."""
        self._broken = True
        if self._answering():
            self._end_after_answers()
            return
        answered = self._in_body and self.cycle.response_started  # before its body had come
        if not answered:
            self.transport.write(_refusal(self._refusal_status))
        self.transport.close()

    # --- the application ----------------------------------------------------------------------------------------
    def _start_asgi_task(self, cycle: Cycle, app: Any) -> None:  # type: ignore[override]  # there is no other
        self._running = cycle
        cycle.task = self.loop.create_task(cycle.run(app, self.tasks))
        self.tasks.add(cycle.task)


def _target(url: bytes) -> tuple[bytes, bytes]:
    """Path and query. The parser has let nothing through that the first way would see otherwise than the second."""
    if url.startswith(b"/") and b"#" not in url:
        path, _, query = url.partition(b"?")
        return path, query
    parsed = httptools.parse_url(url)
    return parsed.path, parsed.query or b""


def _refusal(status: int) -> bytes:
    body = b'{"error":"' + _SENTENCES[status].encode("ascii") + b'"}'
    headers = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    return STATUS_LINE[status] + headers + body
