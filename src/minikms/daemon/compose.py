"""The daemon's composition: what is made in which order, what runs, and how it ends.

Owns: start and stop. Order of the start, each step a precondition of the next: signals blocked, data directory
locked, socket bound, arena made, files opened, process hardened (one thread until here), root key read and released,
audit log, epoch, then requests. Stop: no new connections, what is in flight is finished, files closed, keys zeroed,
lock given up last. It must never serve before the epoch of this start is durable, and never after the audit log is
closed.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final

import structlog
import uvloop

from minikms.audit import AuditLog, Event, Upkeep
from minikms.audit.forward import FileForwarder
from minikms.audit.keyversions import keys_of
from minikms.audit.opening import Known
from minikms.crypto.aead import NonceSource, scrub_stack
from minikms.custody import backups, clock, dekstore, opening
from minikms.custody.atomic import sweep_temps
from minikms.custody.backups import BackupStore
from minikms.custody.indexing import Indexing
from minikms.custody.keyringfile import KeyringFile
from minikms.custody.leases import Leases
from minikms.custody.leasestore import LeaseStore
from minikms.custody.lock import DataDirLock, make_private_directory
from minikms.custody.roots import rewrite_key_file
from minikms.custody.rotation import KekRotation
from minikms.custody.vault import CACHE_KEYS_MAX, Vault
from minikms.daemon.application import Application, Session
from minikms.daemon.auditing import TurnAudit
from minikms.daemon.http import HttpServer
from minikms.daemon.notify import Notifier
from minikms.daemon.settings import Settings
from minikms.daemon.sockets import BACKLOG_COUNT, UnixListener, listen
from minikms.daemon.statuspage import StatusPage
from minikms.errors import MiniKmsError
from minikms.issuing import KeyIssuing
from minikms.lifecycle import KeyLifecycle
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.memory.process import Measure, harden, interpreter_paths, name_thread
from minikms.memory.signals import SignalReader
from minikms.policy import Policy
from minikms.service import KeyService

DRAIN_SECONDS_MAX: Final = 10.0
AUDIT_SYNC_SECONDS: Final = 0.1
HOUSEKEEPING_SECONDS: Final = 1.0
UPKEEP_SECONDS: Final = 2
KEYRING_SLOTS: Final = 256
"""Arena slots beside the cached DEKs: keyring key, KEK versions, audit keys, keys being made or rewrapped."""
GC_THRESHOLDS: Final = (100_000, 20, 50)
"""Almost nothing here makes cycles; with the default, collections cost a tenth of the daemon's time under load."""

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def run(settings: Settings) -> None:
    """Serves until SIGTERM, SIGINT, or the parent's end. Raises StartError, saying why it can't and what to do."""
    log = _logger(settings)
    notifier = Notifier(os.environ)
    with SignalReader() as signals, DataDirLock(settings.data_dir) as lock:
        for name in (dekstore.DIRECTORY, backups.DIRECTORY):
            make_private_directory(os.path.join(settings.data_dir, name))
        with (
            listen(settings.socket, os.environ, mode=settings.socket_mode, group=settings.socket_group) as listener,
            SecretArena((settings.cache_keys_max or CACHE_KEYS_MAX) + KEYRING_SLOTS) as arena,
        ):
            measures = _harden(settings, arena, listener)
            daemon = Daemon(
                settings=settings,
                lock=lock,
                listener=listener,
                arena=arena,
                measures=measures,
                signals=signals,
                notifier=notifier,
                log=log,
            )
            uvloop.run(daemon.serve())


class Daemon:
    """One run of the service. Made and used in the loop's thread."""

    def __init__(
        self,
        *,
        settings: Settings,
        lock: DataDirLock,
        listener: UnixListener,
        arena: SecretArena,
        measures: tuple[Measure, ...],
        signals: SignalReader,
        notifier: Notifier,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._settings = settings
        self._lock = lock
        self._listener = listener
        self._arena = arena
        self._measures = measures
        self._signals = signals
        self._notifier = notifier
        self._log = log
        self._stopping = asyncio.Event()
        self._why = ""

    async def serve(self) -> None:
        settings = self._settings
        # One thread a kind of disk work: none waits behind another's fsync, and each does one thing at a time.
        disk, journal, audit, keeper = (_worker(name) for name in ("disk", "journal", "audit", "upkeep"))
        nonces = NonceSource()
        keyring_file = KeyringFile(self._lock.directory_fd, disk)
        opened = opening.open_keyring(
            data_dir=settings.data_dir,
            file=keyring_file,
            source=self._root_source(),
            arena=self._arena,
            nonces=nonces,
        )
        unlocked = opened.unlocked
        audit_key = unlocked.body.audit_key
        mac_key, seed = unlocked.audit_key(audit_key.version)
        log = AuditLog.open(
            settings.data_dir,
            audit_key=mac_key,
            seed=seed,
            now_ns=clock.now_ns,
            fsync=settings.audit_fsync,
            key_version=audit_key.version,
            former=keys_of(unlocked).former,
            known=Known(begun=unlocked.body.epoch > 1),
            accept_loss=settings.accept_audit_loss,
            hash_thread_ids=settings.audit_hash_thread_ids,
            limits=settings.audit_limits,
        )
        opening.raise_epoch(unlocked, keyring_file)
        store = dekstore.DekStore(settings.data_dir, disk)
        lease_store = LeaseStore.open(self._lock.directory_fd, create=opened.made or unlocked.body.epoch <= 2)
        leases = Leases(lease_store, journal)
        backup_store = BackupStore(settings.data_dir)
        vault = Vault(
            arena=self._arena,
            unlocked=unlocked,
            keyring_file=keyring_file,
            store=store,
            backups=backup_store,
            leases=leases,
            executor=disk,
            nonces=nonces,
            cache_keys_max=settings.cache_keys_max or CACHE_KEYS_MAX,
        )
        turn_audit = TurnAudit(log, audit)
        upkeep = Upkeep(
            log,
            keep=settings.audit_keep,
            forwarder=None if settings.audit_copy is None else FileForwarder(settings.audit_copy),
        )
        indexing = Indexing(vault, vault.index, disk)
        rotation = KekRotation(vault, backup_store, indexing, disk)
        lifecycle = KeyLifecycle(
            vault=vault,
            audit=turn_audit,
            rotation=rotation,
            indexing=indexing,
            executor=disk,
            opened_slot_id=opened.slot.slot_id,
            rewrite_root=self._root_rewriter(),
        )
        page = StatusPage(
            settings=settings,
            opened=opened,
            vault=vault,
            log=log,
            upkeep=upkeep,
            measures=self._measures,
            rotation=rotation,
            indexing=indexing,
            lifecycle=lifecycle,
        )
        service = KeyService(vault, turn_audit)
        issuing = KeyIssuing(vault, turn_audit, page.build)
        policy = Policy(settings.allowed_uids, settings.admin_uids)
        app = Application(
            service=service,
            issuing=issuing,
            lifecycle=lifecycle,
            policy=policy,
            audit=turn_audit,
            vault=vault,
        )
        server: HttpServer[Session] = HttpServer(
            app, loop=asyncio.get_running_loop(), on_internal_error=self._internal_error
        )
        page.server = server
        keeping = asyncio.ensure_future(_keep_up(upkeep, keeper))
        try:
            await turn_audit.add_written(
                Event(
                    type="start",
                    actor="minikms",
                    pid=os.getpid(),
                    facts={"epoch": unlocked.body.epoch, "kek_version": unlocked.body.wrapping_kek.version},
                ),
                durable=True,
            )
            await lifecycle.drop_proved_slots()
            lifecycle.ensure_rotating()
            await self._serve_until_stopped(
                server=server, app=app, audit=turn_audit, vault=vault, indexing=indexing, disk=disk
            )
            await lifecycle.stop()
            await self._write_stop(turn_audit)
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
            await store.drain()
            await leases.drain()
            log.close()
            vault.close()
            lease_store.close()
            store.close()
            backup_store.close()
            scrub_stack()
            for executor in (disk, journal, audit, keeper):
                executor.shutdown()
            upkeep.close()
        self._log.info("stopped", why=self._why)

    async def _serve_until_stopped(
        self,
        *,
        server: HttpServer[Session],
        app: Application,
        audit: TurnAudit,
        vault: Vault,
        indexing: Indexing,
        disk: Executor,
    ) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._signals.fileno(), self._on_signal)
        if self._settings.parent_fd is not None:
            os.set_blocking(self._settings.parent_fd, False)
            loop.add_reader(self._settings.parent_fd, self._on_parent)
        listening = await loop.create_unix_server(
            server.protocol_factory, sock=self._listener.socket, backlog=BACKLOG_COUNT
        )
        chores = [
            asyncio.ensure_future(audit.sync_every(AUDIT_SYNC_SECONDS)),
            asyncio.ensure_future(app.flush_refusals_every(HOUSEKEEPING_SECONDS)),
            asyncio.ensure_future(_every(HOUSEKEEPING_SECONDS, vault.expire)),
            asyncio.ensure_future(self._sweep_temps(vault, disk)),
            asyncio.ensure_future(indexing.run()),
        ]
        if self._notifier.watchdog_interval_s is not None:
            chores.append(asyncio.ensure_future(_every(self._notifier.watchdog_interval_s, self._notifier.watchdog)))
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self._log.info("serving", socket=self._settings.socket, data_dir=self._settings.data_dir)
        self._notifier.ready(f"serving on {self._settings.socket}")
        await self._stopping.wait()
        self._notifier.stopping()
        listening.close()
        self._listener.close()
        await server.drain(DRAIN_SECONDS_MAX)
        for chore in chores:
            chore.cancel()
        await asyncio.wait(chores)

    async def _sweep_temps(self, vault: Vault, disk: Executor) -> None:
        """Removes what an earlier process left half-written; what can't be removed now stays for the next start."""
        loop = asyncio.get_running_loop()
        for directory_fd in (self._lock.directory_fd, vault.store.directory_fd, vault.backups.directory_fd):
            try:
                await loop.run_in_executor(disk, sweep_temps, directory_fd)
            except MiniKmsError as error:
                self._log.warning("temporary files stay", why=str(error))

    async def _write_stop(self, audit: TurnAudit) -> None:
        try:
            await audit.add_written(
                Event(type="stop", actor="minikms", pid=os.getpid(), detail=self._why), durable=True
            )
        except MiniKmsError as error:
            self._log.error("stop not audited", why=str(error))

    def _root_source(self) -> opening.RootSource:
        settings = self._settings
        given = settings.master_key_file is not None or settings.master_key_fd is not None
        return opening.RootSource(
            file=settings.master_key_file,
            descriptor=settings.master_key_fd,
            dev_file=settings.dev_key_file if settings.dev and not given else None,
        )

    def _root_rewriter(self) -> Callable[[SecretSlot], None] | None:
        path = self._settings.master_key_file
        if not self._settings.rewrite_master_key_file or path is None:
            return None
        return lambda root: rewrite_key_file(path, root, self._arena)

    def _on_signal(self) -> None:
        for number in self._signals.read():
            if number in _STOP_SIGNALS:
                self._stop(signal.Signals(number).name)

    def _on_parent(self) -> None:
        descriptor = self._settings.parent_fd
        if descriptor is None:
            return
        try:
            ended = os.read(descriptor, 4096) == b""
        except BlockingIOError:
            return
        if ended:
            asyncio.get_running_loop().remove_reader(descriptor)
            self._stop("the parent has ended")

    def _stop(self, why: str) -> None:
        if not self._stopping.is_set():
            self._why = why
            self._stopping.set()

    def _internal_error(self, what: str) -> None:
        self._log.error("internal error", what=what)


def _worker(name: str) -> ThreadPoolExecutor:
    """One thread, there from now on: a process short of threads refuses to start and not to serve."""
    executor = ThreadPoolExecutor(1, initializer=name_thread, initargs=(name,))
    executor.submit(int).result()
    return executor


async def _every(seconds: float, chore: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        chore()


async def _keep_up(upkeep: Upkeep, executor: Executor) -> None:
    """The audit log's chores: the short ones here once a second, the long ones in a thread of their own."""
    loop = asyncio.get_running_loop()
    working = None
    for second in itertools.count():
        await asyncio.sleep(HOUSEKEEPING_SECONDS)
        upkeep.tick()
        if second % UPKEEP_SECONDS == 0 and (working is None or working.done()):
            working = loop.run_in_executor(executor, upkeep.work)


def _harden(settings: Settings, arena: SecretArena, listener: UnixListener) -> tuple[Measure, ...]:
    read = interpreter_paths()
    write = [settings.data_dir, os.path.dirname(os.path.abspath(settings.socket))]
    if settings.master_key_file is not None:
        read.append(str(settings.master_key_file))
        if settings.rewrite_master_key_file:
            write.append(str(settings.master_key_file.parent))
    elif settings.dev:
        write.append(str(settings.dev_key_file.parent))
    if listener.activated:
        write.pop(1)
    if settings.audit_copy is not None:
        write.append(os.path.dirname(settings.audit_copy))
    return harden(arena, read=read, write=write, require=settings.require_hardening)


def _logger(settings: Settings) -> structlog.stdlib.BoundLogger:
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logger: structlog.stdlib.BoundLogger = structlog.get_logger("minikms", started_at=time.time_ns() // 1_000_000_000)
    return logger
