"""A real `progressdb` process with the miniKMS that it spawns, and a plain HTTP client for it."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.harness.forked import Forked
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, OTHER_BACKEND

START_S_MAX = 60.0
STOP_S_MAX = 60.0


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json", self
        return json.loads(self.body)


class RealServer:
    """One start of the program on `directory`; made again for a restart."""

    def __init__(
        self,
        directory: Path,
        *more: str,
        program: tuple[str, ...] = ("-m", "progressdb_server"),
        environment: Mapping[str, str] = {},
        port: int = 0,
    ) -> None:
        """`more` words of the command line, `program` for the interpreter, and variables that are added. A program that
        begins with `-m` is forked.
        """
        self.db = directory / "db"
        self.log_path = directory / "server.log"
        variables = {
            "PATH": os.environ["PATH"],
            "PROGRESSDB_API_BACKEND_KEYS": f"{BACKEND},{OTHER_BACKEND}",
            "PROGRESSDB_API_FRONTEND_KEYS": FRONTEND,
            "PROGRESSDB_API_ADMIN_KEYS": ADMIN,
            "PROGRESSDB_RATE_RPS": "0",
            "PROGRESSDB_LOG_LEVEL": "debug",
            **environment,
        }
        words = ["--addr", f"127.0.0.1:{port}", "--db", str(self.db), "--dev", "--log-format", "json", *more]
        # The server writes to the file itself, so that a line is there once its request is answered.
        self._process: Forked | subprocess.Popen[bytes]
        with self.log_path.open("ab") as log, Path(os.devnull).open("w") as nothing:
            start = log.tell()
            if program[0] == "-m":
                outputs = nothing.fileno(), log.fileno()
                self._process = Forked([*program[1:], *words], None, *outputs, env=variables)
            else:
                self._process = subprocess.Popen(
                    [sys.executable, *program, *words], env=variables, stdin=nothing, stdout=nothing, stderr=log
                )
        self.port = self._port(start)

    def _port(self, start: int) -> int:
        """The port that the server says it listens on, in its log from the byte `start` on."""
        deadline = time.monotonic() + START_S_MAX
        while self._process.poll() is None and time.monotonic() < deadline:
            for line in self.log_path.read_bytes()[start:].split(b"\n")[:-1]:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if event.get("event") == "listening":
                        return int(event["url"].rpartition(":")[2])
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"the server did not start:\n{self.log_path.read_text()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> list[dict[str, Any]]:
        """The events so far."""
        return [json.loads(line) for line in self.log_path.read_text().split("\n")[:-1]]

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self._ended()

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._ended()

    def _ended(self) -> int:
        try:
            return self._process.wait(STOP_S_MAX)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()

    def __call__(
        self,
        method: str,
        target: str,
        body: object = None,
        *,
        key: str | None = BACKEND,
        headers: Mapping[str, str] = {},
        connection: http.client.HTTPConnection | None = None,
    ) -> Reply:
        own = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = dict(headers)
            if key is not None:
                sent["X-API-Key"] = key
            own.request(method, target, None if body is None else json.dumps(body), sent)
            answered = own.getresponse()
            return Reply(answered.status, {k.lower(): v for k, v in answered.getheaders()}, answered.read())
        finally:
            if connection is None:
                own.close()


@contextlib.contextmanager
def real_server(
    directory: Path,
    *more: str,
    program: tuple[str, ...] = ("-m", "progressdb_server"),
    environment: Mapping[str, str] = {},
) -> Iterator[RealServer]:
    server = RealServer(directory, *more, program=program, environment=environment)
    try:
        yield server
    finally:
        server.stop()
