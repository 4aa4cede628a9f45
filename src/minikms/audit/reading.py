"""Reading a log's files as one sequence of lines, also while a daemon writes them.

Owns: opening a segment, whatever its form, and cutting it into lines. Invariants: memory is bounded by one chunk and
one line; a file that is renamed or compressed meanwhile is read once and whole; the file of the log's name is always
read, and is the last one; nothing is judged here. It must never write, take the lock of the data directory, follow a
symbolic link, or wait for what is not a regular file.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from typing import BinaryIO, ClassVar, Final, Protocol

import zstandard

from minikms.audit import frame, record, segments
from minikms.audit.record import MalformedLineError
from minikms.audit.segments import COMPRESSED_SUFFIX, LOG_NAME
from minikms.errors import MiniKmsError

CHUNK_BYTES: Final = 1024 * 1024
OPEN_ATTEMPTS: Final = 5
GROWTH_WAIT_S: Final = 0.1
"""How long an incomplete last line is given to be completed by a daemon that is writing it."""
LINE_SKIPPED_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of a line that is too long: how much of it is skipped to find the next one. A small file may unpack to terabytes."""


class DamagedSegmentError(MiniKmsError):
    """A segment can't be read to its end: it does not decompress, or one line of it never ends."""

    code: ClassVar[str] = "audit_damaged"


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


class SegmentFile:
    """An open segment. number: from its name, or for the file being written from its first line (0 when that is
    damaged).

    size: bytes on disk when it was opened. closed: nothing more is written to it; of the file being written that is
    known once `lines` has ended.
    """

    def __init__(self, file: BinaryIO, directory: str, name: str, number: int) -> None:
        self._file = file
        self._directory = directory
        self.name = name
        self.number = number
        self.closed = name != LOG_NAME
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
        """Every whole line without its newline, at least up to where the file ended when it was opened; to its end
        where it is closed meanwhile.

        A line longer than `record.LINE_BYTES_MAX` comes cut to about that length. Raises DamagedSegmentError, and
        OSError.
        """
        source = self._source()
        rest = b""
        skipped = 0  # bytes of a line that was cut, while it goes on
        waited = False
        while True:
            chunk = self._read(source)
            if not chunk:
                if self.closed:
                    break
                if self._was_closed():
                    continue  # what was written before it lost its name is there now
                if not rest or waited:
                    break
                waited = True
                time.sleep(GROWTH_WAIT_S)
                continue
            waited = False
            *whole, rest = (rest + chunk).split(b"\n")
            if skipped and whole:
                skipped = 0
                del whole[0]
            yield from whole
            if skipped or len(rest) >= record.LINE_BYTES_MAX:
                if not skipped:
                    yield rest
                skipped += len(rest)
                rest = b""
                if skipped > LINE_SKIPPED_BYTES_MAX:
                    raise DamagedSegmentError(f"{self.name} holds a line of more than {LINE_SKIPPED_BYTES_MAX} bytes")
            if not rest and not self.closed and self.position >= self.size and not self._was_closed():
                break
        self.rest = rest

    def _source(self) -> _Reader:
        if not self.compressed:
            return self._file
        if fault := frame.fault_of(self._file.fileno()):
            raise DamagedSegmentError(f"{self.name} does not decompress: {fault}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=frame.WINDOW_BYTES_MAX)
        return decompressor.stream_reader(self._file, closefd=False)

    def _read(self, source: _Reader) -> bytes:
        try:
            return source.read(CHUNK_BYTES)
        except zstandard.ZstdError as error:
            raise DamagedSegmentError(f"{self.name} does not decompress: {error}") from None

    def _was_closed(self) -> bool:
        """Whether the file being written has lost its name since it was opened: what it holds now is all of it."""
        try:
            status = os.stat(os.path.join(self._directory, LOG_NAME), follow_symlinks=False)
        except FileNotFoundError:
            self.closed = True
        else:
            self.closed = (status.st_dev, status.st_ino) != self.identity
        return self.closed

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

    Nothing is yielded when there is no log. A file that a rotation renames meanwhile comes once. The last one is that
    of the log's name, unless it is missing. Raises OSError, also for what is not a regular file.
    """
    last, seen = after, None
    for _ in range(OPEN_ATTEMPTS):
        while (file := next_segment(directory, last, seen)) is not None:
            with file:
                yield file
            if not file.closed:
                return
            last, seen = max(last, file.number or last + 1), file.identity
        # Between the two renames of a rotation there is no file of the log's name.
        if not segments.list_segments(directory):
            return
        time.sleep(GROWTH_WAIT_S)


def next_segment(directory: str, last: int, seen: tuple[int, int] | None = None) -> SegmentFile | None:
    """The first file after segment `last`, for the caller to close; None when there is none (yet).

    seen: identity of the file read before, which is not the next under whatever name. The file of the log's name comes
    after all others, also where its first line claims a number that was there already: that is for the caller to judge.
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
        if file.identity == seen:
            file.close()
            return None
        file.number = _number_of(file)
        return file
    return None


def _open_closed(directory: str, number: int) -> SegmentFile | None:
    for compressed in (False, True):
        name = segments.segment_name(number, compressed=compressed)
        if (file := _open(directory, name, number)) is not None:
            return file
    return None


def _open(directory: str, name: str, number: int) -> SegmentFile | None:
    path = os.path.join(directory, name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return SegmentFile(os.fdopen(fd, "rb"), directory, name, number)


def _number_of(file: SegmentFile) -> int:
    try:
        segment = record.parse_line(file.first_line())[0].facts.get("segment")
    except (MalformedLineError, DamagedSegmentError):
        return 0
    return segment if isinstance(segment, int) else 0
