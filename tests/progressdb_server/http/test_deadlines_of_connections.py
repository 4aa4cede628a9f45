"""A connection is closed by its own deadline: idle, or in the middle of a request; never during an answer."""

import asyncio
import time
from typing import Any

import pytest

from progressdb_server.http import limits
from tests.progressdb_server.api.asgi_client import BACKEND, Api
from tests.progressdb_server.api.http_server import closed_within, read_response, running

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
BODY = b'{"author":"alice","body":1}'
POST = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\nContent-Length: %d\r\n\r\n%b" % (
    BACKEND.encode(),
    len(BODY),
    BODY,
)


def test_a_connection_that_idles_is_closed_and_one_in_use_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDLE_SECONDS_MAX", 2.0)
    monkeypatch.setattr(limits, "REQUEST_SECONDS_MAX", 2.0)
    with running() as server, server.connect() as used:
        for _ in range(6):
            used.sendall(GET)
            assert read_response(used).status == 200
            time.sleep(0.4)
        assert closed_within(used, 60)


def test_a_second_request_that_does_not_come_to_its_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUEST_SECONDS_MAX", 1.0)
    with running() as server, server.connect() as slow:
        slow.sendall(GET)
        assert read_response(slow).status == 200
        slow.sendall(GET[:9])
        assert closed_within(slow, 60)


def test_an_answer_may_take_longer_than_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDLE_SECONDS_MAX", 1.0)
    monkeypatch.setattr(limits, "REQUEST_SECONDS_MAX", 1.0)
    api = Api()
    create = api.store.messages.create

    async def slow(*given: Any, **named: Any) -> Any:
        await asyncio.sleep(1.5)
        return await create(*given, **named)

    monkeypatch.setattr(api.store.messages, "create", slow)
    with running(api) as server, server.connect() as connection:
        connection.sendall(POST)
        assert read_response(connection).status == 200
        assert closed_within(connection, 60)
