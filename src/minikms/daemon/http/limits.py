"""The bounds of the HTTP engine.

Owns: every number that keeps a peer from taking more than its share of memory, descriptors or time. Invariants: each
bound is a named constant with its unit last, and what a client must know too comes from `minikms.api`. Nothing here
may mean "unlimited". `Limits` exists so that tests can wait a tenth of a second instead of a minute; the daemon uses
the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
