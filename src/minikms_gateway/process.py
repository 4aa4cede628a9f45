"""The process of the gateway: start, changed files, and stop.

Owns the order of the start: read the configuration and all that it names, bind the sockets, harden the process (it has
one thread until here, and has read its private key), serve. And of the stop: accept no more connections, end
handshakes, finish the requests in flight, close the connections to the key service. Invariants: changed files are
taken up as a whole or not at all: if one of them is not valid, everything stays as it was, and log and metrics say so;
without a network issuer and without traces the hardened process can open no socket but Unix sockets. It must never
serve before it is hardened.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import uvloop

from minikms.api.errors import StartError
from minikms.http import LIMITS, HttpServer
from minikms.http.accepting import DESCRIPTORS_COUNT, Acceptor, connections_bound
from minikms.http.tls import HANDSHAKES_COUNT_MAX, TlsServer
from minikms.memory import SignalReader
from minikms.platform.accepting import raise_descriptor_limit
from minikms.platform.logs import service_logger
from minikms.platform.trusted_file import directory_read
from minikms.processes.config_file import address
from minikms.processes.helper import HelperRun, listen_tcp, run_hardened
from minikms.processes.running import every
from minikms.processes.tracing import Tracing, from_environment, is_wanted
from minikms_gateway import metrics
from minikms_gateway.application import Gateway, GatewaySession, GatewayState
from minikms_gateway.certificates import CertificateTrust, server_context
from minikms_gateway.config import Config, GatewayFiles
from minikms_gateway.reasons import ADVICE, LINE_SECONDS, Refusals, of_handshake
from minikms_gateway.upstream import CONNECTIONS_MAX, SWEEP_SECONDS, Upstream

if TYPE_CHECKING:
    from minikms_gateway.issuers import Issuers

DRAIN_SECONDS_MAX: Final = 10.0
POLL_SECONDS: Final = 1.0
"""Between two looks at the files."""
EXPIRED_SECONDS: Final = 60.0
"""Between two lines that say that the gateway's own certificate has expired."""

Signature = tuple[tuple[int, int, int, int] | None, ...]


class GatewaySetup(NamedTuple):
    """All files of one configuration, read and valid. `signature`: of before they were read."""

    config: Config
    trust: CertificateTrust
    issuers: Issuers | None
    context: ssl.SSLContext
    certificate_until: float
    signature: Signature

    def has_expired(self) -> bool:
        """Whether the gateway's own certificate has."""
        return time.time() >= self.certificate_until

    def check_certificate(self) -> None:
        """Before a start. Raises StartError."""
        if self.has_expired():
            raise StartError(f"the certificate {self.config.tls.cert} has expired, so no client would accept it")


class Loader:
    """Reads the configuration and everything that it names."""

    def __init__(self, path: Path, log: Callable[[str, str], None]) -> None:
        """`log` gets an issuer and why its keys could not be fetched."""
        self.files = GatewayFiles(path)
        self._log = log

    def load(self) -> GatewaySetup:
        """Blocks on the disk. Raises StartError."""
        signature = self.signature(self.files.config())
        config = self.files.config()  # once more: what changes from here on has another signature
        trust = CertificateTrust(config, self.files)
        context, until = server_context(config, self.files, trust)
        return GatewaySetup(config, trust, self._issuers(config), context, until, signature)

    def signature(self, config: Config) -> Signature:
        """Changes when a file that `config` or the configuration on the disk names does, or the latter itself. Blocks
        on the disk.
        """
        named = self.files.named(config)
        with contextlib.suppress(StartError):
            named += self.files.named(self.files.config())
        states: list[tuple[int, int, int, int] | None] = []
        for path in dict.fromkeys(named):
            try:
                status = path.stat()
                states.append((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
            except OSError:
                states.append(None)
        return tuple(states)

    def load_beside(self, running: GatewaySetup) -> GatewaySetup:
        """The same for a process that runs with others. A certificate that has expired never replaces one that has not:
        the TLS context of `running` stays then; all else, such as a revocation, is taken up. Raises StartError.
        """
        loaded = self.load()
        if loaded.config.fixed() != running.config.fixed():
            raise StartError(
                "listen, metrics, kms_socket, kms_server_uids, and the first issuer without a jwks_file, need a restart"
            )
        if loaded.has_expired() and not running.has_expired():
            return loaded._replace(context=running.context, certificate_until=running.certificate_until)
        return loaded

    def _issuers(self, config: Config) -> Issuers | None:
        if not config.issuer:
            return None
        from minikms_gateway.issuers import Issuers  # with joserfc, which only tokens need

        return Issuers(config, self.files, log=self._log)


def run(config_path: Path, log_format: str, *, require_hardening: bool) -> None:
    """Serves until SIGTERM, SIGINT or SIGQUIT. Raises StartError, saying why it can't start and what to do."""
    log = service_logger(log_format)
    loader = Loader(config_path, lambda issuer, why: log.warning("issuer's keys not fetched", issuer=issuer, why=why))
    loaded = loader.load()
    loaded.check_certificate()
    config = loaded.config
    others = CONNECTIONS_MAX + HANDSHAKES_COUNT_MAX  # that are open beside the clients'
    descriptors = raise_descriptor_limit(DESCRIPTORS_COUNT + others)
    connections_max = connections_bound(descriptors - min(others, descriptors // 4))
    with ExitStack() as cleaning:
        signals = cleaning.enter_context(SignalReader())
        listener = cleaning.enter_context(listen_tcp(*address(config.listen)))
        metrics_listener = cleaning.enter_context(listen_tcp(*address(config.metrics))) if config.metrics else None
        read = _directories(loader.files, config)
        network = config.fetches_keys or is_wanted(os.environ)
        run = run_hardened(log, signals, read=read, network=network, require=require_hardening)
        process = _GatewayProcess(
            loader,
            loaded,
            listener=listener,
            metrics_listener=metrics_listener,
            connections_max=connections_max,
            run=run,
            tracing=from_environment("minikms-gateway", os.environ),
        )
        uvloop.run(process.serve())


@dataclass(eq=False)
class _GatewayProcess:
    """One run. Used in the loop's thread."""

    loader: Loader
    loaded: GatewaySetup
    listener: socket.socket
    metrics_listener: socket.socket | None
    connections_max: int
    run: HelperRun
    tracing: Tracing | None

    def __post_init__(self) -> None:
        self._log = self.run.log
        self._reload_failed = False
        self._kms_error = ""
        self._refusals = Refusals(self._log_refusals)
        self._generation = 0
        self._reader = ThreadPoolExecutor(1, "files")

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        self.run.read_signals()
        config = self.loaded.config
        self._upstream = Upstream(config.kms_socket, config.kms_server_uids, loop)
        self._app = Gateway(
            self._state(self.loaded),
            self._upstream,
            self._refusals,
            connections_max=self.connections_max,
            tracing=self.tracing,
        )
        limits = replace(LIMITS, connections_max=self.connections_max)
        server: HttpServer[GatewaySession] = HttpServer(
            self._app, loop=loop, on_internal_error=self.run.internal_error, limits=limits
        )
        self._server = server
        self._tls = TlsServer(
            server, self.loaded.context, on_failed=lambda error, peer: self._refusals.add(of_handshake(error), peer)
        )
        acceptor = Acceptor(
            self.listener, server, on_failure=self.run.accept_failed, protocol_factory=self._tls.protocol_factory
        )
        collector = metrics.GatewayCollector(self._app.requests, self._refusals.counts, self._values)
        async with self.run.metrics(self.metrics_listener, collector, "minikms_gateway_build_info"):
            chores = [asyncio.ensure_future(chore) for chore in self._chores()]
            self._log.info("serving", listen=config.listen, kms_socket=config.kms_socket, metrics=config.metrics)
            await self.run.until_stopped(f"serving {config.listen}")
            acceptor.close()
            self.listener.close()
            self._tls.close()
            await server.drain(DRAIN_SECONDS_MAX)
        for chore in chores:
            chore.cancel()
        await asyncio.wait(chores)
        self._upstream.close()
        self._refusals.write()
        self._reader.shutdown(cancel_futures=True)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        self._log.info("stopped", why=self.run.why)

    # --- background work ----------------------------------------------------------------------------------------

    def _chores(self) -> list[Awaitable[None]]:
        return [
            every(LINE_SECONDS, self._refusals.write),
            every(SWEEP_SECONDS, self._sweep),
            every(SWEEP_SECONDS, self._refresh_keys),
            every(EXPIRED_SECONDS, self._check_certificate),
            self._take_up_changes(),
            self.run.watchdog(),
        ]

    def _sweep(self) -> None:
        self._upstream.sweep()
        before, self._kms_error = self._kms_error, self._upstream.error
        if self._kms_error and self._kms_error != before:
            self._log.error("the key service can't be reached", reason=self._kms_error)
        elif before and not self._kms_error:
            self._log.info("the key service is reached again")

    def _log_refusals(self, reason: str, count: int, peer: str) -> None:
        advice = {"advice": ADVICE[reason]} if reason in ADVICE else {}
        self._log.warning("refused", reason=reason, count=count, peer=peer, **advice)

    def _check_certificate(self) -> None:
        if self.loaded.has_expired():
            self._log.error("own certificate has expired, so no client accepts it: replace it")

    def _refresh_keys(self) -> None:
        issuers = self._app.state.issuers
        if issuers is not None:
            issuers.refresh()

    async def _take_up_changes(self) -> None:
        """Reads all files again when one of them has changed, or at SIGHUP."""
        loop = asyncio.get_running_loop()
        seen = self.loaded.signature
        while True:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self.run.hangup.wait()
            except TimeoutError:
                pass
            now = await loop.run_in_executor(self._reader, self.loader.signature, self.loaded.config)
            if now == seen and not self.run.hangup.is_set():
                continue
            self.run.hangup.clear()
            seen = now
            try:
                loaded = await loop.run_in_executor(self._reader, self.loader.load_beside, self.loaded)
            except StartError as error:
                self._reload_failed = True
                self._log.error("changed files not taken up", why=str(error))
            except Exception as error:  # noqa: BLE001  a defect in reading must not end the service
                self._reload_failed = True
                self.run.internal_error(f"{type(error).__name__} while files were read")
            else:
                self._use(loaded)
                seen = loaded.signature

    def _use(self, loaded: GatewaySetup) -> None:
        former = self._app.state.issuers
        if former is not None and loaded.issuers is not None:
            loaded.issuers.take_over(former)
        self._reload_failed = loaded.context is self.loaded.context
        if self._reload_failed:
            self._log.error("certificate not taken up", why="it has expired; the one before it stays, without new CAs")
        self.loaded = loaded
        self._tls.context = loaded.context
        self._app.state = self._state(loaded)
        self._check_certificate()
        self._log.info("files taken up", generation=self._generation)

    def _state(self, loaded: GatewaySetup) -> GatewayState:
        self._generation += 1
        transit = loaded.config.transit
        return GatewayState(loaded.trust, loaded.issuers, self._generation, "" if transit is None else transit.mount)

    # --- events -------------------------------------------------------------------------------------------------

    def _values(self) -> dict[str, float | None]:
        return {
            "minikms_gateway_connections": self._server.connections_count,
            "minikms_gateway_handshakes": self._tls.handshakes_count,
            "minikms_gateway_kms_connections": self._upstream.connections_count,
            "minikms_gateway_kms_waiting": self._upstream.waiting_count,
            "minikms_gateway_kms_reachable": not self._upstream.error,
            "minikms_gateway_reload_failed": self._reload_failed,
            "minikms_gateway_certificate_expiry_timestamp_seconds": self.loaded.certificate_until,
            "minikms_gateway_crl_expiry_timestamp_seconds": self.loaded.trust.crl_until(),
        }


def _directories(files: GatewayFiles, config: Config) -> list[str]:
    """The paths that the hardened process must read: a file that replaces another one has another inode."""
    return sorted({str(directory_read(path)) for path in files.named(config)})
