"""Canonical base64 (RFC 4648 section 4): one text for one value.

Owns: the encoder of every binary value in an answer, and the strict decoder of every one in a request. Invariant:
`decode_canonical` accepts exactly the texts that `encode` makes; white space, other alphabets, missing or superfluous
padding and set trailing bits are refused, so that two different texts never mean the same bytes. Key text never comes
here: it is decoded in the arena (`minikms.memory`).
"""

from __future__ import annotations

from typing import Final

from pybase64 import b64decode, b64encode

from minikms.errors import InvalidRequestError, TooLargeError

_LAST_OF_TWO: Final = frozenset("AQgw")
"""Before `==` only the top two bits of the last character count (RFC 4648 section 3.5)."""
_LAST_OF_THREE: Final = frozenset("AEIMQUYcgkosw048")

encode = b64encode
"""The text of some bytes, as ASCII bytes without a line break."""


def decode_canonical(text: str, bytes_max: int, what: str) -> bytes:
    """The bytes of `text`. `what` names the field in the error. Raises InvalidRequestError, TooLargeError."""
    if len(text) > bytes_max and len(text) > (bytes_max + 2) // 3 * 4:
        raise TooLargeError(f"{what} is larger than {bytes_max} bytes")
    if len(text) % 4:
        raise InvalidRequestError(f"{what} is not standard base64 with padding")
    try:
        value: bytes = b64decode(text, None, True)
    except ValueError:  # of which binascii.Error is one
        raise InvalidRequestError(f"{what} is not standard base64 with padding") from None
    if text[-1:] == "=":
        canonical = text[-3] in _LAST_OF_TWO if text[-2] == "=" else text[-2] in _LAST_OF_THREE
        if not canonical:
            raise InvalidRequestError(f"{what} is not canonical base64: its unused bits are not zero")
    if len(value) > bytes_max:
        raise TooLargeError(f"{what} is larger than {bytes_max} bytes")
    return value
