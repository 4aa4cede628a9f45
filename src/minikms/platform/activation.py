"""The listening socket that the service manager passes to a process that it starts (sd_listen_fds(3)).

Owns: the protocol, and the check of what was passed. Invariants: the socket is used as it is, because a second
listen(2) would replace the credentials that clients see (SO_PEERCRED), which are those of the manager; no child
inherits the socket or its variables. It must never remove a path.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from typing import Final

from minikms.api.errors import StartError

LISTEN_FDS_START: Final = 3  # SD_LISTEN_FDS_START


def passed_socket(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The socket that the service manager passed, as in sd_listen_fds(3). None if it passed none to this process.

    Raises:
        StartError: the service manager passed several sockets, or one that is not a listening Unix stream socket.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise StartError(f"the service manager passed {count} sockets; this service takes one")
    try:
        os.set_inheritable(LISTEN_FDS_START, False)
        passed = socket.socket(fileno=LISTEN_FDS_START)
        listening = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartError(f"the socket that the service manager passed: {error.strerror}") from None
    if passed.family != socket.AF_UNIX or passed.type != socket.SOCK_STREAM or not listening:
        passed.close()
        raise StartError(
            "the service manager passed something other than a listening Unix stream socket: use ListenStream="
        )
    passed.setblocking(False)
    return passed
