"""What is known of every key without opening its file: for listings and counts.

Owns: a sorted table of key ids with thread, state and KEK version of each, and the counts over it. Invariants: ids
are sorted, so that a page is a slice; a thread is kept as a 64-bit hash (a page is checked against the files); some
90 bytes a key. It must never be the authority: files are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from typing import Final, NamedTuple

from minikms.keys.dek import DekRecord
from minikms.keys.ids import bytes_to_key_id, key_id_to_bytes

STATES: Final = ("active", "retired")
SCANNED_COUNT_MAX: Final = 20_000
"""Entries that one page looks at: some 2 ms of the loop's time. A filtered page may be short and still have a next."""


class Page(NamedTuple):
    """Key ids of a page; `next_after` is the id to go on after, or empty on the last page."""

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
        """Takes a record over. `only_new`: a key that is here already is left as it is (a scan reads what may be
        older).
        """
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
        """Up to `limit` keys after the id `after` ("" for the start), in order of id, which is order of creation."""
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
