"""Signals as data that the event loop reads, never as handlers.

Owns: the process's signal mask and the descriptor that reads what is blocked. Invariants: every signal that can be
blocked is blocked before the first thread starts, so no thread ever runs a handler: a handler's frame would keep on the
stack the registers of what it interrupted, and with them a piece of a key schedule. The mask survives exec, so whoever
starts a child must give it `unblock_signals` first. What a signal means is the composition's business.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterator
from typing import Final, Self

from minikms.errors import StartError
from minikms.memory import libc

_SIGINFO: Final = struct.Struct("=I124x")  # struct signalfd_siginfo of signalfd(2): ssi_signo first, 128 bytes in all
_READ_COUNT_MAX: Final = 64
_SIGSET_WORDS: Final = 1024 // (8 * ctypes.sizeof(ctypes.c_ulong))  # sigset_t of glibc and musl: 1,024 bits


class SignalReader:
    """Blocks all signals in the calling thread, and reads them. Construct it before any other thread starts.

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
        """The signals that have arrived, each kind at most once per arrival; none when there are none. Never waits."""
        try:
            data = os.read(self._descriptor, _SIGINFO.size * _READ_COUNT_MAX)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return
            raise
        for (number,) in _SIGINFO.iter_unpack(data):
            yield number

    def close(self) -> None:
        """Close the descriptor; the signals stay blocked."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unblock_signals() -> None:
    """Undo the blocking in a child between fork and exec, or the child could not be ended by SIGTERM."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
