"""The files of a log, and reading them as one sequence of lines while a daemon may write.

Owns: the names of the files and their order, opening a file whatever its form, splitting it into lines, and finding a
line by its number. `minikms.audit.following` follows the log. `minikms-audit.log` is the file being written.
`minikms-audit.log.<n>` are the closed files (n counts from 1), `minikms-audit.log.<n>.zst` the same compressed. Both
forms of one segment may exist for a moment, with the same content; the plain one counts. Invariants:

- Memory is bounded by one chunk and one line, whatever a file says about itself.
- A file that is renamed or compressed meanwhile is read once and completely. The file being written is always read,
  and is the last one.
- A compressed file is exactly one zstd frame (RFC 8878) with a checksum. `frame_fault` checks that before reading,
  because a decompressor that reads a stream ends without an error where the file ends, also within a frame.

It must never write into a file, judge a line, take a lock, wait for the log, follow a symbolic link, open what is not a
regular file, or touch a file of another name.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from typing import BinaryIO, Final, Protocol

import zstandard

from minikms.api.errors import KmsRefusedError
from minikms.audit import record
from minikms.audit.record import Event, MalformedLineError

LOG_NAME: Final = "minikms-audit.log"
COMPRESSED_SUFFIX: Final = ".zst"
NEXT_NAME: Final = LOG_NAME + ".next"
"""The name of a new segment until it gets the log's name."""

FILE_MODE: Final = 0o600
GROUP_FILE_MODE: Final = 0o640
"""The mode of the log's files in a directory that its group may read (`--audit-dir`)."""
DIRECTORY_MODE: Final = 0o700
GROUP_DIRECTORY_MODE: Final = 0o750
_GROUP_BITS: Final = stat.S_ISGID | stat.S_IRGRP

CHUNK_BYTES: Final = 1024 * 1024
OPEN_ATTEMPTS: Final = 5
GROWTH_WAIT_S: Final = 0.1
"""How long a reader waits for a daemon to complete an incomplete last line."""
LINE_SKIPPED_BYTES_MAX: Final = 16 * 1024 * 1024
"""How much of a line that is too long is skipped to find the next line. A small file may unpack to terabytes."""
NEAR_BYTES: Final = 1024 * 1024
"""A search for a line reads at most about this many bytes line by line: some milliseconds."""

_SEGMENT_PATTERN: Final = re.compile(r"minikms-audit\.log\.([1-9][0-9]*)(\.zst)?", re.ASCII)

WINDOW_BYTES_MAX: Final = 8 * 1024 * 1024
"""Bound of the decompressor's window. A larger one would need more memory than one chunk and one line."""
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_HEADER_BYTES_MAX: Final = 18
_CHECKSUM_BYTES: Final = 4
_BLOCK_HEADER_BYTES: Final = 3
_BLOCK_RLE: Final = 1
_BLOCK_RESERVED: Final = 3


def frame_fault(fd: int) -> str:
    """Why the file `fd` is not exactly one complete frame; empty if it is. Raises OSError."""
    head = os.pread(fd, _HEADER_BYTES_MAX, 0)
    if not head.startswith(_MAGIC):
        return "it does not begin with a zstd frame"
    try:
        has_checksum = zstandard.get_frame_parameters(head).has_checksum
        at = zstandard.frame_header_size(head)
    except zstandard.ZstdError as error:
        return str(error)
    if not has_checksum:
        return "its frame has no checksum"
    size = os.fstat(fd).st_size
    last = False
    while not last:
        header = int.from_bytes(os.pread(fd, _BLOCK_HEADER_BYTES, at), "little")
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == _BLOCK_RESERVED:
            return "its frame is damaged"
        at += _BLOCK_HEADER_BYTES + (1 if kind == _BLOCK_RLE else length)
        if at > size:
            return "its frame is cut off"
    at += _CHECKSUM_BYTES
    if at != size:
        return "its frame is cut off" if at > size else "something follows its frame"
    return ""


def segment_name(number: int, *, compressed: bool = False) -> str:
    return f"{LOG_NAME}.{number}{COMPRESSED_SUFFIX if compressed else ''}"


def make_log_file(path: str, flags: int) -> int:
    """A descriptor of a file of the log, which is created if it is missing; its group may read it if it may read the
    directory. Raises OSError.
    """
    fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        if group_reads(os.path.dirname(path)):
            os.fchmod(fd, GROUP_FILE_MODE)  # whatever the umask is
    except OSError:
        os.close(fd)
        raise
    return fd


def group_reads(directory: str) -> bool:
    """Whether the files of this log directory are for its group too, which they get from it. Raises OSError."""
    return os.stat(directory).st_mode & _GROUP_BITS == _GROUP_BITS


def list_segments(directory: str) -> dict[int, list[str]]:
    """The closed segments by number, in order: for each, the names of its files, plain before compressed."""
    names: dict[int, list[str]] = {}
    for name in sorted(os.listdir(directory)):
        if match := _SEGMENT_PATTERN.fullmatch(name):
            names.setdefault(int(match[1]), []).append(name)
    return dict(sorted(names.items()))


class DamagedSegmentError(KmsRefusedError):
    """A segment can't be read to its end: it does not decompress, has a line without an end, or its `seq` jumps."""

    code = "audit_damaged"


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


class SegmentFile:
    """An open file of the log.

    number: of its segment, from its name; for the file being written from its first line, 0 if that is damaged. size:
    bytes on disk when it was opened. closed: nothing more is written to it; for the file being written this is known
    when `lines` has ended.
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
        """The bytes of an incomplete last line, after `lines` has ended."""
        self._unpacked: _Reader | None = None
        self._unpacked_end = 0
        self._held = b""
        """Unpacked for `span`: the last bytes before `_unpacked_end`."""

    @property
    def compressed(self) -> bool:
        return self.name.endswith(COMPRESSED_SUFFIX)

    @property
    def position(self) -> int:
        """Bytes read from the disk so far."""
        return self._file.tell()

    def lines(self) -> Iterator[bytes]:
        """Every whole line without its newline, at least those that were there when the file was opened. If the file is
        closed meanwhile, all its lines.

        A line longer than `record.LINE_BYTES_MAX` is truncated to about that length. Raises DamagedSegmentError and
        OSError.
        """
        source = self._source()
        rest = b""
        skipped = 0  # bytes of a truncated line so far
        waited = False
        while True:
            chunk = self._read(source, CHUNK_BYTES)
            if not chunk:
                if self.closed:
                    break
                if self._was_closed():
                    continue  # the rest of the file is complete now
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
        if fault := frame_fault(self._file.fileno()):
            raise DamagedSegmentError(f"{self.name} does not decompress: {fault}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
        return decompressor.stream_reader(self._file, closefd=False)

    def _read(self, source: _Reader, size: int) -> bytes:
        try:
            return source.read(size)
        except zstandard.ZstdError as error:
            raise DamagedSegmentError(f"{self.name} does not decompress: {error}") from None

    def _was_closed(self) -> bool:
        """Whether the file being written was renamed since it was opened, so that its content is complete."""
        try:
            status = os.stat(os.path.join(self._directory, LOG_NAME), follow_symlinks=False)
        except FileNotFoundError:
            self.closed = True
        else:
            self.closed = (status.st_dev, status.st_ino) != self.identity
        return self.closed

    def first_line(self) -> bytes:
        """The first line, empty if there is none. Call it before anything else is read from the file."""
        line = next(self.lines(), b"")
        self._file.seek(0)
        return line

    def first_event(self) -> Event | None:
        """The event of the first line; None if it is malformed."""
        try:
            return record.parse_line(self.first_line())[0]
        except MalformedLineError:
            return None

    def line_at(self, offset: int) -> bytes:
        """The line that begins at `offset` of a file that is not compressed. Call it before `lines`."""
        self.seek(offset)
        return self.first_line()

    def span(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`, of a compressed file unpacked; fewer at its end. There, each call must begin
        at or after the one before, and nothing else may read. Raises as `lines`.
        """
        if not self.compressed:
            self.seek(begin)
            return self._file.read(end - begin)
        source = self._unpacked = self._unpacked or self._source()
        while self._unpacked_end < end and (chunk := self._read(source, min(end - self._unpacked_end, CHUNK_BYTES))):
            self._unpacked_end += len(chunk)
            held = self._held + chunk
            self._held = held[max(0, begin - self._unpacked_end + len(held)) :]
        first = self._unpacked_end - len(self._held)
        return self._held[max(0, begin - first) : end - first]

    def seek(self, offset: int) -> None:
        """Continue reading at `offset` of a file that is not compressed."""
        self._file.seek(offset)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SegmentFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def each_segment(directory: str, *, after: int = 0) -> Iterator[SegmentFile]:
    """The log's files in order, without segments up to number `after`. Each is closed when the next one is requested.

    Yields nothing if there is no log. A file that a rotation renames meanwhile comes once. The last file is the one
    being written, unless it is missing. Raises OSError, for example if a file is not a regular one.
    """
    last, seen = after, None
    for _ in range(OPEN_ATTEMPTS):
        while (file := next_segment(directory, last, seen)) is not None:
            with file:
                yield file
            if not file.closed:
                return
            last, seen = max(last, file.number or last + 1), file.identity
        # Between the two renames of a rotation no file has the log's name.
        if not list_segments(directory):
            return
        time.sleep(GROWTH_WAIT_S)


def newest_first(directory: str) -> Iterator[SegmentFile]:
    """The log's files, the one being written first. Each is closed when the next one is requested. Raises OSError."""
    closed = list(list_segments(directory))
    for after in (max(closed, default=0), *(number - 1 for number in reversed(closed))):
        for file in each_segment(directory, after=after):
            if after == max(closed, default=0) or file.number == after + 1:  # else it was removed meanwhile
                yield file
            break


def next_segment(directory: str, last: int, seen: tuple[int, int] | None = None) -> SegmentFile | None:
    """The first file after segment `last`, or None. The caller closes it.

    seen: identity of the previous file, which is never the next one, whatever its name. The file being written comes
    after all others, even if its first line names a smaller number: the verifier reports that.
    """
    for _ in range(OPEN_ATTEMPTS):
        closed = [number for number in list_segments(directory) if number > last]
        if closed:
            file = _open_closed(directory, closed[0])
            if file is not None:
                return file
            continue  # compressed or removed after it was listed
        file = _open(directory, LOG_NAME, 0)
        if file is None:
            return None
        if any(number > last for number in list_segments(directory)):
            file.close()
            continue  # a rotation came after the closed files were listed
        if file.identity == seen:
            file.close()
            return None
        file.number = _number_of(file)
        return file
    return None


def _open_closed(directory: str, number: int) -> SegmentFile | None:
    for compressed in (False, True):
        name = segment_name(number, compressed=compressed)
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
        first = file.first_event()
    except DamagedSegmentError:
        return 0
    segment = None if first is None else first.facts.get("segment")
    return segment if isinstance(segment, int) else 0


def line_of(directory: str, seq: int) -> bytes | None:
    """The line with that number, not verified, or None. It reads one file: the newest that does not begin after it.

    Raises OSError and DamagedSegmentError.
    """
    prefix = record.line_start(seq)
    for file in newest_first(directory):
        if record.peek_seq(file.first_line()) <= seq:
            _seek_before(file, seq)
            return next((line for line in file.lines() if line.startswith(prefix)), None)
    return None


def _seek_before(file: SegmentFile, seq: int) -> None:
    """Seek to at most about `NEAR_BYTES` before the line `seq`, if the file has it: a start must not read it all."""
    if file.compressed:
        return
    low, high = 0, file.size
    while high - low > NEAR_BYTES:
        middle = (low + high) // 2
        file.seek(middle)
        lines = file.lines()
        next(lines, b"")  # the end of a line
        if 0 < record.peek_seq(next(lines, b"")) <= seq:
            low = middle
        else:
            high = middle
    file.seek(low)
