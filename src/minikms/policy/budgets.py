"""Budgets: how much was used in the past 60 minutes, and the text in which that is kept on disk.

Owns: the arithmetic of a budget, the clock that it goes by, and the lines of `policy-budgets.log`
(docs/spec/policy.md). Use comes out of blocks, which `minikms.policy.meters` makes durable first. Invariants:
- The blocks that a use of the past 60 minutes came out of never hold more than the limit. So no 60 minutes see more use
  than the limit: a block leaves the window 60 minutes after its last use, and counts as a whole until then.
- After a restart nobody knows how much of the open block was used. It counts as used at the restart.
- A change of the wall clock never brings a use forward out of the window while the machine runs. At the first start
  after a boot the wall clock says how much time has passed, and at least as much as since the boot; the answer is
  written, so that no later start asks again.

Pure but for `Clock.of_system`: time comes in as milliseconds of a clock that nobody sets. It must never count a use
whose block is not durable.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import msgspec

from minikms.errors import StartError

WINDOW_MS: Final = 3_600_000
BLOCK_SHARE: Final = 100
"""A block is 1/BLOCK_SHARE of its limit."""

Kind = Literal["decrypts", "reencrypts"]
KINDS: Final[tuple[Kind, ...]] = ("decrypts", "reencrypts")

NAME: Final = "policy-budgets.log"
FILE_BYTES_MAX: Final = 128 * 1024 * 1024
HEADER: Final = b"minikms-policy-budgets 1\n"
_USES_MAX: Final = 10**12
_NOT_WRITTEN: Final = b"\0\0"
"""What a file holds where it grew and its data never reached the disk. No line contains it, and no flipped bit makes
it.
"""


@dataclass(frozen=True)
class Clock:
    """boot_id: of this boot of the machine; empty if it is unknown. boot_ms: a clock that nobody sets, which goes on
    while the machine sleeps. wall_ms: Unix time.
    """

    boot_id: str
    boot_ms: Callable[[], int]
    wall_ms: Callable[[], int]

    @classmethod
    def of_system(cls) -> Clock:
        """Reads a file below /proc, so it is called before the process is hardened."""
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                boot_id = file.read(64).strip()
        except (OSError, ValueError):
            boot_id = ""
        # The monotonic clock of macOS goes on while the machine sleeps.
        source: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        return cls(boot_id, lambda: time.clock_gettime_ns(source) // 1_000_000, lambda: time.time_ns() // 1_000_000)


class Block(NamedTuple):
    """A closed block: its number of uses, and the time of the last one."""

    uses: int
    last_ms: int


class Blocks(NamedTuple):
    """The closed blocks of a budget, and the size of its open one: a copy, which another thread may read."""

    closed: tuple[Block, ...]
    open_size: int

    def openings(self) -> list[Opening]:
        """The blocks as openings that `replay` understands: each opening has the time of the last use before it."""
        found: list[Opening] = []
        last_ms = self.closed[0].last_ms if self.closed else 0  # before the boot, it is below 0
        for block in self.closed:
            found.append(Opening(block.uses, 0, last_ms))
            last_ms = block.last_ms
        if self.open_size or found:
            found.append(Opening(self.open_size, 0, last_ms))
        return found


class Opening(NamedTuple):
    """A block that is about to be opened at `at_ms`. `returned`: uses that are left in the block before, which this one
    contains.
    """

    size: int
    returned: int
    at_ms: int


class Budget:
    """The uses of one limit of one holder in the past 60 minutes.

    reserving: the next block is on its way to the disk, so nothing comes out of the open one.
    """

    __slots__ = ("_closed", "_closed_uses", "_last_ms", "_left", "_size", "reserving")

    def __init__(self) -> None:
        self._closed: deque[Block] = deque()
        self._closed_uses = 0
        self._size = self._left = self._last_ms = 0
        self.reserving = False

    def used(self, now_ms: int) -> int:
        """The uses in the window. What is left of the open block is not used yet."""
        self._expire(now_ms)
        return self._closed_uses + self._size - self._left

    def is_idle(self, now_ms: int) -> bool:
        """Whether it is as a new one."""
        self._expire(now_ms)
        return not self._closed and not self._size and not self.reserving

    def covers(self, uses: int, limit: int, now_ms: int) -> bool:
        """Whether `take` may follow: the open block is durable and has room for `uses`, and the limit allows them."""
        return self.used(now_ms) + uses <= limit and self._left >= uses and not self.reserving

    def take(self, uses: int, now_ms: int) -> None:
        """After `covers`, in the same turn."""
        self._left -= uses
        self._last_ms = now_ms

    def wait_ms(self, uses: int, limit: int, now_ms: int) -> int:
        """Milliseconds until the limit allows `uses`, if nobody else uses the budget; 0: now. At most WINDOW_MS, even
        for more uses than the limit.
        """
        excess = self.used(now_ms) + uses - limit
        if excess <= 0:
            return 0
        for block in self._closed:
            excess -= block.uses
            if excess <= 0:
                return block.last_ms + WINDOW_MS - now_ms
        if uses > limit:
            return WINDOW_MS
        return max(1, self._last_ms + WINDOW_MS - now_ms)  # an open block that is being replaced may be older

    def next_block(self, uses: int, limit: int, now_ms: int) -> Opening | None:
        """The block to open for `uses`, or for as many as the limit allows; None: the open one has as much left."""
        room = limit - self.used(now_ms)
        size = min(room, max(uses, limit // BLOCK_SHARE, 1))
        return Opening(size, self._left, now_ms) if size > self._left else None

    def open(self, block: Opening, limit: int) -> None:
        """Once the block is durable."""
        used = self._size - self._left
        if used:
            self._close(used, self._last_ms, limit)
        self._size = self._left = block.size
        self._last_ms = block.at_ms

    def blocks(self) -> Blocks:
        """The blocks of now."""
        return Blocks(tuple(self._closed), self._size)

    def replay(self, openings: Iterable[Opening], now_ms: int) -> None:
        """Takes over what an earlier process has written. Raises ValueError for what no process has written."""
        size, last_ms = 0, None
        for block in openings:
            if not (0 <= block.size <= _USES_MAX and 0 <= block.returned <= size):
                raise ValueError("a block of an impossible size")
            # Blocks follow each other: the one before had its last use when this one was opened, at the latest.
            last_ms = min(block.at_ms if last_ms is None else max(last_ms, block.at_ms), now_ms)
            if size > block.returned:
                self._close(size - block.returned, last_ms, 0)
            size = block.size
        if size:
            self._close(size, now_ms, 0)
        self._expire(now_ms)

    def _close(self, uses: int, last_ms: int, limit: int) -> None:
        if self._closed and self._closed[-1].uses + uses <= limit // BLOCK_SHARE:
            # Small blocks become one that leaves the window with the last of them, so that their number is bounded.
            before = self._closed.pop().uses
            self._closed_uses -= before
            uses += before
        self._closed.append(Block(uses, last_ms))
        self._closed_uses += uses

    def _expire(self, now_ms: int) -> None:
        closed = self._closed
        while closed and closed[0].last_ms + WINDOW_MS <= now_ms:
            self._closed_uses -= closed.popleft().uses
        if self._size and self._last_ms + WINDOW_MS <= now_ms and not self.reserving:
            self._size = self._left = 0


# --- on disk --------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """Which budget: of which grant or proxy, of whom, and of what. `who` is a principal's name, or one of the words of
    `minikms.policy.meters`.
    """

    identity: str
    who: str
    kind: Kind


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """wall_offset_ms: Unix time minus the clock of the boot, when the line was written."""

    boot_id: str
    wall_offset_ms: int
    budgets: list[tuple[str, str, Kind, list[Opening]]]


def encode(openings: Mapping[Key, Iterable[Opening]], clock: Clock) -> bytes:
    """One line: what one write adds, so that a power cut damages the last line only."""
    offset_ms = clock.wall_ms() - clock.boot_ms()
    text = msgspec.json.encode(
        _Line(clock.boot_id, offset_ms, [(*key, list(found)) for key, found in openings.items()])
    )
    return b"%08x %b\n" % (zlib.crc32(text), text)


class Written(NamedTuple):
    """What a file holds: the openings of each budget, in order, with the times of this boot's clock. `is_timed`: all of
    them were written with these times. Otherwise the wall clock of now gave some of them, and would give others later.
    """

    openings: dict[Key, list[Opening]]
    is_timed: bool


def parse(content: bytes, clock: Clock) -> Written:
    """Reads a file.

    A last line that is not whole was never acknowledged and does not count. Raises StartError for any other damage.
    """
    if not content.startswith(HEADER):
        raise damaged("does not begin as version 1 does")
    lines = content[len(HEADER) :].split(b"\n")
    last = lines.pop()  # without its newline
    if not last and lines and _NOT_WRITTEN in lines[-1]:
        lines.pop()  # a power cut between its first and its last sector
    elif _decoded(last[:-1]) is not None:
        raise damaged("is damaged in its last line")  # whole, but for its newline
    elif _decoded(last) is not None:
        lines.append(last)
    found: dict[Key, list[Opening]] = {}
    is_timed = True
    for number, text in enumerate(lines, 2):
        line = _decoded(text)
        if line is None:
            raise damaged(f"is damaged in line {number}")
        is_timed = is_timed and _is_of_boot(line, clock)
        back_ms = _set_back(line, clock)
        for identity, who, kind, blocks in line.budgets:
            of_budget = found.setdefault(Key(identity, who, kind), [])
            of_budget.extend(Opening(size, returned, back_ms(at_ms)) for size, returned, at_ms in blocks)
    return Written(found, is_timed)


def damaged(what: str) -> StartError:
    """The refusal of a file whose uses are unknown."""
    return StartError(
        f"the file {NAME} in the data directory {what}, so nobody knows how much of each hourly limit is used. Wait "
        "an hour if no client may use more than its limit; then move the file away, and all of them begin anew"
    )


def _decoded(text: bytes) -> _Line | None:
    checksum, _, body = text.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(body):
        return None
    try:
        return msgspec.json.decode(body, type=_Line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _is_of_boot(line: _Line, clock: Clock) -> bool:
    return bool(line.boot_id) and line.boot_id == clock.boot_id


def _set_back(line: _Line, clock: Clock) -> Callable[[int], int]:
    """From a time in the line to the same time on the clock of this boot; it may be negative, but not in the future."""
    now_ms = clock.boot_ms()
    if _is_of_boot(line, clock):
        return lambda at_ms: min(at_ms, now_ms)
    wall_ms = clock.wall_ms() - line.wall_offset_ms
    # The line is of an earlier boot, so it is at least as old as this one.
    age_min_ms = now_ms if line.boot_id and clock.boot_id else 0
    return lambda at_ms: now_ms - max(wall_ms - at_ms, age_min_ms)
