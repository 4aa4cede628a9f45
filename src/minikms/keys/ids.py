"""Key ids: `k_` and 26 characters that order by time of creation.

Owns: the one strict form of a key id, and its 16-byte form. An id is a ULID in lower case: 48 bits of Unix
milliseconds, then 80 random bits, as Crockford base 32 (https://github.com/ulid/spec); so names sort as the keys were
created. Invariants: time and randomness are passed in; text and bytes map one to one (one spelling per id).
`check_key_id` stands before every use of an id from outside; an unchecked id must never touch a path.
"""

from __future__ import annotations

import base64
from typing import Final

from minikms import api
from minikms.errors import InvalidRequestError

KEY_ID_BYTES: Final = 16
KEY_ID_CHARS: Final = 28
RANDOM_BYTES: Final = 10
UNIX_MS_MAX: Final = (1 << 48) - 1

_RFC4648: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_CROCKFORD: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_TO_CROCKFORD: Final = str.maketrans(_RFC4648, _CROCKFORD)
_TO_RFC4648: Final = str.maketrans(_CROCKFORD, _RFC4648)
# Base 32 codes 5 bytes as 8 characters. 16 bytes are 26 characters with two zero bits in front; with four zero bytes
# before them they are 20 bytes, 32 characters, of which the first six say nothing.
_PAD_BYTES: Final = bytes(4)
_PAD_CHARS: Final = "A" * 6


def make_key_id(unix_ms: int, random: bytes) -> str:
    """The id of a key created at `unix_ms` (0 to 2^48-1), told apart by `random` (10 bytes).

    Raises ValueError for a time or a length out of range: the caller's clock or code is wrong, not a request.
    """
    if not 0 <= unix_ms <= UNIX_MS_MAX:
        raise ValueError("the time of a key id is 48 bits of Unix milliseconds")
    if len(random) != RANDOM_BYTES:
        raise ValueError("a key id takes ten random bytes")
    return bytes_to_key_id(unix_ms.to_bytes(6, "big") + random)


def check_key_id(text: str) -> str:
    """`text` itself if it is a key id; InvalidRequestError otherwise. What it was is not repeated."""
    if api.KEY_ID_PATTERN.fullmatch(text) is None:
        raise InvalidRequestError("a key id is k_ and 26 characters of lower-case Crockford base 32")
    return text


def key_id_to_bytes(key_id: str) -> bytes:
    """The 16 bytes of a key id, which sort as the ids do. Raises InvalidRequestError."""
    digits = check_key_id(key_id)[2:].translate(_TO_RFC4648)
    return base64.b32decode(_PAD_CHARS + digits)[4:]


def bytes_to_key_id(raw: bytes) -> str:
    """The key id of 16 bytes. Raises ValueError for any other length."""
    if len(raw) != KEY_ID_BYTES:
        raise ValueError("a key id is sixteen bytes")
    return "k_" + base64.b32encode(_PAD_BYTES + raw).decode("ascii")[6:].translate(_TO_CROCKFORD)


def key_id_unix_ms(key_id: str) -> int:
    """When the key was created, as its id says: Unix milliseconds. Raises InvalidRequestError."""
    return int.from_bytes(key_id_to_bytes(key_id)[:6], "big")
