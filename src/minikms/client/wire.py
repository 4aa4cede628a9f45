"""HTTP/1.1 as the client speaks it: one request out, one answer in. A pure core without sockets or time.

Owns: the bytes of a request, and the parser of an answer (RFC 9112, and only the part of it that miniKMS uses). The
daemon is treated as hostile. Rules, in the order in which they are checked:

1. The head (status line and headers, up to the empty line) is at most `HEAD_BYTES_MAX`, with at most
   `HEADERS_COUNT_MAX` fields.
2. The status line is `HTTP/1.1 ` and three digits from 200 to 599; interim answers are refused, because the client
   never asks for one.
3. Every header is `name:value` with a token as name, and no control characters but tab in the value. No folded lines.
4. Exactly one `Content-Length` of at most 9 digits, at most `ANSWER_BYTES_MAX`; `Transfer-Encoding` is refused.
5. No byte may follow the body.

A parser reads one answer and then nothing more; after an error it must be dropped with its connection.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from minikms import api
from minikms.api.errors import KmsProtocolError

HEAD_BYTES_MAX: Final = api.HEAD_BYTES_MAX
HEADERS_COUNT_MAX: Final = api.HEADERS_COUNT_MAX
ANSWER_BYTES_MAX: Final = 2 * api.BODY_BYTES_MAX
"""An answer to the largest batch is little longer than the batch (40 bytes an item); twice that is no answer to us."""

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2})(?: [\t\x20-\x7e]*)?")
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*")
_LENGTH: Final = re.compile(rb"[0-9]{1,9}")
_SECONDS: Final = re.compile(rb"[0-9]{1,6}")
JSON: Final = b"application/json"
SOCKET_ORIGIN: Final = b" HTTP/1.1\r\nHost: minikms\r\n"


class Answer(NamedTuple):
    """`reusable` is false when the daemon closes the connection after this answer. `retry_after_s`: its `Retry-After`;
    0 for none. `content_type`: empty without that header.
    """

    status: int
    body: bytes
    reusable: bool
    retry_after_s: int = 0
    content_type: bytes = b""

    def __repr__(self) -> str:
        return f"Answer({self.status}, {len(self.body)} bytes)"


def request_head(
    target: bytes,
    body_bytes: int | None,
    request_id: str | None,
    content_type: bytes = JSON,
    origin: bytes = SOCKET_ORIGIN,
) -> bytes:
    """The head of a request: a POST with a body of that length, or a GET when there is none.

    `target` and `request_id` have been checked: neither holds a space or a line end. `origin` begins with the version,
    and has the headers that do not depend on the request.
    """
    named = b"" if request_id is None else b"%b: %b\r\n" % (api.REQUEST_ID_HEADER.encode(), request_id.encode())
    if body_bytes is None:
        return b"GET " + target + origin + named + b"\r\n"
    line = b"POST %b%bContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n"
    return line % (target, origin, content_type, body_bytes, named)


def refusal_in(data: bytes) -> Answer | None:
    """The whole 503 that ends a connection before a request was sent on it; None for anything else."""
    try:
        answer = AnswerParser().feed(data)
    except KmsProtocolError:
        return None
    return answer if answer is not None and answer.status == 503 and not answer.reusable else None


class AnswerParser:
    """Collects the bytes of one answer. `feed` returns it once it is whole."""

    __slots__ = ("_body_at", "_buffer", "_content_type", "_done", "_length", "_retry_after_s", "_reusable", "_status")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._body_at = 0
        self._length = 0
        self._status = 0
        self._reusable = True
        self._retry_after_s = 0
        self._content_type = b""
        self._done = False

    def feed(self, data: bytes) -> Answer | None:
        """Takes bytes as they come. Raises KmsProtocolError when a rule is broken."""
        if self._done:
            raise KmsProtocolError("the key service sent bytes that nothing asked for")
        self._buffer += data
        if not self._body_at and not self._read_head():
            return None
        missing = self._body_at + self._length - len(self._buffer)
        if missing > 0:
            return None
        if missing < 0:
            raise KmsProtocolError("the key service sent more bytes than it announced")
        self._done = True
        with memoryview(self._buffer) as view:
            body = bytes(view[self._body_at :])
        self._buffer.clear()
        return Answer(self._status, body, self._reusable, self._retry_after_s, self._content_type)

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", 0, HEAD_BYTES_MAX)
        if end < 0:
            if len(self._buffer) >= HEAD_BYTES_MAX:
                raise KmsProtocolError("the head of the key service's answer is too long")
            return False
        status_line, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        match = _STATUS_LINE.fullmatch(status_line)
        if match is None:
            raise KmsProtocolError("the key service's answer has no HTTP/1.1 status line")
        if len(lines) > HEADERS_COUNT_MAX:
            raise KmsProtocolError("the key service's answer has too many headers")
        self._status = int(match[1])
        self._length = self._read_headers(lines)
        self._body_at = end + 4
        return True

    def _read_headers(self, lines: list[bytes]) -> int:
        length: bytes | None = None
        for line in lines:
            match = _HEADER.fullmatch(line)
            if match is None:
                raise KmsProtocolError("the key service's answer has a malformed header")
            name = match[1].lower()
            if name == b"content-length":
                if length is not None:
                    raise KmsProtocolError("the key service's answer has two lengths")
                length = match[2]
            elif name == b"transfer-encoding":
                raise KmsProtocolError("the key service's answer has a transfer encoding")
            elif name == b"connection" and match[2].lower() != b"keep-alive":
                self._reusable = False
            elif name == b"content-type":
                self._content_type = match[2]
            elif name == b"retry-after" and _SECONDS.fullmatch(match[2]):
                self._retry_after_s = int(match[2])
        if length is None or _LENGTH.fullmatch(length) is None:
            raise KmsProtocolError("the key service's answer has no valid length")
        if int(length) > ANSWER_BYTES_MAX:
            raise KmsProtocolError("the key service's answer is too large")
        return int(length)
