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

Address = str | tuple[str, int]
"""Of a Unix socket, or host and port."""


class StatusError(BenchError):
    """A call was answered with a status that is not 2xx."""

    def __init__(self, call: str, status: int, text: bytes) -> None:
        super().__init__(f"{call}: {status} {text[:200]!r}")
        self.status = status


class Connection(http.client.HTTPConnection):
    """A context manager that closes it."""

    def __init__(self, address: Address) -> None:
        super().__init__("bench", timeout=TIMEOUT_SECONDS)
        self._address = address

    def connect(self) -> None:
        if not isinstance(self._address, str):
            self.sock = socket.create_connection(self._address, TIMEOUT_SECONDS)
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(self._address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def call(self, method: str, target: str, body: object = None) -> Any:
        """The decoded answer. Raises StatusError unless it is 2xx, BenchError unless it is JSON."""
        headers = {"Content-Type": "application/json", "X-API-Key": BACKEND_KEY, "X-User-ID": "bench"}
        self.request(method, target, None if body is None else json.dumps(body), headers)
        response = self.getresponse()
        text = response.read()
        if response.status // 100 != 2:
            raise StatusError(f"{method} {target}", response.status, text)
        try:
            return json.loads(text)
        except ValueError:
            raise BenchError(f"{method} {target}: the answer is not JSON: {text[:200]!r}") from None
