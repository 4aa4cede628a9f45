"""One plain HTTP request over a Unix socket, for what the client library has no method for."""

import contextlib
import http.client
import socket
from pathlib import Path
from typing import NamedTuple


class UnixReply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


TIMEOUT_S = 60


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def answers(path: Path) -> bool:
    """Whether a daemon serves at `path`. That the socket is there is not enough: it is bound before it listens."""
    with contextlib.suppress(OSError):
        return unix_request(path, "/health").status == 200
    return False


def unix_request(path: Path, target: str, method: str = "GET") -> UnixReply:
    connection = UnixConnection(path)
    try:
        connection.request(method, target)
        answered = connection.getresponse()
        return UnixReply(answered.status, {k.lower(): v for k, v in answered.getheaders()}, answered.read())
    finally:
        connection.close()
