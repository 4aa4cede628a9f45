"""Stamps: the moment and the order of every stored version.

Owns: the last stamp given out. Invariant: stamps strictly increase, within a process and across restarts (`recover`),
also when the system clock steps back: then the nanoseconds stay and the sequence counts on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

SEQUENCE_MAX: Final = 999_999
"""Six digits in a key."""


class Stamp(NamedTuple):
    """Unix nanoseconds, and a sequence that tells stamps of one nanosecond apart. Its text sorts as it does."""

    ns: int
    seq: int

    @property
    def raw(self) -> bytes:
        return b"%020d-%06d" % self

    @property
    def text(self) -> str:
        return self.raw.decode()

    @classmethod
    def parse(cls, text: str) -> Stamp:
        """Raises ValueError for anything but the text that a stamp has."""
        if (
            len(text) != 27
            or text[20] != "-"
            or not (text[:20].isdecimal() and text[21:].isdecimal() and text.isascii())
        ):
            raise ValueError("not a stamp")
        return cls(int(text[:20]), int(text[21:]))


class Clock:
    def __init__(self, now_ns: Callable[[], int]) -> None:
        self.now_ns = now_ns
        self._ns = 0
        self._seq = 0

    @property
    def last(self) -> Stamp:
        return Stamp(self._ns, self._seq)

    def recover(self, last: Stamp) -> None:
        """Go on after `last`, the highest stamp in the store."""
        if last > self.last:
            self._ns, self._seq = last

    def next(self) -> Stamp:
        now = self.now_ns()
        if now > self._ns:
            self._ns, self._seq = now, 0
        elif self._seq < SEQUENCE_MAX:
            self._seq += 1
        else:
            self._ns, self._seq = self._ns + 1, 0
        return Stamp(self._ns, self._seq)
