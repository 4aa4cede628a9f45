"""Accepting connections within the limit of open files, and pausing when accept(2) fails.

Owns: the limit of open files (RLIMIT_NOFILE), the bound on connections that follows from it, the accept loop, and the
TCP listeners of the processes beside the daemon. Invariants: the soft limit is raised, never above the hard limit,
before the process is hardened; a reserve of descriptors is left for files; when accept fails, the listening socket
leaves the event loop for ACCEPT_PAUSE_SECONDS, so that the loop does not spin and the open connections are served. It
must never answer a request or decide who may connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable
from typing import Final, Generic

from minikms import api
from minikms.api.errors import StartError, StartLaterError
from minikms.http.exchange import S
from minikms.http.server import HttpServer

DESCRIPTORS_RESERVED_COUNT: Final = 128
"""For everything but connections: about 30 files, sockets and event descriptors that are always open, a few files for
each worker thread, and the connections of one turn that are accepted only to be refused."""
CONNECTIONS_COUNT_MIN: Final = 16
"""With a limit of open files that leaves fewer, the service does not start."""
ACCEPTS_PER_TURN_COUNT_MAX: Final = 32
"""Of one turn of the event loop, so that a flood of new connections does not delay the open ones."""
BACKLOG_COUNT: Final = 1024
ACCEPT_PAUSE_SECONDS: Final = 0.5
"""How long nothing is accepted after accept(2) has failed."""


def raise_descriptor_limit(others: int = 0) -> int:
    """Raise the soft limit of open files to what api.CONNECTIONS_MAX and `others` need, or to the hard limit. Returns
    the limit.
    """
    wanted = api.CONNECTIONS_MAX + DESCRIPTORS_RESERVED_COUNT + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted if soft == resource.RLIM_INFINITY else soft
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it: then the limit stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def connections_bound(descriptors: int) -> int:
    """How many connections a soft limit of `descriptors` admits. Raises StartError when that is too few to serve."""
    bound = min(api.CONNECTIONS_MAX, descriptors - DESCRIPTORS_RESERVED_COUNT)
    if bound < CONNECTIONS_COUNT_MIN:
        raise StartError(
            f"the limit of open files is {descriptors}, and the daemon needs at least "
            f"{CONNECTIONS_COUNT_MIN + DESCRIPTORS_RESERVED_COUNT}: raise it (ulimit -n, or LimitNOFILE= in the unit)"
        )
    return bound


def bound_warning(connections_max: int) -> str | None:
    """The warning for a bound below the promised one, for the log and `/status`."""
    if connections_max >= api.CONNECTIONS_MAX:
        return None
    return (
        f"the limit of open files admits {connections_max} connections instead of {api.CONNECTIONS_MAX}: raise it to "
        f"{api.CONNECTIONS_MAX + DESCRIPTORS_RESERVED_COUNT} (ulimit -n, or LimitNOFILE= in the unit)"
    )


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


class Acceptor(Generic[S]):
    """Accepts the connections of a listening socket for an `HttpServer`, from construction to `close`."""

    def __init__(
        self,
        listener: socket.socket,
        server: HttpServer[S],
        *,
        on_failure: Callable[[str], None],
        protocol_factory: Callable[[], asyncio.BaseProtocol] | None = None,
    ) -> None:
        """`listener` is non-blocking. `on_failure` gets the reason of the first failure after a success.
        `protocol_factory`: that of a `TlsServer` for TLS; by default the server's own.
        """
        self._listener = listener
        self._server = server
        self._factory = protocol_factory or server.protocol_factory
        self._on_failure = on_failure
        self._failing = False
        self._pause: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._listen()

    def close(self) -> None:
        """Accept nothing more. The listening socket stays open: it is the caller's."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._server.loop.remove_reader(self._listener.fileno())

    def _listen(self) -> None:
        self._pause = None
        self._server.loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN_COUNT_MAX):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # EMFILE, ENFILE, ENOBUFS, ENOMEM; any other would repeat itself as well
                self._failed(error)
                return
            self._failing = False
            connection.setblocking(False)
            task = self._server.loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def _failed(self, error: OSError) -> None:
        self._server.accept_failures += 1
        if not self._failing:
            self._failing = True
            self._on_failure(error.strerror or type(error).__name__)
        self._server.loop.remove_reader(self._listener.fileno())
        self._pause = self._server.loop.call_later(ACCEPT_PAUSE_SECONDS, self._listen)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._server.loop.connect_accepted_socket(self._factory, connection)
        except Exception as error:  # noqa: BLE001 - this connection is closed, the others go on
            connection.close()
            self._server.failed(error)
