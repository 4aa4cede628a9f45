"""The audit log as the daemon writes it: queue events, write them with one call, or say that it can't.

Owns: the queue of a turn, what happens when the log can't be written, and the log's chores. Invariants:

- One write per commit, whole lines only. When it fails, the queued events are gone, the file is as it was, and
  AuditUnavailableError is raised: their answers must not leave.
- Every commit tries again by itself. The first that succeeds says first how many events were lost, since when and why.
- `add`, `commit`, `tick`, `remove_segments` and `close` belong to one thread. `fdatasync` may run beside them in
  another.

It must never answer for a line that was not written, keep an event beyond its commit, or hold key bytes. It trusts that
its caller holds the lock of the data directory.

What a log needs beside its lines: compression, retention, forwarding, and trying again.

Owns: which of these is done when, and in which thread. `tick` belongs to the thread of the log and is called about once
a second; `work` belongs to one worker thread of its own and is called every few seconds: it may take as long as a file
takes to compress, or another machine to answer. Neither raises; `status` says what does not work. It must never hold up
a commit, nor touch a file that the log has not closed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final, Literal, NoReturn

import msgspec

from minikms.audit import record, retention
from minikms.audit.chain import AuditKey, LocalSigner, Signer, base64_text
from minikms.audit.reader import DamagedSegmentError
from minikms.audit.record import ACTOR_SELF, Event, Facts, Head
from minikms.audit.recovery import Keys, Known, Opened, open_log
from minikms.audit.retention import Retention, compress_closed
from minikms.audit.shipping import Forwarder, Forwarding
from minikms.audit.writer import RESERVE_BYTES, ChainWriter, Reserve
from minikms.errors import AuditUnavailableError

FsyncPolicy = Literal["never", "interval", "turn"]

FSYNC_INTERVAL_MS: Final = 100
"""How often the daemon calls `fdatasync` under the policy "interval"."""
CHORES_NS: Final = 1_000_000_000
"""Between two rounds of chores."""
CHECKPOINT_AGE_NS: Final = 60 * 1_000_000_000
"""Lines older than this are signed, so that who has only the public key is at most so far behind."""

_NO_SPACE: Final = frozenset((errno.ENOSPC, errno.EDQUOT))


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """segment_bytes, segment_age_s: a file is closed when it reaches either. reserve_bytes: kept back on the disk."""

    segment_bytes: int = 1024 * 1024 * 1024
    segment_age_s: int = 30 * 24 * 3600
    reserve_bytes: int = RESERVE_BYTES


DEFAULT_LIMITS: Final = Limits()


class _Failure(msgspec.Struct):
    """The log can't be written. since: Unix ns. reason: for an operator, without a path."""

    since: int
    reason: str
    dropped: int = 0


class AuditLog:
    """An open log. Make one with `AuditLog.open`."""

    def __init__(
        self, directory: str, opened: Opened, *, now_ns: Callable[[], int], fsync: FsyncPolicy, limits: Limits
    ) -> None:
        self.directory = directory
        self._now_ns = now_ns
        self._fsync: FsyncPolicy = fsync
        self._limits = limits
        self._hash_thread_ids = False
        self._queue: list[Event] = []
        self._writer = ChainWriter(directory, opened)
        self._failure: _Failure | None = None
        self._dropped_total = 0
        self._chore_fault = ""
        self._disk_full = False
        self._reserve = Reserve(directory, limits.reserve_bytes)
        self._chores_ns = 0
        self._signed_ns = now_ns()
        self._closed = False

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        audit_key: memoryview,
        seed: memoryview,
        now_ns: Callable[[], int],
        fsync: FsyncPolicy = "interval",
        key_version: int = 1,
        former: tuple[AuditKey, ...] = (),
        since: Head | None = None,
        signer: Signer | None = None,
        known: Known | None = None,
        accept_loss: bool = False,
        hash_thread_ids: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> AuditLog:
        """Open the log in `directory`, or begin one.

        audit_key: 32 bytes, seed: 32 bytes (Ed25519), both views into the arena that stay valid until `close`; `signer`
        takes the seed's place where it lives elsewhere. now_ns: Unix time. former: the earlier versions, in any order;
        when the log still ends under one of them, at the line `since` where that is given, the change of key is
        completed here. known: what is remembered of it.

        Raises StartError when the log found is altered, missing or shorter than known, AuditUnavailableError or OSError
        when the disk fails.
        """
        path = os.fspath(directory)
        key = AuditKey(key_version, audit_key, LocalSigner(seed) if signer is None else signer, since)
        opened = open_log(path, Keys(key, former), known or Known(), now_ns(), accept_loss=accept_loss)
        log = cls(path, opened, now_ns=now_ns, fsync=fsync, limits=limits)
        log._hash_thread_ids = hash_thread_ids
        log._reserve.fill()
        try:
            if opened.key.version != key.version:
                log.change_key(key)
            log._queue += opened.pending
            log.commit(durable=True)
        except AuditUnavailableError:
            log._writer.close()
            raise
        return log

    # --- writing -----------------------------------------------------------------------------------------------------

    def add(self, event: Event) -> None:
        """Queue an event of this turn. The next `commit` writes or drops it; it must not be used again."""
        if event.facts:
            record.settle_facts(event)
        self._queue.append(event)

    def commit(self, *, durable: bool = False) -> None:
        """Write all queued events. With `durable`, return only when they are on disk (this blocks on the disk).

        Raises AuditUnavailableError: then no answer to what they tell of may leave.
        """
        if self._queue or self._failure is not None:
            events, self._queue = self._queue, []
            self._write_turn(events)
        if durable:
            self.fdatasync()

    def _write_turn(self, events: list[Event]) -> None:
        ts = self._now_ns()
        dropped = len(events)
        if self._hash_thread_ids:
            self._hide_thread_ids(events)
        if self._failure is not None:
            events.insert(0, _resumed_event(self._failure))
        try:
            self._writer.repair()
        except OSError as error:
            self._fail(error, dropped, ts)
        try:
            self._writer.write(events, ts)
        except OSError as error:
            if error.errno not in _NO_SPACE or not self._write_on_reserve(events, ts):
                self._fail(error, dropped, ts)
        self._failure = None
        if ts >= self._chores_ns:
            self._do_chores(ts)

    def _write_on_reserve(self, events: list[Event], ts: int) -> bool:
        """Write on a full disk, on space kept back. Strangers don't get it: only a turn with another event does."""
        if all(event.type == record.TYPE_REFUSED for event in events):
            return False
        if not self._disk_full:
            facts: Facts = {"reserve_bytes": self._reserve.left_bytes}
            events.insert(0, Event(type=record.TYPE_DISK_FULL, actor=ACTOR_SELF, facts=facts))
        while self._reserve.release():
            try:
                self._writer.repair()
                self._writer.write(events, ts, escaped=True)
            except OSError as error:
                if error.errno in _NO_SPACE:
                    continue
                return False
            self._disk_full = True
            self._chores_ns = ts + CHORES_NS  # what was given back is not to be taken again at once
            return True
        return False

    def settle(self) -> Head:
        """Sign the end, wait for the disk, and return the last line: it stays the last until more is added.

        Raises AuditUnavailableError.
        """
        self.commit()
        ts = self._now_ns()
        try:
            self._writer.repair()
        except OSError as error:
            self._fail(error, 0, ts)
        self._sign()
        self.fdatasync()
        return self._writer.head

    def change_key(self, key: AuditKey) -> None:
        """End the use of the current audit key with a line that names `key`, which holds from the next line on.

        The keyring must hold both durably before. Returns when the line is on disk; raises AuditUnavailableError.
        """
        self.commit()
        ts = self._now_ns()
        try:
            self._writer.repair()
            self._writer.change_key(key, ts)
        except OSError as error:
            self._fail(error, 0, ts)
        self.fdatasync()

    def remove_segments(self, keep: retention.Retention) -> list[str]:
        """Delete the oldest closed files that `keep` lets go of, after durable and signed lines that name them.

        Returns their names. Raises AuditUnavailableError, with nothing deleted, and OSError.
        """
        segments = retention.due(self.directory, keep, self._now_ns())
        if not segments:
            return []
        for segment in segments:
            self.add(segment.event())
        self.commit()
        self._sign()
        self.fdatasync()
        return [name for segment in segments for name in retention.delete(self.directory, segment)]

    def close(self) -> None:
        """Write what is queued, sign the end, wait for the disk, close. The keys may be released after it.

        Raises AuditUnavailableError when the end could not be written; the log is closed all the same.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.commit()
            self._sign()
            self.fdatasync()
        finally:
            self._writer.close()

    def _sign(self) -> None:
        """Sign the lines that no signature covers yet, after a commit. Raises AuditUnavailableError."""
        ts = self._now_ns()
        if self._writer.unsigned_lines:
            try:
                self._writer.repair()
                self._writer.checkpoint(ts)
            except OSError as error:
                self._fail(error, 0, ts)

    # --- chores and failures -----------------------------------------------------------------------------------------

    def tick(self) -> None:
        """To be called about once a second: does the chores when no commit does, and tries again after a failure.

        Raises nothing; `status` says what does not work.
        """
        ts = self._now_ns()
        if self._failure is not None and not self._queue:
            try:
                self.commit()
            except AuditUnavailableError:
                return
        if ts >= self._chores_ns and self._failure is None:
            self._do_chores(ts)

    def _do_chores(self, ts: int) -> None:
        """What a commit can do without, after one that succeeded: the next round tries again what failed."""
        self._chores_ns = ts + CHORES_NS
        if not self._reserve.full and self._reserve.fill() and self._disk_full:
            self._disk_full = False
            self.add(Event(type=record.TYPE_DISK_OK, actor=ACTOR_SELF))
        writer = self._writer
        try:
            if writer.size >= self._limits.segment_bytes or self._is_old(ts):
                writer.repair()
                writer.rotate(ts)
                self._signed_ns = ts
            elif not writer.unsigned_lines:
                self._signed_ns = ts
            elif ts - self._signed_ns >= CHECKPOINT_AGE_NS:
                writer.repair()
                writer.checkpoint(ts)
                self._signed_ns = ts
        except OSError as error:
            self._chore_fault = _reason(error)
        else:
            self._chore_fault = ""

    def _is_old(self, ts: int) -> bool:
        return not self._writer.fresh and ts - self._writer.segment_ts >= self._limits.segment_age_s * 1_000_000_000

    def _fail(self, error: OSError, dropped: int, ts: int) -> NoReturn:
        if self._failure is None:
            self._failure = _Failure(since=ts, reason=_reason(error))
        self._failure.dropped += dropped
        self._dropped_total += dropped
        raise AuditUnavailableError("the audit log can't be written, so nothing is answered") from error

    def _hide_thread_ids(self, events: list[Event]) -> None:
        for event in events:
            if event.thread_id:
                event.thread_id = record.hash_thread_id(event.thread_id, self._writer.key.mac_key)

    # --- waiting for the disk ----------------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether a committed line is not yet known to be on disk."""
        return self._writer.durability.dirty

    @property
    def sync_needed(self) -> bool:
        """Whether `fdatasync` should be called now: by the policy, or since it failed the last time."""
        durability = self._writer.durability
        return durability.failed or (self._fsync != "never" and durability.dirty)

    @property
    def sync_each_turn(self) -> bool:
        """Whether a turn's answers must wait for `fdatasync`."""
        return self._fsync == "turn"

    def fdatasync(self) -> None:
        """Return when every line committed before the call is on disk. For any thread.

        Raises AuditUnavailableError: the log then takes no lines until a later call has succeeded.
        """
        try:
            self._writer.durability.sync()
        except OSError as error:
            raise AuditUnavailableError("the audit log is not confirmed by the disk") from error

    # --- what others want to know ------------------------------------------------------------------------------------

    @property
    def head(self) -> dict[str, str | int]:
        """{"seq": n, "sig": base64}: the last line; `<seq>:<sig>` is what `minikms audit verify --expect-head`
        takes.
        """
        head = self._writer.head
        return {"seq": head.seq, "sig": base64_text(head.sig)}

    @property
    def segment(self) -> int:
        """Number of the segment being written. For any thread."""
        return self._writer.segment

    @property
    def writable(self) -> bool:
        """Whether the last attempt to write, and to have it confirmed by the disk, succeeded."""
        return self._failure is None and not self._writer.durability.failed

    @property
    def events_dropped(self) -> int:
        """How many events were lost since the log was opened, because they could not be written."""
        return self._dropped_total

    def status(self) -> dict[str, object]:
        """For `/status` and metrics: the head, whether the log can be written and why not, how much of it there is.

        Times are Unix ns, sizes bytes.
        """
        writer, failure = self._writer, self._failure
        unconfirmed = "lines are not confirmed by the disk" if writer.durability.failed else ""
        return {
            "head": self.head,
            "writable": self.writable,
            "unavailable_reason": unconfirmed if failure is None else failure.reason,
            "unavailable_since": 0 if failure is None else failure.since,
            "events_dropped": self._dropped_total,
            "chore_fault": self._chore_fault,
            "disk_full": self._disk_full,
            "reserve_bytes": self._reserve.left_bytes,
            "log_id": writer.log_id.hex(),
            "audit_key_version": writer.key.version,
            "lines_not_signed": writer.unsigned_lines,
            "segment": writer.segment,
            "segment_bytes": writer.size,
            "fsync": self._fsync,
            "synced": not self.dirty,
        }


def _resumed_event(failure: _Failure) -> Event:
    facts: Facts = {"dropped": failure.dropped, "reason": failure.reason, "since": failure.since}
    return Event(type=record.TYPE_RESUMED, actor=ACTOR_SELF, facts=facts)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else "the disk failed"


RETENTION_TICKS: Final = 3600
"""Retention looks once an hour, and soon after a start."""
FORWARD_STEPS_MAX: Final = 100
"""Of 1,000 lines, in one call of `work`."""


class Upkeep:
    """For one open log. `keep` None keeps every file; without a forwarder nothing is sent."""

    def __init__(self, log: AuditLog, *, keep: Retention | None = None, forwarder: Forwarder | None = None) -> None:
        self._log = log
        self._keep = keep
        self._forwarding = None if forwarder is None else Forwarding(log.directory, forwarder)
        self._ticks = 0
        self._forwarded = 0
        self._faults: dict[str, str] = {}

    def tick(self) -> None:
        """The log's chores; now and then, what retention lets go of."""
        self._log.tick()
        due = self._ticks % RETENTION_TICKS == 0
        self._ticks += 1
        if self._keep is None or not due:
            return
        try:
            self._log.remove_segments(self._keep)
        except (AuditUnavailableError, DamagedSegmentError, OSError) as error:
            self._faults["retention"] = _reason_upkeep(error)
        else:
            self._faults.pop("retention", None)

    def work(self) -> None:
        """Compress what was closed, send what was committed."""
        try:
            compress_closed(self._log.directory, below=self._log.segment)
        except (DamagedSegmentError, OSError) as error:
            self._faults["compression"] = _reason_upkeep(error)
        else:
            self._faults.pop("compression", None)
        if self._forwarding is not None:
            self._forward(self._forwarding)

    def _forward(self, forwarding: Forwarding) -> None:
        head = self._log.head["seq"]
        try:
            for _ in range(FORWARD_STEPS_MAX):
                sent = forwarding.step(int(head))
                self._forwarded += sent
                if not sent:
                    break
        except (DamagedSegmentError, OSError) as error:
            forwarding.close()
            self._faults["forwarding"] = _reason_upkeep(error)
        else:
            self._faults.pop("forwarding", None)

    def status(self) -> dict[str, object]:
        """{"faults": {what: why}, "forwarded": lines since the start, or None without a forwarder}"""
        return {
            "faults": dict(self._faults),
            "forwarded": None if self._forwarding is None else self._forwarded,
        }

    def close(self) -> None:
        """After the last `work` has returned."""
        if self._forwarding is not None:
            self._forwarding.close()


def _reason_upkeep(error: Exception) -> str:
    return error.strerror or "failed" if isinstance(error, OSError) else str(error)
