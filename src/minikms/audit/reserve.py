"""Disk space kept back, so that a full disk leaves room to record that it is full.

Owns: the reserve file. Invariants: its blocks are really allocated; it gives them back step by step, only as many as
the log needs, since anyone on a full disk may take what it frees. It must never hold content, nor fail a start.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from minikms.audit.segments import FILE_MODE

RESERVE_NAME: Final = "minikms-audit.reserve"
RESERVE_BYTES: Final = 4 * 1024 * 1024
"""About 16,000 lines: minutes of a person's work, or long enough to see the alarm."""
RELEASE_BYTES: Final = 64 * 1024


class Reserve:
    """The reserve file of one directory. Every method answers whether it did what its name says; none raises
    OSError.
    """

    def __init__(self, directory: str, size: int = RESERVE_BYTES) -> None:
        self._path = os.path.join(directory, RESERVE_NAME)
        self._size = size
        self.left_bytes = 0
        with contextlib.suppress(OSError):
            held = os.lstat(self._path)
            self.left_bytes = min(held.st_size, held.st_blocks * 512)

    @property
    def full(self) -> bool:
        return self.left_bytes >= self._size

    def fill(self) -> bool:
        """Take the space, again where some was given back. False when the disk does not have it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self._path, flags, FILE_MODE)
        except OSError:
            return False
        try:
            if self._size:
                os.posix_fallocate(fd, 0, self._size)
            os.ftruncate(fd, self._size)
        except OSError:
            # What a failed allocation took goes back; what was held before stays held.
            with contextlib.suppress(OSError):
                os.ftruncate(fd, self.left_bytes)
            return False
        finally:
            os.close(fd)
        self.left_bytes = self._size
        return True

    def release(self) -> bool:
        """Give back the next step of the space. False when nothing is left."""
        left = max(0, self.left_bytes - RELEASE_BYTES)
        if self.left_bytes == 0:
            return False
        try:
            os.truncate(self._path, left)
        except OSError:
            self.left_bytes = 0
            return False
        self.left_bytes = left
        return True
