"""What the service manager is told, in the protocol of sd_notify(3).

Owns: one datagram per state change. Invariants: without `NOTIFY_SOCKET` every call does nothing; a service manager that
does not listen is never a reason to fail. It must never send anything about keys or callers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from typing import Final

_MICROSECONDS: Final = 1_000_000


class Notifier:
    """Takes its variables out of `environ`, so that no child speaks for the daemon.

    `watchdog_interval_s` is how often `watchdog` must be called: half of the manager's time-out, as
    sd_watchdog_enabled(3) advises; None when no watchdog was asked of this process.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        # "@name" is an abstract socket, a NUL on the wire (unix(7)); other relative names are not of the protocol.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if not address.startswith(("/", "@")):
            self._address = ""
        self.watchdog_interval_s = _watchdog_interval_s(environ)

    def ready(self, status: str) -> None:
        """The daemon answers now."""
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """Still alive. To be called from the event loop itself, so that a stuck loop is noticed."""
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            try:
                sender.sendto(state.encode(), self._address)
            except OSError:  # the manager is away or its queue is full: its time-out decides, not this process
                return


def _watchdog_interval_s(environ: MutableMapping[str, str]) -> float | None:
    microseconds = environ.pop("WATCHDOG_USEC", "")
    pid = environ.pop("WATCHDOG_PID", "")
    if not (microseconds.isdecimal() and int(microseconds)):
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(microseconds) / _MICROSECONDS / 2
