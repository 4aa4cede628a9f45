"""The bounds of the HTTP engine, and its refusals: what it answers before the application sees a request.

Owns: every number that keeps a peer from taking more than its share of memory, descriptors or time, and the status,
code and sentence of each refusal. Invariants:

- Each bound is a named constant with its unit; bounds that clients need come from `minikms.api`; no value means
  "unlimited". `Limits` lets tests use smaller bounds; the daemon uses the defaults.
- A refusal of a peer's input is 4xx, because a 5xx tells an operator that the service has failed. The 5xx here say that
  the service is full, stopping, or has failed itself.
- A sentence never repeats what the peer sent. docs/spec/http.md has the other columns; a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from minikms import api

TARGET_BYTES_MAX: Final = 4096
"""Bound of a request target; `/keys` with every parameter at its longest is shorter than 1 KiB."""
METHOD_BYTES_MAX: Final = 32
CHUNKS_COUNT_MAX: Final = 16_384
"""Bound of one chunked body: 16 MiB in chunks of 1 KiB. A body of one-byte chunks would block the loop for seconds."""
CHUNK_SIZE_DIGITS_MAX: Final = 8
CACHED_HEADS_COUNT_MAX: Final = 256
CACHED_HEAD_BYTES_MAX: Final = 1024
QUERY_PARAMETERS_COUNT_MAX: Final = 32

RECEIVE_BUFFER_BYTES: Final = 256 * 1024
"""Size of the buffer that all connections share. It exceeds a Unix socket's default queue (208 KiB)."""
BUFFERED_BYTES_MAX: Final = 256 * 1024 * 1024
"""Bound of the incomplete requests of all connections: without it, 2,048 connections could hold 32 GiB."""
BUFFERED_GROUP_BYTES_MAX: Final = BUFFERED_BYTES_MAX // 2
"""The same bound of one group (`Application.group`), so that it leaves room for the others."""
UNREAD_GROUP_BYTES_MAX: Final = 32 * 1024 * 1024
"""Bound of the requests that are answered later and of the answers that wait to be read, on all connections of a group
(`Application.group`). Beyond it, none of them is read or starts a request before half of the bound is free. It
exceeds the largest answer, 22 MiB."""
UNREAD_BYTES_MAX: Final = 256 * 1024 * 1024
"""The same bound of all groups together. Beyond it, a group is read again only when it has no such bytes itself."""

HEAD_SECONDS_MAX: Final = 10.0
BODY_SECONDS_MAX: Final = 60.0
IDLE_SECONDS_MAX: Final = 300.0
HALF_CLOSED_SECONDS_MAX: Final = 5.0
PLACE_SECONDS_MIN: Final = 1.0
"""A connection that has waited for its client for less is not closed for another one: a request may be on its way."""
LINGER_SECONDS_MAX: Final = 2.0
"""How long the engine reads and discards input after the last answer, so that the client can read the answer."""
WRITE_STALL_SECONDS_MAX: Final = 30.0
WRITE_PROGRESS_BYTES_MIN: Final = 64 * 1024
"""A client that reads less than this, and not everything, in WRITE_STALL_SECONDS_MAX counts as not reading."""
SWEEP_SECONDS: Final = 0.5
"""Interval between two checks of the deadlines: one pass over all connections, instead of a timer per request."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one server, in bytes, counts and seconds, as the names say."""

    head_bytes_max: int = api.HEAD_BYTES_MAX
    headers_count_max: int = api.HEADERS_COUNT_MAX
    target_bytes_max: int = TARGET_BYTES_MAX
    body_bytes_max: int = api.BODY_BYTES_MAX
    chunks_count_max: int = CHUNKS_COUNT_MAX
    connections_max: int = api.CONNECTIONS_MAX
    pipelined_requests_max: int = api.PIPELINED_REQUESTS_MAX
    receive_buffer_bytes: int = RECEIVE_BUFFER_BYTES
    buffered_bytes_max: int = BUFFERED_BYTES_MAX
    buffered_group_bytes_max: int = BUFFERED_GROUP_BYTES_MAX
    unread_group_bytes_max: int = UNREAD_GROUP_BYTES_MAX
    unread_bytes_max: int = UNREAD_BYTES_MAX
    head_seconds_max: float = HEAD_SECONDS_MAX
    body_seconds_max: float = BODY_SECONDS_MAX
    idle_seconds_max: float = IDLE_SECONDS_MAX
    half_closed_seconds_max: float = HALF_CLOSED_SECONDS_MAX
    place_seconds_min: float = PLACE_SECONDS_MIN
    linger_seconds_max: float = LINGER_SECONDS_MAX
    write_stall_seconds_max: float = WRITE_STALL_SECONDS_MAX
    sweep_seconds: float = SWEEP_SECONDS


LIMITS: Final = Limits()


class Refusal(NamedTuple):
    """One refusal: HTTP status, code of `minikms.api`, a sentence for the caller."""

    status: int
    code: str
    sentence: str


class RefusedError(Exception):
    """The engine refuses the peer's bytes: it answers with `refusal` and closes the connection."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.sentence)
        self.refusal = refusal


def _bad(sentence: str) -> Refusal:
    return Refusal(400, api.CODE_INVALID_REQUEST, sentence)


BAD_REQUEST_LINE: Final = _bad("The request line is not 'METHOD /path HTTP/1.1' followed by CR LF.")
BAD_VERSION: Final = _bad("Only HTTP/1.1 and HTTP/1.0 are supported.")
BAD_TARGET: Final = _bad("The request target must be a path that begins with '/', with RFC 3986 characters only.")
BAD_HEADER: Final = _bad("The headers are malformed or contradict each other.")
BAD_HOST: Final = _bad("A valid Host header is required.")
REPEATED_HEADER: Final = _bad("A header that may appear once is repeated.")
BAD_CONTENT_LENGTH: Final = _bad("Content-Length must be one decimal number.")
BAD_TRANSFER_ENCODING: Final = _bad("Transfer-Encoding must be 'chunked', in HTTP/1.1, without Content-Length.")
BAD_CHUNK: Final = _bad("The chunked body is malformed, or has a chunk extension or a trailer; neither is accepted.")
TRAILER: Final = _bad("Trailers are not accepted.")
UPGRADE: Final = _bad("The connection can't be upgraded to another protocol.")
TRUNCATED: Final = _bad("The connection was closed in the middle of a request.")
BAD_METHOD: Final = Refusal(405, api.CODE_METHOD_NOT_ALLOWED, "The method is not supported.")
HEAD_TIMEOUT: Final = Refusal(408, api.CODE_TIMEOUT, "The head of the request took too long to arrive.")
BODY_TIMEOUT: Final = Refusal(408, api.CODE_TIMEOUT, "The body of the request took too long to arrive.")
LENGTH_REQUIRED: Final = Refusal(411, api.CODE_INVALID_REQUEST, "A Content-Length is required, 0 for an empty body.")
BODY_TOO_LARGE: Final = Refusal(413, api.CODE_TOO_LARGE, "The body is larger than is accepted.")
TOO_MANY_CHUNKS: Final = Refusal(413, api.CODE_TOO_MANY, "The body comes in too many chunks.")
TARGET_TOO_LONG: Final = Refusal(414, api.CODE_TOO_LARGE, "The request target is longer than is accepted.")
BAD_CONTENT_ENCODING: Final = Refusal(415, api.CODE_INVALID_REQUEST, "The body must not be compressed.")
BAD_EXPECT: Final = Refusal(417, api.CODE_INVALID_REQUEST, "Only the expectation '100-continue' is supported.")
HEAD_TOO_LARGE: Final = Refusal(431, api.CODE_TOO_LARGE, "The head of the request is larger than is accepted.")
TOO_MANY_HEADERS: Final = Refusal(431, api.CODE_TOO_MANY, "The request has more headers than are accepted.")
OVERLOADED: Final = Refusal(503, api.CODE_TOO_MANY, "Too much is being received at once; try again.")
TOO_MANY_CONNECTIONS: Final = Refusal(503, api.CODE_TOO_MANY, "Too many connections; try again.")
SHUTTING_DOWN: Final = Refusal(503, api.CODE_SHUTTING_DOWN, "The service is stopping.")
INTERRUPTED: Final = Refusal(
    503, api.CODE_INTERRUPTED, "The service stopped during this request, which may have taken effect."
)
AUDIT_UNAVAILABLE: Final = Refusal(
    503, api.CODE_AUDIT_UNAVAILABLE, "The audit log can't be written, so requests are refused."
)
INTERNAL: Final = Refusal(500, api.CODE_INTERNAL, "The service failed; its log has the details.")
