"""Limits that need no disk, the accounts of principals, and what is charged to whom."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from minikms.errors import LimitExceededError, TooManyError
from minikms.policy import Charge, Clock, Cost, Policy, budgets, meters, parse_policy
from minikms.policy.budgets import Key, Opening
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


def test_without_limits_nothing_is_counted_or_written() -> None:
    machine = Machine(rules())
    assert passing(machine, "uid:1", 50, 1000) == 50
    assert (machine.disk.writes, machine.disk.content) == (0, None)
    unlimited = Policy([1]).principal(1, 1)
    assert unlimited is not None
    assert isinstance(machine.meters.charge(unlimited.scope, {}, machine.meters.enter(unlimited.scope, ())), Charge)


def test_requests_per_second_allow_a_burst_of_one_second() -> None:
    machine = Machine(rules("requests_per_second = 5"))
    assert passing(machine, "uid:1", 20) == 5
    assert passing(machine, "uid:2", 20) == 5
    machine.real_ms += 400
    assert passing(machine, "uid:1", 20) == 2
    machine.real_ms += 60_000
    assert passing(machine, "uid:1", 20) == 5
    error = machine.refused("uid:1", 0)
    assert (error.limit, error.retry_after_s, error.code) == ("requests_per_second", 1, "limit_exceeded")
    machine.real_ms += 1000
    machine.passes("uid:1", 0)


def test_one_request_a_second_is_one() -> None:
    machine = Machine(rules("requests_per_second = 1"))
    for _ in range(3):
        assert passing(machine, "uid:1", 3) == 1
        machine.real_ms += 1000


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
    scope = machine.scope("uid:1")

    async def charge(reencrypts: int) -> str:
        try:
            costs = {machine.grant("uid:1"): Cost(0, reencrypts)}
            charged = machine.meters.charge(scope, costs, machine.meters.enter(scope, costs))
            return "passed" if isinstance(charged, Charge) or await charged else ""
        except LimitExceededError as error:
            return error.limit

    async def some() -> list[str]:
        return [await charge(60), await charge(40), await charge(1)]

    assert asyncio.run(some()) == ["passed", "passed", "reencrypts_per_hour"]
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
    machine.real_ms += HOUR_MS // 2
    machine.passes("spiffe://prod/late", 100)
    machine.real_ms += HOUR_MS // 2
    machine.refused("spiffe://prod/late")
    machine.real_ms += HOUR_MS // 2
    machine.passes("spiffe://prod/late", 100)


@pytest.mark.usefixtures("few")
def test_a_search_for_idle_accounts_forgets_none_that_is_charged() -> None:
    """The total is new after the reload, and the table is full of idle accounts, that of the caller among them."""
    machine = Machine(rules("requests_per_second = 1"))
    for number in range(3):
        machine.passes(f"spiffe://prod/n{number}", 0)
    machine.real_ms += HOUR_MS
    machine.policy.replace(Machine(rules("requests_per_second = 1", total="concurrent = 9")).policy.rules)
    machine.passes("spiffe://prod/n0", 0)
    machine.refused("spiffe://prod/n0", 0)


@pytest.mark.usefixtures("few")
def test_the_shared_budget_survives_a_restart() -> None:
    machine = Machine(rules("decrypts_per_hour = 100"))
    for number in range(4):
        machine.passes(f"spiffe://prod/n{number}", 100)
    machine.start()
    for number in range(5):
        machine.refused(f"spiffe://prod/n{number}")


def test_a_reload_keeps_what_was_used() -> None:
    machine = Machine(rules("decrypts_per_hour = 100"))
    machine.passes("uid:1", 100)
    before = machine.grant("uid:1")
    machine.policy.replace(Machine(rules("decrypts_per_hour = 150")).policy.rules)
    assert machine.grant("uid:1") is not before
    machine.refused("uid:1", 51)
    machine.passes("uid:1", 50)


def test_the_number_of_exhausted_limits_falls_when_use_leaves_the_hour() -> None:
    machine = Machine(rules("decrypts_per_hour = 10", total="decrypts_per_hour = 1000"))
    machine.passes("uid:1", 9)
    machine.refused("uid:1", 5)
    assert machine.meters.exhausted == 0, "it has room for one"
    machine.passes("uid:1")
    assert machine.meters.exhausted == 0, "nobody was refused since"
    machine.refused("uid:1")
    assert machine.meters.exhausted == 1
    machine.real_ms += HOUR_MS
    assert machine.meters.exhausted == 0


def test_a_limit_that_was_raised_is_no_longer_exhausted() -> None:
    machine = Machine(rules("decrypts_per_hour = 10", total="decrypts_per_hour = 1000"))
    machine.passes("uid:1", 10)
    machine.refused("uid:1")
    assert machine.meters.exhausted == 1
    machine.policy.replace(parse_policy(rules("decrypts_per_hour = 20", total="decrypts_per_hour = 1000").encode()))
    machine.passes("uid:1")
    assert machine.meters.exhausted == 0
    machine.refused("uid:1", 10)
    machine.passes("uid:1", 9)
    machine.refused("uid:1")
    machine.meters.forget_refusals()
    assert machine.meters.exhausted == 0, "nobody was refused since"
    machine.refused("uid:1")
    assert machine.meters.exhausted == 1


def test_the_whole_state_is_not_encoded_in_the_thread_of_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be many megabytes."""
    machine = Machine(rules("decrypts_per_hour = 100"))
    for name in ("uid:1", "uid:2", "spiffe://prod/a"):
        machine.passes(name, 3)
    encoded: dict[int, int] = {}
    encode = budgets.encode

    def noting(openings: Mapping[Key, Iterable[Opening]], clock: Clock) -> bytes:
        encoded[len(openings)] = threading.get_ident()
        return encode(openings, clock)

    monkeypatch.setattr(meters, "encode", noting)
    machine.disk.appendable = False

    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            machine.start(executor)
            scope, costs = machine.scope("uid:1"), machine.costs("uid:1", 3)
            charged = machine.meters.charge(scope, costs, machine.meters.enter(scope, costs))
            assert isinstance(charged, Awaitable)
            (await charged).release()

    asyncio.run(main())
    assert encoded[1] == threading.get_ident() != encoded[3]
