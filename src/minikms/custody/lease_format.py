"""The formats of the lease journal and the lease snapshot, and floors: additions to the counts of ranges of keys.

Owns: the codecs of `kms-leases` and `kms-leases.snapshot` (docs/spec/leases.md), the reader of a snapshot, and the
arithmetic of floors.

The count of a key is an upper bound of its uses. Invariants:
- A key without a record counts as LEASE_USES_MAX: the creation of its file grants the first lease.
- A journal record raises the count of its key by at most LEASE_USES_MAX. So n lost records hide at most n times
  LEASE_USES_MAX uses of a key, and each lost record adds LEASE_USES_MAX uses to every key.
- A key up to `Floors.exhausted` encrypts no more, whatever its record says.
- Counts only grow. If a key has two records, the larger count is valid, so a journal may be replayed over a newer
  snapshot.
- A key whose count can't be read is spent: it encrypts no more.
- Opening a snapshot reads only footer and index (16 bytes for 170 keys), so a million keys do not slow down a start.
  A block is checked each time it is read, and a damaged block hides only the keys of its own range. Blocks are read
  with `pread` and not mapped, so a failing disk is an error and not a SIGBUS.

The checksums detect accidental damage. They are not keyed: a writer of these files can also put back older ones. It
must never write to a file.
"""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

LEASE_USES_MIN: Final = 64
LEASE_USES_MAX: Final = 1 << 16
"""A lease grows with the use of its key, from the smaller to the larger size."""
USES_LIMIT: Final = 1 << 32
"""NIST SP 800-38D section 8.3: at most 2^32 random 96-bit nonces under one key."""
USES_MAX: Final = USES_LIMIT - 16 * LEASE_USES_MAX
"""No lease goes beyond this. The margin of 16 leases covers losses that can't be counted (docs/spec/leases.md)."""
USES_WARN: Final = 1 << 31
"""A key with this many uses should be replaced."""

KEY_BYTES: Final = 16
KEY_LAST: Final = b"\xff" * KEY_BYTES

JOURNAL_MAGIC: Final = b"minikms-leases\0j"
FORMAT_VERSION: Final = 2
FORMAT_VERSIONS_READ: Final = (1, 2)
"""In version 1 each record raised its count by LEASE_USES_MAX, and a snapshot had no exhausted keys."""
RECORD_BYTES: Final = 32
HEADER_BYTES: Final = 32
GROUP_RECORDS_MAX: Final = 4096
"""Records of one append, which is also the largest torn append."""
DAMAGED_RECORDS_MAX: Final = 64
"""With more lost records than this (which add 2^22 uses to every key) a start is refused."""
STEPS_COUNT_MAX: Final = 64
SPENT_COUNT_MAX: Final = 32

_RECORD_LABEL: Final = b"minikms lease record v1\0"
_HEADER_LABEL: Final = b"minikms lease journal v1\0"
_TOTAL: Final = struct.Struct(">Q")
_HEADER: Final = struct.Struct(">16sI4x")


class LeaseFormatError(Exception):
    """A lease file that this version can't read. The text continues a sentence that names the file. Only used inside
    this package: `LeaseStore` raises StartError instead.
    """


class Step(NamedTuple):
    """Every key up to and including `last` has `uses` more uses than its record says."""

    last: bytes
    uses: int


class SpentRange(NamedTuple):
    """Keys from `first` to `last` (both included) that have no record are spent, since the record may be lost."""

    first: bytes
    last: bytes


class Floors(NamedTuple):
    """Additions to the counts of ranges of keys. Key ids sort by creation, so "every key that exists now" is a range.

    `steps` are sorted by `last`, and `uses` falls as `last` grows. The first step that covers a key applies to it.
    Every key up to and including `exhausted` only decrypts from then on; empty: there is none.
    """

    steps: tuple[Step, ...] = ()
    spent: tuple[SpentRange, ...] = ()
    exhausted: bytes = b""

    def added_uses(self, key: bytes) -> int:
        """The uses that the steps add to a key's record."""
        for step in self.steps:
            if key <= step.last:
                return step.uses
        return 0

    def is_exhausted(self, key: bytes) -> bool:
        """Whether the key only decrypts, whatever its record says."""
        return key <= self.exhausted

    def is_spent(self, key: bytes) -> bool:
        """Whether a spent range covers the key. It counts only for a key without a record."""
        return any(spent.first <= key <= spent.last for spent in self.spent)

    def with_uses_added(self, last: bytes, uses: int) -> Floors:
        """Floors that add `uses` more to every key up to `last`."""
        steps = [Step(step.last, step.uses + uses) if step.last <= last else step for step in self.steps]
        if all(step.last != last for step in steps):
            steps.append(Step(last, self.added_uses(last) + uses))
        steps.sort()
        while len(steps) > STEPS_COUNT_MAX:
            # The first two steps become one with the larger uses. That is conservative and leaves newer keys unchanged.
            steps[1] = Step(steps[1].last, steps[0].uses)
            del steps[0]
        return self._replace(steps=tuple(Step(step.last, min(step.uses, USES_LIMIT)) for step in steps))

    def with_spent(self, ranges: list[SpentRange]) -> Floors:
        """Floors with these ranges added. Too many ranges become one that covers them all."""
        spent = sorted({*self.spent, *ranges})
        if len(spent) > SPENT_COUNT_MAX:
            spent = [SpentRange(spent[0].first, max(one.last for one in spent))]
        return self._replace(spent=tuple(spent))

    def with_exhausted(self, last: bytes) -> Floors:
        """Floors under which every key up to `last` only decrypts. What was exhausted stays so."""
        return self._replace(exhausted=max(last, self.exhausted))


# --- the journal ------------------------------------------------------------------------------------------------------


class Journal(NamedTuple):
    """A journal as read. `totals`: the count of each key. `image`: the header and the good records."""

    totals: dict[bytes, int]
    image: bytearray
    torn_bytes: int
    damaged_records: int

    @property
    def lost_leases(self) -> int:
        """The number of leases that the count of a key may lack at most."""
        return self.damaged_records + (1 if self.torn_bytes else 0)


def journal_header(version: int = FORMAT_VERSION) -> bytes:
    """The header, which is all of an empty journal."""
    head = _HEADER.pack(JOURNAL_MAGIC, version)
    return head + _checksum(_HEADER_LABEL, head)


def encode_record(key: bytes, total: int) -> bytes:
    """A record: `key` (16 bytes) has the count `total`."""
    body = key + _TOTAL.pack(total)
    return body + _checksum(_RECORD_LABEL, body)


def parse_journal(content: bytes) -> Journal:
    """Reads a journal of any version. Raises LeaseFormatError for a foreign or damaged header. The image has the
    present version.

    At most one append is not synced, and no use of it was granted. So bad records at the end, up to one append of them,
    are a torn append. They count as one lost lease, since damage of the last durable record looks the same. Each bad
    record before a good one is damage and counts as one lost lease.
    """
    if content[:HEADER_BYTES] not in map(journal_header, FORMAT_VERSIONS_READ):
        raise LeaseFormatError(_why_unknown(content, JOURNAL_MAGIC))
    totals: dict[bytes, int] = {}
    image = bytearray(journal_header())
    bad = 0
    good_end = HEADER_BYTES
    bad_before_good = 0
    for start in range(HEADER_BYTES, len(content) - RECORD_BYTES + 1, RECORD_BYTES):
        record = content[start : start + RECORD_BYTES]
        if record[24:] != _checksum(_RECORD_LABEL, record[:24]):
            bad += 1
            continue
        key = record[:KEY_BYTES]
        total = int.from_bytes(record[KEY_BYTES:24], "big")
        if total > totals.get(key, 0):
            totals[key] = total
        image += record
        good_end = start + RECORD_BYTES
        bad_before_good = bad
    torn = len(content) - good_end
    beyond_one_append = max(0, torn // RECORD_BYTES - GROUP_RECORDS_MAX)
    return Journal(totals, image, torn, bad_before_good + beyond_one_append)


def _why_unknown(content: bytes, magic: bytes) -> str:
    """Why a header or footer is refused."""
    if content[:16] == magic and int.from_bytes(content[16:20], "big") not in FORMAT_VERSIONS_READ:
        return "was written by another version of this program"
    return "is damaged or is not one of this program's files"


def _checksum(label: bytes, body: bytes, size: int = 8) -> bytes:
    return hashlib.sha256(label + body).digest()[:size]


# --- the snapshot -----------------------------------------------------------------------------------------------------

SNAPSHOT_MAGIC: Final = b"minikms-leases\0s"
ENTRY_BYTES: Final = 24
BLOCK_BYTES: Final = 4096
BLOCK_ENTRIES: Final = 170
_BLOCK_DATA_BYTES: Final = BLOCK_ENTRIES * ENTRY_BYTES
_CHECKSUM_BYTES: Final = 16
"""Of a block and of the footer."""
_BLOCK_LABEL: Final = b"minikms lease block v1\0"
_FOOTER_LABEL: Final = b"minikms lease footer v1\0"
_FOOTER: Final = struct.Struct(">16sIIQII32s")
_STEP: Final = struct.Struct(">16sQ")


class BlockDamagedError(Exception):
    """The block that would hold the key can't be read, so its count is unknown. Only used inside this package."""


class _Footer(NamedTuple):
    blocks: int
    entries: int
    index_sha256: bytes
    floors: Floors


class Snapshot:
    """An open snapshot. It owns the descriptor until `close`. Several threads may read it at once: a listing looks up
    counts while the worker thread reserves or merges.
    """

    def __init__(self, fd: int) -> None:
        """Raises LeaseFormatError, or OSError from the disk; then the descriptor still belongs to the caller."""
        footer, index = _read_end(os.fstat(fd).st_size, lambda size, offset: _pread(fd, size, offset))
        self._fd = fd
        self._first_keys = [index[at : at + KEY_BYTES] for at in range(0, len(index), KEY_BYTES)]
        self.recent: tuple[int, bytes] = (-1, b"")
        """The number and the entries of the block that was read last."""
        self.entries = footer.entries
        self.floors = footer.floors

    def close(self) -> None:
        os.close(self._fd)

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._first_keys)

    def find(self, key: bytes) -> int | None:
        """The count of `key`, or None if it has no entry. Raises BlockDamagedError."""
        number = bisect_right(self._first_keys, key) - 1
        if number < 0:
            return None
        data = self.block(number)
        count = len(data) // ENTRY_BYTES
        at = ENTRY_BYTES * bisect_left(
            range(count), key, key=lambda entry: data[entry * ENTRY_BYTES : entry * ENTRY_BYTES + KEY_BYTES]
        )
        if data[at : at + KEY_BYTES] != key:
            return None
        return int.from_bytes(data[at + KEY_BYTES : at + ENTRY_BYTES], "big")

    def block(self, number: int) -> bytes:
        """The sorted entries of a block. Raises BlockDamagedError."""
        recent, data = self.recent  # one read of the attribute: another thread may replace it at any moment
        if recent == number:
            return data
        try:
            raw = _pread(self._fd, BLOCK_BYTES, number * BLOCK_BYTES)
        except OSError as error:
            raise BlockDamagedError from error
        data = raw[:_BLOCK_DATA_BYTES]
        if raw[_BLOCK_DATA_BYTES:] != _block_checksum(number, data):
            raise BlockDamagedError
        data = data[: min(BLOCK_ENTRIES, self.entries - number * BLOCK_ENTRIES) * ENTRY_BYTES]
        self.recent = (number, data)
        return data

    def block_range(self, number: int) -> SpentRange:
        """The range of keys whose entries are in this block, if they have one."""
        last = KEY_LAST
        if number + 1 < len(self._first_keys):
            last = (int.from_bytes(self._first_keys[number + 1], "big") - 1).to_bytes(KEY_BYTES, "big")
        return SpentRange(self._first_keys[number], last)


def check_snapshot(content: bytes) -> None:
    """Raises LeaseFormatError for bytes that `Snapshot` would not open."""
    _read_end(len(content), lambda size, offset: content[offset : offset + size])


def _read_end(file_size: int, read: Callable[[int, int], bytes]) -> tuple[_Footer, bytes]:
    """The footer and the index. `read(size, offset)` returns bytes of the file."""
    footer = _decode_footer(read(BLOCK_BYTES, max(0, file_size - BLOCK_BYTES)))
    index_bytes = footer.blocks * KEY_BYTES
    if file_size != footer.blocks * BLOCK_BYTES + index_bytes + BLOCK_BYTES:
        raise LeaseFormatError("is cut short or has bytes added")
    index = read(index_bytes, footer.blocks * BLOCK_BYTES)
    if hashlib.sha256(index).digest() != footer.index_sha256:
        raise LeaseFormatError("has a damaged index")
    return footer, index


def snapshot_chunks(old: Snapshot | None, totals: Mapping[bytes, int], floors: Floors) -> Iterator[bytes]:
    """The bytes of a new snapshot, in parts: the entries of the old one merged with `totals`; the larger count is kept.

    Memory is bounded by `totals`. A damaged block of the old snapshot becomes a spent range of the new one.
    """
    damaged: list[SpentRange] = []
    pending = bytearray()
    first_keys: list[bytes] = []
    entries = 0
    for run in _merged_runs(old, totals, damaged):
        entries += len(run) // ENTRY_BYTES
        pending += run
        while len(pending) >= _BLOCK_DATA_BYTES:
            yield _encode_block(len(first_keys), pending, first_keys)
    if pending:
        yield _encode_block(len(first_keys), pending, first_keys)
    index = b"".join(first_keys)
    yield index
    yield _encode_footer(_Footer(len(first_keys), entries, hashlib.sha256(index).digest(), floors.with_spent(damaged)))


def _merged_runs(old: Snapshot | None, totals: Mapping[bytes, int], damaged: list[SpentRange]) -> Iterator[bytes]:
    """The sorted entries of the new snapshot, in runs. Adds the range of each damaged block to `damaged`."""
    keys = sorted(totals)
    # The range of the last block has no end, so keys are left after the loop only if there is no block.
    taken = 0
    if old is not None:
        for number in range(len(old)):
            span = old.block_range(number)
            upto = bisect_right(keys, span.last, taken)
            try:
                block = old.block(number)
            except BlockDamagedError:
                damaged.append(span)
                block = b""
            yield _merge_block(block, keys[taken:upto], totals)
            taken = upto
    yield _merge_block(b"", keys[taken:], totals)


def _merge_block(block: bytes, keys: list[bytes], totals: Mapping[bytes, int]) -> bytes:
    if not keys:
        return block
    counts = {
        block[at : at + KEY_BYTES]: block[at + KEY_BYTES : at + ENTRY_BYTES] for at in range(0, len(block), ENTRY_BYTES)
    }
    for key in keys:
        counts[key] = max(totals[key].to_bytes(8, "big"), counts.get(key, b""))  # big-endian sorts as the numbers do
    return b"".join([key + counts[key] for key in sorted(counts)])


def _encode_block(number: int, pending: bytearray, first_keys: list[bytes]) -> bytes:
    data = bytes(pending[:_BLOCK_DATA_BYTES])
    del pending[:_BLOCK_DATA_BYTES]
    first_keys.append(data[:KEY_BYTES])
    data = data.ljust(_BLOCK_DATA_BYTES, b"\0")
    return data + _block_checksum(number, data)


def _block_checksum(number: int, data: bytes) -> bytes:
    return _checksum(_BLOCK_LABEL, number.to_bytes(4, "big") + data, _CHECKSUM_BYTES)


def _encode_footer(footer: _Footer) -> bytes:
    steps, spent, exhausted = footer.floors
    body = _FOOTER.pack(
        SNAPSHOT_MAGIC, FORMAT_VERSION, footer.blocks, footer.entries, len(steps), len(spent), footer.index_sha256
    )
    body += exhausted.ljust(KEY_BYTES, b"\0")
    body += b"".join([_STEP.pack(*step) for step in steps]) + b"".join([first + last for first, last in spent])
    body = body.ljust(BLOCK_BYTES - _CHECKSUM_BYTES, b"\0")
    return body + _checksum(_FOOTER_LABEL, body, _CHECKSUM_BYTES)


def _decode_footer(raw: bytes) -> _Footer:
    body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    intact = len(raw) == BLOCK_BYTES and checksum == _checksum(_FOOTER_LABEL, body, _CHECKSUM_BYTES)
    version = int.from_bytes(raw[16:20], "big")
    if not intact or raw[:16] != SNAPSHOT_MAGIC or version not in FORMAT_VERSIONS_READ:
        raise LeaseFormatError(_why_unknown(raw, SNAPSHOT_MAGIC))
    _, _, blocks, entries, step_count, spent_count, index_sha256 = _FOOTER.unpack_from(body)
    if step_count > STEPS_COUNT_MAX or spent_count > SPENT_COUNT_MAX or blocks != -(-entries // BLOCK_ENTRIES):
        raise LeaseFormatError("is inconsistent")
    at = _FOOTER.size
    exhausted = b""
    if version > 1:
        exhausted = body[at : at + KEY_BYTES] if any(body[at : at + KEY_BYTES]) else b""
        at += KEY_BYTES
    steps = [Step(*_STEP.unpack_from(body, at + _STEP.size * number)) for number in range(step_count)]
    at += _STEP.size * step_count
    spans = [body[at + 32 * number : at + 32 * number + 32] for number in range(spent_count)]
    spent = [SpentRange(span[:KEY_BYTES], span[KEY_BYTES:]) for span in spans]
    return _Footer(blocks, entries, index_sha256, Floors(tuple(steps), tuple(spent), exhausted))


def _pread(fd: int, size: int, offset: int) -> bytes:
    parts = []
    while size > 0 and (part := os.pread(fd, size, offset)):
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return b"".join(parts)
