"""The index of all keys in memory, for listings and counts.

Owns: a table of key ids, sorted, with the state and KEK version of each key and a tag, which is a 64-bit hash of
thread, purpose and state; the counts by state and by KEK version; the search for the active keys of a thread and
purpose; where a policy needs it, the thread of each key. Invariants: a page of a listing is a slice of the table; tags
may collide, so the caller checks what it finds against the files; a key takes about 90 bytes, and about 75 more with
its thread; a search does no work for keys of another purpose or state, however many the thread has; the look-up of a
thread does the same work for a key that is not in the table. It must never be the authority: the key files are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from sys import byteorder
from typing import Final, NamedTuple, get_args

from minikms import api
from minikms.keys.dek import DekRecord, bytes_to_key_id, key_id_to_bytes

STATES: Final = ("active", "retired")
PURPOSES: Final[tuple[api.Purpose, ...]] = get_args(api.Purpose)
_TAG_BYTES: Final = array("q").itemsize
SCANNED_COUNT_MAX: Final = 20_000
"""Entries that one page looks at: about 2 ms of the event loop. So a filtered page may be short and have a next one."""
JUDGED_COUNT_MAX: Final = 1_000
"""The same of a page whose keys are compared with a policy, which takes longer."""
SEARCHED_COUNT: Final = 65_536
"""Tags that a search copies at a time (512 KiB). A search of 1,000,000 keys takes about 5 ms."""


class Page(NamedTuple):
    """The key ids of a page. The next page begins after the id `next_after`, which is empty on the last page."""

    key_ids: list[str]
    next_after: str


def _tag(thread_id: str, purpose: api.Purpose, state: str) -> int:
    return hash((thread_id, purpose, state))


class KeyIndex:
    def __init__(self) -> None:
        self._ids: list[bytes] = []
        self._tags = array("q")
        self._states = bytearray()
        self._keks = array("L")
        self._threads: list[bytes] | None = None
        self.by_state: Counter[str] = Counter()
        self.by_kek: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._ids)

    def kek_version(self, key_id: str) -> int | None:
        """The KEK version of a key; None if the index does not have the key."""
        raw = key_id_to_bytes(key_id)
        at = bisect_left(self._ids, raw)
        return self._keks[at] if at < len(self._ids) and self._ids[at] == raw else None

    def under_other_keks(self, kek_version: int, *, after: bytes, limit: int) -> tuple[list[str], bytes | None]:
        """Up to `limit` keys that are not under this KEK version, in order, with ids (16 bytes) after `after` (empty:
        from the first one); and the id after which to go on, None at the end. It looks at SCANNED_COUNT_MAX entries.
        """
        at = bisect_right(self._ids, after)
        stop = min(len(self._ids), at + SCANNED_COUNT_MAX)
        found: list[str] = []
        while at < stop and len(found) < limit:
            if self._keks[at] != kek_version:
                found.append(bytes_to_key_id(self._ids[at]))
            at += 1
        return found, self._ids[at - 1] if at < len(self._ids) else None

    def put(self, record: DekRecord, *, only_new: bool = False) -> None:
        """Adds or updates a key. With `only_new` a known key is not changed: a scan may have read an older record."""
        raw = key_id_to_bytes(record.id)
        at = bisect_left(self._ids, raw)
        state = STATES.index(record.state)
        tag = _tag(record.thread_id, record.purpose, record.state)
        if at < len(self._ids) and self._ids[at] == raw:
            if only_new:
                return
            self._uncount(at)
            self._tags[at] = tag
            self._states[at] = state
            self._keks[at] = record.kek_version
            if self._threads is not None:
                self._threads[at] = record.thread_id.encode("ascii")
        else:
            self._ids.insert(at, raw)
            self._tags.insert(at, tag)
            self._states.insert(at, state)
            self._keks.insert(at, record.kek_version)
            if self._threads is not None:
                self._threads.insert(at, record.thread_id.encode("ascii"))
        self.by_state[record.state] += 1
        self.by_kek[record.kek_version] += 1

    def set_kek(self, raws: Sequence[bytes], kek_version: int) -> list[bytes]:
        """Sets the KEK version of keys, by the 16 bytes of their ids; ascending ids take the least time. Returns the
        ids that the index does not have.
        """
        ids, keks, by_kek = self._ids, self._keks, self.by_kek
        missing: list[bytes] = []
        at = 0
        for raw in raws:
            if at >= len(ids) or ids[at] != raw:
                at = bisect_left(ids, raw)
                if at >= len(ids) or ids[at] != raw:
                    missing.append(raw)
                    continue
            by_kek[keks[at]] -= 1
            by_kek[kek_version] += 1
            keks[at] = kek_version
            at += 1
        return missing

    def remove(self, key_id: str) -> None:
        raw = key_id_to_bytes(key_id)
        at = bisect_left(self._ids, raw)
        if at < len(self._ids) and self._ids[at] == raw:
            self._uncount(at)
            del self._ids[at], self._tags[at], self._states[at], self._keks[at]
            if self._threads is not None:
                del self._threads[at]

    def _uncount(self, at: int) -> None:
        self.by_state[STATES[self._states[at]]] -= 1
        self.by_kek[self._keks[at]] -= 1

    def page(
        self,
        *,
        after: str,
        limit: int,
        thread_id: str | None,
        state: str | None,
        visible: Callable[[str], bool] | None = None,
    ) -> Page:
        """Up to `limit` keys after the id `after` (empty: from the first one), in order of creation. `visible`: only
        keys of threads for which it is true, after `keep_threads`; then `next_after` may be the id of a key of another
        thread. It is asked about each key, whatever `thread_id` and `state` are, so that the work does not depend on
        how many keys of other threads match them.
        """
        start = bisect_left(self._ids, key_id_to_bytes(after) + b"\0") if after else 0
        stop = min(len(self._ids), start + (SCANNED_COUNT_MAX if visible is None else JUDGED_COUNT_MAX))
        code = None if state is None else STATES.index(state)
        tags = None
        if thread_id is not None:
            states = STATES if state is None else (state,)
            tags = {_tag(thread_id, purpose, each) for purpose in PURPOSES for each in states}
        found: list[str] = []
        at = start
        while at < stop and len(found) < limit:
            if (
                (visible is None or visible(self._thread_at(at)))
                and (code is None or self._states[at] == code)
                and (tags is None or self._tags[at] in tags)
            ):
                found.append(bytes_to_key_id(self._ids[at]))
            at += 1
        return Page(found, bytes_to_key_id(self._ids[at - 1]) if at < len(self._ids) and at > start else "")

    def keep_threads(self) -> None:
        """Keeps the thread of each key from now on. Call it while the index is empty. Raises ValueError otherwise."""
        if self._ids:
            raise ValueError("the index has keys already, whose threads it does not know")
        self._threads = []

    def thread_near(self, key_id: str) -> tuple[str, bool]:
        """The thread of a key, and True. For a key that the index does not have: the thread of a key beside it, or
        `""`, and False; so a caller can do the same work for both. Only after `keep_threads`. Raises
        InvalidRequestError for a malformed id.
        """
        raw = key_id_to_bytes(key_id)
        ids = self._ids
        if not ids:
            return "", False
        at = min(bisect_left(ids, raw), len(ids) - 1)
        return self._thread_at(at), ids[at] == raw

    def _thread_at(self, at: int) -> str:
        if self._threads is None:
            raise ValueError("the index does not keep threads")
        return self._threads[at].decode("ascii")

    def active_of(self, thread_id: str, purpose: api.Purpose) -> Iterator[str]:
        """The ids of the thread's active keys of this purpose, newest first. Tags may collide, so the caller checks.

        The index must not change between two steps.
        """
        wanted = _tag(thread_id, purpose, "active").to_bytes(_TAG_BYTES, byteorder, signed=True)
        stop = len(self._ids)
        while stop > 0:
            start = max(0, stop - SEARCHED_COUNT)
            tags = self._tags[start:stop].tobytes()
            end = len(tags)
            while (at := tags.rfind(wanted, 0, end)) >= 0:
                index, misaligned = divmod(at, _TAG_BYTES)
                if not misaligned:
                    yield bytes_to_key_id(self._ids[start + index])
                end = at + _TAG_BYTES - 1
            stop = start
