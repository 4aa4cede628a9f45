"""`progressdb store copy`: all entries of a store, into a store of either engine.

Owns: which entries are copied, their digest, and the steps. Invariants:
- The source is not changed, and no server uses it meanwhile.
- The target is empty, or holds what an earlier call for the same source has left. Until the copy has ended no server
  opens it.
- Each call looks at every entry of both sides and puts only what differs, so that a copy that was killed is continued
  by the same call, also if the source was changed in between.
- It has ended when both sides have as many entries, with the same digest.
- Claims are not copied: a server that works on a thread claims it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec

from progressdb_server.store import keyspace, places
from progressdb_server.store.engine import Counters
from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.model import FormatError
from progressdb_server.store.offline import Entries, View

_OF_ONE_ENGINE: Final = (keyspace.FORMAT, keyspace.STATE)
_DIGEST_BYTES: Final = 32


class CopyError(Exception):
    """The text says why."""


class Copied(NamedTuple):
    """The number of entries, and the digest of all of them in hexadecimal digits."""

    entries: int
    digest: str
    changed: int
    """Entries that this call put or deleted."""
    counted: Counters


@dataclass
class Digest:
    """A digest over entries in any order: the sum of their SHA-256 modulo 2^256. It finds accidents; it does not resist
    somebody who chooses entries, since records authenticate their own place.
    """

    count: int = 0
    sum: int = 0

    def add(self, key: bytes, value: bytes) -> None:
        self.count += 1
        hashed = hashlib.sha256(len(key).to_bytes(4, "big") + key + value).digest()
        self.sum = (self.sum + int.from_bytes(hashed, "big")) % (1 << 8 * _DIGEST_BYTES)

    @property
    def text(self) -> str:
        return self.sum.to_bytes(_DIGEST_BYTES, "big").hex()


async def copy(source: str, target: str, progress: Callable[[int, int], None]) -> Copied:
    """`source`, `target`: the URL of a database, or the directory of a store's files. `progress` is called with the
    number of stored versions of messages that were copied, and of all.

    Raises CopyError, FormatError, StoreLockedError, StoreUnavailableError.
    """
    if source == target:
        raise FormatError("source and target are the same")
    async with places.alone(source) as old, places.open_copy(target, source) as new:
        counted = Counters.parse(await old.get(keyspace.STATE))
        count, changed, newest = await _bring(old, new, lambda done: progress(done, counted.messages))
        counted = Counters.of(counted.threads, counted.messages, max(counted.last, newest))
        digest = await _digest(new)
        if digest != count:
            changed += await _remove_others(old, new)
            digest = await _digest(new)
        await new.put([(keyspace.STATE, msgspec.msgpack.encode(counted))])
        if digest != count:
            raise CopyError(f"the copy has {digest.count:,} entries that differ from the {count.count:,} of the source")
    return Copied(count.count, count.text, changed, counted)


async def _bring(old: View, new: Entries, progress: Callable[[int], None]) -> tuple[Digest, int, Stamp]:
    """Put what is missing or differs. The digest of the source, how many entries were put, and the newest stamp."""
    digest = Digest()
    changed = messages = 0
    newest = Stamp(0, 0)
    async for page in old.walk():
        entries = {key: value for key, value in page if _is_copied(key)}
        for key, value in entries.items():
            digest.add(key, value)
            if keyspace.is_version(key):
                messages += 1
                newest = newest.or_later(key[-keyspace.STAMP_BYTES :])
        there = await new.values(entries)
        puts = [(key, value) for key, value in entries.items() if there.get(key) != value]
        if puts:
            await new.put(puts)
            changed += len(puts)
        progress(messages)
    return digest, changed, newest


async def _digest(side: View) -> Digest:
    digest = Digest()
    async for page in side.walk():
        for key, value in page:
            if _is_copied(key):
                digest.add(key, value)
    return digest


async def _remove_others(old: Entries, new: Entries) -> int:
    """Entries that an earlier call has copied, and the source has no more."""
    removed = 0
    async for page in new.walk():
        keys = [key for key, _ in page if _is_copied(key)]
        there = await old.values(keys)
        removals: list[tuple[bytes, None]] = [(key, None) for key in keys if key not in there]
        if removals:
            await new.put(removals)
            removed += len(removals)
    return removed


def _is_copied(key: bytes) -> bool:
    return key not in _OF_ONE_ENGINE and not key.startswith((keyspace.CLAIMS, keyspace.SERVERS))
