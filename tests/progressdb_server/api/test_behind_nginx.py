"""Behind nginx with the usual lines for WebSockets: what nginx denies reaches the server inside no other request."""

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_server.api.gate.access import Proxies
from progressdb_server.config import ServerSection
from tests import needs
from tests.harness.nginx import CONFIGURATION
from tests.harness.waiting import WAIT_S_MAX, wait_until
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, Api
from tests.progressdb_server.api.http_server import running

SERVED = """
  server {{
    listen 127.0.0.1:{port};
    location /admin {{ deny all; }}
    location / {{
      proxy_pass http://127.0.0.1:{upstream};
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection "upgrade";
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    }}
  }}
"""
PROXY = ServerSection(proxies=("127.0.0.1",))
CLIENT = "127.0.0.2"


class Recording(Api):
    """Notes the scope of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        application = self.application

        async def recording(scope: Any, receive: Any, send: Any) -> None:
            self.seen.append(scope)
            await application(scope, receive, send)

        self.application = recording  # type: ignore[assignment]  # all that a server calls


@contextlib.contextmanager
def nginx(directory: Path, upstream: int) -> Iterator[int]:
    """The port of an nginx in front of the port `upstream`."""
    program = needs.program("nginx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    configuration = directory / "nginx.conf"
    block = SERVED.format(port=port, upstream=upstream)
    configuration.write_text(CONFIGURATION.format(directory=directory, block=block))
    command = [program, "-e", str(directory / "error.log"), "-p", str(directory), "-c", str(configuration)]
    running_nginx = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: accepts(port))
        yield port
    finally:
        running_nginx.terminate()
        running_nginx.wait(WAIT_S_MAX)


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S_MAX, source_address=(CLIENT, 0))


def request(target: str, body: bytes, key: str, more: str = "") -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_nothing_is_smuggled_past_nginx_by_an_upgrade(tmp_path: Path, upgrade: str) -> None:
    api = Recording()
    denied = request("/admin/store_backup", b'{"name":"stolen"}', ADMIN)
    # nginx writes such a body after the head. A parser skips empty lines before a request, wherever a read ends.
    body = b"\r\n" * 20_000 + denied
    outer = request("/v1/messages", body, BACKEND, f"Connection: Upgrade\r\nUpgrade: {upgrade}\r\n")
    with running(api, config=PROXY) as server, nginx(tmp_path, server.port) as port:
        with connect(port) as connection:
            connection.sendall(denied)
            assert connection.recv(16).startswith(b"HTTP/1.1 403")
        for _ in range(20):
            with connect(port) as connection:
                connection.sendall(outer)
                assert connection.recv(16).startswith(b"HTTP/1.1 400")  # the body is no message
    assert [scope["path"] for scope in api.seen] == ["/v1/messages"] * 20


def test_the_address_of_a_client_behind_nginx_can_not_be_forged(tmp_path: Path) -> None:
    api = Recording()
    with running(api, config=PROXY) as server, nginx(tmp_path, server.port) as port, connect(port) as connection:
        forged = "X-Forwarded-For: 203.0.113.7\r\n"
        connection.sendall(request("/v1/messages", b'{"author":"alice","body":1}', BACKEND, forged))
        assert connection.recv(16).startswith(b"HTTP/1.1 200")
    (scope,) = api.seen
    assert Proxies(PROXY.proxies).client(scope["client"][0], scope["headers"]) == CLIENT
