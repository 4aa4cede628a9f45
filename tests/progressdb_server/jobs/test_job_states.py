"""The table of states: every move of every state, and what a job tells."""

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_server.config import ConfigError, duration_s, load
from progressdb_server.jobs.states import (
    FAILURES_NAMED_MAX,
    MOVES,
    SOURCES_MAX,
    UNFINISHED,
    Failure,
    Job,
    JobConflictError,
    Move,
    State,
    add_failures,
    move,
    view,
    with_source,
)

STATES: tuple[State, ...] = get_args(State)
ALL_MOVES: tuple[Move, ...] = get_args(Move)


def job(state: State = "queued") -> Job:
    return Job(id="job-00000000000000000001-00000000", thread="t", created_ns=1, updated_ns=1, state=state)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", ALL_MOVES)
def test_a_move_that_is_not_in_the_table_raises_and_changes_nothing(state: State, event: Move) -> None:
    before = job(state)
    if (state, event) in MOVES:
        assert move(before, event).state == MOVES[state, event]
    else:
        with pytest.raises(JobConflictError, match=f"a job that is {state} can't be"):
            move(before, event)
    assert before == job(state)


def test_done_and_cancelled_are_final_and_no_other_state_is() -> None:
    assert {state for state in STATES if not any(at == state for at, _ in MOVES)} == {"done", "cancelled"}


@given(st.lists(st.sampled_from(ALL_MOVES), max_size=30))
def test_no_walk_through_the_table_is_done_without_a_verification(events: list[Move]) -> None:
    now, seen = job(), ["queued"]
    for event in events:
        if (now.state, event) in MOVES:
            now = move(now, event)
            seen.append(now.state)
    if now.state == "done":
        assert seen[-2:] == ["verifying", "done"]
    assert now.unfinished == (now.state in UNFINISHED)


def test_failures_and_sources_are_bounded() -> None:
    many = [Failure(str(n), "decryption_failed") for n in range(FAILURES_NAMED_MAX)]
    assert len(add_failures(add_failures((), many[:60]), many)) == FAILURES_NAMED_MAX
    sources: tuple[str, ...] = ()
    for n in range(SOURCES_MAX + 9):
        sources = with_source(with_source(sources, f"k{n}"), f"k{n}")
    assert sources == tuple(f"k{n}" for n in range(SOURCES_MAX))


def test_a_row_reads_back_as_it_was_and_a_view_has_what_the_contract_names() -> None:
    whole = msgspec.structs.replace(job("failed"), failures=(Failure("thread:t:meta", "malformed"),), rate=0, done=7)
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Job) == whole
    contract = {"job_id", "thread_id", "status", "done", "total", "failed", "old_key", "new_key"}
    assert contract <= view(whole).keys()
    assert "plaintext" not in str(view(whole))


@pytest.mark.parametrize(("text", "seconds"), [("45s", 45), ("30m", 1800), ("12h", 43_200), ("90d", 7_776_000)])
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "d", "0d", "-1d", "1w", "1.5h", " 1d", "1d ", "9999999999d", "\u0661d"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="as in 90d"):
        duration_s(text)


@pytest.mark.parametrize("broken", [{"max_age": "soon"}, {"destroy_old_after": "1"}, {"max_uses": -1}])
def test_settings_that_mean_nothing_are_refused_by_name(broken: dict[str, object]) -> None:
    ((name, value),) = broken.items()
    with pytest.raises(ConfigError, match=f"rotation.{name}"):
        load({"storage.db_path": "db", f"rotation.{name}": value}, {})
