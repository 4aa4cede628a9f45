"""A real HTTP server over the in-memory store, in a thread of this process, and a client that speaks raw bytes."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import uvloop

from progressdb_server.api.gate.access import Proxies
from progressdb_server.api.gate.keys import presented
from progressdb_server.config import ServerSection, TlsSection
from progressdb_server.http.listener import bind, serve_http
from progressdb_server.http.shares import Shares
from tests.harness.waiting import WAIT_S_MAX, receive_more
from tests.progressdb_server.api.asgi_client import Api
from tests.progressdb_server.api.real_server import Reply


class HttpServer:
    def __init__(self, api: Api, tls: TlsSection, server: ServerSection) -> None:
        self.api = api
        self._tls = tls
        self.shares = Shares(server, Proxies(server.proxies).__contains__, presented)
        self._listener = bind("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self._ready = threading.Event()
        self._clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, name="http server under test")

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await serve_http(
            self.api.application,
            self._listener,
            tls=self._tls,
            stop=self._stop,
            shares=self.shares,
            on_listening=self._ready.set,
        )

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(WAIT_S_MAX)

    def ask_to_stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> None:
        for client in self._clients:
            client.close()
        self._thread.join(WAIT_S_MAX)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S_MAX)
        self._clients.append(connection)
        return connection

    def exchange(self, *parts: bytes) -> list[Reply]:
        """Send the parts as segments of their own, then read until the server closes or everything is answered."""
        with self.connect() as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for part in parts:
                with contextlib.suppress(ConnectionError):  # refused meanwhile: the answer is read below
                    connection.sendall(part)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            return read_responses(connection)


def closed_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def read_responses(connection: socket.socket) -> list[Reply]:
    """All responses until end of file."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            data += part
    found = []
    while data:
        response, data = take_response(data)
        found.append(response)
    return found


def read_response(connection: socket.socket) -> Reply:
    """The one response that is expected, from a connection that stays open."""
    data = b""
    while True:
        data += receive_more(connection)
        head, _, body = data.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), None)
        if length is not None and len(body) >= length:
            return take_response(data)[0]


def take_response(data: bytes) -> tuple[Reply, bytes]:
    head, _, rest = data.partition(b"\r\n\r\n")
    status_line, *lines = head.split(b"\r\n")
    assert status_line.startswith(b"HTTP/1.1 "), data
    status = int(status_line.split(b" ")[1])
    headers = dict(line.decode().split(": ", 1) for line in lines)
    if status in (100, 204):
        return Reply(status, headers, b""), rest
    if "content-length" in headers:
        length = int(headers["content-length"])
        assert len(rest) >= length, "the response is cut short"
        return Reply(status, headers, rest[:length]), rest[length:]
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
        if length == 0:
            return Reply(status, headers, body), rest


@contextlib.contextmanager
def running(
    api: Api | None = None, tls: TlsSection | None = None, config: ServerSection | None = None
) -> Iterator[HttpServer]:
    server = HttpServer(api or Api(), tls or TlsSection(), config or ServerSection())
    server.start()
    try:
        yield server
    finally:
        server.ask_to_stop()
        server.join()
