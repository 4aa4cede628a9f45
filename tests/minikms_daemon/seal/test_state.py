"""The table of the states of a daemon that can be sealed."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.errors import SealedError
from minikms.seal_files import Marker
from minikms_daemon.seal.state import MOVES, IllegalSealMoveError, SealMove, SealPhase, SealState

SEALED = [state for state in SealPhase if state not in (SealPhase.STARTING, SealPhase.SERVING)]
EARLIER, LATER = Marker(at="2026-01-01T00:00:00Z"), Marker(at="2026-01-02T00:00:00Z")


def in_state(state: SealPhase, marker: Marker = EARLIER) -> SealState:
    made = SealState()
    made.state, made.marker = state, marker
    return made


def facts(state: SealState) -> tuple[SealPhase, Marker, int]:
    return state.state, state.marker, state.seals


@pytest.mark.parametrize("move", SealMove)
@pytest.mark.parametrize("state", SealPhase)
def test_a_move_is_in_the_table_or_raises_and_changes_nothing(state: SealPhase, move: SealMove) -> None:
    machine = in_state(state)
    if move in MOVES[state]:
        machine.move(move)
        assert facts(machine) == (MOVES[state][move], EARLIER, 0)
        return
    with pytest.raises(IllegalSealMoveError, match=f"no {move.name} in the state {state.name}"):
        machine.move(move)
    assert facts(machine) == (state, EARLIER, 0)


def test_an_illegal_seal_and_an_illegal_start_change_nothing() -> None:
    machine = SealState()
    before = facts(machine)
    with pytest.raises(IllegalSealMoveError):
        machine.seal(LATER)
    assert facts(machine) == before
    serving = in_state(SealPhase.SERVING)
    with pytest.raises(IllegalSealMoveError):
        serving.start_sealed(LATER, "")
    assert facts(serving) == (SealPhase.SERVING, EARLIER, 0)


@pytest.mark.parametrize("state", [SealPhase.SERVING, *SEALED])
def test_every_state_after_the_start_can_be_sealed(state: SealPhase) -> None:
    machine = in_state(state)
    machine.seal(LATER)
    assert machine.is_sealed and machine.seals == 1
    assert machine.state in (SealPhase.OWED, SealPhase.MARKED)
    with pytest.raises(SealedError):
        machine.check_no_seal_since(0)


def test_only_an_unseal_that_removes_the_marker_leads_to_serving() -> None:
    before = {state for state, moves in MOVES.items() if SealPhase.SERVING in moves.values()}
    assert before == {SealPhase.STARTING, SealPhase.REMOVING, SealPhase.REMOVING_FLAGGED}
    assert {state for state, moves in MOVES.items() if SealPhase.MARKED in moves.values()} == {
        SealPhase.STARTING,
        SealPhase.OWED,
        SealPhase.MARKED,
        SealPhase.OPENING_MARKED,
    }


def test_a_lease_seals_only_what_serves_and_leaves_no_marker() -> None:
    assert {state for state, moves in MOVES.items() if SealMove.LAPSE in moves} == {SealPhase.SERVING}
    machine = in_state(SealPhase.SERVING)
    machine.lapse("2026-01-02T00:00:00Z")
    assert machine.is_sealed and machine.is_flagged and not machine.is_marked
    assert (machine.marker, machine.seals) == (Marker(at="2026-01-02T00:00:00Z"), 0)


def test_a_repeated_seal_keeps_its_marker_unless_an_unseal_ran() -> None:
    for state in (SealPhase.OWED, SealPhase.MARKED):
        machine = in_state(state)
        machine.seal(LATER)
        assert (machine.state, machine.marker) == (state, EARLIER)
    for state in (
        SealPhase.SERVING,
        SealPhase.FLAGGED,
        *(state for state in SealPhase if state.name.startswith(("OPEN", "REM"))),
    ):
        machine = in_state(state)
        machine.seal(LATER)
        assert (machine.state, machine.marker) == (SealPhase.OWED, LATER)


@pytest.mark.parametrize("state", SealPhase)
def test_a_write_that_was_overtaken_leaves_the_marker_owed(state: SealPhase) -> None:
    """By an unseal, which removes the file, or by a newer seal, whose marker is another one."""
    machine = in_state(state, LATER)
    machine.written(EARLIER)
    assert machine.state is state
    machine.written(LATER)
    assert machine.state is (SealPhase.MARKED if state is SealPhase.OWED else state)


def runs() -> st.SearchStrategy[list[SealMove]]:
    return st.lists(st.sampled_from(list(SealMove)), max_size=40)


@given(runs())
def test_the_marker_is_on_disk_whenever_a_state_says_so(moves: list[SealMove]) -> None:
    """Against a disk that does what the moves stand for; a failed removal may have removed the file."""
    machine, on_disk = SealState(), False
    for move in legal(machine, moves):
        if move is SealMove.SEAL:
            machine.seal(Marker())
        elif move is SealMove.WRITTEN:
            on_disk = True
            machine.written(machine.marker)
        else:
            machine.move(move)
        if move is SealMove.START_MARKED:
            on_disk = True
        elif move is SealMove.REMOVE:
            on_disk = False
        assert not machine.is_marked or on_disk
        assert not (machine.state is SealPhase.SERVING and on_disk)


def legal(machine: SealState, moves: list[SealMove]) -> Iterator[SealMove]:
    """Those of `moves` that the state has at the time."""
    for move in moves:
        if move in MOVES[machine.state]:
            yield move
