"""Files of the data directory: durable, atomic writes, bounded reads, and the lock on the directory.

Owns: every write below the data directory except those to the journal of changes and the audit log; the wall clock and
the two ways to write a time (both in UTC, both sort as text); the creation of private directories; the lock.
Callers pass the descriptor of an open directory (`open_directory`) and plain file names.

A file is replaced in four steps, always in this order: write a temporary file in the same directory (O_EXCL,
O_NOFOLLOW), sync it, rename it, sync the directory. Invariants:
- Before the rename the old content stands. A failure up to there removes the temporary file and changes nothing.
- If only the last sync fails, the new content is in place but may not survive a power loss. The caller gets the same
  error, and a retry writes the file again.
- After a failed sync the same file is never synced again: the kernel has marked the failed pages clean, so a second
  sync would succeed without them (https://wiki.postgresql.org/wiki/Fsync_Errors). A retry writes a new temporary file.
- Temporary names contain a token of this process (a forked child makes its own), so `sweep_temps` can run while other
  files are being written. A temporary file of this process that could not be removed is remembered for
  `remove_left_temps`.
- One process owns a data directory. Daemon and offline writers take the lock before they touch the keyring or the
  socket, and keep it until they end. `close` unlocks the file, and the kernel does when the process ends: no child
  inherits the descriptor through exec. The lock file is never removed, so there is one file to lock.

A group of files takes two `syncfs(2)` calls instead of two syncs for each file. `syncfs` reports a failed write-back
only since Linux 5.8 (for any file since the directory was opened), and a failure of the file system itself only since
5.17 (commit 5679897eb104); through overlayfs it reports nothing. Where it is not known to report every failure, each
file is synced by itself.

It must never put a path or a text of the kernel into an error that can reach a client, and never hold a raw key.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import os
import re
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple, Self

from minikms.api.errors import InvalidRequestError, StartError, StorageUnavailableError
from minikms.sync import sync_file

DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600
TEMP_PREFIX: Final = ".tmp-"
SYNCFS_FILES_MIN: Final = 4
"""A group of at least this many files uses `syncfs`, which also waits for the writes of other programs."""
GROUP_FILES_MAX: Final = 512
LOCK_NAME: Final = "lock"

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
_READ_BYTES_MIN: Final = 64 * 1024
"""Of one read: a file may say that it has no size."""
_TEMP_NAME: Final = re.compile(re.escape(TEMP_PREFIX) + r"[0-9a-f]{16}-[0-9]+", re.ASCII)
_PID_BYTES_MAX: Final = 20
_temp_numbers: Final = itertools.count()
_process_temp_prefix = ""


def _begin_process() -> None:
    global _process_temp_prefix  # noqa: PLW0603 - one for each process
    _process_temp_prefix = f"{TEMP_PREFIX}{secrets.token_hex(8)}-"


_begin_process()
os.register_at_fork(after_in_child=_begin_process)


# --- the clock --------------------------------------------------------------------------------------------------------


HOUR_NS: Final = 3600 * 1_000_000_000


def now_ns() -> int:
    """The wall clock, in Unix nanoseconds."""
    return time.time_ns()


def rfc3339(ns: int) -> str:
    """`2026-11-24T15:00:00Z` (RFC 3339), from Unix nanoseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ns // 1_000_000_000))


def unix_seconds(text: str) -> int:
    """Unix seconds, from the text that `rfc3339` makes. Raises ValueError."""
    return int(datetime.fromisoformat(text).timestamp())


def stamp(ns: int) -> str:
    """`20261124T150000`, the suffix of a rotation backup, from Unix nanoseconds."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(ns // 1_000_000_000))


def now_rfc3339() -> str:
    """The wall clock as records carry it."""
    return rfc3339(now_ns())


# --- reading ----------------------------------------------------------------------------------------------------------


def open_directory(path: str | os.PathLike[str]) -> int:
    """A descriptor of the directory, which the caller closes. A symbolic link as last component is refused.

    Raises FileNotFoundError if the directory is absent, StorageUnavailableError for any other failure.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageUnavailableError("a directory cannot be opened") from error


def read_file_bounded(path: str | os.PathLike[str], bytes_max: int, *, dir_fd: int | None = None) -> bytes | None:
    """The content of a regular file of at most `bytes_max` bytes; None if there is no such file.

    It must not be used for raw keys, because the bytes can't be zeroed. Symbolic links are not followed, and a FIFO
    does not block. Raises StorageUnavailableError if the file is longer, is not a regular file, or can't be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageUnavailableError("a file cannot be opened") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StorageUnavailableError("a file is not a regular file")
        parts = []
        left = bytes_max + 1
        part_bytes = max(status.st_size + 1, _READ_BYTES_MIN)  # one read, mostly: joining two copies them
        while left > 0 and (part := os.read(fd, min(left, part_bytes))):
            parts.append(part)
            left -= len(part)
    except OSError as error:
        raise StorageUnavailableError("a file cannot be read") from error
    finally:
        os.close(fd)
    if left <= 0:
        raise StorageUnavailableError("a file is longer than the limit for its kind")
    return b"".join(parts)


def read_file_in(directory: str, name: str, bytes_max: int) -> bytes | None:
    """The same, of a file in the directory."""
    descriptor = open_directory(directory)
    try:
        return read_file_bounded(name, bytes_max, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def read_file_of(name: str, bytes_exact: int, *, dir_fd: int) -> bytes | None:
    """The content of a file of exactly `bytes_exact` bytes, in three system calls; None if it is absent, has another
    length, or can't be read.

    For files that are read by the million. For the reason of a failure call `read_file_bounded`.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            content = os.read(fd, bytes_exact + 1)
        finally:
            os.close(fd)
    except OSError:
        return None
    return content if len(content) == bytes_exact else None


# --- writing one file -------------------------------------------------------------------------------------------------


def replace_file(directory: int, name: str, data: bytes) -> None:
    """Makes `data` the content of `name`, durably. Raises StorageUnavailableError."""
    replace_file_from(directory, name, (data,))


def replace_file_from(directory: int, name: str, chunks: Iterable[bytes]) -> None:
    """As `replace_file`, with the content in parts. An error of `chunks` passes through; then nothing has changed."""
    _check_name(name)
    with _storage_errors("a file cannot be written"):
        _rename_temp(directory, _write_temp(directory, chunks, sync=True), name)
        sync_file(directory)


def patch_file(directory: int, name: str, patches: Sequence[tuple[int, bytes]], *, sync: bool) -> None:
    """Overwrites parts of an existing file, (offset, content) each; with `sync`, durably. An absent file stays absent.

    Only for content that stays valid if a crash leaves some of the parts, or some bytes of one, unwritten. Raises
    StorageUnavailableError; then the file must be replaced by a new one.
    """
    _check_name(name)
    with _storage_errors("a file cannot be written"):
        try:
            fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return
        try:
            for offset, data in patches:
                write_all_at(fd, data, offset)
            if sync:
                sync_file(fd)
        finally:
            os.close(fd)


def remove_file(directory: int, name: str) -> bool:
    """Removes `name` durably; False if it was absent. Raises StorageUnavailableError."""
    _check_name(name)
    with _storage_errors("a file cannot be removed"):
        try:
            os.unlink(name, dir_fd=directory)
            found = True
        except FileNotFoundError:
            found = False
        # Even if it is absent: an earlier removal may have failed at this sync.
        sync_file(directory)
    return found


def remove_files(directory: int, names: Sequence[str]) -> None:
    """Removes files durably with one sync; an absent one is no error. Raises StorageUnavailableError."""
    for name in names:
        _check_name(name)
    with _storage_errors("a file cannot be removed"):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
        sync_file(directory)  # even if all are absent: an earlier removal may have failed at this sync


def is_stale_temp(name: str) -> bool:
    """Whether `name` is a temporary file of an earlier process."""
    return (
        name.startswith(TEMP_PREFIX)  # first, for directories of a million other names
        and not name.startswith(_process_temp_prefix)
        and _TEMP_NAME.fullmatch(name) is not None
    )


def sweep_temps(directory: int, *, age_ns_min: int = 0) -> int:
    """Removes the temporary files of earlier processes that are at least this old; the number of them.

    Only for the owner of the directory's lock; `age_ns_min` spares the files of other processes that write in the
    directory without the lock. It reads the whole directory, so a large one takes a worker thread. Raises
    StorageUnavailableError.
    """
    newest_ns = now_ns() - age_ns_min
    with _storage_errors("left-over temporary files cannot be removed"):
        with os.scandir(directory) as entries:
            names = [
                entry.name
                for entry in entries
                if is_stale_temp(entry.name)
                and not entry.is_dir(follow_symlinks=False)
                and (not age_ns_min or entry.stat(follow_symlinks=False).st_mtime_ns <= newest_ns)
            ]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
        if names:
            sync_file(directory)
    return len(names)


def _write_all(fd: int, data: bytes) -> None:
    """Writes all of `data` at the descriptor's position. Raises OSError."""
    count = os.write(fd, data)
    while count < len(data):
        count += os.write(fd, memoryview(data)[count:])


def write_all_at(fd: int, data: bytes, offset: int) -> None:
    """Writes all of `data` at `offset`. Raises OSError."""
    count = os.pwrite(fd, data, offset)
    while count < len(data):
        count += os.pwrite(fd, data[count:], offset + count)


def make_file(directory: int, name: str, data: bytes, *, sync: bool) -> None:
    """Makes a new file; its name is not synced. Raises OSError, FileExistsError if the name is taken; then no file was
    made.
    """
    _check_name(name)
    _write_new(directory, name, (data,), sync=sync)


def overwrite_file(directory: int, name: str, data: bytes, *, sync: bool) -> None:
    """Overwrites a file in place. A crash or a failure may leave any mixture of old and new bytes, so a journal must
    hold the contents. A file with several links or another length is replaced by rename; an absent one stays absent.
    Raises OSError; then the file must be replaced by a new one.
    """
    _check_name(name)
    try:
        fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return
    try:
        status = os.fstat(fd)
        in_place = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size == len(data)
        if in_place:
            write_all_at(fd, data, 0)
            if sync:
                sync_file(fd)
    finally:
        os.close(fd)
    if not in_place:
        _rename_temp(directory, _write_temp(directory, (data,), sync=sync), name)


def _rename_temp(directory: int, temp: str, name: str) -> None:
    try:
        os.rename(temp, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        _unlink_quietly(directory, temp)
        raise


def _write_temp(directory: int, chunks: Iterable[bytes], *, sync: bool) -> str:
    name = f"{_process_temp_prefix}{next(_temp_numbers)}"
    _write_new(directory, name, chunks, sync=sync)
    return name


def _write_new(directory: int, name: str, chunks: Iterable[bytes], *, sync: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, FILE_MODE, dir_fd=directory)
    try:
        try:
            for chunk in chunks:
                _write_all(fd, chunk)
            if sync:
                sync_file(fd)
        finally:
            os.close(fd)
    except BaseException:
        _unlink_quietly(directory, name)
        raise


def _check_name(name: str) -> None:
    if _FILE_NAME.fullmatch(name) is None or name in {".", ".."} or name.startswith(TEMP_PREFIX):
        raise InvalidRequestError("not a plain file name")


def _unlink_quietly(directory: int, name: str) -> None:
    # Best effort after a failure; `remove_left_temps` or the next start removes what is left.
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
    except OSError:
        if name.startswith(TEMP_PREFIX):
            _remember_temp(directory, name)


class _LeftTemps(NamedTuple):
    """Temporary files that could not be removed, in an open directory."""

    directory: int
    names: set[str]


_left_temps: Final[dict[tuple[int, int], _LeftTemps]] = {}
"""By device and inode of the directory."""
_left_temps_lock: Final = threading.Lock()


def _remember_temp(directory: int, name: str) -> None:
    status = os.fstat(directory)
    with _left_temps_lock:
        place = (status.st_dev, status.st_ino)
        if place not in _left_temps:
            _left_temps[place] = _LeftTemps(os.dup(directory), set())
        _left_temps[place].names.add(name)


def remove_left_temps() -> None:
    """Removes the temporary files of this process whose removal failed, durably. They may hold the contents of many
    files. Raises StorageUnavailableError while that fails.
    """
    with _left_temps_lock, _storage_errors("left-over temporary files cannot be removed"):
        for place, left in list(_left_temps.items()):
            for name in left.names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=left.directory)
            sync_file(left.directory)
            del _left_temps[place]
            os.close(left.directory)


@contextlib.contextmanager
def _storage_errors(text: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Without its traceback: it leads to frames that hold what was to be written.
        raise StorageUnavailableError(text) from error.with_traceback(None)


# --- writing groups of files ------------------------------------------------------------------------------------------

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
        raise OSError(number, os.strerror(number))


class FileWrite(NamedTuple):
    """One file of a group."""

    name: str
    data: bytes


def write_files(directory: int, writes: Sequence[FileWrite]) -> None:
    """Replaces a group of files, durably: all temporary files, one sync, all renames, one sync. Blocks on the disk. The
    last sync includes the directory, even if there are no writes.

    Raises StorageUnavailableError. Then each file is whole: the old one or the new one.
    """
    for write in writes:
        _check_name(write.name)
    temps: deque[str] = deque()
    by_syncfs = len(writes) >= SYNCFS_FILES_MIN and syncfs_reports(directory)
    with _storage_errors("files cannot be written"):
        try:
            for write in writes:
                temps.append(_write_temp(directory, (write.data,), sync=not by_syncfs))
            if by_syncfs:
                syncfs(directory)
            for write in writes:
                os.rename(temps[0], write.name, src_dir_fd=directory, dst_dir_fd=directory)
                temps.popleft()
        finally:
            for temp in temps:
                _unlink_quietly(directory, temp)
        if by_syncfs:
            syncfs(directory)
        else:
            sync_file(directory)


# --- the data directory and its lock ----------------------------------------------------------------------------------


class InUseError(StartError):
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
        StartError: the directory is not private to this user, or can't be opened.
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
        except OSError as error:
            raise StartError(f"the data directory {self.directory}: {error.strerror}") from None
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
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def _open_private_directory(path: str) -> int:
    """A descriptor of the directory. Raises OSError, and StartError if another user has any access to it."""
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
