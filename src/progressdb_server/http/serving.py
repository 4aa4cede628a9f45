"""What the connections of one server share, and its stop.

Owns: `Serving`, and `ServedConnection`, which is what a request and the stop need of a connection.
"""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from typing import Final, Protocol

from progressdb_server.http.asgi import ASGIApp
from progressdb_server.http.shares import Readable, Shares

_STOP_POLL_SECONDS: Final = 0.05
CANCEL_SECONDS_MAX: Final = 5
"""For cancelled requests to end, such as a write whose disk hangs."""


class Serving:
    """What the connections of one server share, and its stop."""

    def __init__(self, app: ASGIApp, shares: Shares, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self.shares = shares
        self.loop = loop
        self.connections: set[ServedConnection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        """The tasks of requests that the application handles."""
        self.drains = False
        """Whether each response ends its connection, because a stop is near."""
        self.date = b""
        self.set_date()

    def set_date(self) -> None:
        """Call this once a second."""
        self.date = f"date: {formatdate(usegmt=True)}\r\n".encode("ascii")

    async def stop(self, seconds: float) -> None:
        """Close connections without a request, give the others `seconds` to get their responses, and cancel the rest.
        Nothing is accepted any more."""
        for connection in list(self.connections):
            connection.shutdown()
        deadline_s = self.loop.time() + seconds
        while self.connections or self.tasks:
            await asyncio.sleep(_STOP_POLL_SECONDS)
            if self.loop.time() >= deadline_s:
                break
        cancelled = list(self.tasks)
        for task in cancelled:
            task.cancel()
        if cancelled:
            await asyncio.wait(cancelled, timeout=CANCEL_SECONDS_MAX)
        for connection in list(self.connections):
            connection.close_unread()


class ServedConnection(Readable, Protocol):
    """The part of `protocol.Connection` that its requests and the stop use."""

    serving: Serving
    transport: asyncio.Transport
    group: str
    write_paused: bool

    def resume_reading(self) -> None: ...
    async def drain(self) -> None: ...
    def responded(self, keep_alive: bool) -> None: ...
    def refuse(self, status: int) -> None: ...
    def shutdown(self) -> None: ...
