"""Every request is counted once, with a time that is never less than what its answer took."""

import asyncio

import pytest

from minikms_daemon.server.metrics import SECONDS, VerbTimes, WeightedHistogram


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def times(clock: Clock) -> VerbTimes:
    return VerbTimes(["encrypt", "create_dek"], clock)


def upper_bounds(histogram: WeightedHistogram) -> list[float]:
    """Of the bucket of each value, in ascending order."""
    bounds = [*histogram.bounds, float("inf")]
    return [bound for bound, count in zip(bounds, histogram.counts, strict=True) for _ in range(count)]


def test_answers_of_a_turn_count_from_its_first_request_to_its_end(times: VerbTimes, clock: Clock) -> None:
    times.asked("encrypt")
    clock.now += 0.003
    times.asked("encrypt")
    clock.now += 0.001
    times.end_turn()
    clock.now += 50  # nothing is asked meanwhile
    times.asked("encrypt")
    clock.now += 0.0002
    times.end_turn()
    assert times.requests == {"encrypt": 3, "create_dek": 0}
    assert upper_bounds(times.seconds["encrypt"]) == [0.00025, 0.005, 0.005]
    assert times.seconds["encrypt"].sum == pytest.approx(0.004 * 2 + 0.0002)


@pytest.mark.parametrize("fails", [False, True])
def test_an_answer_of_a_later_turn_has_its_own_time(times: VerbTimes, clock: Clock, fails: bool) -> None:
    """It takes none from the other answers."""

    async def made() -> bytes:
        clock.now += 0.3
        if fails:
            raise ZeroDivisionError
        return b"key"

    times.asked("encrypt")
    times.asked("create_dek")
    answer = times.later(made())
    assert times.requests["create_dek"] == 1
    clock.now += 0.002
    times.end_turn()
    assert upper_bounds(times.seconds["encrypt"]) == [0.0025]
    assert upper_bounds(times.seconds["create_dek"]) == []

    async def awaited() -> bytes:
        return await answer

    if fails:
        with pytest.raises(ZeroDivisionError):
            asyncio.run(awaited())
    else:
        assert asyncio.run(awaited()) == b"key"
    assert upper_bounds(times.seconds["create_dek"]) == [0.5]
    times.end_turn()
    assert times.requests == {"encrypt": 1, "create_dek": 1}


def test_a_value_belongs_to_the_first_bucket_that_is_no_less() -> None:
    histogram = WeightedHistogram(SECONDS)
    for value in (0.0, 0.0001, 0.00011, 10.0, 10.1):
        histogram.add(value)
    assert upper_bounds(histogram) == [0.0001, 0.0001, 0.00025, 10.0, float("inf")]
