"""Memory that requests are received into, and zeroed afterwards.

Owns: the allocation, growth and wiping of receive buffers, and the sum of what they hold. Invariants: a buffer grows by
allocate, copy, zero, never by `bytearray` resizing (which leaves the old block on the heap as it was); every byte that
was received is zeroed before its memory is given back. No parsing here.
"""

from __future__ import annotations

from typing import Final

from minikms.daemon.http.refusals import OVERLOADED, RefusedError

_ZEROS: Final = memoryview(bytes(64 * 1024))


def wipe(view: memoryview) -> None:
    """Zero all bytes of a writable view, without a temporary of its size."""
    step = len(_ZEROS)
    for start in range(0, len(view), step):
        part = view[start : start + step]
        part[:] = _ZEROS[: len(part)]


class Budget:
    """How many bytes all buffers of a server hold together, and may."""

    __slots__ = ("bytes_held", "bytes_max")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes_held = 0

    def take(self, count: int) -> None:
        """Raises `RefusedError` (503) when the sum would pass the bound."""
        if self.bytes_held + count > self.bytes_max:
            raise RefusedError(OVERLOADED)
        self.bytes_held += count

    def give(self, count: int) -> None:
        self.bytes_held -= count


class ReceiveBuffer:
    """A fixed block of `capacity` bytes of which the first `filled` hold received data."""

    __slots__ = ("_budget", "capacity", "data", "filled", "view")

    def __init__(self, capacity: int, budget: Budget) -> None:
        """Raises `RefusedError` when the budget is spent."""
        budget.take(capacity)
        self._budget = budget
        self.capacity = capacity
        self.data = bytearray(capacity)
        self.view = memoryview(self.data)
        self.filled = 0

    def append(self, part: memoryview) -> None:
        """Copy `part` behind what is there; the caller has made room."""
        end = self.filled + len(part)
        self.view[self.filled : end] = part
        self.filled = end

    def room(self) -> memoryview:
        """The unfilled rest, to receive into."""
        return self.view[self.filled :]

    def moved(self, start: int, capacity: int) -> ReceiveBuffer:
        """A new buffer that begins with this one's bytes from `start` on. This one is wiped, also on failure."""
        try:
            new = ReceiveBuffer(capacity, self._budget)
            new.append(self.view[start : self.filled])
        finally:
            self.wipe()
        return new

    def wipe(self) -> None:
        """Zero what was received and give the bytes back to the budget. The buffer is not used again."""
        wipe(self.view[: self.filled])
        self.filled = 0
        self._budget.give(self.capacity)
        self.capacity = 0
