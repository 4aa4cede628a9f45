"""The README's examples do what they say, typed as they are."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
README = (PROJECT / "README.md").read_text("utf-8")
READY_S_MAX = 30.0


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def start(place: Path, line: str, **variables: str) -> subprocess.Popen[bytes]:
    """A line of the README, with the project's own programs, in `place`."""
    program, *flags = shlex.split(line)
    module = {".venv/bin/minikms": "minikms", ".venv/bin/progressdb": "progressdb_server"}[program]
    command = [sys.executable, "-P", "-m", module, *flags]
    return subprocess.Popen(command, cwd=place, env=os.environ | variables, stdin=subprocess.DEVNULL)


def the_line(start_of_it: str) -> str:
    (line,) = [line for block in blocks("sh") for line in block.splitlines() if line.startswith(start_of_it)]
    return line


def wait_for(listening: Path | tuple[str, int]) -> None:
    end = time.monotonic() + READY_S_MAX
    family = socket.AF_UNIX if isinstance(listening, Path) else socket.AF_INET
    while True:
        with socket.socket(family) as trial:
            try:
                trial.connect(str(listening) if isinstance(listening, Path) else listening)
                return
            except OSError:
                assert time.monotonic() < end
        time.sleep(0.02)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    assert process.wait(READY_S_MAX) == 0


def test_the_library_example_runs_against_the_daemon_started_as_shown(tmp_path: Path) -> None:
    assert "`mkdir -m 700 kms`" in README
    (tmp_path / "kms").mkdir(mode=0o700)
    key_file = tmp_path / "root-key"
    key_file.touch(mode=0o600)
    key_file.write_text(secrets.token_hex(32))
    daemon = start(tmp_path, the_line(".venv/bin/minikms").replace("FILE", "root-key"))
    try:
        # a short path: the directory of a test may be too deep for a socket's name
        wait_for(Path(os.path.relpath(tmp_path / "kms" / "minikms.sock")))
        (example,) = blocks("python")
        ran = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=False, timeout=READY_S_MAX)
        assert ran.returncode == 0
    finally:
        stop(daemon)


def test_the_curl_example_stores_a_message_on_the_server_started_as_shown(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (key,) = re.findall(r"export PROGRESSDB_API_BACKEND_KEYS=(\S+)", README)
    line = the_line(".venv/bin/progressdb").replace("8080", str(port))
    server = start(tmp_path, line, PROGRESSDB_API_BACKEND_KEYS=key)
    try:
        wait_for(("127.0.0.1", port))
        _, _, header, _, body, url = shlex.split(the_line("curl "))
        name, _, value = header.partition(": ")
        request = urllib.request.Request(url.replace("8080", str(port)), body.encode(), {name: value})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names
        with direct.open(request, timeout=READY_S_MAX) as answer:
            assert b'"text":"hello"' in answer.read()
    finally:
        stop(server)
