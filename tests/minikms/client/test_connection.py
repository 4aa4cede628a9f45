"""One connection's promise: in doubt, it is closed."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from minikms.api.errors import KmsTimeoutError, KmsUnavailableError
from minikms.client.connecting import SocketEndpoint
from minikms.client.connection import ClientConnection
from tests.minikms.client.hostile import FULL, SILENT, answer, hostile

Runner = Callable[[Coroutine[Any, Any, int]], int]


def test_a_caller_cancelled_as_its_answer_comes_leaves_no_open_connection() -> None:
    with hostile([SILENT]) as server:

        async def main() -> None:
            connection = await ClientConnection.open(SocketEndpoint(server.path, None), 5.0)
            call = asyncio.create_task(connection.exchange(b"/status", None, None, 5.0))
            await asyncio.sleep(0)
            connection.data_received(answer(b"{}"))
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert not connection.usable

        asyncio.run(main())


def test_a_connection_that_timed_out_takes_no_second_request() -> None:
    with hostile([SILENT]) as server:

        async def main() -> None:
            connection = await ClientConnection.open(SocketEndpoint(server.path, None), 5.0)
            with pytest.raises(KmsTimeoutError):
                await connection.exchange(b"/status", None, None, 0.05)
            connection.data_received(answer(b"{}"))
            with pytest.raises(KmsUnavailableError) as unavailable:
                await connection.exchange(b"/status", None, None, 5.0)
            assert not unavailable.value.sent

        asyncio.run(main())


def test_bytes_that_nobody_asked_for_close_the_connection() -> None:
    with hostile([SILENT]) as server:

        async def main() -> None:
            connection = await ClientConnection.open(SocketEndpoint(server.path, None), 5.0)
            connection.data_received(answer(b"{}"))
            assert not connection.usable

        asyncio.run(main())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_refusal_that_came_before_the_request_was_sent_is_read(run: Runner) -> None:
    """The server has closed the connection: the send fails."""

    async def main(path: str) -> int:
        connection = await ClientConnection.open(SocketEndpoint(path, None), 5.0)
        time.sleep(0.05)  # the event loop does not see the refusal, which mostly has come then
        return (await connection.exchange(b"/status", None, None, 5.0)).status

    for _ in range(5):
        with hostile([FULL]) as server:
            assert run(main(server.path)) == 503
