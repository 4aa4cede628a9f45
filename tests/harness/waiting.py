"""How a test waits for something that another process or thread does."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

WAIT_S_MAX = 60.0
"""Costs nothing where all is well; a machine that runs several suites is slow for seconds at a time."""


def wait_until(holds: Callable[[], object], *, seconds: float = WAIT_S_MAX) -> None:
    """Returns as soon as `holds` is true; AssertionError if it is not within that time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.02)


class Process(Protocol):
    def poll(self) -> int | None: ...


def wait_for_start(process: Process, answers: Callable[[], object], log: Path) -> None:
    """Returns as soon as a started program answers; an OSError is no answer yet. AssertionError with its log if it has
    ended or takes too long.
    """
    end = time.monotonic() + WAIT_S_MAX
    while True:
        with contextlib.suppress(OSError):
            if answers():
                return
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.02)


async def until(holds: Callable[[], object], *, seconds: float = WAIT_S_MAX) -> None:
    """The same in an event loop; TimeoutError if it is not within that time."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


def listens(address: Path | int) -> bool:
    """Whether somebody listens on a Unix socket, or on a port of this host."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family) as connection:
        connection.connect(str(address) if isinstance(address, Path) else ("127.0.0.1", address))
        return True
    return False


def receive_more(connection: socket.socket) -> bytes:
    """At least one byte. Raises `ConnectionResetError` at the end of the stream, where a loop would wait for ever."""
    part = connection.recv(1 << 16)
    if not part:
        raise ConnectionResetError("the other side has closed the connection")
    return part
