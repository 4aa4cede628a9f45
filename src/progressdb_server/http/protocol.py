"""HTTP/1.1 on one connection: requests for an ASGI application, one at a time, and their responses.

Owns: what a connection may cost before a request is whole, and when it ends. `received` has its bytes, `cycle` each
request. Rules:
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
from typing import Any, Final, cast

from progressdb_server.http import framing, limits
from progressdb_server.http.asgi import DIRECT
from progressdb_server.http.cycle import STATUS_LINES, Cycle
from progressdb_server.http.received import Received
from progressdb_server.http.serving import Serving

_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}
_BODY_WAITING_BYTES_MAX: Final = 64 * 1024
"""The bytes of a body that wait for the application; until it reads them, no more is received."""
_ERROR_TEXTS: Final = {
    400: "malformed HTTP request",
    413: "the body comes in too many chunks",
    431: "request head too large",
    500: "internal error",
}


class _Deadline:
    """When something is done unless another time is set before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.at_s = math.inf
        """On the loop's clock; infinity for never."""
        self._loop = loop
        self._act: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = math.inf

    def set(self, seconds: float, act: Callable[[], None]) -> None:
        """One timer serves many requests and compares with the deadline when it fires: to set and cancel a timer for
        each request costs several microseconds."""
        self._act = act
        self.at_s = self._loop.time() + seconds
        if self._timer is None or self._timer_at_s > self.at_s:
            self._start()

    def cancel(self) -> None:
        """At the end: no timer leads to the connection any more."""
        self.at_s = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self.at_s, self._check)
        self._timer_at_s = self.at_s

    def _check(self) -> None:
        self._timer = None
        if self.at_s > self._loop.time():
            if self.at_s < math.inf:
                self._start()
        elif self._act is not None:
            self._act()


class Connection(asyncio.Protocol):
    """The bounds and rules above, on the transport of one client."""

    transport: asyncio.Transport

    def __init__(self, serving: Serving, on_open: Callable[[], None]) -> None:
        """`on_open` is called once, when the transport is there. From then on the connection is one of `serving`."""
        self.serving = serving
        self._on_open = on_open
        self.group = ""
        """The key under which the bounds of one address are counted."""
        self.scheme = "http"
        self.write_paused = False
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self._cycle: Cycle | None = None
        """The request that was begun last."""
        self._received = Received()
        self._continues = False
        """More of the received chunks are decoded in the next turn of the event loop. Nothing is read meanwhile."""
        self._ended = False
        """No further request is begun."""
        self._linger_bytes_left: int | None = None
        """The bytes that may still be received and dropped before the connection is closed; None if it does not linger.
        """
        self._eof = False
        self._drained: asyncio.Future[None] | None = None
        self._expecting = False
        """Whether the client is expected to send: a request has begun or the connection is new, and it is not whole."""
        self._deadline = _Deadline(serving.loop)
        """When the connection is closed unless something happens."""

    # --- the transport's calls ----------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = self._received.transport = cast(asyncio.Transport, transport)
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
        self._received.give_back()
        self.serving.connections.discard(self)
        self.serving.shares.busy(self.group, self)
        self._deadline.cancel()
        cycle, self._cycle = self._cycle, None
        if cycle is not None:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.notify()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._ended and not self._received.in_body:
            if self._linger_bytes_left is not None:
                self._linger_bytes_left -= len(data)
                if self._linger_bytes_left < 0:
                    self.transport.abort()
            return
        self._received.add(data)
        self._advance()

    def eof_received(self) -> bool:
        """True keeps the connection open for responses that are due. TLS has no half-closed connections."""
        if (
            self._linger_bytes_left is not None
            or not self._is_busy()
            or self._received.in_body
            or self.scheme == "https"
        ):
            return False
        self._eof = True
        self._deadline.set(limits.HALF_CLOSED_SECONDS_MAX, self.transport.abort)
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
        self._received.drop()

    def close_idle(self) -> None:
        if self._expecting:
            self.transport.abort()
        else:
            self.transport.close()

    def close_unread(self) -> None:
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
            current = cycle is not None and (self._received.in_body or not cycle.response_complete)
            if current and cycle is not None and cycle.response_started and not cycle.response_complete:
                self.transport.abort()  # a part is of no use: its unread bytes are not kept
            else:
                if cycle is None or not current or not cycle.response_started:
                    self.transport.write(_error_response(status, self.serving.date))
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
        self._received.resume()
        self._deadline.set(limits.LINGER_SECONDS_MAX, self.transport.abort if self._expecting else self.transport.close)
        self.serving.shares.idle(self.group, self)

    # --- time ---------------------------------------------------------------------------------------------------
    def _await_request(self) -> None:
        if not self._expecting:
            self._expecting = True
            self._deadline.set(limits.REQUEST_SECONDS_MAX, self.transport.abort)
            self.serving.shares.idle(self.group, self)

    # --- requests -----------------------------------------------------------------------------------------------
    def _is_busy(self) -> bool:
        """Whether no request may begin: one is handled, or the client does not read its response."""
        return self.write_paused or (self._cycle is not None and not self._cycle.response_complete)

    def _advance(self) -> None:
        """Use the received bytes as far as they may be used now."""
        try:
            received = self._received
            while received.data and (received.in_body or not self._ended):
                if received.in_body:
                    self._take_body()
                    if received.in_body:
                        break
                elif self._is_busy() or (head := received.head()) is None:
                    break
                else:
                    self._begin(head)
        except framing.HttpError as error:
            self.refuse(error.status)
        if not self._ended:
            self._settle()

    def _settle(self) -> None:
        """Set deadline and flow by what the connection waits for."""
        cycle, received = self._cycle, self._received
        if self._is_busy() and not received.in_body:
            self._expecting = False
            if self._eof:
                self._deadline.set(limits.HALF_CLOSED_SECONDS_MAX, self.transport.abort)
            else:
                self._deadline.at_s = math.inf
            self.serving.shares.busy(self.group, self)
            if received.data:
                if not received.hold(self.serving.shares, self.group):
                    self.transport.abort()
                return
        elif self._eof and not self._continues:
            self.transport.close()  # nothing more comes: a request that is not whole is not handled
            return
        elif received.in_body or received.data:
            received.drop_used()
            self._await_request()
            if received.in_body and cycle is not None and not cycle.response_complete:
                return  # the application says when it takes more of the body
        elif not self._expecting or cycle is not None:
            self._idle()
        if received.held is not None:
            received.give_back()
        if received.paused:
            self.resume_reading()

    def _idle(self) -> None:
        """Wait for the next request."""
        self._cycle = None
        self._expecting = False
        self._deadline.set(limits.IDLE_SECONDS_MAX, self.transport.close)
        self.serving.shares.idle(self.group, self)

    def resume_reading(self) -> None:
        received = self._received
        if received.paused and not self._continues and (received.in_body or not self._ended):
            received.resume()

    def _begin(self, head: framing.RequestHead) -> None:
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
            self._received.begin_body(fields.length)
            if self._received.data:
                self._take_body()
            if self._received.in_body and self._eof and not self._continues:
                cycle.response_complete = True  # it is not handled
                cycle.release()
                return
        else:
            cycle.end_body()
        cycle.task = self.serving.loop.create_task(cycle.run())
        self.serving.tasks.add(cycle.task)

    def _take_body(self) -> None:
        cycle, received = self._cycle, self._received
        if cycle is None:
            return
        part = received.body()
        if part and cycle.add(part) > _BODY_WAITING_BYTES_MAX and received.in_body:
            received.pause()
        if not received.in_body:
            cycle.end_body()
        elif received.has_chunks and not self._continues:
            self._continues = True
            received.pause()
            self.serving.loop.call_soon(self._continue_body)

    def _continue_body(self) -> None:
        self._continues = False
        self._advance()
        if self._received.in_body and self._cycle is not None and self._cycle.waiting_bytes <= _BODY_WAITING_BYTES_MAX:
            self.resume_reading()

    def responded(self, keep_alive: bool) -> None:
        """The response of the last request is complete."""
        if not keep_alive:
            if self._received.in_body:
                self._linger()
            else:
                self.transport.close()
            self._end()
        elif self._received.data or self._received.in_body or self.write_paused or self._eof or self._ended:
            self._advance()
        else:
            self._idle()


def _error_response(status: int, date: bytes) -> bytes:
    body = b'{"error":"%b"}' % _ERROR_TEXTS[status].encode("ascii")
    headers = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    return STATUS_LINES[status] + date + headers + body


def _address(name: Any) -> tuple[str, int] | None:
    """The address in a socket's name; None for a Unix socket."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None
