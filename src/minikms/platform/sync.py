"""Waiting for the disk, on each kind of system.

Owns: the choice of the call that makes written data survive a power loss. Linux: fdatasync(2) and fsync(2). macOS:
`fcntl(F_FULLFSYNC)`, because its fsync(2) leaves the data in the cache of the drive, and it has no fdatasync. Other
systems without fdatasync: fsync(2). For a group of files, syncfs(2), which reports a failed write-back only since Linux
5.8 (for any file since the directory was opened), and a failure of the file system itself only since 5.17 (commit
5679897eb104); through overlayfs it reports nothing. `syncfs_reports` says where it reports every failure.
Invariant: a wait that fails raises OSError, which names the file; there is no weaker call to fall back to. It must
never return before the system says that the data is on the disk.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import re
from typing import Final


def sync_data(descriptor: int) -> None:
    """Wait for the data of a file, and for the size that is needed to read it. Raises OSError."""
    if hasattr(fcntl, "F_FULLFSYNC") or not hasattr(os, "fdatasync"):
        sync_file(descriptor)
        return
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        raise _named(error, descriptor) from None


def sync_file(descriptor: int) -> None:
    """Wait for a file with its metadata, or for a directory with its entries. Raises OSError."""
    full: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    try:
        if full is None:
            os.fsync(descriptor)
        else:
            fcntl.fcntl(descriptor, full)
    except OSError as error:
        raise _named(error, descriptor) from None


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Wait for the entries of a directory: what was created, renamed or removed in it. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def _named(error: OSError, descriptor: int) -> OSError:
    """The error of a wait, which the system gives no name, with the path of the file where /proc has it."""
    try:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        path = None
    return OSError(error.errno, f"{error.strerror}, at its sync", path)


_SYNCFS_LINUX_MIN: Final = (5, 17)
# linux/magic.h: ext4, XFS, Btrfs, F2FS, tmpfs
_SYNCFS_FILE_SYSTEMS: Final = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994})


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def syncfs_is_strict() -> bool:
    """Whether this kernel has a `syncfs` that reports every failure."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if os.uname().sysname != "Linux" or release is None:
        return False
    return (int(release[1]), int(release[2])) >= _SYNCFS_LINUX_MIN and hasattr(_libc(), "syncfs")


def syncfs_reports(directory: int) -> bool:
    """Whether `syncfs` on the file system of this open directory is known to report every failure."""
    if not syncfs_is_strict():
        return False
    # struct statfs begins with the magic number of the file system, a long; 256 bytes hold it on every platform.
    buffer = (ctypes.c_long * 32)()
    return _libc().fstatfs(directory, buffer) == 0 and buffer[0] in _SYNCFS_FILE_SYSTEMS


def syncfs(directory: int) -> None:
    """Returns when everything that was written to the file system is on disk. Raises OSError."""
    if _libc().syncfs(directory) != 0:
        number = ctypes.get_errno()
        raise _named(OSError(number, os.strerror(number)), directory)
