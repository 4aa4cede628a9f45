"""The open audit log: queue events, write them with one call, and refuse answers while the log can't be written.

Owns: the queue of a turn, the handling of write failures, and periodic checkpoints and rotations. Invariants:

- Each commit is one write of whole lines. When it fails, it drops the queued events, leaves the file unchanged and
  raises AuditUnavailableError: the answers to these events must not be sent.
- Every commit tries again. The first one that succeeds writes a `resumed` event first: how many events were dropped,
  since when and why.
- A change of the audit key that has begun is completed before any other line is written: the keyring names the last
  line under the old key.
- Periodic work follows the monotonic clock, so that it continues when the wall clock is set back.
- `AuditLog` belongs to one thread. `LogSync.fdatasync` may run in another thread at the same time.

It must never report a line as written that is not, keep an event after its commit, or hold key bytes. The caller holds
the lock of the data directory.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Final, Literal, NoReturn

import msgspec

from minikms import api
from minikms.api.base64 import encode_text
from minikms.api.errors import AuditUnavailableError
from minikms.audit import record
from minikms.audit.chain import AuditKey
from minikms.audit.record import ACTOR_SELF, Event, Facts, LineRef
from minikms.audit.repair import AuditKeys, ExpectedLog, open_log
from minikms.audit.writer import RESERVE_BYTES, ChainWriter, Reserve
from minikms.platform import clock
from minikms.platform.append_only import UNCONFIRMED_BYTES_MAX

FsyncPolicy = Literal["never", "interval", "turn"]

FSYNC_INTERVAL_MS: Final = 100
"""How often the daemon calls `fdatasync` under the policy "interval"."""
CHORES_NS: Final = 1_000_000_000
"""Time between two rounds of chores."""
CHECKPOINT_AGE_NS: Final = 60 * 1_000_000_000
"""Lines older than this are signed, so that a verifier with only the public key can check them."""
ATTENDED_CHECKPOINT_AGE_NS: Final = 3 * 1_000_000_000
"""The same while an auditor takes the log. Up to two seconds come between two rounds of chores: 5 s in all."""

_NO_SPACE: Final = frozenset((errno.ENOSPC, errno.EDQUOT))


class LogLimits(msgspec.Struct, frozen=True, kw_only=True):
    """segment_bytes, segment_age_s: a file is closed when it reaches either. reserve_bytes: reserved on the disk."""

    segment_bytes: int = 1024 * 1024 * 1024
    segment_age_s: int = 30 * 24 * 3600
    reserve_bytes: int = RESERVE_BYTES


DEFAULT_LIMITS: Final = LogLimits()
NOTHING_EXPECTED: Final = ExpectedLog()


class _Failure(msgspec.Struct):
    """Why the log can't be written. since: Unix ns. reason: for operators, without a path. dropped: count of events."""

    since: int
    reason: str
    dropped: int = 0


class LogSync:
    """Which lines of a log are on the disk. each_turn: whether a turn's answers must wait for `fdatasync`."""

    def __init__(self, writer: ChainWriter, policy: FsyncPolicy) -> None:
        self._writer = writer
        self._synced = writer.head
        self._synced_lock = threading.Lock()
        self.policy: FsyncPolicy = policy
        self.each_turn = policy == "turn"

    @property
    def dirty(self) -> bool:
        """Whether a committed line is not confirmed to be on disk."""
        return self._writer.file.unconfirmed_bytes > 0

    @property
    def needed(self) -> bool:
        """Whether `fdatasync` should be called now: because of the policy, because the last call failed, or before a
        commit has to wait for the disk, since the unconfirmed lines are held in memory.
        """
        file = self._writer.file
        least = UNCONFIRMED_BYTES_MAX // 2 if self.policy == "never" else 1
        return file.failed or file.unconfirmed_bytes >= least

    def fdatasync(self) -> None:
        """Return when every line committed before the call is on disk. For any thread.

        Raises AuditUnavailableError: then the log accepts no lines until a later call succeeds.
        """
        head = self._writer.head  # before the sync begins: its line was appended before it became the head
        try:
            self._writer.file.sync()
        except OSError as error:
            raise AuditUnavailableError("the disk did not confirm the audit log") from error
        self._confirm(head)

    def _confirm(self, head: LineRef) -> None:
        with self._synced_lock:
            self._synced = max(self._synced, head, key=lambda line: line.seq)

    def durable_line(self) -> LineRef:
        """The last line that is on the disk for certain. Records it, so that a later call gives no earlier line: a
        rotation syncs by itself."""
        if not self.dirty:
            self._confirm(self._writer.head)
        return self._synced


class AuditLog:
    """The open log of `directory`, which is begun if there is none. events_dropped: since then, because they could not
    be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keys: AuditKeys,
        *,
        now_ns: Callable[[], int] = clock.now_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        fsync: FsyncPolicy = "interval",
        expected: ExpectedLog = NOTHING_EXPECTED,
        accept_loss: bool = False,
        hash_thread_ids: bool = False,
        limits: LogLimits = DEFAULT_LIMITS,
    ) -> None:
        """keys: with views of the arena that stay valid until `close`. If the log ends under a former one, this call
        completes the change of key; the log must then end at the line `since` of the current one, if that is recorded.
        now_ns: Unix time, for the lines. monotonic_ns: schedules the chores. expected: what other files say about the
        log.

        Raises StartError if the log is altered, missing or shorter than expected, and AuditUnavailableError or OSError
        if the disk fails.
        """
        self.directory = os.fspath(directory)
        opened = open_log(self.directory, keys, expected, now_ns(), accept_loss=accept_loss)
        self.now_ns = now_ns
        self._monotonic_ns = monotonic_ns
        self.events_dropped = 0
        self._limits = limits
        self._hash_thread_ids = hash_thread_ids
        self._queue: list[Event] = []
        self.writer = ChainWriter(self.directory, opened)
        self.sync = LogSync(self.writer, fsync)
        self._failure: _Failure | None = None
        self._next_key: AuditKey | None = None
        """The line that announces this key could not be written yet."""
        self._held = False
        self._chore_fault = ""
        self._disk_full = False
        self._reserve = Reserve(self.directory, limits.reserve_bytes)
        self._chores_ns = 0
        started_ns = monotonic_ns()
        self._signed_ns = started_ns
        self._segment = opened.segment
        # Only the wall clock knows the age of an earlier process's file. If it was set back since, the age begins now.
        self._segment_began_ns = started_ns - max(0, now_ns() - opened.segment_ts)
        self._closed = False
        self.attended: Callable[[], bool] = lambda: False
        """Whether an auditor takes the lines, as far as they are signed. Its owner may set it."""
        self._reserve.fill()
        try:
            if opened.key.version != opened.current.version:
                self.change_key(opened.current)  # its line comes first; the commit below waits for the disk
            self._queue += opened.pending
            self.commit(durable=True)
        except AuditUnavailableError:
            self.writer.close()
            raise

    # --- writing -----------------------------------------------------------------------------------------------------

    def add(self, event: Event) -> None:
        """Queue an event of this turn. The next `commit` writes or drops it. The caller must not change it again.

        It may add one event several times, for as many lines, if the event has no thread id, which may be hashed in
        place, and no text that needs escaping.
        """
        if event.facts:
            record.text_facts(event)
        self._queue.append(event)

    def commit(self, *, durable: bool = False) -> None:
        """Write all queued events. With `durable`, wait until they are on disk.

        Raises AuditUnavailableError: then no answer to these events may be sent.
        """
        if self._queue or self._failure is not None:
            events, self._queue = self._queue, []
            self._write_turn(events)
        if durable:
            self.sync.fdatasync()

    def _write_turn(self, events: list[Event]) -> None:
        ts = self.now_ns()
        dropped = len(events)
        if self._hash_thread_ids:
            for event in filter(lambda each: each.thread_id, events):
                event.thread_id = record.hash_thread_id(event.thread_id, self.writer.key.mac_key)
        if self._failure is not None:
            events.insert(0, _resumed_event(self._failure))
        self._require_not_held(dropped, ts)
        try:
            self.writer.repair()
            self._announce_key(ts)
        except OSError as error:
            self._fail(error, dropped, ts)
        try:
            self.writer.write(events, ts)
        except OSError as error:
            if error.errno not in _NO_SPACE or not _may_use_reserve(events):
                self._fail(error, dropped, ts)
            if not self._disk_full:
                facts: Facts = {"reserve_bytes": self._reserve.left_bytes}
                events.insert(0, Event(type=record.TYPE_DISK_FULL, actor=ACTOR_SELF, facts=facts))
            if not self._on_reserve(lambda: self.writer.write(events, ts, escaped=True)):
                self._fail(error, dropped, ts)
            self._disk_full = True
        self._failure = None
        if self._monotonic_ns() >= self._chores_ns:
            self._do_chores()

    def _on_reserve(self, write: Callable[[], None]) -> bool:
        """Write on a full disk, into reserved space. Returns whether that succeeded."""
        while self._reserve.release():
            try:
                self.writer.repair()
                write()
            except OSError as error:
                if error.errno in _NO_SPACE:
                    continue
                return False
            # Later, so that this commit's chores don't allocate the freed space again.
            self._chores_ns = self._monotonic_ns() + CHORES_NS
            return True
        return False

    def sign_and_sync(self) -> LineRef:
        """Write what is queued, sign it, wait for the disk, and return the head. Raises AuditUnavailableError."""
        self.commit()
        ts = self.now_ns()
        try:
            self.writer.repair()
        except OSError as error:
            self._fail(error, 0, ts)
        self._sign()
        self.sync.fdatasync()
        return self.writer.head

    def change_key(self, key: AuditKey) -> None:
        """Write a line that announces `key`, and use it from the next line on. Ends `hold`. Returns before that line is
        on disk: call `LogSync.fdatasync`.

        The keyring must hold both keys durably before. Raises AuditUnavailableError; then the first commit that
        succeeds begins with that line.
        """
        if not self._held:
            self.commit()
        self._held = False
        self._next_key = key
        ts = self.now_ns()
        try:
            self.writer.repair()
            self._announce_key(ts)
        except OSError as error:
            self._fail(error, 0, ts)

    def _announce_key(self, ts: int) -> None:
        """Writes the line of a change of key that is due, on a full disk into reserved space: no other line can be
        written before it. Raises OSError.
        """
        key = self._next_key
        if key is None:
            return
        try:
            self.writer.change_key(key, ts)
        except OSError as error:
            if error.errno not in _NO_SPACE or not self._on_reserve(lambda: self.writer.change_key(key, ts)):
                raise
        self._next_key = None

    def hold(self) -> LineRef:
        """Write what is queued, sign it, and return the head. It stays the last line until `change_key` or `release`: a
        keyring that names it may be on its way to disk. Queued events stay queued; a commit of any fails.

        Raises AuditUnavailableError; then nothing is held.
        """
        self._require_not_held(0, self.now_ns())
        self.commit()
        self._sign()
        self._held = True
        return self.writer.head

    def fail_held(self, reason: str) -> None:
        """While it is held, the log counts as one that can't be written."""
        if self._failure is None:
            self._failure = _Failure(since=self.now_ns(), reason=reason)

    def release(self) -> None:
        """Ends `hold` without a change of key. The next commit writes again."""
        self._held = False

    def _require_not_held(self, dropped: int, ts: int) -> None:
        if self._held:
            self._fail(OSError(errno.EIO, "the keyring could not be written yet"), dropped, ts)

    def close(self) -> None:
        """Write what is queued, sign it, wait for the disk, and close. The caller may release the keys afterwards.

        Raises AuditUnavailableError if the end of the log could not be written; the log is closed in any case.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.commit()
            self._sign()
            self.sync.fdatasync()
        finally:
            self.writer.close()

    def abandon(self) -> None:
        """Close without writing or signing: the audit keys are gone. The next `AuditLog` continues the log as
        after a crash. Queued events are lost; the answers to them must not be sent.
        """
        if not self._closed:
            self._closed = True
            self._queue.clear()
            self.writer.close()

    def _sign(self) -> None:
        """Sign the lines that no signature covers yet. Call it after a commit. Raises AuditUnavailableError."""
        ts = self.now_ns()
        if self.writer.unsigned_lines:
            self._require_not_held(0, ts)
            try:
                self.writer.repair()
                self.writer.checkpoint(ts)
            except OSError as error:
                self._fail(error, 0, ts)

    # --- chores and failures -----------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Call this about once a second: it does the chores if no commit did, and tries again after a failure.

        Raises nothing; `status` reports failures.
        """
        if self._held:
            return
        if self._failure is not None and not self._queue:
            try:
                self.commit()
            except AuditUnavailableError:
                return
        if self._monotonic_ns() >= self._chores_ns and self._failure is None:
            self._do_chores()

    def _do_chores(self) -> None:
        """Refill the reserve, rotate, and sign old lines. The next round repeats what failed."""
        now = self._monotonic_ns()
        self._chores_ns = now + CHORES_NS
        if not self._reserve.full and self._reserve.fill() and self._disk_full:
            self._disk_full = False
            self.add(Event(type=record.TYPE_DISK_OK, actor=ACTOR_SELF))
        writer = self.writer
        if writer.segment != self._segment:
            self._segment, self._segment_began_ns = writer.segment, now
        try:
            if writer.file.size >= self._limits.segment_bytes or self._is_old(now):
                writer.repair()
                writer.rotate(self.now_ns())
                self._signed_ns = now
            elif not writer.unsigned_lines:
                self._signed_ns = now
            elif now - self._signed_ns >= (ATTENDED_CHECKPOINT_AGE_NS if self.attended() else CHECKPOINT_AGE_NS):
                writer.repair()
                writer.checkpoint(self.now_ns())
                self._signed_ns = now
        except OSError as error:
            self._chore_fault = _reason(error)
        else:
            self._chore_fault = ""

    def _is_old(self, now: int) -> bool:
        return not self.writer.fresh and now - self._segment_began_ns >= self._limits.segment_age_s * 1_000_000_000

    def _fail(self, error: OSError, dropped: int, ts: int) -> NoReturn:
        if self._failure is None:
            self._failure = _Failure(since=ts, reason=_reason(error))
        self._failure.dropped += dropped
        self.events_dropped += dropped
        raise AuditUnavailableError(
            "the audit log can't be written, so requests are refused; this one may have been carried out"
        ) from error

    # --- status ------------------------------------------------------------------------------------------------------

    @property
    def head(self) -> dict[str, str | int]:
        """{"seq": n, "sig": base64} of the last line. `minikms audit verify --expect-head` takes `<seq>:<sig>`."""
        head = self.writer.head
        return {"seq": head.seq, "sig": encode_text(head.sig)}

    @property
    def writable(self) -> bool:
        """Whether the last write and the last `fdatasync` succeeded."""
        return self._failure is None and not self.writer.file.failed

    def service_status(self) -> dict[str, str]:
        """The members `status` and `reason` of `/status`: no verb is served while the log can't be written."""
        if self.writable:
            return {"status": "ok", "reason": ""}
        return {
            "status": api.CODE_AUDIT_UNAVAILABLE,
            "reason": f"the audit log can't be written: {self.status()['unavailable_reason']}",
        }

    def status(self) -> dict[str, object]:
        """For `/status` and metrics: the head, whether and why the log can't be written, sizes. Times are Unix ns."""
        writer, failure, durable = self.writer, self._failure, self.sync.durable_line()
        unconfirmed = "the disk has not confirmed all lines" if writer.file.failed else ""
        return {
            "head": self.head,
            "durable": {"seq": durable.seq, "mac": encode_text(durable.sig)},
            "writable": self.writable,
            "unavailable_reason": unconfirmed if failure is None else failure.reason,
            "unavailable_since": 0 if failure is None else failure.since,
            "events_dropped": self.events_dropped,
            "chore_fault": self._chore_fault,
            "disk_full": self._disk_full,
            "reserve_bytes": self._reserve.left_bytes,
            "log_id": writer.log_id.hex(),
            "audit_key_version": writer.key.version,
            "lines_not_signed": writer.unsigned_lines,
            "segment": writer.segment,
            "segment_bytes": writer.file.size,
            "fsync": self.sync.policy,
            "synced": not self.sync.dirty,
        }


def _may_use_reserve(events: list[Event]) -> bool:
    """A turn that consists of refused peers gets no reserved space, so that such peers can't use it up."""
    return not all(event.type == record.TYPE_REFUSED for event in events)


def _resumed_event(failure: _Failure) -> Event:
    facts: Facts = {"dropped": failure.dropped, "reason": failure.reason, "since": failure.since}
    return Event(type=record.TYPE_RESUMED, actor=ACTOR_SELF, facts=facts)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else "the disk failed"
