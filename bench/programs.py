"""The programs under measurement, as real processes in a temporary directory, taken down whatever happens.

Owns the starting, the waiting for readiness and the ending. The message server takes a free port itself: one that is
chosen for it may be taken before it listens. Never signals a process that it did not start.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from bench.report import say

READY_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0
POLL_SECONDS = 0.05
BACKEND_KEY = "bench-backend-key"
ADMIN_KEY = "bench-admin-key"
OUTPUT_BYTES_MAX = 65536
"""Of a program's output, in which its address is looked for."""
_LISTENS = re.compile(rb"http://127\.0\.0\.1:([0-9]+)\D")
HERE = Path(__file__).resolve().parent

T = TypeVar("T")


class BenchError(Exception):
    """A program did not start, or an answer was not what the bench counts on. The figure would mean nothing."""


class MissingProgramError(BenchError):
    """A program that this bench measures with is not installed."""


_kept: contextlib.ExitStack | None = None
"""Removes the workplaces of `workplaces_kept`; None outside its block."""


@contextlib.contextmanager
def workplaces_kept() -> Iterator[None]:
    """Each workplace of the block stays until the block ends, however it ends: ext4 makes new files more slowly for
    some minutes after many were deleted, so a removal would disturb what is measured next.
    """
    global _kept
    with contextlib.ExitStack() as stack:
        _kept = stack
        try:
            yield
        finally:
            _kept = None
            say("removing the files of all runs")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A temporary directory with a root key file `root-key` in it."""
    with contextlib.ExitStack() as own:
        stack = own if _kept is None else _kept
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minikms-bench-")))
        key_file = directory / "root-key"
        key_file.touch(mode=0o600)
        key_file.write_text(secrets.token_hex(32) + "\n")
        yield directory


def need(*names: str) -> None:
    """Raises MissingProgramError naming what is not on PATH."""
    packages = {"go": "golang-go", "h2load": "nghttp2-client"}
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        debian = " ".join(packages.get(name, name) for name in missing)
        raise MissingProgramError(f"needs {' and '.join(missing)} (Debian: `apt-get install {debian}`)")


@contextlib.contextmanager
def minikms(
    directory: Path,
    *arguments: str,
    ready: Callable[[str], bool] | None = None,
    poll_seconds: float = POLL_SECONDS,
    checkout: Path | None = None,
    code: str = "",
) -> Iterator[str]:
    """The key service with audit on, as it comes but for more `arguments`. Yields its socket's path.

    `checkout`: of another version of this project, with a `.venv`. `code`: a program that runs the service.

    `ready` says of the path whether it is ready; without it, a healthy answer does.
    """
    path = str(directory / "kms.sock")
    command = [_installed("minikms", checkout)]
    if code:
        (directory / "launcher.py").write_text(code)
        command = [_installed("python", checkout), str(directory / "launcher.py")]
    command += ["--socket", path, "--data-dir", str(directory / "kms")]
    command += ["--master-key-file", str(directory / "root-key"), *arguments]
    is_ready = ready or (lambda path: _answers(path, "/health"))
    with _running(command, lambda _: is_ready(path), poll_seconds=poll_seconds):
        yield path


@contextlib.contextmanager
def auditor(config: Path, ready: Callable[[], bool]) -> Iterator[None]:
    """The auditor with this configuration."""
    command = [_installed("minikms-auditor"), "--config", str(config)]
    with _running(command, lambda _: ready()):
        yield


@contextlib.contextmanager
def progressdb(
    directory: Path, *, encrypting: bool = True, checkout: Path | None = None, database: str = ""
) -> Iterator[tuple[str, int]]:
    """The message server with its key service, or not `encrypting` (bench/unencrypted.py). `checkout`: of another
    version of this project, with a `.venv`. `database`: the URL of its store; `minikms` runs in the directory then.
    Yields the address it listens on.
    """
    environment = {
        "PROGRESSDB_API_BACKEND_KEYS": BACKEND_KEY,
        "PROGRESSDB_API_ADMIN_KEYS": ADMIN_KEY,
        "PROGRESSDB_RATE_RPS": "0",
    }
    command = [_installed("progressdb", checkout), "--addr", "127.0.0.1:0"]
    if encrypting:
        command += ["--db", str(directory / "db")]
        environment |= {
            "PROGRESSDB_KMS_SOCKET": str(directory / "kms.sock"),
            "PROGRESSDB_KMS_DATA_DIR": str(directory / "kms"),
        }
        if database:
            environment |= {
                "PROGRESSDB_STORE_URL": database,
                "PROGRESSDB_STORE_SINGLE_NODE": "1",
                "PROGRESSDB_KMS_SPAWN": "0",
            }
        else:
            environment["PROGRESSDB_MINIKMS_MASTER_KEY_FILE"] = str(directory / "root-key")
    else:
        command = [sys.executable, "-m", "bench.unencrypted", *command[1:]]
        command += ["--db", str(directory / "unencrypted-db"), "--dev"]
        environment["PROGRESSDB_KMS_PROVIDER"] = "local"
    with _running(command, _port_in, environment) as port:
        yield "127.0.0.1", port


@contextlib.contextmanager
def yardstick(directory: Path) -> Iterator[str]:
    """The Go program of bench/yardstick, built from its source. Yields its socket's path."""
    program, path = directory / "yardstick", str(directory / "yardstick.sock")
    build = ["go", "build", "-o", str(program), "."]
    built = subprocess.run(build, cwd=HERE / "yardstick", capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise BenchError(f"go build failed: {built.stderr.strip()}")
    with _running([str(program), path], lambda _: _answers(path, "/")):
        yield path


def _installed(name: str, checkout: Path | None = None) -> str:
    path = (Path(sys.executable).parent if checkout is None else checkout / ".venv" / "bin") / name
    if not path.exists():
        raise BenchError(f"{path} is not installed; run `make venv`")
    return str(path)


def _port_in(output: IO[bytes]) -> int:
    """The port that the message server says it listens on; 0 before that."""
    said = _LISTENS.search(os.pread(output.fileno(), OUTPUT_BYTES_MAX, 0))  # not `read`: the server writes at its place
    return int(said[1]) if said else 0


@contextlib.contextmanager
def _running(
    command: list[str],
    ready: Callable[[IO[bytes]], T],
    environment: dict[str, str] | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> Iterator[T]:
    """The process from its readiness on, which `ready` is asked with the process's output: its first true answer. It
    must still run at the end of the block, or what was measured was not it.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=kept | (environment or {}), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + READY_SECONDS_MAX
            while not (answer := ready(output)):
                if process.poll() is not None or time.monotonic() > end:
                    raise BenchError(f"{command[0]} did not get ready:\n{_tail(output)}")
                time.sleep(poll_seconds)
            yield answer
            if process.poll() is not None:
                raise BenchError(f"{command[0]} ended while it was measured:\n{_tail(output)}")
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answers(path: str, target: str) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(2)
            connection.connect(path)
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode())
            return connection.recv(12).startswith(b"HTTP/1.1")
    except OSError:
        return False


def _tail(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")[-2000:]
