"""What hostile connections take together: memory, processor time, descriptors. The long run is in tests/torture."""

import asyncio
import contextlib
import gc
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from progressdb_server.config import BODY_BYTES_MIN, ServerSection
from progressdb_server.http import limits
from progressdb_server.http.cycle import Cycle
from progressdb_server.http.protocol import Connection
from progressdb_server.http.shares import Shares
from tests.harness.waiting import receive_more, wait_until
from tests.progressdb_server.api.asgi_client import BACKEND, Api
from tests.progressdb_server.api.certificates import self_signed
from tests.progressdb_server.api.http_server import HttpServer, closed_within, read_response, running

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def head(method: str, target: str, more: str = "") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\nX-API-Key: {BACKEND}\r\n{more}\r\n".encode()


def post(body: bytes = b'{"author":"alice","body":1}', more: str = "") -> bytes:
    return head("POST", "/v1/messages", f"{more}Content-Length: {len(body)}\r\n") + body


class Held:
    """An API whose messages are created when the test says so."""

    def __init__(self) -> None:
        self.api = Api()
        self.go_on = threading.Event()
        self.started = 0
        create = self.api.store.messages.create

        async def held(*given: Any, **named: Any) -> Any:
            self.started += 1
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            return await create(*given, **named)

        self.api.store.messages.create = held  # type: ignore[method-assign]  # of this test


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    try:
        yield made
    finally:
        made.go_on.set()


def still_serves(server: HttpServer) -> None:
    with server.connect() as other:
        other.sendall(GET)
        assert read_response(other).status == 200


# --- pipelining -------------------------------------------------------------------------------------------------
def cycles() -> int:
    gc.collect()
    return sum(type(one) is Cycle for one in gc.get_objects())


def kept_bytes() -> int:
    return sum(
        len(value)
        for one in gc.get_objects()
        if type(one) is Cycle
        for value in vars(one).values()
        if isinstance(value, bytes | bytearray)
    )


def test_a_body_is_not_kept_beyond_its_response_while_its_rest_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUEST_SECONDS_MAX", 600)
    with running() as server, server.connect() as connection:
        connection.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 50_000)
        assert read_response(connection).status == 401
        wait_until(lambda: kept_bytes() == 0)


def test_pipelined_requests_stay_bytes_until_their_turn(held: Held) -> None:
    with running(held.api) as server, server.connect() as connection:
        connection.sendall(post() + GET * 2000)
        wait_until(lambda: server.shares.bodies_bytes > 0)
        assert cycles() == 1
        held.go_on.set()
        data = b""
        while data.count(b"HTTP/1.1 200 OK") < 2001:
            data += receive_more(connection)
        wait_until(lambda: server.shares.bodies_bytes == 0)


def test_pipelined_bytes_of_all_connections_are_in_the_budget_of_bodies(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "UNVERIFIED_BODIES_SHARE", 1 / 16)  # one read of each connection is more, however short
    with running(held.api, config=ServerSection(body_bytes=BODY_BYTES_MIN)) as server, contextlib.ExitStack() as opened:
        connections = [opened.enter_context(server.connect()) for _ in range(100)]
        for connection in connections:
            connection.sendall(post())
        wait_until(lambda: held.started == len(connections))
        for connection in connections:
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                connection.send(GET * 6000)
        closed = connections[-1]
        closed.setblocking(True)
        assert closed_within(closed, 60)
        assert server.shares.bodies_bytes <= BODY_BYTES_MIN * limits.UNVERIFIED_BODIES_SHARE
        still_serves(server)
        held.go_on.set()


# --- Upgrade ----------------------------------------------------------------------------------------------------
def test_the_body_of_a_request_that_asks_for_an_upgrade_is_its_own() -> None:
    api = Api()
    smuggled = b"\r\n" * 400_000 + post(b'{"author":"mallory","body":"smuggled"}')
    with running(api) as server:
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
        responses = server.exchange(post(smuggled, upgrade) + post(more=upgrade))
        assert [response.status for response in responses] == [400, 200]
    assert [message.author for message in api.store.stored_messages()] == ["alice"]


# --- chunks -----------------------------------------------------------------------------------------------------
def test_a_body_of_single_bytes_ends_at_the_bound_of_chunks() -> None:
    with running() as server, server.connect() as connection:
        connection.sendall(head("POST", "/v1/messages", "Transfer-Encoding: chunked\r\n"))
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"1\r\n[\r\n" * (limits.CHUNKS_COUNT_MAX + 1))
        response = read_response(connection)
        assert (response.status, response.json) == (413, {"error": "the body comes in too many chunks"})
        still_serves(server)


@pytest.mark.parametrize("ended", [False, True])
def test_a_body_in_short_chunks_lets_other_connections_in_between(*, ended: bool) -> None:
    text = "x" * 3000
    body = f'{{"author":"alice","body":"{text}"}}'.encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    with running() as server, server.connect() as connection:
        connection.sendall(head("POST", "/v1/messages", "Transfer-Encoding: chunked\r\n") + chunks + GET)
        if ended:
            connection.shutdown(socket.SHUT_WR)
        data = b""
        while data.count(b"HTTP/1.1 200 OK") < 2:
            data += receive_more(connection)
        assert text.encode() in data


# --- responses --------------------------------------------------------------------------------------------------
class Reader:
    """A connection as `shares` sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_closing = False

    def close_unread(self) -> None:
        self.is_closing = True


async def test_unread_bytes_beyond_the_bound_cost_the_address_that_has_the_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "UNREAD_BYTES_MAX", 100)

    shares = Shares()
    honest = Reader("honest")
    shares.unread("192.0.2.1", honest, 20)
    hostile = [Reader(str(number)) for number in range(8)]
    for one in hostile:
        shares.unread("192.0.2.9", one, 20)
    assert [one.is_closing for one in hostile] == [True] * 4 + [False] * 4  # those that waited longest
    assert not honest.is_closing
    assert shares.unread_bytes == 100
    for one in (honest, *hostile):
        shares.read(one)
    assert shares.unread_bytes == 0


def unread(server: HttpServer, request: bytes, count: int, opened: contextlib.ExitStack) -> list[socket.socket]:
    """Connections that send a request and do not read."""
    connections = [opened.enter_context(server.connect()) for _ in range(count)]
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request)
    return connections


def test_unread_responses_of_all_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 256 * 1024
    monkeypatch.setattr(limits, "UNREAD_BYTES_MAX", bound)
    closed: list[Connection] = []
    counts: list[int] = []
    close_unread, unread_now = Connection.close_unread, Shares.unread

    def counted(connection: Connection) -> None:
        closed.append(connection)
        close_unread(connection)

    def bounded(shares: Shares, group: str, connection: Connection, count: int) -> None:
        unread_now(shares, group, connection, count)
        counts.append(shares.unread_bytes)

    monkeypatch.setattr(Connection, "close_unread", counted)
    monkeypatch.setattr(Shares, "unread", bounded)
    api = Api()
    message = api.message(body="x" * 1_000_000)
    with running(api) as server, contextlib.ExitStack() as opened:
        # Each connection leaves at least WRITE_BUFFER_BYTES_MAX to this process: the kernel buffers less than 8 MB.
        unread(server, head("GET", f"/v1/messages/{message['id']}") * 8, 40, opened)
        wait_until(lambda: len(closed) > 10)
        still_serves(server)
    assert max(counts) <= bound
    wait_until(lambda: server.shares.unread_bytes == 0)


class Lists:
    """An API with one list that is longer than the kernel's buffers, and one that is short."""

    def __init__(self, megabytes: int = 24) -> None:
        self.api = Api()
        thread = self.api.thread()
        other = self.api.thread()
        for _ in range(megabytes):
            self.api.message("alice", thread, "x" * 1_000_000)
        self.long = head("GET", f"/v1/messages?thread={thread}")
        self.short = head("GET", f"/v1/messages?thread={other}")
        self.reading = 0
        real = self.api.store.reading.messages

        async def counting(*given: Any, **named: Any) -> AsyncIterator[Any]:
            self.reading += 1
            try:
                async for chunk in real(*given, **named):
                    yield chunk
            finally:
                self.reading -= 1

        self.api.store.reading.messages = counting  # type: ignore[method-assign]  # with a count


def test_lists_beyond_the_bound_wait_and_one_that_is_not_read_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LISTS_COUNT_MAX", 3)
    monkeypatch.setattr(limits, "ADDRESS_LISTS_COUNT_MAX", 2)
    monkeypatch.setattr(limits, "LIST_STALL_SECONDS_MAX", 0.2)
    lists = Lists()
    with running(lists.api) as server, contextlib.ExitStack() as opened:
        unread(server, lists.long, 2, opened)
        wait_until(lambda: lists.reading == 2)
        with server.connect() as other:
            other.sendall(lists.short)
            assert read_response(other).status == 200
        assert lists.reading < 2


def test_a_list_that_gets_no_turn_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ADDRESS_LISTS_COUNT_MAX", 1)
    monkeypatch.setattr(limits, "LIST_WAIT_SECONDS_MAX", 0.1)
    lists = Lists()
    with running(lists.api) as server, contextlib.ExitStack() as opened:
        unread(server, lists.long, 1, opened)
        wait_until(lambda: lists.reading == 1)
        with server.connect() as other:
            other.sendall(lists.short)
            response = read_response(other)
            assert (response.status, response.headers["retry-after"]) == (503, "2")
            assert response.json == {"error": "too many lists are being read: ask for this one again later"}
            still_serves(server)


def test_turns_of_lists_go_to_one_address_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LISTS_COUNT_MAX", 1)

    async def run() -> list[str]:
        lists = Shares().lists
        order: list[str] = []

        async def read(group: str) -> None:
            reader = Reader(group)
            waiting = lists.begin(group, reader)
            if waiting is not None:
                await waiting
            order.append(group)
            await asyncio.sleep(0)
            lists.end(group, reader)

        await asyncio.gather(*[read(group) for group in ("a", "a", "a", "a", "b", "c")])
        return order

    assert asyncio.run(run()) == ["a", "a", "b", "c", "a", "a"]


# --- TLS --------------------------------------------------------------------------------------------------------
def test_silent_handshakes_of_one_address_give_way_to_new_ones(tmp_path: Path) -> None:
    tls = self_signed(tmp_path)
    trusting = ssl.create_default_context(cafile=tls.cert_file)
    with running(tls=tls, config=ServerSection(idle_connections=4)) as server, contextlib.ExitStack() as opened:
        silent = [opened.enter_context(server.connect()) for _ in range(12)]
        for connection in silent[:8]:
            assert closed_within(connection, 60)
        with trusting.wrap_socket(server.connect(), server_hostname="127.0.0.1") as connection:
            connection.sendall(GET)
            assert read_response(connection).status == 200


def test_a_handshake_has_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_SECONDS_MAX", 0.3)
    with running(tls=self_signed(tmp_path)) as server, server.connect() as silent:
        silent.sendall(b"\x16\x03\x01")
        assert closed_within(silent, 60)


def test_handshakes_count_as_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS_COUNT_MAX", 5)
    tls = self_signed(tmp_path)
    with running(tls=tls) as server, contextlib.ExitStack() as opened:
        silent = [opened.enter_context(server.connect()) for _ in range(5)]
        silent.append(opened.enter_context(server.connect()))
        assert closed_within(silent[0], 60)
        trusting = ssl.create_default_context(cafile=tls.cert_file)
        wait_until(partial(handshakes, server, trusting))


def handshakes(server: HttpServer, trusting: ssl.SSLContext) -> bool:
    with contextlib.suppress(OSError), trusting.wrap_socket(server.connect(), server_hostname="127.0.0.1"):
        return True
    return False


# --- clients that leave -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("leave", [socket.socket.close, lambda one: one.shutdown(socket.SHUT_WR)])
def test_a_search_ends_soon_after_its_client_has_left(
    monkeypatch: pytest.MonkeyPatch, leave: Callable[[socket.socket], None]
) -> None:
    monkeypatch.setattr(limits, "HALF_CLOSED_SECONDS_MAX", 0.2)
    api = Api()
    searches: list[str] = []

    async def endless(**named: Any) -> AsyncIterator[list[Any]]:
        searches.append("begun")
        try:
            while True:
                await asyncio.sleep(0.001)
                yield []
        finally:
            searches.append("ended")

    monkeypatch.setattr(api.store.threads, "list_threads", endless)
    with running(api) as server, server.connect() as connection:
        connection.sendall(head("GET", "/v1/threads?author=alice&title=none"))
        wait_until(lambda: searches == ["begun"])
        leave(connection)
        wait_until(lambda: searches == ["begun", "ended"])


def test_a_client_that_has_only_closed_its_sending_side_gets_its_response(held: Held) -> None:
    with running(held.api) as server, server.connect() as connection:
        connection.sendall(post() + GET)
        wait_until(lambda: held.started == 1)
        connection.shutdown(socket.SHUT_WR)
        held.go_on.set()
        data = b""
        while part := connection.recv(1 << 16):
            data += part
        assert data.count(b"HTTP/1.1 200 OK") == 2
