"""A turn of the event loop: its answers are sent together, after the commit, and no connection uses all of it."""

import asyncio
import dataclasses
import os
import select
from collections.abc import Awaitable

import pytest

from minikms.http import LIMITS, HttpRequest, Response
from tests.minikms.http.http_harness import Peer, Session, get, post, request, serving

pytestmark = pytest.mark.uvloop


async def test_a_connection_gets_at_most_its_share_of_a_turn() -> None:
    """A client that pipelines a thousand requests does not keep another one waiting until they are done."""
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


@pytest.mark.parametrize("path", ["/large", "/large-text"])
async def test_large_answers_do_not_accumulate_in_one_turn(path: str) -> None:
    """One request with a large answer is started per turn, and none while the client does not read."""
    async with serving() as running:
        peer = await running.peer()
        peer.transport.pause_reading()  # a client that does not read
        peer.send(get(f"{path}?bytes=1000000") * 50)
        while not running.app.seen:
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        assert len(running.app.seen) == 1
        peer.transport.resume_reading()  # and now it does
        for _ in range(50):
            assert len((await peer.answer()).body) == 1_000_000
        await peer.close()


async def test_no_answer_is_sent_when_the_turn_is_not_committed() -> None:
    """Every answer of the turn, refusals too, is replaced; in the next turn the service works again."""
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


async def test_a_commit_that_raises_is_a_commit_that_failed() -> None:
    async with serving() as running:

        def commit() -> bool:
            raise OSError("internal-text-0451")

        good = running.app.commit
        running.app.commit = commit  # type: ignore[method-assign]  # the fake fails as a disk does
        [answer] = await running.exchange(get("/echo"))
        assert answer.status == 503
        assert "OSError" in running.internal_errors[0]
        running.app.commit = good  # type: ignore[method-assign]  # and is well again


async def test_answers_wait_while_the_commit_says_not_yet() -> None:
    """Meanwhile the connection starts no further request."""
    async with serving() as running:
        good = running.app.commit
        running.app.commit = lambda: None  # type: ignore[assignment,method-assign,return-value]  # the fake is held, as an audit log is
        peer = await running.peer()
        peer.send(get("/echo?one"))
        while not running.app.seen:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        peer.send(get("/echo?two"))
        await asyncio.sleep(0.05)
        assert len(running.app.seen) == 1
        running.app.commit = good  # type: ignore[method-assign]  # and takes lines again
        assert [(await peer.answer()).json["query"] for _ in range(2)] == ["one", "two"]
        await peer.close()


async def test_an_answer_that_needs_no_commit_does_not_wait_for_one() -> None:
    """Nor do those that follow it on its connection."""
    async with serving() as running:
        good = running.app.commit
        running.app.commit = lambda: None  # type: ignore[assignment,method-assign,return-value]  # as above
        waiting, peer = await running.peer(), await running.peer()
        waiting.send(get("/echo?waits"))
        while not running.app.seen:
            await asyncio.sleep(0)
        for number in range(3):
            peer.send(get(f"/uncommitted?{number}"))
            assert (await peer.answer()).json["query"] == str(number)
        peer.send(get("/uncommitted?3") + get("/echo?too"))
        await asyncio.sleep(0.05)
        running.app.commit = good  # type: ignore[method-assign]  # and takes lines again
        assert (await waiting.answer()).json["query"] == "waits"
        assert [(await peer.answer()).json["query"] for _ in range(2)] == ["3", "too"]
        await waiting.close()
        await peer.close()


async def test_all_answers_of_a_turn_wait_for_one_commit() -> None:
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


async def test_another_application_takes_over_the_open_connections() -> None:
    """What the former one has begun gets the given answer, even if it was ready to be written."""
    instead = Response(503, b'{"error":"no","code":"sealed"}')

    async with serving() as running:
        former, app = running.app, type(running.app)()
        held, idle, asking = [await running.peer() for _ in range(3)]
        held.send(get("/hold"))
        idle.send(get("/echo"))
        assert (await idle.answer()).status == 200
        while not former.running:
            await asyncio.sleep(0)

        def handle_and_replace(session: Session, request: HttpRequest) -> bytes:
            running.http.replace_app(app, instead)
            return b"{}"

        former.handle = handle_and_replace  # type: ignore[method-assign]  # as a verb that replaces the application
        asking.send(get("/echo") + get("/echo"))
        first, second = await asking.answer(), await asking.answer()
        assert (first.status, second.status) == (200, 200)
        answer = await held.answer()
        assert (answer.status, answer.json["code"]) == (503, "sealed")
        assert "connection" not in answer.headers
        assert former.running == 0
        for peer in (held, idle, asking):
            before = len(app.seen)
            peer.send(get("/echo"))
            assert (await peer.answer()).status == 200 and len(app.seen) == before + 1
            await peer.close()


async def test_answers_that_wait_for_the_end_of_the_turn_are_replaced() -> None:
    instead = Response(503, b'{"error":"no","code":"sealed"}')

    async with serving() as running:
        peer = await running.peer()
        app = type(running.app)()
        seen = running.app.seen

        def handle(session: Session, request: HttpRequest) -> bytes:
            seen.append(("", "", b""))
            if len(seen) == 2:
                running.http.replace_app(app, instead)
            return b"{}"

        running.app.handle = handle  # type: ignore[method-assign]  # the second request of the turn replaces it
        peer.send(get("/echo") * 2)
        assert [(await peer.answer()).status for _ in range(2)] == [503, 200]
        await peer.close()


def send_now(peer: Peer, data: bytes) -> None:
    """So that what several peers send comes in this order, in one turn."""
    os.write(peer.transport.get_extra_info("socket").fileno(), data)


def has_input(peer: Peer) -> bool:
    return bool(select.select([peer.transport.get_extra_info("socket")], [], [], 0)[0])


async def test_no_further_byte_leaves_after_another_application_has_taken_over() -> None:
    """Of an answer that its client reads slowly, which may have plaintext."""
    async with serving() as running:
        deaf = await running.peer()
        deaf.transport.pause_reading()
        deaf.send(get("/large?bytes=5000000"))
        while not has_input(deaf):
            await asyncio.sleep(0)
        running.http.replace_app(type(running.app)(), Response(503, b"{}"))
        await asyncio.sleep(0.01)
        assert running.http.unread == 0 and not running.http.connections
        deaf.transport.resume_reading()
        assert len(await deaf.rest()) < 5_000_000
        await deaf.close()


async def test_the_answers_of_a_turn_leave_before_another_request_begins() -> None:
    async with serving() as running:
        large, other = await running.peer(), await running.peer()
        handle, there = running.app.handle, []

        def look_and_handle(session: Session, request: HttpRequest) -> bytes | Response | Awaitable[bytes | Response]:
            if request.query == "next":
                there.append(has_input(other))
            return handle(session, request)

        running.app.handle = look_and_handle  # type: ignore[method-assign]  # looks at the other client's socket
        while len(running.app.sessions) < 2:
            await asyncio.sleep(0)
        send_now(large, get("/large?bytes=70000") + get("/echo?next"))
        send_now(other, get("/echo"))
        for peer in (large, large, other):
            assert (await peer.answer()).status == 200
        assert there == [True]
        for peer in (large, other):
            await peer.close()


async def test_a_request_that_goes_on_between_two_answers_has_its_own_commit() -> None:
    """It moves to a group that is held back until another connection of the turn has been written."""
    async with serving(dataclasses.replace(LIMITS, unread_group_bytes_max=100_000)) as running:
        app = running.app
        app.group = lambda session: int(session.number and not session.moved)  # type: ignore[method-assign]  # two groups
        large, moving = await running.peer(), await running.peer()
        app.commit = lambda: all(path != "/echo" for _, path, _ in app.seen)  # type: ignore[method-assign]  # as a full disk
        while len(app.sessions) < 2:
            await asyncio.sleep(0)
        send_now(large, get("/large?bytes=120000"))
        send_now(moving, get("/move") + get("/echo"))
        assert (await large.answer()).status == 200
        assert [(await moving.answer()).status for _ in range(2)] == [200, 503]
        for peer in (large, moving):
            await peer.close()


async def test_answers_that_wait_to_be_read_are_bounded_in_each_group_and_in_all() -> None:
    """A group beyond a bound is not read; it goes on once its answers have been read. Others do not notice."""
    limits = dataclasses.replace(LIMITS, unread_group_bytes_max=1_000_000, unread_bytes_max=1_500_000)
    async with serving(limits) as running:
        running.app.groups = 3
        of_a, of_b, of_c, also_of_a, also_of_b = [await running.peer() for _ in range(5)]
        for number, (deaf, size) in enumerate([(of_a, 1_200_000), (of_b, 800_000)], 1):
            deaf.transport.pause_reading()
            deaf.send(get(f"/large?bytes={size}"))
            while len(running.app.seen) < number:
                await asyncio.sleep(0)
        also_of_a.send(get("/echo?a"))
        also_of_b.send(get("/echo?b"))
        of_c.send(get("/echo?c"))
        assert (await of_c.answer()).json["query"] == "c"
        _, joining = more = [await running.peer() for _ in range(2)]  # `joining` is of the first group
        joining.send(get("/echo?joined"))
        of_c.send(get("/echo?c"))
        assert (await of_c.answer()).json["query"] == "c"
        assert len(running.app.seen) == 4, "those of the other groups wait"
        assert running.http.unread >= 2_000_000
        for deaf, waiting, query in ((of_a, also_of_a, "a"), (of_b, also_of_b, "b")):
            assert len(running.app.seen) == (4 if query == "a" else 6)
            deaf.transport.resume_reading()
            assert (await deaf.answer()).status == 200
            assert (await waiting.answer()).json["query"] == query
            if query == "a":
                assert (await joining.answer()).json["query"] == "joined"
        assert running.http.unread == 0
        for peer in (of_a, of_b, of_c, also_of_a, also_of_b, *more):
            await peer.close()


@pytest.mark.parametrize("path", ["/move", "/move-later"])
async def test_a_connection_that_changes_its_group_takes_along_what_it_has(path: str) -> None:
    """Its request, its answers, and the beginning of its next request. Its former group goes on."""
    limits = dataclasses.replace(LIMITS, unread_group_bytes_max=1_000_000)
    async with serving(limits) as running:
        moving, other = await running.peer(), await running.peer()
        budget = running.http.shared.budget
        body = b"x" * 1_200_000
        moving.send(post(path, body) + request("POST", "/echo", "Content-Length: 100000") + b"y" * 50_000)
        while not running.app.seen or (path == "/move" and not budget.bytes_held):
            await asyncio.sleep(0.001)
        other.send(get("/echo?other"))
        if path == "/move-later":
            await asyncio.sleep(0.01)
            assert len(running.app.seen) == 1, "the group is held back by its body"
            running.app.release.set()
        assert (await other.answer()).json["query"] == "other"
        assert (await moving.answer()).json["length"] == len(body)
        moving.transport.pause_reading()
        moving.send(b"y" * 50_000 + get("/large?bytes=3000000"))
        while running.http.unread < 3_000_000:
            await asyncio.sleep(0.001)
        other.send(get("/echo?again"))
        assert (await other.answer()).json["query"] == "again"
        moving.transport.resume_reading()
        assert [(await moving.answer()).status for _ in range(2)] == [200, 200]
        for peer in (moving, other):
            await peer.close()
        while running.http.connections_count:
            await asyncio.sleep(0.001)


async def test_requests_that_are_answered_later_are_bounded_in_each_group() -> None:
    """Their bodies are kept until then, also those of clients that have gone. Other groups do not notice."""
    limits = dataclasses.replace(LIMITS, unread_group_bytes_max=1_000_000)
    async with serving(limits) as running:
        running.app.groups = 2
        peers = [await running.peer() for _ in range(10)]
        kept, other = peers[0::2], peers[1]
        body = b"x" * 400_000
        for peer in kept:
            peer.send(request("POST", "/hold", f"Content-Length: {len(body)}") + body)
        while len(running.app.seen) < 3:
            await asyncio.sleep(0)
        for _ in range(20):
            other.send(get("/echo"))
            await other.answer()
        assert len(running.app.seen) == 3 + 20, "those of two connections wait"
        assert running.http.unread == 3 * len(body)
        for peer in kept:
            await peer.close()
        joining = await running.peer()  # of the first group, which has no connection
        joining.send(get("/echo?joined"))
        other.send(get("/echo"))
        await other.answer()
        assert len(running.app.seen) == 3 + 21
        running.app.release.set()
        assert (await joining.answer()).json["query"] == "joined"
        while running.http.unread:
            await asyncio.sleep(0)
        for peer in (joining, *peers[1::2]):
            await peer.close()


async def test_several_small_answers_use_up_the_share_of_a_turn() -> None:
    async with serving() as running:
        peer = await running.peer()
        peer.send(get("/large?bytes=40000") * 60)
        for _ in range(60):
            assert len((await peer.answer()).body) == 40_000
        assert running.app.commits >= 60 // 2
        await peer.close()


async def test_a_connection_that_may_not_stay_is_closed_once_it_is_answered() -> None:
    async with serving(dataclasses.replace(LIMITS, sweep_seconds=0.01)) as running:
        idle, waiting, staying = [await running.peer() for _ in range(3)]
        waiting.send(get("/hold"))
        while not running.app.running:
            await asyncio.sleep(0)
        running.app.dismissed |= {0, 1}
        assert await idle.rest() == b""
        assert running.http.connections_count == 2
        running.app.release.set()
        assert (await waiting.answer()).status == 200
        assert await waiting.rest() == b""
        staying.send(get("/echo"))
        assert (await staying.answer()).status == 200
        for peer in (idle, waiting, staying):
            await peer.close()
