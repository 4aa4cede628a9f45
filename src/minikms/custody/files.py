"""The wall clock of the data directory's files.

Owns: the two ways in which a time is written. Invariant: both are UTC and sort as text.

`syncfs(2)`: one call that waits for all of a file system, where it can be believed.

Owns: the call, and the judgement whether it reports every failure. Invariant: where that is not known, `reports` says
no, and each file is synced by itself. It must never say yes for a file system that is not on the list.

Files that are replaced whole or not at all, and are on the disk before anybody is told.

Owns: every write below the data directory but the appends of the lease journal and the audit log. Callers pass an open
directory (`open_directory`) and plain names in it.

The steps, always in this order: write a temporary file of the same directory (O_EXCL, O_NOFOLLOW), sync it, rename it,
sync the directory. Invariants:
- Until the rename the old content stands; a failure before it unlinks the temporary file and changes nothing.
- If only the last sync fails, the new content is in place but may not survive a power loss. The error is the same; a
  retry writes it again.
- After a failed sync the same file is never synced again: the kernel marks the failed pages clean, so that the second
  sync would succeed without them (https://wiki.postgresql.org/wiki/Fsync_Errors). A retry is a new temporary file.
- Temporary names carry a token of this process, so that `sweep_temps` can run while others are being written.
It must never put a path or the kernel's text into an error, and never hold raw key material.

A group of files costs two `syncfs(2)` instead of two syncs per file; in a series of groups, one. That reports a failed
write-back only on Linux since 5.8 (for any file since the directory was opened), a failure of the file system itself
only since 5.17 (commit 5679897eb104), and through overlayfs not at all; anywhere else each file is synced by itself.

One process owns a data directory.

Owns: the directory's making and the judgement whether it is private, and the lock on it. Invariants: the lock is taken
before the keyring or the socket is touched, by the daemon and by offline writers alike, and held until the owner ends,
however it ends (`flock(2)` goes with the descriptor, which no child inherits through exec). The lock file is never
removed, so that there is one file to lock. This module never looks at what is in the directory.
"""

from __future__ import annotations

import asyncio
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
import time
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Final, NamedTuple, Self

from minikms.errors import ConflictError, InvalidRequestError, MiniKmsError, StartError, StorageUnavailableError


def now_ns() -> int:
    return time.time_ns()


def rfc3339(ns: int) -> str:
    """`2026-11-24T15:00:00Z` (RFC 3339), from Unix nanoseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ns // 1_000_000_000))


def stamp(ns: int) -> str:
    """`20261124T150000`, the suffix of a backup, from Unix nanoseconds."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(ns // 1_000_000_000))


_LINUX_MIN: Final = (5, 17)
# linux/magic.h: ext4, XFS, Btrfs, F2FS, tmpfs
_FILE_SYSTEMS: Final = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994})


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def syncfs_is_strict() -> bool:
    """Whether this kernel's `syncfs` exists and reports every failure."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if os.uname().sysname != "Linux" or release is None:
        return False
    return (int(release[1]), int(release[2])) >= _LINUX_MIN and hasattr(_libc(), "syncfs")


def syncfs_reports(directory: int) -> bool:
    """Whether `syncfs` on this open directory's file system reports every failure."""
    if not syncfs_is_strict():
        return False
    # struct statfs begins with the file system's magic number, a long; 256 bytes hold it on every platform.
    buffer = (ctypes.c_long * 32)()
    return _libc().fstatfs(directory, buffer) == 0 and buffer[0] in _FILE_SYSTEMS


def syncfs(directory: int) -> None:
    """Waits until all that was written to the file system is on disk. Raises OSError."""
    if _libc().syncfs(directory) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


TEMP_PREFIX: Final = ".tmp-"
SYNCFS_FILES_MIN: Final = 4
"""From here on a group is synced by `syncfs`, which also waits for what other programs wrote to the file system."""
GROUP_FILES_MAX: Final = 512
GROUP_BYTES_MAX: Final = 8 * 1024 * 1024
WRITES_WAITING_MAX: Final = 16_384

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
_PROCESS_TEMP_PREFIX: Final = f"{TEMP_PREFIX}{secrets.token_hex(8)}-"
_temp_numbers: Final = itertools.count()


class FileWrite(NamedTuple):
    """One file of a group. With `exclusive` it must not exist yet."""

    name: str
    data: bytes
    exclusive: bool = False


def open_directory(path: str | os.PathLike[str]) -> int:
    """A descriptor of the directory, which the caller closes. A symlink as last component is refused.

    Raises FileNotFoundError if it is absent, StorageUnavailableError for anything else.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageUnavailableError("a directory cannot be opened") from error


def read_file_bounded(path: str | os.PathLike[str], bytes_max: int, *, dir_fd: int | None = None) -> bytes | None:
    """The content of a regular file of at most `bytes_max` bytes; None if there is no such file.

    Not for raw keys: the bytes can't be wiped. Symlinks are not followed and FIFOs don't block. Raises
    StorageUnavailableError if the file is longer, is not a regular file, or can't be read.
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
        while left > 0 and (part := os.read(fd, min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    except OSError as error:
        raise StorageUnavailableError("a file cannot be read") from error
    finally:
        os.close(fd)
    if left <= 0:
        raise StorageUnavailableError("a file is longer than its kind may be")
    return b"".join(parts)


def replace_file(directory: int, name: str, data: bytes, mode: int = 0o600) -> None:
    """Make `data` the content of `name`, durably. Raises StorageUnavailableError."""
    replace_file_from(directory, name, (data,), mode)


def replace_file_from(directory: int, name: str, chunks: Iterable[bytes], mode: int = 0o600) -> None:
    """`replace_file` for content that comes in parts. What `chunks` raises passes through; nothing has changed then."""
    _check_name(name)
    with _refusing("a file cannot be written"):
        temp = _write_temp(directory, chunks, mode, sync=True)
        try:
            os.rename(temp, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            _unlink_quietly(directory, temp)
            raise
        os.fsync(directory)


def create_file_exclusive(directory: int, name: str, data: bytes, mode: int = 0o600) -> None:
    """As `replace_file`, for a name that must be free: ConflictError otherwise, and what is there stays."""
    outcome = _write_group(directory, (FileWrite(name, data, exclusive=True),), mode)[0]
    if outcome is not None:
        raise outcome


def replace_many(directory: int, files: Sequence[tuple[str, bytes]]) -> None:
    """Replace several files as one group: all temporary files, one sync, all renames, one sync.

    Not atomic over the group: a failure or a crash during the renames leaves some files new and the others old, each
    whole. Raises StorageUnavailableError if any file isn't durably the new one.
    """
    for outcome in write_group(directory, [FileWrite(name, data) for name, data in files]):
        if outcome is not None:
            raise outcome


def write_group(directory: int, writes: Sequence[FileWrite]) -> list[MiniKmsError | None]:
    """Commit a group; for each write None once it is durable, or its error. Blocks on the disk.

    A failure before the first rename fails all. After that each write stands alone: a taken name is a ConflictError of
    that write only. An exclusive file whose last sync fails is removed again.
    """
    return _write_group(directory, writes, 0o600)


def remove_file(directory: int, name: str) -> bool:
    """Remove `name` durably; False if it was absent already. Raises StorageUnavailableError."""
    _check_name(name)
    with _refusing("a file cannot be removed"):
        try:
            os.unlink(name, dir_fd=directory)
            found = True
        except FileNotFoundError:
            found = False
        # Also when absent: an earlier removal may have failed at just this step.
        os.fsync(directory)
    return found


def is_stale_temp(name: str) -> bool:
    """Whether `name` is a temporary file that an earlier process left behind."""
    return name.startswith(TEMP_PREFIX) and not name.startswith(_PROCESS_TEMP_PREFIX)


def sweep_temps(directory: int) -> int:
    """Remove what earlier processes left behind; the number of files.

    Only for the owner of the directory's lock. Reads the whole directory: with many files, call it in a worker thread.
    """
    with _refusing("left-over temporary files cannot be removed"):
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if is_stale_temp(entry.name)]
        for name in names:
            os.unlink(name, dir_fd=directory)
        if names:
            os.fsync(directory)
    return len(names)


class StagedReplacements:
    """Replaces the files of a long series of groups: each is written in one step and put in place in the next, so that
    one sync serves two groups.

    `durable_first` is another directory of the same file system: what a step finds in it is on the disk before a file
    that the step staged is put in place. Blocks on the disk; for one thread at a time.
    """

    def __init__(self, directory: int, *, durable_first: int) -> None:
        self._directory = directory
        self._durable_first = durable_first
        self._by_syncfs = syncfs_reports(directory)
        self._staged: list[tuple[str, str]] = []  # name and temporary name

    def step(self, writes: Sequence[FileWrite], *, skip: Container[str] = ()) -> dict[str, MiniKmsError | None]:
        """Stages `writes`, and puts in place what the step before staged, but for the names in `skip`.

        Answers each name that was put in place, with None once that is durable. Raises StorageUnavailableError; then no
        name has changed and nothing is staged. Nothing is staged either when an answer is an error of the last sync.
        """
        for write in writes:
            _check_name(write.name)
        placing = list(self._staged)
        try:
            with _refusing("files cannot be written"):
                for write in writes:
                    temp = _write_temp(self._directory, (write.data,), 0o600, sync=not self._by_syncfs)
                    self._staged.append((write.name, temp))
        except BaseException:
            self.discard()
            raise
        del self._staged[: len(placing)]
        outcomes: dict[str, MiniKmsError | None] = {}
        for name, temp in placing:
            if name in skip:
                _unlink_quietly(self._directory, temp)
            else:
                outcomes[name] = self._place(name, temp)
        try:
            self._sync()
        except OSError as error:
            self.discard()
            text = "a directory cannot be synced"
            return {name: outcome or _storage_error(text, error) for name, outcome in outcomes.items()}
        return outcomes

    def discard(self) -> None:
        """Drops what is staged."""
        staged, self._staged = self._staged, []
        for _, temp in staged:
            _unlink_quietly(self._directory, temp)

    def _place(self, name: str, temp: str) -> MiniKmsError | None:
        try:
            os.rename(temp, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as error:
            _unlink_quietly(self._directory, temp)
            return _storage_error("a file cannot be put in place", error)
        return None

    def _sync(self) -> None:
        if self._by_syncfs:
            syncfs(self._directory)
        else:
            os.fsync(self._directory)
            os.fsync(self._durable_first)


class GroupCommit:
    """Writes to one directory from the event loop: those that arrive while a group is being synced form the next.

    Lives in the loop's thread; `write_group` runs in `executor`. The directory's descriptor stays the caller's, open
    until `drain` has returned.
    """

    def __init__(self, directory: int, executor: Executor) -> None:
        self._directory = directory
        self._executor = executor
        self._waiting: deque[tuple[FileWrite, asyncio.Future[None]]] = deque()
        self._running: asyncio.Future[None] | None = None
        self._scheduled = False

    async def submit(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        """Return once the file is durable.

        Raises StorageUnavailableError, or ConflictError for an exclusive name that is taken. Cancelled while it waits
        for its group it writes nothing; later the file is written all the same.
        """
        _check_name(name)
        if len(self._waiting) >= WRITES_WAITING_MAX:
            raise StorageUnavailableError("too many writes are waiting for the disk")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting.append((FileWrite(name, data, exclusive), done))
        self._schedule(loop)
        await done

    async def drain(self) -> None:
        """Wait until nothing is waiting or being written."""
        while self._waiting or self._running is not None:
            if self._running is None:
                await asyncio.sleep(0)
            else:
                await asyncio.wait([self._running])

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._scheduled and self._running is None:
            self._scheduled = True
            loop.call_soon(self._start_group, loop)  # after all callers of this turn

    def _start_group(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        group: list[tuple[FileWrite, asyncio.Future[None]]] = []
        size = 0
        while self._waiting and len(group) < GROUP_FILES_MAX and size < GROUP_BYTES_MAX:
            write, done = self._waiting.popleft()
            if not done.done():
                group.append((write, done))
                size += len(write.data)
        if group:
            self._running = loop.create_task(self._commit(loop, group))

    async def _commit(
        self, loop: asyncio.AbstractEventLoop, group: list[tuple[FileWrite, asyncio.Future[None]]]
    ) -> None:
        try:
            outcomes = await loop.run_in_executor(
                self._executor, write_group, self._directory, [write for write, _ in group]
            )
        except BaseException:
            # A defect here or a loop that is being torn down; nobody may wait for ever or be told "durable".
            for _, done in group:
                done.cancel()
            raise
        finally:
            self._running = None
            if self._waiting:
                self._schedule(loop)
        for (_, done), outcome in zip(group, outcomes, strict=True):
            if done.done():
                continue
            if outcome is None:
                done.set_result(None)
            else:
                done.set_exception(outcome)


def _write_group(directory: int, writes: Sequence[FileWrite], mode: int) -> list[MiniKmsError | None]:
    for write in writes:
        _check_name(write.name)
    outcomes: list[MiniKmsError | None] = [None] * len(writes)
    temps: list[str] = []
    try:
        by_syncfs = len(writes) >= SYNCFS_FILES_MIN and syncfs_reports(directory)
        with _refusing("files cannot be written"):
            for write in writes:
                temps.append(_write_temp(directory, (write.data,), mode, sync=not by_syncfs))
            if by_syncfs:
                syncfs(directory)
        for index, write in enumerate(writes):
            try:
                _put_in_place(directory, temps[index], write)
            except FileExistsError:
                outcomes[index] = ConflictError("there is one of this name already")
            except OSError as error:
                outcomes[index] = _storage_error("a file cannot be put in place", error)
            else:
                if not write.exclusive:
                    temps[index] = ""
    except StorageUnavailableError as error:
        # One error object each: every waiter raises its own.
        return [_storage_error(str(error), error.__cause__) for _ in writes]
    finally:
        for temp in temps:
            if temp:
                _unlink_quietly(directory, temp)
    try:
        if by_syncfs:
            syncfs(directory)
        else:
            os.fsync(directory)
    except OSError as error:
        return [_withdraw(directory, *pair, error) for pair in zip(writes, outcomes, strict=True)]
    return outcomes


def _put_in_place(directory: int, temp: str, write: FileWrite) -> None:
    if write.exclusive:
        os.link(temp, write.name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    else:
        os.rename(temp, write.name, src_dir_fd=directory, dst_dir_fd=directory)


def _withdraw(directory: int, write: FileWrite, outcome: MiniKmsError | None, error: OSError) -> MiniKmsError:
    """The outcome of a write whose last sync failed."""
    if outcome is not None:
        return outcome
    if write.exclusive:
        _unlink_quietly(directory, write.name)
    return _storage_error("a directory cannot be synced", error)


def _write_temp(directory: int, chunks: Iterable[bytes], mode: int, *, sync: bool) -> str:
    name = f"{_PROCESS_TEMP_PREFIX}{next(_temp_numbers)}"
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory)
    try:
        try:
            for chunk in chunks:
                write_all(fd, chunk)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        _unlink_quietly(directory, name)
        raise
    return name


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` at the descriptor's position. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _check_name(name: str) -> None:
    if _FILE_NAME.fullmatch(name) is None or name in {".", ".."} or name.startswith(TEMP_PREFIX):
        raise InvalidRequestError("not a plain file name")


def _unlink_quietly(directory: int, name: str) -> None:
    # Best effort on the way out of a failure; what stays is swept at the next start.
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=directory)


def _storage_error(text: str, cause: BaseException | None) -> StorageUnavailableError:
    error = StorageUnavailableError(text)
    error.__cause__ = cause
    return error


@contextlib.contextmanager
def _refusing(text: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageUnavailableError(text) from error


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
