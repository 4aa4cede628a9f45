"""The root key source `shares:`: people type their shares, one after the other, on one terminal.

Owns: the prompts, and what is said about a share that is refused. Invariants: no share is shown or becomes a Python
object; where the keyring is known, a wrong share is named at once. It must never be a source of the daemon, which takes
shares through its socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from minikms import api
from minikms.api.errors import ConflictError, InvalidRequestError, StartError, WrongShareError
from minikms.crypto.shares import SHARES_COUNT_MAX
from minikms.keys import keyring
from minikms.keys.collected_shares import CollectedShares, KnownSet
from minikms.memory.arena import SLOT_BYTES, SecretArena, SecretSlot
from minikms.memory.terminal import opened_terminal, show, typed_secret
from minikms.roots.providers import RootProvider

SLOTS_COUNT_MAX: Final = keyring.SLOTS_MAX * SHARES_COUNT_MAX + api.SHARE_BYTES_MAX // SLOT_BYTES + 2
"""The slots of the arena: the shares of every set, the line that is being typed, a share that is being read, and the
root key.
"""
KnownSets = tuple[str, Sequence[KnownSet]]
"""The id of a keyring, and its sets of shares."""


@dataclass(frozen=True)
class TypedShares(RootProvider):
    """`keyring_file` reads the keyring that is to be opened; without it the shares of a set have to agree only.

    The keyring is not authenticated then. It decides only which shares are refused.
    """

    name: ClassVar[str] = "shares"
    keyring_file: Callable[[], bytes | None] | None = None

    def prepare(self, arena: SecretArena, *, new_keyring: bool) -> None:
        if new_keyring:
            raise StartError("shares open a keyring that exists; they can't make one")

    def read(self, arena: SecretArena) -> SecretSlot:
        known = self._known()
        collected = CollectedShares(arena)
        try:
            while not collected.complete:
                _take(collected, known, arena)
            return collected.combine()
        finally:
            collected.clear()

    def _known(self) -> KnownSets | None:
        """The sets whose shares can open the keyring. Raises StartError if there is none."""
        data = self.keyring_file() if self.keyring_file else None
        if data is None:
            return None
        body, _, _ = keyring.parse_file(data)
        sets = [slot.shares for slot in body.slots if slot.shares is not None]
        if not sets:
            raise StartError(f"the keyring {body.keyring_id} has no shares: open it with another root key")
        return body.keyring_id, sets


def _take(collected: CollectedShares, known: KnownSets | None, arena: SecretArena) -> None:
    """Asks for one share. A refused one is explained on the terminal."""
    set_id, count = collected.set_id, len(collected.numbers)
    which = f"share {count + 1} of {collected.threshold}" if count else "the first share"
    keyring_id, sets = known if known is not None else ("", None)
    with opened_terminal() as terminal:
        try:
            with typed_secret(f"Type {which} (it is not shown): ", api.SHARE_BYTES_MAX, arena) as text:
                info = collected.add(text, keyring_id, sets, time.monotonic())
        except (InvalidRequestError, WrongShareError, ConflictError) as error:
            show(terminal, f"Refused: {error}.\n")
            return
        show(terminal, f"Share {info.number} is taken.\n")
        if set_id and collected.set_id != set_id:
            show(terminal, f"It is of the set {info.set_id}, the one before of {set_id}; both are kept.\n")
        elif count and len(collected.numbers) <= count:
            show(terminal, "The shares before it have expired; type them again.\n")
