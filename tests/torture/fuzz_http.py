"""A fuzzer for the HTTP engine: mutated requests in random pieces, beside a good client that must not notice.

Owns: the tokens, the inputs and the two campaigns. What must hold for every case:
- The engine answers whole answers, none of them a 5xx, and closes; it never hangs beyond its limits.
- Where the bytes are cut makes no difference to which requests the application sees and whether the input is refused.
- No internal error, no stray exception, no byte left in a buffer.
- A good client on another connection gets every answer, in order.
A failing case is shown as bytes, with the seed. Run it by itself: `python -m tests.torture.fuzz_http SECONDS [SEED]`.
"""

import asyncio
import contextlib
import dataclasses
import random
import sys
import time
from collections.abc import Callable

from minikms.http import LIMITS
from minikms.http.reader import Shared
from tests.minikms.http.http_harness import Answer, Peer, Running, parse_answers, post, read_requests, run, serving
from tests.minikms.http.http_inputs import ACCEPTED, REFUSED
from tests.torture.mutation import mutated

SEEDS = [data for data in [*ACCEPTED.values(), *(data for data, _ in REFUSED.values())] if len(data) < 2000]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b"\r\n\r\n", b" ", b"\t", b":", b";", b",", b"0", b"1", b"-1", b"ffffffff", b"%",
    b"/", b"?",
    b"Host: y\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n",
    b"chunked",
    b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0",
    b"GET ", b"POST ", b"1\r\nx\r\n", b"0\r\n\r\n", b"\xff", b"\x80", b"x" * 300, b"A: b\r\n" * 70,
]  # fmt: skip
LIMITS_SHORT = dataclasses.replace(
    LIMITS,
    receive_buffer_bytes=4096,
    head_seconds_max=3.0,
    body_seconds_max=3.0,
    idle_seconds_max=3.0,
    half_closed_seconds_max=3.0,
    linger_seconds_max=0.5,
    write_stall_seconds_max=3.0,
    sweep_seconds=0.1,
    pipelined_requests_max=4,
)
CLOSED_SECONDS_MAX = 60.0
"""Far beyond the limits above: who is still connected then hangs."""


def case(rng: random.Random) -> bytes:
    """One to three requests, mutated up to eight times."""
    requests = b"".join(rng.choice(SEEDS) for _ in range(rng.choice((1, 1, 2, 3))))
    return mutated(rng, requests, TOKENS, SEEDS)


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 1, 1, 2, 5, 20))))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start < end]


def fuzz_reader(seconds: float, seed: int) -> int:
    """The receive side without sockets: as many cases as fit. Returns how many."""
    rng = random.Random(seed)
    whole = Shared(dataclasses.replace(LIMITS, receive_buffer_bytes=8192))
    small = Shared(dataclasses.replace(LIMITS, receive_buffer_bytes=64))
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        data = case(rng)
        parts = pieces(rng, data)
        expected, got = read_requests(whole, data), read_requests(small, *parts)
        # Which of two faults is named may depend on what had arrived; that it is refused may not.
        same = expected[:-1] == got[:-1] and expected[-1][:7] == got[-1][:7]
        assert same, f"seed {seed}: {parts!r}: {expected} became {got}"
        assert " 5" not in got[-1], f"seed {seed}: {parts!r}: {got}"
        count += 1
    return count


def fuzz_engine(seconds: float, seed: int) -> int:
    """The whole engine over a socket. Returns the number of cases."""
    return run(_fuzz_engine(seconds, seed), seconds + 60)


async def _fuzz_engine(seconds: float, seed: int) -> int:
    end = time.monotonic() + seconds
    async with serving(LIMITS_SHORT) as running:
        good = asyncio.ensure_future(_good_client(running, end))
        workers = [_attacker(running, random.Random(f"{seed}/{number}"), seed, end) for number in range(16)]
        counts = await asyncio.gather(*workers)
        assert await good > 0
        assert running.internal_errors == []
        assert not [refusal for refusal in running.app.refusals if refusal[0] >= 500]
        await asyncio.sleep(0.1)
    return sum(counts)


async def _good_client(running: Running, end: float) -> int:
    peer = await running.peer()
    served = 0
    while time.monotonic() < end:
        body = b"%d" % served
        peer.send(post(f"/echo?{served}", body) * 3)
        for _ in range(3):
            answer = await peer.answer()
            assert (answer.status, answer.json["query"], answer.json["length"]) == (200, str(served), len(body))
        served += 1
        await asyncio.sleep(0.001)
    await peer.close()
    return served


async def _attacker(running: Running, rng: random.Random, seed: int, end: float) -> int:
    count = 0
    while time.monotonic() < end:
        data = case(rng)
        shown = f"seed {seed}: {data!r}"
        behaviour = rng.choices((_twice, _leaves_open, _aborts), (6, 1, 1))[0]
        try:
            await behaviour(running, rng, data)
        except AssertionError as error:
            raise AssertionError(f"{shown}: {error}") from error
        except TimeoutError:
            raise AssertionError(f"{shown}: hangs") from None
        count += 1
    return count


async def _twice(running: Running, rng: random.Random, data: bytes) -> None:
    """Sent whole and in pieces: the same answers, whole ones, no 5xx."""
    first = await _answers(running, [data])
    second = await _answers(running, pieces(rng, data))
    if first is not None and second is not None:
        assert _essence(first) == _essence(second)


def _essence(answers: list[Answer]) -> list[tuple[int, bytes]]:
    """Without what may differ: interim answers, and which 4xx names the fault."""
    final = [answer for answer in answers if answer.status != 100]
    return [(answer.status, answer.body) if answer.status == 200 else (4, b"") for answer in final]


async def _answers(running: Running, parts: list[bytes]) -> list[Answer] | None:
    """None: they were lost, see `_until_closed`."""
    peer = await running.peer()
    await peer.send_parts(*parts)
    if not peer.writer.is_closing():
        with contextlib.suppress(OSError):
            peer.writer.write_eof()
    received = await _until_closed(peer)
    await peer.close()
    if received is None:
        return None
    answers = parse_answers(received)
    assert all(answer.status < 500 for answer in answers), [answer.status for answer in answers]
    return answers


async def _leaves_open(running: Running, rng: random.Random, data: bytes) -> None:
    """Sends, and then waits: the engine's limits must end it."""
    peer = await running.peer()
    await peer.send_parts(*pieces(rng, data))
    parse_answers(await _until_closed(peer) or b"")
    await peer.close()


async def _aborts(running: Running, rng: random.Random, data: bytes) -> None:
    """Goes away in the middle."""
    peer = await running.peer()
    await peer.send_parts(*pieces(rng, data[: rng.randrange(len(data) + 1)]))
    peer.writer.transport.abort()


async def _until_closed(peer: Peer) -> bytes | None:
    """What the engine sent. None: it closed while the peer was still sending, and a write that fails then takes what
    was received away from the reader.
    """
    async with asyncio.timeout(CLOSED_SECONDS_MAX):
        try:
            return await peer.reader.read()
        except (BrokenPipeError, ConnectionResetError):
            return None


CAMPAIGNS: list[Callable[[float, int], int]] = [fuzz_reader, fuzz_engine]


def main() -> None:
    seconds = float(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    for campaign in CAMPAIGNS:
        print(f"{campaign.__name__}: {campaign(seconds / 2, seed)} cases, seed {seed}")


if __name__ == "__main__":
    main()
