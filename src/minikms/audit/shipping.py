"""Sending lines elsewhere, so that who owns this machine can't take them back.

Owns: the forwarder protocol, the loop's one step, and the forwarder to a file. Invariants: lines arrive in order,
each at least once; the receiver's position is asked, never assumed, so that a crash on either side repeats at most
the last step; only lines that the log has committed are sent. For a worker thread: the log never waits for it. It
must never change a line, nor drop one silently.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from minikms.audit import record
from minikms.audit.reader import FILE_MODE, LINES_AT_A_TIME, Follower
from minikms.audit.recovery import write_whole

_TAIL_BYTES: Final = 2 * record.LINE_BYTES_MAX


class Forwarder(Protocol):
    """Where lines go. Both methods raise OSError when the other side can't be reached: the step is then tried again."""

    def position(self) -> int:
        """seq of the last line that arrived, 0 for none."""
        ...

    def deliver(self, lines: Sequence[bytes]) -> None:
        """Take lines (without newlines, in order); return when they are safe there."""
        ...


class Forwarding:
    """Keeps a forwarder up with the log in `directory`."""

    def __init__(self, directory: str, forwarder: Forwarder) -> None:
        self._directory = directory
        self._forwarder = forwarder
        self._follower: Follower | None = None
        self._held: list[bytes] = []

    def step(self, head_seq: int) -> int:
        """Send up to 1,000 lines that are not after `head_seq`, the log's committed head; how many were sent.

        To be called again at once while it answers more than 0. Raises OSError; the next call begins anew.
        """
        if self._follower is None:
            self._follower = Follower(self._directory, after_seq=self._forwarder.position())
        try:
            lines = self._held or self._follower.read(LINES_AT_A_TIME)
            ready = [line for line in lines if record.peek_seq(line) <= head_seq]
            if ready:
                self._forwarder.deliver(ready)
        except OSError:
            self.close()
            raise
        self._held = lines[len(ready) :]
        return len(ready)

    def close(self) -> None:
        if self._follower is not None:
            self._follower.close()
        self._follower = None
        self._held = []


class FileForwarder:
    """Appends to a file, on another disk say. One process at a time; an incomplete last line of its own is cut off."""

    def __init__(self, path: str) -> None:
        self._path = path

    def position(self) -> int:
        try:
            with self._open(os.O_RDONLY) as fd:
                size = os.fstat(fd).st_size
                tail = os.pread(fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        except FileNotFoundError:
            return 0
        return max((record.peek_seq(line) for line in tail.split(b"\n")[:-1]), default=0)

    def deliver(self, lines: Sequence[bytes]) -> None:
        blob = b"".join([line + b"\n" for line in lines])
        with self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT) as fd:
            size = os.fstat(fd).st_size
            tail = os.pread(fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
            whole = size - (len(tail) - tail.rfind(b"\n") - 1)
            if whole < size:
                os.ftruncate(fd, whole)
            try:
                write_whole(fd, blob)
                os.fdatasync(fd)
            except OSError:
                os.ftruncate(fd, whole)
                raise

    @contextlib.contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        fd = os.open(self._path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            yield fd
        finally:
            os.close(fd)
