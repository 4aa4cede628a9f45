"""Files of the data directory: durable, atomic writes, and bounded reads.

Owns: every write below the data directory except those to the journal of changes, the lock and the audit log.
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

A group of files takes two `syncfs(2)` calls instead of two syncs for each file, where `syncfs` reports every failure.

It must never put a path or a text of the kernel into an error that can reach a client, and never hold a raw key.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import stat
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from minikms.api.errors import InvalidRequestError, StorageUnavailableError
from minikms.platform.clock import now_ns
from minikms.platform.sync import sync_data, sync_file, syncfs, syncfs_reports

FILE_MODE: Final = 0o600
TEMP_PREFIX: Final = ".tmp-"
SYNCFS_FILES_MIN: Final = 4
"""A group of at least this many files uses `syncfs`, which also waits for the writes of other programs."""
CHECK_BYTES: Final = 4096
"""The size of the file that shows whether a disk takes one more."""
GROUP_FILES_MAX: Final = 512
READ_AHEAD_FILES: Final = 32
"""Files that `read_files_of` has open at a time, so that the disk reads them at the same time."""

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
_READ_BYTES_MIN: Final = 64 * 1024
"""The least size of one read: a file may say that it has no size."""
_TEMP_NAME: Final = re.compile(re.escape(TEMP_PREFIX) + r"[0-9a-f]{16}-[0-9]+", re.ASCII)
_temp_numbers: Final = itertools.count()
_process_temp_prefix = ""


def _begin_process() -> None:
    global _process_temp_prefix  # noqa: PLW0603 - one for each process
    _process_temp_prefix = f"{TEMP_PREFIX}{secrets.token_hex(8)}-"


_begin_process()
os.register_at_fork(after_in_child=_begin_process)


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


def denied_private(path: str) -> str:
    """`denied` for a file of a private directory, which may be missing, or for that directory."""
    usable = os.access(path, os.R_OK | os.W_OK, effective_ids=True) or not os.path.lexists(path)
    return denied(os.path.dirname(path) if usable else path, "u+rwX")


def denied(path: str | os.PathLike[str], mode: str) -> str:
    """What stands behind a PermissionError at `path`, and the commands of root that mend it."""
    user = f"this process is uid {os.geteuid()}"
    try:
        status = os.stat(path)
    except OSError:
        return f"{user}, which may not enter a directory above {path}: chmod o+x that directory"
    owner = f"{path} belongs to uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}"
    return f"{owner}, and {user}. As root: chown {os.geteuid()} {path} && chmod {mode} {path}"


@contextlib.contextmanager
def closed_after(descriptor: int) -> Iterator[int]:
    """Closes the descriptor when the block ends."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened_file(path: str | os.PathLike[str], *, dir_fd: int | None = None) -> Iterator[tuple[int, int]]:
    """The descriptor of a regular file, for reading, and its length. Symbolic links are not followed, and a FIFO does
    not block.

    Raises FileNotFoundError, and StorageUnavailableError if it is not a regular file, or if it or what the block reads
    of it can't be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageUnavailableError("a file cannot be opened") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StorageUnavailableError("a file is not a regular file")
        yield fd, status.st_size
    except OSError as error:
        raise StorageUnavailableError("a file cannot be read") from error
    finally:
        os.close(fd)


def read_file_bounded(path: str | os.PathLike[str], bytes_max: int, *, dir_fd: int | None = None) -> bytes | None:
    """The content of a regular file of at most `bytes_max` bytes; None if there is no such file.

    It must not be used for raw keys, because the bytes can't be zeroed. Raises StorageUnavailableError as
    `opened_file`, and if the file is longer.
    """
    try:
        with opened_file(path, dir_fd=dir_fd) as (fd, length):
            parts = []
            left = bytes_max + 1
            part_bytes = max(length + 1, _READ_BYTES_MIN)  # one read, mostly: joining two copies them
            while left > 0 and (part := os.read(fd, min(left, part_bytes))):
                parts.append(part)
                left -= len(part)
    except FileNotFoundError:
        return None
    if left <= 0:
        raise StorageUnavailableError("a file is longer than the limit for its kind")
    return b"".join(parts)


def read_file_in(directory: str, name: str, bytes_max: int) -> bytes | None:
    """The same, of a file in the directory."""
    with closed_after(open_directory(directory)) as descriptor:
        return read_file_bounded(name, bytes_max, dir_fd=descriptor)


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


def read_files_of(names: Iterable[str], bytes_exact: int, *, dir_fd: int, twice: bool = False) -> list[bytes | None]:
    """Reads at most READ_AHEAD_FILES files like `read_file_of`: the disk is asked for all before one is waited for.
    `twice`: None also if a second read differs.
    """
    opened: list[int | None] = []
    advises = hasattr(os, "posix_fadvise")
    try:
        for name in names:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
            except OSError:
                opened.append(None)
                continue
            opened.append(fd)
            try:
                if advises:
                    os.posix_fadvise(fd, 0, bytes_exact, os.POSIX_FADV_WILLNEED)
            except OSError:  # not a regular file
                continue
        contents = [None if fd is None else _read_exact(fd, bytes_exact) for fd in opened]
        if twice:
            pairs = zip(opened, contents, strict=True)
            contents = [
                None if fd is None or content != _read_exact(fd, bytes_exact) else content for fd, content in pairs
            ]
    finally:
        for each in opened:
            if each is not None:
                os.close(each)
    return contents


def _read_exact(fd: int, count: int) -> bytes | None:
    try:
        content = os.pread(fd, count + 1, 0)
    except OSError:
        return None
    return content if len(content) == count else None


# --- writing one file -------------------------------------------------------------------------------------------------


def replace_file(directory: int, name: str, data: bytes) -> None:
    """Makes `data` the content of `name`, durably. Raises StorageUnavailableError."""
    replace_file_from(directory, name, (data,))


def replace_file_from(directory: int, name: str, chunks: Iterable[bytes]) -> None:
    """Replaces a file with content in parts, like `replace_file`. An error of `chunks` passes through; then nothing
    changed.
    """
    _check_name(name)
    with _storage_errors("a file cannot be written", name):
        _rename_temp(directory, _write_temp(directory, chunks, sync=True), name)
        sync_file(directory)


def check_room(directory: int) -> None:
    """Writes a temporary file of CHECK_BYTES, and removes it. Raises StorageUnavailableError."""
    with _storage_errors("a file cannot be written"):
        _unlink_quietly(directory, _write_temp(directory, (bytes(CHECK_BYTES),), sync=False))


def patch_file(directory: int, name: str, patches: Sequence[tuple[int, bytes]], *, sync: bool) -> None:
    """Overwrites parts of an existing file, (offset, content) each; with `sync`, durably. An absent file stays absent.

    Only for content that stays valid if a crash leaves some of the parts, or some bytes of one, unwritten. Raises
    StorageUnavailableError; then the file must be replaced by a new one.
    """
    _check_name(name)
    with _storage_errors("a file cannot be written", name):
        try:
            fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return
        try:
            for offset, data in patches:
                write_all_at(fd, data, offset)
            if sync:
                sync_data(fd)  # the file keeps its length and its blocks
        finally:
            os.close(fd)


def remove_file(directory: int, name: str) -> bool:
    """Removes `name` durably; False if it was absent. Raises StorageUnavailableError."""
    _check_name(name)
    with _storage_errors("a file cannot be removed", name):
        try:
            os.unlink(name, dir_fd=directory)
            existed = True
        except FileNotFoundError:
            existed = False
        # Even if it is absent: an earlier removal may have failed at this sync.
        sync_file(directory)
    return existed


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
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = name
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
"""The temporary files that were left, by device and inode of the directory."""
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
def _storage_errors(text: str, name: str | None = None) -> Iterator[None]:
    """`name`: of the file, for an operator; a client gets `text` only."""
    try:
        yield
    except OSError as error:
        error.filename = name or error.filename
        # Without its traceback: it leads to frames that hold what was to be written.
        raise StorageUnavailableError(text) from error.with_traceback(None)


# --- writing groups of files ------------------------------------------------------------------------------------------


class FileWrite(NamedTuple):
    name: str
    data: bytes


def make_files(directory: int, files: Iterable[FileWrite]) -> None:
    """Makes new files, durably on return, with one sync; until then a power loss may leave any part of them. An error
    of `files` passes through. Raises StorageUnavailableError.
    """
    by_syncfs = syncfs_reports(directory)
    for file in files:
        with _storage_errors("files cannot be written"):
            make_file(directory, file.name, file.data, sync=not by_syncfs)
    with _storage_errors("files cannot be written"):
        (syncfs if by_syncfs else sync_file)(directory)


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
