"""A probe asks once for however many callers, and none of them waits long."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from minikms import api
from minikms.api.errors import KmsUnavailableError, refusal
from progressdb_server.api.routes import readiness
from progressdb_server.api.routes.readiness import FAULT_AGE_S, PROBE_AGE_S, Probe, Readiness
from progressdb_server.metrics import KmsMetrics
from progressdb_server.store.model import StoreUnavailableError
from tests.harness.logged import capture_logs


class Question:
    """Answers what a test sets, when it may; counts how often it was asked."""

    def __init__(self) -> None:
        self.answer = ""
        self.asked = 0
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self) -> str:
        self.asked += 1
        await self.open.wait()
        return self.answer


class Time:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@asynccontextmanager
async def probed() -> AsyncIterator[tuple[Question, Probe, Time]]:
    question, clock = Question(), Time()
    probe = Probe("store", question, "it is silent", clock=clock)
    yield question, probe, clock
    await probe.close()


async def test_the_log_has_each_change_of_an_answer_and_no_single_probe() -> None:
    async with probed() as (question, probe, clock):
        with capture_logs() as lines:
            for answer in ("", "full", "full", "broken", "", ""):
                question.answer = answer
                await probe.problem()
                clock.now_s += PROBE_AGE_S + 1
        assert [(line["event"], line["part"], line["reason"]) for line in lines] == [
            ("not_ready", "store", "full"),
            ("ready_again", "store", None),
        ]


async def test_however_many_ask_the_question_is_asked_once() -> None:
    async with probed() as (question, probe, clock):
        assert await asyncio.gather(*(probe.problem() for _ in range(100))) == [""] * 100
        clock.now_s += PROBE_AGE_S - 0.1
        assert await probe.problem() == ""
        assert question.asked == 1
        clock.now_s += 0.2
        question.answer = "broken"
        assert await asyncio.gather(*(probe.problem() for _ in range(100))) == ["broken"] * 100
        assert question.asked == 2


async def test_a_problem_is_asked_about_again_sooner() -> None:
    async with probed() as (question, probe, clock):
        question.answer = "broken"
        assert await probe.problem() == "broken"
        question.answer = ""
        assert await probe.problem() == "broken"
        clock.now_s += FAULT_AGE_S + 0.1
        assert await probe.problem() == ""


async def test_a_question_without_an_answer_is_a_problem_and_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "PROBE_S_MAX", 0.5)
    monkeypatch.setattr(readiness, "KNOWN_S_MAX", 0.3)
    async with probed() as (question, probe, clock):
        question.open.clear()
        for _ in range(3):
            assert await probe.problem() == "it is silent"
            clock.now_s += 60
        assert question.asked == 1
        question.open.set()
        assert await probe.problem() == ""


async def test_an_old_problem_is_not_given_as_the_answer_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes after `it is sealed`, with the key service unsealed and then hanging, that is not what is wrong."""
    monkeypatch.setattr(readiness, "PROBE_S_MAX", 0.5)
    monkeypatch.setattr(readiness, "KNOWN_S_MAX", 0.3)
    async with probed() as (question, probe, clock):
        question.answer = "it is sealed"
        assert await probe.problem() == "it is sealed"
        question.open.clear()
        clock.now_s += FAULT_AGE_S + 0.1
        assert await probe.problem() == "it is sealed", "it was said a moment ago"
        clock.now_s += 600
        assert await probe.problem() == "it is silent"
        assert await probe.problem() == "it is silent"
        question.open.set()


async def test_a_defect_in_a_probe_is_a_problem() -> None:
    async def broken() -> str:
        raise ValueError("private")

    assert await Probe("store", broken, "silent").problem() == "internal error"


class Parts:
    """A store and a key service that answer what a test sets."""

    def __init__(self) -> None:
        self.writes: Exception | None = None
        self.key_service: Exception | None = None
        self.reported = api.StatusAnswer(status="ok")

    async def check_writes(self) -> None:
        if self.writes is not None:
            raise self.writes

    async def status(self) -> api.StatusAnswer:
        if self.key_service is not None:
            raise self.key_service
        return self.reported


def problems(parts: Parts) -> tuple[str, str]:
    store: Any = parts
    return asyncio.run(Readiness(store, parts.status, KmsMetrics()).problems())


def test_what_is_wrong_is_named_apart_for_writes_and_the_key_service() -> None:
    parts = Parts()
    assert problems(parts) == ("", "")
    parts.writes = StoreUnavailableError("the disk is full")
    assert problems(parts) == ("the disk is full", "")
    parts.key_service = KmsUnavailableError("nobody answers")
    assert problems(parts) == ("the disk is full", "nobody answers")


def test_a_key_service_that_refuses_only_its_status_works() -> None:
    """Without the role `monitor` it is not asked for more; one that can't write its audit log does not work."""
    parts = Parts()
    parts.key_service = refusal("forbidden", "no role")
    assert problems(parts) == ("", "")
    parts.key_service = refusal("limit_exceeded", "the limit requests_per_second is used up")
    assert problems(parts) == ("", "")
    parts.key_service = refusal("audit_unavailable", "the audit log can't be written")
    assert problems(parts)[1].startswith("the audit log can't be written")
    parts.key_service = None
    parts.reported = api.StatusAnswer(status="audit_unavailable")
    assert problems(parts) == ("", "it reports audit_unavailable")
