"""The bounds of the HTTP API, beside those of connections (`progressdb_server.http.limits`).

Owns: every number that limits what a client may send or hold, as a constant whose name ends in its unit. Invariant:
whatever a request can make grow has a bound here, there, or in `minikms.api`. It must never hold a setting that an
operator changes: those are in `progressdb_server.config`.
"""

from __future__ import annotations

import re
from typing import Final

from progressdb_server.store import model

# --- one request ------------------------------------------------------------------------------------------------
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
"""The bytes of a user's bodies that cost one more token than the request. JSON of 390 KB can take the loop for 33 ms.
"""
JSON_UNCHECKED_BYTES_MAX: Final = 16 * 1024
"""A shorter body can't hold enough values or digits to stall the event loop; only its depth is checked."""
QUERY_FIELDS_COUNT_MAX: Final = 32
PAGE_COUNT_MAX: Final = 1000
"""Entries in one page of a list of threads or keys."""
LIST_BUFFER_BYTES_MAX: Final = 256 * 1024
"""A shorter list is sent whole, with its length; a longer one is streamed."""
BODIES_RETRY_SECONDS: Final = 2

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
