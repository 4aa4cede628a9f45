"""The bounds of the HTTP API.

Owns: every number that limits what a client may send or hold, as a constant whose name ends in its unit. Invariant:
whatever a request can make grow has a bound here or in `minikms.api`. It must never hold a setting that an operator
changes: those are in `progressdb_server.config`.
"""

from __future__ import annotations

import re
from typing import Final

# --- one request ------------------------------------------------------------------------------------------------
REQUEST_BYTES_MAX: Final = (1024 + 64) * 1024
"""The body of a request, and separately a message's body as the store writes it. The 64 KiB beyond 1 MiB leave room
for a message's other fields.
"""
DISCARDED_BYTES_MAX: Final = 32 * 1024 * 1024
"""A body that is too large is read to its end, up to this bound, so that the client gets the 413 and not a reset
connection.
"""
JSON_DEPTH_MAX: Final = 64
QUERY_FIELDS_COUNT_MAX: Final = 32

# --- the connection ---------------------------------------------------------------------------------------------
HEAD_BYTES_MAX: Final = 32 * 1024
HELD_BYTES_MAX: Final = HEAD_BYTES_MAX + 256 * 1024
"""Bytes that the parser buffers for a line that has not ended. No callback reports such a line, and one read of the
event loop takes up to 256 KiB.
"""
HEADERS_COUNT_MAX: Final = 100
REQUEST_SECONDS_MAX: Final = 30
"""From the first byte of a request to its last."""
IDLE_SECONDS_MAX: Final = 75
CONNECTIONS_COUNT_MAX: Final = 4096
STREAM_STALL_SECONDS_MAX: Final = 30
"""How long a client may leave a response unread before its connection is closed."""
LIST_BUFFER_BYTES_MAX: Final = 256 * 1024
"""A shorter list is sent whole, with its length; a longer one is streamed."""

# --- fields -----------------------------------------------------------------------------------------------------
AUTHOR_BYTES_MAX: Final = 128
ROLE_BYTES_MAX: Final = 128
TITLE_BYTES_MAX: Final = 4096
SLUG_BYTES_MAX: Final = TITLE_BYTES_MAX + 256
REACTION_BYTES_MAX: Final = 256
REACTIONS_COUNT_MAX: Final = 1024
STORED_KEY_BYTES_MAX: Final = 1024
ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
"""Thread and message ids, as in `minikms.api`. They become part of storage keys, in which `:` separates."""
IDEMPOTENCY_KEY_PATTERN: Final = re.compile(rb"[\x21-\x7e]{1,255}")

# --- what is remembered of clients ------------------------------------------------------------------------------
AUTHORS_COUNT_MAX: Final = 4096
"""Authors that were found to be well formed."""
ADDRESSES_COUNT_MAX: Final = 16384
"""Client addresses whose rate or admission is remembered. The least recently used one is forgotten first."""
