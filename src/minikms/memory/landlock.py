"""The file system that is left to the process, by Landlock (landlock(7)), and whom it may send signals to.

Owns: the rights that are named and the one call that gives up all others, for good. Where the kernel can (since 6.12),
signals to processes other than its own and those that it starts are given up too: under a user that it shares with
others, a daemon that was taken over could end them. Invariants: a right that the running kernel knows is either granted
below a given path or given up; new rights of later kernels are untouched. It binds the calling thread and what it
starts, so it is called while there is one thread. Files that are open already stay usable. It must never widen a path:
a path that cannot be opened grants nothing.
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
"""The rights that a path which is no directory may be granted; the kernel refuses a rule with others."""

_SCOPE_SIGNAL: Final = 1 << 1  # LANDLOCK_SCOPE_SIGNAL
_SCOPES_ABI_MIN: Final = 6
_RULESET: Final = struct.Struct(
    "=QQQ"
)  # struct landlock_ruleset_attr: files, network, scopes; older kernels take zeros
_RULE_PATH_BENEATH: Final = 1
_PATH_BENEATH: Final = struct.Struct("=Qi")  # struct landlock_path_beneath_attr, packed
_CREATE_RULESET_VERSION: Final = 1


def restrict_filesystem(*, read: Iterable[str], write: Iterable[str], execute: bool) -> None:
    """Give up every access to files but these, for good.

    Args:
        read: files and directories to be read, with all that is below them.
        write: the same, to be changed as well: files made, removed, and renamed among these directories (REFER).
        execute: keep the right to start programs, of those that can be read; otherwise none can be started.

    Raises:
        OSError: ENOSYS or EOPNOTSUPP where the kernel has no Landlock, EPERM without `no_new_privs`.
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
