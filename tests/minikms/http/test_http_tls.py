"""TLS below the engine: handshakes, their bounds, and the bounds of answers that nobody reads."""

import asyncio
import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from minikms.http import LIMITS, HttpServer, Limits, tls
from minikms.http.accepting import Acceptor
from tests.harness.certificates import SERVER, Authority
from tests.minikms.http.http_harness import EchoApp, Session, get, parse_answers, post

pytestmark = pytest.mark.uvloop

HOST = "engine.internal"


@dataclass
class TlsRunning:
    app: EchoApp
    http: HttpServer[Session]
    tls: tls.TlsServer[Session]
    client: ssl.SSLContext
    port: int
    failed: list[Exception | None] = field(default_factory=list)

    async def peer(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.client, server_hostname=HOST)

    def exchange(self, data: bytes, below: bytes = b"") -> bytes:
        """A blocking client. `below`: what it sends after that without TLS. Returns what it receives to the end."""
        sock = socket.create_connection(("127.0.0.1", self.port), 60)
        with self.client.wrap_socket(sock, server_hostname=HOST) as wrapped:
            wrapped.sendall(data)
            if below:
                with socket.socket(fileno=os.dup(wrapped.fileno())) as plain:
                    plain.sendall(below)
            received = b""
            while part := wrapped.recv(1 << 20):
                received += part
            return received

    async def until_failed(self, count: int) -> None:
        while len(self.failed) < count:
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving_tls(limits: Limits = LIMITS) -> AsyncIterator[TlsRunning]:
    """Serve an `EchoApp` over TLS. At the end nothing may be left over: no connection, no handshake, no error."""
    loop = asyncio.get_running_loop()
    errors: list[str] = []
    stray: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: stray.append(context))
    app, failed = EchoApp(), list[Exception | None]()
    http = HttpServer(app, loop=loop, on_internal_error=errors.append, limits=limits)
    authority = Authority("engine root")
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.TemporaryDirectory() as directory:
        own.load_cert_chain(*authority.issue(dns=[HOST], extended=[SERVER]).write(Path(directory)))
    client = ssl.create_default_context(cadata=authority.pem.decode())
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    listener.setblocking(False)
    server = tls.TlsServer(http, own, on_failed=lambda error, peer: failed.append(error))
    acceptor = Acceptor(listener, http, on_failure=errors.append, protocol_factory=server.protocol_factory)
    try:
        yield TlsRunning(app, http, server, client, listener.getsockname()[1], failed)
    finally:
        acceptor.close()
        listener.close()
        server.close()
        await http.drain(0.1)
        while server.handshakes_count:
            await asyncio.sleep(0.01)
    assert (stray, errors) == ([], [])
    assert http.connections == set()
    assert (http.shared.budget.bytes_held, http.unread) == (0, 0)
    assert all(session.closed for session in app.sessions)


async def test_requests_are_answered_in_order_and_the_last_one_closes() -> None:
    async with serving_tls() as running:
        reader, writer = await running.peer()
        writer.write(get("/later") + post("/echo", b"x" * 100_000) + get("/close"))
        answers = parse_answers(await reader.read())
        assert [answer.status for answer in answers] == [200, 200, 401]
        writer.close()


async def test_an_answer_of_many_records_arrives_whole() -> None:
    async with serving_tls() as running:
        [large, _] = parse_answers(
            await asyncio.to_thread(running.exchange, get("/large?bytes=20000000") + get("/close"))
        )
        assert len(large.body) == 20_000_000


async def test_answers_that_nobody_reads_are_bounded() -> None:
    """What TLS has encrypted and the kernel has not taken counts as unread, so the connection starts no request."""
    async with serving_tls() as running:
        reader, writer = await running.peer()
        transport = cast(asyncio.Transport, writer.transport)
        transport.pause_reading()
        writer.write(get("/large?bytes=20000000") * 5)
        while not running.http.unread:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # a second answer would be made in this time
        assert len(running.app.seen) == 1
        assert 10_000_000 < running.http.unread < 21_000_000
        transport.resume_reading()
        for _ in range(5):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            await reader.readexactly(20_000_000)
        assert running.http.unread == 0
        writer.close()


async def test_a_peer_that_goes_away_without_a_word_ends_its_connection() -> None:
    async with serving_tls() as running:
        _, writer = await running.peer()
        writer.write(post("/echo", b"x" * 1000)[:-10])
        while not running.http.connections:
            await asyncio.sleep(0.01)
        writer.transport.abort()
        while running.http.connections:
            await asyncio.sleep(0.01)
        assert running.app.seen == []


async def test_damaged_records_end_the_connection() -> None:
    async with serving_tls() as running:
        damaged = b"\x17\x03\x03\x00\x20" + bytes(32)
        assert await asyncio.to_thread(running.exchange, b"", damaged) == b""
        while running.http.connections:
            await asyncio.sleep(0.01)
        assert len(running.app.sessions) == 1
        assert running.app.seen == []


async def test_what_comes_after_the_end_of_tls_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a request is being answered, of which nothing was read: it would fill the memory."""
    buffers: list[ssl.MemoryBIO] = []
    made = ssl.MemoryBIO

    def counted() -> ssl.MemoryBIO:
        buffers.append(made())
        return buffers[-1]

    def send(running: TlsRunning) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", running.port), 60)
        with running.client.wrap_socket(sock, server_hostname=HOST) as wrapped:
            below = socket.socket(fileno=os.dup(wrapped.fileno()))
            wrapped.sendall(get("/hold"))
            wrapped.setblocking(False)
            with contextlib.suppress(ssl.SSLWantReadError):
                wrapped.unwrap()
        below.settimeout(60)
        below.sendall(bytes(16_000_000))
        return below

    monkeypatch.setattr(ssl, "MemoryBIO", counted)
    async with serving_tls() as running:
        below = await asyncio.to_thread(send, running)
        assert sum(buffer.pending for buffer in buffers) < 1_000_000
        running.app.release.set()
        below.close()
        while running.http.connections:
            await asyncio.sleep(0.01)


async def test_a_handshake_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS_MAX", 0.0)

    async with serving_tls() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"\x16\x03\x01\x02\x00\x01\x00")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        assert isinstance(running.failed[0], TimeoutError)
        assert running.app.sessions == []
        writer.close()


async def test_beyond_the_bound_the_oldest_handshake_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a peer that ends its handshake in time is served, however many do not."""
    monkeypatch.setattr(tls, "HANDSHAKES_COUNT_MAX", 4)

    async with serving_tls() as running:
        silent = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(8)]
        await running.until_failed(4)
        reader, writer = await running.peer()
        writer.write(get("/close"))
        [answer] = parse_answers(await reader.read())
        assert answer.status == 401
        for _, other in (*silent, (reader, writer)):
            other.close()


async def test_handshakes_of_one_address_end_none_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKES_COUNT_MAX", 4)

    async with serving_tls() as running:
        slow = await asyncio.open_connection("127.0.0.1", running.port, local_addr=("127.0.0.2", 0))
        silent = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(12)]
        await running.until_failed(12 - 3)
        await slow[1].start_tls(running.client, server_hostname=HOST)
        slow[1].write(get("/close"))
        [answer] = parse_answers(await slow[0].read())
        assert answer.status == 401
        for _, other in (*silent, slow):
            other.close()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x80" * 100, b"\x16\x03\x01\x40\x01" + bytes(0x4001)])
async def test_what_is_no_handshake_opens_no_session(data: bytes) -> None:
    async with serving_tls() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(data)
        assert b"HTTP" not in await reader.read()
        await running.until_failed(1)
        assert isinstance(running.failed[0], ssl.SSLError)
        assert running.app.sessions == []
        writer.close()
