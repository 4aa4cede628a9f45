"""Following the audit log, and reading its last lines, beside the daemon that writes it.

Owns: the place up to which a log was read. Invariants: `LogFollower` returns whole lines only, each once, in the order
of the files; those of `minikms.audit.reader` hold. It must never judge a line. The daemon does not load this module.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator
from typing import Final

from minikms.audit import record
from minikms.audit.reader import DamagedSegmentError, SegmentFile, each_segment, list_segments, next_segment

LINES_AT_A_TIME: Final = 1000
LAST_BYTES_MAX: Final = 64 * 1024 * 1024
"""Bound of what `last_lines` returns: a log may hold lines of 1 MiB."""
_BACKWARDS_BYTES: Final = 64 * 1024
_CLOSE_MARK: Final = b'"type":"' + record.TYPE_SEGMENT_CLOSE.encode() + b'"'


class LogFollower:
    """Follows the log from the line after `after_seq` on. `close` it when done.

    after_segment: number of a segment that ends before that line.
    """

    def __init__(self, directory: str, *, after_seq: int = 0, after_segment: int = 0) -> None:
        self._directory = directory
        self._after_seq = after_seq
        self._file: SegmentFile | None = None
        self._offset = 0
        self._unpacked: Iterator[bytes] | None = None
        """The lines of a compressed file that were not returned: it can't be read from an offset."""
        self._last_number = after_segment
        self._seen: tuple[int, int] | None = None
        self._ended = False
        self._file_seq = 0
        """The last `seq` read from the current file."""
        self._fault = ""

    def read(self, count: int = LINES_AT_A_TIME) -> list[bytes]:
        """Up to `count` more lines without their newlines, none if there are none yet.

        Raises OSError, and DamagedSegmentError, also where the `seq` of two adjacent lines does not increase by one:
        a reader that skipped to a forged `seq` would pass over every true line after it.
        """
        lines: list[bytes] = []
        while len(lines) < count and not self._fault and self._open():
            if not self._read_from_file(lines, count):
                break
        if self._fault and not lines:
            raise DamagedSegmentError(self._fault)
        return lines

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> bool:
        """Whether there is a file to read from."""
        if self._ended:
            self.close()
            self._ended = False
        if self._file is None:
            self._file = next_segment(self._directory, self._last_number, self._seen)
            self._offset = self._file_seq = 0
            self._unpacked = None
            if self._file is None:
                return False
            self._last_number = max(self._last_number, self._file.number or self._last_number + 1)
            self._seen = self._file.identity
        return True

    def _read_from_file(self, lines: list[bytes], count: int) -> bool:
        """Append lines of the current file to `lines`. Returns whether the file has ended or `lines` is full."""
        file = self._file
        if file is None:
            return False
        if file.compressed:
            self._unpacked = self._unpacked or file.lines()
        else:
            file.seek(self._offset)
        try:
            for line in self._unpacked or file.lines():
                self._offset += len(line) + 1
                if not self._take(line, lines):
                    return False
                if len(lines) >= count:
                    return True
        except DamagedSegmentError as error:
            self._fault = str(error)
            return False
        if file.compressed:
            self._ended = True
        return self._ended

    def _take(self, line: bytes, lines: list[bytes]) -> bool:
        """Append a line of the current file to `lines`, if it is wanted. False if it does not follow the one before."""
        seq = record.peek_seq(line)
        if seq and self._file_seq and seq != self._file_seq + 1:
            self._fault = (
                f"line {self._file_seq} of the audit log is followed by a line with number {seq}: run "
                "`minikms audit verify`"
            )
            self._ended = False
            return False
        self._file_seq = seq or self._file_seq
        if _CLOSE_MARK in line:
            self._ended = True
        if seq > self._after_seq:
            self._after_seq = seq
            lines.append(line)
        return True


def last_lines(directory: str, count: int) -> list[bytes]:
    """The last `count` lines of the log without their newlines, oldest first; fewer if they exceed `LAST_BYTES_MAX`.

    Raises OSError and DamagedSegmentError.
    """
    lines: list[bytes] = []
    numbers = [0, *reversed(list_segments(directory))]
    highest = numbers[1] if len(numbers) > 1 else 0
    for number in numbers:
        if len(lines) >= count or sum(map(len, lines)) >= LAST_BYTES_MAX:
            break
        for file in each_segment(directory, after=(number - 1) if number else highest):
            lines = _last_of_file(file, count - len(lines)) + lines
            break
    return lines


def _last_of_file(file: SegmentFile, count: int) -> list[bytes]:
    if file.compressed:
        return _last_of(file.lines(), count)
    span = _BACKWARDS_BYTES
    while True:
        begin = max(0, file.size - span)
        file.seek(begin)
        lines = _last_of(file.lines(), count + 1)
        if begin == 0 or len(lines) > count or span >= LAST_BYTES_MAX:
            # Unless the span is the whole file, the first line of it is incomplete.
            return lines[-count:] if begin == 0 else lines[1:][-count:]
        span *= 4


def _last_of(lines: Iterable[bytes], count: int) -> list[bytes]:
    newest: collections.deque[bytes] = collections.deque(maxlen=count)
    held_bytes = 0
    for line in lines:
        held_bytes += len(line) - (len(newest[0]) if len(newest) == count else 0)
        newest.append(line)
        while held_bytes > LAST_BYTES_MAX:
            held_bytes -= len(newest.popleft())
    return list(newest)


def segment_before(directory: str, seq: int) -> int:
    """Number of the segment before the one that holds line `seq`, according to the first lines of the files. Raises
    OSError.
    """
    before = last = 0
    for file in each_segment(directory):
        with contextlib.suppress(DamagedSegmentError):
            first = file.first_event()
            if first is not None:
                if first.seq > seq:
                    break
                before, last = last, file.number
    return before
