"""A process that serves, from the start of its event loop to its stop.

Owns: which signals stop it, what the service manager hears, and the lines of the log that all processes write.
Invariant: the first reason to stop is the one that is logged. It must never close what the process has opened.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from minikms.http import Application, HttpServer, Limits, S
from minikms.http.accepting import Acceptor
from minikms.http.page import PAGE_LIMITS, metrics_page
from minikms.memory import NETWORK_PATHS, SecretArena, SignalReader, harden, interpreter_paths
from minikms.platform import process_metrics
from minikms.platform.accepting import ACCEPT_PAUSE_SECONDS
from minikms.platform.logs import Log
from minikms.platform.notify import Notifier
from minikms.processes.peer import OVERFLOW_UID_FILE

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

WATCHDOG_SECONDS: Final = 15.0
"""Between two looks, where the service manager sets no time."""
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Run:
    """One run of a process. Used in the loop's thread."""

    def __init__(self, signals: SignalReader, notifier: Notifier, log: Log) -> None:
        self.notifier = notifier
        self.log = log
        self.hangup = asyncio.Event()
        """Set by SIGHUP."""
        self.why = ""
        """Why it stops; empty before that."""
        self._signals = signals
        self._stopping = asyncio.Event()

    def read_signals(self) -> None:
        """From now on a signal has its effect."""
        asyncio.get_running_loop().add_reader(self._signals.fileno(), self._on_signal)

    def stop(self, why: str) -> None:
        self.why = self.why or why
        self._stopping.set()

    async def until_stopped(self, summary: str) -> None:
        """The process is ready: `summary` is what the service manager shows. Returns when it is to stop."""
        self.notifier.ready(summary)
        await self._stopping.wait()
        self.notifier.stopping()

    async def watchdog(self, is_reachable: Callable[[], bool] = lambda: True) -> None:
        """Tells the service manager that the loop turns and clients can connect, until it is cancelled. Logs when they
        no longer can.
        """
        reachable = True
        while True:
            await asyncio.sleep(self.notifier.watchdog_interval_s or WATCHDOG_SECONDS)
            if is_reachable() != reachable:
                reachable = not reachable
                say = self.log.info if reachable else self.log.error
                say("clients can connect again" if reachable else "socket removed: nobody can connect, so restart it")
            if reachable:
                self.notifier.watchdog()

    def accept_failed(self, why: str) -> None:
        self.log.warning("accept failed", why=why, pause_seconds=ACCEPT_PAUSE_SECONDS)

    @asynccontextmanager
    async def metrics(
        self, listener: socket.socket | None, collector: Collector, build_info: str
    ) -> AsyncIterator[None]:
        """Serves them on the listener, if there is one, until the block ends."""
        async with self.serving(listener, metrics_page(collector, build_info), PAGE_LIMITS):
            yield

    @asynccontextmanager
    async def serving(
        self, listener: socket.socket | None, application: Application[S], limits: Limits
    ) -> AsyncIterator[None]:
        """Serves the application on the listener, if there is one, until the block ends."""
        if listener is None:
            yield
            return
        server: HttpServer[S] = HttpServer(
            application, loop=asyncio.get_running_loop(), on_internal_error=self.internal_error, limits=limits
        )
        acceptor = Acceptor(listener, server, on_failure=self.accept_failed)
        yield
        acceptor.close()
        await server.drain(0)

    def internal_error(self, what: str) -> None:
        self.log.error("internal error", what=what)

    def _on_signal(self) -> None:
        for number in self._signals.read():
            if number in _STOP_SIGNALS:
                self.stop(signal.Signals(number).name)
            elif number == signal.SIGHUP:
                self.hangup.set()


def run_hardened(
    log: Log,
    signals: SignalReader,
    arena: SecretArena | None = None,
    *,
    read: Sequence[str],
    write: Sequence[str] = (),
    network: bool,
    require: bool,
) -> Run:
    """Hardens this process, which reads and writes only these paths then. Logs the measures that are not in force."""
    notifier = Notifier(os.environ)
    process_metrics.open_process_files()
    read = [*interpreter_paths(), OVERFLOW_UID_FILE, *(NETWORK_PATHS if network else ()), *read]
    for measure in harden(arena, read=read, write=write, allow_network=network, require=require):
        if not measure.in_force:
            log.warning("hardening measure not in force", measure=measure.name, why=measure.why)
    return Run(signals, notifier, log)


async def every(seconds: float, chore: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        chore()
