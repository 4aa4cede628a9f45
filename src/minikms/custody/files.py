"""Files of the data directory: durable, atomic writes, bounded reads, and the lock on the directory.

Owns: every write below the data directory except the appends to the lease journal and to the audit log; the wall clock
and the two ways to write a time (both in UTC, both sort as text); the creation of private directories; the lock.
Callers pass the descriptor of an open directory (`open_directory`) and plain file names.

A file is replaced in four steps, always in this order: write a temporary file in the same directory (O_EXCL,
O_NOFOLLOW), sync it, rename it, sync the directory. Invariants:
- Before the rename the old content stands. A failure up to there removes the temporary file and changes nothing.
- If only the last sync fails, the new content is in place but may not survive a power loss. The caller gets the same
  error, and a retry writes the file again.
- After a failed sync the same file is never synced again: the kernel has marked the failed pages clean, so a second
  sync would succeed without them (https://wiki.postgresql.org/wiki/Fsync_Errors). A retry writes a new temporary file.
- Temporary names contain a token of this process, so `sweep_temps` can run while other files are being written.
- One process owns a data directory. Daemon and offline writers take the lock before they touch the keyring or the
  socket, and keep it until they end. `flock(2)` ends with the descriptor, which no child inherits through exec. The
  lock file is never removed, so there is one file to lock.

A group of files takes two `syncfs(2)` calls instead of two syncs for each file; in a series of groups
(`StagedReplacements`) it takes one. `syncfs` reports a failed write-back only since Linux 5.8 (for any file since the
directory was opened), and a failure of the file system itself only since 5.17 (commit 5679897eb104); through overlayfs
it reports nothing. Where it is not known to report every failure, each file is synced by itself.

It must never put a path or a text of the kernel into an error that can reach a client, and never hold a raw key.
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

DIRECTORY_MODE: Final = 0o700
FILE_MODE: Final = 0o600
TEMP_PREFIX: Final = ".tmp-"
SYNCFS_FILES_MIN: Final = 4
"""A group of at least this many files uses `syncfs`, which also waits for the writes of other programs."""
GROUP_FILES_MAX: Final = 512
GROUP_BYTES_MAX: Final = 8 * 1024 * 1024
WRITES_WAITING_MAX: Final = 16_384
LOCK_NAME: Final = "lock"

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
_READ_BYTES: Final = 1024 * 1024
_PROCESS_TEMP_PREFIX: Final = f"{TEMP_PREFIX}{secrets.token_hex(8)}-"
_PID_BYTES_MAX: Final = 20
_temp_numbers: Final = itertools.count()


# --- the clock --------------------------------------------------------------------------------------------------------


def now_ns() -> int:
    """The wall clock, in Unix nanoseconds."""
    return time.time_ns()


def rfc3339(ns: int) -> str:
    """`2026-11-24T15:00:00Z` (RFC 3339), from Unix nanoseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ns // 1_000_000_000))


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

    Not for raw keys, since the bytes can't be zeroed. Symbolic links are not followed, and a FIFO does not block.
    Raises StorageUnavailableError if the file is longer, is not a regular file, or can't be read.
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
        while left > 0 and (part := os.read(fd, min(left, _READ_BYTES))):
            parts.append(part)
            left -= len(part)
    except OSError as error:
        raise StorageUnavailableError("a file cannot be read") from error
    finally:
        os.close(fd)
    if left <= 0:
        raise StorageUnavailableError("a file is longer than the limit for its kind")
    return b"".join(parts)


# --- writing one file -------------------------------------------------------------------------------------------------


def replace_file(directory: int, name: str, data: bytes) -> None:
    """Makes `data` the content of `name`, durably. Raises StorageUnavailableError."""
    replace_file_from(directory, name, (data,))


def replace_file_from(directory: int, name: str, chunks: Iterable[bytes]) -> None:
    """As `replace_file`, with the content in parts. An error of `chunks` passes through; then nothing has changed."""
    _check_name(name)
    with _storage_errors("a file cannot be written"):
        temp = _write_temp(directory, chunks, sync=True)
        try:
            os.rename(temp, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            _unlink_quietly(directory, temp)
            raise
        os.fsync(directory)


def remove_file(directory: int, name: str) -> bool:
    """Removes `name` durably; False if it was absent. Raises StorageUnavailableError."""
    _check_name(name)
    with _storage_errors("a file cannot be removed"):
        try:
            os.unlink(name, dir_fd=directory)
            found = True
        except FileNotFoundError:
            found = False
        # Also if it is absent: an earlier removal may have failed at this sync.
        os.fsync(directory)
    return found


def is_stale_temp(name: str) -> bool:
    """Whether `name` is a temporary file of an earlier process."""
    return name.startswith(TEMP_PREFIX) and not name.startswith(_PROCESS_TEMP_PREFIX)


def sweep_temps(directory: int, *, age_ns_min: int = 0) -> int:
    """Removes the temporary files of earlier processes that are at least this old; the number of them.

    Only for the owner of the directory's lock; `age_ns_min` spares the files of other processes that write in the
    directory without the lock. It reads the whole directory, so the daemon calls it in a worker thread.
    """
    newest_ns = now_ns() - age_ns_min
    with _storage_errors("left-over temporary files cannot be removed"):
        with os.scandir(directory) as entries:
            names = [
                entry.name
                for entry in entries
                if is_stale_temp(entry.name)
                and (not age_ns_min or entry.stat(follow_symlinks=False).st_mtime_ns <= newest_ns)
            ]
        for name in names:
            os.unlink(name, dir_fd=directory)
        if names:
            os.fsync(directory)
    return len(names)


def _write_all(fd: int, data: bytes) -> None:
    """Writes all of `data` at the descriptor's position. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _write_temp(directory: int, chunks: Iterable[bytes], *, sync: bool) -> str:
    name = f"{_PROCESS_TEMP_PREFIX}{next(_temp_numbers)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, FILE_MODE, dir_fd=directory)
    try:
        try:
            for chunk in chunks:
                _write_all(fd, chunk)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        _unlink_quietly(directory, name)
        raise
    return name


def _check_name(name: str) -> None:
    if _FILE_NAME.fullmatch(name) is None or name in {".", ".."} or name.startswith(TEMP_PREFIX):
        raise InvalidRequestError("not a plain file name")


def _unlink_quietly(directory: int, name: str) -> None:
    # Best effort after a failure; the next start sweeps what is left.
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=directory)


def _storage_error(text: str, cause: BaseException | None) -> StorageUnavailableError:
    error = StorageUnavailableError(text)
    error.__cause__ = cause
    return error


@contextlib.contextmanager
def _storage_errors(text: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageUnavailableError(text) from error


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
    """One file of a group. With `exclusive` the name must not be taken."""

    name: str
    data: bytes
    exclusive: bool = False


def write_files(directory: int, writes: Sequence[FileWrite]) -> None:
    """`write_group`, which raises the first error instead. The other files of the group may have been written."""
    for outcome in write_group(directory, writes):
        if outcome is not None:
            raise outcome


def write_group(directory: int, writes: Sequence[FileWrite]) -> list[MiniKmsError | None]:
    """Writes a group: all temporary files, one sync, all renames, one sync. Blocks on the disk.

    Returns for each write None if it is durable, or its error. A failure before the first rename fails all writes.
    After that each write stands alone, so a crash leaves some files new and others old, each of them whole. A taken
    name is a ConflictError of its own write. An exclusive file whose last sync fails is removed again.
    """
    for write in writes:
        _check_name(write.name)
    outcomes: list[MiniKmsError | None] = [None] * len(writes)
    temps: list[str] = []
    try:
        by_syncfs = len(writes) >= SYNCFS_FILES_MIN and syncfs_reports(directory)
        with _storage_errors("files cannot be written"):
            for write in writes:
                temps.append(_write_temp(directory, (write.data,), sync=not by_syncfs))
            if by_syncfs:
                syncfs(directory)
        for index, write in enumerate(writes):
            try:
                _put_in_place(directory, temps[index], write)
            except FileExistsError:
                outcomes[index] = ConflictError("there is a file of this name already")
            except OSError as error:
                outcomes[index] = _storage_error("a file cannot be put in place", error)
            else:
                if not write.exclusive:
                    temps[index] = ""
    except StorageUnavailableError as error:
        # A separate error object for each write: every waiter raises its own.
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
        return [_unsynced_outcome(directory, *pair, error) for pair in zip(writes, outcomes, strict=True)]
    return outcomes


def _put_in_place(directory: int, temp: str, write: FileWrite) -> None:
    if write.exclusive:
        os.link(temp, write.name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    else:
        os.rename(temp, write.name, src_dir_fd=directory, dst_dir_fd=directory)


def _unsynced_outcome(directory: int, write: FileWrite, outcome: MiniKmsError | None, error: OSError) -> MiniKmsError:
    """The outcome of a write whose last sync failed."""
    if outcome is not None:
        return outcome
    if write.exclusive:
        _unlink_quietly(directory, write.name)
    return _storage_error("a directory cannot be synced", error)


class StagedReplacements:
    """Replaces files in a long series of groups. Each group is written in one step and put in place in the next step,
    so one sync serves two groups.

    `durable_first` is another directory of the same file system. What a step finds in it is durable before any file
    that the step wrote is put in place. Blocks on the disk; for one thread at a time.
    """

    def __init__(self, directory: int, *, durable_first: int) -> None:
        self._directory = directory
        self._durable_first = durable_first
        self._by_syncfs = syncfs_reports(directory)
        self._staged: list[tuple[str, str]] = []  # name and temporary name

    def step(self, writes: Sequence[FileWrite], *, skip: Container[str] = ()) -> dict[str, MiniKmsError | None]:
        """Writes the temporary files of `writes`, and puts the files of the previous step in place except the names in
        `skip`.

        Returns for each name that was put in place None if it is durable, or its error. Raises StorageUnavailableError;
        then no name has changed and nothing is staged. After a failed last sync nothing is staged either.
        """
        for write in writes:
            _check_name(write.name)
        placing = list(self._staged)
        try:
            with _storage_errors("files cannot be written"):
                for write in writes:
                    temp = _write_temp(self._directory, (write.data,), sync=not self._by_syncfs)
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
        """Removes the temporary files that are not in place yet."""
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
    """Group commit for one directory: writes that arrive while a group is being synced form the next group.

    Used in the event loop's thread; `write_group` runs in `executor`. The directory's descriptor belongs to the caller,
    who keeps it open until `drain` has returned.
    """

    def __init__(self, directory: int, executor: Executor) -> None:
        self._directory = directory
        self._executor = executor
        self._waiting: deque[tuple[FileWrite, asyncio.Future[None]]] = deque()
        self._running: asyncio.Future[None] | None = None
        self._scheduled = False

    async def submit(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        """Returns once the file is durable.

        Raises StorageUnavailableError, or ConflictError if an exclusive name is taken. If the caller is cancelled
        before the group begins, the file is not written; after that it is written all the same.
        """
        _check_name(name)
        if len(self._waiting) >= WRITES_WAITING_MAX:
            raise StorageUnavailableError("too many writes are waiting for the disk; try again later")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting.append((FileWrite(name, data, exclusive), done))
        self._schedule(loop)
        await done

    async def drain(self) -> None:
        """Returns when no write is waiting or under way."""
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
            # A defect here, or the loop is closing. No caller may wait for ever or believe that its file is durable.
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


# --- the data directory and its lock ----------------------------------------------------------------------------------


class InUseError(StartError):
    """Another process holds the lock."""


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
        self._open = True

    def close(self) -> None:
        """Releases the directory. Idempotent."""
        if self._open:
            self._open = False
            os.close(self._descriptor)
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
        os.fsync(descriptor)
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
        raise InUseError(f"another process{holder} owns {what}") from None
    return descriptor


def _holder(descriptor: int) -> str:
    """` (pid N)`, or nothing if the holder has not written it yet."""
    text = os.pread(descriptor, _PID_BYTES_MAX, 0).strip()
    return f" (pid {int(text)})" if text.isdigit() else ""
