"""The bytes of an answer, as one request's cycle writes them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from progressdb_server.api.cycle import Cycle


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


def answered(*messages: dict[str, Any], method: str = "GET", keep_alive: bool = True) -> Transport:
    """Sends the messages; what was written before one of them is refused is in the transport all the same."""
    transport = Transport()

    async def send() -> None:
        cycle = Cycle(
            scope={"method": method},  # type: ignore[typeddict-item]  # all that is looked at
            transport=transport,  # type: ignore[arg-type]  # all that is called
            flow=FlowControl(transport),  # type: ignore[arg-type]  # all that is called
            logger=logging.getLogger("test"),
            access_logger=logging.getLogger("test"),
            access_log=False,
            default_headers=[(b"date", b"today")],
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=keep_alive,
            on_response=lambda: None,
        )
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
    ("headers", "keep_alive"),
    [([], False), ([(b"connection", b"close")], True), ([(b"connection", b"close")], False)],
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
    with pytest.raises(RuntimeError, match="answer"):
        transport = answered(*messages)
    assert transport.writes == []


def test_nothing_leaves_after_a_complete_answer() -> None:
    whole = [start(200, (b"content-length", b"0")), part(b"")]
    with pytest.raises(RuntimeError, match="complete already"):
        answered(*whole, part(b"more"))
