"""HTTP on a socket: uvicorn with the bounded protocol, from listening to a graceful stop.

Owns: the listening socket, TLS, and the stop. Invariants: no signal is handled here; the caller says when to stop.
After that no request is accepted, and requests in flight have `STOP_SECONDS_MAX` to finish. The client's address is the
peer's: `X-Forwarded-For` is never believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import uvicorn

from progressdb_server.api.http.limits import CONNECTIONS_COUNT_MAX, IDLE_SECONDS_MAX
from progressdb_server.api.http.protocol import BoundedProtocol
from progressdb_server.api.http.request import ASGIApp
from progressdb_server.api.http.shares import Shares
from progressdb_server.config import ConfigError, ConfigMissingError, Tls

STOP_SECONDS_MAX: Final = 10
BACKLOG_COUNT: Final = 2048
_SPARE_DESCRIPTORS_COUNT: Final = 1024
"""Descriptors for the store's files and the key service, beyond one for each connection."""


class _HttpServer(uvicorn.Server):
    """Calls `on_listening` when it listens, and leaves signals alone."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(address: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError if the address cannot be used."""
    try:
        resolved = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, name = resolved[0]
        return socket.create_server(
            (str(name[0]), int(name[1])), family=socket.AddressFamily(family), backlog=BACKLOG_COUNT
        )
    except OSError as error:
        reason, _, _ = (error.strerror or str(error)).partition(" (while")  # create_server appends the address
        raise ConfigError(f"cannot listen on {address}:{port}: {reason}; choose another address with --addr") from None


def check_tls(tls: Tls) -> None:
    """Raises ConfigError unless certificate and key match, ConfigMissingError if a file does not exist."""
    if not tls.cert_file:
        return
    try:
        # With an empty password, OpenSSL refuses an encrypted key and does not ask for its password on a terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.cert_file, tls.key_file, password="")
    except FileNotFoundError:
        raise ConfigMissingError(f"a TLS file does not exist: {tls.cert_file} or {tls.key_file}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "they are not a PEM certificate and its unencrypted key"
        raise ConfigError(f"TLS cannot use {tls.cert_file} with {tls.key_file}: {reason}") from None


def raise_descriptor_limit() -> None:
    """Allow a descriptor for each of `CONNECTIONS_COUNT_MAX` connections, as far as the hard limit permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS_COUNT_MAX + _SPARE_DESCRIPTORS_COUNT
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))


async def serve_http(
    application: ASGIApp,
    listener: socket.socket,
    *,
    tls: Tls,
    stop: asyncio.Event,
    shares: Shares | None = None,
    on_listening: Callable[[], None] = lambda: None,
) -> None:
    """Serve until `stop` is set. Returns when the last request has its response or its time is over."""
    configuration = uvicorn.Config(
        application,
        http=partial(BoundedProtocol, shares=shares or Shares()),  # type: ignore[arg-type]  # it calls what it is given
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS_MAX,
        timeout_graceful_shutdown=STOP_SECONDS_MAX,
        backlog=BACKLOG_COUNT,
        ssl_certfile=tls.cert_file or None,
        ssl_keyfile=tls.key_file or None,
    )
    server = _HttpServer(configuration, on_listening)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        server.should_exit = True
        await serving
