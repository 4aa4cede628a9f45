"""The bounds of the HTTP API.

Owns: every number that limits what a client may send or hold, as a constant whose name ends in its unit. Invariant:
whatever a request can make grow has a bound here or in `minikms.api`. It must never hold a setting that an operator
changes: those are in `progressdb_server.config`.
"""

from __future__ import annotations

import re
from typing import Final

from progressdb_server.store import model

# --- one request ------------------------------------------------------------------------------------------------
REQUEST_BYTES_MAX: Final = (1024 + 64) * 1024
"""The body of a request, and separately a message's body as the store writes it. The 64 KiB beyond 1 MiB leave room
for a message's other fields.
"""
FORM_BYTES_MAX: Final = 4096
"""The body of a request that a form of the viewer sends."""
DISCARDED_BYTES_MAX: Final = 32 * 1024 * 1024
"""A body that is too large is read to its end, up to this bound, so that the client gets the 413 and not a reset
connection.
"""
JSON_DEPTH_MAX: Final = 64
JSON_CONTAINERS_COUNT_MAX: Final = 32_768
"""Arrays and objects of a body. Each is a Python object, which takes many times the two bytes of its text."""
JSON_VALUES_COUNT_MAX: Final = 65_536
"""Commas, arrays and objects of a body: at least the number of its values."""
JSON_STRINGS_COUNT_MAX: Final = 65_536
"""Strings of a body, names of fields too."""
JSON_DIGITS_COUNT_MAX: Final = 320
"""Consecutive digits of a number: the largest float has 309. Longer ones take a time that grows with their square."""
BODY_BYTES_PER_TOKEN: Final = 16 * 1024
"""Of a user's bodies: beyond the token of a request, one more for each. JSON of 390 KB can take the loop for 33 ms."""
JSON_UNCHECKED_BYTES_MAX: Final = 16 * 1024
"""A shorter body can't hold enough values or digits to stall the event loop; only its depth is checked."""
QUERY_FIELDS_COUNT_MAX: Final = 32

# --- the connection ---------------------------------------------------------------------------------------------
HEAD_BYTES_MAX: Final = 32 * 1024
HEADERS_COUNT_MAX: Final = 100
CHUNKS_COUNT_MAX: Final = 16_384
"""Chunks of one body. Each costs about a microsecond, however short it is."""
CHUNKS_PER_TURN_COUNT_MAX: Final = 256
"""Of one connection in one turn of the event loop, so that short chunks of many connections do not stall it."""
CHUNK_LINE_BYTES_MAX: Final = 256
"""The line before a chunk: its size and its extensions."""
REQUEST_SECONDS_MAX: Final = 30
"""From the first byte of a request to its last."""
IDLE_SECONDS_MAX: Final = 75
HANDSHAKE_SECONDS_MAX: Final = 10
"""Of TLS, on a new connection."""
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
LIST_BUFFER_BYTES_MAX: Final = 256 * 1024
"""A shorter list is sent whole, with its length; a longer one is streamed."""

# --- fields -----------------------------------------------------------------------------------------------------
AUTHOR_BYTES_MAX: Final = 128
ROLE_BYTES_MAX: Final = 128
TITLE_BYTES_MAX: Final = 4096
SLUG_BYTES_MAX: Final = TITLE_BYTES_MAX + 256
REACTION_BYTES_MAX: Final = 256
REACTIONS_COUNT_MAX: Final = model.REACTIONS_COUNT_MAX
NAMED_MEMBERS_COUNT_MAX: Final = 1024
"""Members that one request names."""
STORED_KEY_BYTES_MAX: Final = 1024
ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
"""Thread and message ids, as in `minikms.api`. They become part of storage keys, in which `:` separates."""
VERSION_PATTERN: Final = re.compile(r"(?:[0-9]{1,19}|[0-9]{1,20}-[0-9]{6})", re.ASCII)
"""A version of a message: its time, and a number that distinguishes versions of one nanosecond."""
IDEMPOTENCY_KEY_PATTERN: Final = re.compile(rb"[\x21-\x7e]{1,255}")

FORWARDED_HOPS_COUNT_MAX: Final = 16
"""Addresses of `X-Forwarded-For` that are looked at, from its end."""

# --- what is remembered of clients ------------------------------------------------------------------------------
AUTHORS_COUNT_MAX: Final = 4096
"""Authors that were found to be well formed."""
ADDRESSES_COUNT_MAX: Final = 16384
"""Client addresses with a token bucket of their own in each table, or whose admission is remembered."""
USERS_COUNT_MAX: Final = 65536
"""Pairs of an API key and a signed user with a token bucket of their own."""
REFUSAL_LOG_SECONDS: Final = 1.0
"""Between two lines of the log about callers that were refused."""

# --- what all connections share ---------------------------------------------------------------------------------
BODY_UNCOUNTED_BYTES_MAX: Final = 4 * 1024
"""A body up to this length takes nothing from the budget of bodies. All connections together hold 16 MiB of these."""
USER_BODIES_SHARE: Final = 1 / 8
"""Of the budget of bodies (`server.body_bytes`): for one signed user."""
UNVERIFIED_BODIES_SHARE: Final = 1 / 4
"""For one address and API key together, before the signature was verified."""
ADDRESS_BODIES_SHARE: Final = 1 / 2
"""For one address."""
BODIES_RETRY_SECONDS: Final = 2
UNREAD_BYTES_MAX: Final = 64 * 1024 * 1024
"""Responses that the kernel has not taken, because their clients do not read."""
LISTS_COUNT_MAX: Final = 16
"""Lists that are read and sent at a time. One occupies up to about 8 MiB."""
ADDRESS_LISTS_COUNT_MAX: Final = 8
"""Of these for one address."""
LIST_WAIT_SECONDS_MAX: Final = 10
"""How long a list waits for its turn before it gets a 503."""
LIST_STALL_SECONDS_MAX: Final = 2.0
"""How long a client may leave a list unread while another list waits for its turn."""
