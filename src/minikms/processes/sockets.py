"""The listening Unix socket: where it may be, who may reach it, and when it may be replaced.

Owns the rules, in this order:
1. A socket that the service manager passes (sd_listen_fds(3)) is used as it is. The manager is responsible for its
   path, and this module never removes it. Nothing calls listen(2) on it again: that would replace the credentials that
   clients see (SO_PEERCRED), which are those of the manager, usually root.
2. The socket's directory belongs to this user or root, and nobody else can write in it. A sticky directory such as /tmp
   is refused, because everyone can write in it. The directory may be a symbolic link that belongs to root or this
   user, such as /var/run. The socket itself may not be a symbolic link. A flag asks for a missing directory to be made,
   with mode 0750 and the socket's group: in a volume that containers share, only that group enters it.
3. A process that serves a path holds a lock file beside it until it ends, so that two starting processes can't both
   treat one socket as stale. The caller already holds the lock of its data directory.
4. A socket that refuses a connection with ECONNREFUSED is stale and is removed. Any other socket is in use and is never
   replaced. Anything else at the path is an error. Binding is atomic: it fails when the path exists.
5. The socket is made with mode 0600; its group and mode are changed afterwards, if that is configured.
6. At the end the socket is removed only if the path still holds the socket that this process made.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
import stat
import sys
from collections.abc import Iterator, MutableMapping
from typing import Final, Self

from minikms.api.errors import StartError, StartLaterError
from minikms.platform.activation import passed_socket
from minikms.platform.directory_lock import lock_file, unlock_file
from minikms.platform.files import closed_after

PATH_BYTES_MAX: Final = 107 if sys.platform == "linux" else 103  # sun_path of unix(7), less its NUL
BACKLOG_COUNT: Final = 1024
MODE_DEFAULT: Final = 0o600
DIRECTORY_MODE: Final = 0o750
MAKING_SUFFIX: Final = ".new"
"""The suffix of a directory that is not complete yet."""
LOCK_SUFFIX: Final = ".lock"
PROBE_TIMEOUT_S: Final = 1.0


class UnixListener:
    """A listening, non-blocking Unix socket. `close` removes it from the directory, by the rules above.

    `activated`: the service manager passed it.
    """

    def __init__(self, listener: socket.socket, path: str, entry: _SocketEntry | None) -> None:
        self.socket = listener
        self.path = path
        self._entry = entry
        self._identity = _identity_of(path)

    @property
    def reachable(self) -> bool:
        """Whether the file at the path is still this socket's."""
        return self._identity == _identity_of(self.path)

    @property
    def activated(self) -> bool:
        return self._entry is None

    def close(self) -> None:
        """Idempotent."""
        if self._entry is not None:
            self._entry.close()  # before the socket: its inode number can't be reused while it is open
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listen(
    path: str,
    environ: MutableMapping[str, str],
    *,
    mode: int = MODE_DEFAULT,
    group: str | None = None,
    make_directory: bool = False,
) -> UnixListener:
    """The socket to serve on: the one that the service manager passed, or else a new one at `path`.

    Call it while the process has one thread, because it sets the umask briefly, and while the caller holds the data
    directory's lock.

    Args:
        environ: LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES are removed from it, so that no child inherits them.
        mode: permission bits; connecting needs write permission (unix(7)).
        group: name or number of the group that the socket is to belong to.
        make_directory: make the socket's directory if it is missing.

    Raises:
        StartError: a rule of this module forbids it, or a system call failed. The text gives the reason.
    """
    passed = passed_socket(environ)
    if passed is not None:
        return UnixListener(passed, str(passed.getsockname()), None)
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise StartError(f"the socket path {path} is longer than {PATH_BYTES_MAX} bytes")
    if mode & ~0o777:
        raise StartError(f"the socket mode {mode:o} has more than permission bits")
    gid = _group_id(group)
    try:
        if make_directory:
            _make_directory(os.path.dirname(path), gid)
        entry = _SocketEntry(path)
        try:
            return UnixListener(entry.bind(mode, gid), path, entry)
        except BaseException:
            entry.close()
            raise
    except OSError as error:
        raise StartLaterError(f"the socket {path}: {error.strerror}") from None


class _SocketEntry:
    """The directory entry of one socket. It is checked and locked, and removed by `close`."""

    def __init__(self, path: str) -> None:
        self._path = path
        parent, self._name = os.path.split(path)
        self._made_identity: tuple[int, int] | None = None
        self._directory = _open_directory(parent)
        try:
            self._lock = lock_file(self._directory, self._name + LOCK_SUFFIX, f"the socket {path}")
        except BaseException:
            os.close(self._directory)
            raise
        self._open = True

    def bind(self, mode: int, gid: int | None) -> socket.socket:
        self._remove_stale()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _umask(0o177):
                listener.bind(self._path)
            # Looked up in the checked directory: this fails if the path now leads to another directory.
            self._made_identity = self._identity()
            if gid is not None:
                os.chown(self._name, -1, gid, dir_fd=self._directory, follow_symlinks=False)
            if mode != MODE_DEFAULT:
                os.chmod(self._name, mode, dir_fd=self._directory)
            listener.listen(BACKLOG_COUNT)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        return listener

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        with contextlib.suppress(OSError):  # if the directory is gone, so is the socket
            if self._identity() == self._made_identity:
                os.unlink(self._name, dir_fd=self._directory)
        unlock_file(self._lock)
        os.close(self._directory)

    def _remove_stale(self) -> None:
        """Removes a stale socket. Raises StartError when anything else is at the path."""
        try:
            status = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISLNK(status.st_mode):
            raise StartError(f"{self._path} is a symbolic link: the socket path must not be one")
        if not stat.S_ISSOCK(status.st_mode):
            raise StartError(f"{self._path} exists and is not a socket")
        if _answers(self._path):
            raise StartLaterError(f"another process serves {self._path}")
        os.unlink(self._name, dir_fd=self._directory)

    def _identity(self) -> tuple[int, int]:
        """Device and inode of the file that is at the path now."""
        status = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        return status.st_dev, status.st_ino


def _identity_of(path: str) -> tuple[int, int] | None:
    """Device and inode of the file at the path; None if there is none."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _make_directory(directory: str, gid: int | None) -> None:
    """Makes the socket's directory, unless something is there. It gets its name once its group and mode are set, and
    the next start removes what a kill has left.
    """
    if os.path.lexists(directory):
        return
    temporary = directory + MAKING_SUFFIX
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(temporary)
    os.mkdir(temporary, 0o700)
    with closed_after(_open_directory(temporary)) as descriptor:
        if gid is not None:
            os.fchown(descriptor, -1, gid)
        os.fchmod(descriptor, DIRECTORY_MODE)
        os.rename(temporary, directory)


def _open_directory(parent: str) -> int:
    """A descriptor of the socket's directory, checked by rule 2.

    A link is checked before the directory is opened. Only a user who can write in the directory that holds the link
    could replace it in between.
    """
    trusted = (0, os.geteuid())
    link = os.lstat(parent)
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in trusted:
        raise StartError(f"the socket's directory {parent} is a symbolic link that belongs to uid {link.st_uid}")
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    problem = None
    if status.st_uid not in trusted:
        problem = f"belongs to uid {status.st_uid}"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"has mode {stat.S_IMODE(status.st_mode):04o}, so others can write in it"
    if problem is not None:
        os.close(descriptor)
        raise StartError(
            f"the socket's directory {parent} {problem}: choose a private directory, such as one that "
            "`install -d -m 700 DIRECTORY` makes"
        )
    return descriptor


def _answers(path: str) -> bool:
    """Whether a process may be listening at `path`: false only for ECONNREFUSED, true for any other error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno != errno.ECONNREFUSED
    return True


def _group_id(group: str | None) -> int | None:
    if group is None:
        return None
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise StartError(f"there is no group {group}") from None


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)
