"""The bounds of connections and requests, each a constant whose name ends in its unit.

Invariant: whatever the bytes of a connection can make grow has a bound here, or in `progressdb_server.config` if an
operator changes it.
"""

from __future__ import annotations

from typing import Final

# --- one connection ---------------------------------------------------------------------------------------------
REQUEST_BYTES_MAX: Final = (1024 + 64) * 1024
"""The bytes of a body that are kept; the API refuses a longer one, and separately a longer body of a message as the
store writes it. The 64 KiB beyond 1 MiB leave space for a message's other fields.
"""
HEAD_BYTES_MAX: Final = 32 * 1024
HEADERS_COUNT_MAX: Final = 100
CHUNKS_COUNT_MAX: Final = 16_384
"""Chunks of one body. Each costs about a microsecond, however short it is."""
CHUNKS_PER_TURN_COUNT_MAX: Final = 256
"""The chunks of one connection in one turn of the event loop, so that short chunks of many connections do not stall it.
"""
CHUNK_LINE_BYTES_MAX: Final = 256
"""The line before a chunk: its size and its extensions."""
REQUEST_SECONDS_MAX: Final = 30
"""From the first byte of a request to its last."""
IDLE_SECONDS_MAX: Final = 75
HANDSHAKE_SECONDS_MAX: Final = 10
"""The time for TLS on a new connection."""
HALF_CLOSED_SECONDS_MAX: Final = 10
"""For the next response to a client that has closed its sending side: most such clients are gone."""
LINGER_SECONDS_MAX: Final = 2
LINGER_BYTES_MAX: Final = REQUEST_BYTES_MAX
"""How long a refused client may still send, and how much, so that it reads its response before the connection is reset.
"""
CONNECTIONS_COUNT_MAX: Final = 4096
STREAM_STALL_SECONDS_MAX: Final = 30
"""How long a client may leave a response unread before its connection is closed."""
WRITE_BUFFER_BYTES_MAX: Final = 64 * 1024
"""Unread bytes of one connection from which on they count in `UNREAD_BYTES_MAX`, and nothing more is written. uvloop
sends a shorter response at the end of its turn, when the request has its line in the log."""

# --- what all connections share ---------------------------------------------------------------------------------
BODY_UNCOUNTED_BYTES_MAX: Final = 4 * 1024
"""A body up to this length takes nothing from the budget of bodies. All connections together hold 16 MiB of these."""
USER_BODIES_SHARE: Final = 1 / 8
"""The share of the budget of bodies (`server.body_bytes`) for one signed user."""
UNVERIFIED_BODIES_SHARE: Final = 1 / 4
"""For one address and API key together, before the signature was verified."""
ADDRESS_BODIES_SHARE: Final = 1 / 2
"""For one address."""
UNREAD_BYTES_MAX: Final = 64 * 1024 * 1024
"""Responses that the kernel has not taken, because their clients do not read."""
LISTS_COUNT_MAX: Final = 16
"""Lists that are read and sent at a time. One occupies up to about 8 MiB."""
ADDRESS_LISTS_COUNT_MAX: Final = 8
"""The lists that one address may have under way."""
LIST_WAIT_SECONDS_MAX: Final = 10
"""How long a list waits for its turn before it gets a 503."""
LIST_STALL_SECONDS_MAX: Final = 2.0
"""How long a client may leave a list unread while another list waits for its turn."""
