"""The states of keys, and every legal move.

Rules, all of them in the table below: a DEK is `active` (encrypts and decrypts), `retired` (decrypts only), or
`destroyed` (gone). A KEK version is `pending` (a rotation to it has begun: new DEKs are wrapped under it), `active`,
`retired` (nothing new is wrapped under it), or `destroyed`. An illegal move raises and changes nothing; nothing else in
the code may assign a state.
"""

from __future__ import annotations

from typing import Final, Literal

from minikms.errors import ConflictError

DekState = Literal["active", "retired", "destroyed"]
KekState = Literal["pending", "active", "retired", "destroyed"]
DekMove = Literal["retire", "destroy"]
KekMove = Literal["promote", "retire", "destroy"]

DEK_MOVES: Final[dict[tuple[DekState, DekMove], DekState]] = {
    ("active", "retire"): "retired",
    ("retired", "destroy"): "destroyed",
}
KEK_MOVES: Final[dict[tuple[KekState, KekMove], KekState]] = {
    ("pending", "promote"): "active",
    ("active", "retire"): "retired",
    ("retired", "destroy"): "destroyed",
}


def move_dek(state: DekState, move: DekMove) -> DekState:
    try:
        return DEK_MOVES[state, move]
    except KeyError:
        hint = "; retire it first" if (state, move) == ("active", "destroy") else ""
        raise ConflictError(f"a key that is {state} can't be {_done(move)}{hint}") from None


def move_kek(state: KekState, move: KekMove) -> KekState:
    try:
        return KEK_MOVES[state, move]
    except KeyError:
        raise ConflictError(f"a KEK version that is {state} can't be {_done(move)}") from None


def _done(move: DekMove | KekMove) -> str:
    return {"retire": "retired", "destroy": "destroyed", "promote": "promoted"}[move]
