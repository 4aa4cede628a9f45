"""An index of the audit log: which blocks of lines may name a key, a thread, an actor, a verb or an outcome.

Owns: the files of the index, one for each segment (docs/spec/tree.md), making them, and reading a log by them.
Invariants:

- The lines come from the log. The index only leaves out blocks, so whoever can write it can hide lines, not make any.
- A file counts up to its first damaged block, and only if the log has, where its last block ends, a line with the same
  MAC: each MAC is over all lines before. All other lines of the segment are read.
- Memory is bounded by the file of one segment and by one block.

It must never hold a line, or index one that the log may lose again: its caller names the last durable line.
"""

from __future__ import annotations

import bisect
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import StorageUnavailableError
from minikms.audit import record
from minikms.audit.reader import DamagedSegmentError, SegmentFile, list_segments, next_segment
from minikms.audit.record import LINE_BYTES_MAX
from minikms.platform.directory_lock import make_private_directory
from minikms.platform.files import FILE_MODE, closed_after, read_file_bounded, write_all_at

BLOCKS_NAME: Final = "index"
"""The directory of the index in the state directory of the auditor."""
BLOCK_BYTES: Final = LINE_BYTES_MAX
"""A block is as many whole lines as have together at most so many bytes: some 5,000, or one."""
BLOCKS_AT_A_TIME: Final = 32
"""Some 0.3 s: the auditor reports its position every 5 s."""
FILE_BYTES_MAX: Final = 256 * 1024 * 1024
"""The index of a segment of 1 GiB is smaller, whatever its lines name."""
BLOCKS_COUNT_MAX: Final = 65_536
"""The blocks of a segment: each takes some 700 bytes of memory beside its names. A segment of 1 GiB has fewer."""
SOUGHT_NAMES_MAX: Final = 256
"""With more names for one condition, reading a block costs less than looking for each."""

KEY, THREAD, ACTOR, TYPE, OUTCOME = range(1, 6)

_HEAD: Final = struct.Struct("=IIIQQQQQ44s")
_MAC: Final = slice(-len(record.LINE_SUFFIX) - record.MAC_CHARS, -len(record.LINE_SUFFIX))


class Block(NamedTuple):
    """Lines of a segment, its bytes from `begin` to `end`. closed: the last line closes the segment. last_begin,
    last_seq, mac: of that line. ts_min, ts_max: the times of the lines. names: the sorted numbers of what they name.
    """

    closed: int
    begin: int
    end: int
    last_begin: int
    last_seq: int
    ts_min: int
    ts_max: int
    mac: bytes
    names: memoryview | bytes

    def has(self, sought: Sequence[int]) -> bool:
        """Whether a line may name one of these."""
        names, count = self.names, len(self.names)
        return len(sought) > SOUGHT_NAMES_MAX or any(
            (at := bisect.bisect_left(names, each)) < count and names[at] == each for each in sought
        )


def name_number(field: int, text: str) -> int:
    """What stands for a text in a block. Others may have the same number: such a block is read in vain."""
    return zlib.crc32(text.encode(), field)


def parse_blocks(content: bytes) -> list[Block]:
    """The blocks of a file of the index, up to the first damaged one."""
    blocks: list[Block] = []
    at = end = 0
    while at + _HEAD.size <= len(content) and len(blocks) < BLOCKS_COUNT_MAX:
        crc, count, closed, block_end, last_begin, last_seq, ts_min, ts_max, mac = _HEAD.unpack_from(content, at)
        whole = memoryview(content)[at : at + _HEAD.size + 4 * count]
        at += len(whole)
        if (
            len(whole) != _HEAD.size + 4 * count
            or zlib.crc32(whole[4:]) != crc
            or not end <= last_begin < block_end <= end + BLOCK_BYTES
        ):
            break
        names = whole[_HEAD.size :].cast("I")
        blocks.append(Block(closed, end, block_end, last_begin, last_seq, ts_min, ts_max, mac, names))
        end = block_end
    return blocks


def usable_blocks(directory: str, log_directory: str, file: SegmentFile) -> list[Block]:
    """The blocks of a file of the log; none if there is no index of it, or only one of other lines. Raises OSError."""
    try:
        content = read_file_bounded(os.path.join(directory, str(file.number)), FILE_BYTES_MAX)
    except StorageUnavailableError:
        return []
    blocks = parse_blocks(content or b"")
    return blocks if blocks and _ends_so(log_directory, file, blocks[-1]) else []


def _ends_so(log_directory: str, file: SegmentFile, block: Block) -> bool:
    """Whether the log has the last line of `block`. In a compressed file only the next one tells that without reading
    all of it.
    """
    if not file.compressed:
        line = file.line_at(block.last_begin)
        return line[_MAC] == block.mac and record.peek_seq(line) == block.last_seq
    following = next_segment(log_directory, file.number) if block.closed else None
    if following is None:
        return False
    with following:
        try:
            first = following.first_event()
        except DamagedSegmentError:
            return False
    return first is not None and first.facts.get("previous_sig") == block.mac.decode("ascii", "replace")


# --- reading a log ----------------------------------------------------------------------------------------------------


class Lookup:
    """Reads what may match of a log, by the index in `directory`. taken, left_out: blocks so far. whole: files of the
    log that were read to their end, because they have no index.
    """

    def __init__(self, directory: str, log_directory: str) -> None:
        self._directory = directory
        self._log_directory = log_directory
        self.taken = self.left_out = self.whole = 0

    def lines(self, file: SegmentFile, conditions: Callable[[], Sequence[Sequence[int]]]) -> Iterator[bytes]:
        """The lines of each block that may name one of the numbers of each condition, and all that are in no block.
        `conditions` is asked before each block. Raises OSError, DamagedSegmentError.
        """
        blocks = usable_blocks(self._directory, self._log_directory, file) if conditions() else []
        if not blocks:
            self.whole += 1
            yield from file.lines()
            return
        for block in blocks:
            if all(block.has(sought) for sought in conditions()):
                self.taken += 1
                yield from file.span(block.begin, block.end).split(b"\n")[:-1]
            else:
                self.left_out += 1
        if not file.compressed:
            file.seek(blocks[-1].end)
            yield from file.lines()


# --- making the index -------------------------------------------------------------------------------------------------


class _Event(msgspec.Struct, gc=False):
    """What the index takes of an event."""

    seq: record.NonNegative
    ts: record.NonNegative
    type: str
    actor: str
    key_id: str = ""
    key_ids: list[str] = []
    thread_id: str = ""
    outcome: str = "ok"


class _Line(msgspec.Struct, gc=False):
    event: _Event


_decode_lines = msgspec.json.Decoder(_Line).decode_lines


class Indexer:
    """Makes the index in `directory` of the log in `log_directory`. It goes on after a start, and makes anew what is
    damaged, missing, or of other lines. seq: the last line that it came to. idle: no lines for a block are left.
    """

    def __init__(self, directory: str, log_directory: str) -> None:
        self._directory = directory
        self._log_directory = log_directory
        self._file: SegmentFile | None = None
        self.reset()

    def reset(self) -> None:
        """Look at all segments again."""
        self.close()
        self._after = self._number = 0
        """The last segment that has an index, and the one that gets it."""
        self.seq, self.idle = 0, False
        self._go_on_after(())

    def _go_on_after(self, blocks: Sequence[Block]) -> None:
        self._last = blocks[-1] if blocks else None
        """The last block of the segment that gets its index."""
        self.seq = self.seq if self._last is None else self._last.last_seq
        self._size = sum(_HEAD.size + 4 * len(block.names) for block in blocks)
        """The size of the segment's file in the index."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def grow(self, until: int) -> None:
        """Index some more lines of one segment, at most up to `until`. Raises OSError, StorageUnavailableError,
        DamagedSegmentError; then call `reset`.
        """
        if self._file is None or not self._file.closed:
            self.close()
            self._file = next_segment(self._log_directory, self._after)
        file, last = self._file, self._last
        self.idle = file is None
        if file is None or not file.number:
            return
        # Lines that were replaced since the last call have another MAC.
        same = file.number == self._number and (
            last is None or file.compressed or _ends_so(self._log_directory, file, last)
        )
        if not same and not self._load(file):
            return
        for _ in range(BLOCKS_AT_A_TIME):
            end = 0 if self._last is None else self._last.end
            content = file.span(end, end + BLOCK_BYTES)
            lines = content[: content.rfind(b"\n") + 1]
            if file.closed and not content:
                self._after = file.number
            elif lines and (file.closed or len(content) == BLOCK_BYTES) and self._add(lines, until):
                continue
            self.idle = not file.closed
            self.close()  # what was read of a compressed file can't be read again
            return

    def _load(self, file: SegmentFile) -> bool:
        """Go on after the blocks that a segment has. False if there is no more to index."""
        blocks = usable_blocks(self._directory, self._log_directory, file)
        self._go_on_after(blocks)
        if file.closed and blocks and blocks[-1].closed:
            self._after = file.number
            self.close()
            return False
        make_private_directory(self._directory)
        live = {str(each) for each in (file.number, *list_segments(self._log_directory))}
        for name in os.listdir(self._directory):
            if name not in live:
                os.unlink(os.path.join(self._directory, name))
        self._number = file.number
        return True

    def _add(self, lines: bytes, until: int) -> bool:
        """Add a block. False if it goes beyond `until`."""
        try:
            events = [line.event for line in _decode_lines(lines)]
        except UNDECODABLE:
            raise DamagedSegmentError(
                "the audit log has a line that can't be read: run `minikms audit verify`"
            ) from None
        last = events[-1]
        if last.seq > until:
            return False
        named = {
            KEY: {event.key_id for event in events}.union(*(event.key_ids for event in events if event.key_ids)),
            THREAD: {event.thread_id for event in events},
            ACTOR: {event.actor for event in events},
            TYPE: {event.type for event in events},
            OUTCOME: {event.outcome for event in events},
        }
        numbers = sorted({name_number(field, text) for field, texts in named.items() for text in texts if text})
        times = [event.ts for event in events]
        begin = 0 if self._last is None else self._last.end
        end, last_begin = begin + len(lines), begin + lines.rfind(b"\n", 0, -1) + 1
        closed, times_of, mac = last.type == record.TYPE_SEGMENT_CLOSE, (min(times), max(times)), lines[:-1][_MAC]
        head = (len(numbers), closed, end, last_begin, last.seq, *times_of, mac)
        names = struct.pack(f"={len(numbers)}I", *numbers)
        content = _HEAD.pack(0, *head)[4:] + names
        self._write(struct.pack("=I", zlib.crc32(content)) + content)
        self._last = Block(closed, begin, end, last_begin, last.seq, *times_of, mac, b"")
        self.seq = last.seq
        return True

    def _write(self, content: bytes) -> None:
        """Add to the file of the segment, from which it cuts what an error or a crash has left. No sync: what a power
        cut damages is made anew.
        """
        path = os.path.join(self._directory, str(self._number))
        with closed_after(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)) as fd:
            os.ftruncate(fd, self._size)
            write_all_at(fd, content, self._size)
        self._size += len(content)
