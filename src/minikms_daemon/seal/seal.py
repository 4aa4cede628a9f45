"""The server of the process: which application it has, and what each move of `minikms_daemon.seal.state` takes.

Owns: the HTTP server; the parts of an unsealed daemon; the order of steps.
- Seal: zero every key, replace the application, drop ciphers, all in one step of the event loop and without a wait for
  a disk; then write the marker, answer, and close the files in the background. Requests that were in flight are
  answered with 503 `sealed`; what they wrote stays. A rotation is interrupted as by a crash, and the audit log ends as
  after one. A lease of the root key that has ended does the same, without a marker.
- Unseal, after `minikms_daemon.seal.unseal` has recorded the attempt: open the data directory with the given root key,
  write the audit lines about the seal, the attempts and the unseal, remove the files of the seal, replace the
  application, answer.

Invariants: a marker that can't be written does not unseal anything; an unseal that fails at any step leaves no key in
memory, and the daemon sealed; a seal during an unseal wins, but waits while the loop opens the data directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from msgspec import UNSET

from minikms import api
from minikms import seal_files as files
from minikms.api.errors import (
    AuditUnavailableError,
    KmsRefusedError,
    NotSealedError,
    SealedError,
    StartError,
    StorageUnavailableError,
)
from minikms.audit import Event
from minikms.audit.record import ACTOR_SELF, TYPE_REFUSED
from minikms.crypto.aead import scrub
from minikms.custody import replica_file
from minikms.datadir import read_keyring
from minikms.http import Application, HttpServer, Limits
from minikms.keys import keyring
from minikms.platform import clock
from minikms.platform.workers import in_worker
from minikms.policy.principal import Principal
from minikms.roots.providers import UNLOCK, GivenKey, RootProvider
from minikms.seal_files import Attempt, Lapse, LeaseEnd, Marker
from minikms_daemon.seal.application import SealedApplication, sealed_response
from minikms_daemon.seal.no_unlocking import NoUnlocking
from minikms_daemon.seal.opening import Opener
from minikms_daemon.seal.state import SealMove, SealPhase, SealState
from minikms_daemon.seal.unseal import Unsealing
from minikms_daemon.server.admission import Admission, Session
from minikms_daemon.server.no_member import NoMember
from minikms_daemon.server.parts import Parts
from minikms_daemon.server.run_context import RunContext
from minikms_daemon.server.status import sealed_status
from minikms_daemon.service.encoding import Reply, json_answer

if TYPE_CHECKING:
    from minikms_daemon.seal.unlocking import Unlocking

MARKER_RETRY_SECONDS: Final = 5.0
AUDIT_RETRY_SECONDS: Final = 1.0
OWED_LINES_MAX: Final = 64

_NOT_DURABLE: Final = (
    "the key service is sealed, but this could not be written to its data directory, so a restart would not stay "
    "sealed: free space there. The daemon tries again by itself; repeat the request to see whether it is written"
)


NEEDS_ROOT: Final = (
    "a root key was removed, and the keyring of the other hosts needs the root key of this host again: unseal it, "
    "unless it is this host that was removed"
)


class Chores(Protocol):
    """The background work of an unsealed daemon."""

    def start(self, parts: Parts) -> None: ...

    def cancel(self) -> None:
        """Nothing of it runs from now on."""


class OwnLines:
    """What the daemon did by itself, without a line yet. `parts`: those that serve. Of more than OWED_LINES_MAX lines
    the older ones become one line with their `count`.
    """

    def __init__(self, parts: Callable[[], Parts | None]) -> None:
        self._parts = parts
        self._owed: list[Event] = []
        self._writing: asyncio.Task[None] | None = None

    def add(self, event: Event) -> None:
        """Queues a line. It is written as soon as the log can be written; while the daemon is sealed, at the unseal."""
        if len(self._owed) == OWED_LINES_MAX:  # the first may be on its way to the disk
            merged = self._owed.pop(1)
            newer = self._owed[1]
            newer.count = max(newer.count, 1) + max(merged.count, 1)
        self._owed.append(event)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.ensure_future(self._write())

    def take(self) -> list[Event]:
        """All lines, which the caller writes."""
        events, self._owed = self._owed, []
        return events

    def cancel(self) -> None:
        """None is written any more but by the caller of `take`."""
        if self._writing is not None:
            self._writing.cancel()

    async def _write(self) -> None:
        while self._owed and (parts := self._parts()) is not None:
            event = self._owed[0]
            try:
                await parts.audit.add_written(event, durable=True)
            except AuditUnavailableError:
                await asyncio.sleep(AUDIT_RETRY_SECONDS)
                continue
            except SealedError:
                return  # the unseal writes them
            if self._owed and self._owed[0] is event:
                del self._owed[0]


class SealableServer:
    """The server of one process, sealed or unsealed. Made and used in the loop's thread; see `start`."""

    server: HttpServer[Session]

    def __init__(self, process: RunContext, chores: Chores) -> None:
        self._process = process
        self._chores = chores
        self._state = SealState()
        self._admission = Admission(
            process.policy.policy, connections_max=process.connections_max, report=lambda event: None
        )
        lapse = files.read_lapse(process.lock.directory_fd)
        self._lapsed = [] if lapse is None else [lapse.event()]
        """The line about the end of a lease, until the audit log has it."""
        self._writing_lapse: asyncio.Task[None] | None = None
        self._unlocking = self._found_unlocking()
        self._replica = self._found_replica()
        self._opener = Opener(process, self._admission, self.seal, self._unlocking, self._replica)
        self._reopening: asyncio.Task[None] | None = None
        self.unsealing = Unsealing(
            process, self._state, self._opener, files_closed=self.files_closed, open_and_serve=self.open_and_serve
        )
        self._sealed_app = SealedApplication(
            admission=self._admission,
            meters=process.policy.meters,
            arena=process.arena,
            unsealing=self.unsealing,
            seal=self.seal,
            why=self._unlocking.why_sealed,
            status=self.status,
            report_audit_position=self.report_audit_position,
            more=self._replica.sealed_acts(),
        )
        self._lines = OwnLines(lambda: self.parts)
        self.audit = self._lines.add
        self._start_line_written = False
        self._opened: Parts | None = None
        """The open data directory, also while an unseal goes on."""
        self._closing: asyncio.Task[None] | None = None
        self._writing_marker: asyncio.Task[None] | None = None
        self._refusals: list[Event] = []
        """While the daemon is sealed. Bounded: the windows of the aggregators end at the unseal."""

    def _found_unlocking(self) -> Unlocking | NoUnlocking:
        if self._process.settings.root.name != UNLOCK:
            return NoUnlocking()
        from minikms_daemon.seal.unlocking import Unlocking  # loaded before the hardening: `serve.load_configured`

        return Unlocking(
            self._process,
            unseal=self.unseal_by_itself,
            lapse=self.lapse,
            body=lambda: None if self.parts is None else self.parts.vault.keyring.body,
        )

    def _found_replica(self) -> NoMember:
        process = self._process
        stored = replica_file.read(process.lock.directory_fd)
        if stored is None:
            return NoMember()
        from minikms_daemon.replica.member import ReplicaMember  # loaded before the hardening: `serve.load_configured`

        keyring_id = ""
        with contextlib.suppress(StartError):  # then the directory can't be opened, which says why
            keyring_id = keyring.parse_file(read_keyring(process.lock.directory))[0].keyring_id
        marker = files.read_marker(process.lock.directory_fd)
        sealed_as = 0 if marker is None or marker.seals is UNSET else marker.seals
        return ReplicaMember(self, process, stored.mark, keyring_id=keyring_id, sealed_as=sealed_as)

    async def start(self) -> None:
        """Opens the data directory and writes the first audit line, unless the start is sealed. Raises StartError."""
        process = self._process
        marker = files.read_marker(process.lock.directory_fd)
        serves = marker is None and not process.settings.flags.sealed
        if serves and not self._unlocking.asks:
            parts = self._opened = self._opener.open(process.settings.root)
            # of a sealed run whose flag or source this start does not have
            events = [*self._lapsed, *self.unsealing.attempts.records.events()]
            await parts.begin([*self._first_lines(parts), *events])
            if events:
                await self._remove_records()
            self._replica.opened(parts)
            await parts.go_on()
            self._start_line_written = True
            self._state.move(SealMove.START)
            self._admission.report = parts.audit.add
            self._serve(parts.served)
            parts.serve_on(self.server)
            return
        body = keyring.parse_file(read_keyring(process.lock.directory))[0]
        log_dir = process.settings.opening.audit_dir or process.lock.directory
        audit = body.audit_of(replica_file.member_id(process.lock.directory))
        self._opener.auditor.begin_sealed(log_dir, public_key=audit.current.public_key, origin=audit.audit_origin)
        self._state.start_sealed(marker, clock.rfc3339(self._opener.started_ns))
        self._admission.report = self._keep_refusal
        self._serve(self._sealed_app)
        if serves:
            self._unlocking.wait()

    async def _remove_records(self) -> None:
        """After their lines were written. If they stay, the next start repeats the lines."""
        try:
            await self._remove_seal_files()
        except StorageUnavailableError as error:
            self._process.log.warning("records of a sealed run stay", why=str(error))

    def _keep_refusal(self, event: Event) -> None:
        if event.type == TYPE_REFUSED:
            self._refusals.append(event)

    @property
    def parts(self) -> Parts | None:
        """None while the daemon is sealed."""
        return self._opened if self._state.state is SealPhase.SERVING else None

    @property
    def summary(self) -> str:
        """One line for the service manager."""
        state = "sealed" if self.is_sealed else "serving" if self._replica.serves else "standing by"
        return f"{state} on {self._process.settings.flags.socket}"

    @property
    def is_sealed(self) -> bool:
        return self._state.is_sealed

    def end_steps(self) -> None:
        """Drops the ciphers that tasks have used in a turn, and overwrites registers and stack: see `aead.scrub`. Most
        turns of a task that waits for the disk used no key.
        """
        if not self._process.arena.take_used():
            return
        if self._opened is not None:
            self._opened.vault.record_keys.drop_ciphers()
        scrub()

    def stop_waiting(self) -> None:
        """The stop begins: a daemon that waits for its root key waits no longer, and a member serves no more."""
        self._unlocking.stop_waiting()
        self._replica.stand_by("the daemon stops")

    async def close(self, why: str) -> None:
        """The last line, where there is an audit key; then closes everything. `why` is empty after a failed start.

        Raises AuditUnavailableError when the end of the log could not be written; everything is closed all the same.
        """
        self._lines.cancel()
        self._unlocking.stop()
        for task in (self._writing_marker, self._reopening):
            if task is not None:
                task.cancel()
        await self._replica.settled()
        async with self.unsealing.one_attempt:  # an attempt that runs has ended
            await self.files_closed()
            parts, self._opened = self._opened, None
        owed = self._lines.take()
        if parts is None:
            if owed:
                self._process.log.warning("not audited, because the daemon is sealed", lines=len(owed))
            return
        try:
            for event in (*owed, *self._admission.refusals_so_far()):
                parts.audit.add(event)
            if why:
                await parts.end(why)
        except KmsRefusedError as error:
            self._process.log.warning("stop not audited", why=str(error))
        finally:
            await parts.close()

    # --- seal --------------------------------------------------------------------------------------------------------

    def seal(self, who: Principal) -> Awaitable[Reply]:
        """Zeroes every key now, and what was given for an unseal. The awaitable answers once the marker is on disk."""
        self._seal(Marker.of(who, self._replica.ask_seal()))
        return self._answer_seal()

    def _seal(self, marker: Marker) -> None:
        self._process.arena.zero_all()  # also a root key and shares that were given
        self.unsealing.forget_keys()
        self._unlocking.stop()
        served = not self.is_sealed
        self._state.seal(marker)
        self._stop_serving(served, by=marker.actor)

    def seal_for_all(self) -> None:
        """Another host was sealed with all others: as `seal`, and the marker is written in the background."""
        self._seal(Marker.of_another())
        self._begin_writing_marker()

    def open_again(self, later: bytes) -> None:
        """The database has a keyring that only a root key opens: closes the data directory, and opens it with the
        daemon's own root key. Without one it stays sealed until an unseal.
        """
        if self._state.state is not SealPhase.SERVING:
            return
        self._opener.later_keyring = later
        self._process.arena.zero_all()
        self.unsealing.forget_keys()
        self._unlocking.stop()
        self._state.lapse(clock.now_rfc3339())
        self._stop_serving(True, by=ACTOR_SELF, why=NEEDS_ROOT)
        if self._unlocking.asks:
            self._unlocking.wait()
        elif self._opener.source_is_readable:
            self._reopening = asyncio.ensure_future(self._open_again())

    async def _open_again(self) -> None:
        try:
            await self.unseal_by_itself(self._process.settings.root)
        except (KmsRefusedError, OSError) as error:
            self._process.log.warning("not opened again", why=str(error))

    def lapse(self, how: LeaseEnd, why: str) -> Application[Session]:
        """The lease of the root key was refused or has ended: zeroes every key now, unless that is done. Returns the
        application that serves from then on.
        """
        if self._state.state is SealPhase.SERVING:
            self._process.arena.zero_all()
            self.unsealing.forget_keys()
            lapse = Lapse.now(how)
            self._state.lapse(lapse.at)
            self._lapsed = [lapse.event(why)]
            self._writing_lapse = asyncio.ensure_future(self._write_lapse(lapse))
            self._unlocking.wait()
            self._stop_serving(True, by=ACTOR_SELF, lease=how, why=why)
        return self._sealed_app

    async def _write_lapse(self, lapse: Lapse) -> None:
        """Writes the lapse, in the worker that removes it after the unseal."""
        process = self._process
        try:
            await in_worker(process.workers.seal, partial(files.write_lapse, process.lock.directory_fd, lapse))
        except StorageUnavailableError as error:
            process.log.warning("a stop before the unseal leaves no audit line of the lease's end", why=str(error))

    def _stop_serving(self, served: bool, **members: str) -> None:
        """After the keys were zeroed. `served`: before that. `members`: of the log's line."""
        parts, self._opened = self._opened, None
        if served:
            self._refusals = []
            instead = sealed_response(self._unlocking.why_sealed(False))
            self.server.replace_app(self._sealed_app, instead, self._replica.asking)
            self._admission.report = self._keep_refusal
            self.unsealing.attempts.forget()
            self._process.notifier.status(self.summary)
        if parts is not None:
            try:
                self._chores.cancel()
                self._replica.sealed(members.get("why", ""))
                parts.seal()
            finally:
                self._opener.auditor.seal()
                self._abandon(parts)
            self._process.log.warning("sealed", **members)

    async def _answer_seal(self) -> Reply:
        state = self._state
        if not state.is_sealed:
            raise NotSealedError("the key service was unsealed meanwhile")
        marker = state.marker
        if not state.is_marked:
            try:
                await self._write_marker(marker)
            except StorageUnavailableError:
                self._begin_writing_marker()
                raise StorageUnavailableError(_NOT_DURABLE) from None
        await self._replica.check_seal_known()
        return json_answer(api.SealAnswer(sealed=True, since=marker.at))

    async def _write_marker(self, marker: Marker) -> None:
        process = self._process
        await in_worker(process.workers.seal, partial(files.write_marker, process.lock.directory_fd, marker))
        self._state.written(marker)

    def _begin_writing_marker(self) -> None:
        if self._writing_marker is None or self._writing_marker.done():
            self._writing_marker = asyncio.ensure_future(self._write_marker_until_done())

    async def _write_marker_until_done(self) -> None:
        while self._state.state is SealPhase.OWED:
            with contextlib.suppress(StorageUnavailableError):
                await self._write_marker(self._state.marker)
                continue
            await asyncio.sleep(MARKER_RETRY_SECONDS)

    def _abandon(self, parts: Parts) -> None:
        """Closes the files in the background, as after a crash."""
        self._opener.interrupted(parts)
        self._closing = asyncio.ensure_future(self._close_files(parts, self._closing))

    async def _close_files(self, parts: Parts, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        try:
            await parts.abandon()
        except Exception as error:  # noqa: BLE001  whatever fails here, the keys are zeroed and an unseal opens anew
            self._process.on_internal_error(f"{type(error).__name__} while the files of a sealed daemon were closed")

    async def files_closed(self) -> None:
        """Returns when the files of the former unsealed time are closed."""
        if self._closing is not None:
            await asyncio.wait([self._closing])
            self._closing = None

    # --- unseal ------------------------------------------------------------------------------------------------------

    async def unseal_by_itself(self, root: RootProvider) -> None:
        """With a root key that the daemon has by itself, unless it was sealed or unsealed meanwhile. No caller has
        tried that, so it is not recorded. Raises as `open_and_serve`.
        """
        async with self.unsealing.one_attempt:
            await self.files_closed()
            if self._state.state is SealPhase.FLAGGED:
                await self.open_and_serve(Attempt.by_itself(), root, self._state.seals)

    async def open_and_serve(self, attempt: Attempt, root: RootProvider, seals: int) -> None:
        """Opens the data directory and serves. Raises UnknownRootError, other KmsRefusedErrors, OSError; no key is left
        then.
        """
        state = self._state
        asked_ns = (root.asked_ns if isinstance(root, GivenKey) else None) or clock.boot_ns()
        self._process.notifier.watchdog()  # so that the manager's whole time-out is left
        parts = self._opener.open(root)
        state.move(SealMove.OPEN)
        self._opened = parts
        if self._writing_marker is not None:  # what it has begun ends before the marker is removed, in the same worker
            self._writing_marker.cancel()
            self._writing_marker = None
        try:
            await parts.begin(self._lines_of_unseal(parts, attempt))
            state.check_no_seal_since(seals)
            await self._replica.note_seals(parts)
            state.check_no_seal_since(seals)
            state.move(SealMove.REMOVE)
            await self._remove_seal_files()
            state.check_no_seal_since(seals)
        except BaseException:
            if self._opened is parts:  # otherwise a seal has abandoned them
                state.move(SealMove.FAIL)
                self._opened = None
                parts.seal()
                self._abandon(parts)
                if state.state is SealPhase.OWED:
                    self._begin_writing_marker()
            raise
        state.move(SealMove.SERVE)
        self._replica.opened(parts)
        self.unsealing.forget_keys()
        self._start_line_written = True
        self._lapsed = []
        self._unlocking.served(asked_ns)
        self.unsealing.attempts.forget()
        self._admission.report = parts.audit.add
        for event in (*self._lines.take(), *self._refusals, *self._admission.refusals_so_far()):
            parts.audit.add(event)
        self.server.replace_app(parts.served, None)
        parts.serve_on(self.server)
        self._chores.start(parts)
        self._process.notifier.status(self.summary)
        self._process.log.warning("unsealed", by=attempt.actor)
        await parts.go_on()

    async def _remove_seal_files(self) -> None:
        process = self._process
        await in_worker(process.workers.seal, partial(files.remove_seal_files, process.lock.directory_fd))

    def _lines_of_unseal(self, parts: Parts, attempt: Attempt) -> list[Event]:
        events = [] if self._start_line_written else self._first_lines(parts)
        events += self._lapsed
        if not self._state.is_flagged:
            marker = self._state.marker
            detail = "" if marker.at else "the marker could not be read"
            facts: dict[str, str | int] = {"at": marker.at, "restart_stays_sealed": int(self._state.is_marked)}
            events.append(
                Event(type=api.SEAL.name, actor=marker.actor or "minikms", pid=marker.pid, detail=detail, facts=facts)
            )
        facts = {**parts.epoch_facts(), "attempt": attempt.attempt, "kind": attempt.kind}
        if attempt.share:
            facts["share"] = attempt.share
        unsealed = Event(type=api.UNSEAL.name, actor=attempt.actor, pid=attempt.pid, facts=facts)
        return [*events, *self.unsealing.attempts.records.events(but=attempt), unsealed]

    def _first_lines(self, parts: Parts) -> list[Event]:
        facts = parts.epoch_facts() | self._process.policy.facts()
        return [Event(type="start", actor="minikms", pid=os.getpid(), facts=facts)]

    # --- the server --------------------------------------------------------------------------------------------------

    def _serve(self, app: Application[Session]) -> None:
        self.server = HttpServer(
            app,
            loop=asyncio.get_running_loop(),
            on_internal_error=self._process.on_internal_error,
            limits=Limits(connections_max=self._process.connections_max),
        )

    async def report_audit_position(self, report: api.ReportAuditPositionRequest) -> Reply:
        """Takes a report while the daemon is sealed. Raises SealedError."""
        return json_answer(await self._opener.auditor.report_sealed(report, self._process.workers.lookup))

    def status(self) -> dict[str, object]:
        """`/status` of the sealed daemon."""
        sealed_at_start = self._state.is_marked or self._state.is_flagged or self._process.settings.flags.sealed
        return sealed_status(
            self._process,
            server=self.server,
            started_ns=self._opener.started_ns,
            reason=self._unlocking.why_sealed(True),
            warning="" if sealed_at_start else _NOT_DURABLE,
            lease=self._unlocking.status(),
            replica=self._replica,
        )
