"""The bounds of the HTTP engine.

Owns: every number that keeps a peer from taking more than its share of memory, descriptors or time. Invariants: each
bound is a named constant with its unit last, and what a client must know too comes from `minikms.api`. Nothing here
may mean "unlimited". `Limits` exists so that tests can wait a tenth of a second instead of a minute; the daemon uses
the defaults.

What the engine itself refuses, before the application sees anything: one table.

Owns: the status, the stable code and the sentence of each refusal. Invariants: every refusal of a peer's input is 4xx,
never 5xx, because a 5xx tells an operator that the service has failed; the only 5xx here say that the service is full
or stopping. A sentence never repeats what the peer sent. docs/spec/http.md has the same table; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from minikms import api

TARGET_BYTES_MAX: Final = 4096
"""Of a request target; `/keys` with every parameter at its longest stays below 1 KiB."""
METHOD_BYTES_MAX: Final = 32
CHUNKS_COUNT_MAX: Final = 16_384
"""Of one chunked body: 16 MiB in pieces of 1 KiB. A body of one-byte chunks would cost seconds of the loop's time."""
CHUNK_SIZE_DIGITS_MAX: Final = 8
MEMO_HEADS_COUNT_MAX: Final = 256
MEMO_HEAD_BYTES_MAX: Final = 1024
QUERY_PARAMETERS_COUNT_MAX: Final = 32

RECEIVE_BUFFER_BYTES: Final = 256 * 1024
"""The one buffer that every connection receives into. More than a Unix socket's default queue (208 KiB)."""
BUFFERED_BYTES_MAX: Final = 256 * 1024 * 1024
"""Of incomplete requests, all connections together: otherwise 2,048 of them could hold 32 GiB."""
WRITE_BUFFER_BYTES_MAX: Final = 1024 * 1024
"""Of answers that a client has not read; beyond it nothing more is read from that client."""

HEAD_SECONDS_MAX: Final = 10.0
BODY_SECONDS_MAX: Final = 60.0
IDLE_SECONDS_MAX: Final = 300.0
HALF_CLOSED_SECONDS_MAX: Final = 5.0
LINGER_SECONDS_MAX: Final = 2.0
"""How long input is still read and thrown away after the last answer, so that the client gets to read that."""
WRITE_STALL_SECONDS_MAX: Final = 30.0
WRITE_PROGRESS_BYTES_MIN: Final = 64 * 1024
"""A client that takes less than this, and not all, in WRITE_STALL_SECONDS_MAX counts as not reading."""
SWEEP_SECONDS: Final = 0.5
"""How often deadlines are looked at: one pass over all connections, instead of a timer for each request."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds that a test may tighten. Bytes, counts and seconds, as the names say."""

    head_bytes_max: int = api.HEAD_BYTES_MAX
    headers_count_max: int = api.HEADERS_COUNT_MAX
    target_bytes_max: int = TARGET_BYTES_MAX
    body_bytes_max: int = api.BODY_BYTES_MAX
    chunks_count_max: int = CHUNKS_COUNT_MAX
    connections_max: int = api.CONNECTIONS_MAX
    pipelined_requests_max: int = api.PIPELINED_REQUESTS_MAX
    receive_buffer_bytes: int = RECEIVE_BUFFER_BYTES
    buffered_bytes_max: int = BUFFERED_BYTES_MAX
    write_buffer_bytes_max: int = WRITE_BUFFER_BYTES_MAX
    head_seconds_max: float = HEAD_SECONDS_MAX
    body_seconds_max: float = BODY_SECONDS_MAX
    idle_seconds_max: float = IDLE_SECONDS_MAX
    half_closed_seconds_max: float = HALF_CLOSED_SECONDS_MAX
    linger_seconds_max: float = LINGER_SECONDS_MAX
    write_stall_seconds_max: float = WRITE_STALL_SECONDS_MAX
    sweep_seconds: float = SWEEP_SECONDS


LIMITS: Final = Limits()


class Refusal(NamedTuple):
    """One row: HTTP status, code of `minikms.api`, a sentence for the caller."""

    status: int
    code: str
    sentence: str


class RefusedError(Exception):
    """The peer's bytes are refused; the engine answers with `refusal` and closes the connection."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.sentence)
        self.refusal = refusal


def _bad(sentence: str) -> Refusal:
    return Refusal(400, api.CODE_INVALID_REQUEST, sentence)


BAD_REQUEST_LINE: Final = _bad("The request line is not 'METHOD /path HTTP/1.1' followed by CR LF.")
BAD_VERSION: Final = _bad("Only HTTP/1.1 and HTTP/1.0 are spoken here.")
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
BAD_METHOD: Final = Refusal(405, api.CODE_METHOD_NOT_ALLOWED, "The method is not known here.")
HEAD_TIMEOUT: Final = Refusal(408, api.CODE_TIMEOUT, "The head of the request took too long to arrive.")
BODY_TIMEOUT: Final = Refusal(408, api.CODE_TIMEOUT, "The body of the request took too long to arrive.")
LENGTH_REQUIRED: Final = Refusal(411, api.CODE_INVALID_REQUEST, "A Content-Length is required, 0 for an empty body.")
BODY_TOO_LARGE: Final = Refusal(413, api.CODE_TOO_LARGE, "The body is larger than is accepted.")
TOO_MANY_CHUNKS: Final = Refusal(413, api.CODE_TOO_MANY, "The body comes in too many chunks.")
TARGET_TOO_LONG: Final = Refusal(414, api.CODE_TOO_LARGE, "The request target is longer than is accepted.")
BAD_CONTENT_ENCODING: Final = Refusal(415, api.CODE_INVALID_REQUEST, "The body must not be compressed.")
BAD_EXPECT: Final = Refusal(417, api.CODE_INVALID_REQUEST, "Only the expectation '100-continue' is known here.")
HEAD_TOO_LARGE: Final = Refusal(431, api.CODE_TOO_LARGE, "The head of the request is larger than is accepted.")
TOO_MANY_HEADERS: Final = Refusal(431, api.CODE_TOO_MANY, "The request has more headers than are accepted.")
OVERLOADED: Final = Refusal(503, api.CODE_TOO_MANY, "Too much is being received at once; try again.")
TOO_MANY_CONNECTIONS: Final = Refusal(503, api.CODE_TOO_MANY, "Too many connections; try again.")
SHUTTING_DOWN: Final = Refusal(503, api.CODE_SHUTTING_DOWN, "The service is stopping.")
INTERRUPTED: Final = Refusal(
    503, api.CODE_INTERRUPTED, "The service stopped while it worked on this; it may have been carried out."
)
AUDIT_UNAVAILABLE: Final = Refusal(
    503, api.CODE_AUDIT_UNAVAILABLE, "The audit log can't be written, so nothing is answered."
)
INTERNAL: Final = Refusal(500, api.CODE_INTERNAL, "The service failed; its log says more.")

TABLE: Final = {name: row for name, row in globals().items() if isinstance(row, Refusal)}
"""All rows by name, for the specification and the tests."""
