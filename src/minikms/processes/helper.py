"""A helper process that serves: what it has beside `minikms.processes.running`.

Owns: its hardened start, and its small servers. It must never close what the process has opened.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from minikms.api.errors import StartLaterError
from minikms.http import Application, HttpServer, Limits, S
from minikms.http.accepting import BACKLOG_COUNT, Acceptor
from minikms.http.page import PAGE_LIMITS, metrics_page
from minikms.memory import NETWORK_PATHS, SecretArena, SignalReader, harden, interpreter_paths
from minikms.platform import process_metrics
from minikms.platform.logs import Log
from minikms.platform.notify import Notifier
from minikms.processes.peer import OVERFLOW_UID_FILE
from minikms.processes.running import Run

if TYPE_CHECKING:
    from prometheus_client.registry import Collector


class HelperRun(Run):
    """One run of a helper process. Used in the loop's thread."""

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


def run_hardened(
    log: Log,
    signals: SignalReader,
    arena: SecretArena | None = None,
    *,
    read: Sequence[str],
    write: Sequence[str] = (),
    network: bool,
    require: bool,
) -> HelperRun:
    """Hardens this process, which reads and writes only these paths then. Logs the measures that are not in force."""
    notifier = Notifier(os.environ)
    process_metrics.open_process_files()
    read = [*interpreter_paths(), OVERFLOW_UID_FILE, *(NETWORK_PATHS if network else ()), *read]
    for measure in harden(arena, read=read, write=write, allow_network=network, require=require):
        if not measure.in_force:
            log.warning("hardening measure not in force", measure=measure.name, why=measure.why)
    return HelperRun(signals, notifier, log)


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening, non-blocking socket. Raises StartError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG_COUNT)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise StartLaterError(f"can't listen on {host}, port {port}: {error.strerror}") from None
    return listener
