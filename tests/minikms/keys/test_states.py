"""The tables of legal moves: every other move raises and changes nothing."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.errors import ConflictError
from minikms.keys.dek import DEK_MOVES, DekMove, DekState, move_dek
from minikms.keys.keyring import KEK_MOVES, KekMove, KekState, move_kek

DEK_STATES: tuple[DekState, ...] = get_args(DekState)
KEK_STATES: tuple[KekState, ...] = get_args(KekState)


def test_a_dek_only_ever_goes_from_active_to_retired_to_destroyed() -> None:
    assert DEK_MOVES == {("active", "retire"): "retired", ("retired", "destroy"): "destroyed"}


def test_a_kek_goes_from_pending_to_active_to_retired_to_destroyed() -> None:
    """It never takes another step."""
    assert KEK_MOVES == {
        ("pending", "promote"): "active",
        ("active", "retire"): "retired",
        ("retired", "destroy"): "destroyed",
    }


@pytest.mark.parametrize("state", DEK_STATES)
@pytest.mark.parametrize("move", get_args(DekMove))
def test_every_pair_of_a_dek_is_a_move_or_refused(state: DekState, move: DekMove) -> None:
    if (state, move) in DEK_MOVES:
        assert move_dek(state, move) == DEK_MOVES[state, move]
    else:
        with pytest.raises(ConflictError, match=f"a key that is {state} can't be {move.removesuffix('y')}"):
            move_dek(state, move)


@pytest.mark.parametrize("state", KEK_STATES)
@pytest.mark.parametrize("move", get_args(KekMove))
def test_every_pair_of_a_kek_is_a_move_or_refused(state: KekState, move: KekMove) -> None:
    if (state, move) in KEK_MOVES:
        assert move_kek(state, move) == KEK_MOVES[state, move]
    else:
        with pytest.raises(ConflictError, match=f"a KEK version that is {state} can't be"):
            move_kek(state, move)


def test_destroying_an_active_key_is_refused_with_a_hint_to_retire_it() -> None:
    with pytest.raises(ConflictError, match="retire it first"):
        move_dek("active", "destroy")


@given(st.lists(st.sampled_from(get_args(DekMove)), max_size=6))
def test_no_sequence_of_moves_brings_a_dek_back(moves: list[DekMove]) -> None:
    """Each accepted move is one further in the order of the states, whatever was tried in between."""
    state: DekState = "active"
    for move in moves:
        before = state
        try:
            state = move_dek(state, move)
        except ConflictError:
            assert state == before
        else:
            assert DEK_STATES.index(state) == DEK_STATES.index(before) + 1


def test_nothing_else_in_the_table_can_be_changed_by_a_caller() -> None:
    """The states that a file or a keyring may hold are those of the table, and no others."""
    reachable = {
        state for table in (DEK_MOVES, KEK_MOVES) for (before, _), after in table.items() for state in (before, after)
    }
    assert reachable == {*DEK_STATES, *KEK_STATES}
    assert {*get_args(DekMove)} == {move for _, move in DEK_MOVES}
    assert {*get_args(KekMove)} == {move for _, move in KEK_MOVES}
