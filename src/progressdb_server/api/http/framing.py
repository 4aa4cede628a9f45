"""Where a request begins and ends in the bytes of a connection (RFC 9112): heads, and chunked bodies.

Owns: which heads are accepted, how long a body is, and the decoding of chunks. Rules, each broken by an `HttpError`:
1. A head is a request line and fields that end in CR LF, without a folded line, a bare CR or LF, or a control
   character. The version is 1.1 or 1.0. A 1.1 request has exactly one Host.
2. A body has exactly one possible length: one Content-Length, or `Transfer-Encoding: chunked` in 1.1, never both. So
   no proxy sees another end of a request than this server.
3. `Upgrade` changes nothing: the connection stays HTTP/1.1, and a body belongs to its request (RFC 9110, section 7.8).
4. A chunked body has at most `CHUNKS_COUNT_MAX` chunks. Extensions of chunks and trailers are dropped: a trailer could
   otherwise add a header that a proxy sets or removes.
Pure: bytes in, values out. It must never see a socket or a clock.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from progressdb_server.api.http import limits
from progressdb_server.api.http.errors import Header

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE: Final = re.compile(
    rb"([A-Z]{1,32}) "
    rb"(https?://[^/?#\x00-\x20\x7f-\xff]+)?(/[!-\"$->@-~]*)?(?:\?([!-\"$-~]*))?(?:#[!-~]*)?"
    rb" HTTP/(1\.[01])\r\n"
)
_FIELD: Final = re.compile(rb"(?<=\n)(%b):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n" % _TOKEN)
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_SINGLE: Final = (b"host", b"content-length", b"transfer-encoding", b"expect")
_LENGTH_DIGITS_MAX: Final = 18

CHUNKED: Final = -1
"""`Head.length` of a chunked body."""


class HttpError(Exception):
    """The bytes are refused with this status, and the connection ends."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Head(NamedTuple):
    method: bytes
    path: bytes
    query: bytes
    version: bytes
    headers: list[Header]
    """Names in lower case; values without the white space around them."""
    keep_alive: bool
    length: int
    """Of the body; `CHUNKED` if only its chunks tell."""
    expects_continue: bool


def parse_head(data: bytes, at: int, end: int) -> Head:
    """Parse the head in `data` from `at` to `end`, from the method to the empty line inclusive."""
    if end - at > limits.HEAD_BYTES_MAX:
        raise HttpError(431)
    line = _REQUEST_LINE.match(data, at, end)
    if line is None:
        raise HttpError(400)
    method, origin, path, query, version = line.groups()
    headers = [(name.lower(), value.strip()) for name, value in _FIELD.findall(data, line.end(), end)]
    if len(headers) != data.count(b"\n", at, end) - 2:  # a line is no field
        raise HttpError(400)
    if len(headers) > limits.HEADERS_COUNT_MAX:
        raise HttpError(431)
    if path is None:
        if origin is None:
            raise HttpError(400)
        path = b"/"
    named = dict(headers)
    if len(named) != len(headers):
        names = [name for name, _ in headers]
        if any(names.count(name) > 1 for name in _SINGLE):
            raise HttpError(400)
    is_1_1 = version == b"1.1"
    if is_1_1 and b"host" not in named:
        raise HttpError(400)
    length = named.get(b"content-length")
    if b"transfer-encoding" in named:
        if length is not None or not is_1_1 or named[b"transfer-encoding"].lower() != b"chunked":
            raise HttpError(400)
        body_length = CHUNKED
    elif length is None:
        body_length = 0
    elif length.isdigit() and len(length) <= _LENGTH_DIGITS_MAX:
        body_length = int(length)
    else:
        raise HttpError(400)
    keep_alive = is_1_1 and (b"connection" not in named or not _closes(headers))
    expects_continue = is_1_1 and b"expect" in named and named[b"expect"].lower() == b"100-continue"
    return Head(method, path, query or b"", version, headers, keep_alive, body_length, expects_continue)


def check_beginning(data: bytes) -> None:
    """Raise HttpError if these bytes, which do not end, can't be the beginning of an acceptable head."""
    if len(data) > limits.HEAD_BYTES_MAX:
        raise HttpError(431)
    if not data[:1].isupper() or (b"\n" in data and _REQUEST_LINE.match(data) is None):
        raise HttpError(400)


def _closes(headers: list[Header]) -> bool:
    tokens = b",".join(value for name, value in headers if name == b"connection").lower().split(b",")
    return b"close" in [token.strip(b" \t") for token in tokens]


class Chunks:
    """Decodes one chunked body. Not to be used after an HttpError."""

    __slots__ = ("_count", "_in_trailers", "_left", "_trailer_bytes", "complete")

    def __init__(self) -> None:
        self.complete = False
        self._count = 0
        self._left = 0
        """Bytes of the chunk that are missing, with the CR LF after it."""
        self._in_trailers = False
        self._trailer_bytes = 0

    def feed(self, data: bytes, at: int) -> tuple[bytes, int]:
        """Decode `data` from `at` on. Returns the decoded bytes, and where the rest begins: it comes again with more,
        or, if the body is complete, belongs to the next request."""
        parts: list[bytes] = []
        while not self.complete:
            if self._left > 2:
                part = data[at : at + self._left - 2]
                at += len(part)
                self._left -= len(part)
                parts.append(part)
                if self._left > 2:
                    break
            stop = data.find(b"\r\n", at)
            if stop < 0:
                self._check_unfinished(data, at)
                break
            if self._left:
                if stop != at:
                    raise HttpError(400)
                self._left = 0
            elif self._in_trailers:
                self._trailer(data[at:stop])
            else:
                self._begin(data, at, stop)
            at = stop + 2
        return b"".join(parts), at

    def _check_unfinished(self, data: bytes, at: int) -> None:
        """The rest of `data` is the beginning of a line."""
        if self._left:
            if data[at:] not in (b"", b"\r"):
                raise HttpError(400)
        elif len(data) - at > (limits.HEAD_BYTES_MAX if self._in_trailers else limits.CHUNK_LINE_BYTES_MAX):
            raise HttpError(431 if self._in_trailers else 400)

    def _begin(self, data: bytes, at: int, stop: int) -> None:
        line = _CHUNK.fullmatch(data, at, stop)
        if line is None or stop - at > limits.CHUNK_LINE_BYTES_MAX:
            raise HttpError(400)
        self._count += 1
        if self._count > limits.CHUNKS_COUNT_MAX:
            raise HttpError(413)
        size = int(line[1], 16)
        self._left = size + 2 if size else 0
        self._in_trailers = size == 0

    def _trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line) + 2
        if self._trailer_bytes > limits.HEAD_BYTES_MAX:
            raise HttpError(431)
        if not line:
            self.complete = True
        elif _FIELD.fullmatch(b"\n" + line + b"\r\n", 1) is None:
            raise HttpError(400)
