"""Seal and unseal: which application the server has, and what a change from one to the other takes.

Owns: the HTTP server of the process; the parts of an unsealed daemon, or the state of a sealed one; the order of steps.
- Seal: zero every key, replace the application, drop ciphers, all in one step of the event loop and without a wait for
  a disk; then write the marker, answer, and close the files in the background. Requests that were in flight are
  answered with 503 `sealed`; what they wrote stays. A rotation is interrupted as by a crash, and the audit log ends as
  after one.
- Unseal: record the attempt, open the data directory with the given root key, write the audit lines about the seal, the
  attempts and the unseal, remove the files of the seal, replace the application, answer.

Invariants: between a seal and the end of an unseal no verb is served; a marker that can't be written does not unseal
anything; an unseal that fails at any step leaves no key in memory, and the daemon sealed; one attempt at a time; a seal
during an unseal wins, but waits while the loop opens the data directory. It must never keep a root key.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Protocol

from minikms import api
from minikms.api.errors import (
    AuditUnavailableError,
    ConflictError,
    InvalidRequestError,
    KmsRefusedError,
    NotSealedError,
    SealedError,
    StartError,
    StorageUnavailableError,
    TooManyAttemptsError,
    UnknownRootError,
    UnsealFailedError,
    WrongRootError,
    WrongShareError,
)
from minikms.audit import Event
from minikms.audit.position import AuditorPosition, LogView, mac_of, view_on_disk
from minikms.audit.record import TYPE_REFUSED, Head
from minikms.crypto.aead import scrub
from minikms.crypto.shares import ShareInfo
from minikms.daemon import seal_files
from minikms.daemon.admission import Admission, Session
from minikms.daemon.keybody import SecretText
from minikms.daemon.parts import Parts, Workers
from minikms.daemon.policy_file import PolicyInForce
from minikms.daemon.seal_files import Attempt, AttemptRecords, Kind, Marker, Outcome, SlowDown
from minikms.daemon.sealed import SEALED_TEXT, SealedApplication, sealed_response
from minikms.daemon.settings import Settings
from minikms.daemon.status import sealed_status
from minikms.datadir import open_for_service, read_keyring
from minikms.http import Application, HttpServer, Limits
from minikms.keys import keyring
from minikms.keys.collected_shares import COLLECT_SECONDS_MAX, CollectedShares
from minikms.keys.keyring import ShareSet
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.memory.process import Measure
from minikms.platform import clock
from minikms.platform.directory_lock import DataDirLock
from minikms.platform.logs import structlog
from minikms.platform.notify import Notifier
from minikms.policy import Principal
from minikms.roots.providers import GivenKey, RootProvider
from minikms.service.access import renewed
from minikms.service.encoding import Reply, json_answer

MARKER_RETRY_SECONDS: Final = 5.0
AUDIT_RETRY_SECONDS: Final = 1.0
OWED_LINES_MAX: Final = 64

_NOT_DURABLE: Final = (
    "the key service is sealed, but this could not be written to its data directory, so a restart would not stay "
    "sealed: free space there. The daemon tries again by itself; repeat the request to see whether it is written"
)


class Chores(Protocol):
    """The background work of an unsealed daemon."""

    def start(self, parts: Parts) -> None: ...

    def cancel(self) -> None:
        """Nothing of it runs from now on."""


class _Sealed:
    """The state of a sealed daemon."""

    def __init__(self, marker: Marker, *, durable: bool, asked: bool) -> None:
        self.marker = marker
        self.durable = durable
        """The marker is on disk."""
        self.asked = asked
        """A request sealed the daemon; otherwise a flag of the start did."""
        self.refusals: list[Event] = []

    def report(self, event: Event) -> None:
        """Bounded: the windows of the aggregator end at the unseal."""
        if event.type == TYPE_REFUSED:
            self.refusals.append(event)


class RunContext(NamedTuple):
    """What all parts of one process share."""

    settings: Settings
    policy: PolicyInForce
    lock: DataDirLock
    arena: SecretArena
    measures: tuple[Measure, ...]
    connections_max: int
    workers: Workers
    notifier: Notifier
    log: structlog.stdlib.BoundLogger
    on_internal_error: Callable[[str], None]


class Sealing:
    """The server of one process, sealed or unsealed. Made and used in the loop's thread; see `start`."""

    server: HttpServer[Session]

    def __init__(self, process: RunContext, chores: Chores) -> None:
        self._process = process
        self._chores = chores
        self._directory = process.lock.directory_fd
        self._admission = Admission(
            process.policy.policy, connections_max=process.connections_max, report=lambda event: None
        )
        self._sealed_app = SealedApplication(
            self, admission=self._admission, meters=process.policy.meters, arena=process.arena
        )
        self._started_ns = time.time_ns()
        self._start_line_written = False
        self._opened_before = False
        self._source_read = False
        self._source_slot_id = ""
        """The slot whose root key the daemon's own source held when it was last read or rewritten; empty: not known."""
        self._seals = 0
        """The number of requests to seal. A newer request ends an unseal that is running."""
        self._expected_head: Head | None = None
        """The last line of the audit log at the last seal: the log must have it at the unseal."""
        self._owed: list[Event] = []
        """What the daemon did by itself, without a line yet. Of more than OWED_LINES_MAX the older ones become one line
        with their `count`.
        """
        self._writing_owed: asyncio.Task[None] | None = None
        self._sealed: _Sealed | None = None
        self._parts: Parts | None = None
        self._opening: Parts | None = None
        self._closing: asyncio.Task[None] | None = None
        self._writing_marker: asyncio.Task[None] | None = None
        self._one_attempt = asyncio.Lock()
        self._attempts = AttemptRecords([], 0)
        self._slow_down = SlowDown()
        self._shares = CollectedShares(process.arena)
        self._position = AuditorPosition()
        self._log_view: LogView | None = None
        """Of the audit log while the daemon is sealed."""

    async def start(self) -> None:
        """Opens the data directory and writes the first audit line, unless the start is sealed. Raises StartError."""
        process = self._process
        marker = seal_files.read_marker(self._directory)
        self._attempts = AttemptRecords.load(self._directory)
        self._slow_down.seed(self._attempts, time.monotonic())
        if marker is None and not process.settings.sealed:
            parts = self._open(process.settings.root)
            try:
                attempts = self._attempts.events()  # of a sealed run whose flag this start does not have
                await parts.begin([*self._first_lines(parts), *attempts])
                if attempts:
                    await self._remove_attempts()
                await parts.go_on()
            except BaseException:
                self._parts = parts  # for `close`
                raise
            self._start_line_written = True
            self._parts = parts
            self._admission.report = parts.audit.add
            self._serve(parts.app)
            parts.serve_on(self.server)
            return
        body = keyring.parse_file(read_keyring(process.lock.directory))[0]
        log_dir = process.settings.opening.audit_dir or process.lock.directory
        view = self._log_view = view_on_disk(log_dir, body.audit_key.public_key, body.audit_origin)
        self._position.begin(view.log_id)
        self._sealed = _Sealed(
            Marker(at=clock.rfc3339(self._started_ns)) if marker is None else marker,
            durable=marker is not None,
            asked=marker is not None,
        )
        self._admission.report = self._sealed.report
        self._serve(self._sealed_app)

    async def _remove_attempts(self) -> None:
        """After their lines were written. If they stay, the next start repeats the lines, with the same ids."""
        try:
            await self._remove_seal_files()
        except StorageUnavailableError as error:
            self._process.log.warning("records of attempts to unseal stay", why=str(error))

    @property
    def parts(self) -> Parts | None:
        """None while the daemon is sealed."""
        return self._parts

    @property
    def summary(self) -> str:
        """One line for the service manager."""
        return f"{'serving' if self._sealed is None else 'sealed'} on {self._process.settings.socket}"

    @property
    def is_sealed(self) -> bool:
        return self._sealed is not None

    def end_steps(self) -> None:
        """Drops the ciphers that tasks have used in a turn, and overwrites registers and stack: see `aead.scrub`. Most
        turns of a task that waits for the disk used no key.
        """
        if not self._process.arena.take_used():
            return
        for parts in (self._parts, self._opening):
            if parts is not None:
                parts.vault.record_keys.drop_ciphers()
        scrub()

    def audit(self, event: Event) -> None:
        """Queues the line about something that the daemon did by itself. It is written as soon as the log can be
        written; while the daemon is sealed, at the unseal.
        """
        if len(self._owed) == OWED_LINES_MAX:  # the first may be on its way to the disk
            merged = self._owed.pop(1)
            newer = self._owed[1]
            newer.count = max(newer.count, 1) + max(merged.count, 1)
        self._owed.append(event)
        if self._writing_owed is None or self._writing_owed.done():
            self._writing_owed = asyncio.ensure_future(self._write_owed())

    async def _write_owed(self) -> None:
        while self._owed and self._parts is not None:
            event = self._owed[0]
            try:
                await self._parts.audit.add_written(event, durable=True)
            except AuditUnavailableError:
                await asyncio.sleep(AUDIT_RETRY_SECONDS)
                continue
            except SealedError:
                return  # the unseal writes them
            if self._owed and self._owed[0] is event:
                del self._owed[0]

    async def close(self, why: str) -> None:
        """The last line, where there is an audit key; then closes everything. `why` is empty after a failed start.

        Raises AuditUnavailableError when the end of the log could not be written; everything is closed all the same.
        """
        for task in (self._writing_marker, self._writing_owed):
            if task is not None:
                task.cancel()
        async with self._one_attempt:  # an attempt that runs has ended
            if self._closing is not None:
                await asyncio.wait([self._closing])
            parts, self._parts = self._parts, None
        if parts is None:
            if self._owed:
                self._process.log.warning("not audited, because the daemon is sealed", lines=len(self._owed))
            return
        try:
            for event in (*self._owed, *self._admission.refusals_so_far()):
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
        self._process.arena.zero_all()  # also a root key and shares that were given
        self._shares.clear()
        self._discard_source()
        self._seals += 1
        parts = self._parts or self._opening
        self._parts = self._opening = None
        sealed = self._sealed
        if sealed is None:
            self._sealed = _Sealed(Marker.of(who), durable=False, asked=True)
            self.server.replace_app(self._sealed_app, sealed_response())
            self._admission.report = self._sealed.report
            self._attempts = AttemptRecords([], 0)
            self._process.notifier.status(self.summary)
        elif parts is not None or not sealed.asked:  # an unseal, which may have removed the marker; or only a flag
            sealed.marker, sealed.asked, sealed.durable = Marker.of(who), True, False
        if parts is not None:
            try:
                self._chores.cancel()
                parts.seal()
            finally:
                self._expected_head = parts.audit_head
                self._log_view = parts.log_view()
                self._source_slot_id = parts.keks.proved_slot_id or self._source_slot_id
                self._closing = asyncio.ensure_future(self._abandon(parts, self._closing))
            self._process.log.warning("sealed", by=who.actor)
        return self._answer_seal()

    async def _answer_seal(self) -> Reply:
        sealed = self._sealed
        if sealed is None:
            raise NotSealedError("the key service was unsealed meanwhile")
        if not sealed.durable:
            try:
                await self._write_marker(sealed)
            except StorageUnavailableError:
                self._begin_writing_marker(sealed)
                raise StorageUnavailableError(_NOT_DURABLE) from None
        return json_answer(api.SealAnswer(sealed=True, since=sealed.marker.at))

    async def _write_marker(self, sealed: _Sealed) -> None:
        loop = asyncio.get_running_loop()
        write = functools.partial(seal_files.write_marker, self._directory, sealed.marker)
        await loop.run_in_executor(self._process.workers.seal, write)
        sealed.durable = True

    def _begin_writing_marker(self, sealed: _Sealed) -> None:
        if self._writing_marker is None or self._writing_marker.done():
            self._writing_marker = asyncio.ensure_future(self._write_marker_until_done(sealed))

    async def _write_marker_until_done(self, sealed: _Sealed) -> None:
        while self._sealed is sealed and not sealed.durable:
            with contextlib.suppress(StorageUnavailableError):
                await self._write_marker(sealed)
                return
            await asyncio.sleep(MARKER_RETRY_SECONDS)

    async def _abandon(self, parts: Parts, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        try:
            await parts.abandon()
        except Exception as error:  # noqa: BLE001  whatever fails here, the keys are zeroed and an unseal opens anew
            self._process.on_internal_error(f"{type(error).__name__} while the files of a sealed daemon were closed")

    # --- unseal ------------------------------------------------------------------------------------------------------

    def unseal_status(self) -> api.UnsealStatusAnswer:
        sealed = self._sealed
        if sealed is None:
            return api.UnsealStatusAnswer(sealed=False)
        return api.UnsealStatusAnswer(
            sealed=True,
            since=sealed.marker.at,
            by=sealed.marker.actor,
            stays_sealed=sealed.durable or self._process.settings.sealed,
            from_source=self._source_is_readable,
            shares=self._shares_progress(),
            failed_attempts=len(self._attempts.failed()) + self._attempts.dropped,
        )

    def unseal(self, who: Principal, given: SecretSlot | SecretText | None) -> Awaitable[Reply]:
        """Tries a root key, takes a share, or (None) tries the daemon's own source. After a KmsRefusedError the
        daemon is sealed.
        """
        return self._unseal(who, given, self._seals)

    async def _unseal(self, who: Principal, given: SecretSlot | SecretText | None, seals: int) -> Reply:
        async with self._one_attempt:
            self._require_rights(who)
            self._check_may_try(who, given)
            kind: Kind = "from_source" if given is None else "share" if isinstance(given, SecretText) else "root_hex"
            attempt = await self._record(who, kind)
            if self._closing is not None:  # the files of the former parts
                await asyncio.wait([self._closing])
                self._closing = None
            self._require_no_seal_since(seals)
            try:
                self._require_rights(who)
            except KmsRefusedError:
                await self._ended(attempt, "failed")
                raise
            if isinstance(given, SecretText):
                share, root = await self._take_share(attempt, given)
                if root is None:
                    return json_answer(self.unseal_status())
                try:
                    with root:
                        await self._try(who, attempt, GivenKey(root))
                except WrongRootError:
                    self._shares.drop(share)
                    raise
                finally:
                    self._shares.take_back(share)  # unless it was zeroed meanwhile
            else:
                await self._try(who, attempt, self._process.settings.root if given is None else GivenKey(given))
            return json_answer(api.UnsealStatusAnswer(sealed=False))

    def _require_no_seal_since(self, seals: int) -> None:
        if self._seals != seals:
            raise SealedError("the key service was sealed again during the unseal")

    def _require_rights(self, who: Principal) -> None:
        """After a wait, before a key is used: the policy may have changed. Raises UnauthorizedError, ForbiddenError."""
        renewed(who, self._process.policy.policy, api.UNSEAL)

    def _check_may_try(self, who: Principal, given: SecretSlot | SecretText | None) -> None:
        if self._sealed is None:
            raise NotSealedError("the key service is not sealed")
        wait_s = self._slow_down.wait_s(who.actor, time.monotonic())
        if wait_s:
            raise TooManyAttemptsError(
                f"too many wrong attempts: this one was not made; try again in {wait_s} s", wait_s
            )
        if given is None and not self._source_is_readable:
            raise ConflictError(
                "the daemon's source of the root key can be read once only, and was read or closed: give the root key, "
                "or restart the daemon with its source"
            )

    async def _try(self, who: Principal, attempt: Attempt, root: RootProvider) -> None:
        """Raises WrongRootError, UnsealFailedError, SealedError."""
        try:
            await self._open_and_serve(who, attempt, root)
        except UnknownRootError:
            await self._ended(attempt, "wrong_root")
            given = {
                "root_hex": "this root key",
                "from_source": "the root key of the daemon's own source",
                "share": "the root key that these shares give",
            }[attempt.kind]
            raise WrongRootError(
                f"{given} does not open the keyring, or is not pinned; the daemon stays sealed"
            ) from None
        except SealedError:
            raise
        except (KmsRefusedError, OSError) as error:
            self._process.log.warning("unseal failed", why=str(error))
            again = "try again"
            if attempt.kind == "share":
                again = f"enter share {attempt.share} again; the others are still there"
            await self._ended(attempt, "failed")
            raise UnsealFailedError(
                "the daemon stays sealed: its data directory could not be opened. Its own log says why; correct "
                f"that and {again}"
            ) from None

    # --- shares ------------------------------------------------------------------------------------------------------

    async def _take_share(self, attempt: Attempt, text: SecretText) -> tuple[ShareInfo, SecretSlot | None]:
        """The share, and the root key if it was the last one that its set needs. Raises KmsRefusedError."""
        try:
            keyring_id, sets = self._known_sets()
            info = self._shares.add(text.views(), keyring_id, sets, time.monotonic())
            attempt.share = info.number
        except WrongShareError:
            await self._ended(attempt, "wrong_share")
            raise
        except (InvalidRequestError, ConflictError):
            await self._ended(attempt, "refused")
            raise
        except KmsRefusedError:
            await self._ended(attempt, "failed")
            raise
        finally:
            text.release()
        if self._shares.complete:
            try:
                return info, self._shares.combine()
            except KmsRefusedError:
                self._shares.take_back(info)
                await self._ended(attempt, "failed")
                raise
        asyncio.get_running_loop().call_later(COLLECT_SECONDS_MAX + 1, lambda: self._shares.expire(time.monotonic()))
        await self._ended(attempt, "share_kept")
        return info, None

    def _known_sets(self) -> tuple[str, list[ShareSet]]:
        """The keyring's id and sets. It is not authenticated: that decides only which shares are refused."""
        try:
            body, _, _ = keyring.parse_file(read_keyring(self._process.lock.directory))
        except StartError as error:
            self._process.log.warning("unseal failed", why=str(error))
            raise UnsealFailedError("the keyring could not be read; the daemon's own log says why") from None
        return body.keyring_id, [slot.shares for slot in body.slots if slot.shares is not None]

    def _shares_progress(self) -> api.SharesProgress | None:
        self._shares.expire(time.monotonic())
        if not self._shares.numbers:
            return None
        left_ns = int((self._shares.expires_at - time.monotonic()) * 1_000_000_000)
        return api.SharesProgress(
            set_id=self._shares.set_id,
            numbers=list(self._shares.numbers),
            threshold=self._shares.threshold,
            expires_at=clock.rfc3339(clock.now_ns() + left_ns),
        )

    @property
    def _source_is_readable(self) -> bool:
        return self._process.settings.root.reads_again or not self._source_read

    def _discard_source(self) -> None:
        """A source that can be read once holds the root key until then, where root could read it."""
        source = self._process.settings.root
        if not source.reads_again and not self._source_read:
            self._source_read = True
            source.discard()

    async def _record(self, who: Principal, kind: Kind) -> Attempt:
        """The attempt, durable. Raises StorageUnavailableError; then it is not made."""
        attempt = self._attempts.begin(who, kind)
        try:
            await self._store_attempts()
        except StorageUnavailableError:
            self._attempts.take_back(attempt)
            raise StorageUnavailableError(
                "the attempt could not be recorded in the data directory, so it was not made: free space there"
            ) from None
        return attempt

    async def _store_attempts(self) -> None:
        write = functools.partial(seal_files.write_attempts, self._directory, self._attempts.encode())
        await asyncio.get_running_loop().run_in_executor(self._process.workers.seal, write)

    async def _ended(self, attempt: Attempt, outcome: Outcome) -> None:
        attempt.outcome = outcome
        if attempt in self._attempts.slowed():
            self._slow_down.failed(attempt.actor, time.monotonic())
        with contextlib.suppress(StorageUnavailableError):  # then it stands on disk as `begun`
            await self._store_attempts()

    async def _open_and_serve(self, who: Principal, attempt: Attempt, root: RootProvider) -> None:
        """Raises UnknownRootError, other KmsRefusedErrors, OSError; no key is left then."""
        sealed, seals = self._sealed, self._seals
        if sealed is None:
            raise NotSealedError("the key service is not sealed")
        had_marker = sealed.asked
        self._process.notifier.watchdog()  # so that the manager's whole time-out is left
        parts = self._opening = self._open(root)
        if self._writing_marker is not None:  # what it has begun ends before the marker is removed, in the same worker
            self._writing_marker.cancel()
            self._writing_marker = None
        try:
            await parts.begin(self._lines_of_unseal(parts, who, attempt, sealed))
            self._require_no_seal_since(seals)
            sealed.durable = False
            await self._remove_seal_files()
            self._require_no_seal_since(seals)
        except BaseException:
            if self._opening is parts:
                self._opening = None
                parts.seal()
                self._expected_head = parts.audit_head
                self._closing = asyncio.ensure_future(self._abandon(parts, None))
                if had_marker:
                    self._begin_writing_marker(sealed)
            raise
        self._shares.clear()
        self._discard_source()
        self._opening = self._sealed = None
        self._start_line_written = True
        self._parts = parts
        self._attempts = AttemptRecords([], 0)
        self._admission.report = parts.audit.add
        for event in (*self._owed, *sealed.refusals, *self._admission.refusals_so_far()):
            parts.audit.add(event)
        self._owed.clear()
        self.server.replace_app(parts.app, None)
        parts.serve_on(self.server)
        self._chores.start(parts)
        self._process.notifier.status(self.summary)
        self._process.log.warning("unsealed", by=who.actor)
        await parts.go_on()

    async def _remove_seal_files(self) -> None:
        """Raises StorageUnavailableError."""
        remove = functools.partial(seal_files.remove_seal_files, self._directory)
        await asyncio.get_running_loop().run_in_executor(self._process.workers.seal, remove)

    def _lines_of_unseal(self, parts: Parts, who: Principal, attempt: Attempt, sealed: _Sealed) -> list[Event]:
        events = [] if self._start_line_written else self._first_lines(parts)
        if sealed.asked:
            marker = sealed.marker
            detail = "" if marker.at else "the marker could not be read"
            facts: dict[str, str | int] = {"at": marker.at, "restart_stays_sealed": int(sealed.durable)}
            events.append(
                Event(type=api.SEAL.name, actor=marker.actor or "minikms", pid=marker.pid, detail=detail, facts=facts)
            )
        facts = {**parts.epoch_facts(), "attempt": attempt.attempt, "kind": attempt.kind}
        if attempt.share:
            facts["share"] = attempt.share
        unsealed = Event(type=api.UNSEAL.name, actor=who.actor, pid=who.pid, facts=facts)
        return [*events, *self._attempts.events(but=attempt), unsealed]

    # --- parts -------------------------------------------------------------------------------------------------------

    def _open(self, root: RootProvider) -> Parts:
        """Opens the data directory. Blocks on the disk. Raises StartError, OSError."""
        process = self._process
        options = process.settings.opening
        if self._opened_before:  # what the flags say of the audit log is for one start
            options = options._replace(
                accept_restore=False, accept_audit_loss=False, expect_audit_head=self._expected_head
            )
        if root is process.settings.root:
            self._source_read = True
        data = open_for_service(
            process.lock,
            root,
            arena=process.arena,
            disk=process.workers.disk,
            options=options,
        )
        self._opened_before = True
        slot_id = data.slot.slot_id
        if root is process.settings.root:
            self._source_slot_id = slot_id
        return Parts(
            settings=process.settings,
            admission=self._admission,
            data=data,
            proved_slot_id=slot_id if slot_id == self._source_slot_id else "",
            workers=process.workers,
            arena=process.arena,
            measures=process.measures,
            policy=process.policy,
            position=self._position,
            started_ns=self._started_ns,
            seal=self.seal,
        )

    def _first_lines(self, parts: Parts) -> list[Event]:
        facts = parts.epoch_facts() | self._process.policy.facts()
        return [Event(type="start", actor="minikms", pid=os.getpid(), facts=facts)]

    def _serve(self, app: Application[Session]) -> None:
        self.server = HttpServer(
            app,
            loop=asyncio.get_running_loop(),
            on_internal_error=self._process.on_internal_error,
            limits=Limits(connections_max=self._process.connections_max),
        )

    async def report_audit_position(self, asked: api.ReportAuditPositionRequest) -> Reply:
        """What the log held at the seal; the auditor goes on with it. Its first report needs the keyring."""
        mac, view = mac_of(asked), self._log_view
        if view is None or not view.origin:
            raise SealedError(SEALED_TEXT)
        keyring.check_audit_origin(view.origin, asked.origin)
        if asked.seq <= view.durable.seq:  # otherwise the disk lost the mark of what is durable: after the unseal
            await asyncio.get_running_loop().run_in_executor(
                self._process.workers.lookup, self._position.check, asked, view, mac
            )
            self._position.take(asked, mac)
        return json_answer(view.answer())

    def status(self) -> dict[str, object]:
        """`/status` of the sealed daemon."""
        sealed = self._sealed
        return sealed_status(
            self._process.settings,
            policy=self._process.policy,
            arena=self._process.arena,
            measures=self._process.measures,
            server=self.server,
            started_ns=self._started_ns,
            reason=SEALED_TEXT,
            warning="" if sealed is None or sealed.durable or self._process.settings.sealed else _NOT_DURABLE,
        )
