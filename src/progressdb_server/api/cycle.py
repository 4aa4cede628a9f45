"""One request and its answer on a connection: uvicorn's cycle, with an answer that leaves in one piece.

Owns: the bytes of an answer. Invariants: head and body of a whole answer are one write, since each write is a system
call; no header can smuggle in a line of its own; an answer is as long as it said, or the connection ends. It takes
from uvicorn how an application is run, its body read, and a client's going noticed.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

_WITHOUT_BODY: Final = frozenset({204, 304})


class Cycle(RequestResponseCycle):
    _start: MutableMapping[str, Any] | None = None

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
        head = b"" if self.response_started else self._head(self._start)
        self.transport.write(head + self._framed(part, more))
        self.response_started = True
        if not more:
            self._complete()

    def _head(self, start: MutableMapping[str, Any]) -> bytes:
        status: int = start["status"]
        lines = [STATUS_LINE[status]]
        headers = [*self.default_headers, *start.get("headers", ())]
        for name, value in headers:
            lines.append(b"%b: %b\r\n" % (name, value))
            if name == b"content-length":
                self.chunked_encoding = False
                self.expected_content_length = int(value)
            elif name == b"connection" and value.lower() == b"close":
                self.keep_alive = False
        if not self.keep_alive and (b"connection", b"close") not in headers:
            lines.append(b"connection: close\r\n")
        if self.chunked_encoding is None and status not in _WITHOUT_BODY and self.scope["method"] != "HEAD":
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise RuntimeError("a header of the answer holds a line of its own")
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
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
