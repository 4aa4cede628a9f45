"""Many refused peers cause few lines, and each refusal is counted once."""

from hypothesis import given
from hypothesis import strategies as st

from minikms import api
from minikms.policy.policy import actor
from minikms_daemon.server.refusals import (
    ACTOR_OTHERS,
    ACTORS_COUNT_MAX,
    PRINCIPALS_OTHERS,
    PROXIES_COUNT_MAX,
    WINDOW_NS,
    RefusalAggregator,
)

SECOND = WINDOW_NS


def unauthorised() -> RefusalAggregator:
    return RefusalAggregator(api.CODE_UNAUTHORIZED, others=ACTOR_OTHERS)


def test_a_single_refusal_is_reported_at_once() -> None:
    event = unauthorised().note(actor(1001), 0)
    assert event is not None
    assert (event.type, event.actor, event.count, event.outcome) == ("refused", "peer_uid:1001", 1, "unauthorized")


def test_a_flood_of_one_uid_costs_one_line_a_second() -> None:
    refusals = unauthorised()
    first = refusals.note(actor(1001), 0)
    assert first is not None
    assert [refusals.note(actor(1001), 1 + number) for number in range(10_000)] == [None] * 10_000
    assert refusals.due(SECOND - 1) == []
    [told] = refusals.due(SECOND)
    assert (told.actor, told.count) == ("peer_uid:1001", 10_000)
    assert refusals.note(actor(1001), SECOND + 5) is None, "the second of the line just told is not over"


def test_a_uid_that_paused_is_reported_at_once_again() -> None:
    refusals = unauthorised()
    refusals.note(actor(1001), 0)
    assert refusals.due(SECOND) == []
    assert refusals.note(actor(1001), SECOND + 1) is not None


def test_uids_beyond_the_bound_share_one_line() -> None:
    refusals = unauthorised()
    told = [refusals.note(actor(uid), 0) for uid in range(100_000)]
    actors = [event.actor for event in told if event is not None]
    assert len(actors) == ACTORS_COUNT_MAX + 1
    assert actors[-1] == ACTOR_OTHERS
    [rest] = refusals.due(SECOND)
    assert (rest.actor, rest.count) == (ACTOR_OTHERS, 100_000 - ACTORS_COUNT_MAX - 1)


def test_one_principal_behind_two_proxies_is_counted_for_each() -> None:
    refusals = RefusalAggregator(api.CODE_LIMIT_EXCEEDED, others=ACTOR_OTHERS)
    first, second = (refusals.note("dns:a.example", 0, via=actor(uid)) for uid in (1, 2))
    assert first is not None and second is not None
    assert [event.facts for event in (first, second)] == [{"via": "peer_uid:1"}, {"via": "peer_uid:2"}]
    assert (first.type, first.outcome, first.count) == ("refused", "limit_exceeded", 1)


def test_principals_beyond_the_bound_are_counted_for_their_proxy() -> None:
    refusals = RefusalAggregator(api.CODE_LIMIT_EXCEEDED, others=PRINCIPALS_OTHERS)
    for number in range(ACTORS_COUNT_MAX):
        refusals.note(f"dns:invented-{number}.example", 0, via=actor(1))
    others = [refusals.note("dns:a.example", 0, via=actor(uid)) for uid in range(2, 1000)]
    events = [event for event in others if event is not None]
    assert {event.actor for event in events} == {PRINCIPALS_OTHERS}
    assert [event.facts for event in events] == [{"via": actor(uid)} for uid in range(2, 2 + PROXIES_COUNT_MAX)] + [{}]


def test_counted_refusals_are_reported_at_the_end() -> None:
    refusals = unauthorised()
    refusals.note(actor(1), 0)
    refusals.note(actor(1), 1)
    assert [event.count for event in refusals.flush()] == [1]
    assert refusals.flush() == []


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, SECOND // 2), st.booleans()), max_size=200))
def test_every_refusal_is_counted_once_and_lines_are_few(steps: list[tuple[int, int, bool]]) -> None:
    refusals = unauthorised()
    now, events, moments = 0, [], []
    for uid, wait, ask in steps:
        now += wait
        if ask:
            due = refusals.due(now)
            events += due
            moments += [now] * len(due)
        if (event := refusals.note(actor(uid), now)) is not None:
            events.append(event)
            moments.append(now)
    events += refusals.flush()
    assert sum(event.count for event in events) == len(steps)
    for moment in moments:
        assert sum(moment <= other < moment + SECOND for other in moments) <= 2 * (ACTORS_COUNT_MAX + 1)
