"""A process that serves, from the start of its event loop to its stop.

Owns: which signals stop it, what the service manager hears, and the lines of the log that all processes write.
Invariant: the first reason to stop is the one that is logged. It must never close what the process has opened.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Final

from minikms.memory import SignalReader
from minikms.platform.accepting import ACCEPT_PAUSE_SECONDS
from minikms.platform.logs import Log
from minikms.platform.notify import Notifier

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

    def internal_error(self, what: str) -> None:
        self.log.error("internal error", what=what)

    def _on_signal(self) -> None:
        for number in self._signals.read():
            if number in _STOP_SIGNALS:
                self.stop(signal.Signals(number).name)
            elif number == signal.SIGHUP:
                self.hangup.set()


async def every(seconds: float, chore: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        chore()
