"""Connecting to the daemon: the check of who serves the socket, and the limits of both clients.

Invariants: `connect` returns a socket only after the kernel named its server as one of the expected users, before a
byte is sent. The credentials are those of the process that called listen(2) (unix(7), SO_PEERCRED): with socket
activation that is the service manager, so root is expected by default. It must never import asyncio, which the
synchronous client and the commands do without.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Final

from minikms.api.errors import KmsUnavailableError, KmsUntrustedServerError

POOL_CONNECTIONS_MAX: Final = 64
"""Of one client, beside the two connections that carry batches."""
POOL_IDLE_S_MAX: Final = 5.0
"""A connection that was idle for longer is not used again. Far below the daemon's own idle limit, so that a request
that can't be repeated is not sent on a connection that the daemon is just closing."""
TIMEOUT_S: Final = 10.0
WAIT_S: Final = 2.0
ROTATE_TIMEOUT_S: Final = 3600.0
SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path of unix(7), less its end mark."""
_UCRED: Final = struct.Struct("iII")  # pid, uid, gid: struct ucred of unix(7); -1 as uid reads as 2^32 - 1
_XUCRED: Final = struct.Struct("II")  # version, uid: the head of struct xucred, FreeBSD's and macOS's unix(4)
_XUCRED_BYTES: Final = 76
_LOCAL_PEERCRED: Final = 1
OVERFLOW_UID_FILE: Final = "/proc/sys/kernel/overflowuid"


def default_server_uids() -> frozenset[int]:
    """The users that a client trusts with its plaintext by default: its own and root."""
    return frozenset({os.geteuid(), 0})


def checked_path(path: str | os.PathLike[str]) -> str:
    """The path as text. Raises ValueError when no socket could be bound there."""
    text = os.fspath(path)
    if not text or "\0" in text or len(os.fsencode(text)) > SOCKET_PATH_BYTES_MAX:
        raise ValueError(f"a socket path has 1 to {SOCKET_PATH_BYTES_MAX} bytes")
    return text


def connect(path: str, server_uids: Collection[int]) -> socket.socket:
    """A connected, non-blocking socket whose server is one of `server_uids`.

    The caller closes it. connect(2) on a non-blocking Unix socket never waits: it connects, or fails with EAGAIN
    because the server's backlog is full. Raises KmsUnavailableError and KmsUntrustedServerError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
        _check_server(sock, path, server_uids)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else "no reason known"
        raise KmsUnavailableError(f"no key service answers at {path}: {reason}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def server_uid(sock: socket.socket) -> int:
    """The effective uid of the process that listens at the other end. Raises KmsUntrustedServerError if unknown."""
    if sys.platform == "linux":
        _pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    else:
        version, uid = _XUCRED.unpack_from(sock.getsockopt(0, _LOCAL_PEERCRED, _XUCRED_BYTES))
        if version != 0:
            raise KmsUntrustedServerError("the kernel does not say who serves the socket")
    return int(uid)


def _check_server(sock: socket.socket, path: str, server_uids: Collection[int]) -> None:
    uid = server_uid(sock)
    if uid not in server_uids or uid == overflow_uid():
        expected = " or ".join(str(number) for number in sorted(server_uids))
        message = f"{path} is served by uid {uid}, expected was uid {expected}; nothing was sent"
        raise KmsUntrustedServerError(message)


def overflow_uid() -> int | None:
    """The uid that the kernel shows for every user outside our user namespace (user_namespaces(7))."""
    try:
        return int(Path(OVERFLOW_UID_FILE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
