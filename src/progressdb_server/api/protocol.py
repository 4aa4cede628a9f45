"""HTTP/1.1 for the API: uvicorn's protocol with the bounds that it lacks.

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
import math
import socket
import urllib.parse
from collections import deque
from typing import Any, Final

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from progressdb_server.api import bounds
from progressdb_server.api.call import DIRECT
from progressdb_server.api.cycle import Cycle

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
        if len(self.connections) >= bounds.CONNECTIONS_COUNT_MAX:
            transport.abort()
        super().connection_made(transport)
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # a connection that is gone already
                stall_ms = bounds.STREAM_STALL_SECONDS_MAX * 1000
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
            elif self._fed_bytes > bounds.HELD_BYTES_MAX:  # one endless line
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
            self._end_at(self.loop.time() + bounds.REQUEST_SECONDS_MAX)

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
            self._end_at(self.loop.time() + bounds.REQUEST_SECONDS_MAX)
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
            if len(headers) >= bounds.HEADERS_COUNT_MAX:
                self._refuse(431)
            headers.append((name.lower(), value))

    def _check_head(self) -> None:
        if self._fed_bytes > bounds.HEAD_BYTES_MAX:
            head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if head_bytes > bounds.HEAD_BYTES_MAX:
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
