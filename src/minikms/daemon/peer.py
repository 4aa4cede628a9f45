"""Who is at the other end of a Unix socket, as the kernel says.

Owns: the one question asked of the kernel for each connection, before a byte of it is parsed. Invariants: the answer is
of the process that called connect(2), at that time; a descriptor passed on later carries its authority with it, by
design. A uid that the kernel could not translate into this user namespace appears as its overflow uid, which stands for
many users and must never be allowed. This module decides nothing else about who may do what; that is `minikms.policy`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import struct
from typing import Final, NamedTuple

from minikms.memory import libc

_UCRED: Final = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid
_SO_PEERPIDFD: Final = 77  # asm-generic/socket.h, Linux 6.5
_OVERFLOW_UID_FILE: Final = "/proc/sys/kernel/overflowuid"
_OVERFLOW_UID_DEFAULT: Final = 65534
PID_UNKNOWN: Final = 0


class Peer(NamedTuple):
    """The connector. `pid` is 0 where the kernel does not tell it.

    `pid_certain`: the kernel also gave a pidfd (SO_PEERPIDFD), which it does only while the connector has not been
    reaped, so when this was read the pid was still its own and not that of a later process.
    """

    uid: int
    gid: int
    pid: int = PID_UNKNOWN
    pid_certain: bool = False


def read_peer(connection: socket.socket) -> Peer:
    """The credentials of the process that connected: SO_PEERCRED on Linux, getpeereid(3) on BSD and macOS.

    Raises:
        OSError: not a connected Unix socket, or the kernel refuses; the connection must be closed then.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return _getpeereid(libc.library(), connection.fileno())
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(uid, gid, pid, _has_pidfd(connection))


def is_overflow_uid(uid: int) -> bool:
    """Whether `uid` stands for every user that this user namespace has no number for."""
    return uid == _overflow_uid()


@functools.cache
def _overflow_uid() -> int:
    """Of user_namespaces(7). Read once: the file may be out of reach after the process is restricted."""
    try:
        with open(_OVERFLOW_UID_FILE, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return _OVERFLOW_UID_DEFAULT


def _has_pidfd(connection: socket.socket) -> bool:
    try:
        descriptor = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:  # ENOPROTOOPT before Linux 6.5; ESRCH or EINVAL: reaped already
        return False
    os.close(descriptor)
    return True


def _getpeereid(library: ctypes.CDLL, descriptor: int) -> Peer:
    uid, gid = ctypes.c_uint32(), ctypes.c_uint32()
    if library.getpeereid(descriptor, ctypes.byref(uid), ctypes.byref(gid)) != 0:
        libc.raise_errno("getpeereid")
    return Peer(uid.value, gid.value)
