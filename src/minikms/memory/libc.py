"""The C library, for system calls that Python has no function for.

Owns: the handle of libc, and the conversion of its errors to `OSError`. Invariants: a call that fails raises, with the
name of the call in the text; arguments are integers, addresses, or `bytes` without a secret. It must never get key
material by value: secrets stay in the arena, and only their address is passed.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Final, NoReturn

LINUX: Final = sys.platform.startswith("linux")
"""Not `sys.platform == "linux"`, because the type checker would then skip the other branch."""


LOCKING_FILTERED: Final = (
    "RLIMIT_MEMLOCK permits it, so a system call filter refuses it, such as a container's: permit mlock(2) and "
    "mlockall(2) in its seccomp profile"
)
"""Why memory can't be locked, for EPERM below the limit."""


@functools.cache
def library() -> ctypes.CDLL:
    """The libc of the process, with `errno` saved after each call."""
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
    """Raise the `OSError` of the last failed call in this thread."""
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {os.strerror(number)}")


def syscall(call: str, number: int, *args: int | ctypes.c_void_p | None) -> int:
    """syscall(2). `call`: the name for the error text. Integers are passed as C longs (the kernel's register width).

    Raises:
        OSError: the call failed; `errno` is that of the kernel.
    """
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in args]
    result: int = library().syscall(ctypes.c_long(number), *wide)
    if result < 0:
        raise_errno(call)
    return result


def prctl(call: str, option: int, *args: int | ctypes.c_void_p) -> int:
    """prctl(2). Unused arguments are zero, as newer options require.

    Raises:
        OSError: the call failed; `errno` is that of the kernel.
    """
    wide = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in args]
    wide += [ctypes.c_ulong(0)] * (4 - len(wide))
    result: int = library().prctl(ctypes.c_int(option), *wide)
    if result < 0:
        raise_errno(call)
    return result
