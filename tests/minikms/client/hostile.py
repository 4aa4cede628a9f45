"""A server on a Unix socket, or on TLS, that says what the test tells it to, for the clients to survive.

A script is one list of steps for each connection, in order of their coming: bytes are sent once a request was read,
`CLOSE` ends the connection, `SILENT` reads on and says nothing, `FULL` refuses at once and reads nothing. Without a
script left, a connection is closed at once.
"""

import socket
import ssl
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from tests.harness.waiting import receive_more

CLOSE = "close"
SILENT = "silent"
FULL = "full"
Step = bytes | str


def answer(body: bytes, status: int = 200, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%b\r\n" % (status, len(body), headers) + body


def array_answer(value: object) -> bytes:
    """A 200 with `value` in MessagePack."""
    return answer(msgspec.msgpack.encode(value), headers=b"Content-Type: application/msgpack\r\n")


def read_request(connection: socket.socket) -> bytes:
    """One request, head and body; empty at the end of the stream."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        body += receive_more(connection)
    return head + b"\r\n\r\n" + body


class HostileServer:
    """Runs in threads of its own until it is left."""

    def __init__(self, listener: socket.socket, scripts: Sequence[Sequence[Step]], tls: ssl.SSLContext | None) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self.ended = threading.Event()
        """Set once the first connection has ended."""
        self._scripts = list(scripts)
        self.sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = listener
        self.path = "" if tls else str(listener.getsockname())
        """Of its socket."""
        self.url = f"https://localhost:{listener.getsockname()[1]}" if tls else ""
        self.tls = tls

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for connection in self.sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for connection in [self._listener, *self.sockets]:
            connection.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]  # test code
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self.sockets.append(connection)
            self._start(self._serve, connection, self._scripts.pop(0) if self._scripts else [CLOSE])

    def _serve(self, connection: socket.socket, steps: Sequence[Step]) -> None:
        try:
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
                self.sockets.append(connection)
            for step in steps:
                if step == FULL:
                    connection.sendall(answer(b'{"error":"x","code":"too_many"}', 503, b"Connection: close\r\n"))
                if step in (CLOSE, FULL):
                    break
                request = read_request(connection)
                if not request:
                    break
                self.requests.append(request)
                if isinstance(step, bytes):
                    connection.sendall(step)
            else:
                while connection.recv(65536):
                    pass
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        finally:
            self.ended.set()


@contextmanager
def hostile(*scripts: Sequence[Step]) -> Iterator[HostileServer]:
    with tempfile.TemporaryDirectory(prefix="kms") as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(Path(directory) / "s"))
        listener.listen(64)
        with HostileServer(listener, scripts, None) as server:
            yield server


@contextmanager
def hostile_tls(tls: ssl.SSLContext, *scripts: Sequence[Step]) -> Iterator[HostileServer]:
    with socket.create_server(("127.0.0.1", 0)) as listener, HostileServer(listener, scripts, tls) as server:
        yield server
