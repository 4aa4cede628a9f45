"""The key files that can't be read, with the reason of each.

Owns: the list that `/status` shows. Invariants: a key is on it from the first failure to read its file until the file
was read well again, or the key destroyed; it is bounded. Lives in the loop's thread. It must never be the reason to
refuse another key.
"""

from __future__ import annotations

import itertools
from typing import Final

NOTED_COUNT_MAX: Final = 10_000
LISTED_COUNT_MAX: Final = 100


class Damage:
    def __init__(self) -> None:
        self._noted: dict[str, str] = {}
        self.complete = True
        """False once there was no room for one: then it can't be known from here which keys are sound."""

    def note(self, key_id: str, why: str) -> None:
        """Its file can't be read, or does not open. `why` is for an operator."""
        if key_id in self._noted or len(self._noted) < NOTED_COUNT_MAX:
            self._noted[key_id] = why
        else:
            self.complete = False

    def clear(self, key_id: str) -> None:
        """Its file was read well, or is gone for good."""
        self._noted.pop(key_id, None)

    @property
    def count(self) -> int:
        """At most NOTED_COUNT_MAX."""
        return len(self._noted)

    def key_ids(self) -> frozenset[str]:
        return frozenset(self._noted)

    def listed(self) -> dict[str, str]:
        """Some of them, by key id, each with its reason."""
        return dict(itertools.islice(self._noted.items(), LISTED_COUNT_MAX))
