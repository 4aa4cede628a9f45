"""Accepting connections, and the limit of open files.

Invariants: the soft limit is raised, never above the hard limit; when accept(2) fails, the listening socket leaves the
event loop for ACCEPT_PAUSE_SECONDS, so that the loop does not spin and the open connections are served. It must never
decide who may connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

ACCEPTS_PER_TURN_COUNT_MAX: Final = 32
"""The connections accepted in one turn of the event loop, so that a flood of new ones does not delay the open ones."""
ACCEPT_PAUSE_SECONDS: Final = 0.5
"""How long nothing is accepted after accept(2) has failed."""


def raise_descriptor_limit(wanted: int) -> int:
    """Raise the soft limit of open files to `wanted`, or to the hard limit. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted if soft == resource.RLIM_INFINITY else soft
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it: then the limit stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@dataclass(eq=False)
class AcceptLoop:
    """Accepts the connections of a listening socket, from construction to `close`. The socket stays the caller's.

    `listener` is non-blocking, and so is the connection that `accepted` gets with the address of its peer.
    """

    listener: socket.socket
    loop: asyncio.AbstractEventLoop
    accepted: Callable[[socket.socket, Any], None]
    failed: Callable[[OSError], None]

    def __post_init__(self) -> None:
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def close(self, last_turns: int = 0) -> None:
        """Accept what the kernel has taken, in `last_turns` at most, and nothing more."""
        if self._pause is None:
            self.loop.remove_reader(self.listener.fileno())
            for _ in range(last_turns):
                self._accept()
        if self._pause is not None:
            self._pause.cancel()

    def _listen(self) -> None:
        self._pause = None
        self.loop.add_reader(self.listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN_COUNT_MAX):
            try:
                connection, peer = self.listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # EMFILE, ENFILE, ENOBUFS, ENOMEM; any other would repeat itself as well
                self.failed(error)
                self.loop.remove_reader(self.listener.fileno())
                self._pause = self.loop.call_later(ACCEPT_PAUSE_SECONDS, self._listen)
                return
            connection.setblocking(False)
            self.accepted(connection, peer)
