"""Token buckets, with the clock in the test's hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_server.api.gate.rates import RateBuckets, TokenBucket

STEPS = st.lists(st.floats(min_value=0, max_value=5), max_size=60)
RATES = st.floats(min_value=0.1, max_value=50)
BURSTS = st.integers(min_value=1, max_value=20)


@given(STEPS, RATES, BURSTS)
def test_no_bucket_ever_gives_more_than_its_burst_and_its_rate(steps: list[float], rps: float, burst: int) -> None:
    bucket = TokenBucket(rps, burst)
    now_s, taken = 100.0, 0
    for step in steps:
        now_s += step
        taken += bucket.take(now_s) == 0
    assert taken <= burst + (now_s - 100.0) * rps + 1e-6


@given(STEPS, RATES, BURSTS)
def test_the_wait_that_a_bucket_names_is_enough(steps: list[float], rps: float, burst: int) -> None:
    bucket = TokenBucket(rps, burst)
    now_s = 100.0
    for step in steps:
        now_s += step
        wait_s = bucket.take(now_s)
        if wait_s:
            now_s += wait_s * (1 + 1e-9) + 1e-9
            assert bucket.take(now_s) == 0


@given(STEPS, RATES, BURSTS)
def test_to_ask_for_the_wait_takes_nothing_and_tells_the_truth(steps: list[float], rps: float, burst: int) -> None:
    buckets = RateBuckets(rps, burst, count_max=1)
    now_s = 100.0
    for number, step in enumerate(steps):
        now_s += step
        caller = number % 2  # the second one finds the table full
        wait_s = buckets.wait_s(caller, now_s)
        assert buckets.wait_s(caller, now_s) == wait_s
        assert buckets.take(caller, now_s) == pytest.approx(wait_s)


def test_a_caller_whose_bucket_has_made_room_charges_nobody_else() -> None:
    buckets = RateBuckets(10, 20, count_max=2)
    for caller, now_s in (("sender", 0.0), ("x", 5.0), ("y", 5.0)):
        assert buckets.take(caller, now_s) == 0
    buckets.charge("sender", 1024)
    assert buckets.take("z", 5.0) == 0


def test_a_clock_that_stands_still_or_goes_back_gives_no_tokens() -> None:
    bucket = TokenBucket(rps=10, burst=2)
    assert [bucket.take(now_s) == 0 for now_s in (50.0, 50.0, 50.0, 10.0, 49.0)] == [True, True, False, False, False]


def test_a_full_table_forgets_only_buckets_that_have_filled_up() -> None:
    buckets = RateBuckets(rps=1, burst=1, count_max=3)
    for caller in ("a", "b", "c"):
        assert buckets.take(caller, 1.0) == 0
    assert buckets.take("d", 1.0) == 0  # from the bucket that all others share
    assert buckets.take("e", 1.0) > 0
    assert buckets.take("a", 1.0) > 0
    assert len(buckets) == 3
    assert buckets.take("e", 2.5) == 0  # that of b has filled up and makes room
    assert buckets.take("e", 2.5) > 0
    assert len(buckets) == 3


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 2)), max_size=80))
def test_no_caller_gets_more_by_making_others_forgotten(steps: list[tuple[int, float]]) -> None:
    buckets = RateBuckets(rps=1, burst=2, count_max=3)
    now_s, taken = 0.0, dict.fromkeys(range(10), 0)
    for caller, step in steps:
        now_s += step
        taken[caller] += buckets.take(caller, now_s) == 0
    assert len(buckets) <= 3
    # A caller can have taken from the shared bucket too.
    assert all(count <= 2 * (2 + now_s) + 1e-6 for count in taken.values())
