"""What of the log is on disk.

Owns: the bytes written but not yet confirmed, and the wait for the disk. Invariants: `wrote` and `dirty` never wait;
`sync` and `switch` exclude each other, so a descriptor is never closed under a running `fdatasync`. After a failed
`fdatasync` the kernel may have marked the pages clean without having written them (man 2 fsync), so the next `sync`
writes those bytes again, at the same place, before it asks once more; until that has succeeded, `failed` holds and
the log takes no lines.

Disk space kept back, so that a full disk leaves room to record that it is full.

Owns: the reserve file. Invariants: its blocks are really allocated; it gives them back step by step, only as many as
the log needs, since anyone on a full disk may take what it frees. It must never hold content, nor fail a start.

The file being written and the state of its chain.

Owns: the descriptor, the head, the coverage of the next signed line, and moving on to the next file. Invariants: a
method that raises OSError has changed nothing, or has left a debt that `repair` settles before anything else is
written (a tail that could not be cut off, a rotation past its point of no return). Only whole lines stay in the file,
each chained to the one before it. One thread at a time; `durability` alone may be used from a second. It must never
hold key bytes.

Rotation, so that a crash at any point leaves what `opening` completes: the next file is written and synced under
another name; `segment_close` ends the old one (from here only forward); the old one is synced and renamed to its
number, and the next one takes the log's name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Sequence
from typing import Final

import msgspec

from minikms.audit import chain, reader, record
from minikms.audit.chain import AuditKey, Coverage, base64_text
from minikms.audit.reader import FILE_MODE, LOG_NAME, NEXT_NAME, segment_name
from minikms.audit.record import Event, Facts, Head
from minikms.audit.recovery import Opened, create_file, write_whole

_COPY_BYTES: Final = 1024 * 1024


class Durability:
    """For one open file at a time; `switch` moves on to the next."""

    def __init__(self, path: str, fd: int, size: int) -> None:
        """`fd` appends to `path`, whose first `size` bytes are taken to be on disk."""
        self._path = path
        self._fd = fd
        self._written = size
        self._synced = size
        self._lock = threading.Lock()
        self.failed = False

    @property
    def dirty(self) -> bool:
        """Whether anything is not known to be on disk."""
        return self._synced < self._written

    def wrote(self, count: int) -> None:
        """`count` more bytes are in the file."""
        self._written += count

    def sync(self) -> None:
        """Return when all that was written before the call is on disk. Raises OSError, and `failed` holds."""
        with self._lock:
            target = self._written
            if target == self._synced:
                return
            try:
                if self.failed:
                    self._write_again(target)
                os.fdatasync(self._fd)
            except OSError:
                self.failed = True
                raise
            self._synced = target
            self.failed = False

    def switch(self, fd: int, size: int) -> None:
        """Go on with a file whose first `size` bytes are on disk; the one before must have been synced."""
        with self._lock:
            os.close(self._fd)
            self._fd = fd
            self._written = self._synced = size

    def close(self) -> None:
        with self._lock:
            os.close(self._fd)

    def _write_again(self, end: int) -> None:
        """Make the pages of the unconfirmed bytes dirty again. Through a descriptor that does not append."""
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            at = self._synced
            while at < end:
                data = os.pread(fd, min(_COPY_BYTES, end - at), at)
                if not data:
                    raise OSError("the log is shorter than what was written")
                os.pwrite(fd, data, at)
                at += len(data)
        finally:
            os.close(fd)


RESERVE_NAME: Final = "minikms-audit.reserve"
RESERVE_BYTES: Final = 4 * 1024 * 1024
"""About 16,000 lines: minutes of a person's work, or long enough to see the alarm."""
RELEASE_BYTES: Final = 64 * 1024


class Reserve:
    """The reserve file of one directory. Every method answers whether it did what its name says; none raises
    OSError.
    """

    def __init__(self, directory: str, size: int = RESERVE_BYTES) -> None:
        self._path = os.path.join(directory, RESERVE_NAME)
        self._size = size
        self.left_bytes = 0
        with contextlib.suppress(OSError):
            held = os.lstat(self._path)
            self.left_bytes = min(held.st_size, held.st_blocks * 512)

    @property
    def full(self) -> bool:
        return self.left_bytes >= self._size

    def fill(self) -> bool:
        """Take the space, again where some was given back. False when the disk does not have it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self._path, flags, FILE_MODE)
        except OSError:
            return False
        try:
            if self._size:
                os.posix_fallocate(fd, 0, self._size)
            os.ftruncate(fd, self._size)
        except OSError:
            # What a failed allocation took goes back; what was held before stays held.
            with contextlib.suppress(OSError):
                os.ftruncate(fd, self.left_bytes)
            return False
        finally:
            os.close(fd)
        self.left_bytes = self._size
        return True

    def release(self) -> bool:
        """Give back the next step of the space. False when nothing is left."""
        left = max(0, self.left_bytes - RELEASE_BYTES)
        if self.left_bytes == 0:
            return False
        try:
            os.truncate(self._path, left)
        except OSError:
            self.left_bytes = 0
            return False
        self.left_bytes = left
        return True


CHECKPOINT_LINES: Final = 10_000
CHECKPOINT_BYTES: Final = 8 * 1024 * 1024
"""A checkpoint costs some 150 µs: at either bound under 0.02 µs a line. A start reads at most what lies between two."""
_EVENTS_AT_A_TIME: Final = 8
"""Eight of the longest lines are as much as may lie between two checkpoints."""


class _Next(msgspec.Struct):
    """The file after this one, synced, waiting for its name."""

    fd: int
    first_line: bytes
    head: Head
    ts: int
    old_renamed: bool = False


class ChainWriter:
    """Continues an opened log."""

    def __init__(self, directory: str, opened: Opened) -> None:
        self._directory = directory
        self._fd = opened.fd
        self._coverage = opened.coverage
        self._cut_due = False
        self._next: _Next | None = None
        self.log_id = opened.log_id
        self.key = opened.key
        self.head = opened.head
        self.size = opened.size
        self.segment = opened.segment
        self.segment_ts = opened.segment_ts
        """When the file was begun, Unix ns."""
        self._segment_seq = opened.segment_seq
        self.durability = Durability(os.path.join(directory, LOG_NAME), opened.fd, opened.size)

    @property
    def unsigned_lines(self) -> int:
        """Lines since the last signed one, or since the file's first where none is."""
        return self._coverage.lines_count if self.fresh else self._coverage.lines_count - 1

    @property
    def fresh(self) -> bool:
        """Whether the file holds nothing but its first line."""
        return self.head.seq == self._segment_seq

    # --- lines -------------------------------------------------------------------------------------------------------

    def write(self, events: Sequence[Event], ts: int, *, escaped: bool = False) -> None:
        """One write of `events`, with the checkpoint that falls due. `escaped`: they went through here before."""
        blob, head = chain.seal(events, self.head, self.key.mac_key, ts, escaped=escaped)
        coverage = self._coverage
        if (
            coverage.lines_count + len(events) < CHECKPOINT_LINES
            and coverage.bytes_count + len(blob) < CHECKPOINT_BYTES
        ):
            self._append(blob)
            coverage.add(blob, len(events))
            self.head = head
        else:
            self._write_with_checkpoints(events, ts)

    def _write_with_checkpoints(self, events: Sequence[Event], ts: int) -> None:
        """The same where a checkpoint falls due: once in 10,000 lines, or several in a turn of giant batches."""
        head, coverage = self.head, self._coverage.copy()
        parts = []
        for begin in range(0, len(events), _EVENTS_AT_A_TIME):
            some = events[begin : begin + _EVENTS_AT_A_TIME]
            blob, head = chain.seal(some, head, self.key.mac_key, ts, escaped=True)
            parts.append(blob)
            coverage.add(blob, len(some))
            if coverage.lines_count >= CHECKPOINT_LINES or coverage.bytes_count >= CHECKPOINT_BYTES:
                line, head = self._signed(record.TYPE_CHECKPOINT, ts, head=head, coverage=coverage)
                parts.append(line)
                coverage = _coverage_of(line)
        self._append(b"".join(parts))
        self.head, self._coverage = head, coverage

    def checkpoint(self, ts: int) -> None:
        """Sign the lines since the last signed one."""
        line, head = self._signed(record.TYPE_CHECKPOINT, ts)
        self._append(line)
        self._follow(line, head)

    def change_key(self, key: AuditKey, ts: int) -> None:
        """Name `key` in a line under the one in force, and use it from the next line on."""
        facts: Facts = {"next_key": key.version, "next_public_key": base64_text(key.signer.public_key())}
        line, head = self._signed(record.TYPE_AUDIT_KEY, ts, facts)
        self._append(line)
        self._follow(line, head)
        self.key = key

    def _signed(
        self,
        event_type: str,
        ts: int,
        facts: Facts | None = None,
        *,
        head: Head | None = None,
        coverage: Coverage | None = None,
    ) -> tuple[bytes, Head]:
        return chain.signed_line(
            event_type,
            head=head or self.head,
            ts=ts,
            coverage=coverage or self._coverage,
            log_id=self.log_id,
            key=self.key,
            extra=facts,
        )

    def _follow(self, signed_line: bytes, head: Head) -> None:
        """Go on after a signed line, with which a new coverage begins."""
        self.head = head
        self._coverage = _coverage_of(signed_line)

    def _append(self, blob: bytes) -> None:
        """Write `blob` whole, or raise OSError with the file cut back to where it was."""
        self._cut_due = True
        try:
            write_whole(self._fd, blob)
        except OSError:
            with contextlib.suppress(OSError):
                self._cut()
            raise
        self._cut_due = False
        self.size += len(blob)
        self.durability.wrote(len(blob))

    def _cut(self) -> None:
        os.ftruncate(self._fd, self.size)
        self._cut_due = False

    def repair(self) -> None:
        """Settle what a failure left. Raises OSError when that is still not possible: nothing may be written then."""
        if self._cut_due:
            self._cut()
        if self._next is not None:
            self._finish_rotation(self._next)
        if self.durability.failed:
            raise OSError(errno.EIO, "lines are not confirmed by the disk")

    def close(self) -> None:
        if self._next is not None:
            os.close(self._next.fd)
        self.durability.close()

    # --- files -------------------------------------------------------------------------------------------------------

    def rotate(self, ts: int) -> None:
        """Close the file and go on in a new one. Waits for the disk."""
        close_line, closed = self._signed(record.TYPE_SEGMENT_CLOSE, ts, {"next_segment": self.segment + 1})
        event = chain.segment_open_event(
            self.log_id,
            self.key.version,
            self.key.signer.public_key(),
            segment=self.segment + 1,
            previous=closed,
            closed=_coverage_of(close_line),
        )
        first_line, head = chain.seal([event], closed, self.key.mac_key, ts)
        fd = create_file(self._directory, first_line)
        try:
            self._append(close_line)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._directory, NEXT_NAME))
            raise
        self._follow(close_line, closed)
        self._next = _Next(fd, first_line, head, ts)
        self._finish_rotation(self._next)

    def _finish_rotation(self, following: _Next) -> None:
        log_path = os.path.join(self._directory, LOG_NAME)
        if not following.old_renamed:
            self.durability.sync()
            closed_path = os.path.join(self._directory, segment_name(self.segment))
            try:
                os.rename(log_path, closed_path)
            except FileNotFoundError:  # done by an attempt before, which reported an error all the same
                os.stat(closed_path)
            following.old_renamed = True
        with contextlib.suppress(FileNotFoundError):  # renamed by an attempt before, which failed after it
            os.rename(os.path.join(self._directory, NEXT_NAME), log_path)
        reader.fsync_directory(self._directory)
        self.durability.switch(following.fd, len(following.first_line))
        self._fd = following.fd
        self.size = len(following.first_line)
        self.head = following.head
        self.segment += 1
        self.segment_ts = following.ts
        self._segment_seq = following.head.seq
        self._coverage = _coverage_of(following.first_line)
        self._next = None


def _coverage_of(line: bytes) -> Coverage:
    coverage = Coverage()
    coverage.add(line, 1)
    return coverage
