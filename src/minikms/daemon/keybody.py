"""The root key in a request body: `new_kek_hex` of `POST /rotate_kek`.

Owns: moving the key's text from the HTTP engine's buffer into the arena, before anything else reads the body.
Invariants: the text never becomes a Python object (the regular expressions give positions only); it is overwritten in
the body before the rest is decoded, so that a later error can't leak it, and so is text that looks like a key under a
mistyped name; a body with a backslash is refused, because an escape could hide the field's name.
"""

from __future__ import annotations

import re
from typing import Final

from minikms.errors import InvalidRequestError, KeyTextError
from minikms.memory.arena import SecretArena, SecretSlot, hex_decode_into

_FIELD: Final = re.compile(rb'"new_kek_hex"\s*:\s*"[^"]*"')
_VALUE: Final = re.compile(rb'"[^"]*"\Z')
_BACKSLASH: Final = re.compile(rb"\\")
_SAMPLE_OR_KEY: Final = re.compile(rb'"(?:ciphertext|aad)"\s*:\s*"[^"]*"|([0-9A-Fa-f]{60,})')
"""The text of a key, or a few characters less or more, anywhere but in the values of `ciphertext` and `aad`: there, 45
zero bytes are sixty `A` in base64.
"""
_KEY_CHARS: Final = 64


def take_new_root(body: memoryview, arena: SecretArena) -> SecretSlot | None:
    """The new root key, or None when the body names none. The caller releases the slot. Raises InvalidRequestError."""
    if _BACKSLASH.search(body) is not None:
        raise InvalidRequestError("the body of this request must not use escapes (no backslash)")
    found = [match.span() for match in _FIELD.finditer(body)]
    spans = [_value_span(body, start, stop) for start, stop in found]
    slot: SecretSlot | None = None
    try:
        if len(spans) == 1 and spans[0][1] - spans[0][0] == _KEY_CHARS:
            slot = arena.allocate()
            hex_decode_into(body[spans[0][0] : spans[0][1]], slot.view)
        elif spans:
            raise InvalidRequestError("invalid new_kek_hex")
    except KeyTextError:
        if slot is not None:
            slot.release()
        raise InvalidRequestError("invalid new_kek_hex") from None
    finally:
        for start, stop in (*spans, *_key_like(body)):
            body[start:stop] = b"0" * (stop - start)
    return slot


def _key_like(body: memoryview) -> list[tuple[int, int]]:
    """The positions of text that may be a key under another name."""
    return [match.span(1) for match in _SAMPLE_OR_KEY.finditer(body) if match.start(1) >= 0]


def _value_span(body: memoryview, start: int, stop: int) -> tuple[int, int]:
    """The position of the text between the quotes of the value, for a field at [start, stop)."""
    value = _VALUE.search(body[start:stop])
    if value is None:
        raise InvalidRequestError("invalid new_kek_hex")
    return start + value.start() + 1, stop - 1
