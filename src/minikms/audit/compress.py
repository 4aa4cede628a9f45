"""Compressing closed files, beside everything else.

Owns: turning `minikms-audit.log.<n>` into `minikms-audit.log.<n>.zst`. Invariants: at each moment at least one form
of a segment is there, whole and on disk; the plain one goes only after the compressed one was read back and found
equal, also one that was there before: it may be another's. For a worker thread: it shares nothing with the log but
the directory, and closed files never change. It must never touch the file being written.
"""

from __future__ import annotations

import os
import sys
from typing import BinaryIO, Final

import zstandard

from minikms.audit import frame, segments
from minikms.audit.reading import CHUNK_BYTES
from minikms.audit.segments import FILE_MODE, segment_name

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
