"""HTTP on a socket, from listening to a graceful stop.

Owns: the listening socket, accepting, TLS, and the stop. Invariants:
- No signal is handled here; the caller says when to stop. After that no request is accepted, and requests in flight
  have `STOP_SECONDS_MAX` to finish. Once the caller says that it drains, each response ends its connection; at the stop
  the connections that the kernel has taken are accepted and have `FIRST_REQUEST_SECONDS` for a request.
- There are at most `CONNECTIONS_COUNT_MAX` connections, those in their TLS handshake counted. A handshake takes at most
  `HANDSHAKE_SECONDS_MAX`, and counts as an idle connection of its address meanwhile.
- The client's address is the peer's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Final

from minikms.platform.accepting import ACCEPTS_PER_TURN_COUNT_MAX, AcceptLoop
from minikms.platform.logs import Log
from progressdb_server.config import ConfigError, ConfigMissingError, TlsSection
from progressdb_server.http import limits
from progressdb_server.http.asgi import ASGIApp
from progressdb_server.http.protocol import Connection
from progressdb_server.http.serving import Serving
from progressdb_server.http.shares import Shares

_log: Final = Log()
STOP_SECONDS_MAX: Final = 10
BACKLOG_COUNT: Final = 2048
FIRST_REQUEST_SECONDS: Final = 0.5
"""For the requests of connections that were accepted last, when a server has drained."""
DESCRIPTORS_COUNT: Final = limits.CONNECTIONS_COUNT_MAX + 1024
"""Open files of a server: one for each connection, the others for the store's files and the key service."""


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


def check_tls(tls: TlsSection) -> None:
    """Checks that certificate and key match. Raises ConfigError, and ConfigMissingError if a file does not exist."""
    if not tls.cert_file:
        return
    try:
        _tls_context(tls)
    except FileNotFoundError:
        raise ConfigMissingError(f"a TLS file does not exist: {tls.cert_file} or {tls.key_file}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "they are not a PEM certificate and its unencrypted key"
        raise ConfigError(f"TLS cannot use {tls.cert_file} with {tls.key_file}: {reason}") from None


def _tls_context(tls: TlsSection) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # With an empty password, OpenSSL refuses an encrypted key and does not ask for its password on a terminal.
    context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    return context


class _Opening:
    """A connection that was accepted, until it is a `Connection`: with TLS, until the end of its handshake."""

    def __init__(self, acceptor: _Acceptor, connection: socket.socket, group: str) -> None:
        self._acceptor = acceptor
        self._connection = connection
        self._group = group
        self._task = acceptor.serving.loop.create_task(self._open())
        self._task.add_done_callback(self._opened)

    def close_idle(self) -> None:
        self._task.cancel()

    async def _open(self) -> None:
        serving, context = self._acceptor.serving, self._acceptor.context
        await serving.loop.connect_accepted_socket(
            partial(Connection, serving, self._forget),
            self._connection,
            ssl=context,
            ssl_handshake_timeout=None if context is None else limits.HANDSHAKE_SECONDS_MAX,
        )

    def _forget(self) -> None:
        self._acceptor.opening.discard(self)
        self._acceptor.serving.shares.busy(self._group, self)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._forget()
        if task.cancelled() or task.exception() is not None:  # it is gone, does not speak TLS, or takes too long
            self._connection.close()


class _Acceptor:
    """Accepts connections, from construction to `close`."""

    def __init__(self, listener: socket.socket, serving: Serving, context: ssl.SSLContext | None) -> None:
        self.serving = serving
        self.context = context
        self.opening: set[_Opening] = set()
        self._listener = listener
        listener.setblocking(False)
        self._accepting = AcceptLoop(listener, serving.loop, accepted=self._accepted, failed=self._failed)

    def close(self) -> None:
        """Close the port. Where the server drains, first accept what the kernel has taken: close(2) would reset it."""
        self._accepting.close(BACKLOG_COUNT // ACCEPTS_PER_TURN_COUNT_MAX if self.serving.drains else 0)
        self._listener.close()

    def close_opening(self) -> None:
        for opening in list(self.opening):
            opening.close_idle()

    def _accepted(self, connection: socket.socket, peer: tuple[object, ...]) -> None:
        serving = self.serving
        full = len(serving.connections) + len(self.opening) >= limits.CONNECTIONS_COUNT_MAX
        if full and not serving.shares.make_room():
            connection.close()
            return
        with contextlib.suppress(OSError):  # the client is gone: macOS refuses then
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        group = serving.shares.group(str(peer[0]))
        opening = _Opening(self, connection, group)
        self.opening.add(opening)
        if self.context is not None:
            serving.shares.idle(group, opening)

    def _failed(self, error: OSError) -> None:
        """No descriptor or no memory is left."""
        self.serving.shares.make_room()
        _log.warning("can't accept connections", reason=error.strerror)


async def serve_http(
    application: ASGIApp,
    listener: socket.socket,
    *,
    tls: TlsSection,
    stop: asyncio.Event,
    drain: asyncio.Event | None = None,
    shares: Shares | None = None,
    on_listening: Callable[[], None] = lambda: None,
) -> None:
    """Serve until `stop` is set, and close the listener. Once `drain` is set, clients are sent away. Returns when the
    last request has its response or its time is over."""
    serving = Serving(application, shares or Shares(), asyncio.get_running_loop())
    acceptor = _Acceptor(listener, serving, _tls_context(tls) if tls.cert_file else None)
    on_listening()
    beside = [asyncio.create_task(_tell_time(serving))]
    if drain is not None:
        beside.append(asyncio.create_task(_drain(serving, drain)))
    try:
        await stop.wait()
    finally:
        acceptor.close()
        if serving.drains:
            await asyncio.sleep(FIRST_REQUEST_SECONDS)
        acceptor.close_opening()
        await serving.stop(STOP_SECONDS_MAX)
        for task in beside:
            task.cancel()


async def _drain(serving: Serving, drain: asyncio.Event) -> None:
    await drain.wait()
    serving.drains = True


async def _tell_time(serving: Serving) -> None:
    while True:
        serving.set_date()
        await asyncio.sleep(1)
