"""The index of all keys in memory, for listings and counts.

Owns: a table of key ids, sorted, with the state and KEK version of each key and a tag, which is a 64-bit hash of
thread, purpose and state; the rows of all tags, sorted, which have the keys of each tag in order; the counts by state
and by KEK version; where a policy needs it, the thread of each key. Invariants: a page of a listing is a slice of the
table; a search and the page of a thread do no work for keys of another thread, purpose or state, however many there
are; tags may collide, so the caller checks what it finds against the files; a key takes about 60 bytes, and about 75
more with its thread; the look-up of a thread does the same work for a key that is not in the table. It must never be
the authority: the key files are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from heapq import merge
from itertools import islice
from struct import Struct
from typing import Final, NamedTuple, get_args

from minikms import api
from minikms.keys.dek import KEY_ID_BYTES, DekRecord, bytes_to_key_id, key_id_to_bytes

STATES: Final = ("active", "retired")
PURPOSES: Final[tuple[api.Purpose, ...]] = get_args(api.Purpose)
SCANNED_COUNT_MAX: Final = 20_000
"""Entries that one page looks at: about 2 ms of the event loop. So a filtered page may be short and have a next one."""
JUDGED_COUNT_MAX: Final = 1_000
"""The same of a page whose keys are compared with a policy, which takes longer."""
CHUNK_ROWS_MAX: Final = 512

HASH_KEY_BYTES: Final = 16

_TAG: Final = Struct(">Q")
_ID: Final = Struct(">QQ")
_ROW_BYTES: Final = _TAG.size + KEY_ID_BYTES
KEY_BYTES: Final = 3 * array("Q").itemsize + array("I").itemsize + 1 + _ROW_BYTES
"""What `KeyIndex.columns` has of each key, without its thread."""


class KeyPage(NamedTuple):
    """The key ids of a page. The next page begins after the id `next_after`, which is empty on the last page."""

    key_ids: list[str]
    next_after: str


class IndexEntry(NamedTuple):
    """What the index knows of a key. `tag`: of its thread, purpose and state."""

    tag: bytes
    state: str
    kek_version: int


class _Rows:
    """The rows of all keys, each a tag and a key id, sorted: chunks of up to CHUNK_ROWS_MAX rows."""

    def __init__(self, rows: bytes = b"") -> None:
        half = CHUNK_ROWS_MAX // 2 * _ROW_BYTES
        self._chunks = [bytearray(rows[at : at + half]) for at in range(0, len(rows) or 1, half)]
        self._firsts = [bytes(chunk[:_ROW_BYTES]) for chunk in self._chunks]
        """The first row of each chunk."""

    def joined(self) -> bytes:
        return b"".join(self._chunks)

    def _find(self, row: bytes) -> tuple[int, int]:
        """The number of a chunk, and the offset in it before which every row of it is less than `row`."""
        number = max(bisect_right(self._firsts, row) - 1, 0)
        chunk = self._chunks[number]
        offsets = range(0, len(chunk), _ROW_BYTES)
        at = bisect_left(offsets, row, key=lambda offset: bytes(chunk[offset : offset + _ROW_BYTES]))
        return number, at * _ROW_BYTES

    def add(self, row: bytes) -> None:
        """A row that is not there."""
        number, at = self._find(row)
        chunk = self._chunks[number]
        chunk[at:at] = row
        if at == 0:
            self._firsts[number] = row
        if len(chunk) > CHUNK_ROWS_MAX * _ROW_BYTES:
            middle = CHUNK_ROWS_MAX // 2 * _ROW_BYTES
            self._chunks.insert(number + 1, chunk[middle:])
            self._firsts.insert(number + 1, bytes(chunk[middle : middle + _ROW_BYTES]))
            del chunk[middle:]

    def remove(self, row: bytes) -> None:
        """A row that is there."""
        number, at = self._find(row)
        chunk = self._chunks[number]
        del chunk[at : at + _ROW_BYTES]
        if chunk or len(self._chunks) == 1:
            self._firsts[number] = bytes(chunk[:_ROW_BYTES])
        else:
            del self._chunks[number], self._firsts[number]

    def after(self, tag: bytes, raw: bytes) -> Iterator[bytes]:
        """The ids of the tag's keys after the id `raw` (empty: from the first one), ascending."""
        number, start = self._find(tag + raw + b"\0" if raw else tag)
        for chunk in islice(self._chunks, number, None):
            for at in range(start, len(chunk), _ROW_BYTES):
                if not chunk.startswith(tag, at):
                    return
                yield bytes(chunk[at + _TAG.size : at + _ROW_BYTES])
            start = 0

    def descending(self, tag: bytes) -> Iterator[bytes]:
        """The ids of the tag's keys, newest first."""
        number, end = self._find(tag + b"\xff" * (KEY_ID_BYTES + 1))
        chunk = self._chunks[number]
        while True:
            for at in range(end - _ROW_BYTES, -1, -_ROW_BYTES):
                if not chunk.startswith(tag, at):
                    return
                yield bytes(chunk[at + _TAG.size : at + _ROW_BYTES])
            if number == 0:
                return
            number -= 1
            chunk = self._chunks[number]
            end = len(chunk)


class KeyIndex:
    """`hash_key`: of the tags. 16 random bytes where others choose the threads, so that nobody makes tags collide."""

    def __init__(self, hash_key: bytes = bytes(HASH_KEY_BYTES)) -> None:
        self.hash_key = hash_key
        self.complete = False
        """Whether it has every key that can be read."""
        self._high, self._low = array("Q"), array("Q")
        """The two halves of each key id."""
        self._tags = array("Q")
        self._states = bytearray()
        self._keks = array("I")
        self._rows = _Rows()
        self._threads: list[bytes] | None = None
        self.by_state: Counter[str] = Counter()
        self.by_kek: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._tags)

    def columns(self) -> list[bytes]:
        """The whole index, KEY_BYTES of each key in the byte order of this machine; the last has their threads."""
        table = (self._high, self._low, self._tags, self._keks)
        threads = b"\n".join(self._threads or ())
        return [*(column.tobytes() for column in table), bytes(self._states), self._rows.joined(), threads]

    @classmethod
    def of_columns(cls, read: Callable[[int], bytes], count: int, threads_bytes: int, hash_key: bytes) -> KeyIndex:
        """A complete index from what `columns` gave. `read`: the next bytes of it."""
        index = cls(hash_key)
        for column in (index._high, index._low, index._tags, index._keks):
            column.frombytes(read(count * column.itemsize))
        index._states += read(count)
        index._rows = _Rows(read(count * _ROW_BYTES))
        if threads_bytes:
            index._threads = read(threads_bytes).split(b"\n")
        index.by_state.update({state: index._states.count(code) for code, state in enumerate(STATES)})
        index.by_kek.update(index._keks)
        index.complete = True
        return index

    def entry(self, key_id: str) -> IndexEntry | None:
        """What the index has of a key; None if it does not have it."""
        at, known = self._find(key_id_to_bytes(key_id))
        return IndexEntry(_TAG.pack(self._tags[at]), STATES[self._states[at]], self._keks[at]) if known else None

    def entry_of(self, record: DekRecord) -> IndexEntry:
        """What the index has of a key with this record."""
        return IndexEntry(self._tag(record.thread_id, record.purpose, record.state), record.state, record.kek_version)

    def _find(self, raw: bytes) -> tuple[int, bool]:
        """The place of an id (16 bytes) in the table, and whether it is there: the same work whether it is or not."""
        high, low = _ID.unpack(raw)
        first = bisect_left(self._high, high)
        last = bisect_right(self._high, high, first)
        at = bisect_left(self._low, low, first, last)
        return at, at < bisect_right(self._low, low, at, last)

    def _raw(self, at: int) -> bytes:
        return _ID.pack(self._high[at], self._low[at])

    def _tag(self, thread_id: str, purpose: api.Purpose, state: str) -> bytes:
        return blake2b(f"{thread_id} {purpose} {state}".encode(), digest_size=_TAG.size, key=self.hash_key).digest()

    def kek_version(self, key_id: str) -> int | None:
        at, known = self._find(key_id_to_bytes(key_id))
        return self._keks[at] if known else None

    def under_other_keks(self, kek_version: int, *, after: bytes, limit: int) -> tuple[list[str], bytes | None]:
        """Up to `limit` keys that are not under this KEK version, in order, with ids (16 bytes) after `after` (empty:
        from the first one); and the id after which to go on, None at the end. It looks at SCANNED_COUNT_MAX entries.
        """
        at = self._after(after)
        stop = min(len(self), at + SCANNED_COUNT_MAX)
        key_ids: list[str] = []
        while at < stop and len(key_ids) < limit:
            if self._keks[at] != kek_version:
                key_ids.append(bytes_to_key_id(self._raw(at)))
            at += 1
        return key_ids, self._raw(at - 1) if at < len(self) else None

    def _after(self, raw: bytes) -> int:
        """The place of the first key after the id `raw`; empty: of the first key."""
        at, known = self._find(raw) if raw else (0, False)
        return at + known

    def put(self, record: DekRecord, *, only_new: bool = False) -> None:
        """Adds or updates a key. With `only_new` a known key is not changed: a scan may have read an older record."""
        raw = key_id_to_bytes(record.id)
        at, known = self._find(raw)
        if known and only_new:
            return
        tag = self.entry_of(record).tag
        if known:
            self._forget(at, raw)
        else:
            high, low = _ID.unpack(raw)
            self._high.insert(at, high)
            self._low.insert(at, low)
            self._tags.insert(at, 0)
            self._states.insert(at, 0)
            self._keks.insert(at, 0)
            if self._threads is not None:
                self._threads.insert(at, b"")
        (self._tags[at],) = _TAG.unpack(tag)
        self._states[at] = STATES.index(record.state)
        self._keks[at] = record.kek_version
        if self._threads is not None:
            self._threads[at] = record.thread_id.encode("ascii")
        self._rows.add(tag + raw)
        self.by_state[record.state] += 1
        self.by_kek[record.kek_version] += 1

    def set_kek(self, raws: Sequence[bytes], kek_version: int) -> list[bytes]:
        """Sets the KEK version of keys, by the 16 bytes of their ids. Returns the ids that the index does not have."""
        keks, by_kek = self._keks, self.by_kek
        missing: list[bytes] = []
        for raw in raws:
            at, known = self._find(raw)
            if not known:
                missing.append(raw)
                continue
            by_kek[keks[at]] -= 1
            by_kek[kek_version] += 1
            keks[at] = kek_version
        return missing

    def remove(self, key_id: str) -> None:
        raw = key_id_to_bytes(key_id)
        at, known = self._find(raw)
        if known:
            self._forget(at, raw)
            del self._high[at], self._low[at], self._tags[at], self._states[at], self._keks[at]
            if self._threads is not None:
                del self._threads[at]

    def _forget(self, at: int, raw: bytes) -> None:
        """Takes a key out of the rows and counts."""
        self._rows.remove(_TAG.pack(self._tags[at]) + raw)
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
    ) -> KeyPage:
        """Up to `limit` keys after the id `after` (empty: from the first one), in order of creation. `visible`: only
        keys of threads for which it is true, after `keep_threads`; then `next_after` may be the id of a key of another
        thread. It is asked about each key, whatever `state` is, so that the work does not depend on how many keys of
        other threads match it.
        """
        raw = key_id_to_bytes(after) if after else b""
        if thread_id is not None:
            return self._page_of(thread_id, STATES if state is None else (state,), raw, limit, visible)
        start = at = self._after(raw)
        stop = min(len(self), start + (SCANNED_COUNT_MAX if visible is None else JUDGED_COUNT_MAX))
        code = None if state is None else STATES.index(state)
        key_ids: list[str] = []
        while at < stop and len(key_ids) < limit:
            if (visible is None or visible(self._thread_at(at))) and (code is None or self._states[at] == code):
                key_ids.append(bytes_to_key_id(self._raw(at)))
            at += 1
        return KeyPage(key_ids, bytes_to_key_id(self._raw(at - 1)) if at < len(self) and at > start else "")

    def _page_of(
        self, thread_id: str, states: Sequence[str], raw: bytes, limit: int, visible: Callable[[str], bool] | None
    ) -> KeyPage:
        if visible is not None and not visible(thread_id):
            return KeyPage([], "")
        tags = [self._tag(thread_id, purpose, state) for purpose in PURPOSES for state in states]
        rows = merge(*(self._rows.after(tag, raw) for tag in tags))
        key_ids = [bytes_to_key_id(each) for each in islice(rows, limit)]
        return KeyPage(key_ids, key_ids[-1] if key_ids and next(rows, None) is not None else "")

    def keep_threads(self) -> None:
        """Keeps the thread of each key from now on. Call it while the index is empty. Raises ValueError otherwise."""
        if len(self):
            raise ValueError("the index has keys already, whose threads it does not know")
        self._threads = []

    def thread_near(self, key_id: str) -> tuple[str, bool]:
        """The thread of a key, and True. For a key that the index does not have: the thread of a key beside it, or
        `""`, and False; so a caller can do the same work for both. Only after `keep_threads`. Raises
        InvalidRequestError for a malformed id.
        """
        at, known = self._find(key_id_to_bytes(key_id))
        return (self._thread_at(min(at, len(self) - 1)), known) if len(self) else ("", False)

    def _thread_at(self, at: int) -> str:
        if self._threads is None:
            raise ValueError("the index does not keep threads")
        return self._threads[at].decode("ascii")

    def newest_of(self, thread_id: str) -> Iterator[str]:
        """The ids of the thread's keys, newest first. Tags may collide, so the caller checks.

        The index must not change between two steps.
        """
        tags = [self._tag(thread_id, purpose, state) for purpose in PURPOSES for state in STATES]
        return map(bytes_to_key_id, merge(*map(self._rows.descending, tags), reverse=True))

    def active_of(self, thread_id: str, purpose: api.Purpose) -> Iterator[str]:
        """The ids of the thread's active keys of this purpose, newest first. Tags may collide, so the caller checks.

        The index must not change between two steps.
        """
        return map(bytes_to_key_id, self._rows.descending(self._tag(thread_id, purpose, "active")))
