"""Runs the programs of a provider: tpm2-tools, clevis.

Owns: where programs are found, their environment, pipes and time limit. Invariants: a program is run by its absolute
path, without a shell and with an environment of its own; a secret goes through pipes to and from memory of the caller,
and is in no argument, file, environment or Python object; when `run` returns or raises, the program's process group has
been killed. It must never put what a program says into an error: callers read numbers in it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from minikms_tokens.signing import TokenError
from minikms_tokens.wrapping import AwayError

PATH: Final = "/usr/bin:/bin:/usr/sbin:/sbin"
OUTPUT_BYTES_MAX: Final = 64 * 1024
"""The size of an output that is not secret."""
ERROR_BYTES_MAX: Final = 16 * 1024
"""The bytes of standard error that are kept; the rest is read and dropped."""
_READ_BYTES: Final = 4096


class Ended(NamedTuple):
    """`status`: of the exit, or minus the number of a signal. `output`: empty if it went into memory of the caller.
    `error` is not for people.
    """

    status: int
    output: bytes
    output_bytes: int
    error: bytes


def find(name: str, package: str) -> str:
    """The absolute path of a program of the Debian package `package`. Raises TokenError if it is not installed."""
    path = shutil.which(name, path=PATH)
    if path is None:
        raise TokenError(f"the program {name} is not installed: install the package {package}")
    return path


def run(
    command: Sequence[str],
    *,
    seconds: float,
    stdin: memoryview | bytes = b"",
    into: memoryview | None = None,
    files: tuple[int, ...] = (),
    environ: Mapping[str, str] | None = None,
) -> Ended:
    """Runs `command`, an absolute path and its arguments, with `stdin` as its standard input. `into`: memory for a
    secret output. `files`: descriptors that the program inherits. Raises AwayError if it does not end within
    `seconds`, or if its output is too long. Then, and after another status than 0, `into` has zeros.
    """
    pipe = subprocess.PIPE
    name = os.path.basename(command[0])
    deadline = time.monotonic() + seconds
    try:
        process = subprocess.Popen(  # noqa: S603  an absolute path, and no shell
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            bufsize=0,
            cwd="/",
            env={"PATH": PATH, "LC_ALL": "C", **(environ or {})},
            pass_fds=files,
            start_new_session=True,
        )
    except OSError as error:
        raise AwayError(f"{name} can't be run: {os.strerror(error.errno or 0)}") from None
    is_good = False
    with process:
        try:
            room = memoryview(bytearray(OUTPUT_BYTES_MAX)) if into is None else into
            count, error_text = _exchange(process, name, memoryview(stdin), room, deadline)
            is_good = process.wait() == 0
            return Ended(process.returncode, bytes(room[:count]) if into is None else b"", count, error_text)
        finally:
            if into is not None and not is_good:
                into[:] = bytes(len(into))
            _kill_group(process)


def _exchange(
    process: subprocess.Popen[bytes], name: str, rest: memoryview, room: memoryview, deadline: float
) -> tuple[int, bytes]:
    """Serves the pipes until the program has ended and they are closed. The number of bytes in `room`, and errors."""
    stdin, stdout, stderr = (stream.fileno() for stream in (process.stdin, process.stdout, process.stderr) if stream)
    os.set_blocking(stdin, False)
    count, errors = 0, bytearray()
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        ended = os.pidfd_open(process.pid)
        stack.callback(os.close, ended)
        selector.register(stdin, selectors.EVENT_WRITE)
        for descriptor in (stdout, stderr, ended):
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            ready = selector.select(left) if left > 0 else []
            if not ready:
                raise AwayError(f"{name} did not end in time")
            for key, _ in ready:
                if key.fd == stdin:
                    try:
                        rest = rest[os.write(stdin, rest) if rest else 0 :]
                    except BrokenPipeError:
                        rest = rest[:0]
                    goes_on = bool(rest)
                elif key.fd == stdout:
                    got = os.readv(stdout, [room[count:], bytearray(1)])
                    count, goes_on = count + got, got > 0
                    if count > len(room):
                        raise AwayError(f"{name} gave more than {len(room)} bytes")
                elif key.fd == stderr:
                    text = os.read(stderr, _READ_BYTES)
                    errors += text[: ERROR_BYTES_MAX - len(errors)]
                    goes_on = bool(text)
                else:  # the program has ended: what it has started is not waited for
                    _kill_group(process)
                    goes_on = False
                if not goes_on:
                    selector.unregister(key.fd)
                    if key.fd == stdin and process.stdin is not None:
                        process.stdin.close()
    return count, bytes(errors)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:  # afterwards its number may be that of another process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
