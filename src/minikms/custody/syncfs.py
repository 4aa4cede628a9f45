"""`syncfs(2)`: one call that waits for all of a file system, where it can be believed.

Owns: the call, and the judgement whether it reports every failure. Invariant: where that is not known, `reports` says
no, and each file is synced by itself. It must never say yes for a file system that is not on the list.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from typing import Final

_LINUX_MIN: Final = (5, 17)
# linux/magic.h: ext4, XFS, Btrfs, F2FS, tmpfs
_FILE_SYSTEMS: Final = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994})


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def is_strict() -> bool:
    """Whether this kernel's `syncfs` exists and reports every failure."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if os.uname().sysname != "Linux" or release is None:
        return False
    return (int(release[1]), int(release[2])) >= _LINUX_MIN and hasattr(_libc(), "syncfs")


def reports(directory: int) -> bool:
    """Whether `syncfs` on this open directory's file system reports every failure."""
    if not is_strict():
        return False
    # struct statfs begins with the file system's magic number, a long; 256 bytes hold it on every platform.
    buffer = (ctypes.c_long * 32)()
    return _libc().fstatfs(directory, buffer) == 0 and buffer[0] in _FILE_SYSTEMS


def syncfs(directory: int) -> None:
    """Waits until all that was written to the file system is on disk. Raises OSError."""
    if _libc().syncfs(directory) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
