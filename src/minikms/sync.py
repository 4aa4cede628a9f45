"""Waiting for the disk, on each kind of system.

Owns: the choice of the call that makes written data survive a power loss. Linux: fdatasync(2) and fsync(2). macOS:
`fcntl(F_FULLFSYNC)`, because its fsync(2) leaves the data in the cache of the drive, and it has no fdatasync. Other
systems without fdatasync: fsync(2). Invariant: a wait that fails raises OSError; there is no weaker call to fall back
to. It must never return before the system says that the data is on the disk.
"""

from __future__ import annotations

import fcntl
import os


def sync_data(descriptor: int) -> None:
    """Wait for the data of a file, and for the size that is needed to read it. Raises OSError."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        sync_file(descriptor)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def sync_file(descriptor: int) -> None:
    """Wait for a file with its metadata, or for a directory with its entries. Raises OSError."""
    full: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(descriptor)
    else:
        fcntl.fcntl(descriptor, full)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Wait for the entries of a directory: what was created, renamed or removed in it. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)
