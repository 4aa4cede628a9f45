"""The modes of a member, the moves between them, and what a grant of the lease may say.

Owns: the table of moves, the order of the grants, and the counts of seals. It does no I/O. Invariants: a move that the
table does not have raises and changes nothing; a seal is possible in each mode; nothing leads to `serving` but a
take-over; a member takes over at most once in a term; no grant counts from the future. It must never read a clock: each
instant is passed in.
"""

from __future__ import annotations

import enum
import math
from typing import Final

from minikms import api
from minikms.api.errors import ConflictError


class Move(enum.Enum):
    """`OPEN`: the directory was opened. `FOLLOW`: it has what the database has. `REFUSE`: the database's
    contents can't follow from it.
    """

    OPEN = enum.auto()
    SEAL = enum.auto()
    FOLLOW = enum.auto()
    REFUSE = enum.auto()
    TAKE_OVER = enum.auto()
    SERVE = enum.auto()
    STAND_BY = enum.auto()


MOVES: Final[dict[api.Mode, dict[Move, api.Mode]]] = {
    "sealed": {Move.SEAL: "sealed", Move.OPEN: "following"},
    "following": {
        Move.SEAL: "sealed",
        Move.FOLLOW: "following",
        Move.REFUSE: "refused",
        Move.TAKE_OVER: "taking_over",
    },
    "refused": {Move.SEAL: "sealed", Move.FOLLOW: "following", Move.REFUSE: "refused"},
    "taking_over": {Move.SEAL: "sealed", Move.SERVE: "serving", Move.STAND_BY: "following"},
    "serving": {Move.SEAL: "sealed", Move.STAND_BY: "following"},
}


class IllegalMoveError(Exception):
    """A defect of the caller: the mode has no such move."""


class MemberState:
    """`term`: the last one in which it has taken over, 0 before the first."""

    def __init__(self) -> None:
        self.mode: api.Mode = "sealed"
        self.term = 0
        self._asked_ns = 0
        self._answered_ns = 0

    def move(self, move: Move) -> None:
        following = MOVES[self.mode].get(move)
        if following is None:
            raise IllegalMoveError(f"no {move.name} in the mode {self.mode}")
        self.mode = following

    def take_over(self, term: int) -> None:
        """Takes over in a new term. Raises IllegalMoveError for any other term."""
        if term <= self.term:
            raise IllegalMoveError(f"term {term} does not follow term {self.term}")
        self.move(Move.TAKE_OVER)
        self.term = term

    @property
    def has_lease(self) -> bool:
        return self.mode in api.LEASED_MODES

    def check_asked(self, asked_ns: int, now_ns: int) -> None:
        """Checks that the grant counts from an instant that has passed and is later than the last answer; the request
        before may be repeated. Raises ConflictError.
        """
        if asked_ns > now_ns:
            raise ConflictError("the lease can't begin in the future: this is not the clock of this host")
        if asked_ns < self._answered_ns and asked_ns != self._asked_ns:
            raise ConflictError("the lease was asked for before the last answer")
        self._asked_ns = asked_ns

    def answered(self, now_ns: int) -> None:
        self._answered_ns = now_ns


class Seals:
    """The counts of the requests to seal all members. `obeyed`: of those that this member has obeyed. `asked`: that of
    its own marker, which nothing authenticates. `head`: in the database; None before it was read.
    """

    def __init__(self, obeyed: int, asked: int = 0) -> None:
        self.obeyed = obeyed
        self.head: int | None = None
        self._asked: float = asked

    def ask(self) -> int:
        """A request seals this member: the count that the database should have then. Until it has it, another request
        asks for nothing more.
        """
        if self.head is None:
            self._asked = math.inf
            return self.obeyed + 1
        self.obeyed = max(self.obeyed, self.head + 1)
        return self.obeyed

    @property
    def are_known(self) -> bool:
        """The database has every count that was asked for here."""
        return self.head is not None and self.obeyed <= self.head

    @property
    def wanted(self) -> int:
        """The least count that the database should have: at most one more than it has."""
        return 0 if self.head is None else min(self.obeyed, self.head + 1)

    def learn(self, head: int) -> bool:
        """Takes the count in the database; whether another member has sealed all since."""
        others = head > self.obeyed
        own = self.head is None and self._asked > head
        self.head = head
        self.obeyed = max(head + own, self.obeyed)
        return others
