"""Reading a log from its end: the newest lines that match, by the index of the auditor, in bounded time and memory.

Owns: the order in which blocks are read, and where a search stops. Invariants: lines come newest first and none twice;
a search that stops early says why, and goes on from there when it is asked again; only lines that no block has are read
without the index, and of a compressed file none, since it can't be read backwards. It must never verify a line, or
return one that is malformed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import Final, Literal, NamedTuple

import msgspec

from minikms.audit import record
from minikms.audit.blocks import BLOCK_BYTES, THREAD, Block, Lookup, name_number, usable_blocks
from minikms.audit.queries import NEEDLES_MAX, Query
from minikms.audit.reader import SegmentFile, each_segment, newest_first, next_segment
from minikms.audit.record import Event, MalformedLineError

GROUP_BLOCKS: Final = 8
"""The newest blocks of a compressed file, which are read first. All others are read together, in some 3 s at most,
because each group unpacks the file from its start."""
LINES_PER_CHECK: Final = 1000
"""Lines that are read between two looks at the clock, in the search for the keys of a thread."""

Span = tuple[int, int]


class Found(NamedTuple):
    """events: newest first. before: lines with a smaller number were not read; 0: all were. stopped: why it ended
    early. keys: those that the log gives to the thread.
    """

    events: list[Event]
    before: int
    stopped: Literal["", "time", "index"]
    keys: list[str]


class _LateError(Exception):
    """The time of the search is over."""


class _NotIndexedError(Exception):
    """A file can't be read without its index."""


class Search(msgspec.Struct, kw_only=True):
    """Looks in the log in `directory` for the newest `count` lines with a number below `before`; 0 for no bound.
    index: the directory of the index. is_late: whether the time is over. reached, learned: as `before` and `keys` of
    `Found`.
    """

    directory: str
    index: str
    sought: Query
    before: int
    count: int
    is_late: Callable[[], bool]
    reached: int = 0
    learned: set[str] = msgspec.field(default_factory=set)

    def run(self) -> Found:
        events: list[Event] = []
        stopped: Literal["", "time", "index"] = ""
        self.reached, self.before = self.before, self.before or record.INTEGER_MAX
        try:
            if self.sought.threads:
                self._learn_keys()
            for event in self._events():
                events.append(event)
                if len(events) > self.count:  # one more, to know whether there are older ones
                    del events[self.count :]
                    return Found(events, events[-1].seq, "", sorted(self.learned))
            self.reached = 0
        except _LateError:
            stopped = "time"
        except _NotIndexedError:
            stopped = "index"
        return Found(events, self.reached, stopped, sorted(self.learned))

    def _learn_keys(self) -> None:
        """The keys of the thread, which lines about its encryptions and decryptions have in its place."""
        threads = [text.encode() for text in self.sought.threads]
        numbers = [name_number(THREAD, text) for text in self.sought.threads]
        lookup = Lookup(self.index, self.directory)
        for file in each_segment(self.directory):
            for count, line in enumerate(lookup.lines(file, lambda: [numbers])):
                if count % LINES_PER_CHECK == 0 and self.is_late():
                    raise _NotIndexedError
                if any(each in line for each in threads) and (event := _parsed(line)):
                    self.learned.add(self.sought.key_of_thread(event))
        self.learned.discard("")

    def _events(self) -> Iterator[Event]:
        keys = self.learned.union(self.sought.thread_keys)
        conditions = self.sought.conditions(keys)
        needles = self._needles(keys)
        for file in newest_first(self.directory):
            for group in self._groups(file, conditions):
                events: deque[Event] = deque(maxlen=self.count + 1)
                first = 0
                for content in self._contents(file, group):
                    first = first or record.peek_seq(content)
                    events += _matching(content, needles, self.sought, keys, self.before)
                yield from reversed(events)
                if first < self.before:  # else an answer that is late would not go on
                    self.reached = first or self.reached
                    if self.is_late():
                        raise _LateError

    def _needles(self, keys: AbstractSet[str]) -> list[tuple[bytes, ...]]:
        of_thread = tuple(text.encode() for text in (*self.sought.threads, *keys))
        has_few = self.sought.threads and len(of_thread) <= NEEDLES_MAX
        return [*self.sought.needles(), *([of_thread] if has_few else ())]

    def _groups(self, file: SegmentFile, conditions: list[list[int]]) -> Iterator[list[Span]]:
        """Parts of the file to read together. The newest group comes first, and in a group the oldest part."""
        blocks = usable_blocks(self.index, self.directory, file)
        last = blocks[-1] if blocks else None
        if file.compressed and not (last and last.closed):
            raise _NotIndexedError
        if not file.compressed and (last is None or last.last_seq + 1 < self.before):
            begin, end = 0 if last is None else last.end, file.size
            while end > begin:
                start = self._line_start(file, begin, end)
                yield [(start, end)]
                end = start
        spans = [block[1:3] for block in self._candidates(blocks, conditions)]
        if file.compressed:
            yield from filter(None, (spans[-GROUP_BLOCKS:], spans[:-GROUP_BLOCKS]))
        else:
            yield from ([span] for span in reversed(spans))

    def _candidates(self, blocks: list[Block], conditions: list[list[int]]) -> Iterator[Block]:
        first_seq = 0
        for block in blocks:
            in_time = block.ts_max >= self.sought.since_ns
            in_time = in_time and (not self.sought.until_ns or block.ts_min < self.sought.until_ns)
            if in_time and first_seq < self.before and all(block.has(each) for each in conditions):
                yield block
            first_seq = block.last_seq + 1

    def _line_start(self, file: SegmentFile, begin: int, end: int) -> int:
        """The offset of the first whole line among the last `BLOCK_BYTES` before `end`."""
        start = max(begin, end - BLOCK_BYTES)
        if start == begin:
            return begin
        index = file.span(start - 1, end - 1).find(b"\n")
        return start + index if index >= 0 else start  # else it is no line of a log

    def _contents(self, file: SegmentFile, group: list[Span]) -> Iterator[bytes]:
        if not file.compressed:
            yield from (file.span(*span) for span in group)
            return
        again = next_segment(self.directory, file.number - 1)
        if again is None:
            return
        with again:
            if again.number == file.number:  # else it was removed meanwhile
                yield from (again.span(*span) for span in group)


def _matching(
    content: bytes, needles: list[tuple[bytes, ...]], sought: Query, keys: AbstractSet[str], before: int
) -> Iterator[Event]:
    for line in _candidates(content, needles):
        if all(any(each in line for each in some) for some in needles) and record.peek_seq(line) < before:
            event = _parsed(line)
            if event is not None and sought.matches(event, keys):
                yield event


def _candidates(content: bytes, needles: list[tuple[bytes, ...]]) -> Iterator[bytes]:
    """The whole lines that have the rarest of the needles: looking at each line would take twenty times as long."""
    if not needles:
        yield from content.split(b"\n")[:-1]
        return
    starts = set()
    for needle in min(needles, key=lambda some: sum(map(content.count, some))):
        at = content.find(needle)
        while at >= 0 and (end := content.find(b"\n", at)) >= 0:
            starts.add(content.rfind(b"\n", 0, at) + 1)
            at = content.find(needle, end)
    yield from (content[start : content.index(b"\n", start)] for start in sorted(starts))


def _parsed(line: bytes) -> Event | None:
    try:
        return record.parse_line(line)[0]
    except MalformedLineError:
        return None
