"""The HTTP engine over a real socket: what is answered, in which order, and what the application gets to see."""

import asyncio
import dataclasses
import hashlib
import json
import os

import pytest

from minikms.http import LIMITS
from tests.minikms.http.http_harness import get, parse_answers, post, request, serving

pytestmark = pytest.mark.uvloop


async def test_the_application_sees_what_was_sent() -> None:
    async with serving() as running:
        [answer] = await running.exchange(
            request("POST", "/echo?k=v", "Content-Type: application/json", "X-Request-ID: r-1", "Content-Length: 3")
            + b"abc"
        )
        assert answer.status == 200
        assert answer.json == {
            "method": "POST",
            "path": "/echo",
            "query": "k=v",
            "request_id": "r-1",
            "content_type": "application/json",
            "length": 3,
            "sha256": hashlib.sha256(b"abc").hexdigest(),
        }
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"] == "r-1"


async def test_an_invalid_request_id_is_ignored() -> None:
    async with serving() as running:
        for bad in ("a b", "x" * 129, "", 'a"b', "ä"):
            [answer] = await running.exchange(get("/echo", f"X-Request-ID: {bad}"))
            assert answer.json["request_id"] is None
            assert "x-request-id" not in answer.headers


async def test_a_connection_is_kept_and_answers_in_order() -> None:
    """A slow answer holds back the fast ones behind it, on its own connection only."""
    async with serving() as running:
        slow = await running.peer()
        slow.send(get("/hold?n=0") + b"".join(get(f"/echo?n={n}") for n in range(1, 20)))
        fast = await running.peer()
        fast.send(get("/echo"))
        assert (await fast.answer()).status == 200
        assert [path for _, path, _ in running.app.seen].count("/echo") == 1
        running.app.release.set()
        for number in range(20):
            assert (await slow.answer()).json["query"] == f"n={number}"
        await slow.close()
        await fast.close()


async def test_input_behind_a_pending_answer_is_bounded() -> None:
    """While an answer is pending, the engine reads one buffer full and then leaves the rest to the kernel."""
    async with serving() as running:
        peer = await running.peer()
        peer.send(get("/hold"))
        await asyncio.sleep(0.01)
        count = 30_000
        peer.send(get("/echo") * count)
        await asyncio.sleep(0.2)
        assert running.http.shared.budget.bytes_held <= 2 * LIMITS.receive_buffer_bytes
        running.app.release.set()
        for _ in range(count + 1):
            assert (await peer.answer()).status == 200
        await peer.close()


async def test_expect_100_continue_is_answered_when_the_body_is_awaited() -> None:
    async with serving() as running:
        peer = await running.peer()
        peer.send(request("POST", "/echo", "Content-Length: 3", "Expect: 100-continue"))
        assert (await peer.answer()).status == 100
        peer.send(b"abc")
        assert (await peer.answer()).json["length"] == 3
        peer.send(request("POST", "/echo", "Content-Length: 3", "Expect: 100-continue") + b"abc")
        assert (await peer.answer()).status == 200
        peer.send(request("POST", "/echo", "Transfer-Encoding: chunked", "Expect: 100-Continue"))
        assert (await peer.answer()).status == 100
        peer.send(b"3\r\nabc\r\n0\r\n\r\n")
        assert (await peer.answer()).json["length"] == 3
        for _ in range(2):  # the same bytes again are another request
            await peer.send_parts(request("POST", "/echo", "Content-Length: 3", "Expect: 100-continue"))
            assert (await peer.answer()).status == 100
            peer.send(b"abc")
            assert (await peer.answer()).status == 200
        peer.send(get("/later") + request("POST", "/echo", "Content-Length: 1", "Expect: 100-continue"))
        assert (await peer.answer()).json["path"] == "/later"
        assert (await peer.answer()).status == 100
        await peer.close()


async def test_http_1_0_gets_no_100_continue_and_no_kept_connection() -> None:
    async with serving() as running:
        peer = await running.peer()
        await peer.send_parts(b"POST /echo HTTP/1.0\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n", b"x")
        answer = await peer.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await peer.rest() == b""
        await peer.close()


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
async def test_a_refused_peer_can_not_send_its_body(framing: str) -> None:
    """`admit` answers instead of 100 Continue, and the body is never buffered."""
    async with serving() as running:
        peer = await running.peer()
        peer.send(request("POST", "/refused", framing, "Expect: 100-continue"))
        answer = await peer.answer()
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        peer.send(b"x" * 1000)
        assert await peer.rest() == b""
        assert running.app.seen == []
        assert running.http.shared.budget.bytes_held == 0
        await peer.close()


async def test_a_complete_request_is_admitted_once() -> None:
    async with serving() as running:
        peer = await running.peer()
        peer.send(post("/echo", b"abc"))
        await peer.answer()
        assert running.app.admitted == []
        await peer.send_parts(request("POST", "/echo", "Content-Length: 3"), b"a", b"b", b"c")
        await peer.answer()
        assert running.app.admitted == ["/echo"]
        await peer.close()


async def test_head_is_answered_without_a_body() -> None:
    async with serving() as running:
        peer = await running.peer()
        peer.send(request("HEAD", "/echo"))
        answer = await peer.answer(head_only=True)
        assert int(answer.headers["content-length"]) > 0
        peer.send(get("/echo"))
        assert (await peer.answer()).json["method"] == "GET"
        await peer.close()


@pytest.mark.parametrize("path", ["/raise", "/later-raise"])
async def test_an_error_of_the_tree_becomes_its_status_and_code(path: str) -> None:
    async with serving() as running:
        [answer, after] = await running.exchange(get(path) + get("/echo"))
        assert answer.status == 409
        assert answer.json == {"error": "Two things can't both be.", "code": "conflict"}
        assert after.status == 200
        assert running.internal_errors == []


@pytest.mark.parametrize("path", ["/crash", "/later-crash"])
async def test_an_unexpected_exception_is_500_without_its_text(path: str) -> None:
    async with serving() as running:
        peer = await running.peer()
        peer.send(get(path))
        data = await peer.rest()
        await peer.close()
        [answer] = parse_answers(data)
        assert (answer.status, answer.json["code"]) == (500, "internal")
        assert b"0451" not in data
        [error] = running.internal_errors
        assert error.startswith("ValueError at tests.minikms.http.http_harness:")
        assert "0451" not in error


async def test_401_ends_the_connection() -> None:
    async with serving() as running:
        for path in ("/close", "/unauthorized"):
            peer = await running.peer()
            peer.send(get(path) + get("/echo"))
            answer = await peer.answer()
            assert (answer.status, answer.headers["connection"]) == (401, "close")
            assert await peer.rest() == b""
            await peer.close()
        assert [path for _, path, _ in running.app.seen] == ["/close", "/unauthorized"]


async def test_a_response_carries_its_status_type_and_headers() -> None:
    async with serving() as running:
        [answer] = await running.exchange(get("/response"))
        assert (answer.status, answer.body) == (202, b"accepted")
        assert answer.headers["content-type"] == "text/plain"
        assert answer.headers["x-extra"] == "1"


async def test_a_header_that_would_split_the_answer_is_not_written() -> None:
    async with serving() as running:
        peer = await running.peer()
        peer.send(get("/split-header"))
        data = await peer.rest()
        assert parse_answers(data)[0].status == 500
        assert b"cookie" not in data
        await peer.close()


async def test_a_connection_without_a_session_is_closed_at_once() -> None:
    async with serving() as running:
        running.app.accepts = False
        peer = await running.peer()
        peer.send(get("/echo"))
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await peer.answer()
        assert running.app.seen == []
        assert running.app.commits > 0
        await peer.close()


async def test_connections_over_the_bound_get_503() -> None:
    async with serving(dataclasses.replace(LIMITS, connections_max=3)) as running:
        peers = [await running.peer() for _ in range(3)]
        await asyncio.sleep(0.01)
        over = await running.peer()
        answer = await over.answer()
        assert (answer.status, answer.json["code"]) == (503, "too_many")
        assert await over.rest() == b""
        assert running.app.refusals == [(503, "too_many")]
        for peer in peers:
            peer.send(get("/echo"))
            assert (await peer.answer()).status == 200
        await peers[0].close()
        while running.http.connections_count > 2:
            await asyncio.sleep(0.001)
        again = await running.peer()
        again.send(get("/echo"))
        assert (await again.answer()).status == 200
        for peer in [*peers[1:], over, again]:
            await peer.close()


async def test_the_body_is_released_when_the_handler_returns() -> None:
    """A view that the application kept can't be read afterwards; one it can't give back is an internal error."""
    async with serving() as running:
        assert (await running.exchange(post("/keep-view", b"secret")))[0].status == 200
        with pytest.raises(ValueError, match="released"):
            bytes(running.app.kept)
        peer = await running.peer()
        peer.send(post("/keep-export", b"secret"))
        assert (await peer.answer()).status == 500
        assert running.internal_errors[0].startswith("BufferError at ")
        assert bytes(running.app.kept.raw()) == bytes(6)
        await peer.close()


async def test_a_full_group_loses_the_connection_that_waited_longest() -> None:
    """Idle, or in the middle of a request, but never one whose request is being answered."""
    async with serving(dataclasses.replace(LIMITS, sweep_seconds=0.01, place_seconds_min=0.0)) as running:
        running.app.places = 3
        busy, begun, idle = [await running.peer() for _ in range(3)]
        for peer in (busy, begun, idle):
            peer.send(get("/echo"))
            assert (await peer.answer()).status == 200
            await asyncio.sleep(0.05)
        busy.send(get("/hold"))
        begun.send(b"GET /echo HT")
        await asyncio.sleep(0.05)
        idle.send(get("/echo"))
        assert (await idle.answer()).status == 200
        new = await running.peer()
        new.send(get("/echo"))
        assert (await new.answer()).status == 200
        assert await begun.rest() == b""
        for peer in (idle, new):
            peer.send(get("/hold"))
        await asyncio.sleep(0.05)
        refused = await running.peer()
        assert (await refused.answer()).status == 503
        running.app.release.set()
        for peer in (busy, idle, new):
            assert (await peer.answer()).status == 200
        assert running.http.connections_count == 3
        assert running.app.sessions[1].closed
        for peer in (busy, begun, idle, new, refused):
            await peer.close()


@pytest.mark.parametrize("sent", [b"", get("/echo")])
async def test_a_connection_keeps_its_place_while_a_request_may_be_on_its_way(sent: bytes) -> None:
    """It has waited only for a moment, or the kernel has bytes of it that were not read yet."""
    limits = dataclasses.replace(LIMITS, place_seconds_min=0.0 if sent else 60.0)
    async with serving(limits) as running:
        running.app.places = 1
        peer = await running.peer()
        wait = next(iter(running.http.connections))
        if sent:
            os.write(peer.writer.get_extra_info("socket").fileno(), sent)
            assert not wait.give_place()
            assert (await peer.answer()).status == 200
        else:
            refused = await running.peer()
            answer = await refused.answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            await refused.close()
        await peer.close()


async def test_memory_for_incomplete_requests_is_bounded() -> None:
    """One more connection than the budget allows gets 503; when the others are gone there is room again."""
    async with serving(dataclasses.replace(LIMITS, buffered_bytes_max=1_000_000)) as running:
        announced = request("POST", "/echo", "Content-Length: 500000")
        greedy = []
        for _ in range(3):
            peer = await running.peer()
            peer.send(announced + b"x" * 200_000)
            await asyncio.sleep(0.02)
            greedy.append(peer)
        assert running.http.shared.budget.bytes_held <= 1_000_000
        last = await greedy[-1].answer()
        assert (last.status, last.json["code"]) == (503, "too_many")
        for peer in greedy:
            await peer.close()
        while running.http.connections_count:
            await asyncio.sleep(0.001)
        [answer] = await running.exchange(post("/echo", b"x" * 400_000))
        assert answer.status == 200


async def test_incomplete_requests_of_one_group_leave_room_for_the_others() -> None:
    limits = dataclasses.replace(LIMITS, buffered_bytes_max=2_000_000, buffered_group_bytes_max=1_000_000)
    async with serving(limits) as running:
        running.app.groups = 2
        announced = request("POST", "/echo", "Content-Length: 500000")
        peers = [await running.peer() for _ in range(6)]
        *greedy, other = *peers[::2], peers[1]
        for peer in greedy:
            peer.send(announced + b"x" * 300_000)
            await asyncio.sleep(0.02)
        last = await greedy[-1].answer()
        assert (last.status, last.json["code"]) == (503, "too_many")
        other.send(announced + b"x" * 300_000)
        await asyncio.sleep(0.02)
        other.send(b"x" * 200_000)
        assert (await other.answer()).status == 200
        for peer in peers:
            await peer.close()


async def test_answers_say_when_they_were_made() -> None:
    async with serving() as running:
        [plain, other] = await running.exchange(get("/echo") + get("/response"))
        assert plain.headers["date"].endswith(" gmt")
        assert other.headers["date"] == plain.headers["date"]


async def test_counters_count() -> None:
    async with serving() as running:
        await running.exchange(get("/echo") * 3)
        await running.exchange(b"\x16\x03\x01")
        assert (running.http.requests, running.http.refused) == (3, 1)
        peer = await running.peer()
        peer.send(get("/echo"))
        await peer.answer()
        assert running.http.connections_count == 1
        await peer.close()


async def test_the_answer_to_a_refusal_is_json_with_a_sentence() -> None:
    async with serving() as running:
        [answer] = await running.exchange(b"GET / HTTP/3.0\r\n\r\n")
        assert answer.status == 400
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["connection"] == "close"
        assert set(json.loads(answer.body)) == {"error", "code"}
