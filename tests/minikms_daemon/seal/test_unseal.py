"""How much wrong attempts to unseal are slowed down."""

import pytest

from minikms.policy.policy import Policy
from minikms.seal_files import AttemptRecords
from minikms_daemon.seal import unseal
from minikms_daemon.seal.unseal import SlowDown

WHO = Policy([1000]).principal(1000, 7) or pytest.fail("uid 1000 is allowed")


def test_wrong_attempts_of_a_caller_slow_that_caller_down() -> None:
    slow = SlowDown()
    for number in range(unseal.FREE_FAILURES):
        assert slow.wait_s("a", float(number)) == 0
        slow.failed("a", float(number))
    now = float(unseal.FREE_FAILURES)
    waits = []
    for _ in range(10):
        waits.append(slow.wait_s("a", now))
        now += waits[-1]
        assert slow.wait_s("a", now) == 0
        slow.failed("a", now)
    assert waits == sorted(waits) and waits[0] <= 2 and waits[-1] == unseal.PAUSE_SECONDS_MAX + 1
    assert slow.wait_s("b", now) == 0


def test_wrong_attempts_of_many_callers_slow_all_down_for_a_short_time() -> None:
    slow = SlowDown()
    for number in range(unseal.FREE_FAILURES_IN_ALL + 20):
        slow.failed(f"a{number}", 0.0)
    assert 0 < slow.wait_s("b", 0.0) <= unseal.PAUSE_IN_ALL_SECONDS_MAX + 1
    assert slow.wait_s("b", float(unseal.PAUSE_IN_ALL_SECONDS_MAX + 1)) == 0


def test_a_wrong_attempt_is_forgotten_after_its_time() -> None:
    slow = SlowDown()
    for _ in range(3 * unseal.FREE_FAILURES):
        slow.failed("a", 0.0)
    assert slow.wait_s("a", 1.0) > 0
    assert slow.wait_s("a", float(unseal.FAILURE_SECONDS)) == 0


def test_a_restart_forgets_no_wrong_attempt() -> None:
    records = AttemptRecords([], 0)
    for _ in range(2 * unseal.FREE_FAILURES):
        records.begin(WHO, "root_hex").outcome = "wrong_root"
    slow = SlowDown()
    slow.seed(records, 100.0)
    assert slow.wait_s(WHO.actor, 100.0) > 0
    assert slow.wait_s("peer_uid:1001", 100.0) == 0
