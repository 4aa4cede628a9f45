"""Over a real socket, the answer does not depend on how the bytes of a request are split, nor on its size."""

import hashlib

import pytest

from minikms.http import LIMITS
from tests.minikms.http.http_harness import Running, chunked, get, post, request, serving, undated

pytestmark = pytest.mark.uvloop

BODY = bytes(range(256))
CLOSE = "Connection: close"

CORPUS = {
    "get": get("/echo?a=1&b=%20", CLOSE),
    "http 1.0": b"GET /echo HTTP/1.0\r\n\r\n",
    "post": post("/echo", BODY, CLOSE),
    "post, empty body": post("/echo", b"", CLOSE),
    "body that looks like a request": post("/echo", get("/other"), CLOSE),
    "chunked": chunked("/echo", b"a", BODY, b"\r\n\r\n") + get("/echo", CLOSE),
    "chunked, empty": chunked("/echo") + get("/echo", CLOSE),
    "pipelined": get("/echo") + post("/echo", b"12") + get("/later") + chunked("/later", b"x") + get("/echo", CLOSE),
    "error in the middle": get("/echo") + get("/raise") + get("/echo", CLOSE),
    "request id": get("/echo", "X-Request-Id: abc.1", CLOSE),
    "refused: after a good one": get("/echo") + b"GET / HTTP/2.0\r\n\r\n",
    "refused: bare LF": get("/echo") + b"GET / HTTP/1.1\nHost: x\n\n",
    "refused: 0.9": b"GET /echo\r\n",
    "refused: chunk extension": request("POST", "/echo", "Transfer-Encoding: chunked") + b"1;a=b\r\nx\r\n0\r\n\r\n",
    "refused: trailer": request("POST", "/echo", "Transfer-Encoding: chunked") + b"0\r\nX: y\r\n\r\n",
}


async def _all_bytes(running: Running, *parts: bytes) -> bytes:
    peer = await running.peer()
    await peer.send_parts(*parts)
    data = await peer.rest()
    await peer.close()
    return undated(data)


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_that_looks_like_a_cached_request_stays_a_body(framing: str) -> None:
    """First the head, then a body whose bytes are a complete request with a cached head: it is never started."""
    smuggled = post("/smuggled", b"x")
    whole = post("/echo", smuggled) if framing == "length" else chunked("/echo", smuggled)
    head = whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"

    async with serving() as running:
        peer = await running.peer()
        peer.send(smuggled)
        assert (await peer.answer()).status == 200
        for cut in (len(head), whole.index(smuggled)):
            running.app.seen.clear()
            parts = (whole[:cut], whole[cut : cut + len(smuggled)], whole[cut + len(smuggled) :])
            await peer.send_parts(*(part for part in parts if part))
            assert (await peer.answer()).json["length"] == len(smuggled)
            assert running.app.seen == [("POST", "/echo", smuggled)]
        await peer.close()


@pytest.mark.parametrize("name", CORPUS)
async def test_bytes_that_come_one_at_a_time_get_the_same_answer(name: str) -> None:
    data = CORPUS[name]

    async with serving() as running:
        whole = await _all_bytes(running, data)
        assert await _all_bytes(running, *(bytes([byte]) for byte in data)) == whole


async def test_received_bytes_are_zeroed_when_the_turn_ends() -> None:
    """The shared buffer is zero at any time that is not inside a turn, whatever was sent."""
    async with serving() as running:
        for data in [*CORPUS.values(), post("/echo", b"x" * 300_000), post("/crash", b"secret"), b"junk" * 1000]:
            peer = await running.peer()
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                await peer.send_parts(part)
                assert not any(running.http.shared.data)
            await peer.close()


@pytest.mark.parametrize("size", [65_536, 262_143, 262_144, 1_000_000, LIMITS.body_bytes_max])
async def test_large_bodies_arrive_unchanged(size: int) -> None:
    body = hashlib.shake_128(b"seed").digest(size)

    async with serving() as running:
        peer = await running.peer()
        for data in (
            post("/echo", body),
            chunked("/echo", body),
            chunked("/echo", body[: size // 3], body[size // 3 :]),
        ):
            peer.send(data + get("/echo"))
            answer = await peer.answer()
            assert answer.json["sha256"] == hashlib.sha256(body).hexdigest()
            assert (await peer.answer()).json["length"] == 0
            assert running.http.shared.budget.bytes_held == 0
        await peer.close()
