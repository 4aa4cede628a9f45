"""Signals as data that the event loop reads from a descriptor.

Owns: the signal mask of the process, and the descriptor that reads blocked signals. Invariant: every signal that can be
blocked is blocked before the first thread starts, so no thread ever runs a handler. The frame of a handler would keep
the registers of the interrupted code on the stack, and with them parts of a key schedule. The mask survives exec, so a
child must call `unblock_signals` before exec. The module must never decide what a signal means.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterator
from typing import Final, Self

from minikms.api.errors import StartError
from minikms.memory import libc

_SIGINFO: Final = struct.Struct("=I124x")  # struct signalfd_siginfo of signalfd(2): ssi_signo first, 128 bytes in all
_READ_COUNT_MAX: Final = 64
_SIGSET_WORDS: Final = 1024 // (8 * ctypes.sizeof(ctypes.c_ulong))  # sigset_t of glibc and musl: 1,024 bits


class SignalReader:
    """Blocks all signals in the calling thread and reads them. Construct it before any other thread starts.

    Raises:
        StartError: the kernel has no signalfd(2).
    """

    def __init__(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        everything = (ctypes.c_ulong * _SIGSET_WORDS)(*([ctypes.c_ulong(-1).value] * _SIGSET_WORDS))
        try:
            self._descriptor: int = libc.library().signalfd(-1, everything, os.O_CLOEXEC | os.O_NONBLOCK)
        except AttributeError:
            raise StartError("this system has no signalfd(2)") from None
        if self._descriptor < 0:
            number = ctypes.get_errno()
            raise StartError(f"signalfd: {os.strerror(number)}")

    def fileno(self) -> int:
        """For `loop.add_reader`."""
        return self._descriptor

    def read(self) -> Iterator[int]:
        """The numbers of the signals that have arrived. Never waits."""
        try:
            data = os.read(self._descriptor, _SIGINFO.size * _READ_COUNT_MAX)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return
            raise
        for (number,) in _SIGINFO.iter_unpack(data):
            yield number

    def close(self) -> None:
        """Close the descriptor. The signals stay blocked."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unblock_signals() -> None:
    """Unblock the signals in a child between fork and exec, so that SIGTERM can end it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
