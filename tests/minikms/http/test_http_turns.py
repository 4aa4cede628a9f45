"""A turn of the event loop: its answers are sent together, after the commit, and no connection uses all of it."""

from __future__ import annotations

import asyncio
import dataclasses

from minikms.http import LIMITS
from tests.minikms.http.http_harness import get, request, run, serving


def test_a_connection_gets_at_most_its_share_of_a_turn() -> None:
    """A client that pipelines a thousand requests does not keep another one waiting until they are done."""

    async def check() -> None:
        limits = dataclasses.replace(LIMITS, pipelined_requests_max=8)
        async with serving(limits) as running:
            greedy = await running.peer()
            greedy.send(get("/echo?greedy") * 1000)
            await asyncio.sleep(0)
            modest = await running.peer()
            modest.send(get("/echo?modest"))
            assert (await modest.answer()).json["query"] == "modest"
            assert running.http.requests < 1000
            for _ in range(1000):
                assert (await greedy.answer()).json["query"] == "greedy"
            assert running.app.commits >= 1000 // 8
            await greedy.close()
            await modest.close()

    run(check())


def test_large_answers_do_not_accumulate_in_one_turn() -> None:
    """One request with a large answer is started per turn, and none while the client does not read."""

    async def check() -> None:
        async with serving(dataclasses.replace(LIMITS, write_buffer_bytes_max=100_000)) as running:
            peer = await running.peer()
            peer.transport.pause_reading()  # a client that does not read
            peer.send(get("/large?bytes=1000000") * 50)
            await asyncio.sleep(0.1)
            assert len(running.app.seen) == 1
            peer.transport.resume_reading()  # and now it does
            for _ in range(50):
                assert len((await peer.answer()).body) == 1_000_000
            await peer.close()

    run(check())


def test_no_answer_is_sent_when_the_turn_is_not_committed() -> None:
    """Every answer of the turn, refusals too, is replaced; in the next turn the service works again."""

    async def check() -> None:
        async with serving() as running:
            running.app.commit_succeeds = False
            peer = await running.peer()
            peer.send(get("/echo") + get("/raise") + get("/later"))
            for _ in range(3):
                answer = await peer.answer()
                assert (answer.status, answer.json["code"]) == (503, "audit_unavailable")
                assert "connection" not in answer.headers
            peer.send(request("POST", "/echo", "Content-Length: 1", "Expect: 100-continue"))
            assert (await peer.answer()).status == 100
            peer.send(b"x")
            assert (await peer.answer()).status == 503
            running.app.commit_succeeds = True
            peer.send(get("/echo"))
            assert (await peer.answer()).status == 200
            running.app.commit_succeeds = False
            peer.send(b"nonsense\r\n\r\n")
            answer = await peer.answer()
            assert (answer.status, answer.headers["connection"]) == (503, "close")
            await peer.close()

    run(check())


def test_a_commit_that_raises_is_a_commit_that_failed() -> None:
    async def check() -> None:
        async with serving() as running:

            def commit() -> bool:
                raise OSError("internal-text-0451")

            good = running.app.commit
            running.app.commit = commit  # type: ignore[method-assign]  # the fake fails as a disk does
            [answer] = await running.exchange(get("/echo"))
            assert answer.status == 503
            assert "OSError" in running.internal_errors[0]
            running.app.commit = good  # type: ignore[method-assign]  # and is well again

    run(check())


def test_all_answers_of_a_turn_wait_for_one_commit() -> None:
    async def check() -> None:
        async with serving() as running:
            peers = [await running.peer() for _ in range(20)]
            await asyncio.sleep(0.01)
            before = running.app.commits
            for peer in peers:
                peer.send(get("/echo") * 3)
            for peer in peers:
                for _ in range(3):
                    assert (await peer.answer()).status == 200
            assert running.app.commits - before < 20
            for peer in peers:
                await peer.close()

    run(check())
