"""Which keys the latest groups of the writer have put or deleted.

Owns: a bounded memory of them. Invariants: `untouched` is only said of keys that no group after the given one has
named; whatever is no longer remembered counts as touched. Pure: it sees keys, and neither the engine nor values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Final

KEYS_REMEMBERED_MAX: Final = 32_768
"""Some thirty chunks of a rotation: more than are ever on their way."""


class RecentKeys:
    def __init__(self) -> None:
        self.group = 0
        """How many groups there were: what is read now is as the group of this number has left it."""
        self._groups: deque[frozenset[bytes]] = deque()
        self._keys = 0

    def add(self, keys: Iterable[bytes]) -> None:
        """The next group."""
        named = frozenset(keys)
        self.group += 1
        self._groups.append(named)
        self._keys += len(named)
        while self._keys > KEYS_REMEMBERED_MAX:
            self._keys -= len(self._groups.popleft())

    def forget(self) -> None:
        """Values may be other than what the groups have left."""
        self.group += 1
        self._groups.clear()
        self._keys = 0

    def untouched(self, keys: Collection[bytes], since: int) -> bool:
        """Whether no group after the one of this number has named any of the keys. False may also mean that it is not
        known."""
        later = self.group - since
        if later > len(self._groups):
            return False
        return all(self._groups[-number].isdisjoint(keys) for number in range(1, later + 1))
