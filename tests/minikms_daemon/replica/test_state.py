"""The modes of a member, the grants of its lease, and the counts of seals, without sockets and clocks."""

from typing import get_args

import pytest

from minikms import api
from minikms.api.errors import ConflictError
from minikms_daemon.replica.state import MOVES, IllegalMoveError, MemberState, Move, Seals


def test_each_mode_can_be_sealed_and_only_a_take_over_serves() -> None:
    assert set(MOVES) == set(get_args(api.Mode))
    assert all(moves[Move.SEAL] == "sealed" for moves in MOVES.values())
    before = {mode for mode, moves in MOVES.items() if "serving" in moves.values()}
    assert before == {"taking_over"}
    assert {mode for mode, moves in MOVES.items() if "taking_over" in moves.values()} == {"following"}


@pytest.mark.parametrize("move", Move)
@pytest.mark.parametrize("mode", get_args(api.Mode))
def test_a_move_that_the_table_lacks_changes_nothing(mode: api.Mode, move: Move) -> None:
    state = MemberState()
    state.mode = mode
    if move in MOVES[mode]:
        state.move(move)
        assert state.mode == MOVES[mode][move]
    else:
        with pytest.raises(IllegalMoveError):
            state.move(move)
        assert state.mode == mode


def test_a_member_takes_over_once_in_a_term() -> None:
    state = MemberState()
    state.move(Move.OPEN)
    state.take_over(3)
    state.move(Move.STAND_BY)
    for term in (3, 2, 0):
        with pytest.raises(IllegalMoveError):
            state.take_over(term)
    assert (state.mode, state.term) == ("following", 3)
    state.take_over(4)
    assert state.has_lease


def test_a_lease_counts_from_an_instant_after_the_last_answer() -> None:
    state = MemberState()
    state.check_asked(100, 110)
    state.answered(120)
    state.check_asked(100, 130)  # the answer was lost
    state.check_asked(121, 130)
    for asked_ns in (131, 101, 0):
        with pytest.raises(ConflictError):
            state.check_asked(asked_ns, 130)
    state.answered(140)
    with pytest.raises(ConflictError):
        state.check_asked(100, 150)


def test_a_seal_is_asked_for_once_until_the_database_has_it() -> None:
    seals = Seals(4)
    assert not seals.learn(4) and seals.are_known
    assert (seals.ask(), seals.ask(), seals.wanted, seals.are_known) == (5, 5, 5, False)
    assert not seals.learn(4) and seals.wanted == 5
    assert not seals.learn(5) and seals.are_known
    assert seals.ask() == 6, "the others may have been unsealed since"


def test_a_higher_count_is_of_another_member_once() -> None:
    seals = Seals(4)
    assert seals.learn(6)
    assert not seals.learn(6)
    assert (seals.obeyed, seals.wanted, seals.are_known) == (6, 6, True)


def test_a_seal_before_the_database_was_read_is_another_one() -> None:
    """This host was away while the others were sealed."""
    seals = Seals(4)
    assert seals.ask() == 5 and seals.wanted == 0
    assert seals.learn(9)
    assert (seals.wanted, seals.are_known) == (10, False)


@pytest.mark.parametrize("asked, head, wanted", [(5, 4, 5), (5, 5, 5), (2**62, 4, 5)])
def test_a_restart_asks_on_and_a_forged_marker_for_one_more(asked: int, head: int, wanted: int) -> None:
    seals = Seals(4, asked)
    seals.learn(head)
    assert (seals.wanted, seals.are_known) == (wanted, wanted == head)
    seals.learn(wanted)
    assert seals.are_known
