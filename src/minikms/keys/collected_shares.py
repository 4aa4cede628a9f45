"""The shares of a root key that several people enter, one after the other.

Owns: which shares were entered, and when they expire. Invariants: shares lie in slots of the arena; all shares are of
one set; they are zeroed when they expire, and by `clear`, which the owner calls once the root key was tried; a share
that is not exactly one of the set, as the keyring knows it, is refused and changes nothing. It must never combine fewer
shares than the threshold.

The clock is passed in, as seconds that never go back. The owner calls `expire` at `expires_at`.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from minikms.crypto import shares
from minikms.crypto.shares import ShareInfo
from minikms.errors import ConflictError, WrongShareError
from minikms.memory.arena import SecretArena, SecretSlot

COLLECT_SECONDS_MAX: Final = 600.0
"""From the first share on."""


class KnownSet(Protocol):
    """What the keyring keeps of a set of shares. `digests`: of share 1, of share 2, and so on."""

    @property
    def set_id(self) -> str: ...
    @property
    def threshold(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def digests(self) -> tuple[bytes, ...]: ...


class CollectedShares:
    """The shares of one set that were entered so far. It takes up to 16 slots of the arena, and two during a call."""

    def __init__(self, arena: SecretArena) -> None:
        self._arena = arena
        self._shares: dict[int, SecretSlot] = {}
        self._first: ShareInfo | None = None
        self.expires_at = 0.0
        """When the shares are zeroed; meaningless if no set is being entered."""

    @property
    def set_id(self) -> str:
        """The set that is being entered; empty if none is."""
        return self._first.set_id if self._first else ""

    @property
    def threshold(self) -> int:
        """How many shares of that set are needed; 0 if none is being entered."""
        return self._first.threshold if self._first else 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the shares that were entered."""
        return tuple(sorted(self._shares))

    @property
    def complete(self) -> bool:
        return bool(self._shares) and len(self._shares) >= self.threshold

    def add(
        self, text: Sequence[memoryview], keyring_id: str, sets: Iterable[KnownSet] | None, now: float
    ) -> ShareInfo:
        """Takes the share that somebody typed. `text` is zeroed.

        `sets`: those that the keyring `keyring_id` knows. None: the keyring is not known yet, so the shares have to
        agree with the first one, and a wrong one shows when the root key does not open the keyring.

        Raises:
            ShareTextError: the text is no share, or has a typing mistake.
            WrongShareError: it is a share of another keyring or set, or not the share that the set has.
            ConflictError: a share of this number was entered already, or another set is being entered.
            ArenaFullError: the arena has no room for it.
        """
        self.expire(now)
        try:
            slot = self._arena.allocate()
            try:
                info = shares.read_text(text, slot.view)
                if sets is not None:
                    _check_known(slot.view, info, _known_set(info, keyring_id, sets))
                self._check_fits(info)
            except BaseException:
                slot.release()
                raise
        finally:
            for view in text:
                view[:] = bytes(len(view))
        if not self._shares:
            self._first, self.expires_at = info, now + COLLECT_SECONDS_MAX
        self._shares[info.number] = slot
        return info

    def combine(self) -> SecretSlot:
        """The root key. The caller releases the slot, proves the key on the keyring, and then calls `clear`; or
        `take_back`, if it could not be tried.

        Raises WrongShareError, without a change, while shares are missing.
        """
        if not self.complete:
            raise WrongShareError(f"{self.threshold} shares are needed, and {len(self._shares)} were entered")
        root = self._arena.allocate()
        shares.combine({number: slot.view for number, slot in self._shares.items()}, root.view)
        return root

    def take_back(self, number: int) -> None:
        """Zeroes one share, so that it can be entered again. The others stay."""
        slot = self._shares.pop(number, None)
        if slot is not None:
            slot.release()
        if not self._shares:
            self._first = None

    def expire(self, now: float) -> bool:
        """Zeroes the shares when their time is over. Whether it did."""
        if not self._shares or now < self.expires_at:
            return False
        self.clear()
        return True

    def clear(self) -> None:
        """Zeroes the shares. Idempotent."""
        for slot in self._shares.values():
            slot.release()
        self._shares.clear()
        self._first = None

    def _check_fits(self, info: ShareInfo) -> None:
        """Raises unless the share is another one of the set that is being entered."""
        if self._first is not None and self._first._replace(number=info.number) != info:
            raise ConflictError(
                "shares of another set are being entered: enter those, or wait until they expire, ten minutes after "
                "the first of them"
            )
        if info.number in self._shares:
            raise ConflictError(f"share {info.number} was entered already: another one is needed")


def _check_known(share: memoryview, info: ShareInfo, known: KnownSet) -> None:
    if info.threshold != known.threshold or info.number > known.count:
        raise WrongShareError(f"share {info.number} is not one of the shares of its set")
    if not hmac.compare_digest(shares.digest(share, info), known.digests[info.number - 1]):
        raise WrongShareError(f"share {info.number} is wrong: it is not the share that was made")


def _known_set(info: ShareInfo, keyring_id: str, sets: Iterable[KnownSet]) -> KnownSet:
    if info.keyring_id != keyring_id:
        raise WrongShareError(f"share {info.number} is of the keyring {info.keyring_id}, and this one is {keyring_id}")
    for known in sets:
        if known.set_id == info.set_id:
            return known
    raise WrongShareError(
        f"share {info.number} is of the set {info.set_id}, which does not open this keyring: it was replaced, or its "
        "root was removed"
    )
