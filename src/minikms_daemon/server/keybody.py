"""The secrets in a request body, such as `new_kek_hex` of `POST /rotate_kek` and `share` of `POST /unseal`.

Owns: moving a secret's text from the HTTP engine's buffer into the arena, before anything else reads the body.
Invariants: the text never becomes a Python object (the regular expressions give positions only); it is overwritten in
the body before the rest is decoded, so that a later error can't leak it, and so is text that looks like a key under a
mistyped name; a body with a backslash is refused, because an escape could hide the field's name.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Iterator
from typing import Final

from minikms import api
from minikms.api.errors import InvalidRequestError, KeyTextError
from minikms.memory.arena import SLOT_BYTES, SecretArena, SecretSlot, hex_decode_into

_VALUE: Final = re.compile(rb'"[^"]*"\Z')
_BACKSLASH: Final = re.compile(rb"\\")
_NO_KEY: Final = rb'"(?:ciphertext|aad)"\s*:\s*"[^"]*"|"digests"\s*:\s*\[(?:\s*"[0-9A-Za-z+/]{43}="\s*,?)*\s*\]'
"""Base64 that may look like a key: 45 zero bytes are sixty `A`, and a digest of 32 bytes may begin with `mks1`."""
_SAMPLE_OR_KEY: Final = re.compile(_NO_KEY + rb"|((?<![0-9A-Fa-f])[0-9A-Fa-f]{60,}|[Mm][Kk][Ss]1[-0-9A-Za-z \t]{32,})")
"""The text of a share, or of a key, or a few characters less or more, anywhere but in the values of `_NO_KEY`.

A run of digits is tried from its first one only, so that the time does not grow with the length of runs that are too
short.
"""


def take_key(body: memoryview, arena: SecretArena, name: str, *, last: bool = True) -> SecretSlot | None:
    """The key in the member `name`, or None when the body has none. The caller releases the slot. `last`: no other
    secret is taken from this body.

    Raises InvalidRequestError.
    """
    with _spans(body, name, last=last) as spans:
        if not spans:
            return None
        start, stop = spans[0]
        if len(spans) > 1 or stop - start != api.KEY_HEX_CHARS:
            raise InvalidRequestError(f"invalid {name}")
        slot = arena.allocate()
        try:
            hex_decode_into(body[start:stop], slot.view)
        except KeyTextError:
            slot.release()
            raise InvalidRequestError(f"invalid {name}") from None
        return slot


class SecretText:
    """The text of a secret, in slots of the arena. `release` zeroes it."""

    def __init__(self, slots: list[SecretSlot], count: int) -> None:
        self._slots = slots
        self._count = count

    def views(self) -> list[memoryview]:
        """The views of the text's bytes, in order. Not after `release`."""
        whole, rest = divmod(self._count, SLOT_BYTES)
        views = [slot.view for slot in self._slots[:whole]]
        return [*views, self._slots[whole].view[:rest]] if rest else views

    def release(self) -> None:
        """Idempotent."""
        for slot in self._slots:
            slot.release()


def take_text(body: memoryview, arena: SecretArena, name: str, bytes_max: int) -> SecretText | None:
    """The text of the member `name`, or None when the body has none. The caller releases it. It is the last secret that
    is taken from this body.

    Raises InvalidRequestError.
    """
    with _spans(body, name, last=True) as spans:
        if not spans:
            return None
        start, stop = spans[0]
        if len(spans) > 1 or not 0 < stop - start <= bytes_max:
            raise InvalidRequestError(f"invalid {name}")
        slots: list[SecretSlot] = []
        for position in range(start, stop, SLOT_BYTES):
            slots.append(arena.allocate())  # what is in `slots` is zeroed, should the next one fail
            part = body[position : min(stop, position + SLOT_BYTES)]
            slots[-1].view[: len(part)] = part
        return SecretText(slots, stop - start)


@contextlib.contextmanager
def _spans(body: memoryview, name: str, *, last: bool) -> Iterator[list[tuple[int, int]]]:
    """The places of the member's values, without their quotes. At the end of the block they are overwritten, and after
    the last one all text that looks like a secret. At most two are yielded: one too many is refused as a thousand are.
    """
    if _BACKSLASH.search(body) is not None:
        raise InvalidRequestError("the body of this request must not use escapes (no backslash)")
    members = itertools.islice(_member(name).finditer(body), 2)
    spans = [_value_span(body, *match.span(), name) for match in members]
    try:
        yield spans
    finally:
        for start, stop in (*spans, *(_key_like(body) if last else ())):
            body[start:stop] = b"0" * (stop - start)


@functools.cache
def _member(field: str) -> re.Pattern[bytes]:
    return re.compile(rb'"%b"\s*:\s*"[^"]*"' % re.escape(field.encode()))


def _key_like(body: memoryview) -> list[tuple[int, int]]:
    """The positions of text that may be a key under another name."""
    return [match.span(1) for match in _SAMPLE_OR_KEY.finditer(body) if match.start(1) >= 0]


def _value_span(body: memoryview, start: int, stop: int, name: str) -> tuple[int, int]:
    """The position of the text between the quotes of the value, for a field at [start, stop)."""
    value = _VALUE.search(body[start:stop])
    if value is None:
        raise InvalidRequestError(f"invalid {name}")
    return start + value.start() + 1, stop - 1
