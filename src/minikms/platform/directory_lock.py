"""The ownership of a data directory, and private directories.

Owns: the lock file, the checks of who may enter the directory, and the creation of private directories. Invariants: one
process owns a data directory. Daemon and offline writers take the lock before they touch the keyring or the socket, and
keep it until they end. `close` unlocks the file, and the kernel does when the process ends: no child inherits the
descriptor through exec. It must never remove the lock file, so that there is one file to lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Final, Self

from minikms.api.errors import StartError, StartLaterError
from minikms.platform.files import FILE_MODE, closed_after, denied_private
from minikms.platform.sync import sync_file

DIRECTORY_MODE: Final = 0o700
LOCK_NAME: Final = "lock"
_PID_BYTES_MAX: Final = 20


class InUseError(StartLaterError):
    """Another process holds the lock. `pid` is None if the holder has not written it yet."""

    def __init__(self, what: str, pid: int | None) -> None:
        holder = "" if pid is None else f" (pid {pid})"
        super().__init__(f"another process{holder} owns {what}")
        self.pid = pid


class DataDirLock:
    """The exclusive ownership of a data directory, from construction to `close`.

    A missing directory is created, 0700, with its missing parents; each is durable in its parent.

    Raises:
        InUseError: another process owns the directory; the text has its pid.
        StartError: the directory is not private to this user; StartLaterError: the disk refuses it.
    """

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        try:
            make_private_directory(self.directory)
            self.directory_fd = _open_private_directory(self.directory)
            try:
                self._descriptor = lock_file(self.directory_fd, LOCK_NAME, self.directory)
            except BaseException:
                os.close(self.directory_fd)
                raise
        except PermissionError:
            place = os.path.join(self.directory, LOCK_NAME)
            raise StartError(f"the data directory can't be used: {denied_private(place)}") from None
        except OSError as error:
            raise StartLaterError(f"the data directory {self.directory}: {error.strerror}") from None
        self._held: list[int] = []
        self._open = True

    def hold(self, descriptor: int) -> None:
        """Keeps another lock of `lock_file` until `close`, which releases it first."""
        self._held.append(descriptor)

    def close(self) -> None:
        """Releases the directory. Idempotent."""
        if self._open:
            self._open = False
            for descriptor in (*self._held, self._descriptor):
                unlock_file(descriptor)
            os.close(self.directory_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_owned(directory: str) -> bool:
    """Whether a process owns the data directory. A start in the same instant may find it owned by this one. Raises
    OSError.
    """
    try:
        descriptor = os.open(os.path.join(directory, LOCK_NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def make_private_directory(path: str) -> None:
    """Creates `path` (absolute) and its missing parents, 0700, and syncs each directory that got an entry."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_private_directory(parent)
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except FileExistsError:  # another process created it, or it is not a directory: then opening it fails
        return
    with closed_after(os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
        sync_file(descriptor)


def _open_private_directory(path: str) -> int:
    """A descriptor of the directory. Raises OSError, and StartError if another user has any access to it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        os.close(descriptor)
        raise StartError(
            f"the directory {path} belongs to uid {status.st_uid}, not to uid {os.geteuid()}: chown "
            "it, or run this as that user"
        )
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        os.close(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        raise StartError(f"the directory {path} has mode {mode:04o}: others must have no access (chmod 0700)")
    return descriptor


def lock_file(directory_fd: int, name: str, what: str) -> int:
    """Locks the file `name`, created 0600 if missing, and writes our pid into it; the descriptor that holds the lock.

    Args:
        directory_fd: the directory of the file. No other user may be able to write in it.
        what: what the lock protects, for the error text.

    Raises:
        InUseError: another process holds the lock.
        OSError: the file cannot be created or opened. A symbolic link is not followed.
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
            error.filename = name
            raise
        raise InUseError(what, holder) from None
    return descriptor


def unlock_file(descriptor: int) -> None:
    """Ends the lock that `lock_file` took, and closes its descriptor.

    Closing alone is not enough: a child that another thread has forked, and that has not called exec yet, has a copy of
    the descriptor, and the lock lasts until that is closed too (flock(2)).
    """
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _holder(descriptor: int) -> int | None:
    text = os.pread(descriptor, _PID_BYTES_MAX, 0).strip()
    return int(text) if text.isdigit() else None
