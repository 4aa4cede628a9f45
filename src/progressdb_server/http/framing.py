"""The framing of requests in the bytes of a connection (RFC 9112): heads, and chunked bodies.

Owns: which heads are accepted, how long a body is, and the decoding of chunks. Rules, each broken by an `HttpError`:
1. A head is a request line and fields that end in CR LF, without a folded line, a bare CR or LF, or a control
   character. The version is 1.1 or 1.0. A 1.1 request has exactly one Host, which is a host and perhaps a port.
2. A body has exactly one possible length: one Content-Length, or `Transfer-Encoding: chunked` in 1.1, never both. So
   no proxy sees another end of a request than this server.
3. `Upgrade` changes nothing: the connection stays HTTP/1.1, and a body belongs to its request (RFC 9110, section 7.8).
4. A chunked body has at most `CHUNKS_COUNT_MAX` chunks. Extensions of chunks and trailers are dropped: a trailer could
   otherwise add a header that a proxy sets or removes.
Pure: bytes in, values out. It must never see a socket or a clock.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from progressdb_server.http import limits
from progressdb_server.http.asgi import Header

_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TEXT: Final = bytes({*range(256)} - {*range(32), 127} | {9})
"""The bytes of a head beside its line ends."""
_REQUEST_LINE: Final = re.compile(
    rb'([A-Z]{1,32}) (?=[/h])(?:https?://[!-"$-.0->@-~]+)?(/[!-"$->@-~]*)?(?:\?([!-"$-~]*))?(?:#[!-~]*)? HTTP/1\.[01]'
)
"""Method, path and query. Each part has printable characters except those that begin the next. A target without a path
names a host."""
_OPTIONS_OF_ALL: Final = re.compile(rb"(OPTIONS) (\*)() HTTP/1\.[01]")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t -~\x80-\xff]*)?")
_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[!$%&'()*+,\-.;=_~0-9A-Za-z]*)(?::[0-9]*)?")
_SINGLE: Final = (b"host", b"content-length", b"transfer-encoding", b"expect")
_LENGTH_DIGITS_MAX: Final = 18
_NAMES_COUNT_MAX: Final = 256
_NAME_BYTES_MAX: Final = 64
_names: Final[dict[bytes, bytes]] = {}
"""Names of headers as they were sent, and in lower case: they were found to be tokens. Longer ones are not kept."""

CHUNKED: Final = -1
"""`Fields.length` of a chunked body."""


class HttpError(Exception):
    """The bytes are refused with this status, and the connection ends."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Fields(msgspec.Struct, frozen=True, gc=False):
    """What follows the target of a head. The next head of a connection often has the same."""

    raw: bytes
    """From the digits of the version to the empty line."""
    version: str
    headers: list[Header]
    """Names in lower case; values without the white space around them. Not to be changed: they may recur."""
    keep_alive: bool
    length: int
    """The length of the body; `CHUNKED` if only its chunks tell."""
    expects_continue: bool


class RequestHead(msgspec.Struct, frozen=True, gc=False):
    method: str
    path: bytes
    query: bytes
    fields: Fields
    end: int
    """The offset at which the head ends."""


def parse_head(data: bytes, at: int, last: Fields | None = None) -> RequestHead | None:
    """Parse the head that begins at `at`; None if its end is missing. `last`: those of an earlier head, which are not
    parsed again if they recur."""
    stop = data.find(b"\r\n", at)
    if stop < 0:
        _check_beginning(data[at:])
        return None
    line = _REQUEST_LINE.fullmatch(data, at, stop) or _OPTIONS_OF_ALL.fullmatch(data, at, stop)
    if line is None:
        raise HttpError(400)
    version_at = stop - 3
    if last is not None and data.startswith(last.raw, version_at):
        fields = last
    else:
        end = data.find(b"\r\n\r\n", stop) + 4
        _check_length((len(data) if end < 4 else end) - at)
        if end < 4:
            return None
        fields = _parse_fields(data[version_at:end])
    end = version_at + len(fields.raw)
    _check_length(end - at)
    method, path, query = line.groups(b"")
    return RequestHead(method.decode("ascii"), path or b"/", query, fields, end)


def _check_beginning(line: bytes) -> None:
    """Raise HttpError if this can't be the beginning of a request line, or of an empty line before it."""
    _check_length(len(line))
    if line not in (b"", b"\r") and (not line[:1].isupper() or b"\n" in line):
        raise HttpError(400)


def _check_length(count: int) -> None:
    if count > limits.HEAD_BYTES_MAX:
        raise HttpError(431)


def _parse_fields(raw: bytes) -> Fields:
    lines = raw[:-4].split(b"\r\n")
    if raw.translate(None, _TEXT) != b"\r\n" * (len(lines) + 1):  # a bare CR or LF, or a control character
        raise HttpError(400)
    if len(lines) - 1 > limits.HEADERS_COUNT_MAX:
        raise HttpError(431)
    headers: list[Header] = []
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon:
            raise HttpError(400)
        headers.append((_names.get(name) or _name(name), value.strip()))
    named = dict(headers)
    if len(named) != len(headers):
        names = [name for name, _ in headers]
        if any(names.count(name) > 1 for name in _SINGLE):
            raise HttpError(400)
    version = lines[0].decode("ascii")
    is_1_1 = version == "1.1"
    host = named.get(b"host", None if is_1_1 else b"")
    if host is None or _HOST.fullmatch(host) is None:
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
    return Fields(raw, version, headers, keep_alive, body_length, expects_continue)


def _name(name: bytes) -> bytes:
    """The name of a header in lower case."""
    if _TOKEN.fullmatch(name) is None:
        raise HttpError(400)
    lower = name.lower()
    if len(_names) < _NAMES_COUNT_MAX and len(name) <= _NAME_BYTES_MAX:
        _names[name] = lower
    return lower


def _closes(headers: list[Header]) -> bool:
    tokens = b",".join(value for name, value in headers if name == b"connection").lower().split(b",")
    return b"close" in [token.strip(b" \t") for token in tokens]


class Chunks:
    """Decodes one chunked body. Not to be used after an HttpError."""

    __slots__ = ("_count", "_in_trailers", "_left", "_trailer_bytes", "complete", "starved")

    def __init__(self) -> None:
        self.complete = False
        self.starved = True
        """The given bytes are used; more have to be received."""
        self._count = 0
        self._left = 0
        """Bytes of the chunk that are missing, with the CR LF after it."""
        self._in_trailers = False
        self._trailer_bytes = 0

    def feed(self, data: bytes, at: int) -> tuple[bytes, int]:
        """Decode `data` from `at` on, at most `CHUNKS_PER_TURN_COUNT_MAX` lines of it. Returns the decoded bytes, and
        where the rest begins: it comes again, with more if it is `starved`, or, if the body is complete, belongs to the
        next request."""
        parts: list[bytes] = []
        self.starved = False
        for _ in range(limits.CHUNKS_PER_TURN_COUNT_MAX):
            if self.complete:
                break
            if self._left > 2:
                part = data[at : at + self._left - 2]
                at += len(part)
                self._left -= len(part)
                parts.append(part)
                if self._left > 2:
                    self.starved = True
                    break
            stop = data.find(b"\r\n", at)
            if stop < 0:
                self._check_unfinished(data, at)
                self.starved = True
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
        elif line.translate(None, _TEXT) or b":" not in line:
            raise HttpError(400)
