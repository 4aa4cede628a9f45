"""The bounds of the HTTP API, each a named constant with its unit last.

Owns: every number that limits what one client may send or hold. Invariant: nothing that a request can make grow is
without a bound here or in `minikms.api`. It must never hold a setting that an operator changes (see `config`).
"""

from __future__ import annotations

import re
from typing import Final

# --- one request ------------------------------------------------------------------------------------------------
MESSAGE_BYTES_MAX: Final = 1024 * 1024
"""Of a message's body as JSON."""
ENVELOPE_BYTES_MAX: Final = 64 * 1024
"""What a request may hold beside the message's body: author, thread, reactions."""
REQUEST_BYTES_MAX: Final = MESSAGE_BYTES_MAX + ENVELOPE_BYTES_MAX
DISCARDED_BYTES_MAX: Final = 32 * 1024 * 1024
"""Of a body that is too large: read and thrown away, so that the client gets its 413 and not a reset connection."""
JSON_DEPTH_MAX: Final = 64
QUERY_FIELDS_COUNT_MAX: Final = 32

# --- the connection ---------------------------------------------------------------------------------------------
HEAD_BYTES_MAX: Final = 32 * 1024
HELD_BYTES_MAX: Final = HEAD_BYTES_MAX + 256 * 1024
"""Of a line that has not ended, which no callback tells of; the event loop reads up to 256 KiB at once."""
HEADERS_COUNT_MAX: Final = 100
REQUEST_SECONDS_MAX: Final = 30
"""From the first byte of a request to its last."""
IDLE_SECONDS_MAX: Final = 75
CONNECTIONS_COUNT_MAX: Final = 4096
STREAM_STALL_SECONDS_MAX: Final = 30
"""How long a client may leave a streamed list unread before its connection is closed."""
LIST_BUFFER_BYTES_MAX: Final = 256 * 1024
"""A list that is shorter is answered whole, with its length; a longer one is streamed."""

# --- fields -----------------------------------------------------------------------------------------------------
AUTHOR_BYTES_MAX: Final = 128
ROLE_BYTES_MAX: Final = 128
TITLE_BYTES_MAX: Final = 4096
SLUG_BYTES_MAX: Final = TITLE_BYTES_MAX + 256
REACTION_BYTES_MAX: Final = 256
REACTIONS_COUNT_MAX: Final = 1024
STORED_KEY_BYTES_MAX: Final = 1024
ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
"""Thread and message ids, as in `minikms.api`: they become part of storage keys, where `:` separates."""
IDEMPOTENCY_KEY_PATTERN: Final = re.compile(rb"[\x21-\x7e]{1,255}")

# --- memory of clients ------------------------------------------------------------------------------------------
AUTHORS_COUNT_MAX: Final = 4096
"""Authors that are known to be well-formed."""
ADDRESSES_COUNT_MAX: Final = 16384
"""Client addresses whose rate or admission is remembered; the one unused for longest is forgotten first."""
