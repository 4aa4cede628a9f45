"""A load generator: N kept-alive connections, each sending its own requests again as soon as the answer is there.

Built on uvloop and bare protocols so that it takes as little of the machine as it can from what it measures. It knows
only answers with a Content-Length, counts them, and stops at the first that is not 2xx.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import uvloop

from bench.programs import BenchError

ANSWER_SECONDS_MAX = 30.0


@dataclass(frozen=True)
class Load:
    """What a run did: answers of each connection, in order, and seconds from the first request to the last answer."""

    answers: list[int]
    seconds: float
    latencies_ms: list[float]

    @property
    def per_second(self) -> float:
        return sum(self.answers) / self.seconds


class _Client(asyncio.Protocol):
    """One connection, which sends its requests in turn and then again.

    `until` is a time of `time.perf_counter`; `done` resolves once its last answer is there."""

    def __init__(self, requests: Sequence[bytes], until: float, done: asyncio.Future[None]) -> None:
        self._requests = itertools.cycle(requests)
        self._until = until
        self.done = done
        self._received = b""
        self._sent_at = 0.0
        self.answers = 0
        self.latencies_ms: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head_end = self._received.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self._received[:head_end].lower()
        if head[9:10] != b"2":
            self._fail(f"answered {self._received[:300]!r}")
            return
        length = content_length(head)
        if len(self._received) < head_end + 4 + length:
            return
        now = time.perf_counter()
        self.answers += 1
        self.latencies_ms.append((now - self._sent_at) * 1000)
        self._received = b""
        if now < self._until:
            self._send()
        elif not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"closed the connection ({exc})")

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(next(self._requests))

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(BenchError(f"the server {why}"))


def content_length(head: bytes) -> int:
    """Of the head of an answer, in lower case. Raises BenchError."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    raise BenchError("an answer without Content-Length, which this generator does not know")


async def _generate(
    address: str | tuple[str, int], requests: Sequence[bytes | Sequence[bytes]], seconds: float
) -> Load:
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    clients = [
        _Client([each] if isinstance(each, bytes) else each, start + seconds, loop.create_future()) for each in requests
    ]
    transports: list[asyncio.BaseTransport] = []
    try:
        for client in clients:
            connecting = (
                loop.create_unix_connection(partial(_same, client), address)
                if isinstance(address, str)
                else loop.create_connection(partial(_same, client), *address)
            )
            transports.append((await connecting)[0])
        async with asyncio.timeout(seconds + ANSWER_SECONDS_MAX):
            await asyncio.gather(*(client.done for client in clients))
    except TimeoutError:
        raise BenchError(f"no answer within {ANSWER_SECONDS_MAX:.0f} s") from None
    finally:
        for transport in transports:
            transport.close()
        await asyncio.sleep(0)  # the closing happens in the loop's next turn
    took = time.perf_counter() - start
    return Load([client.answers for client in clients], took, [ms for client in clients for ms in client.latencies_ms])


def _same(client: _Client) -> _Client:
    return client


def generate(address: str | tuple[str, int], requests: Sequence[bytes | Sequence[bytes]], seconds: float) -> Load:
    """One connection for each of `requests`, which may be several in turn, for `seconds`.

    Raises BenchError when an answer is not 2xx."""
    return uvloop.run(_generate(address, requests, seconds))


def post(target: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """The bytes of a POST request; its body is JSON unless `headers` names another content type."""
    lines = {"Host": "bench", "Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {target} HTTP/1.1\r\n{head}\r\n".encode() + body
