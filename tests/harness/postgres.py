"""A PostgreSQL of a test's own, on a Unix socket in a directory of its own.

Owns: making the cluster and ending it. PostgreSQL refuses to run as root, so that it runs as `nobody` then.
"""

import atexit
import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from tests import needs

NOBODY = 65534
SETTINGS = ("max_connections=64", "shared_buffers=16MB", "listen_addresses=")
FORGETFUL = ("fsync=off", "full_page_writes=off")


def url_of(settings: str, user: str = "") -> str:
    """A URL for a connection string of `running`; by default of the same user."""
    given = dict(one.split("=", 1) for one in settings.split())
    return f"postgresql://{user or given['user']}@/{given['dbname']}?host={quote(given['host'], safe='')}"


@contextlib.contextmanager
def running(settings: Sequence[str] = FORGETFUL) -> Iterator[tuple[str, Path]]:
    """A connection string, and the directory that holds what is on disk."""
    with _started(lambda data: ["cp", "-a", "--reflink=auto", _template(), data], settings) as (url, data):
        yield url, data


@contextlib.contextmanager
def standby(primary: str, name: str) -> Iterator[str]:
    """A connection string to a node that replicates the one at `primary`, as the standby `name`."""
    source = primary.replace("dbname=postgres", f"application_name={name}")
    backup = [f"{needs.postgresql()}/pg_basebackup", "-d", source, "-R", "-c", "fast", "--no-sync", "-D"]
    with _started(lambda data: [*backup, data], FORGETFUL) as (url, _):
        yield url


def _directory() -> Path:
    """A new directory of the user that runs PostgreSQL."""
    base = Path(tempfile.mkdtemp(prefix="pg"))
    if (user := _user()) is not None:
        os.chown(base, user, user)
    return base


def _user() -> int | None:
    return NOBODY if os.geteuid() == 0 else None


@functools.cache
def _template() -> Path:
    """The files of a new cluster, which takes ten times as long to make as to copy. They go when this process ends."""
    base = _directory()
    atexit.register(shutil.rmtree, base)
    command = [f"{needs.postgresql()}/initdb", "-A", "trust", "-U", "test", "-E", "UTF8", "--no-sync", "-D"]
    _run([*command, base / "data"], _user())
    return base / "data"


@contextlib.contextmanager
def _started(command: Callable[[Path], list[str | Path]], settings: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """A PostgreSQL whose files the command makes in a directory."""
    programs = Path(needs.postgresql())
    base = _directory()
    user = _user()
    data = base / "data"
    try:
        _run(command(data), user)
        options = " ".join(f"-c {setting}" for setting in (*SETTINGS, *settings, f"unix_socket_directories={base}"))
        _run([programs / "pg_ctl", "-D", data, "-w", "-t", "60", "-l", base / "log", "-o", options, "start"], user)
        try:
            yield f"host={base} user=test dbname=postgres", data
        finally:
            _run([programs / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop"], user)
    finally:
        shutil.rmtree(base)


@contextlib.contextmanager
def receiver(primary: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that confirms to the primary what it has written, as a synchronous standby `name` does."""
    source = primary.replace("dbname=postgres", f"application_name={name}")
    with tempfile.TemporaryDirectory() as target:
        command = [f"{needs.postgresql()}/pg_receivewal", "-D", target, "-d", source, "--synchronous"]
        process = subprocess.Popen(command, cwd="/", stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _run(command: list[str | Path], user: int | None) -> None:
    """Output goes to a file: a server that is started would keep a pipe open."""
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            command, user=user, group=user, extra_groups=None if user is None else (), cwd="/",
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=120, check=False,
        )  # fmt: skip
        output.seek(0)
        assert done.returncode == 0, output.read().decode(errors="replace")
