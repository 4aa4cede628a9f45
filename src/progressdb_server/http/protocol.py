"""HTTP/1.1 on one connection: requests for an ASGI application, one at a time, and their responses.

Owns: what a connection may cost before a request is whole, and when it ends. `cycle` has each request. Rules:
1. `framing` says where a request ends. A refusal is a 4xx, and the connection ends.
2. A request begins only when the response before it was written and the client takes it. Requests that came meanwhile
   stay bytes, at most one read of the event loop; no more is read until they are used. These bytes count as a body.
3. A request is whole within `REQUEST_SECONDS_MAX` of its first byte. A new connection sends one within the same time.
4. Idle connections of one address, the bytes of all bodies and the unread bytes of all responses are bounded by
   `shares`. The kernel closes a connection whose client does not read.
5. A client that has closed its sending side gets the responses that are due, each within `HALF_CLOSED_SECONDS_MAX`.
6. A connection that ends before its request is whole lingers (RFC 9112, section 9.6): what the client sends is dropped
   for up to `LINGER_SECONDS_MAX` and `LINGER_BYTES_MAX`. It counts as idle.

The module must never look into a body, and knows no route.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import urllib.parse
from collections.abc import Callable
from typing import Any, Final

from progressdb_server.http import framing, limits
from progressdb_server.http.asgi import DIRECT
from progressdb_server.http.cycle import STATUS_LINES, Cycle
from progressdb_server.http.serving import Serving
from progressdb_server.http.shares import BodyAccount

_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}
_BODY_WAITING_BYTES_MAX: Final = 64 * 1024
"""Of a body, received and not read by the application: no more is received meanwhile."""
_RECURRING_FIELDS_BYTES_MAX: Final = 1024
"""Fields of a head up to this length are kept, because those of the connection's next head may be the same."""
_ERROR_TEXTS: Final = {
    400: "malformed HTTP request",
    413: "the body comes in too many chunks",
    431: "request head too large",
    500: "internal error",
}


class Connection(asyncio.Protocol):
    """The bounds and rules above, on the transport of one client."""

    transport: asyncio.Transport

    def __init__(self, serving: Serving, on_open: Callable[[], None]) -> None:
        """`on_open` is called once, when the transport is there. From then on the connection is one of `serving`."""
        self.serving = serving
        self._on_open = on_open
        self.group = ""
        """By what the bounds of one address are counted."""
        self.scheme = "http"
        self.write_paused = False
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self._cycle: Cycle | None = None
        """The request that was begun last."""
        self._input = b""
        """Received; used up to `_at`."""
        self._at = 0
        self._last_fields: framing.Fields | None = None
        """Of the last head."""
        self._held: BodyAccount | None = None
        """What `_input` takes from the budget of bodies while a request before it is handled."""
        self._in_body = False
        self._body_left = 0
        self._chunks: framing.Chunks | None = None
        self._continues = False
        """More of the received chunks are decoded in the next turn of the event loop. Nothing is read meanwhile."""
        self._ended = False
        """No further request is begun."""
        self._linger_bytes_left: int | None = None
        """Of what is received and dropped before the connection is closed; None if it does not linger."""
        self._eof = False
        self._read_paused = False
        self._drained: asyncio.Future[None] | None = None
        self._expecting = False
        """Whether the client is expected to send: a request has begun or the connection is new, and it is not whole."""
        self._deadline_s = math.inf
        """When the connection is closed unless something happens, on the loop's clock."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = math.inf

    # --- the transport's calls ----------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # of a stream
        self._on_open()
        del self._on_open
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
            if self._linger_bytes_left is not None:
                self._linger_bytes_left -= len(data)
                if self._linger_bytes_left < 0:
                    self.transport.abort()
            return
        self._input = self._input[self._at :] + data if self._input else data
        self._at = 0
        self._advance()

    def eof_received(self) -> bool:
        """True keeps the connection open for responses that are due. TLS has no half-closed connections."""
        if self._linger_bytes_left is not None or not self._is_busy() or self._in_body or self.scheme == "https":
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
        if self._linger_bytes_left is not None or self._cycle is None or self._cycle.response_complete:
            self.transport.close()
        else:
            self._cycle.keep_alive = False

    def refuse(self, status: int) -> None:
        """Respond with an error if no response was begun, and end the connection."""
        cycle = self._cycle
        if not self.transport.is_closing():
            current = cycle is not None and (self._in_body or not cycle.response_complete)
            if current and cycle is not None and cycle.response_started and not cycle.response_complete:
                self.transport.abort()  # a part is of no use: its unread bytes are not kept
            else:
                if cycle is None or not current or not cycle.response_started:
                    self.transport.write(self._error_response(status))
                self._linger()
        self._end()
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.notify()

    def _linger(self) -> None:
        """Close in a while. To close at once would reset the connection of a client that still sends, which may lose
        the response by that."""
        if self._eof or self.transport.is_closing():
            self.transport.close()
            return
        self._linger_bytes_left = limits.LINGER_BYTES_MAX
        if self.transport.can_write_eof():
            self.transport.write_eof()
        if self._read_paused:
            self._read_paused = False
            self.transport.resume_reading()
        self._close_at(self.serving.loop.time() + limits.LINGER_SECONDS_MAX)
        self.serving.shares.idle(self.group, self)

    def _error_response(self, status: int) -> bytes:
        body = b'{"error":"%b"}' % _ERROR_TEXTS[status].encode("ascii")
        headers = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        return STATUS_LINES[status] + self.serving.date + headers + body

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
            self._held = BodyAccount(self.serving.shares, self.group, b"")
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
        head = framing.parse_head(data, at, self._last_fields)
        if head is None:
            self._use(at)
            return False
        if len(head.fields.raw) <= _RECURRING_FIELDS_BYTES_MAX:
            self._last_fields = head.fields
        self._use(head.end)
        self._begin(head)
        return True

    def _use(self, at: int) -> None:
        """The received bytes are used up to `at`."""
        self._at = at
        if at == len(self._input):
            self._input = b""
            self._at = 0

    def _begin(self, head: framing.Head) -> None:
        fields = head.fields
        raw_path = head.path
        path = raw_path.decode("ascii")
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": fields.version,
            "server": self._server,
            "client": self._client,
            "scheme": self.scheme,
            "root_path": "",
            "method": head.method,
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": head.query,
            "headers": fields.headers,
        }
        self._cycle = cycle = Cycle(self, scope, fields)
        scope[DIRECT] = cycle
        if fields.length:
            self._in_body = True
            self._chunks = framing.Chunks() if fields.length == framing.CHUNKED else None
            self._body_left = fields.length
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
            if self._in_body:
                self._linger()
            else:
                self.transport.close()
            self._end()
        elif self._input or self._in_body or self.write_paused or self._eof or self._ended:
            self._advance()
        else:
            self._idle()


def _address(name: Any) -> tuple[str, int] | None:
    """Of a socket's name; None for a Unix socket."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None
