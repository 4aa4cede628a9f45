"""The audit log as the daemon writes it: queue events, write them with one call, or say that it can't.

Owns: the file being written and the state of its chain. Invariants:

- One `write` per commit, whole lines only. When it fails or is short, the file is cut back to the last good line, the
  chain stays where it was, the queued events are gone, and AuditUnavailableError is raised: their answers must not
  leave. If even the cut fails, nothing is written before it has succeeded.
- Every commit tries again by itself. The first that succeeds says first how many events were lost and since when.
- `add`, `commit` and `close` belong to one thread. `fdatasync` may run beside them in another.

It must never write a line that was not chained to the one before it in the file, buffer a line beyond its commit, or
hold key bytes. It trusts that its caller holds the lock of the data directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Final, Literal, NoReturn

import msgspec

from minikms.audit import chain, record
from minikms.audit.chain import Coverage, base64_text
from minikms.audit.durability import Durability
from minikms.audit.opening import Keys, Known, Opened, open_log, write_whole
from minikms.audit.record import ACTOR_SELF, Event, Facts, Head
from minikms.audit.reserve import Reserve
from minikms.audit.segments import LOG_NAME
from minikms.audit.signer import AuditKey, LocalSigner, Signer
from minikms.errors import AuditUnavailableError

FsyncPolicy = Literal["never", "interval", "turn"]

CHECKPOINT_LINES: Final = 10_000
CHECKPOINT_BYTES: Final = 8 * 1024 * 1024
"""A checkpoint costs some 150 µs: at either bound less than 0.02 µs a line. A start reads at most what lies between
two."""
CHORES_NS: Final = 1_000_000_000
"""Between attempts at what a commit can do without: refilling the reserve."""

_NO_SPACE: Final = frozenset((errno.ENOSPC, errno.EDQUOT))


class _Failure(msgspec.Struct):
    """The log can't be written. since: Unix ns. reason: for an operator, without a path."""

    since: int
    reason: str
    dropped: int = 0


class AuditLog:
    """An open log. Make one with `AuditLog.open`."""

    def __init__(self, directory: str, opened: Opened, now_ns: Callable[[], int], fsync: FsyncPolicy) -> None:
        self._directory = directory
        self._now_ns = now_ns
        self._fsync: FsyncPolicy = fsync
        self._queue: list[Event] = list(opened.pending)
        self._fd = opened.fd
        self._size = opened.size
        self._head = opened.head
        self._coverage = opened.coverage
        self._log_id = opened.log_id
        self._key = opened.key
        self._hash_thread_ids = False
        self._failure: _Failure | None = None
        self._dropped_total = 0
        self._cut_due = False
        self._disk_full = False
        self._reserve = Reserve(directory)
        self._chores_ns = 0
        self._durability = Durability(os.path.join(directory, LOG_NAME), opened.fd, opened.size)
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
        former: AuditKey | None = None,
        signer: Signer | None = None,
        known: Known | None = None,
        accept_loss: bool = False,
        hash_thread_ids: bool = False,
    ) -> AuditLog:
        """Open the log in `directory`, or begin one.

        audit_key: 32 bytes, seed: 32 bytes (Ed25519), both views into the arena that stay valid until `close`; `signer`
        takes the seed's place where it lives elsewhere. now_ns: Unix time. former: the key before this one, while the
        log may still end under it: the change is then completed here. known: what is remembered of the log.

        Raises StartError when the log found is altered, missing or shorter than known, and OSError when the disk fails.
        """
        path = os.fspath(directory)
        key = AuditKey(key_version, audit_key, LocalSigner(seed) if signer is None else signer)
        opened = open_log(path, Keys(key, former), known or Known(), now_ns(), accept_loss=accept_loss)
        log = cls(path, opened, now_ns, fsync)
        log._hash_thread_ids = hash_thread_ids
        log._reserve.fill()
        if opened.key.version != key.version:
            log.change_key(key)
        log.commit(durable=True)
        return log

    # --- writing -----------------------------------------------------------------------------------------------------

    def add(self, event: Event) -> None:
        """Queue an event of this turn. It is written, or dropped, by the next `commit`; it must not be used again."""
        self._queue.append(event)

    def commit(self, *, durable: bool = False) -> None:
        """Write all queued events. With `durable`, return only when they are on disk (this blocks on the disk).

        Raises AuditUnavailableError: then none of them was written.
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
            self._repair()
            self._write(events, ts)
        except OSError as error:
            if error.errno not in _NO_SPACE or not self._write_on_reserve(events, ts):
                self._fail(error, dropped, ts)
        self._failure = None
        if ts >= self._chores_ns:
            self._do_chores(ts)

    def _write(self, events: list[Event], ts: int, *, escaped: bool = False) -> None:
        """One write of `events`, with the checkpoint that falls due. Raises OSError, and nothing has changed."""
        blob, head = chain.seal(events, self._head, self._key.mac_key, ts, escaped=escaped)
        if len(blob) > CHECKPOINT_BYTES and len(events) > 1:
            # A turn of giant batches: in two, so that no more than this lies between two checkpoints.
            half = len(events) // 2
            self._write(events[:half], ts, escaped=True)
            self._write(events[half:], ts, escaped=True)
            return
        coverage = self._coverage
        if (
            coverage.lines_count + len(events) < CHECKPOINT_LINES
            and coverage.bytes_count + len(blob) < CHECKPOINT_BYTES
        ):
            self._append(blob)
            coverage.add(blob, len(events))
            self._head = head
            return
        coverage = coverage.copy()
        coverage.add(blob, len(events))
        line, head = self._signed(record.TYPE_CHECKPOINT, head, coverage, ts)
        self._append(blob + line)
        self._follow(line, head)

    def _signed(
        self, event_type: str, head: Head, coverage: Coverage, ts: int, extra: Facts | None = None
    ) -> tuple[bytes, Head]:
        return chain.signed_line(
            event_type,
            head=head,
            ts=ts,
            coverage=coverage,
            log_id=self._log_id,
            key_version=self._key.version,
            audit_key=self._key.mac_key,
            signer=self._key.signer,
            extra=extra,
        )

    def _append(self, blob: bytes) -> None:
        """Write `blob` whole, or raise OSError with the file cut back to where it was."""
        self._cut_due = True
        try:
            write_whole(self._fd, blob)
        except OSError:
            with contextlib.suppress(OSError):
                self._cut()
            raise
        self._cut_due = False
        self._size += len(blob)
        self._durability.wrote(len(blob))

    def _follow(self, signed_line: bytes, head: Head) -> None:
        """Go on after a signed line, with which a new coverage begins."""
        self._head = head
        self._coverage = Coverage()
        self._coverage.add(signed_line, 1)

    def checkpoint(self) -> None:
        """Sign the end of the log, if there is anything new to sign for. Raises AuditUnavailableError."""
        if self._coverage.lines_count > 1 or self._head.seq == 1:
            self._sign(record.TYPE_CHECKPOINT, None)

    def change_key(self, key: AuditKey) -> None:
        """End the use of the current audit key with a line that names `key`, which holds from the next line on.

        The keyring must hold both durably before. Returns when the line is on disk; raises AuditUnavailableError.
        """
        extra: Facts = {"next_key": key.version, "next_public_key": base64_text(key.signer.public_key())}
        self._sign(record.TYPE_AUDIT_KEY, extra)
        self._key = key
        self.fdatasync()

    def _sign(self, event_type: str, extra: Facts | None) -> None:
        self.commit()
        ts = self._now_ns()
        try:
            self._repair()
            line, head = self._signed(event_type, self._head, self._coverage, ts, extra)
            self._append(line)
        except OSError as error:
            self._fail(error, 0, ts)
        self._follow(line, head)

    # --- failing and mending -----------------------------------------------------------------------------------------

    def _cut(self) -> None:
        os.ftruncate(self._fd, self._size)
        self._cut_due = False

    def _repair(self) -> None:
        """Undo what a failure left. Raises OSError when it still can't be undone, and then nothing may be written."""
        if self._cut_due:
            self._cut()
        if self._durability.failed:
            raise OSError(errno.EIO, "lines are not confirmed by the disk")

    def _write_on_reserve(self, events: list[Event], ts: int) -> bool:
        """Write on a full disk, on space kept back. Strangers don't get it: only a turn with another event does."""
        if all(event.type == record.TYPE_REFUSED for event in events):
            return False
        if not self._disk_full:
            events = [
                Event(type=record.TYPE_DISK_FULL, actor=ACTOR_SELF, facts={"reserve_bytes": self._reserve.left_bytes}),
                *events,
            ]
        while self._reserve.release():
            try:
                self._repair()
                self._write(events, ts, escaped=True)
            except OSError as error:
                if error.errno in _NO_SPACE:
                    continue
                return False
            self._disk_full = True
            return True
        return False

    def _do_chores(self, ts: int) -> None:
        """What a commit can do without, after one that succeeded; again in a second."""
        self._chores_ns = ts + CHORES_NS
        if not self._reserve.full and self._reserve.fill() and self._disk_full:
            self._disk_full = False
            self.add(Event(type=record.TYPE_DISK_OK, actor=ACTOR_SELF))

    def _fail(self, error: OSError, dropped: int, ts: int) -> NoReturn:
        if self._failure is None:
            self._failure = _Failure(since=ts, reason=_reason(error))
        self._failure.dropped += dropped
        self._dropped_total += dropped
        raise AuditUnavailableError("the audit log can't be written, so nothing is answered") from error

    def _hide_thread_ids(self, events: list[Event]) -> None:
        for event in events:
            if event.thread_id:
                event.thread_id = record.hash_thread_id(event.thread_id, self._key.mac_key)

    # --- waiting for the disk ----------------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether a committed line is not yet known to be on disk."""
        return self._durability.dirty

    @property
    def sync_needed(self) -> bool:
        """Whether `fdatasync` should be called now, by the policy or since it failed the last time."""
        return self._durability.failed or (self._fsync != "never" and self._durability.dirty)

    @property
    def sync_each_turn(self) -> bool:
        """Whether a turn's answers must wait for `fdatasync`."""
        return self._fsync == "turn"

    def fdatasync(self) -> None:
        """Return when every line committed before the call is on disk. For any thread.

        Raises AuditUnavailableError: the log then takes no lines until a later call has succeeded.
        """
        try:
            self._durability.sync()
        except OSError as error:
            raise AuditUnavailableError("the audit log is not confirmed by the disk") from error

    # --- what others want to know ------------------------------------------------------------------------------------

    @property
    def head(self) -> dict[str, str | int]:
        """{"seq": n, "sig": base64}: the last line, as `minikms audit verify --expect-head` takes it
        (`<seq>:<sig>`)."""
        return {"seq": self._head.seq, "sig": base64_text(self._head.sig)}

    @property
    def writable(self) -> bool:
        """Whether the last attempt to write succeeded."""
        return self._failure is None and not self._durability.failed

    def status(self) -> dict[str, object]:
        """For `/status`: the head, whether the log can be written and why not, and how much of it there is."""
        failure = self._failure
        return {
            "head": self.head,
            "writable": self.writable,
            "unavailable_reason": "" if failure is None else failure.reason,
            "unavailable_since": 0 if failure is None else failure.since,
            "events_dropped": self._dropped_total,
            "disk_full": self._disk_full,
            "reserve_bytes": self._reserve.left_bytes,
            "log_id": self._log_id.hex(),
            "audit_key_version": self._key.version,
            "lines_since_checkpoint": self._coverage.lines_count,
            "file_bytes": self._size,
            "fsync": self._fsync,
            "unsynced": self._durability.dirty,
        }

    def close(self) -> None:
        """Write what is queued, sign the end, wait for the disk, close. The keys may be released after it.

        Raises AuditUnavailableError when the end could not be written; the log is closed all the same.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.commit()
            self.checkpoint()
            self.fdatasync()
        finally:
            self._durability.close()


def _resumed_event(failure: _Failure) -> Event:
    facts: Facts = {"dropped": failure.dropped, "reason": failure.reason, "since": failure.since}
    return Event(type=record.TYPE_RESUMED, actor=ACTOR_SELF, facts=facts)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else "the disk failed"
