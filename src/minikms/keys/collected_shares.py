"""The shares of a root key that several people enter, one after the other.

Owns: which shares were entered, and when they expire. Invariants: shares lie in slots of the arena; each set is
collected apart, so that a share of one never delays another; shares are zeroed when their set expires, and by `drop`
and `clear`, of which the owner calls one once the root key was tried; a share that is not exactly one of its set, as
the keyring knows it, is refused and changes nothing. It must never combine fewer shares than the threshold.

The clock is passed in, as seconds that never go back. The owner calls `expire` at `expires_at`.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from minikms.api.errors import ConflictError, WrongShareError
from minikms.crypto import shares
from minikms.crypto.shares import ShareInfo
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


class _Set:
    """The shares of one set. `info` has the number 0."""

    def __init__(self, info: ShareInfo, expires_at: float) -> None:
        self.info = info
        self.expires_at = expires_at
        self.shares: dict[int, SecretSlot] = {}


class CollectedShares:
    """The shares that were entered so far, by set. It takes a slot of the arena for each, and two during a call.

    Its properties and `combine` are about one set: that of the share that was taken last.
    """

    def __init__(self, arena: SecretArena) -> None:
        self._arena = arena
        self._sets: dict[ShareInfo, _Set] = {}
        """The sets of shares; the set of the newest share comes last."""

    @property
    def set_id(self) -> str:
        """The set that is being entered; empty if none is."""
        return last.info.set_id if (last := self._last) else ""

    @property
    def threshold(self) -> int:
        """How many shares of that set are needed; 0 if none is being entered."""
        return last.info.threshold if (last := self._last) else 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the shares that were entered."""
        return tuple(sorted(last.shares)) if (last := self._last) else ()

    @property
    def expires_at(self) -> float:
        """When the shares are zeroed; meaningless if no set is being entered."""
        return last.expires_at if (last := self._last) else 0.0

    @property
    def complete(self) -> bool:
        return self._last is not None and len(self.numbers) >= self.threshold

    def add(
        self, text: Sequence[memoryview], keyring_id: str, sets: Iterable[KnownSet] | None, now: float
    ) -> ShareInfo:
        """Takes the share that somebody typed. `text` is zeroed.

        `sets`: those that the keyring `keyring_id` knows. None: the keyring is not known yet, so the shares have to
        agree with the first one, and a wrong one shows when the root key does not open the keyring.

        Raises:
            ShareTextError: the text is no share, or has a typing mistake.
            WrongShareError: it is a share of another keyring or set, or not the share that the set has.
            ConflictError: a share of this number was entered already.
            ArenaFullError: the arena has no room for it.
        """
        self.expire(now)
        try:
            slot = self._arena.allocate()
            try:
                info = shares.read_text(text, slot.view)
                if sets is not None:
                    _check_known(slot.view, info, _known_set(info, keyring_id, sets))
                entered = self._sets.get(_set_of(info))
                if entered is not None and info.number in entered.shares:
                    raise ConflictError(f"share {info.number} was entered already: another one is needed")  # noqa: TRY301 the slot is released below
            except BaseException:
                slot.release()
                raise
        finally:
            for view in text:
                view[:] = bytes(len(view))
        key = _set_of(info)
        last = self._sets.pop(key, None) or _Set(key, now + COLLECT_SECONDS_MAX)
        last.shares[info.number] = slot
        self._sets[key] = last
        return info

    def combine(self) -> SecretSlot:
        """The root key. The caller releases the slot, proves the key on the keyring, and then calls `clear` or `drop`;
        or `take_back`, if it could not be tried.

        Raises WrongShareError, without a change, while shares are missing.
        """
        last = self._last
        if last is None or not self.complete:
            raise WrongShareError(f"{self.threshold} shares are needed, and {len(self.numbers)} were entered")
        root = self._arena.allocate()
        shares.combine({number: slot.view for number, slot in last.shares.items()}, root.view)
        return root

    def take_back(self, share: ShareInfo) -> None:
        """Zeroes one share, so that it can be entered again. The others stay."""
        entered = self._sets.get(_set_of(share))
        if entered is None:
            return
        slot = entered.shares.pop(share.number, None)
        if slot is not None:
            slot.release()
        if not entered.shares:
            self._zero(entered)

    def drop(self, share: ShareInfo) -> None:
        """Zeroes all shares of the set of this share, because the root key was wrong."""
        entered = self._sets.get(_set_of(share))
        if entered is not None:
            self._zero(entered)

    def expire(self, now: float) -> bool:
        """Zeroes the sets whose time is over. Whether there was one."""
        over = [entered for entered in self._sets.values() if now >= entered.expires_at]
        for entered in over:
            self._zero(entered)
        return bool(over)

    def clear(self) -> None:
        """Zeroes all shares. Idempotent."""
        for entered in list(self._sets.values()):
            self._zero(entered)

    @property
    def _last(self) -> _Set | None:
        return next(reversed(self._sets.values()), None)

    def _zero(self, entered: _Set) -> None:
        del self._sets[entered.info]
        for slot in entered.shares.values():
            slot.release()


def _set_of(share: ShareInfo) -> ShareInfo:
    return share._replace(number=0)


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
