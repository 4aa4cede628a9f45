"""Landlock (landlock(7)): which files the process may still use, and to which processes it may send signals.

Owns: the rights that are granted, and the call that gives up all others permanently. Since Linux 6.12 it also gives up
signals to processes other than itself and its children: an intruder in the daemon could otherwise end other processes
of the same user. Invariants: every right that the running kernel knows is either granted below a given path or given
up; rights of later kernels are not changed. Landlock binds the calling thread and what it starts, so the call comes
while there is one thread. Files that are already open stay usable. It must never widen a path: a path that can't be
opened grants nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable
from typing import Final

from minikms.memory import libc

# asm-generic/unistd.h; the same number on every architecture.
_SYS_CREATE_RULESET: Final = 444
_SYS_ADD_RULE: Final = 445
_SYS_RESTRICT_SELF: Final = 446

# linux/landlock.h: LANDLOCK_ACCESS_FS_*.
_EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_REMOVE_DIR: Final = 1 << 4
_REMOVE_FILE: Final = 1 << 5
_MAKE_DIR: Final = 1 << 7
_MAKE_REG: Final = 1 << 8
_MAKE_SOCK: Final = 1 << 9
_REFER: Final = 1 << 13
_TRUNCATE: Final = 1 << 14

_ACCESS_BITS_BY_ABI: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many of the access bits, counted from bit 0, an ABI version knows. Versions above 5 added none here."""

_READ: Final = _READ_FILE | _READ_DIR
_WRITE: Final = (
    _READ | _WRITE_FILE | _TRUNCATE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _REFER
)
_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
"""The rights that can be granted for a path that is not a directory; the kernel refuses a rule with others."""

_SCOPE_SIGNAL: Final = 1 << 1  # LANDLOCK_SCOPE_SIGNAL
_SCOPES_ABI_MIN: Final = 6
_RULESET: Final = struct.Struct(
    "=QQQ"
)  # struct landlock_ruleset_attr: files, network, scopes; older kernels take zeros
_RULE_PATH_BENEATH: Final = 1
_PATH_BENEATH: Final = struct.Struct("=Qi")  # struct landlock_path_beneath_attr, packed
_CREATE_RULESET_VERSION: Final = 1


def restrict_filesystem(*, read: Iterable[str], write: Iterable[str], execute: bool) -> None:
    """Give up every access to other files permanently.

    Args:
        read: files and directories that may be read, with everything below them.
        write: the same, and files may be made, changed, removed, and renamed between these directories (REFER).
        execute: keep the right to start programs that may be read; otherwise no program can be started.

    Raises:
        OSError: ENOSYS or EOPNOTSUPP if the kernel has no Landlock, EPERM without `no_new_privs`.
    """
    abi = libc.syscall("landlock_create_ruleset", _SYS_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    handled = (1 << _ACCESS_BITS_BY_ABI[min(abi, max(_ACCESS_BITS_BY_ABI))]) - 1
    if execute:
        handled &= ~_EXECUTE
    scopes = _SCOPE_SIGNAL if abi >= _SCOPES_ABI_MIN else 0
    attributes = ctypes.create_string_buffer(_RULESET.pack(handled, 0, scopes), _RULESET.size)
    ruleset = libc.syscall(
        "landlock_create_ruleset", _SYS_CREATE_RULESET, _address(attributes), ctypes.sizeof(attributes), 0
    )
    try:
        for paths, rights in ((read, _READ), (write, _WRITE)):
            for path in paths:
                _allow(ruleset, path, rights & handled)
        libc.syscall("landlock_restrict_self", _SYS_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return
        raise
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        rule = ctypes.create_string_buffer(_PATH_BENEATH.pack(rights, descriptor), _PATH_BENEATH.size)
        libc.syscall("landlock_add_rule", _SYS_ADD_RULE, ruleset, _RULE_PATH_BENEATH, _address(rule), 0)
    finally:
        os.close(descriptor)


def _address(buffer: ctypes.Array[ctypes.c_char]) -> ctypes.c_void_p:
    return ctypes.cast(buffer, ctypes.c_void_p)
