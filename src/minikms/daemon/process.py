"""The process of the daemon: start, background work, and stop.

Owns the order of the start, in which each step is a precondition of the next: raise the limit of open files, block
signals, lock the data directory, bind the socket, make the arena, harden the process (it has one thread until here),
open the data directory (`minikms.datadir`), write the `start` line of the audit log, serve. And the order of the stop:
accept no more connections, interrupt a rotation, finish the requests in flight, close the files, zero the keys, release
the lock. It must never serve before the epoch of this start is durable, or after the audit log is closed.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Final

import structlog
import uvloop

from minikms.audit.log import FSYNC_INTERVAL_MS
from minikms.custody.backup.register import ArchiveRegister
from minikms.custody.files import DataDirLock, sweep_temps
from minikms.daemon.accepting import (
    ACCEPT_PAUSE_SECONDS,
    Acceptor,
    bound_warning,
    connections_bound,
    raise_descriptor_limit,
)
from minikms.daemon.parts import Parts, Workers
from minikms.daemon.settings import Settings
from minikms.daemon.sockets import UnixListener, listen
from minikms.datadir import KEYRING_SLOTS, lock_data_dir, open_for_service
from minikms.errors import MiniKmsError
from minikms.memory.arena import SecretArena
from minikms.memory.process import Measure, harden, interpreter_paths
from minikms.memory.signals import SignalReader
from minikms.notify import Notifier
from minikms.policy import Policy

DRAIN_SECONDS_MAX: Final = 10.0
HOUSEKEEPING_SECONDS: Final = 1.0
UPKEEP_SECONDS: Final = 2.0
CHORE_RETRY_SECONDS: Final = 1.0
GC_THRESHOLDS: Final = (100_000, 20, 50)
"""The daemon makes almost no reference cycles; with Python's default, collections take a tenth of its time under load.
"""
SWITCH_SECONDS: Final = 0.001
"""How long a thread keeps the interpreter while another thread waits for it. Worker threads make many short calls, and
under load wait so long after each of them; Python's default is 5 ms.
"""

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def run(settings: Settings) -> None:
    """Serves until SIGTERM, SIGINT, SIGQUIT, or the end of the parent. Raises StartError, saying why it can't start and
    what to do.
    """
    log = _logger(settings)
    notifier = Notifier(os.environ)
    policy = Policy(settings.allowed_uids, settings.admin_uids)
    connections_max = connections_bound(raise_descriptor_limit())
    too_few = bound_warning(connections_max)
    if too_few is not None:
        log.warning("fewer connections than promised", why=too_few)
    with (
        SignalReader() as signals,
        lock_data_dir(settings.data_dir) as lock,
        listen(settings.socket, os.environ, mode=settings.socket_mode, group=settings.socket_group) as listener,
        SecretArena(settings.opening.cache_keys_max + KEYRING_SLOTS) as arena,
    ):
        measures = _harden(settings, arena, listener)
        daemon = Daemon(
            settings=settings,
            policy=policy,
            lock=lock,
            listener=listener,
            arena=arena,
            measures=measures,
            connections_max=connections_max,
            signals=signals,
            notifier=notifier,
            log=log,
        )
        sys.setswitchinterval(SWITCH_SECONDS)
        uvloop.run(daemon.serve())


class Daemon:
    """One run of the service. Made and used in the loop's thread."""

    def __init__(
        self,
        *,
        settings: Settings,
        policy: Policy,
        lock: DataDirLock,
        listener: UnixListener,
        arena: SecretArena,
        measures: tuple[Measure, ...],
        connections_max: int,
        signals: SignalReader,
        notifier: Notifier,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._lock = lock
        self._listener = listener
        self._arena = arena
        self._measures = measures
        self._connections_max = connections_max
        self._signals = signals
        self._notifier = notifier
        self._log = log
        self._stopping = asyncio.Event()
        self._why = ""

    async def serve(self) -> None:
        workers = Workers.start()
        try:
            parts = Parts(
                settings=self._settings,
                policy=self._policy,
                data=open_for_service(
                    self._lock,
                    self._settings.root,
                    arena=self._arena,
                    disk=workers.disk,
                    journal=workers.journal,
                    options=self._settings.opening,
                ),
                workers=workers,
                arena=self._arena,
                measures=self._measures,
                connections_max=self._connections_max,
                on_internal_error=self._internal_error,
            )
            try:
                await parts.begin()
                await self._serve_until_stopped(parts, workers)
                await parts.end(self._why)
            except MiniKmsError as error:
                if not self._why:  # the start has failed
                    raise
                self._log.error("stop not audited", why=str(error))
            finally:
                await self._close(parts)
        finally:
            workers.shutdown()
        self._log.info("stopped", why=self._why)

    async def _close(self, parts: Parts) -> None:
        try:
            await parts.close()
        except MiniKmsError as error:
            self._log.error("audit log not signed at its end", why=str(error))

    async def _serve_until_stopped(self, parts: Parts, workers: Workers) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._signals.fileno(), self._on_signal)
        if self._settings.parent_fd is not None:
            os.set_blocking(self._settings.parent_fd, False)
            loop.add_reader(self._settings.parent_fd, self._on_parent)
        acceptor = Acceptor(self._listener.socket, parts.server, on_failure=self._accept_failed)
        chores = [asyncio.ensure_future(self._keep(chore)) for chore in self._chores(parts, workers)]
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self._log.info("serving", socket=self._settings.socket, data_dir=self._settings.data_dir)
        self._notifier.ready(f"serving on {self._settings.socket}")
        await self._stopping.wait()
        self._notifier.stopping()
        acceptor.close()
        self._listener.close()
        await parts.keks.stop()
        await parts.server.drain(DRAIN_SECONDS_MAX)
        for chore in chores:
            chore.cancel()
        await asyncio.wait(chores)

    def _chores(self, parts: Parts, workers: Workers) -> list[Callable[[], Awaitable[None]]]:
        """The background work; each coroutine returns when it has nothing more to do."""
        loop = asyncio.get_running_loop()

        async def work() -> None:
            while True:
                await asyncio.sleep(UPKEEP_SECONDS)
                await loop.run_in_executor(workers.upkeep, parts.upkeep.work)

        chores: list[Callable[[], Awaitable[None]]] = [
            lambda: parts.audit.sync_every(FSYNC_INTERVAL_MS / 1000),
            lambda: parts.app.flush_refusals_every(HOUSEKEEPING_SECONDS),
            lambda: _every(HOUSEKEEPING_SECONDS, parts.vault.expire),
            lambda: _every(HOUSEKEEPING_SECONDS, parts.upkeep.tick),
            lambda: self._sweep_temps(parts, workers.reader),
            parts.indexing.run,
            work,
        ]
        watchdog_seconds = self._notifier.watchdog_interval_s
        if watchdog_seconds is not None:
            chores.append(lambda: _every(watchdog_seconds, self._notifier.watchdog))
        return chores

    async def _keep(self, chore: Callable[[], Awaitable[None]]) -> None:
        """Runs a chore to its end. A failure is a defect: it is reported, and the chore begins again."""
        while True:
            try:
                await chore()
                return
            except Exception as error:  # noqa: BLE001  after any defect keys must still expire and lines be synced
                self._internal_error(f"{type(error).__name__} in a chore")
                await asyncio.sleep(CHORE_RETRY_SECONDS)

    async def _sweep_temps(self, parts: Parts, reader: Executor) -> None:
        """Removes the temporary files of earlier processes; those that can't be removed stay for the next start."""
        loop = asyncio.get_running_loop()
        directories = (
            self._lock.directory_fd,
            parts.vault.store.directory_fd,
            parts.vault.rotation_backups.directory_fd,
        )
        sweeps: list[Callable[[], object]] = [functools.partial(sweep_temps, directory) for directory in directories]
        sweeps.append(ArchiveRegister(self._lock.directory).sweep_temps)
        for sweep in sweeps:
            try:
                await loop.run_in_executor(reader, sweep)
            except MiniKmsError as error:
                self._log.warning("temporary files stay", why=str(error))

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

    def _accept_failed(self, why: str) -> None:
        self._log.warning("accept failed", why=why, pause_seconds=ACCEPT_PAUSE_SECONDS)

    def _internal_error(self, what: str) -> None:
        self._log.error("internal error", what=what)


async def _every(seconds: float, chore: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        chore()


def _harden(settings: Settings, arena: SecretArena, listener: UnixListener) -> tuple[Measure, ...]:
    read = [*interpreter_paths(), *settings.root.read_paths]
    write = [settings.data_dir, *settings.root.write_paths]
    if not listener.activated:
        write.append(os.path.dirname(os.path.abspath(settings.socket)))
    if settings.forwarder is not None:
        write += settings.forwarder.write_paths
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
