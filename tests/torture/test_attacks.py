"""All attacks on the message server at once: its memory stays bounded, and it answers others."""

import contextlib
import http.client
import multiprocessing
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.progressdb_server.api.asgi_client import BACKEND, FRONTEND, signature
from tests.progressdb_server.api.certificates import self_signed
from tests.progressdb_server.api.real_server import RealServer, real_server
from tests.torture.test_body_memory import MIB, resident_bytes

SECONDS = 60
RSS_BYTES_MAX = {False: 300 * MIB, True: 400 * MIB}
"""With TLS or without. For each connection of TLS uvloop keeps up to 256 KiB that were read, and records to send."""
HEALTH_SECONDS_MAX = 0.5
CHUNK = b"1\r\n[\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"

Attack = Callable[[socket.socket, str], None]


def head(method: str, target: str, more: str = "") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\nX-API-Key: {BACKEND}\r\n{more}\r\n".encode()


def pipelined(connection: socket.socket, thread: str) -> None:
    """20 MiB of requests, whose responses are not read."""
    connection.settimeout(2)
    connection.sendall(GET * (20 * MIB // len(GET)))


def unread_list(connection: socket.socket, thread: str) -> None:
    connection.sendall(head("GET", f"/v1/messages?thread={thread}"))
    time.sleep(3)


def unread_lists_without_end(connection: socket.socket, thread: str) -> None:
    connection.sendall(head("GET", f"/v1/messages?thread={thread}") * 50)
    time.sleep(3)


def single_bytes(connection: socket.socket, thread: str) -> None:
    """A body in chunks of one byte."""
    connection.settimeout(2)
    connection.sendall(head("POST", "/v1/messages", "Transfer-Encoding: chunked\r\n") + CHUNK * 1_100_000)


def unfinished_upload(connection: socket.socket, thread: str) -> None:
    user = f"X-User-ID: mallory\r\nX-User-Signature: {signature('mallory')}\r\n"
    begun = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {FRONTEND}\r\n{user}Content-Length: {MIB}\r\n\r\n"
    connection.settimeout(2)
    connection.sendall(begun.encode() + b'"'.ljust(MIB - 1, b"x"))
    time.sleep(1)


def refused_body(connection: socket.socket, thread: str) -> None:
    body = b'{"author":"mallory","thread":"/","body":"' + b"x" * 1_000_000 + b'"}'
    connection.settimeout(2)
    connection.sendall(head("POST", "/v1/messages", f"Content-Length: {len(body)}\r\n") + body)
    connection.recv(1000)


def search(connection: socket.socket, thread: str) -> None:
    """A search, whose client leaves at once."""
    connection.sendall(head("GET", "/v1/threads?author=alice&title=none"))


FLOATS = b"[" + b",".join([b"1e300"] * 65_000) + b"]"


def floats(connection: socket.socket, thread: str) -> None:
    """A body of numbers that are slow to decode, and a list of such bodies."""
    body = b'{"author":"mallory","thread":"floats","body":' + FLOATS + b"}"
    connection.settimeout(2)
    connection.sendall(head("POST", "/v1/messages", f"Content-Length: {len(body)}\r\n") + body)
    connection.sendall(head("GET", "/v1/messages?thread=floats&limit=20"))
    connection.recv(1000)


def silent(connection: socket.socket, thread: str) -> None:
    time.sleep(5)


ATTACKS: tuple[tuple[Attack, int], ...] = (
    (pipelined, 20),
    (unread_list, 100),
    (unread_lists_without_end, 50),
    (single_bytes, 8),
    (unfinished_upload, 20),
    (refused_body, 4),
    (search, 8),
    (floats, 4),
    (silent, 100),
)


def unfinished_handshake(connection: socket.socket, thread: str) -> None:
    """The first bytes of a ClientHello, one at a time."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40):
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def slow_records(connection: socket.socket, thread: str) -> None:
    """A request whose every byte is a record of TLS."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in head("GET", f"/v1/messages?thread={thread}", "X-Long: " + "x" * 2000 + "\r\n"):
        connection.sendall(bytes([byte]))


BEFORE_TLS = (unfinished_handshake,)
"""These speak to the socket; the others speak TLS where the server does."""
TLS_ATTACKS: tuple[tuple[Attack, int], ...] = (
    (unfinished_handshake, 200),
    (silent, 100),
    (slow_records, 20),
    (pipelined, 20),
    (unread_list, 50),
    (single_bytes, 8),
    (refused_body, 4),
)


def untrusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def repeat(attack: Attack, port: int, thread: str, until_s: float, context: ssl.SSLContext | None) -> None:
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            if context is not None and attack not in BEFORE_TLS:
                connection = stack.enter_context(context.wrap_socket(connection))
            attack(connection, thread)
        time.sleep(random.random() / 10)


def attack_for(seconds: float, port: int, thread: str, tls: bool) -> None:
    """Of a process of its own: the time of a probe must not hold that of the attackers."""
    until_s = time.monotonic() + seconds
    attackers = [
        threading.Thread(target=repeat, args=(attack, port, thread, until_s, untrusting() if tls else None))
        for attack, count in (TLS_ATTACKS if tls else ATTACKS)
        for _ in range(count)
    ]
    for attacker in attackers:
        attacker.start()
    for attacker in attackers:
        attacker.join()


def client(port: int, *, tls: bool) -> http.client.HTTPConnection:
    if tls:
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=untrusting())
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


def seconds_of_a_probe(port: int, *, tls: bool) -> float:
    begun_s = time.monotonic()
    with contextlib.closing(client(port, tls=tls)) as connection:
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
    return time.monotonic() - begun_s


def filled(server: RealServer, connection: http.client.HTTPConnection) -> str:
    """A thread of 8 messages of 1 MB, beside 300 threads of the same author."""
    made = server("POST", "/v1/threads", {"title": "long", "author": "alice"}, connection=connection)
    thread = str(made.json["id"])
    for _ in range(8):
        body = {"author": "alice", "thread": thread, "body": "x" * 1_000_000}
        assert server("POST", "/v1/messages", body, connection=connection).status == 200
    for number in range(300):
        server("POST", "/v1/threads", {"title": str(number), "author": "alice"}, connection=connection)
    return thread


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_all_attacks_together_leave_the_server_small_and_answering(tmp_path: Path, *, tls: bool) -> None:
    environment = {"PROGRESSDB_LOG_LEVEL": "info", "PROGRESSDB_BODY_BYTES": str(32 * MIB)}
    if tls:
        files = self_signed(tmp_path)
        environment |= {"PROGRESSDB_TLS_CERT": files.cert_file, "PROGRESSDB_TLS_KEY": files.key_file}
    with real_server(tmp_path, environment=environment) as server:
        with contextlib.closing(client(server.port, tls=tls)) as connection:
            thread = filled(server, connection)
        arguments = (SECONDS, server.port, thread, tls)
        attackers = multiprocessing.get_context("spawn").Process(target=attack_for, args=arguments)
        attackers.start()
        largest = 0
        probes: list[float] = []
        while attackers.is_alive():
            largest = max(largest, resident_bytes(server.pid))
            probes.append(seconds_of_a_probe(server.port, tls=tls))
            time.sleep(0.05)
        attackers.join()
        assert attackers.exitcode == 0
        probes.sort()
        late = probes[len(probes) * 99 // 100]
        print(f"{len(probes)} probes, 99 of 100 within {late:.3f} s; at most {largest / MIB:.0f} MiB resident")
        assert largest < RSS_BYTES_MAX[tls]
        assert late < HEALTH_SECONDS_MAX
        with contextlib.closing(client(server.port, tls=tls)) as connection:
            listed = server("GET", f"/v1/messages?thread={thread}", connection=connection)
        assert len(listed.json["messages"]) == 8
