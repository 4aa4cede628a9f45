"""Walking a thread's records, metadata included, in chunks of bounded size.

Owns: the range of a thread's records, and how an entry becomes a record. Invariants: a chunk is one consistent view; it
holds at most `count_max` entries and ends with the first one that brings it to CHUNK_BYTES_MAX; nothing is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from progressdb_server.store import keyspace, record
from progressdb_server.store.engine import Reader

CHUNK_BYTES_MAX: Final = 1024 * 1024


class Record(NamedTuple):
    """A stored record: where it is, its bytes, its header, its key's id, and the part that only the key opens."""

    key: bytes
    raw: bytes
    head: bytes
    key_id: str
    sealed: bytes


class Chunk(NamedTuple):
    """`last` is the storage key of the last entry; `malformed` are entries that are no records."""

    records: list[Record]
    malformed: list[bytes]
    last: bytes

    @property
    def entries(self) -> int:
        return len(self.records) + len(self.malformed)


def bounds(thread: str) -> tuple[bytes, bytes]:
    """The range of the thread's records: its metadata, then its messages in order of their stamps."""
    prefix = b"thread:%b:" % keyspace.part(thread)
    return prefix, keyspace.after(prefix)


def end_of(reader: Reader, thread: str) -> bytes:
    """The end of what is there now: records that are written later come after it."""
    lower, upper = bounds(thread)
    newest = reader.scan(lower, upper, limit=1, reverse=True)
    return newest[0][0] + b"\0" if newest else lower


def chunks(reader: Reader, lower: bytes, upper: bytes, count_max: int) -> Iterator[Chunk]:
    """Every record from `lower` up to `upper`; each chunk is read when it is asked for."""
    while entries := reader.scan(lower, upper, limit=count_max, bytes_max=CHUNK_BYTES_MAX):
        records: list[Record] = []
        malformed: list[bytes] = []
        key_id = ""
        known: bytes | None = None
        for key, raw in entries:
            try:
                head, sealed = record.split(raw)
                if head != known:  # neighbours mostly have one header
                    key_id, known = record.key_of(head), head
            except record.RecordFormatError:
                malformed.append(key)
            else:
                records.append(Record(key, raw, head, key_id, sealed))
        last = entries[-1][0]
        lower = last + b"\0"
        yield Chunk(records, malformed, last)


def count(reader: Reader, lower: bytes, upper: bytes, count_max: int) -> Iterator[int]:
    """How many entries a range has, by parts of at most `count_max`."""
    while keys := reader.keys(lower, upper, limit=count_max):
        lower = keys[-1] + b"\0"
        yield len(keys)
