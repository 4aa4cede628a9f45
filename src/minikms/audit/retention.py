"""Closed files that need not be kept any longer.

Owns: which of them may go, and deleting them. Rules: only the oldest go, one after the other, as long as all closed
files together hold more than `bytes_max`; none goes that was closed less than `days_min` ago; each is named, with the
head that it ended with, by a durable and signed `retention` line before any is deleted, so that a verifier can tell it
from one that was taken away. It must never touch the file being written, nor delete where it can't read what follows.

Compressing closed files, beside everything else.

Owns: turning `minikms-audit.log.<n>` into `minikms-audit.log.<n>.zst`. Invariants: at each moment at least one form
of a segment is there, whole and on disk; the plain one goes only after the compressed one was read back and found
equal, also one that was there before: it may be another's. For a worker thread: it shares nothing with the log but
the directory, and closed files never change. It must never touch the file being written.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import BinaryIO, Final

import msgspec
import zstandard

from minikms.audit import reader, record
from minikms.audit import reader as frame
from minikms.audit import reader as segments
from minikms.audit.chain import base64_bytes, base64_text
from minikms.audit.reader import CHUNK_BYTES, FILE_MODE, each_segment, segment_name
from minikms.audit.record import ACTOR_SELF, Event, Head, MalformedLineError

_DAY_NS: Final = 24 * 3600 * 1_000_000_000


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """bytes_max: of all closed files together, 0 for no bound. days_min: the floor, which wins over `bytes_max`."""

    bytes_max: int = 0
    days_min: int = 90


KEEP_ALL: Final = Retention()


class Removal(msgspec.Struct, frozen=True):
    """A closed file that may go: its number, its names, the head that it ended with."""

    number: int
    names: tuple[str, ...]
    last: Head

    def event(self) -> Event:
        """What the log must say, durably, before `delete`."""
        facts: record.Facts = {
            "last_seq": self.last.seq,
            "last_sig": base64_text(self.last.sig),
            "removed_segment": self.number,
        }
        return Event(type=record.TYPE_RETENTION, actor=ACTOR_SELF, facts=facts)


def due(directory: str, keep: Retention, now_ns: int) -> list[Removal]:
    """The files that may go now, oldest first. Raises OSError."""
    closed = reader.list_segments(directory)
    total = sum(_size(directory, name) for names in closed.values() for name in names)
    removals = []
    for number, names in closed.items():
        if not keep.bytes_max or total <= keep.bytes_max:
            break
        following = _first_event(directory, number + 1)
        if following is None or now_ns - following.ts < keep.days_min * _DAY_NS:
            break
        sig = base64_bytes(following.facts.get("previous_sig"), record.MAC_BYTES)
        seq = following.facts.get("previous_seq")
        if sig is None or not isinstance(seq, int):
            break
        removals.append(Removal(number, tuple(names), Head(seq, sig)))
        total -= sum(_size(directory, name) for name in names)
    return removals


def delete(directory: str, removal: Removal) -> list[str]:
    """Delete the file, in each form that there is. Returns the names. Raises OSError."""
    for name in removal.names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))
    reader.fsync_directory(directory)
    return list(removal.names)


def _first_event(directory: str, number: int) -> Event | None:
    """The first event of segment `number`, or None when that is not the next file or can't be read."""
    for file in each_segment(directory, after=number - 1):
        if file.number != number:
            return None
        try:
            return record.parse_line(file.first_line())[0]
        except MalformedLineError:
            return None
    return None


def _size(directory: str, name: str) -> int:
    try:
        return os.stat(os.path.join(directory, name), follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


LEVEL: Final = 3
"""zstd's default: some 300 MB/s on one core, and lines shrink to about a third; their MACs are random and don't."""
_TEMPORARY_SUFFIX: Final = ".tmp"


class CompressionError(OSError):
    """What was compressed does not decompress to the same bytes. The plain file was kept."""


def compress_closed(directory: str, *, below: int = sys.maxsize) -> list[str]:
    """Compress every closed file that is still plain. Returns the new names. Raises OSError; what was done stays done.

    below: beside a writer, the number of the segment that it writes: one that it is just closing is left alone.
    """
    done = []
    for number, names in segments.list_segments(directory).items():
        plain, compressed = segment_name(number), segment_name(number, compressed=True)
        if plain not in names or number >= below:
            continue
        if compressed not in names or not _holds_the_same(directory, plain, compressed):
            _compress(directory, plain, compressed)
            done.append(compressed)
        os.unlink(os.path.join(directory, plain))
        segments.fsync_directory(directory)
    return done


def _compress(directory: str, plain: str, compressed: str) -> None:
    target = os.path.join(directory, compressed)
    temporary = target + _TEMPORARY_SUFFIX
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with _open(directory, plain) as source, open(os.open(temporary, flags, FILE_MODE), "r+b") as file:
            zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).copy_stream(source, file)
            file.flush()
            _compare(source, file)
            os.fsync(file.fileno())
        os.rename(temporary, target)
        segments.fsync_directory(directory)
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
    """Raises CompressionError."""
    if fault := frame.fault_of(compressed.fileno()):
        raise CompressionError(f"a compressed segment can't be read back: {fault}")
    plain.seek(0)
    compressed.seek(0)
    reader = zstandard.ZstdDecompressor(max_window_size=frame.WINDOW_BYTES_MAX).stream_reader(compressed, closefd=False)
    while True:
        expected = plain.read(CHUNK_BYTES)
        try:
            chunk = reader.read(CHUNK_BYTES)
        except zstandard.ZstdError as error:
            raise CompressionError(f"a compressed segment can't be read back: {error}") from None
        if chunk != expected:
            raise CompressionError("a compressed segment does not hold what the plain one does")
        if not chunk:
            return
