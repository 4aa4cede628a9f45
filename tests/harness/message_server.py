"""A `progressdb` process that starts no key service of its own, and requests to it."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.harness.forked import Forked
from tests.harness.ports import free_port
from tests.harness.waiting import wait_for_start

START_S_MAX = 60.0
ADMIN, BACKEND = "admin-key", "backend-key"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any


class Server:
    """A `progressdb` that starts no key service of its own."""

    def __init__(self, port: int, environ: Mapping[str, str]) -> None:
        self.port = port
        self.environ = environ

    def ask(self, method: str, path: str, body: object = None, *, key: str = BACKEND) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(
                method, path, sent, {"X-API-Key": key, "X-User-ID": "ada", "Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            text = answer.read()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, headers, json.loads(text) if text[:1] in (b"{", b"[") else text)
        finally:
            connection.close()


@contextlib.contextmanager
def server(base: Path, settings: Mapping[str, str], *, launcher: Sequence[str] = ()) -> Iterator[Server]:
    """`settings`: of its environment, without the prefix. `launcher`: what starts its interpreter, such as setpriv;
    without one it is forked.
    """
    port = free_port()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")} | {
        "PROGRESSDB_API_BACKEND_KEYS": BACKEND,
        "PROGRESSDB_API_ADMIN_KEYS": ADMIN,
        **{f"PROGRESSDB_{name}": value for name, value in settings.items()},
    }
    words = ["progressdb_server", "--addr", f"127.0.0.1:{port}", "--db", str(base / "db")]
    process: Forked | subprocess.Popen[bytes]
    with (base / "server-log").open("wb") as log:
        if launcher:
            command = [*launcher, sys.executable, "-P", "-m", *words]
            process = subprocess.Popen(command, env=environ, cwd="/", stdout=log, stderr=log)
        else:
            process = Forked(words, None, log.fileno(), log.fileno(), env=environ, cwd="/")
    made = Server(port, environ)
    try:
        wait_for_start(process, lambda: made.ask("GET", "/readyz").status == 200, base / "server-log")
        yield made
    finally:
        process.terminate()
        process.wait(60)
