"""A job reaches its rate beside other work, and never passes it by more than a moment's worth."""

import asyncio

import pytest

from progressdb_server.jobs.runner import BEHIND_S_MAX, Throttle

RATE = 1000.0


class Time:
    """A clock that only sleeping moves on, and the work between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def worked(time: Time, seconds_each: list[float], cost: float = 10) -> float:
    """How long chunks of that cost take in all, each with so much work after it."""

    async def run() -> None:
        paced = Throttle(RATE, time)
        for seconds in seconds_each:
            await paced.take(cost)
            time.now += seconds
        await paced.take(0)

    began = time.now
    asyncio.run(run())
    return time.now - began


def test_chunks_that_take_less_than_their_share_go_at_the_rate(time: Time) -> None:
    assert worked(time, [0.004] * 100) == pytest.approx(1.0 - BEHIND_S_MAX)  # the first of them owes nothing yet


def test_a_chunk_that_took_long_is_made_up_for(time: Time) -> None:
    assert worked(time, ([0.004] * 9 + [0.05]) * 10) == pytest.approx(1.0 - BEHIND_S_MAX, abs=0.05)


def test_of_an_idle_time_no_more_than_a_moment_is_made_up_for(time: Time) -> None:
    assert worked(time, [5.0] + [0.0] * 100) == pytest.approx(5.0 + 1.0 - BEHIND_S_MAX, abs=0.02)


def test_work_that_takes_longer_than_the_rate_allows_never_waits(time: Time) -> None:
    assert worked(time, [0.02] * 50) == pytest.approx(1.0)


def test_without_a_rate_others_get_their_turn_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(Throttle(0).take(1000))
    assert slept == [0]
