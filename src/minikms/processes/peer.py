"""The credentials of the peer of a Unix socket, from the kernel.

Owns: reading them, once for each connection, before a byte of it is parsed. Invariants: they are those of the process
that called connect(2), at that time; a descriptor that is passed on later keeps their authority, by design. A uid that
has no number in this user namespace appears as the overflow uid, which stands for many users and must never be allowed.
The module decides nothing about who may do what: that is `minikms.policy`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import signal
import socket
import struct
from typing import Final, NamedTuple

from minikms.memory import libc

_UCRED: Final = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid
SO_PEERPIDFD: Final = 77  # asm-generic/socket.h, Linux 6.5
_NO_UID: Final = 0xFFFFFFFF
OVERFLOW_UID_FILE: Final = "/proc/sys/kernel/overflowuid"
_OVERFLOW_UID_DEFAULT: Final = 65534
PID_UNKNOWN: Final = 0


class Peer(NamedTuple):
    """The process that connected. `pid` is PID_UNKNOWN where the kernel does not give it: on BSD and macOS, and of a
    process in a pid namespace that this one can't see, such as another container's.

    `pid_certain`: the kernel also gave a pidfd (SO_PEERPIDFD) of a process that had not been reaped when this was read,
    so the pid was not yet that of a later process.
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
    if not libc.LINUX:
        return _getpeereid(libc.library(), connection.fileno())
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid == _NO_UID:  # the kernel's answer for a socket without a peer, or of another family
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
    return Peer(uid, gid, pid, pid != PID_UNKNOWN and _not_reaped(connection))


def is_overflow_uid(uid: int) -> bool:
    """Whether `uid` stands for all users that have no number in this user namespace."""
    return uid == overflow_uid()


@functools.cache
def overflow_uid() -> int:
    """The uid that stands for unmapped users (user_namespaces(7)). Read once: the file may be unreadable after
    hardening.
    """
    try:
        with open(OVERFLOW_UID_FILE, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return _OVERFLOW_UID_DEFAULT


def _not_reaped(connection: socket.socket) -> bool:
    """Whether the process that connected is known to have its pid still."""
    try:
        descriptor = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:  # ENOPROTOOPT before Linux 6.5; some later ones refuse it for a process that was reaped
        return False
    try:
        signal.pidfd_send_signal(descriptor, 0)  # signal 0 only checks that the process exists: pidfd_send_signal(2)
    except PermissionError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _getpeereid(library: ctypes.CDLL, descriptor: int) -> Peer:
    uid, gid = ctypes.c_uint32(), ctypes.c_uint32()
    if library.getpeereid(descriptor, ctypes.byref(uid), ctypes.byref(gid)) != 0:
        libc.raise_errno("getpeereid")
    return Peer(uid.value, gid.value)
