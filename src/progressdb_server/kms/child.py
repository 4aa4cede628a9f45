"""A miniKMS process that this server started.

Owns: its command line, its environment, the pipe whose end of file tells it that the server is gone, and the lines it
writes to stderr. Invariants: it inherits the descriptors named here and no others, and no variable but those of
`environment`; it leads a session of its own, so that a Ctrl-C meant for the server does not take the keys away before
the server is done; it never outlives the server, not even when that is killed (the kernel closes the pipe).
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

LINE_BYTES_MAX: Final = 8192
"""Of one line of the child's log; the rest of a longer one is dropped."""
LAST_LINES_MAX: Final = 5
STOP_S_MAX: Final = 10.0
LAST_LINES_S_MAX: Final = 1.0
"""After its end: a process of its own may still hold its stderr."""
_READ_BYTES_MAX: Final = 64 * 1024
_KEPT_VARIABLES: Final = ("LANG", "LC_ALL", "LC_CTYPE", "PATH", "TZ")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildOptions:
    """What to start. Paths are taken as seen from the server's working directory.

    `binary` is the program (PROGRESSDB_KMS_BINARY); None is the miniKMS installed beside this server. At most one of
    `master_key_file` and `master_key_fd` is given; neither leaves it to `dev` or to a start that is refused.
    """

    socket_path: str
    data_dir: str
    binary: str | None = None
    dev: bool = False
    master_key_file: str | None = None
    master_key_fd: int | None = None
    log_format: str = "json"

    def command(self, parent_fd: int, audit_head: str = "") -> list[str]:
        """`audit_head`: the line that its audit log must have (`SEQ:SIG`), empty where none is remembered."""
        # -P: or a file in the working directory could stand in for a module of the key service
        program = [os.path.abspath(self.binary)] if self.binary else [sys.executable, "-P", "-m", "minikms"]
        words = [*program, "--socket", os.path.abspath(self.socket_path), "--data-dir", os.path.abspath(self.data_dir)]
        if self.master_key_file:
            words += ["--master-key-file", os.path.abspath(self.master_key_file)]
        if self.master_key_fd is not None:
            words += ["--master-key-fd", str(self.master_key_fd)]
        if self.dev:
            words.append("--dev")
        if audit_head:
            words += ["--expect-audit-head", audit_head]
        return [*words, "--parent-fd", str(parent_fd), "--log-format", self.log_format]


def environment(own: Mapping[str, str], uid: int) -> dict[str, str]:
    """The child's environment: the server's uid is the one that it serves, and nothing secret can be in it."""
    kept = {name: own[name] for name in _KEPT_VARIABLES if name in own}
    return {**kept, "PROGRESSDB_MINIKMS_ALLOWED_UIDS": str(uid)}


class Lines:
    """Cuts a stream into lines of bounded length, safe to log. Pure."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that `data` completes; without data (at the end) the rest."""
        *whole, rest = data.split(b"\n") if data else [b"", b""]
        for piece in whole:
            self._keep(piece)
            if self._kept:
                yield self._text()
            self._kept.clear()
        self._keep(rest)

    def _keep(self, piece: bytes) -> None:
        self._kept += piece[: LINE_BYTES_MAX + 1 - len(self._kept)]

    def _text(self) -> str:
        text = self._kept[:LINE_BYTES_MAX].decode("utf-8", "replace")
        cleaned = "".join(char if char.isprintable() else " " for char in text).rstrip()
        return f"{cleaned} … (cut)" if len(self._kept) > LINE_BYTES_MAX else cleaned


class Child:
    """A started process; made by `Child.start`, ended by itself or by `stop`."""

    def __init__(self, process: Process, parent_pipe: int, on_line: Callable[[str], None]) -> None:
        self._process = process
        self._parent_pipe: int | None = parent_pipe
        self._on_line = on_line
        self.last_lines: list[str] = []
        self._forwarding = asyncio.get_running_loop().create_task(self._forward(), name="minikms log")

    @classmethod
    async def start(cls, options: ChildOptions, on_line: Callable[[str], None], *, audit_head: str = "") -> Child:
        """Raises OSError when the program can't be started."""
        for_child, ours = os.pipe2(os.O_CLOEXEC)
        try:
            passed = [for_child]
            if options.master_key_fd is not None:
                os.lseek(options.master_key_fd, 0, os.SEEK_SET)  # the offset is shared with the child before
                passed.append(options.master_key_fd)
            process = await asyncio.create_subprocess_exec(
                *options.command(for_child, audit_head),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=PIPE,
                env=environment(os.environ, os.geteuid()),
                pass_fds=passed,
                start_new_session=True,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(for_child)
        return cls(process, ours, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Waits for its end and its last lines; the exit status, negative for a signal."""
        status = await self._process.wait()
        await asyncio.wait([self._forwarding], timeout=LAST_LINES_S_MAX)
        self._close_pipe()
        return status

    async def stop(self) -> None:
        """Asks it to end, and kills it after `STOP_S_MAX`."""
        try:
            if self._process.returncode is None:
                self._process.terminate()
            async with asyncio.timeout(STOP_S_MAX):
                await self.wait()
        except (TimeoutError, ProcessLookupError):
            if self._process.returncode is None:
                self._process.kill()
            await self.wait()
        finally:
            self._close_pipe()
            self._forwarding.cancel()

    def _close_pipe(self) -> None:
        if self._parent_pipe is not None:
            os.close(self._parent_pipe)
            self._parent_pipe = None

    async def _forward(self) -> None:
        stream = self._process.stderr
        lines = Lines()
        data = b"."
        while stream is not None and data:
            data = await stream.read(_READ_BYTES_MAX)
            for line in lines.feed(data):
                self.last_lines = [*self.last_lines[1 - LAST_LINES_MAX :], line]
                self._on_line(line)
