"""Sinks: sending the lines of the tree to receivers, each with a cursor of its own.

Owns: `Transport`, which each kind of receiver implements; the order of a step; what a failure, a refused line and a
missing line lead to. Each sink has a thread. Invariants: lines arrive in order, each at least once; only lines of the
tree are sent, which are durable, signed, and equal to their leaves; the cursor is durable, and goes on only after the
receiver has a line, or after the line is durable in the file `rejected`; memory is bounded by a batch and
`READ_LINES` lines. It must never skip a line of a required sink unless an operator says so.
"""

from __future__ import annotations

import collections
import contextlib
import hmac
import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import KmsError
from minikms.audit import ocsf, record
from minikms.audit.export import LogRange, NotInTreeError, leaf_index
from minikms.audit.following import LogFollower, segment_before
from minikms.audit.reader import each_segment
from minikms.audit.record import Event, MalformedLineError
from minikms.audit.tiles import Tiles
from minikms.audit.tree import leaf_of
from minikms.platform.sync import sync_directory
from minikms.processes.http_client import ExchangeError
from minikms_auditor.config import FileSink, Sink
from minikms_auditor.line_file import LineFile
from minikms_auditor.store import AuditorStore, Cursor, SinkFiles, TreeLine

BATCH_BYTES_MAX: Final = 1024 * 1024
"""A batch takes no more lines once it has so many bytes."""
BATCH_LINES_MAX: Final = 4096
READ_LINES: Final = 64
"""Read at once: lines may have 1 MiB."""
STEP_SECONDS: Final = 1.0
HANGS_SECONDS: Final = 3.0
"""An attempt of a required sink that takes longer is named: it holds the position back."""
BACKOFF_SECONDS_MAX: Final = 60.0
REFUSED_IN_A_ROW_MAX: Final = 8
"""A receiver that refuses so many lines in a row has another fault than theirs."""


class LaterError(Exception):
    """The receiver does not take a batch now. `seconds`: how long it asks to wait, 0 if it does not say."""

    def __init__(self, text: str, seconds: int = 0) -> None:
        super().__init__(text)
        self.seconds = seconds


class BatchRefusedError(Exception):
    """The receiver refuses something in a batch, and would refuse it again."""


class _StoppedError(Exception):
    """The sink waits for an operator."""


class SinkMessage(NamedTuple):
    """A line of the log, and what is sent of it: one JSON object of printable ASCII."""

    log_id: str
    event: Event
    line: bytes
    sig: bytes
    body: bytes


class Transport(ABC):
    """How lines reach a receiver."""

    settle_seconds: float = 0.0
    """For how long after a batch the receiver may still lose it; `check` says whether it has."""

    @property
    def write_paths(self) -> tuple[str, ...]:
        """Directories that the hardened process must still be able to write in."""
        return ()

    def last_line(self) -> bytes | None:
        """The last line of the log that the receiver has; None if it can't say. Raises OSError."""
        return None

    @abstractmethod
    def deliver(self, messages: Sequence[SinkMessage]) -> None:
        """Send messages, in order. Return when the receiver has them. Raises OSError, ExchangeError, LaterError,
        RefusedError.
        """

    def check(self) -> None:  # noqa: B027  most have nothing to check
        """Checks that the receiver still has the batch that settles. Raises OSError or ExchangeError if it may have
        lost it.
        """

    def reset(self) -> None:  # noqa: B027  most have nothing to give up
        """Nothing settles any more: the next batch begins anew."""

    def begin_log(self, previous: str) -> None:  # noqa: B027  most have nothing to do
        """The next line is the first one of another log than `previous`. Raises OSError."""


class _Ocsf(msgspec.Struct):
    raw_data: str


class FileTransport(Transport):
    """Appends to a file: lines as they are in the log, or OCSF events. A file holds lines of one log: when another one
    begins, it gets the old one's id as suffix.
    """

    def __init__(self, sink: FileSink) -> None:
        self._path = sink.path
        self._is_log = sink.format == "line"
        longest = record.LINE_BYTES_MAX if self._is_log else ocsf.EVENT_BYTES_MAX
        self._file = LineFile(sink.path, line_bytes_max=longest)
        self._is_synced = False
        """Whether the directory was synced since the file may have been made."""

    @property
    def write_paths(self) -> tuple[str, ...]:
        return (os.path.dirname(self._path),)

    def last_line(self) -> bytes | None:
        line = self._file.last_line()
        if line is None or self._is_log:
            return line
        try:
            return msgspec.json.decode(line, type=_Ocsf).raw_data.encode()
        except UNDECODABLE:
            return line  # no line of any log

    def deliver(self, messages: Sequence[SinkMessage]) -> None:
        self._file.append([each.line if self._is_log else each.body for each in messages])
        if not self._is_synced:
            sync_directory(os.path.dirname(self._path))
            self._is_synced = True

    def reset(self) -> None:
        self._is_synced = False

    def begin_log(self, previous: str) -> None:
        if os.path.exists(self._path):
            os.rename(self._path, f"{self._path}.{previous}")
        sync_directory(os.path.dirname(self._path))


class SinkStatus(msgspec.Struct, frozen=True):
    """What `minikms-auditor status` shows of a sink. delivered_at: Unix seconds of its last success since the start, 0
    without one. failures: since the start. error: empty if all is well. waits_at: the line that an operator must skip,
    0 if none. rejected: lines in its file of those.
    """

    name: str
    required: bool
    log_id: str = ""
    seq: int = 0
    lag_lines: int = 0
    delivered_at: int = 0
    failures: int = 0
    error: str = ""
    waits_log_id: str = ""
    waits_at: int = 0
    rejected: int = 0


class _Missing(NamedTuple):
    """Lines that the log does not have any more."""

    log_id: str
    first: int
    last: int
    why: str


@dataclass(eq=False, repr=False)
class Shipper:
    """Sends the lines of the tree to one sink. `run` is its thread; `cursor` and `status` may be read in others."""

    sink: Sink
    transport: Transport
    files: SinkFiles
    store: AuditorStore
    log_dir: str
    log: Callable[[str, str], None]

    def __post_init__(self) -> None:
        self.name = self.sink.name
        self.required = self.sink.required
        self._format = self.sink.format
        self._sent: Cursor | None = self.files.cursor
        """The last line that was sent; beyond the cursor while batches settle."""
        self._settling: collections.deque[tuple[float, Cursor]] = collections.deque()
        self._follower: LogFollower | None = None
        self._is_recalled = False
        """Whether the receiver was asked for its last line, since the start and since the last failure."""
        self._held: collections.deque[bytes] = collections.deque()
        """Lines that were read and not sent."""
        self._checked: tuple[int, Tiles] | None = None
        self._lines_max = BATCH_LINES_MAX
        self._refused_in_a_row = 0
        self._failures = self._failures_in_a_row = 0
        self._delivered_at = 0
        self._error = ""
        self._began_s: float | None = None
        """When the attempt that runs began, monotonic."""
        self._waits: tuple[str, int] = ("", 0)

    @property
    def cursor(self) -> Cursor | None:
        """The last line that the receiver certainly has."""
        return self.files.cursor

    # --- the thread ---------------------------------------------------------------------------------------------------

    def run(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            pause_s = self.attempt()
            ends_s = time.monotonic() + pause_s
            while pause_s > 0 and not stopping.wait(min(pause_s, STEP_SECONDS)) and not self._may_go_on():
                pause_s = ends_s - time.monotonic()

    def attempt(self) -> float:
        """One step. How long to wait until the next one, in seconds."""
        self._began_s = time.monotonic()
        try:
            again = self._step()
            self._began_s = None
            return 0.0 if again else STEP_SECONDS
        except (LaterError, _StoppedError, ExchangeError, KmsError, OSError) as error:
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            asked_s = error.seconds if isinstance(error, LaterError) else 0
            if not isinstance(error, _StoppedError):
                self._waits = ("", 0)
        self.rewind()
        self._is_recalled = False
        self._failures += 1
        self._failures_in_a_row += 1
        if text != self._error:
            self.log("sink failed", f"{self.name}: {text}")
        self._error, self._began_s = text, None
        longest_s = min(2.0 ** min(self._failures_in_a_row, 16), BACKOFF_SECONDS_MAX)
        # Half of it at random, so that auditors that lost one receiver don't come back at once.
        return max(random.uniform(longest_s / 2, longest_s), min(asked_s, BACKOFF_SECONDS_MAX))  # noqa: S311 - no secret

    def _works(self) -> None:
        if self._error:
            self.log("sink works again", self.name)
        self._error, self._failures_in_a_row = "", 0

    def _may_go_on(self) -> bool:
        """Whether an operator has skipped the line that the sink waits at."""
        with contextlib.suppress(KmsError):  # the next step shows it
            return self._is_skipped(*self._waits)
        return False

    def rewind(self) -> None:
        """Close files and connections. Lines without an acknowledgement are sent again."""
        self._settling.clear()
        self._sent = self.files.cursor
        self._held.clear()
        self.transport.reset()
        if self._follower is not None:
            self._follower.close()
        self._follower = None

    # --- a step -------------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Send a batch. Whether there is more to do at once."""
        self._settle()
        state = self.store.state
        line = state.line
        if line is None:
            return False
        if self._sent is None or self._sent.log_id != line.log_id:
            return self._begin(line.log_id, state.logs, state.size)
        batch = self._batch(line, self._sent)
        if isinstance(batch, _Missing):
            return self._pass_over(batch)
        if not batch:
            if not self._settling:
                self._works()
            return False
        try:
            self.transport.deliver(batch)
        except BatchRefusedError as error:
            if len(batch) > 1:
                self._lines_max = len(batch) // 2
                self.rewind()
            else:
                self._give_up(batch[0].event.seq, str(error), batch[0])
            return True
        self._lines_max = min(2 * self._lines_max, BATCH_LINES_MAX)
        self._refused_in_a_row = 0
        self._delivered(batch[-1])
        return True

    def _delivered(self, last: SinkMessage) -> None:
        rejected = 0 if self.files.cursor is None else self.files.cursor.rejected
        cursor = Cursor(1, last.log_id, last.event.seq, last.sig, rejected)
        self._sent = cursor
        if self.transport.settle_seconds:
            self._settling.append((time.monotonic() + self.transport.settle_seconds, cursor))
        else:
            self._store_cursor(cursor)

    def _settle(self) -> None:
        """Let the cursor go on to what no receiver can lose any more. Raises OSError, ExchangeError."""
        if not self._settling:
            return
        now_s = time.monotonic()
        self.transport.check()
        settled: Cursor | None = None
        while self._settling and self._settling[0][0] <= now_s:
            settled = self._settling.popleft()[1]
        if settled is not None:
            self._store_cursor(settled)
        if not self._settling:
            self.transport.reset()

    def _store_cursor(self, cursor: Cursor) -> None:
        self.files.save(cursor)
        self._waits = ("", 0)
        self._delivered_at = int(time.time())
        self._works()

    # --- the log ------------------------------------------------------------------------------------------------------

    def _begin(self, log_id: str, logs: Sequence[LogRange], size: int) -> bool:
        """Go on with another log than before, or with the first one."""
        cursor = self._sent
        if cursor is not None:
            for lost in _unsent(cursor, logs, size):
                return self._pass_over(lost)
            if self._settling:
                return False
            self.transport.begin_log(cursor.log_id)
        first = next((each.first_seq for each in logs if each.log_id == log_id), 1)
        if cursor is None:  # a new sink misses nothing that was removed before
            first = max(first, _first_seq(self.log_dir))
        self.files.save(Cursor(1, log_id, first - 1, b"", 0 if cursor is None else cursor.rejected))
        self.rewind()
        return True

    def _batch(self, last: TreeLine, cursor: Cursor) -> list[SinkMessage] | _Missing:
        """The lines after `sent`, up to `last`."""
        if self._follower is None:
            cursor = self._begin_reading(last, cursor if self._is_recalled else self._recalled(last, cursor))
            self._is_recalled = True
        batch: list[SinkMessage] = []
        held_bytes = 0
        for line in self._lines(last.seq):
            seq = record.peek_seq(line)
            due = cursor.seq + len(batch) + 1
            if seq != due:
                self._held.appendleft(line)
                if batch:
                    break
                return _Missing(last.log_id, due, seq - 1, "the log does not have the lines any more")
            message = self._message(last.log_id, line)
            batch.append(message)
            held_bytes += len(message.body)
            if held_bytes >= BATCH_BYTES_MAX or len(batch) >= self._lines_max:
                break
        if not batch and cursor.seq < last.seq:
            raise _StoppedError(f"the log has no line {cursor.seq + 1}, and the tree has it")
        return batch

    def _recalled(self, last: TreeLine, cursor: Cursor) -> Cursor:
        """The cursor, or the last line of the receiver's own file, which must be in the tree. A file that ends before
        the cursor has lost lines; not if the cursor has no MAC, since it is then behind lines that no sink got.
        """
        line = self.transport.last_line()
        if line is None:
            return cursor
        seq = record.peek_seq(line)
        if seq > last.seq:
            raise _StoppedError(
                f"the copy has line {seq} and the audit log ends at line {last.seq}: run `minikms audit verify`, and "
                "forward to an empty copy"
            )
        try:
            message = self._message(last.log_id, line)
        except (MalformedLineError, NotInTreeError, _StoppedError):
            raise _StoppedError(
                f"the last line of the copy, line {seq}, is not the one of the log: forward to an empty copy"
            ) from None
        if seq > cursor.seq or (seq < cursor.seq and cursor.sig):
            return self._moved(cursor, message)
        return cursor

    def _begin_reading(self, last: TreeLine, cursor: Cursor) -> Cursor:
        """Read from the line of the cursor on, if the log has it still: it must be the one that was sent, and its MAC
        is reported.
        """
        after = max(0, cursor.seq - 1)
        number = segment_before(self.log_dir, after + 1)
        self._follower = LogFollower(self.log_dir, after_seq=after, after_segment=number)
        for line in self._lines(cursor.seq):
            if record.peek_seq(line) != cursor.seq:
                self._held.appendleft(line)
                break
            message = self._message(last.log_id, line)
            if cursor.sig and not hmac.compare_digest(message.sig, cursor.sig):
                raise _StoppedError(f"line {cursor.seq} of the log is not the one that was sent")
            return cursor if cursor.sig else self._moved(cursor, message)
        return cursor

    def _moved(self, cursor: Cursor, to: SinkMessage) -> Cursor:
        self._sent = moved = Cursor(1, to.log_id, to.event.seq, to.sig, cursor.rejected)
        self.files.save(moved)
        return moved

    def _lines(self, until: int) -> Iterator[bytes]:
        while self._follower is not None:
            if not self._held:
                self._held.extend(self._follower.read(READ_LINES))
            if not self._held or record.peek_seq(self._held[0]) > until:
                return
            yield self._held.popleft()

    def _message(self, log_id: str, line: bytes) -> SinkMessage:
        event, _, sig = record.parse_line(line)
        state = self.store.state
        if self._checked is None or self._checked[0] != state.size:
            self._checked = (state.size, Tiles(self.store.read, state.size))
        index = leaf_index(state.logs, log_id, event.seq, state.size)
        if not hmac.compare_digest(self._checked[1].node(0, index), leaf_of(line)):
            raise _StoppedError(f"line {event.seq} of the log is not the one in the tree")
        body = ocsf.encode(log_id, event, line) if self._format == "ocsf" else _with_log_id(log_id, event.seq, line)
        return SinkMessage(log_id, event, line, sig, body)

    # --- lines that the receiver does not get -------------------------------------------------------------------------

    def _pass_over(self, lost: _Missing) -> bool:
        """Passes over lines that nobody can read any more, once the lines sent before them have settled."""
        if self._settling:
            return False
        self._give_up(lost.last, lost.why, lost)
        return True

    def _give_up(self, seq: int, why: str, what: _Missing | SinkMessage) -> None:
        """Go on after line `seq` without it. Raises _StoppedError."""
        text = f"line {seq}: {why}"
        if not self._is_skipped(what.log_id, seq):
            wrong = ""
            if self.required:
                wrong = "the sink is required"
            elif self._refused_in_a_row >= REFUSED_IN_A_ROW_MAX:
                wrong = f"{self._refused_in_a_row} lines before it were refused too"
            elif not self.files.may_reject():
                wrong = "the file of rejected lines is full"
            if wrong:
                self._waits = (what.log_id, seq)
                raise _StoppedError(f"{text}; {wrong}, so it waits for `minikms-auditor skip {seq}`")
        first, line, sig = (seq, what.line, what.sig) if isinstance(what, SinkMessage) else (what.first, b"null", b"")
        entry = {"log_id": what.log_id, "seq": first, "last_seq": seq, "why": why, "line": msgspec.Raw(line)}
        self.files.reject(msgspec.json.encode(entry))
        self.log("line rejected", f"{self.name}: {text}")
        self._refused_in_a_row += isinstance(what, SinkMessage)
        rejected = 0 if self.files.cursor is None else self.files.cursor.rejected
        self.files.save(Cursor(1, what.log_id, seq, sig, rejected + seq - first + 1))
        self._waits = ("", 0)
        self.rewind()

    def _is_skipped(self, log_id: str, seq: int) -> bool:
        return seq > 0 and self.files.is_skipped(log_id, seq)

    # --- status -------------------------------------------------------------------------------------------------------

    def status(self) -> SinkStatus:
        cursor, line, began_s = self.files.cursor, self.store.state.line, self._began_s
        error = self._error
        if self.required and not error and began_s is not None and time.monotonic() - began_s > HANGS_SECONDS:
            error = f"it has not answered for {time.monotonic() - began_s:.0f} s"
        has_log = cursor is not None and line is not None and cursor.log_id == line.log_id
        seq = cursor.seq if cursor is not None and has_log else 0
        return SinkStatus(
            name=self.name,
            required=self.required,
            log_id="" if cursor is None else cursor.log_id,
            seq=0 if cursor is None else cursor.seq,
            lag_lines=0 if line is None else max(0, line.seq - seq),
            delivered_at=self._delivered_at,
            failures=self._failures,
            error=error,
            waits_log_id=self._waits[0],
            waits_at=self._waits[1],
            rejected=0 if cursor is None else cursor.rejected,
        )


def _first_seq(log_dir: str) -> int:
    """The number of the first line in the log."""
    for file in each_segment(log_dir):
        return record.peek_seq(file.first_line())
    return 0


def _with_log_id(log_id: str, seq: int, line: bytes) -> bytes:
    """The line's JSON object with two more members before its own, which are left as they are."""
    return b'{"log_id":"%b","seq":%d,%b' % (log_id.encode("ascii"), seq, line[1:])


def _unsent(cursor: Cursor, logs: Sequence[LogRange], size: int) -> Iterator[_Missing]:
    """Lines of the log of `sent` and of later logs but the newest, which no reader finds any more."""
    known = False
    for each, end in zip(logs[:-1], [following.first_leaf for following in logs[1:]], strict=True):
        last = each.first_seq + min(end, size) - each.first_leaf - 1
        first = each.first_seq
        if each.log_id == cursor.log_id:
            known, first = True, cursor.seq + 1
        if known and first <= last:
            yield _Missing(each.log_id, first, last, "another log was begun before these lines were sent")
