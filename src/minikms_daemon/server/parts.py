"""What a running daemon consists of.

Owns: making each part over an opened data directory (`minikms.datadir`), joining them, and closing them. Invariants:
`close` waits for the jobs that have begun, then closes files and zeroes keys; `seal` zeroes the keys first, and
`abandon` closes the files afterwards. It must never serve: that is `minikms_daemon.seal`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Final

from minikms.api.errors import StorageUnavailableError
from minikms.audit import Event
from minikms.audit.reader import LOG_NAME
from minikms.audit.record import LineRef
from minikms.custody.journal import Replayed
from minikms.custody.vault import Indexing
from minikms.datadir import DataDir, oldest_audit_key, written_at_start
from minikms.http import Application, HttpServer
from minikms.http.exchange import refusal_response
from minikms.http.limits import INTERRUPTED
from minikms.memory import libc
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.platform.logs import Log
from minikms.platform.workers import in_worker
from minikms.roots.key_file import replace_key
from minikms.roots.providers import KeyFile
from minikms_daemon.audit.maintenance import Maintenance
from minikms_daemon.audit.turns import TurnAudit
from minikms_daemon.rotation import KekRotation, Pruning
from minikms_daemon.server.admission import Admission, Session
from minikms_daemon.server.application import KeyApplication, Seal
from minikms_daemon.server.no_member import NoMember
from minikms_daemon.server.run_context import RunContext, Workers
from minikms_daemon.server.settings import Settings
from minikms_daemon.server.status import StatusPage
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.keks import KekVerbs
from minikms_daemon.service.keys import KeyVerbs
from minikms_daemon.service.lifecycle import LifecycleVerbs
from minikms_daemon.service.no_auditor import NoAuditor
from minikms_daemon.service.records import RecordVerbs
from minikms_daemon.service.root_removal import RootRemoval
from minikms_daemon.service.roots import RootVerbs

if TYPE_CHECKING:
    from minikms_daemon.server.lagging import LaggingApplication


LAG_CHECK_SECONDS: Final = 0.1
"""How often the lag is compared with its bound. Lines become durable at this pace."""


class Parts:
    """All parts of one run. Made and used in the loop's thread. `data` stays open until `close`. `proved_slot_id`: the
    slot of the root key that the daemon's own source holds; empty if the run was opened by another one.
    """

    def __init__(
        self,
        process: RunContext,
        *,
        admission: Admission,
        data: DataDir,
        proved_slot_id: str,
        auditor: NoAuditor,
        started_ns: int,
        seal: Seal,
        leased: Callable[[Application[Session]], Application[Session]],
        lease: Callable[[], dict[str, object] | None],
        replica: NoMember,
    ) -> None:
        settings, workers, policy = process.settings, process.workers, process.policy
        self._data = data
        self.member = data.member
        self.replica = replica
        self.workers = workers
        self.vault = data.vault
        self.audit = TurnAudit(data.log, workers.audit)
        self.upkeep = Maintenance(
            data.log,
            keep=settings.audit_keep,
            taken_seq=lambda: auditor.seq if self.vault.unlocked.audit.audit_origin else None,
        )
        self.indexing = Indexing(self.vault, workers.reader)
        rotation = KekRotation(
            self.vault,
            reader=workers.reader,
            disk=workers.disk,
            around_passes=_one_cpu_for(workers.reader, workers.disk),
        )
        access = policy.access(
            vault=self.vault, indexing=self.indexing, refusals=admission.refusals, limited=admission.limited
        )
        table = VerbTable(self.audit, access)
        RecordVerbs(self.vault, table)
        KeyVerbs(self.vault, table, self.indexing)
        self.lifecycle = LifecycleVerbs(vault=self.vault, table=table, indexing=self.indexing, reader=workers.reader)
        self.removal = RootRemoval(self.vault, self.audit)
        self.keks = KekVerbs(
            vault=self.vault,
            table=table,
            rotation=rotation,
            pruning=Pruning(self.vault, reader=workers.reader, disk=workers.disk),
            removal=self.removal,
            proved_slot_id=proved_slot_id,
            rewrite_root=_root_rewriter(settings, process.arena, workers),
            pin=settings.opening.pin,
        )
        RootVerbs(keks=self.keks, in_use_slot_id=data.slot.slot_id)
        replica.add_verbs(table, self)
        auditor.serve(table, vault=self.vault, log=data.log, reader=workers.lookup)
        self._page = StatusPage(
            process=process,
            data=data,
            from_source=bool(proved_slot_id),
            upkeep=self.upkeep,
            position=auditor.status,
            lagging=lambda: "" if self._lagging_app is None else self._lagging_app.why,
            indexing=self.indexing,
            keks=self.keks,
            lease=lease,
            replica=replica,
            started_ns=started_ns,
        )
        self.app = KeyApplication(
            table=table,
            status=self._page.build,
            admission=admission,
            meters=policy.meters,
            audit=self.audit,
            vault=self.vault,
            seal=seal,
            reload=policy.reload,
        )
        standby = replica.standby(self.app)
        self._standby = None if standby is None else leased(standby)
        self._serving = leased(replica.leased(self.app))
        self._lagging_app: LaggingApplication | None = None
        if settings.flags.refuse_when_unshipped is not None:
            from minikms_daemon.server.lagging import LaggingApplication  # in a daemon only if it may lag

            self._lagging_app = LaggingApplication(
                self.app, lag=lambda: auditor.lag, lines_max=settings.flags.refuse_when_unshipped
            )
            self._lagging = leased(replica.leased(self._lagging_app))
        self._server: HttpServer[Session] | None = None

    def watch_disk(self) -> None:
        """Logs when the disk has become nearly full."""
        self._page.watch_disk()

    @property
    def served(self) -> Application[Session]:
        """What the server has now: `app`, or what refuses most verbs in its place."""
        if self._standby is not None and not self.replica.serves:
            return self._standby
        lagging = self._lagging_app
        return self._serving if lagging is None or not lagging.why else self._lagging

    def serve_on(self, server: HttpServer[Session]) -> None:
        """`server` serves `served`. It is named to `/status`, which counts its connections."""
        self._page.server = self._server = server

    def show(self) -> None:
        """The server has what is `served` from now on; requests that have begun go on."""
        if self._server is not None:
            self._server.replace_app(self.served, None)

    def stand_by(self, spare: Container[object]) -> None:
        """This host serves no more. Requests in flight are answered, but those of the tasks `spare`: they may have been
        carried out.
        """
        if self._server is not None:
            self._server.replace_app(self.served, refusal_response(INTERRUPTED), spare)
        self.keks.interrupt()

    async def take_over(self) -> None:
        """The first change of a member that is about to serve. Raises as `RootRemoval.take_over`."""
        await self.keks.stop()
        log_dir, unlocked = self._data.log.directory, self.vault.unlocked
        oldest = await in_worker(self.workers.lookup, partial(oldest_audit_key, log_dir, unlocked))
        await self.removal.take_over(self._data.slot.slot_id, oldest=oldest)
        self.keks.resume()

    async def watch_lag(self) -> None:
        """Refuses verbs while the auditor lags, until it is cancelled. Without a bound it returns."""
        while self._lagging_app is not None:
            await asyncio.sleep(LAG_CHECK_SECONDS)
            self._check_lag()

    def _check_lag(self) -> None:
        server, lagging = self._server, self._lagging_app
        if server is None or lagging is None or server.app is (app := self.served):
            return
        server.replace_app(app, None)
        why = lagging.why
        logger = Log()
        logger.warning("refusing requests" if why else "serving again", why=why or "the auditor has caught up")

    async def begin(self, events: Sequence[Event]) -> None:
        """Writes the first lines of this run, durably, and logs what the replay of the journal could not read. Raises
        StartError when they can't be written.
        """
        logger = Log()
        if damaged := self._data.replayed.damaged:
            logger.warning("journal damaged", records=damaged, do="run minikms doctor")
        if why := self._data.why_no_index:
            logger.warning("key index not used: every key file is read first", why=why)
        *before, last = events
        for event in before:
            self.audit.add(event)
        with written_at_start(os.path.join(self._data.log.directory, LOG_NAME)):
            await self.audit.add_written(last, durable=True)

    async def go_on(self) -> None:
        """Goes on with what an earlier run left to do; on a standby, when it takes over."""
        if not self.replica.serves:
            return
        await self.keks.drop_replaced_roots()
        self.keks.ensure_running()

    def epoch_facts(self) -> dict[str, str | int]:
        """For a line about the opening of the keyring: with it, no older keyring is accepted."""
        body = self.vault.keyring.body
        facts: dict[str, str | int] = {"epoch": body.epoch, "kek_version": body.wrapping_kek.version}
        if self._data.seen_epoch > self._data.found_epoch:
            facts |= {"restore_accepted": self._data.found_epoch, "epoch_before": self._data.seen_epoch}
        replayed = self._data.replayed
        if replayed != Replayed():
            facts |= {
                "files_completed": replayed.written,
                "journal_damaged": replayed.damaged,
            }
        return facts

    async def end(self, why: str) -> None:
        """The last line of this run. Raises AuditUnavailableError."""
        facts: dict[str, str | int] = {"epoch": self.vault.keyring.body.epoch}
        await self.audit.add_written(
            Event(type="stop", actor="minikms", pid=os.getpid(), detail=why, facts=facts), durable=True
        )

    @property
    def audit_writable(self) -> bool:
        return self._data.log.writable

    @property
    def audit_head(self) -> LineRef:
        """The last line of the audit log."""
        return self._data.log.writer.head

    def seal(self) -> None:
        """Zeroes the keys and interrupts what uses them, now. Then `abandon`."""
        self.keks.interrupt()
        self.audit.seal()
        self.vault.seal()

    async def abandon(self) -> None:
        """Waits for what is on its way to disk, and closes the files as after a crash. After `seal`."""
        try:
            await self.keks.stop()
            await self.removal.stop()
            await self.vault.drain()
            loop = asyncio.get_running_loop()
            for worker in (self.workers.disk, self.workers.reader, self.workers.audit, self.workers.upkeep):
                await loop.run_in_executor(worker, int)
        finally:
            self._data.abandon()

    async def close(self) -> None:
        """Waits for what is on its way to disk, closes the files and zeroes the keys. Raises AuditUnavailableError."""
        await self.keks.stop()
        await self.removal.stop()
        await self.vault.drain()
        loop = asyncio.get_running_loop()
        for worker in (self.workers.disk, self.workers.reader, self.workers.upkeep):
            await loop.run_in_executor(worker, int)  # after the last job, also one of a request that was cancelled
        try:
            self._data.keep_index()
        except StorageUnavailableError as error:
            logger = Log()
            logger.warning("key index not kept: the next start reads every key file first", why=str(error))
        finally:
            self._data.close()


@contextlib.contextmanager
def on_one_cpu(thread_ids: Sequence[int]) -> Iterator[None]:
    """Keeps these threads (kernel thread ids) of this process on the processor that the caller runs on now.

    Why: a worker that makes many short system calls beside a busy event loop asks for the interpreter after each of
    them. On two processors the two threads compete for it, and rewrapping a key takes more than twice as long as on
    one. Each thread gets its affinity back at the end, which must come soon: the scheduler knows better in the long
    run. Where the system has no affinity or refuses it (systemd's `@resources`), nothing changes.
    """
    before: dict[int, set[int]] = {}
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not Linux
        current = libc.library().sched_getcpu()
        for thread_id in thread_ids:
            before[thread_id] = os.sched_getaffinity(thread_id)
            os.sched_setaffinity(thread_id, {current})
    try:
        yield
    finally:
        for thread_id, affinity in before.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread_id, affinity)


def _one_cpu_for(*workers: ThreadPoolExecutor) -> Callable[[], AbstractContextManager[None]]:
    """`on_one_cpu` for this thread and those of the workers."""
    thread_ids = [threading.get_native_id(), *(worker.submit(threading.get_native_id).result() for worker in workers)]
    return lambda: on_one_cpu(thread_ids)


def _root_rewriter(
    settings: Settings, arena: SecretArena, workers: Workers
) -> Callable[[SecretSlot], asyncio.Future[None]] | None:
    file = settings.root
    if not isinstance(file, KeyFile) or not file.rewritable:
        return None
    return lambda root: asyncio.ensure_future(replace_key(file.path, root, arena, workers.disk))
