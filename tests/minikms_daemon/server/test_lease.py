"""The lease of the root key: until when it holds, and that nothing leaves after its end."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.http import HttpRequest, Response
from minikms.roots.providers import KeyFile
from minikms_daemon.seal.unlocking import Unlocking
from minikms_daemon.server import lease as leases
from minikms_daemon.server.lease import SECOND_NS, Lease, LeasedApplication
from minikms_daemon.server.run_context import RunContext
from tests.minikms.http.http_harness import EchoApp, Session, get, serving

instants = st.integers(0, 10**6)


def test_a_lease_is_over_until_the_first_grant() -> None:
    lease = Lease(30)
    assert lease.left_ns(0) == 0 and lease.is_due(0)


def test_a_lease_counts_from_before_the_question() -> None:
    lease = Lease(30)
    lease.grant(5 * SECOND_NS)
    assert lease.left_ns(34 * SECOND_NS) == SECOND_NS and lease.left_ns(35 * SECOND_NS) == 0
    assert not lease.is_due(20 * SECOND_NS - 1) and lease.is_due(20 * SECOND_NS)


@given(st.lists(instants, min_size=1), instants)
def test_the_newest_question_counts_in_whatever_order_answers_come(asked: list[int], now: int) -> None:
    lease = Lease(30)
    for instant in asked:
        lease.grant(instant * SECOND_NS)
    assert lease.left_ns(now * SECOND_NS) == max(0, max(asked) + 30 - now) * SECOND_NS


def test_without_a_lease_nothing_is_in_the_way_of_a_request() -> None:
    process = SimpleNamespace(
        settings=SimpleNamespace(root=KeyFile(Path("key")), flags=SimpleNamespace(root_lease=None))
    )
    unused = cast(Any, None)
    unlocking = Unlocking(cast(RunContext, process), unseal=unused, lapse=unused, body=unused)
    app = cast(Any, EchoApp())
    assert unlocking.leased(app) is app and unlocking.status() is None


@pytest.mark.uvloop
@pytest.mark.parametrize("ends", ["before", "in the request", "in the write of its line"])
async def test_no_answer_leaves_after_the_end(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor that of a request that was begun earlier and waits."""
    lease, clock = Lease(30), [0]
    lease.grant(0)
    monkeypatch.setattr(leases, "boot_ns", lambda: clock[0])
    instead = Response(503, b'{"code":"sealed"}')

    async with serving() as running:
        app, sealed = running.app, type(running.app)()
        held, peer = await running.peer(), await running.peer()
        handle = app.handle

        def end_of_lease() -> None:
            clock[0] = 30 * SECOND_NS

        def handle_and_end(session: Session, request: HttpRequest) -> bytes | Response | Awaitable[bytes | Response]:
            if ends == "in the request" and request.path == "/echo":
                end_of_lease()
            return handle(session, request)

        def commit() -> bool:
            if app.seen[-1][1] == "/echo":
                end_of_lease()
            return True

        def ended() -> Any:
            running.http.replace_app(sealed, instead)
            return sealed

        app.handle, app.commit = handle_and_end, commit  # type: ignore[method-assign]  # where the time passes
        sealed.handle = lambda session, request: instead  # type: ignore[method-assign]  # as of a sealed daemon
        running.http.replace_app(cast(Any, LeasedApplication(cast(Any, app), lease=lease, ended=ended)), None)
        held.send(get("/hold"))
        while not app.running:
            await asyncio.sleep(0)
        if ends == "before":
            end_of_lease()
        peer.send(get("/echo"))
        for asked in (peer, held):
            answer = await asked.answer()
            assert (answer.status, answer.json["code"]) == (503, "sealed")
            await asked.close()
        assert [path for _, path, _ in app.seen] == ["/hold"] if ends == "before" else ["/hold", "/echo"]
        assert app.running == 0 and running.http.app is sealed
