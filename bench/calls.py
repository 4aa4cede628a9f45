"""Single calls to either program, over one kept-alive connection: what prepares a measurement and checks it.

Never used where speed is measured, except that of a single call.
"""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any, Self

from bench.programs import BACKEND_KEY, BenchError

TIMEOUT_SECONDS = 30.0


class Connection(http.client.HTTPConnection):
    """To a Unix socket's path or to (host, port). A context manager that closes it."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        super().__init__("bench", timeout=TIMEOUT_SECONDS)
        self._address = address

    def connect(self) -> None:
        family = socket.AF_UNIX if isinstance(self._address, str) else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(self._address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def call(self, method: str, target: str, body: object = None) -> Any:
        """The decoded answer. Raises BenchError unless it is 2xx."""
        headers = {"Content-Type": "application/json", "X-API-Key": BACKEND_KEY, "X-User-ID": "bench"}
        self.request(method, target, None if body is None else json.dumps(body), headers)
        response = self.getresponse()
        text = response.read()
        if response.status // 100 != 2:
            raise BenchError(f"{method} {target}: {response.status} {text[:200]!r}")
        return json.loads(text)
