"""A file to which whole lines are appended durably.

Owns: what a step that failed leaves: its lines may not be on the disk, so they are truncated before the file is read or
written again. It must never follow a symbolic link.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager

from minikms.audit.reader import FILE_MODE
from minikms.platform.append_only import write_whole
from minikms.platform.files import closed_after
from minikms.platform.sync import sync_data


class LineFile:
    """Lines are whole: an incomplete last one is removed. For one process only. line_bytes_max: of the longest line."""

    def __init__(self, path: str, *, line_bytes_max: int) -> None:
        self._path = path
        self._tail_bytes = 2 * line_bytes_max
        self._stored: int | None = None
        """Size of the file before a step that failed, until it is truncated to it: its lines may not be on the disk."""

    def last_line(self) -> bytes | None:
        """The last whole line; None without one. Raises OSError."""
        try:
            # O_APPEND: a file whose attributes allow appending only is opened in no other way for writing.
            with self._open(os.O_RDWR | os.O_APPEND) as fd:
                self._truncate(fd)
                size = os.fstat(fd).st_size
                tail = os.pread(fd, self._tail_bytes, max(0, size - self._tail_bytes))
        except FileNotFoundError:
            return None
        lines = tail.split(b"\n")[:-1]
        return lines[-1] if lines else None

    def append(self, lines: Sequence[bytes]) -> None:
        """Adds lines without newlines, durably. Raises OSError; then none of them stays."""
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

    def _open(self, flags: int) -> AbstractContextManager[int]:
        return closed_after(os.open(self._path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE))
