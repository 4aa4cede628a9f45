"""Validators: whether a list of a thread's messages is still what this process has given before, without opening it.

Owns: the tag of a list, and the bounded memory of lists that were given whole. Invariants:
- A tag is a keyed digest of what was asked for, of the key that the thread is written under, and of the thread's newest
  record. Every change of a message (a version, a reaction, a tombstone) is a record with a newer stamp.
- The key of the digest is random and belongs to one process. No tag outlives a restart, which may follow a restore, a
  repair or another version of the program.
- A list counts as unchanged only if all of it was given under the tag, every record opened, and nothing was written to
  the thread meanwhile. The keys that opened it are remembered with it, because a list changes without a write when one
  of them is destroyed.
It must never hold a message.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Collection
from typing import Final

LISTS_REMEMBERED_MAX: Final = 8192
"""The least recently used one is forgotten first; it is then sent again."""
KEYS_OF_A_LIST_MAX: Final = 16
"""A list under more keys is not remembered."""
TAG_BYTES: Final = 16
"""The size of the digest; a tag is its hex text."""


class Validators:
    def __init__(self, *, remembers: bool = True) -> None:
        """`remembers`: false where another server may put records back under other keys."""
        self._remembers = remembers
        self._secret = os.urandom(32)
        self._given: OrderedDict[str, frozenset[str]] = OrderedDict()

    def tag(self, *parts: bytes | None) -> str:
        """The tag of these parts, None being one of its own."""
        digest = hashlib.blake2b(key=self._secret, digest_size=TAG_BYTES)
        for part in parts:
            digest.update(b"-" if part is None else b"%d:%b" % (len(part), part))
        return digest.hexdigest()

    def remember(self, tag: str, key_ids: Collection[str]) -> None:
        """The list was given whole, and these keys opened it."""
        if not self._remembers or len(key_ids) > KEYS_OF_A_LIST_MAX:
            return
        self._given[tag] = frozenset(key_ids)
        self._given.move_to_end(tag)
        if len(self._given) > LISTS_REMEMBERED_MAX:
            self._given.popitem(last=False)

    def keys_of(self, tag: str) -> frozenset[str] | None:
        """The keys that opened the list; None if it was not given, or that is forgotten."""
        keys = self._given.get(tag)
        if keys is not None:
            self._given.move_to_end(tag)
        return keys

    def forget(self) -> None:
        """Stored values may differ from those that were read."""
        self._given.clear()
