"""Moves a root key out of the server's own environment, before anything else happens.

Owns: the move of `PROGRESSDB_MINIKMS_MASTER_KEY` into a sealed memfd that this process never maps, and the
re-execution without the variable. Invariants: the process that continues never had the key in its memory (execve(2)
replaces the address space in which the variable was); its `/proc/<pid>/environ` has no key; the memfd's content can't
be changed (F_SEAL_*), and only the child that it is passed to inherits it. The caller of `take` passes it to one
child and closes it, because /proc/<pid>/fd shows the key as long as it is open. Only miniKMS checks the key, so
that this process never reads it. `main` calls `take` before it imports other modules; this module imports only what the
interpreter has loaded already.
"""

from __future__ import annotations

import fcntl
import os
import sys
from typing import Final

KEY_VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY"
KEY_FILE_VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY_FILE"
DESCRIPTOR_VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY_FD"
"""Only between the process that found the key and its successor; not a setting."""
_SEAL_NAMES: Final = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")


class MasterKeyError(Exception):
    """The master key's variables can't be used; the text says why, and has no key in it."""


def take() -> int | None:
    """The descriptor of the key that was in the environment, for `ChildOptions.master_key_fd`; None without one.
    The caller closes it.

    Does not return if the key is still in the environment: the process executes the same program again with the same
    arguments. Raises MasterKeyError when a key and a key file are both given, or the system has no sealed memfd.
    """
    if os.environb.get(KEY_VARIABLE.encode()):
        if os.environ.get(KEY_FILE_VARIABLE):
            raise MasterKeyError(f"{KEY_VARIABLE} and {KEY_FILE_VARIABLE} are both given: unset one of them")
        _start_over()
    return _received()


def _seals() -> int:
    """The seals of the memfd; 0 where the system has none (it is not Linux)."""
    if not hasattr(os, "memfd_create") or not all(hasattr(fcntl, name) for name in _SEAL_NAMES):
        return 0
    return sum(getattr(fcntl, name) for name in _SEAL_NAMES)


def _start_over() -> None:
    seals = _seals()
    if not seals:
        raise MasterKeyError(
            f"{KEY_VARIABLE} can't be used on this system, which has no sealed memory file to pass the key on in: "
            f"write the key to a file of mode 0600 and give it with {KEY_FILE_VARIABLE}"
        )
    descriptor = os.memfd_create("progressdb-master-key", os.MFD_ALLOW_SEALING)  # inherited through exec, this once
    os.pwrite(descriptor, os.environb[KEY_VARIABLE.encode()], 0)  # the offset stays 0: the child reads from there
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    successors = {name: value for name, value in os.environb.items() if name != KEY_VARIABLE.encode()}
    successors[DESCRIPTOR_VARIABLE.encode()] = b"%d" % descriptor
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], successors)  # noqa: S606 - the same program again


def _received() -> int | None:
    text = os.environ.pop(DESCRIPTOR_VARIABLE, "")
    if not text:
        return None
    try:
        descriptor = int(text)
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) if _seals() else 0
    except (ValueError, OSError):
        seals = 0
    if not seals or seals != _seals():
        raise MasterKeyError(
            f"{DESCRIPTOR_VARIABLE} is set, but not by this program: unset it, and use {KEY_FILE_VARIABLE}"
        )
    os.set_inheritable(descriptor, False)
    return descriptor
