"""Maintenance of closed log files: retention and compression, beside the daemon's other work.

Owns: which closed files may be removed, turning `minikms-audit.log.<n>` into `minikms-audit.log.<n>.zst`, and when and
in which thread each of these jobs runs. Invariants:

- Retention removes only the oldest files, one after the other, while all closed files together exceed `bytes_max`, no
  file that was closed less than `days_min` ago, and none with a line that an auditor has not taken. A durable and
  signed `retention` line names each file, with its last line, before it is deleted, so that a verifier can distinguish
  a removed file from a missing one.
- Compression deletes the plain file only after it has read back the compressed one and found it equal. That also holds
  for a compressed file that it did not write. So a complete copy of each segment is on disk at every moment.
- Both jobs run once a segment was closed, first compression, because retention counts bytes on disk. Retention also
  runs once an hour, for files that get old enough or that an auditor takes later. A job that failed runs again soon.
- `Maintenance.tick` belongs to the thread of the log, `Maintenance.work` to a worker thread of its own. Neither raises;
  `Maintenance.faults` has the failures.

It must never touch the file being written, delay a commit, delete a file if it can't read the next one, or bring back
one that retention has deleted.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import BinaryIO, Final

import msgspec
import zstandard

from minikms.api.base64 import decode_exact, encode_text
from minikms.api.errors import AuditUnavailableError
from minikms.audit import record
from minikms.audit.log import AuditLog
from minikms.audit.reader import (
    CHUNK_BYTES,
    WINDOW_BYTES_MAX,
    DamagedSegmentError,
    frame_fault,
    list_segments,
    make_log_file,
    next_segment,
    segment_name,
)
from minikms.audit.record import ACTOR_SELF, Event, Facts, LineRef
from minikms.platform.sync import sync_directory, sync_file

AGAIN_CALLS: Final = 3600
"""A job runs again after so many calls even if no segment was closed: `Maintenance.tick` is called once a second."""
RETRY_CALLS: Final = 60
"""The same after a failure: each attempt of retention writes a line, and one of compression reads a whole segment."""

COMPRESSION_LEVEL: Final = 3
"""zstd's default: about 300 MB/s on one core."""

_DAY_NS: Final = 24 * 3600 * 1_000_000_000
_TEMPORARY_SUFFIX: Final = ".tmp"


# --- retention -------------------------------------------------------------------------------------------------------


class LogRetention(msgspec.Struct, frozen=True, kw_only=True):
    """bytes_max: of all closed files together, 0 for no bound. days_min: takes precedence over `bytes_max`."""

    bytes_max: int = 0
    days_min: int = 90


KEEP_ALL: Final = LogRetention()


class RemovableSegment(msgspec.Struct, frozen=True):
    """A closed segment that may be removed: its number, the names of its files, and its last line."""

    number: int
    names: tuple[str, ...]
    last: LineRef

    def event(self) -> Event:
        """The `retention` event that must be durable and signed before the files are deleted."""
        facts: Facts = {
            "last_seq": self.last.seq,
            "last_sig": encode_text(self.last.sig),
            "removed_segment": self.number,
        }
        return Event(type=record.TYPE_RETENTION, actor=ACTOR_SELF, facts=facts)


def removable_segments(
    directory: str, keep: LogRetention, now_ns: int, taken_seq: int | None = None
) -> list[RemovableSegment]:
    """The segments that `keep` no longer retains, oldest first. `taken_seq`: the last line that an auditor has taken;
    None: there is no auditor. Raises OSError and DamagedSegmentError.
    """
    closed = list_segments(directory)
    total = sum(_size(directory, name) for names in closed.values() for name in names)
    removable = []
    for number, names in closed.items():
        if not keep.bytes_max or total <= keep.bytes_max:
            break
        following = _first_event(directory, number + 1)
        if following is None or now_ns - following.ts < keep.days_min * _DAY_NS:
            break
        sig = decode_exact(following.facts.get("previous_sig"), record.MAC_BYTES)
        seq = following.facts.get("previous_seq")
        if sig is None or not isinstance(seq, int) or (taken_seq is not None and seq > taken_seq):
            break
        removable.append(RemovableSegment(number, tuple(names), LineRef(seq, sig)))
        total -= sum(_size(directory, name) for name in names)
    return removable


def remove_segments(log: AuditLog, keep: LogRetention, taken_seq: int | None = None) -> list[str]:
    """Remove the segments that `keep` no longer retains, after durable and signed lines that name them. `taken_seq`: as
    for `removable_segments`.

    Returns the names of the deleted files. Raises AuditUnavailableError, before anything is deleted, OSError and
    DamagedSegmentError.
    """
    segments = removable_segments(log.directory, keep, log.now_ns(), taken_seq)
    if not segments:
        return []
    for segment in segments:
        log.add(segment.event())
    log.sign_and_sync()
    for segment in segments:
        for name in segment.names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(log.directory, name))
        sync_directory(log.directory)
    return [name for segment in segments for name in segment.names]


def _first_event(directory: str, number: int) -> Event | None:
    """The first event of segment `number`; None if that is not the next file or its first line is malformed."""
    file = next_segment(directory, number - 1)
    if file is None:
        return None
    with file:
        return file.first_event() if file.number == number else None


def _size(directory: str, name: str) -> int:
    try:
        return os.stat(os.path.join(directory, name), follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


# --- compression -----------------------------------------------------------------------------------------------------


class CompressionError(OSError):
    """The compressed file does not decompress to the bytes of the plain file, which was kept."""


_ALONE: Final = contextlib.nullcontext()


def compress_closed(
    directory: str, *, below: int = sys.maxsize, exclusive: AbstractContextManager[object] = _ALONE
) -> list[str]:
    """Compress every closed file that is still plain, and return the new names.

    below: number of the segment that a writer beside this call is writing; that segment and later ones are skipped.
    exclusive: entered for the moments in which no file may be removed by another. Raises OSError and CompressionError;
    files compressed until then stay compressed.
    """
    done = []
    for number, names in list_segments(directory).items():
        plain, compressed = segment_name(number), segment_name(number, compressed=True)
        if plain not in names or number >= below:
            continue
        try:
            if compressed not in names or not _holds_the_same(directory, plain, compressed):
                _compress(directory, plain, compressed, exclusive)
                done.append(compressed)
            with exclusive:
                os.unlink(os.path.join(directory, plain))
                sync_directory(directory)
        except FileNotFoundError:  # retention has removed it meanwhile
            continue
    return done


def _compress(directory: str, plain: str, compressed: str, exclusive: AbstractContextManager[object]) -> None:
    """Compresses the plain file. Raises FileNotFoundError if it was removed meanwhile."""
    target = os.path.join(directory, compressed)
    temporary = target + _TEMPORARY_SUFFIX
    try:
        with _open(directory, plain) as source, open(make_log_file(temporary, os.O_RDWR | os.O_TRUNC), "r+b") as file:
            zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=True).copy_stream(source, file)
            file.flush()
            _compare(source, file)
            sync_file(file.fileno())
        with exclusive:
            os.stat(os.path.join(directory, plain))
            os.rename(temporary, target)
            sync_directory(directory)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


def _holds_the_same(directory: str, plain: str, compressed: str) -> bool:
    try:
        with _open(directory, plain) as source, _open(directory, compressed) as file:
            _compare(source, file)
    except (CompressionError, FileNotFoundError):
        return False
    return True


def _open(directory: str, name: str) -> BinaryIO:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return open(os.open(os.path.join(directory, name), flags), "rb")


def _compare(plain: BinaryIO, compressed: BinaryIO) -> None:
    """Checks that `compressed` decompresses to the bytes of `plain`. Raises CompressionError."""
    if fault := frame_fault(compressed.fileno()):
        raise CompressionError(f"a compressed segment can't be read back: {fault}")
    plain.seek(0)
    compressed.seek(0)
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
    unpacked = decompressor.stream_reader(compressed, closefd=False)
    while True:
        expected = plain.read(CHUNK_BYTES)
        try:
            chunk = unpacked.read(CHUNK_BYTES)
        except zstandard.ZstdError as error:
            raise CompressionError(f"a compressed segment can't be read back: {error}") from None
        if chunk != expected:
            raise CompressionError("a compressed segment does not hold the same bytes as the plain one")
        if not chunk:
            return


# --- when and where --------------------------------------------------------------------------------------------------


class _Schedule:
    """When a job runs: at the first call, once a segment was closed, and after a number of calls."""

    def __init__(self) -> None:
        self._calls = 0
        self.segment = 0
        """The segment that was being written, or compressed up to, when the job ran last."""

    def is_due(self, segment: int) -> bool:
        self._calls -= 1
        return self._calls < 0 or segment != self.segment

    def ran(self, segment: int, *, failed: bool) -> None:
        self.segment, self._calls = segment, RETRY_CALLS if failed else AGAIN_CALLS


class Maintenance:
    """The maintenance of one open log. Without `keep` every file is kept. `taken_seq`: says which line an auditor has
    taken last, None where there is no auditor.
    """

    def __init__(
        self, log: AuditLog, *, keep: LogRetention | None = None, taken_seq: Callable[[], int | None] = lambda: None
    ) -> None:
        self._log = log
        self._taken_seq = taken_seq
        self._keep = keep
        self._retention = _Schedule()
        self._compression = _Schedule()
        self._files = threading.Lock()
        """Held while files are removed, and while a compressed one replaces a plain one."""
        self._faults: dict[str, str] = {}

    def tick(self) -> None:
        """Call this about once a second in the thread of the log: the log's own chores, and retention if it is due."""
        self._log.tick()
        compressed = self._compression.segment
        if self._keep is None or not self._retention.is_due(compressed) or not self._files.acquire(blocking=False):
            return
        try:
            remove_segments(self._log, self._keep, self._taken_seq())
        except (AuditUnavailableError, DamagedSegmentError, OSError) as error:
            self._faults["retention"] = _reason(error)
        else:
            self._faults.pop("retention", None)
        finally:
            self._files.release()
        self._retention.ran(compressed, failed="retention" in self._faults)

    def work(self) -> None:
        """Compress closed files if there are new ones. Call this every few seconds in a worker thread."""
        segment = self._log.writer.segment
        if not self._compression.is_due(segment):
            return
        try:
            compress_closed(self._log.directory, below=segment, exclusive=self._files)
        except (DamagedSegmentError, OSError) as error:
            self._faults["compression"] = _reason(error)
        else:
            self._faults.pop("compression", None)
        self._compression.ran(segment, failed="compression" in self._faults)

    @property
    def faults(self) -> dict[str, str]:
        """The reason by job, of each job that failed the last time."""
        return dict(self._faults)


def _reason(error: Exception) -> str:
    return error.strerror or "failed" if isinstance(error, OSError) else str(error)
