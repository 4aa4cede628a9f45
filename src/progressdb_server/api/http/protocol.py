"""HTTP/1.1 on one connection: requests for an ASGI application, one at a time, and their responses.

Owns: what a connection may cost before a request is whole, and the bytes of a response. Rules:
1. `framing` says where a request ends. What it refuses gets a 4xx, and the connection ends.
2. A request begins only when the response before it was written and the client takes it. Requests that came meanwhile
   stay bytes, at most one read of the event loop; no more is read until they are used. These bytes count as a body.
3. A request is whole within `REQUEST_SECONDS_MAX` of its first byte. A new connection sends one within the same time.
4. Idle connections of one address, the bytes of all bodies and the unread bytes of all responses are bounded by
   `shares`. The kernel closes a connection whose client does not read.
5. No header of a response can contain a line break. A response is as long as its content-length, or the connection
   is closed.
6. A client that has closed its sending side gets the responses that are due, each within `HALF_CLOSED_SECONDS_MAX`.

A response that is complete is one write, because each write is a system call. Complete bodies and responses bypass
ASGI's messages (`request.DirectChannel`). The module must never look into a body, and knows no route.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import urllib.parse
from collections.abc import Awaitable, Iterable, MutableMapping, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final

from minikms.logs import structlog
from progressdb_server.api.http import framing, limits
from progressdb_server.api.http.access import Principal, presented_key
from progressdb_server.api.http.errors import CLOSE, Header
from progressdb_server.api.http.request import BODY_REFUSED, DIRECT, ASGIApp
from progressdb_server.api.http.shares import BodyAccount, Shares

_log: Final = structlog.get_logger("progressdb.http")
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii") for status in HTTPStatus
}
_WITHOUT_BODY: Final = frozenset({204, 304})
_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}
_BODY_WAITING_BYTES_MAX: Final = 64 * 1024
"""Of a body, received and not read by the application: no more is received meanwhile."""
_RECURRING_HEAD_BYTES_MAX: Final = 1024
"""A head up to this length is kept, because the next one of the connection may be the same."""
_STOP_POLL_SECONDS: Final = 0.05
_ERROR_TEXTS: Final = {
    400: "malformed HTTP request",
    413: "the body comes in too many chunks",
    431: "request head too large",
    500: "internal error",
}


class Cycle:
    """One request and its response, for ASGI and as a `request.DirectChannel`."""

    # What is the same for most requests is set on the class, which costs a request nothing.
    more_body = True
    body_refused = False
    disconnected = False
    response_started = False
    response_complete = False
    task: asyncio.Task[None] | None = None
    _body: bytes | bytearray = b""
    _received_bytes = 0
    _account: BodyAccount | None = None
    _caller: tuple[Principal, str | None] | None = None
    _has_news = False
    _event: asyncio.Event | None = None
    _response_start: MutableMapping[str, Any] | None = None
    _chunked: bool | None = None
    _ends_with_connection = False
    """Of a response without a length to a client of HTTP/1.0, which knows no chunks (RFC 9112, section 6.1)."""
    _length_left = 0

    def __init__(self, connection: Connection, scope: MutableMapping[str, Any], head: framing.Head) -> None:
        self.connection = connection
        self.scope = scope
        self.keep_alive = head.keep_alive
        self.waits_for_continue = head.expects_continue

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

    def identify(self, principal: Principal, user: str | None) -> None:
        """See `request.DirectChannel`."""
        self._caller = principal, user
        if self._account is not None and not self._account.identify(principal, user):
            self._refuse_body()

    def release(self) -> None:
        """The body is no longer kept."""
        self._body = b""
        if self._account is not None:
            self._account.close()

    def _fits(self) -> bool:
        """Whether what was received of the body fits into the budget of bodies."""
        if self._account is None:
            principal, user = self._caller or (None, None)
            key = b"" if principal is not None else presented_key(dict(self.scope["headers"])) or b""
            connection = self.connection
            self._account = BodyAccount(connection.serving.shares, connection.group, principal, user, key)
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
        """Of the body, received and not read."""
        return len(self._body)

    def end_body(self) -> None:
        self.more_body = False
        self.notify()

    def received_body(self) -> bytes | None:
        """See `request.DirectChannel`."""
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
        """See `request.DirectChannel`."""
        connection = self.connection
        return connection.serving.shares.lists.begin(connection.group, connection)

    def end_list(self) -> None:
        """See `request.DirectChannel`."""
        connection = self.connection
        connection.serving.shares.lists.end(connection.group, connection)

    def send_response(self, status: int, headers: Sequence[Header], body: bytes) -> bool:
        """See `request.DirectChannel`."""
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
        head = b"".join((_STATUS_LINES[status], connection.serving.date, *lines, b"content-length: %d\r\n" % len(body)))
        _check_lines(head, len(lines) + 3)
        connection.transport.write(head + b"\r\n" + body)
        self.response_started = True
        self._complete()
        return True

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Raises RuntimeError for an invalid message."""
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
        lines = [_STATUS_LINES[status], self.connection.serving.date]
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


class Serving:
    """What the connections of one server share, and its stop."""

    def __init__(self, app: ASGIApp, shares: Shares, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self.shares = shares
        self.loop = loop
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        """Of the requests that the application handles."""
        self.date = b""
        self.set_date()

    def set_date(self) -> None:
        """Call this once a second."""
        self.date = f"date: {formatdate(usegmt=True)}\r\n".encode("ascii")

    async def stop(self, seconds: float) -> None:
        """Close connections without a request, give the others `seconds` to get their responses, and cancel the rest.
        Nothing is accepted any more."""
        for connection in list(self.connections):
            connection.shutdown()
        deadline_s = self.loop.time() + seconds
        while self.connections or self.tasks:
            await asyncio.sleep(_STOP_POLL_SECONDS)
            if self.loop.time() >= deadline_s:
                break
        cancelled = list(self.tasks)
        for task in cancelled:
            task.cancel()
        await asyncio.gather(*cancelled, return_exceptions=True)
        for connection in list(self.connections):
            connection.close_unread()


class Connection(asyncio.Protocol):
    """The bounds and rules above, on the transport of one client."""

    transport: asyncio.Transport
    group = ""
    """By what the bounds of one address are counted."""
    scheme = "http"
    write_paused = False
    _client: tuple[str, int] | None = None
    _server: tuple[str, int] | None = None
    _cycle: Cycle | None = None
    """The request that was begun last."""
    _input = b""
    """Received; used up to `_at`."""
    _at = 0
    _last_raw = b""
    _last_head: framing.Head | None = None
    """The last head, and its bytes."""
    _held: BodyAccount | None = None
    """What `_input` takes from the budget of bodies while a request before it is handled."""
    _in_body = False
    _body_left = 0
    _chunks: framing.Chunks | None = None
    _continues = False
    """More of the received chunks are decoded in the next turn of the event loop. Nothing is read meanwhile."""
    _ended = False
    """No further request is begun."""
    _eof = False
    _read_paused = False
    _drained: asyncio.Future[None] | None = None
    _expecting = False
    """Whether the client is expected to send: a request has begun or the connection is new, and it is not whole."""
    _deadline_s = math.inf
    """When the connection is closed unless something happens, on the loop's clock."""
    _timer: asyncio.TimerHandle | None = None
    _timer_at_s = math.inf

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    # --- the transport's calls ----------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # of a stream
        self.serving.connections.add(self)
        self.transport.set_write_buffer_limits(high=limits.WRITE_BUFFER_BYTES_MAX)
        self._client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        self.scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        peer = transport.get_extra_info("socket")
        has_timeout = hasattr(socket, "TCP_USER_TIMEOUT")  # macOS and BSD have none
        if has_timeout and peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # the connection is already closed
                stall_ms = limits.STREAM_STALL_SECONDS_MAX * 1000
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall_ms)
        self.group = self.serving.shares.group(self._client[0] if self._client else "")
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self._give_back_held()
        self.serving.connections.discard(self)
        self.serving.shares.busy(self.group, self)
        self._deadline_s = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        cycle, self._cycle = self._cycle, None
        if cycle is not None:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.notify()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._ended and not self._in_body:
            return
        self._input = self._input[self._at :] + data if self._input else data
        self._at = 0
        self._advance()

    def eof_received(self) -> bool:
        """True keeps the connection open for responses that are due. TLS has no half-closed connections."""
        if not self._is_busy() or self._in_body or self.scheme == "https":
            return False
        self._eof = True
        self._close_at(self.serving.loop.time() + limits.HALF_CLOSED_SECONDS_MAX)
        return True

    def pause_writing(self) -> None:
        self.write_paused = True
        self.serving.shares.unread(self.group, self, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        if self.write_paused:
            self.write_paused = False
            self.serving.shares.read(self)
            if self._drained is not None:
                self._drained.set_result(None)
                self._drained = None
            self._advance()

    async def drain(self) -> None:
        """Wait until the client has read, or the connection has ended."""
        if self._drained is None:
            self._drained = self.serving.loop.create_future()
        await asyncio.shield(self._drained)

    # --- ends ---------------------------------------------------------------------------------------------------
    def _end(self) -> None:
        """Nothing of what is received matters any more."""
        self._ended = True
        self._in_body = False
        self._input = b""

    def close_idle(self) -> None:
        """See `shares.Closable`."""
        if self._expecting:
            self.transport.abort()
        else:
            self.transport.close()

    def close_unread(self) -> None:
        """See `shares.Readable`."""
        self.transport.abort()

    @property
    def is_closing(self) -> bool:
        return self.transport.is_closing()

    def shutdown(self) -> None:
        """Close, after the response to the request that is handled."""
        self._ended = True
        if self._cycle is None or self._cycle.response_complete:
            self.transport.close()
        else:
            self._cycle.keep_alive = False

    def refuse(self, status: int) -> None:
        """Respond with an error if no response was begun, and end the connection."""
        cycle = self._cycle
        if not self.transport.is_closing():
            current = cycle is not None and (self._in_body or not cycle.response_complete)
            if cycle is None or not current or not cycle.response_started:
                self.transport.write(self._error_response(status))
            elif not cycle.response_complete:
                self.transport.abort()  # a part is of no use: its unread bytes are not kept
            self.transport.close()
        self._end()
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.notify()

    def _error_response(self, status: int) -> bytes:
        body = b'{"error":"%b"}' % _ERROR_TEXTS[status].encode("ascii")
        headers = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        return _STATUS_LINES[status] + self.serving.date + headers + body

    # --- time ---------------------------------------------------------------------------------------------------
    def _await_request(self) -> None:
        if not self._expecting:
            self._expecting = True
            self._close_at(self.serving.loop.time() + limits.REQUEST_SECONDS_MAX)
            self.serving.shares.idle(self.group, self)

    def _close_at(self, deadline_s: float) -> None:
        """Set the deadline. One timer serves many requests and compares with the deadline when it fires: to set and
        cancel a timer for each request costs several microseconds.
        """
        self._deadline_s = deadline_s
        if self._timer is not None:
            if self._timer_at_s <= deadline_s:
                return
            self._timer.cancel()
        self._timer = self.serving.loop.call_at(deadline_s, self._check_deadline)
        self._timer_at_s = deadline_s

    def _check_deadline(self) -> None:
        self._timer = None
        if self._deadline_s > self.serving.loop.time():
            if self._deadline_s < math.inf:
                self._close_at(self._deadline_s)
        elif self._expecting or self._eof:
            self.transport.abort()
        else:
            self.transport.close()

    # --- requests -----------------------------------------------------------------------------------------------
    def _is_busy(self) -> bool:
        """Whether no request may begin: one is handled, or the client does not read its response."""
        return self.write_paused or (self._cycle is not None and not self._cycle.response_complete)

    def _advance(self) -> None:
        """Use the received bytes as far as they may be used now."""
        try:
            while self._input and (self._in_body or not self._ended):
                if self._in_body:
                    self._take_body()
                    if self._in_body:
                        break
                elif self._is_busy() or not self._take_head():
                    break
        except framing.HttpError as error:
            self.refuse(error.status)
        if not self._ended:
            self._settle()

    def _settle(self) -> None:
        """Set deadline and flow by what the connection waits for."""
        cycle = self._cycle
        if self._is_busy() and not self._in_body:
            self._expecting = False
            if self._eof:
                self._close_at(self.serving.loop.time() + limits.HALF_CLOSED_SECONDS_MAX)
            else:
                self._deadline_s = math.inf
            self.serving.shares.busy(self.group, self)
            if self._input:
                self._hold()
                return
        elif self._eof and not self._continues:
            self.transport.close()  # nothing more comes: a request that is not whole is not handled
            return
        elif self._in_body or self._input:
            self._input = self._input[self._at :]
            self._at = 0
            self._await_request()
            if self._in_body and cycle is not None and not cycle.response_complete:
                return  # the application says when it takes more of the body
        elif not self._expecting or cycle is not None:
            self._idle()
        self._give_back_held()
        self.resume_reading()

    def _idle(self) -> None:
        """Wait for the next request."""
        self._cycle = None
        self._expecting = False
        self._close_at(self.serving.loop.time() + limits.IDLE_SECONDS_MAX)
        self.serving.shares.idle(self.group, self)

    def _hold(self) -> None:
        """Requests have come before their turn: read no more, and count what there is."""
        self._pause_reading()
        if len(self._input) > limits.BODY_UNCOUNTED_BYTES_MAX and self._held is None:
            self._held = BodyAccount(self.serving.shares, self.group, None, None, b"")
            if not self._held.grow_to(len(self._input)):
                self.transport.abort()

    def _give_back_held(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _pause_reading(self) -> None:
        if not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._read_paused and not self._continues and (self._in_body or not self._ended):
            self._read_paused = False
            self.transport.resume_reading()

    def _take_head(self) -> bool:
        """Begin the request whose head is there. Returns False if more bytes are needed."""
        data, at = self._input, self._at
        while data.startswith(b"\r\n", at):  # RFC 9112, section 2.2
            at += 2
        head = self._last_head
        if head is not None and data.startswith(self._last_raw, at):  # as of a client that polls
            end = at + len(self._last_raw)
        else:
            end = data.find(b"\r\n\r\n", at) + 4
            if end < 4:
                self._use(at)
                if self._input:
                    framing.check_beginning(data[at:])
                return False
            head = framing.parse_head(data, at, end)
            if end - at <= _RECURRING_HEAD_BYTES_MAX:
                self._last_head = head
                self._last_raw = data[at:end]
        self._use(end)
        self._begin(head)
        return True

    def _use(self, at: int) -> None:
        """The received bytes are used up to `at`."""
        self._at = at
        if at == len(self._input):
            self._input = b""
            self._at = 0

    def _begin(self, head: framing.Head) -> None:
        raw_path = head.path
        path = raw_path.decode("ascii")
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": head.version,
            "server": self._server,
            "client": self._client,
            "scheme": self.scheme,
            "root_path": "",
            "method": head.method,
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": head.query,
            "headers": head.headers,
        }
        self._cycle = cycle = Cycle(self, scope, head)
        scope[DIRECT] = cycle
        if head.length:
            self._in_body = True
            self._chunks = framing.Chunks() if head.length == framing.CHUNKED else None
            self._body_left = head.length
            if self._input:
                self._take_body()
            if self._in_body and self._eof and not self._continues:
                cycle.response_complete = True  # it is not handled
                cycle.release()
                return
        else:
            cycle.end_body()
        cycle.task = self.serving.loop.create_task(cycle.run())
        self.serving.tasks.add(cycle.task)

    def _take_body(self) -> None:
        cycle = self._cycle
        if cycle is None:
            return
        data, at = self._input, self._at
        if self._chunks is not None:
            part, at = self._chunks.feed(data, at)
            self._in_body = not self._chunks.complete
        else:
            part = data[at : at + self._body_left]
            at += len(part)
            self._body_left -= len(part)
            self._in_body = self._body_left > 0
        self._use(at)
        if part and cycle.add(part) > _BODY_WAITING_BYTES_MAX and self._in_body:
            self._pause_reading()
        if not self._in_body:
            cycle.end_body()
        elif self._input and self._chunks is not None and not self._chunks.starved and not self._continues:
            self._continues = True
            self._pause_reading()
            self.serving.loop.call_soon(self._continue_body)

    def _continue_body(self) -> None:
        self._continues = False
        self._advance()
        if self._in_body and self._cycle is not None and self._cycle.waiting_bytes <= _BODY_WAITING_BYTES_MAX:
            self.resume_reading()

    def responded(self, keep_alive: bool) -> None:
        """The response of the last request is complete."""
        if not keep_alive:
            self._end()
            self.transport.close()
        elif self._input or self._in_body or self.write_paused or self._eof or self._ended:
            self._advance()
        else:
            self._idle()


def _address(name: Any) -> tuple[str, int] | None:
    """Of a socket's name; None for a Unix socket."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None
