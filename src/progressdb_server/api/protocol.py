"""HTTP/1.1 for the API: uvicorn's protocol with the bounds that it lacks.

Owns: what a connection may cost before a request is whole. Rules, each answered 4xx or by closing:

1. A head has at most `HEAD_BYTES_MAX` bytes and `HEADERS_COUNT_MAX` headers; exactly one Host (RFC 9112 section
3.2). 2. Trailers are dropped: uvicorn would add them to the headers that the application is about to read, behind
the back of whatever proxy set those. 3. A request is whole within `REQUEST_SECONDS_MAX` of its first byte; a new
connection sends one within the same time. 4. At most `CONNECTIONS_COUNT_MAX` connections; a client that does not
read its answer is cut off by the kernel.

It must never look at a body, and knows no route.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import urllib.parse
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from progressdb_server.api import bounds
from progressdb_server.api.cycle import Cycle

_SENTENCES: Final = {
    400: "malformed HTTP request",
    431: "request head too large",
}


class _RefusedError(Exception):
    """Stops the parser; the status is in the protocol."""


class BoundedProtocol(HttpToolsProtocol):
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._refusal_status = 400
        self._in_head = False
        self._in_body = False
        self._broken = False
        self._running: RequestResponseCycle | None = None
        self._head_bytes = 0
        self._hosts = 0
        self._incomplete: asyncio.TimerHandle | None = None

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
        self._whole()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._broken:
            return
        super().data_received(data)
        if self._in_head or self._in_body or self.cycle is None or self.cycle.response_complete:
            self._expect_more()
        elif self._incomplete is not None:
            self._whole()

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

    def _expect_more(self) -> None:
        if self._incomplete is None:
            self._incomplete = self.loop.call_later(bounds.REQUEST_SECONDS_MAX, self._too_slow)

    def _whole(self) -> None:
        if self._incomplete is not None:
            self._incomplete.cancel()
            self._incomplete = None

    def _too_slow(self) -> None:
        self._incomplete = None
        if self._answering():
            self._expect_more()  # an earlier request of this connection is still being answered
        elif self.transport is not None and not self.transport.is_closing():
            self.transport.abort()

    # --- the parser's callbacks ---------------------------------------------------------------------------------
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._in_body = False
        self._head_bytes = 0
        self._hosts = 0

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes > bounds.HEAD_BYTES_MAX:
            self._refuse(431)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """As uvicorn's, within the bounds; spelled out, for it is called more often than anything else."""
        if not self._in_head:
            return
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > bounds.HEAD_BYTES_MAX or len(self.headers) >= bounds.HEADERS_COUNT_MAX:
            self._refuse(431)
        name = name.lower()
        if name == b"host":
            self._hosts += 1
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        hosts = self._hosts
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0") or hosts > 1 or (hosts == 0 and version == "1.1"):
            self._refuse(400)
        self._begin(version)
        self._in_head = False
        self._in_body = True

    def _begin(self, version: str) -> None:
        """Hand the request to the application, after those before it. As uvicorn does, less what is never used
        here.
        """
        target = httptools.parse_url(self.url)
        raw_path: bytes = target.path
        path = raw_path.decode("ascii")
        scope = self.scope
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["http_version"] = version
        scope["path"] = urllib.parse.unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        scope["query_string"] = target.query or b""
        earlier = self.cycle
        self.cycle = Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version == "1.1" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        if earlier is None or earlier.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

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

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)


def _refusal(status: int) -> bytes:
    body = b'{"error":"' + _SENTENCES[status].encode("ascii") + b'"}'
    headers = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    return STATUS_LINE[status] + headers + body
