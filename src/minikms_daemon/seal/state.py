"""The states of a daemon that can be sealed, and the moves between them.

Owns: the table of moves, and which marker says who sealed the daemon. It does no I/O; `minikms_daemon.seal.seal` does
what a move takes. Invariants: a move that the table does not have raises and changes nothing; after
the start each state has the move `SEAL`, so that none holds up a seal; only the removal of the marker leads from a
sealed state to `SERVING`; a marker counts as written only while nothing has overtaken its write.
"""

from __future__ import annotations

import enum
from typing import Final

from minikms.api.errors import SealedError
from minikms.seal_files import Marker


class SealPhase(enum.Enum):
    """`FLAGGED`: no request sealed the daemon; a flag of its start did, or it waits for its root key. `OWED`: a request
    did, and the marker is not known to be on disk. `MARKED`: it is. `OPENING`: an unseal has opened the data directory.
    `REMOVING`: it removes the files of the seal. What an unseal that fails returns to is part of its states.
    """

    STARTING = enum.auto()
    SERVING = enum.auto()
    FLAGGED = enum.auto()
    OWED = enum.auto()
    MARKED = enum.auto()
    OPENING_FLAGGED = enum.auto()
    OPENING_OWED = enum.auto()
    OPENING_MARKED = enum.auto()
    REMOVING_FLAGGED = enum.auto()
    REMOVING = enum.auto()


class SealMove(enum.Enum):
    """`START`, `START_FLAGGED`, `START_MARKED`: how the process starts. `SEAL`: a request to seal. `LAPSE`: the lease
    of the root key has ended. `WRITTEN`: the marker is on disk. `OPEN`, `REMOVE`, `SERVE`: the steps of an unseal.
    `FAIL`: a step of it failed.
    """

    START = enum.auto()
    START_FLAGGED = enum.auto()
    START_MARKED = enum.auto()
    SEAL = enum.auto()
    LAPSE = enum.auto()
    WRITTEN = enum.auto()
    OPEN = enum.auto()
    REMOVE = enum.auto()
    SERVE = enum.auto()
    FAIL = enum.auto()


_S = SealPhase
MOVES: Final[dict[SealPhase, dict[SealMove, SealPhase]]] = {
    _S.STARTING: {SealMove.START: _S.SERVING, SealMove.START_FLAGGED: _S.FLAGGED, SealMove.START_MARKED: _S.MARKED},
    _S.SERVING: {SealMove.SEAL: _S.OWED, SealMove.LAPSE: _S.FLAGGED},
    _S.FLAGGED: {SealMove.SEAL: _S.OWED, SealMove.OPEN: _S.OPENING_FLAGGED},
    _S.OWED: {SealMove.SEAL: _S.OWED, SealMove.OPEN: _S.OPENING_OWED, SealMove.WRITTEN: _S.MARKED},
    _S.MARKED: {SealMove.SEAL: _S.MARKED, SealMove.OPEN: _S.OPENING_MARKED},
    _S.OPENING_FLAGGED: {SealMove.SEAL: _S.OWED, SealMove.REMOVE: _S.REMOVING_FLAGGED, SealMove.FAIL: _S.FLAGGED},
    _S.OPENING_OWED: {SealMove.SEAL: _S.OWED, SealMove.REMOVE: _S.REMOVING, SealMove.FAIL: _S.OWED},
    _S.OPENING_MARKED: {SealMove.SEAL: _S.OWED, SealMove.REMOVE: _S.REMOVING, SealMove.FAIL: _S.MARKED},
    _S.REMOVING_FLAGGED: {SealMove.SEAL: _S.OWED, SealMove.SERVE: _S.SERVING, SealMove.FAIL: _S.FLAGGED},
    _S.REMOVING: {SealMove.SEAL: _S.OWED, SealMove.SERVE: _S.SERVING, SealMove.FAIL: _S.OWED},
}
_FLAGGED: Final = frozenset((_S.FLAGGED, _S.OPENING_FLAGGED, _S.REMOVING_FLAGGED))
_MARKED: Final = frozenset((_S.MARKED, _S.OPENING_MARKED))


class IllegalSealMoveError(Exception):
    """A defect of the caller: the state has no such move."""


class SealState:
    """The state of one process. `marker` says who sealed it; `seals` counts the requests to seal, of which a newer one
    ends an unseal that is running.
    """

    def __init__(self) -> None:
        self.state = SealPhase.STARTING
        self.marker = Marker()
        self.seals = 0

    def move(self, move: SealMove) -> None:
        following = MOVES[self.state].get(move)
        if following is None:
            raise IllegalSealMoveError(f"no {move.name} in the state {self.state.name}")
        self.state = following

    def start_sealed(self, marker: Marker | None, at: str) -> None:
        """The start is sealed: by the `marker` on disk, or (None) by a flag, or for want of a root key, since `at`."""
        self.move(SealMove.START_FLAGGED if marker is None else SealMove.START_MARKED)
        self.marker = Marker(at=at) if marker is None else marker

    def seal(self, marker: Marker) -> None:
        """A repeated request keeps the marker of the first one. A request that interrupts an unseal has a new marker,
        because the unseal may have removed the first one.
        """
        before = self.state
        self.move(SealMove.SEAL)
        self.seals += 1
        if before not in (SealPhase.OWED, SealPhase.MARKED):
            self.marker = marker

    def lapse(self, at: str) -> None:
        self.move(SealMove.LAPSE)
        self.marker = Marker(at=at)

    def written(self, marker: Marker) -> None:
        """`marker` is on disk. If an unseal or a newer seal has overtaken the write, it does not count."""
        if self.state is SealPhase.OWED and marker is self.marker:
            self.move(SealMove.WRITTEN)

    def check_no_seal_since(self, seals: int) -> None:
        """Checks that no seal came since the unseal was asked for; `seals` is the count at that time. Raises
        SealedError.
        """
        if self.seals != seals:
            raise SealedError("the key service was sealed again during the unseal")

    @property
    def is_sealed(self) -> bool:
        return self.state not in (SealPhase.STARTING, SealPhase.SERVING)

    @property
    def is_marked(self) -> bool:
        """A restart stays sealed."""
        return self.state in _MARKED

    @property
    def is_flagged(self) -> bool:
        """No request has sealed the daemon."""
        return self.state in _FLAGGED
