"""The seam to the C library, for the system calls that Python has no function for.

Owns: the one handle on libc, and the rule by which its answers become `OSError`. Invariants: a call that fails raises,
with the call's name in the text; arguments are integers, addresses or `bytes` that hold no secret.
It must never be given key material by value: secrets stay in the arena, and only their address passes through here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Final, NoReturn

LINUX: Final = sys.platform.startswith("linux")
"""Not `sys.platform == "linux"`, which would make the type checker skip the other half."""


@functools.cache
def library() -> ctypes.CDLL:
    """The process's own libc, with `errno` kept for each call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if LINUX:
        libc.syscall.restype = ctypes.c_long
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def raise_errno(call: str) -> NoReturn:
    """Raise the `OSError` of the call that has just failed in this thread."""
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {os.strerror(number)}")


def syscall(call: str, number: int, *args: int | ctypes.c_void_p | None) -> int:
    """syscall(2): `call` is the name for the error text. Integers are passed as C longs (the kernel's register width).

    Raises:
        OSError: the call failed; `errno` is the kernel's.
    """
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in args]
    result: int = library().syscall(ctypes.c_long(number), *wide)
    if result < 0:
        raise_errno(call)
    return result


def prctl(call: str, option: int, *args: int | ctypes.c_void_p) -> int:
    """prctl(2), with unused arguments zero, as the newer options demand.

    Raises:
        OSError: the call failed; `errno` is the kernel's.
    """
    wide = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in args]
    wide += [ctypes.c_ulong(0)] * (4 - len(wide))
    result: int = library().prctl(ctypes.c_int(option), *wide)
    if result < 0:
        raise_errno(call)
    return result
