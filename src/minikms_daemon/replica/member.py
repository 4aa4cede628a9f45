"""A host of a key service on several hosts: when it follows, takes over, serves and stands by.

Owns: the mode of the process (`minikms_daemon.replica.state`), its lease, and the answers to its replicator. The order
of steps:
- Take-over, in a new term: the directory takes changes, its first one raises the epoch of the keyring, the line
  `replica_serves` is durable, and then requests are served.
- Standby, when the lease ends, for another term, and after a change that could not be written here: first nothing is
  served any more, then no change is taken, then the line `replica_stands_by` and the mark are written.

Invariants: no request is begun and no answer leaves after the end of the lease; a standby is never sealed for it, but
opened keys go after KEYS_KEPT_LEASES; a seal of another member seals this one. It must never hold a key.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from minikms import api
from minikms.api import Condition
from minikms.api.base64 import decode_canonical
from minikms.api.errors import (
    ConflictError,
    InvalidRequestError,
    KeysNotReadError,
    KmsRefusedError,
    ReplicaForkedError,
    ReplicaRolledBackError,
    SealedError,
    StandbyError,
    StartError,
    StorageUnavailableError,
    TooLargeError,
)
from minikms.audit import Event
from minikms.audit.record import ACTOR_SELF
from minikms.conditions import state
from minikms.http import Application, Response
from minikms.keys.unlocked import NeedsRootError
from minikms.platform.clock import boot_ns
from minikms.platform.logs import Log
from minikms_daemon.replica.application import Act, StandbyApplication, sealed_acts
from minikms_daemon.replica.state import MemberState, Move, Seals
from minikms_daemon.server.admission import Session
from minikms_daemon.server.application import KeyApplication
from minikms_daemon.server.lease import SECOND_NS, Lease, LeasedApplication
from minikms_daemon.server.no_member import NoMember
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.encoding import Reply, json_answer
from minikms_daemon.service.replicas import ReplicaVerbs

if TYPE_CHECKING:
    from minikms.custody.member import MemberDirectory
    from minikms.custody.replica_file import Mark
    from minikms_daemon.server.parts import Parts
    from minikms_daemon.server.run_context import RunContext

WATCH_SECONDS: Final = 0.1
MARK_SECONDS: Final = 1.0
SCAN_SECONDS: Final = 1.0
"""Between two attempts to read the key files."""
REVIEW_SECONDS: Final = 600.0
"""A member that follows no more reads its key files again that often: what was wrong with them may be right now."""
KEYS_KEPT_LEASES: Final = 10
"""Leases without a renewal, after which a standby drops the keys that it has opened."""
WANTS_SECONDS: Final = 60
"""How long a promotion is tried."""
SEAL_SECONDS_MAX: Final = 8.0
"""How long the answer to `/seal` waits for the other members: less than a client waits for it."""
WHY_CHARS_MAX: Final = 1000
NOT_READ: Final = (
    f"its replicator has read nothing in the database for {api.REPLICATOR_SILENT_SECONDS} s: "
    "`minikms-replicator doctor` and its log say why"
)
NOT_KNOWN: Final = (
    "this host is sealed, and stays so; the database does not know it yet, so other hosts may still serve: seal them "
    "too, or see that its replicator runs. It goes on trying"
)


class Host(Protocol):
    """What a member needs of the server of its process."""

    def seal_for_all(self) -> None:
        """Seals this host, because another member was sealed."""

    def open_again(self, keyring: bytes) -> None:
        """Closes the directory, and opens it with the root key and this newer keyring."""

    def audit(self, event: Event) -> None:
        """Queues a line about what the daemon did by itself."""


class ReplicaMember(NoMember):
    """One process of a member, sealed or not. Made and used in the loop's thread. `mark`: as it is on disk, not yet
    authenticated. `sealed_as`: the count in its marker.
    """

    def __init__(self, host: Host, process: RunContext, mark: Mark, *, keyring_id: str, sealed_as: int) -> None:
        self._host = host
        self._process = process
        self._mark = mark
        self._keyring_id = keyring_id
        self._version = process.settings.build.version
        self.state = MemberState()
        self.lease = Lease(api.LEASE_SECONDS)
        self.seals = Seals(mark.seals, sealed_as)
        self._seals_known = asyncio.Event()
        self._parts: Parts | None = None
        self._directory: MemberDirectory | None = None
        self._taking_over: asyncio.Task[None] | None = None
        self._begun: set[asyncio.Task[None]] = set()
        self.asking: set[object] = set()
        """Requests for the next commit. A stand-by or a seal does not cancel them: they use no key."""
        self._why = ""
        self._number = 0
        """The number of the last change of the database."""
        self._serving = ""
        self._members: list[api.MemberReport] = []
        self._heard_ns: int | None = None
        self._read_ns: int | None = None
        """When the replicator came with a head of the database, or first at all."""
        self._wanted_ns: int | None = None
        """When an operator asked that this member takes over."""
        self._keys_until_ns = 0

    # --- for the parts of an opened directory ------------------------------------------------------------------------

    @property
    def serves(self) -> bool:
        return self.state.mode == "serving"

    def leased(self, app: Application[Session]) -> Application[Session]:
        return LeasedApplication(app, lease=self.lease, ended=self.lapse)

    def standby(self, app: KeyApplication) -> Application[Session]:
        return StandbyApplication(app, self._attended)

    def _attended(self) -> bool:
        return self._parts is not None and bool(self._parts.vault.unlocked.audit.audit_origin)

    def add_verbs(self, table: VerbTable, parts: Parts) -> None:
        directory = parts.member
        ReplicaVerbs(keks=parts.keks, seals=lambda: 0 if directory is None else directory.mark.seals)

        async def sent(answer: Awaitable[object]) -> Reply:
            """Sends the answer also while the audit log waits for this very replicator, or can't be written."""
            return Response(200, json_answer(await answer), uncommitted=True)

        table.later(api.REPLICA_FOLLOW, lambda request, event, permit: sent(self.follow(request)), audited=False)
        table.later(api.REPLICA_NEXT, lambda request, event, permit: sent(self.next(request)), audited=False)
        table.later(api.PROMOTE_REPLICA, lambda request, event, permit: self.promote(request))
        table.now(api.REPLICA_STATUS, lambda request, event: self.answer())

    # --- opened and sealed -------------------------------------------------------------------------------------------

    def opened(self, parts: Parts) -> None:
        """The daemon is not sealed any more: it follows."""
        directory = _directory_of(parts)
        self._parts, self._directory = parts, directory
        self._mark = directory.mark
        self._keyring_id = parts.vault.keyring.body.keyring_id
        self._why = ""
        self.seals.obeyed = max(self.seals.obeyed, self._mark.seals)
        self.state.move(Move.OPEN)

    async def note_seals(self, parts: Parts) -> None:
        """An unseal: the seals so far are obeyed. Raises StorageUnavailableError."""
        if self.seals.obeyed > (directory := _directory_of(parts)).mark.seals:
            directory.note_seals(self.seals.obeyed)
            await directory.write_mark()

    def sealed(self, why: str = "") -> None:
        """The keys are zeroed, and nothing is served."""
        self.state.move(Move.SEAL)
        self.lease.end()
        self._why = why
        self._cancel_take_over()
        if self._directory is not None:
            self._mark = self._directory.mark
            self._directory.stop_serving()
        self._parts = self._directory = None

    def sealed_acts(self) -> dict[str, dict[str, Act]]:
        """What a sealed member answers to its replicator, by path and method."""
        return sealed_acts(follow=self.follow, grant=self.next, answer=self.answer)

    def ask_seal(self) -> int:
        """The count of the seal that this host asks all others for."""
        return self.seals.ask()

    async def check_seal_known(self) -> None:
        """Waits until the database has the seal that was asked for. Raises StorageUnavailableError after
        SEAL_SECONDS_MAX.
        """
        try:
            async with asyncio.timeout(SEAL_SECONDS_MAX):
                while not self.seals.are_known:
                    self._seals_known.clear()
                    await self._seals_known.wait()
        except TimeoutError:
            raise StorageUnavailableError(NOT_KNOWN) from None

    async def settled(self) -> None:
        """Returns when what was begun in the background has ended."""
        if self._begun:
            await asyncio.wait(self._begun)

    async def watch(self) -> None:
        """Looks for the end of the lease, writes the mark, and computes the sum, until it is cancelled."""
        marked_ns, scanned_ns, reviewed_ns = 0, 0, boot_ns()
        while (directory := self._directory) is not None:
            now_ns = boot_ns()
            if self.state.has_lease and not self.lease.left_ns(now_ns):
                self.stand_by("the lease has ended")
            if self.state.has_lease and directory.behind:
                self.stand_by("a change of the database could not be written here")
            if not self.state.has_lease and self._keys_until_ns and now_ns >= self._keys_until_ns:
                self._keys_until_ns = 0
                if self._parts is not None:
                    self._parts.vault.cache.clear()
            if self.state.mode != "refused":
                reviewed_ns = now_ns
            elif now_ns - reviewed_ns >= REVIEW_SECONDS * SECOND_NS:
                reviewed_ns = now_ns
                directory.review()
            due = not directory.scanned and not self.state.has_lease
            try:
                if due and now_ns - scanned_ns >= SCAN_SECONDS * SECOND_NS:
                    scanned_ns = now_ns
                    await directory.scan()
                if self.serves and now_ns - marked_ns >= MARK_SECONDS * SECOND_NS:
                    marked_ns = now_ns
                    await directory.write_mark()
                    self._why = "" if self.serves else self._why
            except StorageUnavailableError as error:
                self._show(error)
            await asyncio.sleep(WATCH_SECONDS)

    # --- what the replicator asks ------------------------------------------------------------------------------------

    async def follow(self, request: api.ReplicaFollowRequest) -> api.ReplicaPosition:
        """Follows the database. A sealed member only learns of seals. Raises ConflictError, ReplicaForkedError,
        ReplicaRolledBackError, StorageUnavailableError.
        """
        if len(request.files) > api.REPLICA_FILES_MAX:
            raise ConflictError(f"a part has at most {api.REPLICA_FILES_MAX} files")
        self._heard(request.members)
        head = request.head
        if head is UNSET:
            return self.position()
        if head.keyring_id not in ("", self._keyring_id):  # "": the tables are empty
            return self._refused(ReplicaForkedError("the database is of another key service"))
        _check_numbers(head.term, head.number, head.seals)
        self._read_ns, self._number = boot_ns(), head.number
        # Only a writer of the database makes a name that is none; it renews nothing, so others take over.
        self._serving = head.member if api.MEMBER_ID_PATTERN.fullmatch(head.member) else ""
        self._learn_seals(head.seals)
        if self.state.has_lease and (head.term != self.state.term or head.member != self._mark.member_id):
            self.stand_by("another member has the lease")
        directory = self._directory
        if directory is None or self.state.has_lease:
            return self.position()
        try:
            await directory.follow(request)
        except NeedsRootError:
            if self._directory is directory and isinstance(head.keyring, str):
                self._host.open_again(decode_canonical(head.keyring, api.REPLICA_BYTES_MAX, "keyring"))
        except (ReplicaForkedError, ReplicaRolledBackError) as error:
            return self._refused(error)
        except (InvalidRequestError, TooLargeError) as error:
            return self._refused(ReplicaForkedError(f"the database has what no member has made: {error}"))
        except KmsRefusedError as error:
            self._show(error)
            raise
        else:
            if request.complete and self._directory is directory and not self.state.has_lease:
                self.state.move(Move.FOLLOW)
                self._why = ""
        return self.position()

    async def next(self, request: api.ReplicaNextRequest) -> api.ReplicaNextAnswer:
        """Answers like `follow`; a sealed member asks that its lease is released."""
        task = asyncio.current_task()
        self.asking.add(task)
        try:
            return await self._next(request)
        finally:
            self.asking.discard(task)

    async def _next(self, request: api.ReplicaNextRequest) -> api.ReplicaNextAnswer:
        now_ns = boot_ns()
        _check_numbers(request.term, request.number, request.seals, request.asked_ns)
        self.state.check_asked(request.asked_ns, now_ns)
        self._heard(request.members)
        if request.wanted is not UNSET:
            _check_member(request.wanted)
        self._read_ns, self._number, self._serving = now_ns, request.number, self._mark.member_id
        self._learn_seals(request.seals)
        directory = self._directory
        if self.state.has_lease and directory is not None:
            self._renew(request, directory, now_ns)
        elif self._may_take_over(request) and directory is not None:
            self._begin_take_over(request, directory, now_ns)
        commit = None
        if self.state.has_lease and directory is not None:
            commit = await directory.next_commit(api.POLL_SECONDS_MAX)
        granted = self.state.has_lease and self.state.term == request.term and bool(self.lease.left_ns(boot_ns()))
        self.state.answered(boot_ns())
        # Nobody takes over before the database has the seal that was asked for here.
        keeps = granted or self._may_take_over(request) or (self.state.mode == "sealed" and not self.seals.are_known)
        return api.ReplicaNextAnswer(self.position(), commit if granted else None, release=not keeps)

    def _renew(self, request: api.ReplicaNextRequest, directory: MemberDirectory, now_ns: int) -> None:
        """Grants the lease until the next commit, or ends it."""
        if not self.lease.left_ns(now_ns):
            return self.stand_by("the lease has ended")
        if request.term != self.state.term:
            return self.stand_by(f"the database is in term {request.term}")
        if directory.behind:
            return self.stand_by("a change of the database could not be written here")
        try:
            directory.confirm(request.number)
        except ConflictError as error:
            return self.stand_by(str(error))
        if request.wanted not in (UNSET, self._mark.member_id):
            return self.stand_by(f"{request.wanted} was promoted")
        return self._grant(request.asked_ns)

    def _grant(self, asked_ns: int) -> None:
        self.lease.grant(asked_ns)
        self._keys_until_ns = self.lease.until_ns + KEYS_KEPT_LEASES * self.lease.length_ns

    def _may_take_over(self, request: api.ReplicaNextRequest) -> bool:
        """Whether it can take over in this term, now or after it has followed."""
        return self._is_ready and request.term > max(self.state.term, self._mark.term)

    def _begin_take_over(self, request: api.ReplicaNextRequest, directory: MemberDirectory, now_ns: int) -> None:
        """Starts the take-over, if this host has all changes and the lease has not ended."""
        parts = self._parts
        if parts is None or now_ns >= request.asked_ns + self.lease.length_ns:
            return
        try:
            directory.serve(request.term, request.number)
        except ConflictError as error:
            self._why = str(error)
            return
        self.state.take_over(request.term)
        self._grant(request.asked_ns)
        self._taking_over = self._in_background(self._take_over(parts, directory, request.term))

    async def _take_over(self, parts: Parts, directory: MemberDirectory, term: int) -> None:
        announced = False
        try:
            if directory.fills:
                await directory.fill()
            await parts.take_over()
            facts: dict[str, str | int] = {
                **parts.epoch_facts(),
                "term": term,
                "number": directory.mark.number,
                "member": self._mark.member_id,
            }
            announced = True
            await parts.audit.add_written(_own_line("replica_serves", facts), durable=True)
        except SealedError:
            return
        except Exception as error:
            self.stand_by(str(error) if isinstance(error, KmsRefusedError) else type(error).__name__, announced)
            if not isinstance(error, KmsRefusedError):
                raise
            return
        if (self.state.mode, self.state.term) != ("taking_over", term):
            return
        if not self.lease.left_ns(boot_ns()):
            self.stand_by("the lease has ended", announced)
            return
        self.state.move(Move.SERVE)
        self._why, self._wanted_ns = "", None
        parts.show()
        self._log("serving", term=term)
        await parts.go_on()

    def lapse(self) -> Application[Session]:
        """The application that serves after the lease."""
        parts = self._parts
        self.stand_by("the lease has ended")
        if parts is None:
            raise StandbyError
        return parts.served

    def stand_by(self, why: str, announced: bool = False) -> None:
        """Nothing is served and no change is taken from now on. Idempotent."""
        parts, directory = self._parts, self._directory
        if not self.state.has_lease or parts is None or directory is None:
            return
        served = self.serves
        self.state.move(Move.STAND_BY)
        self.lease.end()
        self._why = why
        self._cancel_take_over()
        if served:
            parts.stand_by(self.asking)
        directory.stop_serving()
        self._log("standing by", term=self.state.term, why=why)
        if served or announced:
            event = _own_line("replica_stands_by", {"term": self.state.term})
            event.detail = why
            self._host.audit(event)
        self._in_background(self._write_mark(directory))

    async def _write_mark(self, directory: MemberDirectory) -> None:
        try:
            await directory.write_mark()
        except KmsRefusedError as error:
            self._log("mark not written", why=str(error))

    def _cancel_take_over(self) -> None:
        if self._taking_over is not None and self._taking_over is not asyncio.current_task():
            self._taking_over.cancel()
        self._taking_over = None

    def _in_background(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._begun.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._begun.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._process.on_internal_error(f"{type(error).__name__} in a member")

    # --- seals -------------------------------------------------------------------------------------------------------

    def _learn_seals(self, head: int) -> None:
        others = self.seals.learn(head)
        if self.seals.are_known:
            self._seals_known.set()
        if others:
            self._host.seal_for_all()

    def _refused(self, error: KmsRefusedError) -> api.ReplicaPosition:
        """The position after an error; a new error is raised, for one line in the log: the replicator asks twice a
        second.
        """
        if self.state.mode not in ("following", "refused"):
            raise error
        why = f"{error.code}: {error}"
        if (self.state.mode, self._why) != ("refused", why):
            self.state.move(Move.REFUSE)
            self._why = why
            self._log("refused", why=why)
            raise error
        return self.position()

    def _show(self, error: KmsRefusedError) -> None:
        """Shows why this host does not follow, until it does. What the disk refuses goes to the log too."""
        if isinstance(error, KeysNotReadError):
            return  # the scan knows why
        before, self._why = self._why, str(error)
        if isinstance(error, StorageUnavailableError):
            cause = error.__cause__
            reason = f": {os.strerror(cause.errno)}" if isinstance(cause, OSError) and cause.errno else ""
            self._why = f"{error.code}: {error}{reason}"
            if self._why != before:
                self._log("storage unavailable", why=self._why)

    # --- what is shown -----------------------------------------------------------------------------------------------

    @property
    def _is_ready(self) -> bool:
        directory, parts = self._directory, self._parts
        if directory is None or parts is None or self.state.mode != "following":
            return False
        return directory.scanned and not directory.behind and parts.audit_writable and not self._later_change

    @property
    def _later_change(self) -> str:
        """What another host reports beyond all that the database has, which is here as a whole; empty if none does. A
        change of a later term comes after all of the terms before. Nothing authenticates a report.
        """
        directory, parts = self._directory, self._parts
        if directory is None or parts is None or self.state.mode != "following":
            return ""
        if directory.fills or self._number > directory.mark.number:
            return ""
        names = {member.member_id: member.name for member in parts.vault.keyring.body.members}
        latest = max(
            ((each.term, each.number, each.member_id) for each in self._members if each.member_id in names),
            default=(0, 0, ""),
        )
        if latest[:2] <= (directory.mark.term, directory.mark.number):
            return ""
        return f"the database lacks change {latest[1]} of term {latest[0]}, which the host {names[latest[2]]} reports"

    @property
    def why(self) -> str:
        """Why this host does not serve, or does not follow; empty if nothing is wrong."""
        is_unread = self._read_ns is not None and boot_ns() >= self._read_ns + api.REPLICATOR_SILENT_SECONDS * SECOND_NS
        is_asked = (self._heard_seconds or 0.0) < api.REPLICATOR_SILENT_SECONDS
        unread = NOT_READ if self.state.mode == "following" and is_unread and is_asked else ""
        return "; ".join(filter(None, (self._why, self._later_change, unread)))

    def position(self) -> api.ReplicaPosition:
        directory, parts = self._directory, self._parts
        mark = self._mark if directory is None else directory.mark
        policy, pin = self._process.policy.facts(), self._process.settings.opening.pin
        report = api.MemberReport(
            member_id=mark.member_id,
            name=mark.name,
            mode=self.state.mode,
            number=mark.number,
            term=mark.term,
            version=self._version,
            policy=str(policy.get("policy_sha256", "")),
            pin="" if pin is None else pin.digest(),
            why=self.why[:WHY_CHARS_MAX],
            seen_seconds=0.0,
        )
        return api.ReplicaPosition(
            keyring_id=self._keyring_id,
            member_id=mark.member_id,
            mode=self.state.mode,
            number=mark.number,
            term=mark.term,
            tombstones=0 if parts is None else parts.vault.destroyed.count,
            seals=self.seals.wanted,
            ready=self._is_ready,
            wants=self._wants,
            begins=mark.begins,
            report=report,
            members=[] if parts is None else [member.member_id for member in parts.vault.keyring.body.members],
        )

    @property
    def _wants(self) -> bool:
        return self._wanted_ns is not None and boot_ns() < self._wanted_ns + WANTS_SECONDS * SECOND_NS

    async def promote(self, request: api.PromoteReplicaRequest) -> api.ReplicaStatusAnswer:
        directory = self._directory
        if directory is None:
            raise SealedError("this host is sealed")
        if request.replace_database is True:
            if self.state.has_lease:
                raise ConflictError("this host serves: it can fill an empty database once its lease has ended")
            directory.may_begin()
            await directory.write_mark()
        self._wanted_ns = None if self.serves else boot_ns()
        return self.answer()

    def answer(self) -> api.ReplicaStatusAnswer:
        position = self.position()
        return api.ReplicaStatusAnswer(
            enabled=True,
            member_id=position.member_id,
            mode=position.mode,
            serving=self._serving,
            term=position.term,
            number=position.number,
            lease_seconds=self.lease.left_ns(boot_ns()) / SECOND_NS,
            why=position.report.why,
            heard_seconds=self._heard_seconds,
            members=self._reports(position.report),
        )

    def _reports(self, own: api.MemberReport) -> list[api.MemberReport]:
        """The report of each host in the keyring; `version` is empty if it has not reported. While sealed: the reports
        as they came.
        """
        if self._parts is None:
            return self._members
        came = {report.member_id: report for report in (*self._members, own)}
        return [
            came.get(member.member_id)
            or api.MemberReport(
                member_id=member.member_id, name=member.name, mode="following", number=0, term=0, version="", policy="",
                pin="", why="it has not reported yet", seen_seconds=0.0,
            )
            for member in self._parts.vault.keyring.body.members
        ]  # fmt: skip

    @property
    def _heard_seconds(self) -> float | None:
        return None if self._heard_ns is None else (boot_ns() - self._heard_ns) / SECOND_NS

    def _heard(self, members: list[api.MemberReport] | UnsetType) -> None:
        self._heard_ns = boot_ns()
        self._read_ns = self._read_ns or self._heard_ns
        if members is not UNSET:
            if len(members) > api.MEMBERS_MAX:
                raise InvalidRequestError(f"there are at most {api.MEMBERS_MAX} members")
            if any(map(_is_unbounded, members)):
                raise InvalidRequestError("a report of a member is not one")
            self._members = members

    def status(self) -> dict[str, object]:
        """For `/status`."""
        facts = msgspec.structs.asdict(self.answer())
        del facts["enabled"]
        return {**facts, "lag_changes": max(0, self._number - facts["number"])}

    def conditions(self) -> Iterator[Condition]:
        own, reports = self.position().report, self._reports(self.position().report)
        silent = self._heard_seconds
        if silent is None or silent >= api.REPLICATOR_SILENT_SECONDS:
            yield state("replicator_silent", since="since the start" if silent is None else f"for {int(silent)} s")
        if own.mode == "refused":
            yield state("host_refuses", reason=own.why)
        elif own.mode == "following" and self._why:
            yield state("host_not_following", reason=self._why)
        elif own.mode == "following" and (lag := self._number - own.number) > 0:
            yield state("host_behind", count=f"{lag:,}")
        if self._later_change:
            yield state("host_not_taking_over", reason=self._later_change)
        others = [member for member in reports if member.member_id != own.member_id]
        for member in others:
            if member.mode == "refused":
                yield state("host_lost", host=member.name, reason=f"follows no more: {member.why}")
            elif member.version and member.seen_seconds > api.MEMBER_SILENT_SECONDS:
                yield state("host_lost", host=member.name, reason=f"is silent for {int(member.seen_seconds):,} s")
            for what, its, here in (("policy", member.policy, own.policy), ("pin file", member.pin, own.pin)):
                if member.version and its != here:
                    yield state("host_differs", host=member.name, what=what)
        if self.serves and not any(_follows(member) for member in others):
            yield state("host_alone")

    def _log(self, what: str, **members: object) -> None:
        logger = Log()
        logger.warning(what, member=self._mark.member_id, **members)


def _directory_of(parts: Parts) -> MemberDirectory:
    if parts.member is None:
        raise StartError("kms-replica.json went while the daemon ran: restart it")
    return parts.member


def _check_numbers(*numbers: int) -> None:
    if not all(0 <= number <= api.REPLICA_NUMBER_MAX for number in numbers):
        raise InvalidRequestError("a number of the head is out of its range")


def _check_member(member_id: str) -> None:
    if not api.MEMBER_ID_PATTERN.fullmatch(member_id):
        raise InvalidRequestError("no member has this id")


def _follows(member: api.MemberReport) -> bool:
    seen = bool(member.version) and member.seen_seconds <= api.MEMBER_SILENT_SECONDS
    return seen and member.mode == "following"


def _is_unbounded(member: api.MemberReport) -> bool:
    texts = (member.member_id, member.name, member.version, member.policy, member.pin, member.why)
    numbers = (member.term, member.number)
    return any(len(text) > WHY_CHARS_MAX for text in texts) or not all(
        0 <= number <= api.REPLICA_NUMBER_MAX for number in numbers
    )


def _own_line(name: str, facts: dict[str, str | int]) -> Event:
    return Event(type=name, actor=ACTOR_SELF, pid=os.getpid(), facts=facts)
