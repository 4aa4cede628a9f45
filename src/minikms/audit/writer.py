"""The file being written: its chain, and the disk space reserved for it.

Owns: the head, the coverage of the next signed line, the reserve file, and the rotation to the next file; appends and
syncs are those of `minikms.platform.append_only`. Invariants:

- A method of `ChainWriter` that raises OSError has changed nothing, or `repair` completes or undoes its change before
  anything else is written: the rest of a failed write that could not be truncated, or a rotation that can't be undone.
- The file holds only whole lines, each chained to the previous one.
- The blocks of the reserve file are allocated. It frees only as many as the log needs, step by step, because any
  process may take free space on a full disk. It holds no content, and without it a start succeeds too.

`ChainWriter` and `Reserve` belong to one thread at a time; another thread may call `sync` of
`ChainWriter.file`. It must never hold key bytes.

A rotation writes and syncs the next file under another name; then it ends the old file with `segment_close`, after
which it can't be undone; then it syncs the old file, renames it to its number and syncs the directory; then it renames
the next file to the log's name. `minikms.audit.repair` completes a rotation after a crash between any two of these
steps.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from minikms.api.base64 import encode_text
from minikms.audit import chain, record
from minikms.audit.chain import AuditKey, Coverage, KeyState
from minikms.audit.reader import FILE_MODE, LOG_NAME, NEXT_NAME, segment_name
from minikms.audit.record import Event, Facts, LineRef
from minikms.audit.repair import OpenedLog, create_file
from minikms.platform.append_only import AppendOnlyFile
from minikms.platform.sync import sync_directory

CHECKPOINT_LINES: Final = 10_000
CHECKPOINT_BYTES: Final = 8 * 1024 * 1024
"""A checkpoint costs about 150 µs: at either bound less than 0.02 µs a line. A start reads the lines between two."""
_EVENTS_AT_A_TIME: Final = 8
"""Eight of the longest lines are as many bytes as there may be between two checkpoints."""

RESERVE_NAME: Final = "minikms-audit.reserve"
RESERVE_BYTES: Final = 4 * 1024 * 1024
"""About 16,000 lines: enough for an operator to notice the alarm and react."""
RELEASE_BYTES: Final = 64 * 1024


class Reserve:
    """Disk space reserved for lines on a full disk. The methods return whether they succeeded; none raises OSError."""

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
        """Allocate the whole reserve. False if the disk does not have the space."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self._path, flags, FILE_MODE)
        except OSError:
            return False
        try:
            if self._size:
                _allocate(fd, self._size)
            os.ftruncate(fd, self._size)
        except OSError:
            # Free what the failed allocation took; keep what was allocated before.
            with contextlib.suppress(OSError):
                os.ftruncate(fd, self.left_bytes)
            return False
        finally:
            os.close(fd)
        self.left_bytes = self._size
        return True

    def release(self) -> bool:
        """Free the next `RELEASE_BYTES`. False if nothing is left."""
        left_bytes = max(0, self.left_bytes - RELEASE_BYTES)
        if self.left_bytes == 0:
            return False
        try:
            os.truncate(self._path, left_bytes)
        except OSError:
            self.left_bytes = 0
            return False
        self.left_bytes = left_bytes
        return True


class _NextFile(msgspec.Struct):
    """The next file of a rotation that is not complete: written and synced, but without the log's name."""

    fd: int
    first_line: bytes
    head: LineRef
    old_renamed: bool = False


class ChainWriter:
    """Writes chained lines to an opened log, with the checkpoints that are due."""

    def __init__(self, directory: str, opened: OpenedLog) -> None:
        self._directory = directory
        self._coverage = opened.coverage
        self._next: _NextFile | None = None
        self.log_id = opened.log_id
        self.key = opened.key
        self.head = opened.head
        self.segment = opened.segment
        self._segment_seq = opened.segment_seq
        self.state: Callable[[], KeyState] = lambda: opened.state
        """The state of the key files, for signed lines. Until its owner sets it, that of the log's last one stays."""
        self.file = AppendOnlyFile(os.path.join(directory, LOG_NAME), opened.fd, opened.size)

    @property
    def unsigned_lines(self) -> int:
        """Number of lines after the last signed line, or after the file's first line if no line is signed."""
        return self._coverage.lines_count if self.fresh else self._coverage.lines_count - 1

    @property
    def fresh(self) -> bool:
        """Whether the file holds only its first line."""
        return self.head.seq == self._segment_seq

    # --- lines -------------------------------------------------------------------------------------------------------

    def write(self, events: Sequence[Event], ts: int, *, escaped: bool = False) -> None:
        """Write `events` with one call, and a checkpoint if one is due. `escaped`: as of `chain.make_lines`. Raises
        OSError.
        """
        key = self.key
        blob, head = chain.make_lines(events, self.head, key.mac_key, ts, escaped=escaped, signer=key.signer)
        coverage = self._coverage
        if (
            coverage.lines_count + len(events) < CHECKPOINT_LINES
            and coverage.bytes_count + len(blob) < CHECKPOINT_BYTES
        ):
            self.file.append(blob)
            coverage.add(blob, len(events))
            self.head = head
        else:
            self._write_with_checkpoints(events, ts)

    def _write_with_checkpoints(self, events: Sequence[Event], ts: int) -> None:
        """Write `events` with the checkpoints that are due between them, with one call."""
        head, coverage, key = self.head, self._coverage.copy(), self.key
        parts = []
        for begin in range(0, len(events), _EVENTS_AT_A_TIME):
            some = events[begin : begin + _EVENTS_AT_A_TIME]
            blob, head = chain.make_lines(some, head, key.mac_key, ts, escaped=True, signer=key.signer)
            parts.append(blob)
            coverage.add(blob, len(some))
            if coverage.lines_count >= CHECKPOINT_LINES or coverage.bytes_count >= CHECKPOINT_BYTES:
                line, head = self._signed(record.TYPE_CHECKPOINT, ts, head=head, coverage=coverage)
                parts.append(line)
                coverage = Coverage.of_line(line)
        self.file.append(b"".join(parts))
        self.head, self._coverage = head, coverage

    def checkpoint(self, ts: int) -> None:
        """Sign the lines since the last signed line. Raises OSError."""
        line, head = self._signed(record.TYPE_CHECKPOINT, ts)
        self.file.append(line)
        self._after_signed(line, head)

    def change_key(self, key: AuditKey, ts: int) -> None:
        """Announce `key` in a line under the active key, and use it from the next line on. Raises OSError."""
        facts: Facts = {"next_key": key.version, "next_public_key": encode_text(key.signer.public_key())}
        line, head = self._signed(record.TYPE_AUDIT_KEY, ts, facts)
        self.file.append(line)
        self._after_signed(line, head)
        self.key = key

    def _signed(
        self,
        event_type: str,
        ts: int,
        facts: Facts | None = None,
        *,
        head: LineRef | None = None,
        coverage: Coverage | None = None,
    ) -> tuple[bytes, LineRef]:
        return chain.signed_line(
            event_type,
            head=head or self.head,
            ts=ts,
            coverage=coverage or self._coverage,
            log_id=self.log_id,
            key=self.key,
            state=self.state(),
            extra=facts,
        )

    def _after_signed(self, signed_line: bytes, head: LineRef) -> None:
        """Continue after a signed line, which begins a new coverage."""
        self.head = head
        self._coverage = Coverage.of_line(signed_line)

    def repair(self) -> None:
        """Complete or undo what an earlier failure left. While it raises OSError, nothing may be written."""
        if self._next is not None:
            self._finish_rotation(self._next)
        self.file.repair()

    def close(self) -> None:
        if self._next is not None:
            os.close(self._next.fd)
        self.file.close()

    # --- files -------------------------------------------------------------------------------------------------------

    def rotate(self, ts: int) -> None:
        """End this file and continue in a new one. Waits for the disk. Raises OSError."""
        close_line, closed = self._signed(record.TYPE_SEGMENT_CLOSE, ts, {"next_segment": self.segment + 1})
        event = chain.segment_open_event(
            self.log_id,
            self.key.version,
            self.key.signer.public_key(),
            segment=self.segment + 1,
            previous=closed,
            closed=Coverage.of_line(close_line),
            state=self.state(),
        )
        first_line, head = chain.make_lines([event], closed, self.key.mac_key, ts)
        fd = create_file(self._directory, first_line)
        try:
            self.file.append(close_line)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._directory, NEXT_NAME))
            raise
        self._after_signed(close_line, closed)
        self._next = _NextFile(fd, first_line, head)
        self._finish_rotation(self._next)

    def _finish_rotation(self, following: _NextFile) -> None:
        log_path = os.path.join(self._directory, LOG_NAME)
        if not following.old_renamed:
            self.file.sync()
            closed_path = os.path.join(self._directory, segment_name(self.segment))
            try:
                os.rename(log_path, closed_path)
            except FileNotFoundError:  # an earlier attempt renamed it and reported an error nevertheless
                os.stat(closed_path)
            # Otherwise a power cut may keep the second rename without the first one, and lose the old file.
            sync_directory(self._directory)
            following.old_renamed = True
        with contextlib.suppress(FileNotFoundError):  # an earlier attempt renamed it and failed later
            os.rename(os.path.join(self._directory, NEXT_NAME), log_path)
        sync_directory(self._directory)
        self.file.switch(following.fd, len(following.first_line))
        self.head = following.head
        self.segment += 1
        self._segment_seq = following.head.seq
        self._coverage = Coverage.of_line(following.first_line)
        self._next = None


def _allocate(fd: int, size: int) -> None:
    """Give the file its blocks. Raises OSError if the disk does not have them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
        return
    zeros, done = bytes(RELEASE_BYTES), 0
    while done < size:  # macOS has no posix_fallocate
        done += os.pwrite(fd, zeros[: size - done], done)
