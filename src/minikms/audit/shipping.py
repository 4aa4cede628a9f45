"""Forwarding of log lines to another place, which an intruder on this machine can't alter afterwards.

Owns: the `Forwarder` protocol, which each transport implements, the loop that feeds a forwarder, and the forwarder to a
file. Invariants: lines arrive in order, each at least once; a step asks the receiver for its position, so that a crash
on either side repeats at most the last step; only committed lines are sent. It runs in a worker thread, and the log
never waits for it. It must never change a line, nor drop one silently.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from minikms.audit import record
from minikms.audit.reader import FILE_MODE, LINES_AT_A_TIME, DamagedSegmentError, Follower
from minikms.platform.append_only import write_whole
from minikms.platform.sync import sync_data


class Forwarder(Protocol):
    """A transport for lines. Its methods raise OSError if they can't reach the receiver; the step is then repeated."""

    @property
    def write_paths(self) -> tuple[str, ...]:
        """Directories that the hardened process must still be able to write in."""
        return ()

    def position(self) -> int:
        """`seq` of the last line that the receiver has, 0 for none."""
        ...

    def deliver(self, lines: Sequence[bytes]) -> None:
        """Send lines, in order and without newlines. Return when the receiver has stored them durably."""
        ...


class Forwarding:
    """Sends the lines of the log in `directory` to a forwarder."""

    def __init__(self, directory: str, forwarder: Forwarder) -> None:
        self._directory = directory
        self._forwarder = forwarder
        self._follower: Follower | None = None
        self._held: list[bytes] = []

    def step(self, head_seq: int) -> int:
        """Send up to `LINES_AT_A_TIME` lines up to `head_seq`, the log's committed head. Returns how many were sent.

        Call it again at once while it returns more than 0. Raises OSError and DamagedSegmentError; after an OSError the
        next call asks the forwarder for its position again.
        """
        if self._follower is None:
            position = self._forwarder.position()
            if position > head_seq:
                raise DamagedSegmentError(
                    f"the copy has line {position} and the audit log ends at line {head_seq}: run "
                    "`minikms audit verify`, and forward to an empty copy"
                )
            self._follower = Follower(self._directory, after_seq=position)
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


class FileForwarder(Forwarder):
    """Appends to a file, for example on another disk, after removing an incomplete last line. For one process only.

    line_bytes_max: of the longest line, where those are not of the log itself; the position is 0 then.
    """

    def __init__(self, path: str, *, line_bytes_max: int = record.LINE_BYTES_MAX) -> None:
        self._path = path
        self._tail_bytes = 2 * line_bytes_max
        self._stored: int | None = None
        """Size of the file before a step that failed, until it is truncated to it: its lines may not be on the disk."""

    @property
    def write_paths(self) -> tuple[str, ...]:
        return (os.path.dirname(os.path.abspath(self._path)),)

    def position(self) -> int:
        return max(map(record.peek_seq, self._whole_lines()), default=0)

    def last_line(self) -> bytes | None:
        """The last whole line of the file; None without one. Raises OSError."""
        lines = self._whole_lines()
        return lines[-1] if lines else None

    def _whole_lines(self) -> list[bytes]:
        """The lines at the end of the file. The beginning of the first one may be missing."""
        try:
            # O_APPEND: a file whose attributes allow appending only is opened in no other way for writing.
            with self._open(os.O_RDWR | os.O_APPEND) as fd:
                self._truncate(fd)
                size = os.fstat(fd).st_size
                tail = os.pread(fd, self._tail_bytes, max(0, size - self._tail_bytes))
        except FileNotFoundError:
            return []
        return tail.split(b"\n")[:-1]

    def deliver(self, lines: Sequence[bytes]) -> None:
        blob = b"".join([line + b"\n" for line in lines])
        with self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT) as fd:
            self._truncate(fd)
            size = os.fstat(fd).st_size
            tail = os.pread(fd, self._tail_bytes, max(0, size - self._tail_bytes))
            whole = size - (len(tail) - tail.rfind(b"\n") - 1)
            if whole < size:
                os.ftruncate(fd, whole)
            try:
                write_whole(fd, blob)
                sync_data(fd)
            except OSError:
                self._stored = whole
                self._truncate(fd)
                raise

    def _truncate(self, fd: int) -> None:
        if self._stored is not None:
            os.ftruncate(fd, min(self._stored, os.fstat(fd).st_size))  # smaller: another file was put in its place
            self._stored = None

    @contextlib.contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        fd = os.open(self._path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            yield fd
        finally:
            os.close(fd)
