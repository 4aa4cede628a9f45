"""The connections to the key service, whose socket a test serves in its place."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from minikms.api.errors import RequestInterruptedError, ShuttingDownError
from minikms_gateway import upstream
from minikms_gateway.upstream import Upstream

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
REQUEST = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


@asynccontextmanager
async def connected(directory: Path, serve: Serve) -> AsyncIterator[tuple[Upstream, asyncio.Server]]:
    writers: list[asyncio.StreamWriter] = []

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await serve(reader, writer)

    path = str(directory / "s")
    server = await asyncio.start_unix_server(served, path)
    pool = Upstream(path, {os.geteuid()}, asyncio.get_running_loop())
    try:
        async with asyncio.timeout(60):
            yield pool, server
    finally:
        pool.close()
        server.close()
        for writer in writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each request with its path."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        writer.write(ok(head.split()[1]))


async def test_each_request_gets_its_own_answer_on_few_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "CONNECTIONS_MAX", 3)
    async with connected(tmp_path, echo) as (pool, _):
        answers = [pool.send(REQUEST % number) for number in range(200)]
        assert (pool.connections_count, pool.waiting_count) == (3, 197)
        assert await asyncio.gather(*answers) == [b"/%d" % number for number in range(200)]
        assert pool.connections_count == 3


async def test_requests_that_wait_fail_when_the_key_service_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were sent may have been carried out; the others were not begun."""
    monkeypatch.setattr(upstream, "CONNECTIONS_MAX", 1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        os.unlink(tmp_path / "s")
        writer.close()

    async with connected(tmp_path, serve) as (pool, _):
        answers = [pool.send(REQUEST % number) for number in range(5)]
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert [type(one) for one in found] == [RequestInterruptedError] + [ShuttingDownError] * 4
        assert pool.error


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\n\r\n", ok(b"1") + ok(b"2"), b"\x00" * 20_000, b"HTTP/1.1 100 Continue\r\n\r\n"],
    ids=["no length", "two answers", "no head", "interim"],
)
async def test_an_answer_that_is_in_doubt_ends_its_connection(tmp_path: Path, answer: bytes) -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer if len(asked) == 1 else ok(b"good"))

    async with connected(tmp_path, serve) as (pool, _):
        with pytest.raises(RequestInterruptedError):
            await pool.send(REQUEST % 1)
        assert await pool.send(REQUEST % 2) == b"good"


async def test_a_late_answer_reaches_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed with the request that was not answered in time."""
    asked: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append(writer)
        if len(asked) > 1:
            asked[0].write(ok(b"late"))
            writer.write(ok(b"own"))

    async with connected(tmp_path, serve) as (pool, _):
        first = pool.send(REQUEST % 1)
        while not asked:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(upstream, "ANSWER_SECONDS_MAX", 0.0)
        pool.sweep()
        with pytest.raises(RequestInterruptedError):
            await first
        assert await pool.send(REQUEST % 2) == b"own"


async def test_a_socket_of_another_user_gets_nothing(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        writer.close()

    async with connected(tmp_path, serve):
        other = Upstream(str(tmp_path / "s"), {os.geteuid() + 1}, asyncio.get_running_loop())
        with pytest.raises(ShuttingDownError):
            await other.send(REQUEST % 1)


async def test_a_refusal_of_the_gateway_is_none_of_its_client(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ok(b"{}").replace(b"200 OK", b"401 Unauthorized"))

    async with connected(tmp_path, serve) as (pool, _):
        with pytest.raises(ShuttingDownError):
            await pool.send(REQUEST % 1)
        assert pool.error


async def test_requests_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose clients have gone. One beyond the bound was not begun."""
    monkeypatch.setattr(upstream, "CONNECTIONS_MAX", 1)
    monkeypatch.setattr(upstream, "WAITING_COUNT_MAX", 2)
    async with connected(tmp_path, echo) as (pool, _):
        answers = [pool.send(REQUEST % number) for number in range(4)]
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert found[:3] == [b"/0", b"/1", b"/2"]
        assert isinstance(found[3], ShuttingDownError)
