"""The connections to the key service, whose socket a test serves in its place."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from minikms.api.errors import RequestInterruptedError, ShuttingDownError
from minikms_gateway import upstream
from minikms_gateway.upstream import Upstream

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
REQUEST = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def run(directory: Path, serve: Serve, check: Callable[[Upstream, asyncio.Server], Awaitable[None]]) -> None:
    writers: list[asyncio.StreamWriter] = []

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await serve(reader, writer)

    async def whole() -> None:
        path = str(directory / "s")
        server = await asyncio.start_unix_server(served, path)
        pool = Upstream(path, {os.geteuid()}, asyncio.get_running_loop())
        try:
            async with asyncio.timeout(60):
                await check(pool, server)
        finally:
            pool.close()
            server.close()
            for writer in writers:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    asyncio.run(whole())


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each request with its path."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        writer.write(ok(head.split()[1]))


def test_each_request_gets_its_own_answer_on_few_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CONNECTIONS_MAX", 3)

    async def check(pool: Upstream, server: asyncio.Server) -> None:
        answers = [pool.send(REQUEST % number) for number in range(200)]
        assert (pool.connections_count, pool.waiting_count) == (3, 197)
        assert await asyncio.gather(*answers) == [b"/%d" % number for number in range(200)]
        assert pool.connections_count == 3

    run(tmp_path, echo, check)


def test_requests_that_wait_fail_when_the_key_service_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were sent may have been carried out; the others were not begun."""
    monkeypatch.setattr(upstream, "CONNECTIONS_MAX", 1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        os.unlink(tmp_path / "s")
        writer.close()

    async def check(pool: Upstream, server: asyncio.Server) -> None:
        answers = [pool.send(REQUEST % number) for number in range(5)]
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert [type(one) for one in found] == [RequestInterruptedError] + [ShuttingDownError] * 4
        assert pool.error

    run(tmp_path, serve, check)


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\n\r\n", ok(b"1") + ok(b"2"), b"\x00" * 20_000, b"HTTP/1.1 100 Continue\r\n\r\n"],
    ids=["no length", "two answers", "no head", "interim"],
)
def test_an_answer_that_is_in_doubt_ends_its_connection(tmp_path: Path, answer: bytes) -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer if len(asked) == 1 else ok(b"good"))

    async def check(pool: Upstream, server: asyncio.Server) -> None:
        with pytest.raises(RequestInterruptedError):
            await pool.send(REQUEST % 1)
        assert await pool.send(REQUEST % 2) == b"good"

    run(tmp_path, serve, check)


def test_a_late_answer_reaches_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed with the request that was not answered in time."""
    asked: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append(writer)
        if len(asked) > 1:
            asked[0].write(ok(b"late"))
            writer.write(ok(b"own"))

    async def check(pool: Upstream, server: asyncio.Server) -> None:
        first = pool.send(REQUEST % 1)
        while not asked:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(upstream, "ANSWER_SECONDS_MAX", 0.0)
        pool.sweep()
        with pytest.raises(RequestInterruptedError):
            await first
        assert await pool.send(REQUEST % 2) == b"own"

    run(tmp_path, serve, check)


def test_a_socket_of_another_user_gets_nothing(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        writer.close()

    async def check(pool: Upstream, server: asyncio.Server) -> None:
        other = Upstream(str(tmp_path / "s"), {os.geteuid() + 1}, asyncio.get_running_loop())
        with pytest.raises(ShuttingDownError):
            await other.send(REQUEST % 1)

    run(tmp_path, serve, check)


def test_a_refusal_of_the_gateway_is_none_of_its_client(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ok(b"{}").replace(b"200 OK", b"401 Unauthorized"))

    async def check(pool: Upstream, server: asyncio.Server) -> None:
        with pytest.raises(ShuttingDownError):
            await pool.send(REQUEST % 1)
        assert pool.error

    run(tmp_path, serve, check)
