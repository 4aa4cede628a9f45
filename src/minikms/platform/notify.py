"""Notifies the service manager, in the protocol of sd_notify(3).

Owns: one datagram per state change. Invariants: without `NOTIFY_SOCKET` every call does nothing; a service manager that
does not listen is no error. It must never send anything about keys or callers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from typing import Final

_MICROSECONDS: Final = 1_000_000


class Notifier:
    """Removes its variables from `environ`, so that no child can notify in the daemon's name.

    `watchdog_interval_s`: `watchdog` must be called this often, half of the manager's time-out, as
    sd_watchdog_enabled(3) advises; None when the manager set no watchdog for this process.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        # "@name" is an abstract socket, with a NUL in the place of "@" (unix(7)); other relative names are not allowed.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if not address.startswith(("/", "@")):
            self._address = ""
        self.watchdog_interval_s = _watchdog_interval_s(environ)

    def ready(self, status: str) -> None:
        """The daemon serves."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """Replaces the text that the manager shows."""
        self._send(f"STATUS={status}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The daemon is alive. Called in the event loop, so that the manager notices when the loop is blocked."""
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            try:
                sender.sendto(state.encode(), self._address)
            except OSError:  # the manager does not run or its queue is full: its time-out decides, not this process
                return


def _watchdog_interval_s(environ: MutableMapping[str, str]) -> float | None:
    microseconds = environ.pop("WATCHDOG_USEC", "")
    pid = environ.pop("WATCHDOG_PID", "")
    if not (microseconds.isdecimal() and int(microseconds)):
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(microseconds) / _MICROSECONDS / 2
