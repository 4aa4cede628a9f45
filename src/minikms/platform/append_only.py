"""A file that only grows, and whose appends survive a failed sync.

Owns: the descriptor, the size of the file, how much of it is on disk, and what a failed append or sync leaves. The
caller owns the content, and the whole directory. Invariants:

- An `append` that raises OSError has changed nothing, or `repair` truncates what it left before the next one.
- After a failed sync the kernel may have marked pages clean that it did not write (fsync(2)). Bytes that are written
  again at the same place may stay lost even if the next sync succeeds: ext4 keeps the blocks as unwritten, and they
  read as zeros after a power cut. So the file is truncated to the bytes that a sync has confirmed, and the others are
  appended anew. Until the disk has confirmed those, `failed` is True and the file takes no append.
- Before that truncation the bytes are durable in another file, `<path>.unconfirmed`. It is made as soon as a sync
  fails, so that the next process knows (`recover`): what it reads of this file may be in the page cache only.
- `<path>.confirmed` says how much was on the disk after the last sync, so that the next process can tell damage by a
  power cut from an alteration. It is not synced: after a power cut it may say less. For another file it says nothing.
- At most about `UNCONFIRMED_BYTES_MAX` are unconfirmed: they are held in memory.
- `sync` and `switch` exclude each other, so a descriptor is never closed during its sync. `append` waits for neither
  until that bound is reached.

`append` and `repair` belong to one thread at a time; another thread may call `sync`, but must not begin a first `sync`
after a failed one during an `append`. It must never drop a byte that an `append` has written.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import os
import struct
import threading
from typing import Final

from minikms.platform.sync import sync_data, sync_directory

FILE_MODE: Final = 0o600
UNCONFIRMED_BYTES_MAX: Final = 16 * 1024 * 1024
"""Before an append that would begin beyond it, the file is synced."""
UNCONFIRMED_SUFFIX: Final = ".unconfirmed"
CONFIRMED_SUFFIX: Final = ".confirmed"
_MARK: Final = struct.Struct(">QQ")
"""Inode of the file, and how many of its bytes are confirmed."""
_OFFSET_BYTES: Final = 8
_DIGEST_BYTES: Final = 32


def write_whole(fd: int, blob: bytes) -> None:
    """Write all of `blob`, with one call unless that is short, as on a network file system at a signal. Raises OSError;
    the file may then hold a part of it.
    """
    done = os.write(fd, blob)
    while done < len(blob):
        done += os.write(fd, memoryview(blob)[done:])


class AppendOnlyFile:
    """The file `path`, which `fd` appends to, and whose first `size` bytes are on disk."""

    def __init__(self, path: str, fd: int, size: int) -> None:
        self._path = path
        self._fd = fd
        self._inode = os.fstat(fd).st_ino
        self._confirmed = size
        self._held: collections.deque[bytes] = collections.deque()
        """The appends that are not confirmed."""
        self._truncate_due = False
        self._saved = False
        """Whether the unconfirmed bytes are durable in the other file."""
        self._lock = threading.Lock()
        self.size = size
        self.failed = False
        self._mark_fd = _open_mark(path)
        self._mark()

    @property
    def unconfirmed_bytes(self) -> int:
        """How many of the appended bytes are not confirmed to be on disk."""
        return self.size - self._confirmed

    def append(self, blob: bytes) -> None:
        """Append all of `blob`, or truncate the file to its earlier size and raise OSError."""
        self.repair()
        if self.unconfirmed_bytes >= UNCONFIRMED_BYTES_MAX:
            self.sync()
        self._truncate_due = True
        try:
            write_whole(self._fd, blob)
        except OSError:
            with contextlib.suppress(OSError):
                self._truncate()
            raise
        self._truncate_due = False
        self._held.append(blob)
        self.size += len(blob)

    def _truncate(self) -> None:
        os.ftruncate(self._fd, self.size)
        self._truncate_due = False

    def repair(self) -> None:
        """Undo what a failed append left. While it raises OSError, nothing can be appended."""
        if self._truncate_due:
            self._truncate()
        if self.failed:
            raise OSError(errno.EIO, "the disk has not confirmed all that was written")

    def sync(self) -> None:
        """Return when everything appended before the call is on disk. When it raises OSError, `failed` is True."""
        with self._lock:
            target = self.size
            if target == self._confirmed:
                return
            try:
                if self.failed:
                    self._append_anew()
                else:
                    sync_data(self._fd)
            except OSError:
                if not self.failed:
                    self.failed = True
                    with contextlib.suppress(OSError):
                        _save(self._path, self._confirmed, None)
                raise
            while self._confirmed < target:
                self._confirmed += len(self._held.popleft())
            self.failed = False
            self._mark()

    def _mark(self) -> None:
        """Store what is confirmed. Without it the next process only takes an alteration for damage."""
        if self._mark_fd >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self._mark_fd, _MARK.pack(self._inode, self._confirmed), 0)

    def _append_anew(self) -> None:
        blob = b"".join(self._held)
        if not self._saved:
            _save(self._path, self._confirmed, blob)
            self._saved = True
        _replace_end(self._fd, self._confirmed, blob)
        self._saved = self._truncate_due = False
        _forget(self._path)

    def switch(self, fd: int, size: int) -> None:
        """Continue with a file whose first `size` bytes are on disk. The previous file must have been synced."""
        with self._lock:
            inode = os.fstat(fd).st_ino
            os.close(self._fd)
            self._fd, self._inode = fd, inode
            self.size = self._confirmed = size
            self._mark()

    def close(self) -> None:
        with self._lock:
            os.close(self._fd)
            if self._mark_fd >= 0:
                os.close(self._mark_fd)


def recover(path: str) -> None:
    """Return when all of `path` is on disk, whose writer may have been killed, or had a failed sync. Call it before the
    file is read.

    Raises OSError; then call it again, for example at the next start.
    """
    saved = _load(path)
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        _forget(path)
        return
    try:
        size = os.fstat(fd).st_size
        if saved is None:
            try:
                sync_data(fd)
            except OSError:
                _save(path, max(0, size - 2 * UNCONFIRMED_BYTES_MAX), None)
                raise
            return
        offset, blob = saved
        if blob is None and offset < size:
            offset = max(offset, size - 2 * UNCONFIRMED_BYTES_MAX)
            blob = os.pread(fd, size - offset, offset)
            _save(path, offset, blob)
        if blob is None or offset > size:  # the reader of the file finds what it lacks
            _forget(path)
        else:
            _replace_end(fd, offset, blob)
            _forget(path)
    finally:
        os.close(fd)


def confirmed_bytes(path: str, fd: int) -> int:
    """How many bytes of the open file `path` were on the disk for certain when its last writer ended."""
    with contextlib.suppress(OSError, struct.error):
        mark = os.open(path + CONFIRMED_SUFFIX, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(mark, "rb") as file:
            inode, size = _MARK.unpack(file.read(_MARK.size))
        if inode == os.fstat(fd).st_ino:
            return int(size)
    return 0


def _open_mark(path: str) -> int:
    """-1 where it can't be made: it is needed neither to write the file nor to start."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path + CONFIRMED_SUFFIX, flags, FILE_MODE)
    except OSError:
        return -1


def _replace_end(fd: int, offset: int, blob: bytes) -> None:
    """Replace everything after `offset` by `blob`, which `_save` has made durable; it is on disk on return."""
    os.ftruncate(fd, offset)
    write_whole(fd, blob)
    sync_data(fd)


# --- the other file: the offset, and if it is complete, a SHA-256 of offset and bytes, and the bytes -----------------


def _save(path: str, offset: int, blob: bytes | None) -> None:
    """Without bytes it only marks that a sync has failed; that need not be durable, as the page cache is not either."""
    head = offset.to_bytes(_OFFSET_BYTES, "big")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path + UNCONFIRMED_SUFFIX, flags, FILE_MODE)
    try:
        if blob is None:
            write_whole(fd, head)
            return
        write_whole(fd, head + hashlib.sha256(head + blob).digest() + blob)
        sync_data(fd)
    finally:
        os.close(fd)
    sync_directory(os.path.dirname(path))


def _load(path: str) -> tuple[int, bytes | None] | None:
    """(offset, the bytes; None if they are not complete), or None if no sync has failed."""
    try:
        fd = os.open(path + UNCONFIRMED_SUFFIX, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        head, digest = file.read(_OFFSET_BYTES), file.read(_DIGEST_BYTES)
        blob = file.read(2 * UNCONFIRMED_BYTES_MAX)
    if len(head) < _OFFSET_BYTES:
        head = bytes(_OFFSET_BYTES)
    complete = hashlib.sha256(head + blob).digest() == digest
    return int.from_bytes(head, "big"), blob if complete else None


def _forget(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path + UNCONFIRMED_SUFFIX)
    sync_directory(os.path.dirname(path))
