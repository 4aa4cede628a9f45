"""What of the log is on disk.

Owns: the bytes written but not yet confirmed, and the wait for the disk. Invariants: `wrote` and `dirty` never wait;
`sync` and `switch` exclude each other, so a descriptor is never closed under a running `fdatasync`. After a failed
`fdatasync` the kernel may have marked the pages clean without having written them (man 2 fsync), so the next `sync`
writes those bytes again, at the same place, before it asks once more; until that has succeeded, `failed` holds and
the log takes no lines.
"""

from __future__ import annotations

import os
import threading
from typing import Final

_COPY_BYTES: Final = 1024 * 1024


class Durability:
    """For one open file at a time; `switch` moves on to the next."""

    def __init__(self, path: str, fd: int, size: int) -> None:
        """`fd` appends to `path`, whose first `size` bytes are taken to be on disk."""
        self._path = path
        self._fd = fd
        self._written = size
        self._synced = size
        self._lock = threading.Lock()
        self.failed = False

    @property
    def dirty(self) -> bool:
        """Whether anything is not known to be on disk."""
        return self._synced < self._written

    def wrote(self, count: int) -> None:
        """`count` more bytes are in the file."""
        self._written += count

    def sync(self) -> None:
        """Return when all that was written before the call is on disk. Raises OSError, and `failed` holds."""
        with self._lock:
            target = self._written
            if target == self._synced:
                return
            try:
                if self.failed:
                    self._write_again(target)
                os.fdatasync(self._fd)
            except OSError:
                self.failed = True
                raise
            self._synced = target
            self.failed = False

    def switch(self, fd: int, size: int) -> None:
        """Go on with a file whose first `size` bytes are on disk; the one before must have been synced."""
        with self._lock:
            os.close(self._fd)
            self._fd = fd
            self._written = self._synced = size

    def close(self) -> None:
        with self._lock:
            os.close(self._fd)

    def _write_again(self, end: int) -> None:
        """Make the pages of the unconfirmed bytes dirty again. Through a descriptor that does not append."""
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            at = self._synced
            while at < end:
                data = os.pread(fd, min(_COPY_BYTES, end - at), at)
                if not data:
                    raise OSError("the log is shorter than what was written")
                os.pwrite(fd, data, at)
                at += len(data)
        finally:
            os.close(fd)
