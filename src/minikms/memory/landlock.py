"""Landlock (landlock(7)): which files the process may still use, and to which processes it may send signals.

Owns: the rights that are granted, and the call that gives up all others permanently. On Linux 6.12 and later that call
also gives up sending signals to processes other than itself and its children. Otherwise an attacker who controls the
daemon could end other processes of the same user. Invariants: each access right in `_ACCESS_BITS_BY_ABI` that the
running kernel supports is either granted below a given path or given up, except the right to execute, which the caller
may keep for all paths. Rights that later kernels add are not restricted. Landlock restricts the calling thread and the
threads and processes that it starts later, so the caller must call it while the process has one thread. Files that are
already open stay usable. A path that can't be opened grants nothing; no other path is used in its place.
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
"""Number of access bits, from bit 0, that each ABI version supports. A version above 5 is treated as version 5."""

_READ: Final = _READ_FILE | _READ_DIR
_WRITE: Final = (
    _READ | _WRITE_FILE | _TRUNCATE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _REFER
)
_FILE_RIGHTS: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
"""The rights that can be granted for a path that is not a directory; the kernel refuses a rule with others."""

_SCOPE_SIGNAL: Final = 1 << 1  # LANDLOCK_SCOPE_SIGNAL
_SCOPES_ABI_MIN: Final = 6
_RULESET_ATTR: Final = struct.Struct("=QQQ")
"""struct landlock_ruleset_attr: files, network, scopes. Kernels without the last two fields accept zeros there."""
_RULE_PATH_BENEATH: Final = 1
_PATH_BENEATH: Final = struct.Struct("=Qi")  # struct landlock_path_beneath_attr, packed
_CREATE_RULESET_VERSION: Final = 1


def restrict_filesystem(*, read: Iterable[str], write: Iterable[str], execute: bool) -> None:
    """Give up access to all files other than those given, permanently.

    Args:
        read: files and directories that may be read, with everything below them.
        write: files and directories as in `read`, in which files may also be created, changed, removed and renamed,
            including from one of these directories to another (REFER).
        execute: whether the process may still start the programs that it may read. If false, it can start none.

    Raises:
        OSError: ENOSYS or EOPNOTSUPP if the kernel has no Landlock, EPERM without `no_new_privs`.
    """
    abi = libc.syscall("landlock_create_ruleset", _SYS_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    handled = (1 << _ACCESS_BITS_BY_ABI[min(abi, max(_ACCESS_BITS_BY_ABI))]) - 1
    if execute:
        handled &= ~_EXECUTE
    scopes = _SCOPE_SIGNAL if abi >= _SCOPES_ABI_MIN else 0
    attributes = ctypes.create_string_buffer(_RULESET_ATTR.pack(handled, 0, scopes), _RULESET_ATTR.size)
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
            rights &= _FILE_RIGHTS
        rule = ctypes.create_string_buffer(_PATH_BENEATH.pack(rights, descriptor), _PATH_BENEATH.size)
        libc.syscall("landlock_add_rule", _SYS_ADD_RULE, ruleset, _RULE_PATH_BENEATH, _address(rule), 0)
    finally:
        os.close(descriptor)


def _address(buffer: ctypes.Array[ctypes.c_char]) -> ctypes.c_void_p:
    return ctypes.cast(buffer, ctypes.c_void_p)
