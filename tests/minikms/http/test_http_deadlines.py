"""Slow, silent, half-closed and non-reading clients: every wait is bounded, and other clients are not affected."""

import asyncio
import dataclasses
import socket
import time
from typing import Any

import pytest

from minikms.http.limits import LIMITS, WRITE_PROGRESS_BYTES_MIN, Limits
from tests.minikms.http.http_harness import StillLoop, get, post, request, serving

pytestmark = pytest.mark.uvloop

QUICK = dataclasses.replace(
    LIMITS,
    head_seconds_max=0.3,
    body_seconds_max=0.3,
    idle_seconds_max=0.3,
    half_closed_seconds_max=0.3,
    linger_seconds_max=0.3,
    write_stall_seconds_max=0.3,
    sweep_seconds=0.05,
)
PATIENT = dataclasses.replace(
    QUICK, head_seconds_max=30.0, body_seconds_max=30.0, idle_seconds_max=30.0, write_stall_seconds_max=30.0
)
"""Only the limit that a test names is short."""
QUICK_BODY = dataclasses.replace(PATIENT, body_seconds_max=1.5)


@pytest.mark.parametrize(
    ("limits", "start"),
    [
        (dataclasses.replace(PATIENT, head_seconds_max=0.3), b"GET /echo HTTP/1.1\r\nHost: x\r\nA: "),
        (dataclasses.replace(PATIENT, body_seconds_max=0.3), request("POST", "/echo", "Content-Length: 9999")),
        (
            dataclasses.replace(PATIENT, body_seconds_max=0.3),
            request("POST", "/echo", "Transfer-Encoding: chunked") + b"fff\r\n",
        ),
    ],
    ids=["head", "body", "chunks"],
)
async def test_a_request_that_trickles_in_gets_408(limits: Limits, start: bytes) -> None:
    """The limit counts from the beginning of the head or body; further bytes do not extend it."""
    async with serving(limits) as running:
        peer = await running.peer()
        peer.send(start)

        async def trickle() -> None:
            while True:
                peer.send(b"x")
                await asyncio.sleep(0.02)

        trickling = asyncio.ensure_future(trickle())
        answer = await peer.answer()
        trickling.cancel()
        assert (answer.status, answer.json["code"]) == (408, "timeout")
        assert running.app.refusals == [(408, "timeout")]
        assert running.http.shared.budget.bytes_held == 0
        await peer.close()


async def test_each_request_of_a_connection_has_its_own_time() -> None:
    """Six requests that take 0.8 s each are fine under a limit of 4 s."""
    limits = dataclasses.replace(PATIENT, head_seconds_max=4.0, body_seconds_max=4.0)
    clock = StillLoop()
    async with serving(limits, clock) as running:
        peer = await running.peer()
        data = post("/echo", b"abc")
        for _ in range(6):
            for part in (data[:10], data[10:-2]):
                peer.send(part)
                await clock.move(0.4, limits)
            peer.send(data[-2:])
            assert (await peer.answer()).status == 200
        await peer.close()


async def test_an_idle_connection_is_closed_without_a_word() -> None:
    async with serving(dataclasses.replace(PATIENT, idle_seconds_max=0.3)) as running:
        silent, used = await running.peer(), await running.peer()
        used.send(get("/echo"))
        assert (await used.answer()).status == 200
        assert await silent.rest() == b""
        assert await used.rest() == b""
        assert running.app.refusals == []
        await silent.close()
        await used.close()


async def test_a_pending_answer_is_not_idleness() -> None:
    clock = StillLoop()
    async with serving(QUICK, clock) as running:
        peer = await running.peer()
        peer.send(get("/hold"))
        while not running.app.seen:
            await asyncio.sleep(0.01)
        await clock.move(0.6, QUICK)
        running.app.release.set()
        assert (await peer.answer()).status == 200
        await peer.close()


async def test_the_time_for_a_body_ends_with_the_body() -> None:
    """A request that came in two parts and was answered later leaves an idle connection, not a late one."""
    clock = StillLoop()
    async with serving(QUICK_BODY, clock) as running:
        peer = await running.peer()
        data = post("/later", b"abc")
        await peer.send_parts(data[:-1], data[-1:])
        assert (await peer.answer()).status == 200
        await clock.move(2.0, QUICK_BODY)
        peer.send(get("/echo"))
        assert (await peer.answer()).status == 200
        await peer.close()


async def test_a_half_closed_client_gets_its_answers_and_then_the_end() -> None:
    async with serving(dataclasses.replace(PATIENT, half_closed_seconds_max=30.0)) as running:
        started = time.monotonic()
        answers = await running.exchange(get("/echo") + get("/later") + post("/echo", b"x"))
        assert [answer.status for answer in answers] == [200, 200, 200]
        answers = await running.exchange(get("/echo") + get("/later"))
        assert [answer.status for answer in answers] == [200, 200]
        idle = await running.peer()
        idle.writer.write_eof()
        assert await idle.rest() == b""
        await idle.close()
        assert time.monotonic() - started < PATIENT.idle_seconds_max


async def test_a_half_closed_connection_ends_and_its_verb_goes_on() -> None:
    """With the real limits. The client is gone, but the verb is not cancelled and its audit line is committed."""
    async with serving() as running:
        peer = await running.peer()
        peer.send(get("/hold"))
        while running.app.running == 0:
            await asyncio.sleep(0.001)
        peer.writer.write_eof()
        assert await peer.rest() == b""
        await peer.close()
        assert running.app.running == 1
        commits = running.app.commits
        running.app.release.set()
        while running.app.running or running.http.connections_count or running.app.commits == commits:
            await asyncio.sleep(0.001)


async def test_after_a_refusal_input_is_thrown_away_for_a_bounded_time() -> None:
    """A client that goes on sending after its 400 is cut off; nothing of it is kept."""
    async with serving(dataclasses.replace(PATIENT, linger_seconds_max=0.3)) as running:
        peer = await running.peer()
        peer.send(b"nonsense\r\n\r\n")
        assert (await peer.answer()).status == 400
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(60):
                while True:
                    peer.send(b"x" * 10_000)
                    await peer.writer.drain()
                    await asyncio.sleep(0.01)
                    assert running.http.shared.budget.bytes_held == 0
        await peer.close()


async def test_a_client_that_does_not_read_is_not_read_and_then_cut_off() -> None:
    """Its answers stay bounded, its further requests are not started, and other clients do not notice."""
    limits = dataclasses.replace(PATIENT, pipelined_requests_max=4, write_stall_seconds_max=1.5)
    async with serving(limits) as running:
        transports: list[asyncio.Transport] = []
        opened = running.http.open

        def noting(connection: Any, transport: asyncio.Transport) -> Any:
            transports.append(transport)
            return opened(connection, transport)

        running.http.open = noting  # type: ignore[method-assign]  # the test watches what is buffered
        loop = asyncio.get_running_loop()
        deaf = socket.socket(socket.AF_UNIX)
        deaf.setblocking(False)
        await loop.sock_connect(deaf, running.path)
        await loop.sock_sendall(deaf, get("/large?bytes=50000") * 500)
        good = await running.peer()
        while not running.app.seen or running.http.connections_count < 2:
            await asyncio.sleep(0.001)
        most = 0
        while running.http.connections_count > 1:
            good.send(get("/echo"))
            assert (await good.answer()).status == 200
            most = max(most, sum(transport.get_write_buffer_size() for transport in transports))
            await asyncio.sleep(0.005)
        assert len([path for _, path, _ in running.app.seen if path == "/large"]) < 50
        assert 0 < most < 5 * 51_000
        deaf.close()
        await good.close()


async def test_a_slow_reader_is_not_a_deaf_one() -> None:
    """Who takes at least WRITE_PROGRESS_BYTES_MIN in the time of a stall gets all of its answer."""
    limits = dataclasses.replace(PATIENT, write_stall_seconds_max=3.0)
    clock = StillLoop()
    async with serving(limits, clock) as running:
        loop = asyncio.get_running_loop()
        slow = socket.socket(socket.AF_UNIX)
        slow.setblocking(False)
        await loop.sock_connect(slow, running.path)
        await loop.sock_sendall(slow, get("/large?bytes=1000000"))
        taken = 0
        while taken < 1_000_000:
            chunk = await loop.sock_recv(slow, 2 * WRITE_PROGRESS_BYTES_MIN)
            assert chunk, "cut off although it was reading"
            taken += len(chunk)
            await clock.move(0.6, limits)
        slow.close()


async def test_300_half_open_connections_cost_a_good_client_nothing() -> None:
    """They get 408 in their time; meanwhile every request of the good client is answered."""
    parts = (b"GET /echo HTTP/1.1\r\nHo", post("/echo", b"xx")[:-1], b"P")
    async with serving(dataclasses.replace(PATIENT, head_seconds_max=3.0, body_seconds_max=3.0)) as running:
        half_open = [await running.peer() for _ in range(300)]
        for number, peer in enumerate(half_open):
            peer.send(parts[number % len(parts)])
        good = await running.peer()
        served = 0
        while running.http.refused < 300 or served < 10:
            good.send(get("/echo"))
            assert (await good.answer()).status == 200
            served += 1
        for peer in half_open:
            assert (await peer.answer()).status == 408
            await peer.close()
        await good.close()


class TestDrain:
    """Graceful stop."""

    async def test_what_is_in_flight_is_finished_and_says_that_it_was_the_last(self) -> None:
        async with serving(PATIENT) as running:
            idle, pending, receiving = [await running.peer() for _ in range(3)]
            idle.send(get("/echo"))
            await idle.answer()
            pending.send(get("/hold") + get("/echo"))
            data = post("/echo", b"abcdef")
            receiving.send(data[:-3])
            await asyncio.sleep(0.01)
            running.listener.close()
            draining = asyncio.ensure_future(running.http.drain(10))
            assert await idle.rest() == b""
            assert not draining.done()
            receiving.send(data[-3:])
            answer = await receiving.answer()
            assert (answer.json["length"], answer.headers["connection"]) == (6, "close")
            running.app.release.set()
            answer = await pending.answer()
            assert (answer.json["path"], answer.headers["connection"]) == ("/hold", "close")
            assert await pending.rest() == b""
            await draining
            assert [path for _, path, _ in running.app.seen].count("/echo") == 2
            for peer in (idle, pending, receiving):
                await peer.close()

    async def test_a_request_in_the_socket_queue_is_answered(self) -> None:
        """It was sent before the stop began, so its sender gets an answer."""
        async with serving(PATIENT) as running:
            peer = await running.peer()
            await asyncio.sleep(0.01)
            peer.send(get("/echo"))
            await running.http.drain(10)
            answer = await peer.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            await peer.close()

    async def test_at_the_deadline_pending_requests_get_503_and_connections_end(self) -> None:
        async with serving(PATIENT) as running:
            pending, receiving = await running.peer(), await running.peer()
            pending.send(get("/hold"))
            receiving.send(post("/echo", b"abcdef")[:-3])
            await asyncio.sleep(0.01)
            await running.http.drain(0.1)
            assert running.http.connections_count == 0
            assert running.app.running == 0
            answer = await pending.answer()
            assert (answer.status, answer.json["code"]) == (503, "interrupted")
            assert [path for _, path, _ in running.app.seen] == ["/hold"]
            await pending.close()
            await receiving.close()

    async def test_a_new_connection_during_a_stop_gets_503(self) -> None:
        async with serving(PATIENT) as running:
            first = await running.peer()
            first.send(get("/hold"))
            await asyncio.sleep(0.01)
            draining = asyncio.ensure_future(running.http.drain(10))
            await asyncio.sleep(0.05)
            late = await running.peer()
            answer = await late.answer()
            assert (answer.status, answer.json["code"]) == (503, "shutting_down")
            running.app.release.set()
            await first.answer()
            await draining
            await first.close()
            await late.close()


async def test_no_timer_runs_without_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle daemon does not wake up."""
    async with serving(QUICK) as running:
        turns: list[float] = []
        encoder = type(running.http.encoder)
        set_time = encoder.set_time

        def noting(self: Any, now: float) -> None:
            turns.append(now)
            set_time(self, now)

        monkeypatch.setattr(encoder, "set_time", noting)
        peer = await running.peer()
        while len(turns) < 3:
            await asyncio.sleep(0.01)
        await peer.close()
        while running.http.connections_count:
            await asyncio.sleep(0.01)
        before = len(turns)
        await asyncio.sleep(4 * QUICK.sweep_seconds)
        assert len(turns) == before
        await running.exchange(get("/echo"))
