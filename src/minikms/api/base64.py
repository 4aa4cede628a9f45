"""Canonical base64 (RFC 4648 section 4): each value has exactly one text.

Owns: encoding, and the two strict decoders: `decode_canonical` for fields of a request, `decode_exact` for values of a
known size. Invariant: a decoder accepts only what `encode` produces. It rejects white space, other alphabets, missing
or extra padding, and non-zero unused bits. It must never decode a key: `minikms.memory` decodes key text in the arena.
"""

from __future__ import annotations

from binascii import a2b_base64
from typing import Final

from pybase64 import b64decode, b64encode

from minikms.api.errors import InvalidRequestError, TooLargeError

_LAST_OF_TWO: Final = frozenset("AQgw")
"""Before `==` only the top two bits of the last character count (RFC 4648 section 3.5)."""
_LAST_OF_THREE: Final = frozenset("AEIMQUYcgkosw048")

encode = b64encode
"""The base64 of some bytes, as ASCII bytes without a line break."""


def encode_text(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def decode_exact(text: object, size: int) -> bytes | None:
    """The `size` bytes that `text` (str or bytes) encodes, or None if `text` is anything else."""
    if isinstance(text, str):
        text = text.encode("utf-8", "replace")
    if not isinstance(text, bytes):
        return None
    try:
        data = a2b_base64(text, strict_mode=True)  # faster than pybase64 for a few bytes
    except ValueError:
        return None
    return data if len(data) == size and b64encode(data) == text else None


def decode_canonical(text: str, bytes_max: int, what: str) -> bytes:
    """The bytes of `text`. `what` names the field in the error. Raises InvalidRequestError, TooLargeError."""
    if len(text) > bytes_max and len(text) > (bytes_max + 2) // 3 * 4:
        raise TooLargeError(f"{what} is larger than {bytes_max} bytes")
    try:
        value: bytes = b64decode(text, None, True)
    except ValueError:  # includes binascii.Error
        raise InvalidRequestError(f"{what} is not standard base64 with padding") from None
    size = len(value)
    beyond = size % 3
    if beyond:
        canonical = text[-3] in _LAST_OF_TWO if beyond == 1 else text[-2] in _LAST_OF_THREE
        if not canonical:
            raise InvalidRequestError(f"{what} is not canonical base64: its unused bits are not zero")
    if size > bytes_max:
        raise TooLargeError(f"{what} is larger than {bytes_max} bytes")
    return value
