"""The end of the steps of tasks in a turn of the event loop, where the daemon drops ciphers and scrubs."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvloop

from minikms import datadir
from minikms.api.errors import StartError
from minikms.memory.arena import SecretArena
from minikms.platform.logs import Log
from minikms.platform.notify import Notifier
from minikms.policy.policy import Policy
from minikms.processes.running import Run
from minikms.roots.providers import KeyFile
from minikms_daemon.seal import seal
from minikms_daemon.seal.seal import SealableServer
from minikms_daemon.serve import Daemon, end_steps_with
from minikms_daemon.server.policy_in_force import PolicyInForce
from minikms_daemon.server.run_context import RunContext, Workers
from minikms_daemon.server.settings import Settings
from tests.harness.flags import flags_of


class Steps:
    """What happens in the loop, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> list[str]:
        async def running() -> list[str]:
            end_steps_with(lambda: self.seen.append("end"))
            await main()
            return list(self.seen)  # before the loop ends with steps of its own

        return uvloop.run(running())

    async def work(self, name: str) -> None:
        self.seen.append(name)

    def task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self.seen.append("answered"))
        return task


@pytest.fixture
def steps() -> Steps:
    return Steps()


def test_the_steps_of_a_turn_end_once_and_before_an_answer_leaves(steps: Steps) -> None:
    async def main() -> None:
        await asyncio.wait([steps.task(steps.work("a")), steps.task(steps.work("b"))])

    assert steps.run(main) == ["a", "b", "end", "answered", "answered"]


def test_each_step_of_a_task_ends(steps: Steps) -> None:
    async def work() -> None:
        steps.seen.append("a")
        await asyncio.sleep(0)
        steps.seen.append("b")

    async def main() -> None:
        await asyncio.wait([steps.task(work())])

    assert steps.run(main) == ["a", "end", "b", "end", "answered"]


def test_a_step_that_fails_or_is_cancelled_ends_too(steps: Steps) -> None:
    async def fail() -> None:
        raise ValueError

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            steps.seen.append("cancelled")

    async def main() -> None:
        failing = steps.task(fail())
        await asyncio.wait([failing])
        assert isinstance(failing.exception(), ValueError)
        waiting = steps.task(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()

    assert steps.run(main) == ["end", "answered", "end", "cancelled", "end", "answered"]


@pytest.mark.parametrize("start", [asyncio.gather, asyncio.ensure_future])
def test_steps_end_whatever_makes_the_task(
    steps: Steps, start: Callable[[Coroutine[Any, Any, None]], Awaitable[Any]]
) -> None:
    async def main() -> None:
        await start(steps.work("a"))

    assert steps.run(main) == ["a", "end"]


def test_the_start_of_a_daemon_is_a_task_whose_steps_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a daemon whose root key is missing."""
    ended: list[str] = []
    monkeypatch.setattr(SealableServer, "end_steps", lambda _: ended.append("end"))
    settings = Settings(flags=flags_of(tmp_path / "d"), root=KeyFile(tmp_path / "missing"), allowed_uids=None)
    run, workers = Run(cast("Any", None), Notifier({}), Log()), Workers.start()
    with datadir.lock_data_dir(settings.flags.data_dir) as lock, SecretArena(64, force_fallback=True) as arena:
        process = RunContext(
            settings=settings,
            policy=PolicyInForce(Policy(())),
            lock=lock,
            arena=arena,
            measures=(),
            connections_max=1,
            workers=workers,
            notifier=run.notifier,
            log=run.log,
            on_internal_error=run.internal_error,
        )
        daemon = Daemon(process, cast("Any", None), run)  # the listener is used after the start
        with pytest.raises(StartError, match="missing"):
            uvloop.run(daemon.serve())
        workers.shutdown()
    assert ended


def test_the_end_of_a_turn_scrubs_after_each_use_of_a_key_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    scrubbed: list[str] = []
    monkeypatch.setattr(seal, "scrub", lambda: scrubbed.append("scrub"))
    with SecretArena(2, force_fallback=True) as arena, arena.allocate() as slot:
        parts = cast("Any", SimpleNamespace(_process=SimpleNamespace(arena=arena), _opened=None))
        SealableServer.end_steps(parts)
        assert scrubbed == []
        for _ in range(2):
            assert not any(slot.view)
            SealableServer.end_steps(parts)
            SealableServer.end_steps(parts)
    assert scrubbed == ["scrub"] * 2
