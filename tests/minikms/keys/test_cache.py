"""The cache of opened keys: it is bounded, and every value that leaves it was released."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minikms.keys.cache import KeyCache


class Opened:
    """Stands for an opened key and counts its releases."""

    def __init__(self) -> None:
        self.releases = 0

    def release(self) -> None:
        self.releases += 1


def filled(count: int, *, count_max: int = 4, age_ns_max: int = 100) -> tuple[KeyCache[Opened], list[Opened]]:
    cache: KeyCache[Opened] = KeyCache(count_max=count_max, age_ns_max=age_ns_max)
    values = [Opened() for _ in range(count)]
    for number, value in enumerate(values):
        cache.put(f"key{number}", value, number)
    return cache, values


def released(values: list[Opened]) -> list[int]:
    return [number for number, value in enumerate(values) if value.releases]


def test_a_full_cache_releases_one_value_for_a_new_one() -> None:
    cache, values = filled(5)
    assert len(cache) == 4
    assert released(values) == [0]
    assert cache.get("key0") is None
    assert cache.evictions == 1


def test_a_value_that_was_used_gets_a_second_chance() -> None:
    cache, values = filled(4)
    assert cache.get("key0") is values[0]
    cache.put("new", Opened(), 4)
    assert released(values) == [1]


def test_if_all_values_were_used_one_is_still_evicted() -> None:
    cache, values = filled(4)
    for number in range(4):
        cache.get(f"key{number}")
    cache.put("new", Opened(), 4)
    assert released(values) == [0]
    assert len(cache) == 4


def test_a_second_chance_is_not_a_third() -> None:
    cache, values = filled(4)
    cache.get("key0")
    for number in range(4):
        cache.put(f"new{number}", Opened(), 4)
    assert released(values) == [0, 1, 2, 3]


def test_age_counts_from_opening_however_often_a_key_is_used() -> None:
    cache, values = filled(3)
    cache.get("key0")
    assert cache.expire(99) == 0
    cache.get("key0")
    assert cache.expire(101) == 2
    assert released(values) == [0, 1]
    assert cache.evictions == 2


def test_a_replaced_value_is_released_and_starts_young() -> None:
    cache, values = filled(1)
    fresh = Opened()
    cache.put("key0", fresh, 90)
    assert released(values) == [0]
    assert cache.expire(150) == 0
    assert cache.get("key0") is fresh
    assert cache.evictions == 0


def test_drop_releases_once_and_tells_whether_there_was_one() -> None:
    cache, values = filled(2)
    assert cache.drop("key1") is True
    assert cache.drop("key1") is False
    assert values[1].releases == 1
    assert cache.evictions == 0


def test_clear_releases_everything() -> None:
    cache, values = filled(4)
    cache.clear()
    assert released(values) == [0, 1, 2, 3]
    assert len(cache) == 0


def test_hits_and_misses_are_counted() -> None:
    cache, _ = filled(1)
    cache.get("key0")
    cache.get("key0")
    cache.get("absent")
    assert (cache.hits, cache.misses) == (2, 1)


@pytest.mark.parametrize(("count_max", "age_ns_max"), [(0, 1), (1, 0), (-1, 1)])
def test_a_cache_without_bounds_is_refused(count_max: int, age_ns_max: int) -> None:
    with pytest.raises(ValueError, match="cache"):
        KeyCache(count_max=count_max, age_ns_max=age_ns_max)


COUNT_MAX = 5
AGE_NS_MAX = 50
key_ids = st.sampled_from([f"key{number}" for number in range(9)])


class CacheAgainstModel(RuleBasedStateMachine):
    """Any sequence of moves: within the bounds, each value released exactly once when it leaves and not before."""

    @initialize()
    def begin(self) -> None:
        self.cache: KeyCache[Opened] = KeyCache(count_max=COUNT_MAX, age_ns_max=AGE_NS_MAX)
        self.now = 0
        self.given: dict[str, tuple[Opened, int]] = {}
        self.all: list[Opened] = []

    @rule(key_id=key_ids, passed=st.integers(0, 20))
    def put(self, key_id: str, passed: int) -> None:
        self.now += passed
        value = Opened()
        self.all.append(value)
        self.cache.put(key_id, value, self.now)
        self.given[key_id] = (value, self.now)
        assert self.cache.get(key_id) is value

    @rule(key_id=key_ids)
    def get(self, key_id: str) -> None:
        found = self.cache.get(key_id)
        if found is not None:
            assert found is self.given[key_id][0]

    @rule(key_id=key_ids)
    def drop(self, key_id: str) -> None:
        self.cache.drop(key_id)
        assert self.cache.get(key_id) is None

    @rule(passed=st.integers(0, 60))
    def expire(self, passed: int) -> None:
        self.now += passed
        self.cache.expire(self.now)
        for key_id, (value, put) in self.given.items():
            if self.now - put >= AGE_NS_MAX:
                assert value.releases == 1
                assert self.cache.get(key_id) is None

    @precondition(lambda self: len(self.all) > 3)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert all(value.releases == 1 for value in self.all)

    @invariant()
    def what_left_was_released_once_and_what_stays_was_not(self) -> None:
        if not hasattr(self, "cache"):
            return
        held = [value for key_id, (value, _) in self.given.items() if self.cache.get(key_id) is value]
        assert len(held) == len(self.cache) <= COUNT_MAX
        assert all(value.releases == (0 if any(value is one for one in held) else 1) for value in self.all)


TestCacheAgainstModel = CacheAgainstModel.TestCase
TestCacheAgainstModel.settings = settings(max_examples=60, stateful_step_count=40)
