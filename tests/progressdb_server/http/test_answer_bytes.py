"""The bytes of an answer, as one request's cycle writes them."""

import asyncio
from typing import Any

import pytest

from progressdb_server.http import framing
from progressdb_server.http.cycle import Cycle
from progressdb_server.http.protocol import Connection
from progressdb_server.http.serving import Serving
from progressdb_server.http.shares import Shares


class Transport:
    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Never called."""


class OneResponse(Connection):
    def responded(self, keep_alive: bool) -> None:
        if not keep_alive:
            self.transport.close()


def new_cycle(transport: Transport, method: str = "GET", keep_alive: bool = True, waits: bool = False) -> Cycle:
    loop: Any = None  # no test here waits for a time
    connection = OneResponse(Serving(application, Shares(), loop), lambda: None)
    connection.serving.date = b"date: today\r\n"
    connection.transport = transport  # type: ignore[assignment]  # all that is called
    fields = framing.Fields(b"", "1.1", [], keep_alive, framing.CHUNKED, waits)
    return Cycle(connection, {"method": method, "http_version": "1.1"}, fields)


def answered(*messages: dict[str, Any], method: str = "GET", keep_alive: bool = True) -> Transport:
    """Sends the messages; what was written before one of them is refused is in the transport all the same."""
    transport = Transport()

    async def send() -> None:
        cycle = new_cycle(transport, method, keep_alive)
        for message in messages:
            await cycle.send(message)

    asyncio.run(send())
    return transport


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def test_a_whole_answer_is_one_write() -> None:
    transport = answered(start(200, (b"content-length", b"2")), part(b"ok"))
    assert transport.writes == [b"HTTP/1.1 200 OK\r\ndate: today\r\ncontent-length: 2\r\n\r\nok"]
    assert not transport.closed


def test_an_answer_without_a_length_is_chunked() -> None:
    transport = answered(start(), part(b"one", more=True), part(b"", more=True), part(b"two"))
    assert b"".join(transport.writes) == (
        b"HTTP/1.1 200 OK\r\ndate: today\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    )


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_has_no_body_has_no_length_and_no_chunks(status: int) -> None:
    (written,) = answered(start(status), part(b"")).writes
    assert written.endswith(b"date: today\r\n\r\n")


def test_head_gets_the_length_and_no_body() -> None:
    (written,) = answered(start(200, (b"content-length", b"2")), part(b"ok"), method="HEAD").writes
    assert written.endswith(b"content-length: 2\r\n\r\n")


@pytest.mark.parametrize(
    ("headers", "keep_alive"), [([], False), ([(b"connection", b"close")], True), ([(b"connection", b"close")], False)]
)
def test_the_last_answer_of_a_connection_says_so_once_and_closes_it(headers: Any, keep_alive: bool) -> None:
    transport = answered(start(200, (b"content-length", b"0"), *headers), part(b""), keep_alive=keep_alive)
    assert transport.writes[0].count(b"connection: close\r\n") == 1
    assert transport.closed


REFUSED: list[list[dict[str, Any]]] = [
    [start(200, (b"x", b"a\r\nset-cookie: b")), part(b"")],
    [start(200, (b"x", b"a\nb")), part(b"")],
    [start(200, (b"x", b"a\rb")), part(b"")],
    [start(200, (b"x\r\ny", b"a")), part(b"")],
    [start(200, (b"content-length", b"2")), part(b"three")],
    [start(200, (b"content-length", b"9")), part(b"three")],
    [part(b"x")],
    [start(), start()],
]


@pytest.mark.parametrize("messages", REFUSED)
def test_what_is_no_answer_is_refused_before_anything_leaves(messages: list[dict[str, Any]]) -> None:
    transport = Transport()
    with pytest.raises(RuntimeError, match="response"):
        transport = answered(*messages)
    assert transport.writes == []


def test_nothing_leaves_after_a_complete_answer() -> None:
    whole = [start(200, (b"content-length", b"0")), part(b"")]
    with pytest.raises(RuntimeError, match="already complete"):
        answered(*whole, part(b"more"))


# --- without messages -------------------------------------------------------------------------------------------
LENGTH_2 = (b"content-length", b"2")


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("headers", [(), ((b"x-request-id", b"r"),), ((b"connection", b"close"), (b"a", b"b"))])
def test_a_whole_answer_is_the_same_with_messages_and_without(status: int, keep_alive: bool, headers: Any) -> None:
    transport = Transport()
    assert new_cycle(transport, keep_alive=keep_alive).send_response(status, headers, b"ok")
    other = answered(start(status, *headers, LENGTH_2), part(b"ok"), keep_alive=keep_alive)
    ((head, body), (other_head, other_body)) = (one.writes[0].split(b"\r\n\r\n") for one in (transport, other))
    assert (sorted(head.split(b"\r\n")), body) == (sorted(other_head.split(b"\r\n")), other_body)
    assert transport.closed is other.closed


def test_what_can_not_leave_whole_at_once_is_left_to_the_messages() -> None:
    transport = Transport()
    cycle = new_cycle(transport)
    assert not new_cycle(transport, "HEAD").send_response(200, (), b"ok")
    assert not cycle.send_response(204, (), b"")
    cycle.connection.write_paused = True
    assert not cycle.send_response(200, (), b"ok")
    cycle.connection.write_paused = False
    cycle.disconnected = True
    assert not cycle.send_response(200, (), b"ok")
    assert transport.writes == []
    cycle.disconnected = False
    assert cycle.send_response(200, (), b"ok")
    assert not cycle.send_response(200, (), b"ok")
    assert len(transport.writes) == 1


@pytest.mark.parametrize("header", [(b"x", b"a\r\nset-cookie: b"), (b"x", b"a\nb"), (b"x", b"a\rb"), (b"x\r\ny", b"a")])
def test_no_header_of_a_whole_answer_smuggles_in_a_line(header: tuple[bytes, bytes]) -> None:
    transport = Transport()
    with pytest.raises(RuntimeError, match="line break"):
        new_cycle(transport).send_response(200, (header,), b"ok")
    assert transport.writes == []


def test_a_body_is_had_without_messages_once_it_is_whole_and_only_once() -> None:
    cycle = new_cycle(Transport())
    assert cycle.received_body() is None
    cycle.add(b"one,")
    cycle.add(b"two,")
    assert cycle.add(b"three") == 13
    assert cycle.received_body() is None
    cycle.end_body()
    assert cycle.received_body() == b"one,two,three"
    assert cycle.received_body() is None


def test_a_body_that_was_read_in_part_is_read_to_its_end_by_messages() -> None:
    async def read() -> list[dict[str, Any]]:
        cycle = new_cycle(Transport())
        cycle.add(b"one")
        first = dict(await cycle.receive())
        waiting = asyncio.ensure_future(cycle.receive())
        await asyncio.sleep(0)
        assert not waiting.done()
        cycle.add(b"two")
        cycle.end_body()
        return [first, dict(await waiting)]

    assert [(message["body"], message["more_body"]) for message in asyncio.run(read())] == [
        (b"one", True),
        (b"two", False),
    ]


def test_a_body_that_waits_for_100_continue_is_asked_for_by_messages() -> None:
    async def read() -> tuple[bytes | None, bytes]:
        transport = Transport()
        cycle = new_cycle(transport, waits=True)
        cycle.add(b"one")
        cycle.end_body()
        before = cycle.received_body()
        await cycle.receive()
        return before, transport.writes[0]

    assert asyncio.run(read()) == (None, b"HTTP/1.1 100 Continue\r\n\r\n")
