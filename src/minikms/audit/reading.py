"""Reading a log's files as one sequence of lines, also while a daemon writes them.

Owns: opening a segment, whatever its form, and cutting it into lines. Invariants: memory is bounded by one chunk and
one line; a file that is renamed or compressed meanwhile is read once and whole; nothing is judged here. It must never
write, take the lock of the data directory, or follow a symbolic link.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import BinaryIO, Final, Protocol

import zstandard

from minikms.audit import record, segments
from minikms.audit.record import MalformedLineError
from minikms.audit.segments import COMPRESSED_SUFFIX, LOG_NAME

CHUNK_BYTES: Final = 1024 * 1024
OPEN_ATTEMPTS: Final = 5
GROWTH_WAIT_S: Final = 0.1
"""How long an incomplete last line is given to be completed by a daemon that is writing it."""
_ZSTD_WINDOW_BYTES_MAX: Final = 8 * 1024 * 1024
"""Of a compressed segment; a larger window would need more memory than one chunk and one line."""


class DamagedSegmentError(Exception):
    """A compressed segment does not decompress."""


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


class SegmentFile:
    """An open segment. number: from its name, or for the file being written from its first line (0 when that is
    damaged).

    size: bytes on disk when it was opened.
    """

    def __init__(self, file: BinaryIO, name: str, number: int) -> None:
        self._file = file
        self.name = name
        self.number = number
        status = os.fstat(file.fileno())
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino)
        self.rest = b""
        """After `lines` has ended: the bytes of an incomplete last line."""

    @property
    def compressed(self) -> bool:
        return self.name.endswith(COMPRESSED_SUFFIX)

    @property
    def position(self) -> int:
        """Bytes read from the disk so far."""
        return self._file.tell()

    def lines(self) -> Iterator[bytes]:
        """Every whole line without its newline, at least up to where the file ended when it was opened.

        A line longer than `record.LINE_BYTES_MAX` comes cut to about that length. Raises DamagedSegmentError, and
        OSError.
        """
        source: _Reader = self._file
        if self.compressed:
            decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES_MAX)
            source = decompressor.stream_reader(self._file, read_across_frames=True, closefd=False)
        rest = b""
        cutting = waited = False
        while True:
            chunk = _read(source)
            if not chunk:
                if not rest or waited or self.compressed:
                    break
                waited = True
                time.sleep(GROWTH_WAIT_S)
                continue
            waited = False
            *whole, rest = (rest + chunk).split(b"\n")
            if cutting and whole:
                cutting = False
                del whole[0]
            yield from whole
            if len(rest) >= record.LINE_BYTES_MAX:
                if not cutting:
                    yield rest
                rest, cutting = b"", True
            if not rest and not self.compressed and self.position >= self.size:
                break
        self.rest = rest

    def first_line(self) -> bytes:
        """The first line, of a file that has not been read from; empty when there is none."""
        line = next(self.lines(), b"")
        self._file.seek(0)
        return line

    def seek(self, offset: int) -> None:
        """Go on reading at `offset`, of a file that is not compressed."""
        self._file.seek(offset)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SegmentFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def each_segment(directory: str, *, after: int = 0) -> Iterator[SegmentFile]:
    """The log's files in order, those numbered up to `after` left out; each is closed when the next is asked for.

    Nothing is yielded when there is no log. A file that a rotation renames meanwhile comes once.
    """
    last, seen = after, None
    for _ in range(OPEN_ATTEMPTS):
        while (file := next_segment(directory, last, seen)) is not None:
            with file:
                yield file
            last, seen = file.number or last + 1, file.identity
        # Between the two renames of a rotation there is no file of the log's name.
        if not segments.list_segments(directory) or os.path.exists(os.path.join(directory, LOG_NAME)):
            return
        time.sleep(GROWTH_WAIT_S)


def next_segment(directory: str, last: int, seen: tuple[int, int] | None = None) -> SegmentFile | None:
    """The first file after segment `last`, for the caller to close; None when there is none (yet).

    seen: identity of the file read before, which is not the next even where its first line does not tell its number.
    """
    for _ in range(OPEN_ATTEMPTS):
        closed = [number for number in segments.list_segments(directory) if number > last]
        if closed:
            file = _open_closed(directory, closed[0])
            if file is not None:
                return file
            continue  # compressed or removed since it was listed
        file = _open(directory, LOG_NAME, 0)
        if file is None:
            return None
        if any(number > last for number in segments.list_segments(directory)):
            file.close()
            continue  # rotated since the closed ones were listed
        file.number = _number_of(file.first_line())
        if file.identity == seen or 0 < file.number <= last:
            file.close()
            return None
        return file
    return None


def _open_closed(directory: str, number: int) -> SegmentFile | None:
    for compressed in (False, True):
        name = segments.segment_name(number, compressed=compressed)
        if (file := _open(directory, name, number)) is not None:
            return file
    return None


def _open(directory: str, name: str, number: int) -> SegmentFile | None:
    try:
        fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    return SegmentFile(os.fdopen(fd, "rb"), name, number)


def _number_of(first_line: bytes) -> int:
    try:
        segment = record.parse_line(first_line)[0].facts.get("segment")
    except MalformedLineError:
        return 0
    return segment if isinstance(segment, int) else 0


def _read(source: _Reader) -> bytes:
    try:
        return source.read(CHUNK_BYTES)
    except zstandard.ZstdError as error:
        raise DamagedSegmentError(str(error)) from None
