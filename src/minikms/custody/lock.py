"""One process owns a data directory.

Owns: the directory's making and the judgement whether it is private, and the lock on it. Invariants: the lock is taken
before the keyring or the socket is touched, by the daemon and by offline writers alike, and held until the owner ends,
however it ends (`flock(2)` goes with the descriptor, which no child inherits through exec). The lock file is never
removed, so that there is one file to lock. This module never looks at what is in the directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Final, Self

from minikms.errors import StartError

LOCK_NAME: Final = "lock"
DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600
_PID_BYTES_MAX: Final = 20


class InUseError(StartError):
    """Another process holds the lock."""


class DataDirLock:
    """The exclusive ownership of a data directory, from construction to `close`.

    A missing directory is made, 0700, its missing parents too, each durable in its own parent.

    Raises:
        InUseError: another process owns it (its pid is named).
        StartError: the directory is not private to this user.
    """

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        try:
            make_private_directory(self.directory)
            self.directory_fd = open_private_directory(self.directory)
            try:
                self._descriptor = lock_file(self.directory_fd, LOCK_NAME, self.directory)
            except BaseException:
                os.close(self.directory_fd)
                raise
        except OSError as error:
            raise StartError(f"the data directory {self.directory}: {error.strerror}") from None
        self._open = True

    def close(self) -> None:
        """Give the directory up. Idempotent."""
        if self._open:
            self._open = False
            os.close(self._descriptor)
            os.close(self.directory_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_private_directory(path: str) -> None:
    """Make `path` (absolute) and its missing parents, 0700; fsync each directory that got an entry."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_private_directory(parent)
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except FileExistsError:  # made by another starter meanwhile, or not a directory: opening it tells
        return
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_private_directory(path: str) -> int:
    """A descriptor of the directory.

    Raises:
        StartError: it belongs to another user, or its group or others have any access.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        os.close(descriptor)
        raise StartError(f"the directory {path} belongs to uid {status.st_uid}, not to uid {os.geteuid()}")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        os.close(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        raise StartError(f"the directory {path} has mode {mode:04o}: others must have no access (chmod 0700)")
    return descriptor


def lock_file(directory_fd: int, name: str, what: str) -> int:
    """Lock the file `name`, made 0600 if missing, and write our pid into it; the descriptor that holds the lock.

    Args:
        directory_fd: of the directory that holds it, writable by no other user.
        what: the thing that the lock stands for, for the error text.

    Raises:
        InUseError: another process holds it.
        OSError: the file cannot be made or opened; a symbolic link in its place is not followed.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, FILE_MODE, dir_fd=directory_fd)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except OSError as error:
        holder = _holder(descriptor)
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise InUseError(f"another process{holder} owns {what}") from None
    return descriptor


def _holder(descriptor: int) -> str:
    """` (pid N)`, or nothing when the holder has not written it yet."""
    text = os.pread(descriptor, _PID_BYTES_MAX, 0).strip()
    return f" (pid {int(text)})" if text.isdigit() else ""
