"""The process of the replicator: start, loops, and stop.

Owns the order of the start: read the configuration, bind the listener, harden the process (it has one thread until
here), run. Invariants: the hardened process writes no file; a stop asks the daemon nothing more, so that its lease
ends. It must never connect before the process is hardened.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import uvloop

from minikms.api.errors import KmsError
from minikms.client import AsyncClient
from minikms.memory import SignalReader
from minikms.platform.clock import boot_ns
from minikms.platform.logs import service_logger
from minikms.processes.config_file import address
from minikms.processes.helper import HelperRun, listen_tcp, run_hardened
from minikms.processes.postgresql import FAILURES
from minikms_replicator.config import Config, Files
from minikms_replicator.following import Follower, ReplicaClient
from minikms_replicator.metrics import Figures, ReplicatorCollector
from minikms_replicator.serving import PAUSE_S, Server
from minikms_replicator.tables import RenewedLease, Tables, TablesError

POLL_S: Final = 0.5
"""Between two steps of a member that does not serve."""
FAILED_S: Final = 2.0
"""After a step that failed."""
DAEMON_S_MAX: Final = 60.0
"""For the daemon to apply one part of what it follows."""


def run(config_path: Path, log_format: str, *, require_hardening: bool) -> None:
    """Run until SIGTERM, SIGINT or SIGQUIT. Raises StartError, saying why it can't start and what to do."""
    log = service_logger(log_format)
    config = Files(config_path).config()
    with ExitStack() as cleaning:
        signals = cleaning.enter_context(SignalReader())
        listener = cleaning.enter_context(listen_tcp(*address(config.metrics))) if config.metrics else None
        read = ["/etc/passwd", *config.database.paths]
        process = run_hardened(log, signals, read=read, network=True, require=require_hardening)
        uvloop.run(_serve(config, process, listener))


async def _serve(config: Config, run: HelperRun, listener: socket.socket | None) -> None:
    run.read_signals()
    async with AsyncClient(
        config.socket, server_uids=config.server_uids, timeout_s=DAEMON_S_MAX, wait_s=0
    ) as daemon:  # fmt: skip
        replicator = Replicator(config, run, daemon)
        async with run.metrics(listener, ReplicatorCollector(replicator.figures), "minikms_replicator_build_info"):
            tasks = [asyncio.ensure_future(run.watchdog()), asyncio.ensure_future(replicator.work())]
            await run.until_stopped("follows")
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    run.log.info("stopped", why=run.why)


class Replicator:
    """One run. Used in the loop's thread."""

    def __init__(self, config: Config, run: HelperRun, daemon: ReplicaClient) -> None:
        self._run = run
        self._tables = Tables(config.database.url, single_node=config.database.single_node)
        self._follower = Follower(self._tables, daemon)
        self._server = Server(self._tables, daemon, self._failed)
        self._serving = False
        self._failures = 0
        self._said: dict[str, str] = {}

    def figures(self) -> Figures:
        tables = self._tables
        confirmed_s = (boot_ns() - tables.confirmed_ns) / 1e9 if tables.confirmed_ns else None
        return Figures(self._serving, tables.commits, tables.commit_ns / 1e9, self._failures, confirmed_s)

    async def work(self) -> None:
        """Until it is cancelled. A defect ends the process: the service manager starts it again."""
        try:
            await self._work()
        finally:
            self._tables.close()

    async def _work(self) -> None:
        while True:
            try:
                lease = await self._follower.step()
                self._say("follows", self._follower.why)
                pause_s = POLL_S
                if lease is not None:
                    await self._serve(*lease)
                    pause_s = PAUSE_S
            except (KmsError, TablesError, *FAILURES) as error:
                self._failed("step" if isinstance(error, KmsError | TablesError) else "database", error)
                pause_s = FAILED_S
            except Exception as error:  # noqa: BLE001  it must not end unseen
                self._run.internal_error(f"{type(error).__name__} in the loop")
                os._exit(1)
            await asyncio.sleep(pause_s)

    async def _serve(self, member: str, lease: RenewedLease) -> None:
        self._run.log.info("serving", member=member, term=lease.term)
        self._run.notifier.status(f"serves in term {lease.term}")
        self._serving = True
        try:
            await self._server.serve(member, lease)
        finally:
            self._serving = False
            self._run.notifier.status("follows")
            self._run.log.info("serving no more", member=member, term=lease.term)

    def _failed(self, what: str, error: BaseException) -> None:
        self._failures += 1
        self._say(f"{what} failed", str(error) or type(error).__name__)

    def _say(self, event: str, why: str) -> None:
        """Once for each change."""
        if why and self._said.get(event) != why:
            self._run.log.warning(event, why=why)
        self._said[event] = why
