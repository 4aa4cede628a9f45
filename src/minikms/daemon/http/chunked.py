"""The chunked transfer coding of RFC 9112 section 7.1, the strict subset that the service accepts.

Owns: decoding a chunked body into one contiguous, wipeable buffer. Rules:
- chunk = 1 to 8 hexadecimal digits, CR LF, that many bytes, CR LF; the last chunk has size 0 and is followed by CR LF.
- No chunk extension, no trailer, no white space, no bare CR or LF: else refused, at the first byte that
  shows it.
- The body and the number of chunks are bounded.
Pure: bytes in, bytes out, no socket and no clock. It must never hold a copy of the body that it does not wipe.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from minikms.daemon.http.limits import CHUNK_SIZE_DIGITS_MAX, Limits
from minikms.daemon.http.receive import Budget, ReceiveBuffer
from minikms.daemon.http.refusals import BAD_CHUNK, BODY_TOO_LARGE, TOO_MANY_CHUNKS, RefusedError

_CR: Final = 0x0D
_LF: Final = 0x0A
_HEX: Final = {ord(digit): int(digit, 16) for digit in "0123456789abcdefABCDEF"}
_CAPACITY_BYTES_MIN: Final = 4096


class _At(IntEnum):
    """What the next byte must be."""

    SIZE = 0
    SIZE_LF = 1
    DATA = 2
    DATA_CR = 3
    DATA_LF = 4
    LAST_CR = 5
    LAST_LF = 6
    DONE = 7


_NEXT: Final = {
    _At.SIZE_LF: (_LF, _At.DATA),
    _At.DATA_CR: (_CR, _At.DATA_LF),
    _At.DATA_LF: (_LF, _At.SIZE),
    _At.LAST_CR: (_CR, _At.LAST_LF),
    _At.LAST_LF: (_LF, _At.DONE),
}
"""The states with exactly one acceptable byte, and where it leads (SIZE_LF of a zero-size chunk leads to LAST_CR)."""


class ChunkedDecoder:
    """Decodes one body. After `RefusedError` only `wipe` may be called."""

    __slots__ = ("_at", "_body_bytes_max", "_buffer", "_chunks", "_chunks_count_max", "_digits", "_size")

    def __init__(self, limits: Limits, budget: Budget) -> None:
        self._body_bytes_max = limits.body_bytes_max
        self._chunks_count_max = limits.chunks_count_max
        self._buffer = ReceiveBuffer(_CAPACITY_BYTES_MIN, budget)
        self._at = _At.SIZE
        self._size = 0
        self._digits = 0
        self._chunks = 0

    @property
    def complete(self) -> bool:
        return self._at is _At.DONE

    def feed(self, data: memoryview) -> int:
        """Decode from `data`; returns how many bytes of it belong to this body (all of them until `complete`).

        Raises `RefusedError` for malformed framing (400), too large a body or too many chunks (413).
        """
        position = 0
        end = len(data)
        while position < end and self._at is not _At.DONE:
            if self._at is _At.DATA:
                taken = min(self._size, end - position)
                self._take(data[position : position + taken])
                position += taken
                continue
            byte = data[position]
            position += 1
            if self._at is _At.SIZE:
                self._size_byte(byte)
                continue
            expected, after = _NEXT[self._at]
            if byte != expected:
                raise RefusedError(BAD_CHUNK)
            if after is _At.DATA and self._size == 0:
                after = _At.LAST_CR
            elif after is _At.SIZE:
                self._digits = 0
            self._at = after
        return position

    def body(self) -> memoryview:
        """The decoded body; valid until `wipe`."""
        return self._buffer.view[: self._buffer.filled]

    def wipe(self) -> None:
        """Zero the body and give its memory back."""
        self._buffer.wipe()

    def _size_byte(self, byte: int) -> None:
        digit = _HEX.get(byte)
        if digit is not None and self._digits < CHUNK_SIZE_DIGITS_MAX:
            self._size = self._size * 16 + digit if self._digits else digit
            self._digits += 1
            return
        if digit is not None or byte != _CR or self._digits == 0:
            raise RefusedError(BAD_CHUNK)
        if self._buffer.filled + self._size > self._body_bytes_max:
            raise RefusedError(BODY_TOO_LARGE)
        self._chunks += 1
        if self._chunks > self._chunks_count_max:
            raise RefusedError(TOO_MANY_CHUNKS)
        self._at = _At.SIZE_LF

    def _take(self, part: memoryview) -> None:
        needed = self._buffer.filled + len(part)
        if needed > self._buffer.capacity:
            capacity = min(max(needed, 2 * self._buffer.capacity), self._body_bytes_max)
            self._buffer = self._buffer.moved(0, capacity)
        self._buffer.append(part)
        self._size -= len(part)
        if self._size == 0:
            self._at = _At.DATA_CR
