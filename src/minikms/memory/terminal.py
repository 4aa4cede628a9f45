"""The terminal: secrets that a person types or is shown.

Owns: the controlling terminal, and its modes while a secret is typed. Invariants: a secret passes between the kernel
and slots of the arena by `readv(2)` and `writev(2)`, and never becomes a Python object. However the reading ends, but
for SIGKILL and SIGSTOP, the modes are restored and typed bytes are thrown away before a signal that came meanwhile has
its effect; after a stop the prompt comes again, without echo. Before a prompt the process forbids core dumps of itself,
and other processes of its user to read its memory. Input from before the prompt is thrown away, and so is the rest
of a line that is too long. It must never take standard input or output for the terminal: they may be a pipe, or a file
on a disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import termios
from collections.abc import Iterator, Sequence
from typing import Any, Final

from minikms.api.errors import InvalidRequestError, StartError
from minikms.memory.arena import SLOT_BYTES, SecretArena, SecretSlot, zero
from minikms.memory.process import forbid_dumps

TERMINAL: Final = "/dev/tty"
_ANSWER_BYTES_MAX: Final = 4096
"""A terminal passes on no longer line: termios(3), canonical mode."""
_LOCAL_MODES: Final = 3
"""The index of the local modes in what `termios.tcgetattr` returns."""
_HELD: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP, signal.SIGCONT)
"""Signals that end or stop the process, and the one that comes after a stop: a shell may have changed the modes."""
_SIGNALS_COUNT_MAX: Final = 256


@contextlib.contextmanager
def opened_terminal() -> Iterator[int]:
    """A descriptor of the terminal. The process is not dumped from now on. Raises StartError where there is none."""
    try:
        terminal = os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        raise StartError(
            "secrets are typed and shown on a terminal only, and this process has none: run it in a terminal"
        ) from None
    forbid_dumps()
    try:
        yield terminal
    finally:
        os.close(terminal)


def show(terminal: int, *parts: str | memoryview) -> None:
    """Writes texts, and the content of views, one after the other."""
    for part in parts:
        remaining = memoryview(part.encode()) if isinstance(part, str) else part
        while remaining:
            remaining = remaining[os.writev(terminal, [remaining]) :]


def confirmed(terminal: int, question: str) -> bool:
    """Whether a person answers the question with yes."""
    termios.tcflush(terminal, termios.TCIFLUSH)  # what was typed before can't be the answer
    show(terminal, f"{question} [y/N] ")
    return os.read(terminal, _ANSWER_BYTES_MAX).strip().lower() in (b"y", b"yes")


@contextlib.contextmanager
def typed_secret(prompt: str, bytes_max: int, arena: SecretArena) -> Iterator[list[memoryview]]:
    """The line that a person types after `prompt`, without its end, in views of slots that the end of the block zeroes.

    Raises:
        StartError: there is no terminal to ask on, or the line was not ended with Enter.
        InvalidRequestError: the line is longer than `bytes_max`.
        ArenaFullError: the arena has no room for the line.
    """
    with contextlib.ExitStack() as cleaning:
        terminal = cleaning.enter_context(opened_terminal())
        slots = [cleaning.enter_context(arena.allocate()) for _ in range(-(-(bytes_max + 1) // SLOT_BYTES))]
        count = read_secret(terminal, prompt, [slot.view for slot in slots])
        if count > bytes_max:
            raise InvalidRequestError(f"the line is longer than {bytes_max} bytes")
        yield _parts(slots, count)


def read_secret(terminal: int, prompt: str, views: Sequence[memoryview]) -> int:
    """Reads the line that a person types after `prompt` into the views, and returns its size without its end.

    A line that does not fit with its end is thrown away: the size is that of all views then. The caller zeroes them.
    It asks again if a signal came that did not end the process, such as that of Ctrl-Z. Only the main thread may call
    it. Raises StartError for a line that was not ended with Enter.
    """
    while True:
        with _held_signals() as signalled:
            size = _read_without_echo(terminal, prompt, views, signalled)
        if size is not None:
            return size
        for view in views:
            zero(view)


@contextlib.contextmanager
def _held_signals() -> Iterator[int]:
    """Signals have their effect at the end of the block. The descriptor is readable once one has come."""
    signalled, writes = os.pipe()
    os.set_blocking(signalled, False)
    os.set_blocking(writes, False)
    former = {number: signal.getsignal(number) for number in _HELD}
    former_writes = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        for number, handler in former.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        yield signalled
    finally:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, former)
        signal.set_wakeup_fd(former_writes)
        for number, handler in former.items():
            signal.signal(number, handler)
        with contextlib.suppress(BlockingIOError):
            for received in os.read(signalled, _SIGNALS_COUNT_MAX):
                if received in former:  # another one has had its effect
                    os.kill(os.getpid(), received)
        os.close(signalled)
        os.close(writes)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _read_without_echo(terminal: int, prompt: str, views: Sequence[memoryview], signalled: int) -> int | None:
    """Only the end of the line is shown. None if a signal came first."""
    before = termios.tcgetattr(terminal)
    silent = termios.tcgetattr(terminal)
    silent[_LOCAL_MODES] &= ~termios.ECHO
    silent[_LOCAL_MODES] |= termios.ICANON | termios.ECHONL
    if not _set_modes(terminal, silent):
        return None
    try:
        show(terminal, prompt)
        return _read_line(terminal, views, signalled)
    finally:
        with contextlib.suppress(termios.error):  # the terminal is gone
            # In the background the modes are the shell's to set, and each attempt would stop the process.
            while not _set_modes(terminal, before) and os.tcgetpgrp(terminal) == os.getpgrp():
                pass


def _set_modes(terminal: int, modes: list[Any]) -> bool:
    """Throws away what was typed, too. False: a signal came first, such as one that goes on after a stop.

    A process in the background is stopped here until it is in the foreground: termios(3), SIGTTOU.
    """
    try:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, modes)
    except termios.error as error:
        if error.args[0] == errno.EINTR:
            return False
        raise
    return True


def _read_line(terminal: int, views: Sequence[memoryview], signalled: int) -> int | None:
    """None if a signal came first.

    It reads a view at a time: older kernels go on waiting when a line ends where a part of `readv(2)` does.
    """
    total = 0
    for view in views:
        ready, _, _ = select.select([terminal, signalled], [], [])
        if signalled in ready:
            return None
        count = os.readv(terminal, [view])
        total += count
        if count and view[count - 1] == ord("\n"):
            view[count - 1] = 0
            return total - 1
        if count < len(view):
            raise StartError("the line was cut off: end it with Enter")
    return total


def _parts(slots: Sequence[SecretSlot], count: int) -> list[memoryview]:
    """The views of the first `count` bytes."""
    return [
        slot.view[: max(0, min(SLOT_BYTES, count - start))]
        for start, slot in zip(range(0, len(slots) * SLOT_BYTES, SLOT_BYTES), slots, strict=True)
        if start < count
    ]
