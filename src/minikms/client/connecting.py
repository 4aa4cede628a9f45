"""The servers that a client connects to: the daemon's Unix socket, or a gateway by its URL.

Owns: `Endpoint`, what both clients need of either; `SocketEndpoint`, with the check of who serves the socket.
`minikms.client.tls` has the other one. Invariants: no byte of a request is sent before the server was checked. The
kernel names the process that called listen(2) (unix(7), SO_PEERCRED): with socket activation that is the service
manager, so root is expected by default. It must never import asyncio or ssl, which the synchronous client and the
commands do without.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from minikms import api
from minikms.api.errors import KmsError, KmsUnavailableError, KmsUntrustedServerError, refusal
from minikms.client.wire import SOCKET_ORIGIN

if TYPE_CHECKING:
    import asyncio

POOL_IDLE_S_MAX: Final = 5.0
"""A connection that was idle for longer is not used again, and AsyncClient closes it. Far below the daemon's own idle
limit, so that a request that can't be repeated is not sent on a connection that the daemon is just closing."""
_UCRED: Final = struct.Struct("iII")  # pid, uid, gid: struct ucred of unix(7); -1 as uid reads as 2^32 - 1
_XUCRED: Final = struct.Struct("II")  # version, uid: the head of struct xucred, FreeBSD's and macOS's unix(4)
_XUCRED_BYTES: Final = 76
_LOCAL_PEERCRED: Final = 1
NOT_RUNNING: Final = (
    "Is the daemon running? Start it with `minikms --socket … --data-dir …`, or name the socket on which it listens"
)
NOT_ADMITTED: Final = (
    "Run this as the daemon's user, as root, or as a member of the socket's group: see --socket-group and "
    "--socket-mode of `minikms serve`"
)
OVERFLOW_UID_FILE: Final = "/proc/sys/kernel/overflowuid"


def default_server_uids() -> frozenset[int]:
    """The users that a client trusts with its plaintext by default: its own and root."""
    return frozenset({os.geteuid(), 0})


def checked_path(path: str | os.PathLike[str]) -> str:
    """The path as text. Raises ValueError when no socket could be bound there."""
    text = os.fspath(path)
    if not text or "\0" in text or len(os.fsencode(text)) > api.SOCKET_PATH_BYTES_MAX:
        raise ValueError(f"a socket path has 1 to {api.SOCKET_PATH_BYTES_MAX} bytes")
    return text


class Endpoint(ABC):
    """The server that a client connects to."""

    address: str
    """The path or URL, as it was given."""
    origin: bytes = SOCKET_ORIGIN
    """The rest of a request's first line, and the headers that every request has."""
    proxied: bool = False
    """Whether a gateway is between client and daemon."""
    warnings: Sequence[str] = ()
    """What an operator should change about certificate, key and token; known after a call."""

    @abstractmethod
    def connect(self, timeout_s: float) -> socket.socket:
        """A connected socket whose server was checked; the caller closes it. Raises KmsError; no request was sent."""

    @abstractmethod
    async def attach(
        self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol, timeout_s: float
    ) -> socket.socket | None:
        """The same for a connection of asyncio, which then calls `protocol`. Returns the socket for `lost`, if it needs
        that.
        """

    def is_current(self, sock: object) -> bool:
        """Whether a connection with this TLS socket (or object) may be used again: no file has changed since. Raises
        KmsError if the files can't be used.
        """
        return True

    def lost(self, error: Exception | None, *, sent: bool, sock: socket.socket | None = None) -> KmsError:
        """Why a connection ended before the answer was complete. `sent`: a part of the request may have arrived.
        `sock`: of the synchronous client, still open, or what `attach` returned.
        """
        return KmsUnavailableError("the connection to the key service was lost before it answered", sent)


class ReadToTheEnd(socket.socket):
    """A send to a server that has closed the connection succeeds, and a read finds what the server said before: a
    refusal, an alert of TLS, or the end. asyncio drops what it has not read once a send fails.
    """

    unsent = False
    """Whether a send has failed."""

    def send(self, data: Any, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except (BrokenPipeError, ConnectionResetError):
            self.unsent = True
            return len(data)

    def sendmsg(self, buffers: Any, *more: Any) -> int:
        try:
            return super().sendmsg(buffers, *more)
        except (BrokenPipeError, ConnectionResetError):
            self.unsent = True
            return sum(map(len, buffers))


class SocketEndpoint(Endpoint):
    """The daemon's Unix socket. Raises ValueError when no socket could be bound at `path`."""

    def __init__(self, path: str | os.PathLike[str], server_uids: Collection[int] | None) -> None:
        self.address = checked_path(path)
        self._server_uids = default_server_uids() if server_uids is None else frozenset(server_uids)

    def connect(self, timeout_s: float) -> ReadToTheEnd:
        """Non-blocking."""
        return connect(self.address, self._server_uids)

    def lost(self, error: Exception | None, *, sent: bool, sock: socket.socket | None = None) -> KmsError:
        # The daemon begins whole requests only.
        unsent = isinstance(error, BrokenPipeError) or (isinstance(sock, ReadToTheEnd) and sock.unsent)
        return super().lost(error, sent=sent and not unsent)

    async def attach(
        self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol, timeout_s: float
    ) -> socket.socket:
        sock = self.connect(timeout_s)
        try:
            await loop.create_unix_connection(lambda: protocol, sock=sock)
        except BaseException:
            sock.close()
            raise
        return sock


def connect(path: str, server_uids: Collection[int]) -> ReadToTheEnd:
    """A connected, non-blocking socket whose server is one of `server_uids`.

    The caller closes it. connect(2) on a non-blocking Unix socket never waits: it connects, or fails with EAGAIN
    because the server's backlog is full. Raises KmsUnavailableError, KmsUntrustedServerError, and TooManyError for a
    full backlog.
    """
    sock = ReadToTheEnd(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
        _check_server(sock, path, server_uids)
    except OSError as error:
        sock.close()
        if error.errno == errno.EAGAIN:
            raise refusal(api.CODE_TOO_MANY, "too many connections wait for the key service", 503) from error
        reason = os.strerror(error.errno) if error.errno else "no reason known"
        advice = NOT_ADMITTED if isinstance(error, PermissionError) else NOT_RUNNING
        raise KmsUnavailableError(f"no key service answers at {path}: {reason}. {advice}") from error
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
