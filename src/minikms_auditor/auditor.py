"""The auditor: one step after another, from lines to a cosigned tree checkpoint to a reported position.

Owns: the order of a step, which is the order of the rules in `minikms_auditor`, and what stops it. A step reports the
position and learns which line is durable; lets the tree grow; signs its tree checkpoint, has it cosigned and publishes
it. The position is the last line that the published tree and every required sink have. Invariants: whatever stops a
step is in `status` by then; while there is an alarm nothing is signed, so the published tree checkpoint gets old. It
must never forget an alarm before a whole step went well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import msgspec

from minikms.api import AuditPositionAnswer
from minikms.api.errors import ConflictError, InvalidRequestError, KmsError, KmsRefusedError
from minikms.audit.blocks import BLOCKS_NAME, Indexer
from minikms.audit.export import LogRange
from minikms.audit.note import Checkpoint, Note, NoteError, WitnessPolicy, cosigned_at, open_checkpoint
from minikms.audit.record import LineRef
from minikms.audit.tiles import Tiles
from minikms.commands.output import as_json
from minikms_auditor.config import Config
from minikms_auditor.signers import Signers
from minikms_auditor.sinks import Shipper, SinkStatus
from minikms_auditor.store import AuditorStore, Cursor, Witnessed, accepted_keys, published
from minikms_auditor.tail import Grown, LogFaultError, Tail, UnknownLogError
from minikms_auditor.witnesses import Submission, Witnesses
from minikms_tokens import TokenError

REPORT_SECONDS: Final = 5.0
"""At most between two reports, also while the tree grows."""
FAULTS_BEFORE_ALARM: Final = 3
"""A log that is rotated or opened at the moment may look damaged once."""
ALARM_RETRY_SECONDS: Final = 30.0


class Reporter(Protocol):
    """What the auditor needs of `minikms.client.Client`."""

    def report_audit_position(self, *, origin: str, log_id: str, seq: int, mac: bytes) -> AuditPositionAnswer: ...


class WitnessStatus(msgspec.Struct, frozen=True):
    """`cosigned_at`: Unix seconds, 0 for never. `error`: empty if it cosigned the last time."""

    name: str
    url: str
    cosigned_at: int
    error: str


class PendingLog(msgspec.Struct, frozen=True):
    """A log that begins with an unknown public key, in base64."""

    log_id: str
    public_key: bytes


class Status(msgspec.Struct, frozen=True):
    """What `minikms-auditor status` shows. Times are Unix seconds. alarm: why nothing is signed. errors: of the key
    service, a signer, the disk. witnessed_at: when a quorum knew no larger tree than the published one; 0 without it.
    position_seq: the last line under the published tree; the reported position may be lower, that of a required sink.
    indexed_seq: the last line of the index.
    """

    origin: str
    vkeys: tuple[str, ...]
    updated_at: int = 0
    alarm: str = ""
    errors: tuple[str, ...] = ()
    size: int = 0
    published_size: int = 0
    witnessed_at: int = 0
    log_id: str = ""
    position_seq: int = 0
    durable_seq: int = 0
    lag_lines: int = 0
    quorum: int = 0
    witnesses: tuple[WitnessStatus, ...] = ()
    pending: PendingLog | None = None
    sinks: tuple[SinkStatus, ...] = ()
    indexed_seq: int = 0

    @property
    def problems(self) -> list[str]:
        """What is wrong beside the alarm: the errors, the sinks that fail, and a quorum that is out of reach."""
        problems = list(self.errors)
        for sink in self.sinks:
            if sink.error:
                problems.append(f"the sink {sink.name}{', which is required' if sink.required else ''}: {sink.error}")
        answering = [witness for witness in self.witnesses if not witness.error]
        if len(answering) < self.quorum:
            problems.append(f"{len(answering)} witnesses answer, and {self.quorum} have to cosign")
        return problems


class _AlarmError(Exception):
    """Nothing may be signed. The text is for the operator."""


@dataclass(eq=False)
class Auditor:
    """All steps run in one thread. `log` gets an event and a sentence, once for each change."""

    config: Config
    store: AuditorStore
    signers: Signers
    witnesses: Witnesses
    kms: Reporter
    log: Callable[[str, str], None]
    sinks: Sequence[Shipper] = ()
    stopping: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self._tail: Tail | None = None
        self._indexer = Indexer(os.path.join(self.config.state_dir, BLOCKS_NAME), self.config.log_dir)
        self.check_index = False
        """Set by another thread that has found lines without an index: once it is whole, it is looked at again."""
        self._faults = 0
        self._alarm = ""
        self._look_again_s = 0.0
        self._pending: PendingLog | None = None
        self._errors: dict[str, str] = {}
        self._confirmed = False
        """Whether a quorum has cosigned the state's tree since the start."""
        self._note: Note | None = None
        """The signed tree checkpoint of the state's tree."""
        self._durable = LineRef(0, b"")
        self._log_id = ""
        self._reported_s = 0.0
        self._witnessed_at = 0
        self._submitted_s = float("-inf")
        self._recall_published()
        for client in self.witnesses.clients:
            client.known_size = 0 if self.store.state.witnessed is None else self.store.state.witnessed.size

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Do what there is to do."""
        if self._alarm and time.monotonic() < self._look_again_s:
            self._report()
            self._show()
            return
        try:
            whole = self._act()
        except _AlarmError as error:
            self._stop(str(error), ALARM_RETRY_SECONDS)
        except UnknownLogError as error:
            self._pending = PendingLog(error.log_id, error.public_key)
            self._stop(str(error), 0.0)  # `accept-log` takes effect in the next step
        except (KmsRefusedError, OSError) as error:
            self._note_error("disk", str(getattr(error, "strerror", None) or error))
        except TokenError as error:
            self._note_error("signer", str(error))
        else:
            self._note_error("disk", "")
            self._note_error("signer", "")
            if whole and self._alarm:
                self.log("alarm ended", self._alarm)
                self._alarm, self._pending = "", None
        self._show()

    def _act(self) -> bool:
        """Whether it was a whole step: the log was looked at, and a quorum has cosigned since the start."""
        answered = self._report()
        self._heed(self.witnesses.collect().alarm)  # of one that answered late
        if not self._confirmed:
            self._confirm()
        whole = self._confirmed and answered and self._grow()
        if self._confirmed and self._is_due() and (whole or not self._alarm):
            self._submit()
            self._report()
        if whole:
            self._index()
        self.store.archive()
        return whole

    def _stop(self, why: str, pause_s: float) -> None:
        self._close_tail()
        if why != self._alarm:
            self.log("alarm", why)
        self._alarm, self._look_again_s = why, time.monotonic() + pause_s

    def _note_error(self, what: str, text: str) -> None:
        if text and self._errors.get(what) != text:
            self.log(f"{what} failed", text)
        self._errors[what] = text

    # --- the key service ----------------------------------------------------------------------------------------------

    def _report(self) -> bool:
        """Report the position. Whether the answer says which line of which log is durable."""
        self._reported_s = time.monotonic()
        try:
            answer = self._ask(self._taken())
        except KmsError as error:
            self._note_error("key service", str(error))
            return False
        self._note_error("key service", "")
        if answer.log_id:
            self._log_id = answer.log_id
            self._durable = LineRef(answer.durable.seq, answer.durable.mac)
        return bool(answer.log_id) and answer.durable.seq > 0

    def _taken(self) -> Cursor | None:
        """The last line that both the published tree and every required sink have; None if there is none."""
        witnessed = self.store.state.witnessed
        if witnessed is None:
            return None
        line = witnessed.line
        lowest = Cursor(1, line.log_id, line.seq, line.sig)
        for sink in self.sinks:
            if sink.required:
                cursor = sink.cursor
                if cursor is None or cursor.log_id != lowest.log_id or not cursor.sig:
                    return None
                lowest = min(lowest, cursor, key=lambda each: each.seq)
        return lowest

    def _ask(self, line: Cursor | None) -> AuditPositionAnswer:
        report = partial(self.kms.report_audit_position, origin=self.config.origin)
        if line is not None:
            try:
                return report(log_id=line.log_id, seq=line.seq, mac=line.sig)
            except (ConflictError, InvalidRequestError):  # the log is another one: `Tail` finds out why
                pass
        return report(log_id="", seq=0, mac=b"")

    # --- the log ------------------------------------------------------------------------------------------------------

    def _grow(self) -> bool:
        """Take every line up to the durable one that may enter the tree. False if not all could be read."""
        while not self.stopping():
            try:
                grown = self._opened_tail().read(self._durable)
            except UnknownLogError:
                raise
            except LogFaultError as error:
                self._close_tail()
                self._faults += 1
                if self._faults >= FAULTS_BEFORE_ALARM:
                    raise _AlarmError(str(error)) from None
                return False
            except OSError as error:
                self._close_tail()
                raise OSError(f"the log can't be read: {error.strerror}") from error
            self._faults = 0
            if grown is None:
                return True
            self._commit(grown)
            if time.monotonic() - self._reported_s > REPORT_SECONDS:
                self._report()
                self._show()
        return False

    def _opened_tail(self) -> Tail:
        """The reader of the daemon's log. Raises OSError, TilesError."""
        tail, line = self._tail, self.store.state.line
        # A daemon that calls fewer lines durable than it did may have an older copy of the log.
        if tail is not None and tail.log_id == self._log_id and tail.seq <= self._durable.seq:
            return tail
        self._close_tail()
        directory = self.config.log_dir
        if line is not None and line.log_id == self._log_id:
            leaf = self.store.edge.last_leaf(self.store.read)
            tail = Tail(directory, self._log_id, line=line, leaf=leaf)
        elif any(log.log_id == self._log_id for log in self.store.state.logs):
            raise LogFaultError(f"the log {self._log_id} is an earlier one of the tree: an older copy was put back")
        else:
            trusted = {*self.config.trusted_keys, *self.store.state.keys, *accepted_keys(self.config.state_dir)}
            tail = Tail(directory, self._log_id, line=None, trusted=trusted, may_be_cut=line is None)
        self._tail = tail
        return tail

    def _close_tail(self) -> None:
        if self._tail is not None:
            self._tail.close()
            self._tail = None

    def _commit(self, grown: Grown) -> None:
        state, edge = self.store.state, self.store.edge.copy()
        logs = state.logs
        if not logs or logs[-1].log_id != grown.line.log_id:
            logs = (*logs, LogRange(grown.line.log_id, state.size, grown.first_seq))
            self._indexer.reset()
        for leaf in grown.leaves:
            edge.append(leaf)
        keys = tuple(dict.fromkeys((*state.keys, *grown.keys)))
        grown_state = msgspec.structs.replace(
            state, size=edge.size, root=edge.root(), logs=logs, line=grown.line, keys=keys
        )
        try:
            self.store.commit(edge, grown_state)
        except BaseException:
            self._close_tail()  # its leaves are read again
            raise
        self._note = None
        self.store.archive()

    def _index(self) -> None:
        """Without an index `minikms audit find` reads the log, so a failure stops nothing."""
        line = self.store.state.line
        try:
            if self.check_index and self._indexer.idle:
                self._indexer.reset()
                self.check_index = False
            if line is not None and line.log_id == self._log_id:
                self._indexer.grow(line.seq)
        except (KmsRefusedError, OSError) as error:
            self._indexer.reset()
            self._note_error("index", str(getattr(error, "strerror", None) or error))
        else:
            self._note_error("index", "")

    # --- signatures ---------------------------------------------------------------------------------------------------

    def _confirm(self) -> None:
        """After a start: nothing may be added before a quorum has cosigned the tree as it is."""
        if self.store.state.size == 0 or not self.witnesses.clients:
            self._confirmed = True
        else:
            self._submit()

    def _is_due(self) -> bool:
        state = self.store.state
        if state.size == 0:
            return False
        if state.witnessed is None or state.witnessed.size != state.size:
            return True
        due_s = self._submitted_s + self.config.resubmit_seconds
        return bool(self.witnesses.clients) and time.monotonic() >= due_s

    def _submit(self) -> None:
        """Sign the tree checkpoint, have it cosigned, and publish it with its quorum. Raises _AlarmError, TokenError,
        StorageUnavailableError.
        """
        state = self.store.state
        if state.line is None or not self.witnesses.may_reach(self.config.quorum):
            return
        if self._note is None:
            text = Checkpoint(self.config.origin, state.size, state.root).text()
            self._note = Note(text, self.signers.sign(text))
        node = Tiles(self.store.read, state.size).node
        answers = self.witnesses.submit(Submission(self._note, state.size, node), self.config.quorum)
        self._heed(answers.alarm)
        self._note = self._note.with_signatures(answers.signatures)
        times = sorted((cosigned_at(each) or 0 for each in answers.signatures), reverse=True)
        quorum = self.config.quorum
        if len(times) < quorum:
            return
        self.store.publish(self._note.encode(), Witnessed(state.size, state.line))
        self._confirmed = True
        self._submitted_s = time.monotonic()
        self._witnessed_at = times[quorum - 1] if quorum else 0

    def _heed(self, alarm: str) -> None:
        """Ends the step if a witness gave an alarm."""
        if alarm:
            self._confirmed = False
            raise _AlarmError(alarm)

    def _recall_published(self) -> None:
        """The times of the tree checkpoint that was published before the start."""
        content = published(self.config.state_dir)
        keys = tuple(client.key for client in self.witnesses.clients)
        if content is None:
            return
        try:
            opened = open_checkpoint(content, WitnessPolicy(self.signers.verifiers, keys, self.config.quorum))
        except NoteError:  # other signers or witnesses since
            return
        self._witnessed_at = opened.quorum_time(self.config.quorum) or 0

    # --- status -------------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        state = self.store.state
        witnessed = state.witnessed
        same_log = witnessed is not None and witnessed.line.log_id == self._log_id
        position = witnessed.line.seq if witnessed is not None and (same_log or not self._log_id) else 0
        return Status(
            origin=self.config.origin,
            vkeys=tuple(key.text() for key in self.signers.verifiers),
            updated_at=int(time.time()),
            alarm=self._alarm,
            errors=tuple(f"{what}: {text}" for what, text in self._errors.items() if text),
            size=state.size,
            published_size=0 if witnessed is None else witnessed.size,
            witnessed_at=self._witnessed_at,
            log_id=self._log_id,
            position_seq=position,
            durable_seq=self._durable.seq,
            lag_lines=max(0, self._durable.seq - position),
            quorum=self.config.quorum,
            witnesses=tuple(
                WitnessStatus(client.key.name, client.url, client.cosigned_at, client.error)
                for client in self.witnesses.clients
            ),
            pending=self._pending,
            sinks=tuple(sink.status() for sink in self.sinks),
            indexed_seq=self._indexer.seq,
        )

    def _show(self) -> None:
        try:
            self.store.show(as_json(self.status()).encode())  # ASCII: a terminal shows it as it is
        except KmsRefusedError as error:
            self._note_error("status.json", str(error))
        else:
            self._note_error("status.json", "")

    def close(self) -> None:
        self._close_tail()
        self._indexer.close()
