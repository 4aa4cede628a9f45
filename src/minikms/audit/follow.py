"""Lines as they are written, and the ones written last.

Owns: keeping up with a log from outside, across rotation, compression and a restart of the reader; and reading from the
end. Invariants: whole lines only, each once, in the order of the files. It must never write, judge, or wait for the
log.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Final

from minikms.audit import record, segments
from minikms.audit.reading import SegmentFile, each_segment, next_segment

LINES_AT_A_TIME: Final = 1000
LAST_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of the lines that `last_lines` gives: a log may hold lines of 1 MiB."""
_BACKWARDS_BYTES: Final = 64 * 1024
_CLOSE_MARK: Final = b'"type":"' + record.TYPE_SEGMENT_CLOSE.encode() + b'"'


class Follower:
    """Hands out the lines after `after_seq`, those that there are already first. Close it when done."""

    def __init__(self, directory: str, *, after_seq: int = 0) -> None:
        self._directory = directory
        self._after_seq = after_seq
        self._file: SegmentFile | None = None
        self._offset = 0
        self._last_number = 0
        self._seen: tuple[int, int] | None = None
        self._ended = False

    def read(self, count: int = LINES_AT_A_TIME) -> list[bytes]:
        """Up to `count` more lines without their newlines; none when there are none yet. Raises OSError."""
        lines: list[bytes] = []
        while len(lines) < count and self._open():
            if not self._read_from_file(lines, count):
                break
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
            self._offset = 0
            if self._file is None:
                return False
            self._last_number = max(self._last_number, self._file.number or self._last_number + 1)
            self._seen = self._file.identity
        return True

    def _read_from_file(self, lines: list[bytes], count: int) -> bool:
        """Take what the file has. Whether to look further: it ended, or `lines` is full."""
        file = self._file
        if file is None:
            return False
        if not file.compressed:
            file.seek(self._offset)
        for line in file.lines():
            self._offset += len(line) + 1
            if _CLOSE_MARK in line:
                self._ended = True
            if (seq := record.peek_seq(line)) > self._after_seq:
                self._after_seq = seq
                lines.append(line)
                if len(lines) >= count and not file.compressed:
                    return True
        if file.compressed:
            self._ended = True
        return self._ended


def last_lines(directory: str, count: int) -> list[bytes]:
    """The last `count` lines of the log without their newlines, oldest first: fewer where they hold more than
    `LAST_BYTES_MAX`. Raises OSError, DamagedSegmentError.
    """
    found: list[bytes] = []
    numbers = [0, *reversed(segments.list_segments(directory))]
    highest = numbers[1] if len(numbers) > 1 else 0
    for number in numbers:
        if len(found) >= count or sum(map(len, found)) >= LAST_BYTES_MAX:
            break
        for file in each_segment(directory, after=(number - 1) if number else highest):
            found = _last_of_file(file, count - len(found)) + found
            break
    return found


def _last_of_file(file: SegmentFile, count: int) -> list[bytes]:
    if file.compressed:
        return _last_of(file.lines(), count)
    span = _BACKWARDS_BYTES
    while True:
        begin = max(0, file.size - span)
        file.seek(begin)
        lines = _last_of(file.lines(), count + 1)
        if begin == 0 or len(lines) > count or span >= LAST_BYTES_MAX:
            # The first line begins before the span, unless that is the whole file.
            return lines[-count:] if begin == 0 else lines[1:][-count:]
        span *= 4


def _last_of(lines: Iterable[bytes], count: int) -> list[bytes]:
    kept: collections.deque[bytes] = collections.deque(maxlen=count)
    held_bytes = 0
    for line in lines:
        held_bytes += len(line) - (len(kept[0]) if len(kept) == count else 0)
        kept.append(line)
        while held_bytes > LAST_BYTES_MAX:
            held_bytes -= len(kept.popleft())
    return list(kept)
