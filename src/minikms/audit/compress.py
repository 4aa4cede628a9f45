"""Compressing closed files, beside everything else.

Owns: turning `minikms-audit.log.<n>` into `minikms-audit.log.<n>.zst`. Invariants: at each moment at least one form
of a segment is there, whole and on disk; the plain one goes only after the compressed one was read back and found
equal. For a worker thread: it shares nothing with the log but the directory, and closed files never change. It must
never touch the file being written.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import BinaryIO, Final

import zstandard

from minikms.audit import segments
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
        if compressed not in names:
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
        source_fd = os.open(os.path.join(directory, plain), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(source_fd, "rb") as source, open(os.open(temporary, flags, FILE_MODE), "r+b") as file:
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


def _compare(plain: BinaryIO, compressed: BinaryIO) -> None:
    plain.seek(0)
    compressed.seek(0)
    digest, expected = hashlib.sha256(), hashlib.sha256()
    with zstandard.ZstdDecompressor().stream_reader(compressed, closefd=False) as reader:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
    while chunk := plain.read(CHUNK_BYTES):
        expected.update(chunk)
    if digest.digest() != expected.digest():
        raise CompressionError("a compressed segment does not hold what the plain one does")
