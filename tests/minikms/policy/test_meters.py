"""Limits that need no disk, the accounts of principals, and what is charged to whom."""

import asyncio
import gc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.errors import LimitExceededError, StorageUnavailableError, TooManyError
from minikms.policy import meters
from minikms.policy.meters import Charge
from minikms.policy.policy import Policy
from minikms.policy.rules import parse_policy
from tests.minikms.policy.metering import HOUR_MS, Machine


def rules(limits: str = "", total: str = "", proxy: str = "") -> str:
    return f"""
version = 1
[[grant]]
name = "chat"
principals = ["uid:1", "uid:2", "spiffe://prod/*"]
roles = ["decrypt"]
threads = ["*"]
limits = {{ {limits} }}
limits_total = {{ {total} }}
[[proxy]]
name = "gateway"
principals = ["uid:992"]
on_behalf_of = ["spiffe://prod/*"]
limits_total = {{ {proxy} }}
"""


def passing(machine: Machine, name: str, times: int, decrypts: int = 0) -> int:
    """How many of `times` requests pass, each in a turn of its own."""
    passed = 0
    for _ in range(times):
        (found,) = machine.charge((name, decrypts))
        passed += isinstance(found, Charge)
        machine.meters.end_turn()
    return passed


def test_without_limits_nothing_is_counted() -> None:
    machine = Machine(rules())
    assert passing(machine, "uid:1", 50, 1000) == 50
    unlimited = Policy([1]).principal(1, 1)
    assert unlimited is not None
    machine.meters.charge(unlimited.scope, {}, machine.meters.enter(unlimited.scope, ()))


def test_requests_per_second_allow_a_burst_of_one_second() -> None:
    machine = Machine(rules("requests_per_second = 5"))
    assert passing(machine, "uid:1", 20) == 5
    assert passing(machine, "uid:2", 20) == 5
    machine.now_ms += 400
    assert passing(machine, "uid:1", 20) == 2
    machine.now_ms += 60_000
    assert passing(machine, "uid:1", 20) == 5
    error = machine.refused("uid:1", 0)
    assert (error.limit, error.retry_after_s, error.code) == ("requests_per_second", 1, "limit_exceeded")
    machine.now_ms += 1000
    machine.passes("uid:1", 0)


def test_one_request_a_second_is_one() -> None:
    machine = Machine(rules("requests_per_second = 1"))
    for _ in range(3):
        assert passing(machine, "uid:1", 3) == 1
        machine.now_ms += 1000


def test_requests_that_are_under_way_are_bounded_until_they_end() -> None:
    machine = Machine(rules("concurrent = 2", total="concurrent = 3"))
    one, two, three, four, five = machine.charge(("uid:1", 0), ("uid:1", 0), ("uid:1", 0), ("uid:2", 0), ("uid:2", 0))
    assert isinstance(one, Charge) and isinstance(two, Charge) and isinstance(four, Charge)
    assert isinstance(three, LimitExceededError) and not three.of_all
    assert isinstance(five, LimitExceededError) and five.of_all
    one.release()
    one.release()
    assert isinstance(machine.charge(("uid:2", 0))[0], Charge)
    machine.refused("uid:1", 0)
    machine.meters.end_turn()
    machine.passes("uid:1", 0)


SECOND_GRANT_ADMITS = """
version = 1
[[grant]]
principals = ["uid:1"]
roles = ["decrypt"]
threads = ["*"]
limits = { requests_per_second = 1 }
[[grant]]
principals = ["uid:1", "uid:2"]
roles = ["decrypt"]
threads = ["*"]
limits_total = { concurrent = 1 }
"""


def test_how_long_a_request_counts_depends_on_the_end_of_no_object() -> None:
    """Nor does a refusal by the first grant leave anything to the collector of cycles, which runs rarely."""
    machine = Machine(SECOND_GRANT_ADMITS)

    def enter(name: str) -> Charge:
        scope = machine.scope(name)
        return machine.meters.enter(scope, scope.grants_of(["decrypt"]))

    enter("uid:1")
    machine.meters.end_turn()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            enter("uid:1")
            with pytest.raises(LimitExceededError, match="concurrent of this grant"):
                enter("uid:2")
            machine.meters.end_turn()
            assert gc.collect() == 0
    finally:
        gc.enable()


def test_the_proxy_is_charged_for_all_whom_it_names() -> None:
    machine = Machine(rules(proxy="requests_per_second = 3"))
    assert sum(passing(machine, f"spiffe://prod/{name}", 1) for name in "abcdef") == 3
    error = machine.refused("spiffe://prod/a", 0)
    assert (error.holder, error.of_all) == ("proxy 1 (gateway)", True)
    assert passing(machine, "uid:1", 10) == 10
    machine = Machine(rules(proxy="reencrypts_per_hour = 5"))
    machine.begin("spiffe://prod/a", 0, 3)
    with pytest.raises(LimitExceededError):
        machine.begin("spiffe://prod/b", 0, 3)


def test_a_batch_that_never_has_room_is_not_asked_to_wait() -> None:
    """A rotation job that waits for such room would wait for ever."""
    machine = Machine(rules("decrypts_per_hour = 10"))
    for used in (0, 10):
        assert passing(machine, "uid:1", 1, used) == 1
        (found,) = machine.charge(("uid:1", 11))
        assert isinstance(found, TooManyError)
        assert "more items than decrypts_per_hour allows" in str(found)
    machine.refused("uid:1", 1)


def test_reencryptions_have_a_limit_of_their_own() -> None:
    machine = Machine(rules("decrypts_per_hour = 1, reencrypts_per_hour = 100"))
    machine.begin("uid:1", 0, 60)
    machine.begin("uid:1", 0, 40)
    with pytest.raises(LimitExceededError) as refused:
        machine.begin("uid:1", 0, 1)
    assert refused.value.limit == "reencrypts_per_hour"
    machine.passes("uid:1", 1)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of accounts that is soon full."""
    monkeypatch.setattr(meters, "PRINCIPALS_COUNT_MAX", 3)


@pytest.mark.usefixtures("few")
def test_names_beyond_the_table_share_one_budget() -> None:
    machine = Machine(rules("decrypts_per_hour = 100"))
    for number in range(3):
        machine.passes(f"spiffe://prod/n{number}", 100)
    machine.passes("spiffe://prod/n3", 60)
    machine.passes("spiffe://prod/n4", 40)
    machine.refused("spiffe://prod/n5")
    machine.passes("uid:1", 100)  # the file spells it out
    machine.refused("spiffe://prod/n0")


@pytest.mark.usefixtures("few")
def test_use_of_the_shared_budget_counts_when_the_table_has_room_again() -> None:
    """Otherwise a principal had the shared budget and one of its own in one hour."""
    machine = Machine(rules("decrypts_per_hour = 100"))
    for number in range(3):
        machine.passes(f"spiffe://prod/n{number}", 1)
    machine.now_ms += HOUR_MS // 2
    machine.passes("spiffe://prod/late", 100)
    machine.now_ms += HOUR_MS // 2
    machine.refused("spiffe://prod/late", 51)
    machine.now_ms += HOUR_MS // 2
    machine.passes("spiffe://prod/late", 100)


@pytest.mark.usefixtures("few")
def test_a_search_for_idle_accounts_forgets_none_that_is_charged() -> None:
    """The total is new after the reload, and the table is full of idle accounts, that of the caller among them."""
    machine = Machine(rules("requests_per_second = 1"))
    for number in range(3):
        machine.passes(f"spiffe://prod/n{number}", 0)
    machine.now_ms += HOUR_MS
    machine.policy.replace(Machine(rules("requests_per_second = 1", total="concurrent = 9")).policy.rules)
    machine.passes("spiffe://prod/n0", 0)
    machine.refused("spiffe://prod/n0", 0)


@pytest.mark.usefixtures("few")
def test_an_account_whose_last_second_has_just_ended_makes_room() -> None:
    machine = Machine(rules("requests_per_second = 1"))
    machine.now_ms += meters.SWEEP_NS // 1_000_000 - 1000
    for number in range(3):
        machine.passes(f"spiffe://prod/n{number}", 0)
    machine.now_ms += 1000
    for number in range(3, 6):
        machine.passes(f"spiffe://prod/n{number}", 0)


@pytest.mark.usefixtures("few")
def test_the_shared_budget_survives_a_restart() -> None:
    machine = Machine(rules("decrypts_per_hour = 100"))
    for number in range(4):
        machine.passes(f"spiffe://prod/n{number}", 100)
    machine.restart()
    for number in range(5):
        machine.refused(f"spiffe://prod/n{number}")


def test_a_reload_keeps_what_was_used() -> None:
    machine = Machine(rules("decrypts_per_hour = 100"))
    machine.passes("uid:1", 100)
    before = machine.grant("uid:1")
    machine.policy.replace(Machine(rules("decrypts_per_hour = 150")).policy.rules)
    assert machine.grant("uid:1") is not before
    machine.refused("uid:1", 1)
    machine.now_ms += HOUR_MS // 3
    machine.refused("uid:1", 51)
    machine.passes("uid:1", 50)


def test_the_number_of_exhausted_limits_falls_when_they_have_filled() -> None:
    machine = Machine(rules("decrypts_per_hour = 10", total="decrypts_per_hour = 1000"))
    machine.passes("uid:1", 9)
    assert machine.meters.exhausted == 0, "nobody was refused"
    machine.refused("uid:1", 5)
    machine.passes("uid:1")
    assert machine.meters.exhausted == 1, "it has room for one, and would refuse five again"
    machine.now_ms += HOUR_MS // 2 - 1
    assert machine.meters.exhausted == 1
    machine.now_ms += 1
    assert machine.meters.exhausted == 0


def test_a_limit_is_scarce_while_less_than_a_tenth_of_it_is_left() -> None:
    machine = Machine(rules("decrypts_per_hour = 100", total="decrypts_per_hour = 1000"))
    machine.passes("uid:1", 90)
    assert machine.meters.scarce == 0
    machine.passes("uid:1")
    assert machine.meters.scarce == 1
    machine.refused("uid:1", 10)
    assert (machine.meters.scarce, machine.meters.exhausted) == (0, 1)
    machine.now_ms += HOUR_MS // 100
    assert machine.meters.scarce == 0


def test_a_limit_that_was_raised_is_no_longer_exhausted() -> None:
    machine = Machine(rules("decrypts_per_hour = 10", total="decrypts_per_hour = 1000"))
    machine.passes("uid:1", 10)
    machine.refused("uid:1")
    assert machine.meters.exhausted == 1
    machine.policy.replace(parse_policy(rules("decrypts_per_hour = 20", total="decrypts_per_hour = 1000").encode()))
    machine.meters.forget_refusals()
    assert machine.meters.exhausted == 0, "nobody was refused since"
    machine.refused("uid:1")
    assert machine.meters.exhausted == 1


# --- hourly limits ----------------------------------------------------------------------------------------------------


def test_an_hourly_limit_fills_at_its_rate_and_holds_an_hour() -> None:
    machine = Machine(rules("decrypts_per_hour = 60"))
    machine.passes("uid:1", 60)
    error = machine.refused("uid:1", 3)
    assert (error.limit, error.retry_after_s) == ("decrypts_per_hour", 180)
    machine.now_ms += 179_999
    machine.refused("uid:1", 3)
    machine.now_ms += 1
    machine.passes("uid:1", 3)
    machine.now_ms += 100 * HOUR_MS
    machine.passes("uid:1", 60)
    machine.refused("uid:1")


def test_a_new_bucket_is_full_and_a_stop_keeps_every_one() -> None:
    """While the service is stopped, nothing fills."""
    machine = Machine(rules("decrypts_per_hour = 60"))
    machine.passes("uid:1", 50)
    machine.restart(after_ms=9 * HOUR_MS)
    machine.refused("uid:1", 11)
    machine.passes("uid:1", 10)
    for name in ("uid:2", "spiffe://prod/never-seen"):
        machine.passes(name, 60)
    machine.restart()
    for name in ("uid:1", "uid:2", "spiffe://prod/never-seen"):
        machine.refused(name)


def left(machine: Machine, name: str) -> int:
    """How much of a limit of 120 is left."""
    return next(uses for uses in range(120, -1, -1) if isinstance(machine.charge((name, uses))[0], Charge))


@given(st.integers(0, 120), st.integers(0, 60), st.booleans())
def test_a_crash_costs_a_tenth_and_gives_nothing_back(used: int, minutes: int, refreshed: bool) -> None:
    """And what has filled in the minute since the file was written last."""
    machine = Machine(rules("decrypts_per_hour = 120"))
    for part in (used // 3, used // 3, used - 2 * (used // 3)):
        machine.passes("uid:1", part)
    for _ in range(minutes):
        machine.now_ms += HOUR_MS // 60
        if refreshed:
            machine.refresh()
    held = min(120, 120 - used + 2 * minutes)
    machine.crash()
    found = left(machine, "uid:1")
    assert found <= held
    if refreshed:
        assert found >= held - 12 - 2
    machine.crash()
    assert left(machine, "uid:1") == 0, "what was used before a crash is used"
    assert left(machine, "uid:2") >= 96


def test_each_tenth_of_a_limit_is_one_write() -> None:
    machine = Machine(rules("decrypts_per_hour = 1000"))
    for _ in range(1000):
        machine.passes("uid:1")
    assert machine.writes == 10
    machine.refused("uid:1")
    assert machine.writes == 10


@pytest.mark.parametrize("landed", [False, True])
async def test_nothing_is_used_before_its_reservation_is_durable(landed: bool) -> None:
    """Requests that come while the file is written wait for the same write, and for an error too. It may have reached
    the disk all the same.
    """
    machine = Machine(rules("decrypts_per_hour = 100"))

    writing, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(content: bytes) -> None:
        writing.set()
        await go_on.wait()
        if landed:
            machine.file = content
        raise StorageUnavailableError("full")

    machine.keep = slowly
    scope, costs = machine.scope("uid:1"), machine.costs("uid:1", 1)
    waiting = []
    for _ in range(3):
        taken = machine.meters.charge(scope, costs, machine.meters.enter(scope, costs))
        waiting.append(asyncio.create_task(machine.meters.reserve(taken)))
        await writing.wait()
    assert not any(task.done() for task in waiting)
    go_on.set()
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(error, StorageUnavailableError) for error in errors)
    assert len(set(map(id, errors))) == 3
    taken = machine.meters.charge(scope, costs, machine.meters.enter(scope, costs))
    with pytest.raises(StorageUnavailableError):
        await machine.meters.reserve(taken)


@pytest.mark.parametrize(
    "saved",
    [
        b"",
        b"{",
        b'{"version":2,"others_ns":0,"buckets":[]}',
        b'{"version":1,"others_ns":3600000000001,"buckets":[]}',
        b'{"version":1,"others_ns":3600000000000,"buckets":[["grant:chat","uid:1","decrypts",-1]]}',
        b'{"version":1,"others_ns":3600000000000,"buckets":[["grant:chat","uid:1","other",0]]}',
    ],
)
def test_after_a_damaged_file_every_bucket_is_empty(saved: bytes) -> None:
    machine = Machine(rules("decrypts_per_hour = 60"))
    machine.file = saved
    machine.crash()
    machine.refused("uid:1")


@pytest.mark.parametrize("end", [Machine.crash, Machine.restart])
def test_a_file_that_is_too_long_gives_nothing(monkeypatch: pytest.MonkeyPatch, end: Callable[[Machine], None]) -> None:
    """A file of the greatest length gives what it says."""

    def ended() -> Machine:
        machine = Machine(rules("decrypts_per_hour = 60"))
        machine.passes("uid:1", 30)
        machine.passes("uid:2", 30)
        end(machine)
        return machine

    file = ended().file
    assert file is not None
    monkeypatch.setattr(meters, "SAVED_BYTES_MAX", len(file))
    ended().passes("uid:1")
    monkeypatch.setattr(meters, "SAVED_BYTES_MAX", len(file) - 1)
    ended().refused("uid:1")


NAMES = ("uid:1", "uid:2", "spiffe://prod/a", "spiffe://prod/b")
STEPS = st.one_of(
    st.tuples(st.just("use"), st.sampled_from(NAMES), st.integers(1, 60)),
    st.tuples(st.sampled_from(["wait", "stop"]), st.just(""), st.integers(0, 2 * HOUR_MS)),
    st.tuples(st.sampled_from(["crash", "refresh"]), st.just(""), st.just(0)),
)


@given(st.lists(STEPS, max_size=60))
def test_no_60_minutes_see_more_than_two_hours_worth(steps: list[tuple[str, str, int]]) -> None:
    """Whatever is asked, stopped and killed: of one principal, of a grant in all, and of a proxy."""
    limits = {"each": 60, "all": 150, "proxy": 90}
    machine = Machine(rules("decrypts_per_hour = 60", "decrypts_per_hour = 150", "decrypts_per_hour = 90"))
    used: list[tuple[int, str, int]] = []
    for kind, name, number in steps:
        if kind == "use":
            if isinstance(machine.charge((name, number))[0], Charge):
                used.append((machine.now_ms, name, number))
            machine.meters.end_turn()
        elif kind == "wait":
            machine.now_ms += number
        elif kind == "stop":
            machine.restart(after_ms=number)
        elif kind == "refresh":
            machine.refresh()
        else:
            machine.crash()
        hour = [(who, uses) for at_ms, who, uses in used if at_ms > machine.now_ms - HOUR_MS]
        sums = {"each": max((sum(uses for who, uses in hour if who == name) for name in NAMES), default=0)}
        sums |= {"all": sum(uses for _, uses in hour)}
        sums |= {"proxy": sum(uses for who, uses in hour if who.startswith("spiffe:"))}
        assert all(sums[which] <= 2 * limits[which] for which in limits), (sums, steps)
