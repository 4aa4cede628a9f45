"""Many refused peers cause few lines, and each refusal is counted once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minikms.daemon.refusals import ACTOR_OTHERS, UIDS_COUNT_MAX, WINDOW_NS, RefusalAggregator

SECOND = WINDOW_NS


def test_a_single_refusal_is_reported_at_once() -> None:
    event = RefusalAggregator().note(1001, 0)
    assert event is not None
    assert (event.type, event.actor, event.count, event.outcome) == ("refused", "peer_uid:1001", 1, "unauthorized")


def test_a_flood_of_one_uid_costs_one_line_a_second() -> None:
    refusals = RefusalAggregator()
    first = refusals.note(1001, 0)
    assert first is not None
    assert [refusals.note(1001, 1 + number) for number in range(10_000)] == [None] * 10_000
    assert refusals.due(SECOND - 1) == []
    [told] = refusals.due(SECOND)
    assert (told.actor, told.count) == ("peer_uid:1001", 10_000)
    assert refusals.note(1001, SECOND + 5) is None, "the second of the line just told is not over"


def test_a_uid_that_paused_is_reported_at_once_again() -> None:
    refusals = RefusalAggregator()
    refusals.note(1001, 0)
    assert refusals.due(SECOND) == []
    assert refusals.note(1001, SECOND + 1) is not None


def test_uids_beyond_the_bound_share_one_line() -> None:
    refusals = RefusalAggregator()
    told = [refusals.note(uid, 0) for uid in range(100_000)]
    actors = [event.actor for event in told if event is not None]
    assert len(actors) == UIDS_COUNT_MAX + 1
    assert actors[-1] == ACTOR_OTHERS
    [rest] = refusals.due(SECOND)
    assert (rest.actor, rest.count) == (ACTOR_OTHERS, 100_000 - UIDS_COUNT_MAX - 1)


def test_counted_refusals_are_reported_at_the_end() -> None:
    refusals = RefusalAggregator()
    refusals.note(1, 0)
    refusals.note(1, 1)
    assert [event.count for event in refusals.flush()] == [1]
    assert refusals.flush() == []


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, SECOND // 2), st.booleans()), max_size=200))
def test_every_refusal_is_counted_once_and_lines_are_few(steps: list[tuple[int, int, bool]]) -> None:
    refusals = RefusalAggregator()
    now, events, moments = 0, [], []
    for uid, wait, ask in steps:
        now += wait
        if ask:
            due = refusals.due(now)
            events += due
            moments += [now] * len(due)
        if (event := refusals.note(uid, now)) is not None:
            events.append(event)
            moments.append(now)
    events += refusals.flush()
    assert sum(event.count for event in events) == len(steps)
    for moment in moments:
        assert sum(moment <= other < moment + SECOND for other in moments) <= 2 * (UIDS_COUNT_MAX + 1)
