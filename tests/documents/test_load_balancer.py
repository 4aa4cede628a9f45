"""The configurations of load balancers in docs/several-servers.md: servers are replaced without a failed request."""

import contextlib
import http.client
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests import needs
from tests.harness.nginx import CONFIGURATION
from tests.harness.ports import free_port
from tests.harness.waiting import WAIT_S_MAX, wait_until
from tests.progressdb_server.api.asgi_client import BACKEND
from tests.progressdb_server.api.real_server import RealServer

PAGE = Path(__file__).parents[2] / "docs" / "several-servers.md"
CLIENTS = 3
DRAIN = {"PROGRESSDB_DRAIN": "2s"}


@contextlib.contextmanager
def balancer(name: str, directory: Path, port: int, servers: list[int]) -> Iterator[None]:
    """The page's own configuration with other ports, and questions in a fifth of the time."""
    text = re.search(r"(?ms)^## Load balancer$(.*?)^## ", PAGE.read_text("utf-8"))
    assert text is not None
    haproxy, nginx = re.findall(r"(?ms)^```\n(.*?)^```$", text[1])
    block = haproxy if name == "haproxy" else CONFIGURATION.format(directory=directory, block=nginx)
    for documented, own in zip((8000, 8081, 8082), (port, *servers), strict=True):
        assert str(documented) in block
        block = block.replace(f":{documented}", f":{own}")
    path = directory / f"{name}.conf"
    path.write_text(block.replace("inter 1s", "inter 200ms"))
    program = needs.program(name)
    options = ["-f", str(path)] if name == "haproxy" else ["-e", str(directory / "error.log"), "-c", str(path)]
    with (directory / "balancer.log").open("wb") as log:
        process = subprocess.Popen([program, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(port))
        yield
    finally:
        process.terminate()
        process.wait(WAIT_S_MAX)


def answers(port: int) -> bool:
    """Whether the server at the port, or one behind it, is ready."""
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S_MAX)) as connection,
    ):
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    return False


class Clients:
    """Append messages through a port. `failed`: each answer that is no 200, and each lost connection."""

    def __init__(self, port: int) -> None:
        self.done = 0
        self.failed: list[object] = []
        self._port = port
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._append) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _append(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=WAIT_S_MAX)
        while not self._stop.is_set():
            try:
                connection.request("POST", "/v1/messages", b'{"author": "ada", "body": 1}', {"X-API-Key": BACKEND})
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(error)
                connection.close()
                continue
            if answer.status != 200:
                self.failed.append(answer.status)
            self.done += 1
            time.sleep(0.01)  # more requests would show no more and keep a processor busy
        connection.close()

    def more(self, count: int) -> None:
        before = self.done
        wait_until(lambda: self.done >= before + count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S_MAX)


@pytest.mark.parametrize("name", ["haproxy", "nginx"])
def test_servers_are_replaced_behind_a_balancer_without_a_failed_request(name: str, tmp_path: Path) -> None:
    needs.program(name)
    ports = [free_port(), free_port()]
    for port in ports:
        (tmp_path / str(port)).mkdir()

    def start(port: int) -> RealServer:
        return RealServer(tmp_path / str(port), environment=DRAIN, port=port)

    servers = {port: start(port) for port in ports}
    front = free_port()
    try:
        with balancer(name, tmp_path, front, ports), Clients(front) as clients:
            for port in ports:
                clients.more(30)
                assert servers[port].stop() == 0
                servers[port] = start(port)
                wait_until(lambda port=port: answers(port))  # type: ignore[misc]  # mypy can't infer such a lambda
                time.sleep(2)  # until the balancer has noticed it: longer than its question and nginx's fail_timeout
            clients.more(30)
        assert clients.failed == []
    finally:
        for server in servers.values():
            server.kill()


def test_a_server_that_drains_is_not_ready_serves_and_ends(tmp_path: Path) -> None:
    server = RealServer(tmp_path, environment={"PROGRESSDB_DRAIN": "300s"})
    try:
        assert server("GET", "/readyz").status == 200
        os.kill(server.pid, signal.SIGTERM)
        wait_until(lambda: server("GET", "/readyz").status == 503)
        appended = server("POST", "/v1/messages", {"author": "ada", "body": 1})
        assert (appended.status, appended.headers["connection"]) == (200, "close")
        assert server.stop() == 0, "a second signal ends the wait"
    finally:
        server.kill()
