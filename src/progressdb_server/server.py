"""The composition of the message server: key service, store, application, HTTP.

Owns: the order in which the parts start and stop, and the signals that stop them. Invariants: no request is taken
before a key service answers and the store is open; what was started is stopped in the reverse order, whatever fails
meanwhile, and requests in flight are finished first. It must never hold a key: it passes on a path, or a descriptor
that the supervisor closes.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final, TypeVar

import uvloop
from prometheus_client import CollectorRegistry

from minikms import api
from minikms.api.errors import StartError
from minikms.client import KmsError
from minikms.platform import process_metrics
from minikms.platform.accepting import raise_descriptor_limit
from minikms.platform.logs import Log
from minikms.platform.notify import Notifier
from minikms.processes.flags import EXIT_FAILED
from minikms.processes.tracing import Tracing, from_environment
from progressdb_server import logs
from progressdb_server.api.application import MessageApplication
from progressdb_server.api.gate.access import AccessControl
from progressdb_server.api.gate.keys import presented
from progressdb_server.api.openapi.description import operations_of
from progressdb_server.api.routes import readiness as readiness_routes
from progressdb_server.api.routes.jobs import JobHandlers
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.routes.readiness import Readiness
from progressdb_server.api.routes.store_backup import BackupHandlers
from progressdb_server.api.viewer.audit import AuditorClient
from progressdb_server.api.viewer.routes import Viewer
from progressdb_server.conditions import Look
from progressdb_server.config import Config, ConfigError, seconds, unknown_variables
from progressdb_server.conversations.whole import Conversations
from progressdb_server.http.listener import DESCRIPTORS_COUNT, bind, check_tls, serve_http
from progressdb_server.http.shares import Shares
from progressdb_server.jobs.service import Jobs
from progressdb_server.kms.provider import LocalProviderError, Provider, RemoteProvider, open_local
from progressdb_server.kms.supervisor import ChildOptions, Supervisor, SupervisorError
from progressdb_server.metrics import KmsMetrics
from progressdb_server.store import epoch, places

_log: Final = Log()
_COLLECTED_OBJECTS_MIN: Final = 50_000
"""New objects between two runs of the cycle collector: many times what the requests in flight hold. Python's default of
700 visits objects that are still in use, which costs an eighth of an append's time; a request leaves no cycles."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_TRIM_THRESHOLD_BYTES: Final = 4 * 1024 * 1024
_MMAP_THRESHOLD_BYTES: Final = 320 * 1024
"""The threshold of mallopt(3): a larger block, such as a large body, has pages of its own, which go back to the system
when it is freed; of smaller ones, such as the buffer of a list, TRIM_THRESHOLD_BYTES stay, and what is below a block in
use. Both are fixed by being set: otherwise one large body raises them to as much as 64 MiB for good. With glibc's
defaults, 128 KiB, each list of 1,000 messages would ask the system for new pages.
"""

SWITCH_SECONDS: Final = 0.0005
"""How long a thread keeps the interpreter while another thread waits for it. The thread of the disk waits that long
several times in each commit while the loop streams a long list: with Python's default, 5 ms, an append took 250 ms.
"""
STATUS_TIMEOUT_S: Final = 2.0
STATUS_WAIT_S: Final = 0.3
"""The time for the question whether the key service works: together less than a caller of `/readyz` waits."""

Opened = TypeVar("Opened")


class ServeError(Exception):
    """The server can't start or can't go on; the text says why and what to do."""

    def __init__(self, text: str, exit_status: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.exit_status = exit_status


class _Stop:
    """The request to stop: `asked` is set by a signal or a failure, whose reason is in `failure`. Before it, `drain` is
    set by SIGTERM where the configuration gives a time for that.
    """

    def __init__(self, drain_s: int) -> None:
        self.asked = asyncio.Event()
        self.drain = asyncio.Event()
        self.failure = ""
        self._drain_s = drain_s

    def begin(self) -> None:
        """SIGTERM: serve for the time that it takes a load balancer to notice. A second one ends that time."""
        if not self._drain_s or self.drain.is_set():
            self.asked.set()
            return
        self.drain.set()
        _log.info("draining", seconds=self._drain_s)
        asyncio.get_running_loop().call_later(self._drain_s, self.asked.set)

    def fail(self, reason: str) -> None:
        self.failure = reason
        self.asked.set()


def check_key_source(config: Config, *, has_master_key: bool) -> None:
    """Check that a miniKMS which is started here will have a root key. Raises ConfigError, which says what to do.

    None is needed if the configuration names a socket, since a daemon may answer there, or a URL.
    """
    kms = config.kms
    if kms.url:
        if has_master_key:
            raise ConfigError(
                "kms.url names a key service on another host, which has its root key: unset "
                "PROGRESSDB_MINIKMS_MASTER_KEY"
            )
        return
    if kms.provider == "local":
        if not config.server.dev:
            raise ConfigError("kms.provider `local` keeps the keys in the server's own memory: it needs --dev")
        if has_master_key:
            raise ConfigError("kms.provider `local` takes the root key as a file only: use --master-key-file")
        return
    if has_master_key and kms.master_key_file:
        raise ConfigError("the root key is given twice: in PROGRESSDB_MINIKMS_MASTER_KEY and as a key file; use one")
    if has_master_key or kms.master_key_file or config.server.dev or kms.socket or not kms.spawn:
        return
    path = api.development_key_path(config.kms_data_dir)
    way_out = f"--master-key-file {path}" if path.exists() else "--dev, to have one made beside the data"
    raise ConfigError(
        "there is no root key for the key service: give --master-key-file FILE (64 hex characters, mode 0600), "
        f"or set PROGRESSDB_MINIKMS_MASTER_KEY; on a development machine: {way_out}"
    )


def child_options(config: Config, master_key_fd: int | None) -> ChildOptions:
    has_key = master_key_fd is not None or bool(config.kms.master_key_file)
    return ChildOptions(
        socket_path=config.kms_socket,
        data_dir=str(config.kms_data_dir),
        binary=config.kms.binary or None,
        dev=config.server.dev and not has_key,
        master_key_file=config.kms.master_key_file or None,
        master_key_fd=master_key_fd,
        log_format=config.logging.format,
    )


def run(config: Config, master_key_fd: int | None, *, accept_restore: bool = False) -> None:
    """Serve until SIGTERM or SIGINT. `accept_restore`: also with an older state of the key service.

    Raises ConfigError, ServeError when it can't start or has lost its key service finally, and what `_open_store` does.
    """
    logs.configure(config.logging.format, config.logging.level)
    for sentence in unknown_variables(os.environ):
        _log.warning(sentence)
    check_tls(config.server.tls)
    check_key_source(config, has_master_key=master_key_fd is not None)
    raise_descriptor_limit(DESCRIPTORS_COUNT)
    _return_freed_memory()
    sys.setswitchinterval(SWITCH_SECONDS)
    os.umask(0o077)
    uvloop.run(_serve(config, master_key_fd, accept_restore))


def _return_freed_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


async def _serve(config: Config, master_key_fd: int | None, accept_restore: bool) -> None:
    stop = _Stop(seconds(config.server.drain))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.begin)
    loop.add_signal_handler(signal.SIGINT, stop.asked.set)
    await _serve_until(stop, config, master_key_fd, accept_restore)
    if stop.failure:
        raise ServeError(stop.failure)


def _tracing() -> Tracing | None:
    try:
        return from_environment("progressdb", os.environ)
    except StartError as error:
        raise ConfigError(str(error)) from None


async def _serve_until(stop: _Stop, config: Config, master_key_fd: int | None, accept_restore: bool) -> None:
    tracing = _tracing()
    notifier = Notifier(os.environ)  # first, so that a key service that is started here does not notify in its name
    async with AsyncExitStack() as started:
        try:
            listener = bind(config.server.address, config.server.port)
        except ConfigError as error:  # it may be free later
            raise ServeError(str(error)) from None
        started.callback(listener.close)
        opening = _open_store(config, master_key_fd, accept_restore, started, on_lost=stop.fail)
        opened = await _unless_stopped(stop.asked, opening)
        if opened is None:
            return
        store, provider = opened
        exclusive = config.kms_is_exclusive
        destroys = config.destroys_keys
        jobs = Jobs(
            store,
            provider,
            config.rotation,
            config.retention,
            exclusive=exclusive,
            destroys=destroys,
            stop=stop.asked,
            now_ns=store.clock.now_ns,
        )
        started.push_async_callback(jobs.close)
        await jobs.start()
        registry = CollectorRegistry()
        registry.register(process_metrics.collector("progressdb_build_info"))
        registry.register(store.metrics)
        if isinstance(provider, RemoteProvider):
            provider.metrics.exclusive, provider.metrics.behind_gateway = exclusive, bool(config.kms.url)
            registry.register(provider.metrics)
        access = AccessControl(config.security, config.server.proxies)
        kms_metrics = provider.metrics if isinstance(provider, RemoteProvider) else KmsMetrics()
        readiness = Readiness(store, _status_of(provider, config, started), kms_metrics, stop.drain)
        started.push_async_callback(readiness.close)
        metrics = _metrics(registry, provider, tracing, started)
        secure = bool(config.server.tls.cert_file)
        auditor = AuditorClient(config.viewer)
        metrics.look = look = Look(store, readiness, jobs, config, auditor.conditions)
        viewer = Viewer(
            store, provider, jobs, readiness, access.keys, metrics=metrics, auditor=auditor, look=look, secure=secure
        )  # fmt: skip
        viewer.start()
        started.push_async_callback(viewer.close)
        handlers = operations_of(JobHandlers(jobs), BackupHandlers(store.backups, config.backups_dir))
        more = (*readiness_routes.operations(readiness, look), *handlers, *viewer.operations())
        application = MessageApplication(
            store,
            access,
            metrics,
            more=more,
            error_page=viewer.error_page,
        )
        host, port = listener.getsockname()[:2]
        gc.freeze()  # the objects of the start live as long as the process: the collector need not visit them
        gc.set_threshold(_COLLECTED_OBJECTS_MIN)
        await serve_http(
            application,
            listener,
            tls=config.server.tls,
            stop=stop.asked,
            drain=stop.drain,
            shares=Shares(config.server, access.proxies.__contains__, presented),
            on_listening=lambda: notifier.ready(f"serving {_announce(config, str(host), int(port))}"),
        )
        _log.info("stopping")


def _metrics(
    registry: CollectorRegistry, provider: Provider, tracing: Tracing | None, started: AsyncExitStack
) -> ApiMetrics:
    if tracing is None:
        return ApiMetrics(registry)
    from progressdb_server.tracing import TracedMetrics, traced_exchanges

    started.push_async_callback(asyncio.to_thread, tracing.close)
    if isinstance(provider, RemoteProvider):
        provider.on_exchange = traced_exchanges(provider.metrics)
    return TracedMetrics(registry, tracing)


def _status_of(
    provider: Provider, config: Config, started: AsyncExitStack
) -> Callable[[], Awaitable[api.StatusAnswer]]:
    """The key service's status, by a client that does not wait for one that is away."""
    if not isinstance(provider, RemoteProvider):
        return provider.status
    client = RemoteProvider(**config.kms_client, timeout_s=STATUS_TIMEOUT_S, wait_s=STATUS_WAIT_S)
    started.push_async_callback(client.close)
    return client.serving_status


async def _unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, Opened]) -> Opened | None:
    """The result of the work, or None if the server has to stop before; the work is cancelled then."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.wait({working})
    return None


async def _open_store(
    config: Config,
    master_key_fd: int | None,
    accept_restore: bool,
    started: AsyncExitStack,
    *,
    on_lost: Callable[[str], None],
) -> tuple[Conversations, Provider]:
    """The key service, then the store; each is closed by `started`. Raises ServeError, FormatError, RestoredError,
    StoreUnavailableError."""
    try:
        if not config.store.url:
            os.makedirs(config.storage.db_path, mode=0o700, exist_ok=True)
    except OSError as error:
        raise ServeError(f"can't make the data directory {config.storage.db_path}: {error.strerror}") from None
    # first, so that no key service is started for a store that is refused
    place = config.store.url or str(config.store_dir)
    engine = await places.open_engine(place, single_node=config.store.single_node)
    opened = False
    try:
        # A restore is accepted for the whole run: it may have put back another audit log.
        audit_head = partial(epoch.audit_head, engine.reads) if engine.sole and not accept_restore else None
        provider = await _open_provider(config, master_key_fd, audit_head, started, on_lost=on_lost)
        store = Conversations(engine, provider, rule=config.security.threads)
        opened = True
    except SupervisorError as error:
        raise ServeError(str(error), error.exit_status) from None
    except LocalProviderError as error:
        raise ServeError(str(error)) from None
    finally:
        if not opened:
            await engine.end()
    started.push_async_callback(store.close)
    await store.start(accept_restore=accept_restore)
    return store, provider


async def _open_provider(
    config: Config,
    master_key_fd: int | None,
    audit_head: Callable[[], Awaitable[str]] | None,
    started: AsyncExitStack,
    *,
    on_lost: Callable[[str], None],
) -> Provider:
    provider: Provider
    if config.kms.provider == "local":
        _log.warning("the keys are in this process: for development only")
        key_file = config.kms.master_key_file or None
        provider = await open_local(config.kms_data_dir, master_key_file=key_file)
    elif config.kms.url:
        provider = await _open_gateway(config, started)
    else:
        supervisor = Supervisor(
            child_options(config, master_key_fd),
            spawn=config.kms.spawn,
            server_uids=config.kms.server_uids or None,
            audit_head=audit_head,
            on_lost=on_lost,
        )
        await supervisor.start()
        started.push_async_callback(supervisor.stop)
        provider = RemoteProvider(**config.kms_client)
    started.push_async_callback(provider.close)
    return provider


async def _open_gateway(config: Config, started: AsyncExitStack) -> RemoteProvider:
    """Opens the client of a gateway. Raises ServeError when it does not answer, or refuses the certificate."""
    provider = RemoteProvider(**config.kms_client)
    started.push_async_callback(provider.close)
    try:
        await provider.health()
    except KmsError as error:
        raise ServeError(str(error)) from None
    _log.info("the key service is behind a gateway", url=config.kms.url, exclusive=config.kms_is_exclusive)
    return provider


def _announce(config: Config, host: str, port: int) -> str:
    """Logs the addresses; returns the server's."""
    keys = config.security.api_keys
    if not (keys.backend or keys.frontend or keys.admin or keys.allow_unauth):
        _log.warning("no API key is configured: every request but /healthz is refused; set PROGRESSDB_API_BACKEND_KEYS")
    scheme = "https" if config.server.tls.cert_file else "http"
    authority = f"[{host}]" if ":" in host else host
    url = f"{scheme}://{authority}:{port}"
    _log.info("listening", url=url, db=config.storage.db_path or None)
    login = (
        "log in with a key of PROGRESSDB_API_ADMIN_KEYS"
        if keys.admin
        else "no login is possible: choose an admin key and set PROGRESSDB_API_ADMIN_KEYS"
    )
    _log.info("viewer", url=f"{url}/viewer/", key=login)
    clients = "none is needed; programs send a key of PROGRESSDB_API_BACKEND_KEYS"
    _log.info("documentation", url=f"{url}/docs/", key=clients)
    return url
