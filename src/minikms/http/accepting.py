"""Accepting connections for an `HttpServer`, within the limit of open files.

Owns: the bound on connections that follows from the limit of open files, and the TCP listeners of the processes beside
the daemon. Invariants: the limit is raised before the process is hardened; a reserve of descriptors is left for files.
It must never answer a request or decide who may connect.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final, Generic

from minikms import api
from minikms.api.errors import StartError
from minikms.http.exchange import S
from minikms.http.server import HttpServer
from minikms.platform.accepting import AcceptLoop

DESCRIPTORS_RESERVED_COUNT: Final = 128
"""For everything but connections: about 30 files, sockets and event descriptors that are always open, up to
`minikms.platform.files.READ_AHEAD_FILES` in each of two worker threads, and the connections of one turn that are
accepted only to be refused."""
DESCRIPTORS_COUNT: Final = api.CONNECTIONS_MAX + DESCRIPTORS_RESERVED_COUNT
"""Open files of a process that serves as many connections as promised."""
CONNECTIONS_COUNT_MIN: Final = 16
"""With a limit of open files that leaves fewer, the service does not start."""
BACKLOG_COUNT: Final = 1024


def connections_bound(descriptors: int) -> int:
    """How many connections a soft limit of `descriptors` admits. Raises StartError when that is too few to serve."""
    bound = min(api.CONNECTIONS_MAX, descriptors - DESCRIPTORS_RESERVED_COUNT)
    if bound < CONNECTIONS_COUNT_MIN:
        raise StartError(
            f"the limit of open files is {descriptors}, and at least "
            f"{CONNECTIONS_COUNT_MIN + DESCRIPTORS_RESERVED_COUNT} are needed: raise it (ulimit -n, or LimitNOFILE= in "
            "the unit)"
        )
    return bound


def bound_warning(connections_max: int) -> str | None:
    """The warning for a bound below the promised one, for the log and `/status`."""
    if connections_max >= api.CONNECTIONS_MAX:
        return None
    return (
        f"the limit of open files admits {connections_max} connections instead of {api.CONNECTIONS_MAX}: raise it to "
        f"{DESCRIPTORS_COUNT} (ulimit -n, or LimitNOFILE= in the unit)"
    )


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
        self._server = server
        self._factory = protocol_factory or server.protocol_factory
        self._on_failure = on_failure
        self._failing = False
        self._opening: set[asyncio.Task[None]] = set()
        self._accepting = AcceptLoop(listener, server.loop, accepted=self._accepted, failed=self._failed)

    def close(self) -> None:
        """Accept nothing more. The listening socket stays open: it is the caller's."""
        self._accepting.close()

    def _accepted(self, connection: socket.socket, _peer: object) -> None:
        self._failing = False
        task = self._server.loop.create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def _failed(self, error: OSError) -> None:
        self._server.accept_failures += 1
        if not self._failing:
            self._failing = True
            self._on_failure(error.strerror or type(error).__name__)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._server.loop.connect_accepted_socket(self._factory, connection)
        except Exception as error:  # noqa: BLE001 - this connection is closed, the others go on
            connection.close()
            self._server.failed(error)
