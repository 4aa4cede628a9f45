"""The HTTP client of the processes beside the key service: whatever the peer does, an exchange ends in time."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from minikms.processes.http_client import ExchangeError, HttpClient

SECONDS = 0.3
OK = b"HTTP/1.1 200 OK\r\n"
SLOW: dict[str, tuple[bytes, bytes]] = {
    "status line": (b"", b"H"),
    "header line": (OK, b"x"),
    "headers": (OK, b"a: b\r\n"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk size": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "trailer": (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"x"),
    "body": (OK + b"Content-Length: 60000\r\n\r\n", b"x"),
    "nothing": (b"", b""),
}
"""What a peer sends first, and then again and again, before each time-out of a single read."""


@contextlib.contextmanager
def slow_peer(first: bytes, then: bytes) -> Iterator[int]:
    ends = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            connection.sendall(first)
            while not ends.wait(SECONDS / 30):
                connection.sendall(then)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ends.set()
            thread.join()


@pytest.mark.parametrize("part", SLOW)
def test_a_peer_that_drips_its_answer_is_given_up_in_time(part: str) -> None:
    with slow_peer(*SLOW[part]) as port:
        client = HttpClient(f"http://127.0.0.1:{port}/", None, agent="test")
        with pytest.raises(TimeoutError):
            client.get({}, time.monotonic() + SECONDS, bytes_max=64 * 1024)


def test_an_answer_that_ends_too_early_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(OK + b"Content-Length: 100\r\n\r\nabc")

        thread = threading.Thread(target=serve)
        thread.start()
        client = HttpClient(f"http://127.0.0.1:{listener.getsockname()[1]}/", None, agent="test")
        with pytest.raises(ExchangeError, match="ends too early"):
            client.get({}, time.monotonic() + 60, bytes_max=64 * 1024)
        thread.join()


def test_a_peer_that_drains_a_request_slowly_is_given_up_in_time() -> None:
    def serve() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            while connection.recv(64 * 1024):
                time.sleep(SECONDS / 30)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        client = HttpClient(f"http://127.0.0.1:{listener.getsockname()[1]}/", None, agent="test")
        with pytest.raises(TimeoutError):
            client.post("/", bytes(64 * 1024 * 1024), {}, time.monotonic() + SECONDS)
        thread.join()


def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_peer(OK + b"Content-Length: 2\r\n\r\nok", b"") as port, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        with contextlib.ExitStack() as full:  # its queue, so that the kernel answers no further connection
            for _ in itertools.repeat(None, 4):
                filling = full.enter_context(socket.socket())
                filling.setblocking(False)
                filling.connect_ex(silent.getsockname())
            places = [
                (socket.AF_INET, socket.SOCK_STREAM, 0, "", place)
                for place in (silent.getsockname(), ("127.0.0.1", port))
            ]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
            client = HttpClient("http://two.example/", None, agent="test")
            assert client.get({}, time.monotonic() + 10 * SECONDS, bytes_max=100).body == b"ok"
