"""Bounds of requests and answers, and the syntax of ids."""

from __future__ import annotations

import re
from typing import Final

BODY_BYTES_MAX: Final = 16 * 1024 * 1024
HEAD_BYTES_MAX: Final = 16 * 1024
HEADERS_COUNT_MAX: Final = 64
BATCH_ITEMS_MAX: Final = 1024
CONNECTIONS_MAX: Final = 2048
PIPELINED_REQUESTS_MAX: Final = 64
PLAINTEXT_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of one item. Four times the message size that the server accepts; its base64 still fits a body."""
AAD_BYTES_MAX: Final = 4096
REQUEST_ID_CHARS_MAX: Final = 128
ID_CHARS_MAX: Final = 128
LIST_KEYS_COUNT_DEFAULT: Final = 100
LIST_KEYS_COUNT_MAX: Final = 1000
RANDOM_BYTES_MAX: Final = 4096
VERIFY_SAMPLES_MAX: Final = 64

THREAD_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
KEY_ID_PATTERN: Final = re.compile(r"k_[0-7][0-9a-hjkmnp-tv-z]{25}", re.ASCII)
"""`k_` and 128 bits in lower-case Crockford base 32: 48 bits of Unix milliseconds, then 80 random bits (as a ULID)."""
REQUEST_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)

REQUEST_ID_HEADER: Final = "x-request-id"
