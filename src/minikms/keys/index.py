"""The index of all keys in memory, for listings and counts.

Owns: a table of key ids, sorted, with the thread, state and KEK version of each key, and the counts by state and by KEK
version. Invariants: a page of a listing is a slice of the table; a thread is kept as a 64-bit hash, so the caller
checks a page against the files; a key takes about 90 bytes. It must never be the authority: the key files are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from typing import Final, NamedTuple

from minikms.keys.dek import DekRecord, bytes_to_key_id, key_id_to_bytes

STATES: Final = ("active", "retired")
SCANNED_COUNT_MAX: Final = 20_000
"""Entries that one page looks at: about 2 ms of the event loop. So a filtered page may be short and have a next one."""


class Page(NamedTuple):
    """The key ids of a page. The next page begins after the id `next_after`, which is empty on the last page."""

    key_ids: list[str]
    next_after: str


class KeyIndex:
    def __init__(self) -> None:
        self._ids: list[bytes] = []
        self._threads = array("q")
        self._states = bytearray()
        self._keks = array("L")
        self.by_state: Counter[str] = Counter()
        self.by_kek: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._ids)

    def put(self, record: DekRecord, *, only_new: bool = False) -> None:
        """Adds or updates a key. With `only_new` a known key is not changed: a scan may have read an older record."""
        raw = key_id_to_bytes(record.id)
        at = bisect_left(self._ids, raw)
        state = STATES.index(record.state)
        if at < len(self._ids) and self._ids[at] == raw:
            if only_new:
                return
            self._uncount(at)
            self._states[at] = state
            self._keks[at] = record.kek_version
        else:
            self._ids.insert(at, raw)
            self._threads.insert(at, hash(record.thread_id))
            self._states.insert(at, state)
            self._keks.insert(at, record.kek_version)
        self.by_state[record.state] += 1
        self.by_kek[record.kek_version] += 1

    def remove(self, key_id: str) -> None:
        raw = key_id_to_bytes(key_id)
        at = bisect_left(self._ids, raw)
        if at < len(self._ids) and self._ids[at] == raw:
            self._uncount(at)
            del self._ids[at], self._threads[at], self._states[at], self._keks[at]

    def _uncount(self, at: int) -> None:
        self.by_state[STATES[self._states[at]]] -= 1
        self.by_kek[self._keks[at]] -= 1

    def page(self, *, after: str, limit: int, thread_id: str | None, state: str | None) -> Page:
        """Up to `limit` keys after the id `after` (empty: from the first one), in order of creation."""
        start = bisect_left(self._ids, key_id_to_bytes(after) + b"\0") if after else 0
        stop = min(len(self._ids), start + SCANNED_COUNT_MAX)
        thread = None if thread_id is None else hash(thread_id)
        code = None if state is None else STATES.index(state)
        found: list[str] = []
        at = start
        while at < stop and len(found) < limit:
            if (thread is None or self._threads[at] == thread) and (code is None or self._states[at] == code):
                found.append(bytes_to_key_id(self._ids[at]))
            at += 1
        return Page(found, bytes_to_key_id(self._ids[at - 1]) if at < len(self._ids) and at > start else "")
