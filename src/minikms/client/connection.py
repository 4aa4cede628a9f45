"""Who serves a Unix socket: the operating-system seam of the client.

Owns: connecting, and the check of the server's uid. Invariant: a socket leaves `connect` only after the kernel named
its server as one of the expected users, before a byte is sent. The credentials are those of the process that called
listen(2) (unix(7), SO_PEERCRED): with socket activation that is the service manager, so root is expected by default.

The caller owns the returned socket, and must close it.

One asyncio connection to the daemon: one request at a time, its answer, nothing else.

Owns: a transport and the parser of the answer that is awaited. Invariants: a connection that is in doubt (bytes
nobody asked for, a malformed or late answer, a caller that gave up waiting) is closed and never used again, so that
no answer can reach the wrong caller.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Final, cast

from minikms.client.errors import (
    KmsError,
    KmsProtocolError,
    KmsTimeoutError,
    KmsUnavailableError,
    KmsUntrustedServerError,
)
from minikms.client.wire import Answer, AnswerParser, request_head

SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path of unix(7), less its end mark."""
_UCRED: Final = struct.Struct("iII")  # pid, uid, gid: struct ucred of unix(7); -1 as uid reads as 2^32 - 1
_XUCRED: Final = struct.Struct("II")  # version, uid: the head of struct xucred, FreeBSD's and macOS's unix(4)
_XUCRED_BYTES: Final = 76
_LOCAL_PEERCRED: Final = 1
_OVERFLOW_UID_FILE: Final = "/proc/sys/kernel/overflowuid"


def default_server_uids() -> frozenset[int]:
    """The users that a client trusts with its plaintext unless told otherwise: its own and root."""
    return frozenset({os.geteuid(), 0})


def checked_path(path: str | os.PathLike[str]) -> str:
    """The path as text. Raises ValueError when no socket could be bound there."""
    text = os.fspath(path)
    if not text or "\0" in text or len(os.fsencode(text)) > SOCKET_PATH_BYTES_MAX:
        raise ValueError(f"a socket path has 1 to {SOCKET_PATH_BYTES_MAX} bytes")
    return text


def connect(path: str, server_uids: Collection[int]) -> socket.socket:
    """A connected, non-blocking socket whose server is one of `server_uids`.

    connect(2) on a Unix socket never waits when the socket does not block: it connects, or EAGAIN says that the
    server's backlog is full. Raises KmsUnavailableError and KmsUntrustedServerError.
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
    if uid not in server_uids or uid == _overflow_uid():
        expected = " or ".join(str(number) for number in sorted(server_uids))
        message = f"{path} is served by uid {uid}, expected was uid {expected}; nothing was sent"
        raise KmsUntrustedServerError(message)


def _overflow_uid() -> int | None:
    """What the kernel shows for a user that our user namespace does not know: it could be anyone
    (user_namespaces(7))."""
    try:
        return int(Path(_OVERFLOW_UID_FILE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class Connection(asyncio.Protocol):
    """Made by `Connection.open`. `usable` is false once nothing may be sent on it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: AnswerParser | None = None
        self._waiter: asyncio.Future[Answer] | None = None
        self._reusable = True
        self.idle_since_s = 0.0

    @classmethod
    async def open(cls, path: str, server_uids: Collection[int]) -> Connection:
        """Raises KmsUnavailableError and KmsUntrustedServerError; nothing has been sent then."""
        sock = connect(path, server_uids)
        connection = cls()
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=sock)
        except BaseException:
            sock.close()
            raise
        return connection

    @property
    def usable(self) -> bool:
        return self._reusable and self._transport is not None and not self._transport.is_closing()

    async def exchange(
        self, target: bytes, body: bytes | bytearray | None, request_id: str | None, timeout_s: float
    ) -> Answer:
        """Sends a request and waits for its answer. Raises KmsUnavailableError, KmsTimeoutError and
        KmsProtocolError."""
        transport = self._transport
        if transport is None or not self.usable:
            raise KmsUnavailableError("the connection to the key service was lost")
        self._parser = AnswerParser()
        self._waiter = asyncio.get_running_loop().create_future()
        head = request_head(target, None if body is None else len(body), request_id)
        if isinstance(body, bytearray):  # holds a key: joining would leave a copy that nobody zeroes
            transport.write(head)
            transport.write(body)
        else:
            transport.write(head + body if body else head)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._waiter
        except BaseException as error:
            # also when the answer has come but its caller was cancelled: nobody would give the connection back
            self._waiter = None
            self.close()
            if isinstance(error, TimeoutError):
                raise KmsTimeoutError(f"the key service did not answer within {timeout_s:g} s") from None
            raise

    def close(self) -> None:
        """Drops the connection and whatever is under way on it."""
        self._reusable = False
        if self._transport is not None:
            self._transport.abort()

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._parser is None:
            self.close()
            return
        try:
            answer = self._parser.feed(data)
        except KmsProtocolError as error:
            self._finish(error)
            self.close()
            return
        if answer is not None:
            self._reusable = answer.reusable
            self._finish(answer)
            if not answer.reusable:
                self.close()

    def eof_received(self) -> bool:
        return False  # the transport closes itself: the daemon never half-closes

    def connection_lost(self, exc: Exception | None) -> None:
        self._reusable = False
        self._finish(KmsUnavailableError("the connection to the key service was lost before it answered", sent=True))

    def _finish(self, result: Answer | KmsError) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None or waiter.done():
            return
        if isinstance(result, KmsError):
            waiter.set_exception(result)
        else:
            waiter.set_result(result)
