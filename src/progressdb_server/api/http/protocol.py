"""HTTP/1.1 on one connection: uvicorn's protocol and cycle, with bounds and with fewer steps.

Owns: what a connection may cost before a request is whole, and the bytes of a response. uvicorn runs the application
and notices that a client has closed its connection. Rules, each enforced by a 4xx response or by closing:
1. A head has at most `HEAD_BYTES_MAX` bytes and `HEADERS_COUNT_MAX` headers, and the parser buffers at most
   `HELD_BYTES_MAX` of a line that has not ended. There is exactly one Host (RFC 9112, section 3.2).
2. Trailers are dropped. uvicorn would append them to the headers of a request that is already running, past a proxy
   that sets or removes those headers.
3. A request is whole within `REQUEST_SECONDS_MAX` of its first byte. A new connection sends one within the same time.
4. There are at most `CONNECTIONS_COUNT_MAX` connections. The kernel closes one whose client does not read. Idle ones
   of one address, and the bytes of all bodies, are bounded by `shares`.
5. No header of a response can contain a line break. A response is as long as its content-length, or the connection
   is closed.

A response that is complete is one write, because each write is a system call. Complete bodies and responses bypass
ASGI's messages (`request.DirectChannel`). The module must never look into a body, and knows no route.
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
from progressdb_server.api.http.access import Principal, presented_key
from progressdb_server.api.http.errors import CLOSE, Header
from progressdb_server.api.http.request import BODY_REFUSED, DIRECT
from progressdb_server.api.http.shares import BodyAccount, Shares

_WITHOUT_BODY: Final = frozenset({204, 304})
_logger: Final = logging.getLogger("uvicorn.error")


class DirectCycle(RequestResponseCycle):
    """uvicorn's cycle of one request and its response, as a `request.DirectChannel` too."""

    def __init__(  # noqa: PLR0917  keyword arguments would cost more than the rest of this method
        self,
        scope: MutableMapping[str, Any],
        transport: asyncio.Transport,
        flow: FlowControl,
        default_headers: list[Header],
        expect_100_continue: bool,
        keep_alive: bool,
        on_response: Callable[[], None],
        shares: Shares,
    ) -> None:
        """Sets what uvicorn's own cycle sets, except what its access log needs."""
        self.scope = scope  # type: ignore[assignment]  # uvicorn's type names each key
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
        self._shares = shares
        self._received_bytes = 0
        self._account: BodyAccount | None = None
        self._caller: tuple[Principal, str | None] | None = None
        self.body_refused = False
        self._has_news = False
        self._event: asyncio.Event | None = None
        self._response_start: MutableMapping[str, Any] | None = None
        self.task: asyncio.Task[None] | None = None

    async def run(self, app: Any, tasks: set[asyncio.Task[None]]) -> None:
        """Run the application. `tasks` contains `self.task` until this returns."""
        try:
            await self.run_asgi(app)
        finally:
            self.release()
            if self.task is not None:
                tasks.discard(self.task)

    # --- the request's body ---------------------------------------------------------------------------------------
    @property
    def message_event(self) -> DirectCycle:  # type: ignore[override]  # uvicorn calls only `set`
        """uvicorn calls `set` on it. The event itself is made only if something waits for it: most requests do not."""
        return self

    def set(self) -> None:
        """More of the body was received, or the request or the connection has ended."""
        self._has_news = True
        if self._event is not None:
            self._event.set()

    async def _wait(self) -> None:
        if self._event is None:
            self._event = asyncio.Event()
        self._event.clear()
        await self._event.wait()

    def identify(self, principal: Principal, user: str | None) -> None:
        """See `request.DirectChannel`."""
        self._caller = principal, user
        if self._account is not None and not self._account.identify(principal, user):
            self._refuse_body()

    def release(self) -> None:
        """The body is no longer kept."""
        if self._account is not None:
            self._account.close()

    def _fits(self) -> bool:
        """Whether what was received of the body fits into the budget of bodies."""
        if self._account is None:
            principal, user = self._caller or (None, None)
            client = self.scope["client"]
            key = b"" if principal is not None else presented_key(dict(self.scope["headers"])) or b""
            self._account = BodyAccount(self._shares, client[0] if client else "", principal, user, key)
        return self._account.grow_to(self._received_bytes)

    def _refuse_body(self) -> None:
        self.body_refused = True
        self._body = b""
        self.release()
        self.set()

    def add(self, part: bytes) -> int:
        """Append a part of the body. Returns how many bytes wait to be read."""
        if self.body_refused:
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
        self.set()
        return len(self._body)

    def received_body(self) -> bytes | None:
        """See `request.DirectChannel`."""
        if not self._has_news or self.more_body or self.waiting_for_100_continue:
            return None
        if self.disconnected or self.response_complete or self.body_refused:
            return None
        if self.flow.read_paused:
            self.flow.resume_reading()
        return self._take()

    def _take(self) -> bytes:
        self._has_news = False
        body, self._body = bytes(self._body), b""
        return body

    async def receive(self) -> MutableMapping[str, Any]:  # type: ignore[override]  # uvicorn's type names each shape
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            if not self._has_news:
                await self._wait()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        if self.body_refused:
            self._has_news = False
            return {"type": BODY_REFUSED}
        return {"type": "http.request", "body": self._take(), "more_body": self.more_body}

    # --- the response ---------------------------------------------------------------------------------------------
    def send_response(self, status: int, headers: Sequence[Header], body: bytes) -> bool:
        """See `request.DirectChannel`."""
        if self.flow.write_paused or self._response_start is not None or self.response_complete or self.disconnected:
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

    async def send(self, message: MutableMapping[str, Any]) -> None:  # type: ignore[override]  # as receive
        """Raises RuntimeError for an invalid message; uvicorn then closes the connection if the response was begun."""
        if self.response_complete:
            raise RuntimeError("the response is already complete")
        if message["type"] == "http.response.start":
            if self._response_start is not None:
                raise RuntimeError("the response has already started")
            self._response_start = message
            return
        if self._response_start is None:
            raise RuntimeError("the response has not started")
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        part: bytes = message.get("body", b"")
        more: bool = message.get("more_body", False)
        head = (
            b""
            if self.response_started
            else self._head(self._response_start["status"], self._response_start.get("headers", ()))
        )
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
            raise RuntimeError("the response does not have the length that its head gives")
        return part

    def _complete(self) -> None:
        self.response_complete = True
        self.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


def _check_lines(head: bytes, count: int) -> None:
    if len(head.splitlines()) != count:
        raise RuntimeError("a header of the response contains a line break")


_ERROR_TEXTS: Final = {
    400: "malformed HTTP request",
    431: "request head too large",
}


class _HeadRefusedError(Exception):
    """Stops the parser. The protocol holds the status of the error response."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol under the rules above.

    What runs for every request is written out here rather than inherited, with less work: it runs thousands of times a
    second.
    """

    __slots__ = (
        "_asgi",
        "_broken",
        "_deadline_s",
        "_error_status",
        "_expecting",
        "_fed_bytes",
        "_in_body",
        "_in_head",
        "_progressed",
        "_running",
        "_timer",
        "_timer_at_s",
        "group",
        "shares",
    )
    cycle: DirectCycle
    pipeline: deque[tuple[DirectCycle, Any]]  # type: ignore[assignment]  # it holds no other cycles

    def __init__(self, *args: Any, shares: Shares, **named: Any) -> None:
        super().__init__(*args, **named)
        self.shares = shares
        self.group = ""
        """By what the bounds of one address are counted."""
        self._error_status = 400
        self._in_head = False
        self._in_body = False
        self._broken = False
        self._running: RequestResponseCycle | None = None
        self._fed_bytes = 0
        """Bytes fed since the parser's last callback that shows progress. At least what the parser buffers, and at
        least the head that is being read.
        """
        self._progressed = False
        self._asgi = {"version": self.asgi_version, "spec_version": "2.3"}
        self._expecting = False
        """Whether a request has begun, or the connection is new, and the request is not whole."""
        self._deadline_s = math.inf
        """When the connection is closed unless something happens, on the loop's clock."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = math.inf

    # --- the connection -----------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        if len(self.connections) >= limits.CONNECTIONS_COUNT_MAX:
            transport.abort()
        super().connection_made(transport)
        peer = transport.get_extra_info("socket")
        has_timeout = hasattr(socket, "TCP_USER_TIMEOUT")  # macOS and BSD have none
        if has_timeout and peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # the connection is already closed
                stall_ms = limits.STREAM_STALL_SECONDS_MAX * 1000
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall_ms)
        self.group = self.shares.group(self.client[0] if self.client else "")
        self._await_request()
        self.shares.idle(self.group, self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.shares.busy(self.group, self)
        for cycle, _ in self.pipeline:
            cycle.release()
        self._deadline_s = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().connection_lost(exc)

    def close_idle(self) -> None:
        """See `shares.Closable`."""
        if self._expecting:
            self.transport.abort()
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._broken:
            return
        self._fed_bytes += len(data)
        self._progressed = False
        try:
            self.parser.feed_data(data)
            if self._in_head:
                self._check_head()
            if self._progressed:
                self._fed_bytes = len(data)
            elif self._fed_bytes > limits.HELD_BYTES_MAX:  # a line without end
                self._refuse(431)
        except (httptools.HttpParserError, _HeadRefusedError):
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("")
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        if self._in_head or self._in_body or self.cycle is None or self.cycle.response_complete:
            self._await_request()
        else:
            self._expecting = False
            self._deadline_s = math.inf
            self.shares.busy(self.group, self)

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio closes the transport unless it is True
        """True keeps the connection open for responses that are due. TLS has no half-closed connections."""
        if not self._has_response_due() or self.scheme == "https":
            return None
        self._close_after_responses()
        return True

    def _has_response_due(self) -> bool:
        """Whether a whole request has no complete response yet."""
        running = self._running
        return running is not None and not running.response_complete and not running.more_body

    def _close_after_responses(self) -> None:
        """Respond to the last whole request of the connection, then close. A request that is not whole is not run."""
        if self._in_body and self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()[0].release()
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is not None:
            last.keep_alive = False

    # --- time ---------------------------------------------------------------------------------------------------
    def _await_request(self) -> None:
        if not self._expecting:
            self._expecting = True
            self._close_at(self.loop.time() + limits.REQUEST_SECONDS_MAX)

    def _close_at(self, deadline_s: float) -> None:
        """Set the deadline. One timer serves many requests and compares with the deadline when it fires: to set and
        cancel a timer for each request costs several microseconds.
        """
        self._deadline_s = deadline_s
        if self._timer is not None:
            if self._timer_at_s <= deadline_s:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(deadline_s, self._check_deadline)
        self._timer_at_s = deadline_s

    def _check_deadline(self) -> None:
        self._timer = None
        if self._deadline_s > self.loop.time():
            if self._deadline_s < math.inf:
                self._close_at(self._deadline_s)
        elif not self._expecting:
            self.transport.close()
        elif self._has_response_due():  # to an earlier request of this connection
            self._close_at(self.loop.time() + limits.REQUEST_SECONDS_MAX)
        elif not self.transport.is_closing():
            self.transport.abort()

    # --- the parser's callbacks ---------------------------------------------------------------------------------
    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._progressed = True
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
        """Give the request to the application, after the requests before it. As in uvicorn, without unused features."""
        raw_path, query = split_target(self.url)
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
        self.cycle = DirectCycle(
            scope,
            self.transport,
            self.flow,
            self.server_state.default_headers,
            self.expect_100_continue,
            version == "1.1" and self.parser.should_keep_alive(),
            self.on_response_complete,
            self.shares,
        )
        scope[DIRECT] = self.cycle
        if earlier is None or earlier.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        self._progressed = True
        if not self.cycle.response_complete and self.cycle.add(body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        self._progressed = True
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
        else:
            if not self._expecting:
                self._close_at(self.loop.time() + self.timeout_keep_alive)
            self.shares.idle(self.group, self)

    def _refuse(self, status: int) -> None:
        self._error_status = status
        raise _HeadRefusedError

    # --- malformed requests -------------------------------------------------------------------------------------
    def send_400_response(self, msg: str) -> None:
        """Refuse malformed bytes. The name and `msg`, which is not used, are uvicorn's."""
        self._broken = True
        if self._has_response_due():
            self._close_after_responses()
            return
        responded = self._in_body and self.cycle.response_started  # before the body was whole
        if not responded:
            self.transport.write(_error_response(self._error_status))
        self.transport.close()

    # --- the application ----------------------------------------------------------------------------------------
    def _start_asgi_task(self, cycle: DirectCycle, app: Any) -> None:  # type: ignore[override]  # the only cycles
        self._running = cycle
        cycle.task = self.loop.create_task(cycle.run(app, self.tasks))
        self.tasks.add(cycle.task)


def split_target(url: bytes) -> tuple[bytes, bytes]:
    """Path and query. For every URL that the parser accepts, the short way gives what `httptools.parse_url` gives."""
    if url.startswith(b"/") and b"#" not in url:
        path, _, query = url.partition(b"?")
        return path, query
    parsed = httptools.parse_url(url)
    return parsed.path, parsed.query or b""


def _error_response(status: int) -> bytes:
    body = b'{"error":"' + _ERROR_TEXTS[status].encode("ascii") + b'"}'
    headers = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    return STATUS_LINE[status] + headers + body
