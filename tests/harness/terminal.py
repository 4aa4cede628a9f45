"""A program on a terminal of its own, as a person runs it.

Owns: the pseudo-terminal, which is the program's controlling terminal, and what it has shown. Invariants: a line is
typed only after the program has asked for it; everything that appears on the terminal is kept in `shown`.
"""

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from typing import Self

WAIT_S_MAX = 60.0


class OnTerminal:
    """A process with a controlling terminal, to the end of the `with` block.

    `output`: its standard output is the terminal too; otherwise a pipe, which the caller reads.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, output: bool = True) -> None:
        self._main, other = pty.openpty()
        self.shown = b""

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        try:
            self.process = subprocess.Popen(
                command,
                stdin=other,
                stdout=other if output else subprocess.PIPE,
                stderr=other,
                env=env,
                start_new_session=True,
                preexec_fn=take_terminal,
            )
        finally:
            os.close(other)

    def wait_for(self, text: str, *, times: int = 1) -> None:
        """Returns when the terminal has shown `text` `times` times."""
        while self.shown.count(text.encode()) < times:
            assert self._read(), f"{text!r} did not appear {times} times: {self.shown!r}"

    def type(self, line: str | bytes, end: bytes = b"\n") -> None:
        text = line.encode() if isinstance(line, str) else line
        os.write(self._main, text + end)

    def type_unfinished(self, text: bytes) -> None:
        """Types a part of a line, and returns when the driver of the terminal has it.

        The driver has then also acted on Ctrl-S and Ctrl-Q behind it, which it reports in packet mode: tty_ioctl(4).
        """
        fcntl.ioctl(self._main, termios.TIOCPKT, struct.pack("i", 1))
        os.write(self._main, text + b"\x13\x11")
        acted = 0
        while not acted & termios.TIOCPKT_START:
            ready, _, _ = select.select([self._main], [], [], WAIT_S_MAX)
            assert ready, "the terminal did not act on what was typed"
            kind, *data = os.read(self._main, 65536)
            acted |= kind
            self.shown += bytes(data)
        fcntl.ioctl(self._main, termios.TIOCPKT, struct.pack("i", 0))

    def echoes(self) -> bool:
        """Whether the terminal shows what is typed."""
        return bool(termios.tcgetattr(self._main)[3] & termios.ECHO)

    def signal_foreground(self, number: int) -> None:
        """Sends a signal to the processes that may read the terminal."""
        os.killpg(os.tcgetpgrp(self._main), number)

    def wait(self) -> int:
        """The exit status; what was shown until then is in `shown`."""
        while self._read():
            pass
        return self.process.wait(WAIT_S_MAX)

    def _read(self) -> bytes:
        ready, _, _ = select.select([self._main], [], [], WAIT_S_MAX)
        assert ready, f"the program shows nothing more: {self.shown!r}"
        try:
            part = os.read(self._main, 65536)
        except OSError:  # the last process with the terminal has ended
            return b""
        self.shown += part
        return part

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        os.close(self._main)
        with contextlib.closing(self.process.stdout) if self.process.stdout else contextlib.nullcontext():
            self.process.wait()
