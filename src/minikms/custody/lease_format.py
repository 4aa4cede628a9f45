"""The format of the lease journal, and floors: additions to the counts of whole ranges of keys.

Owns: the codec of `kms-leases`, and the arithmetic of floors. docs/spec/leases.md has the layout. Pure: no I/O. The
format of `kms-leases.snapshot` is in `minikms.custody.lease_store`.

The count of a key is an upper bound of its uses. Invariants:
- A key without a record counts as LEASE_USES: the creation of its file grants the first lease.
- A journal record raises the count of its key by exactly one lease. So n lost records hide at most n leases of a key.
- Counts only grow. Of two records of a key the larger holds, so a journal may be replayed over a newer snapshot.
- An unreadable count is taken as spent, never as unused.

The checksums detect accidental damage. They are not keyed: a writer of these files can also put back older ones.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NamedTuple

LEASE_USES: Final = 1 << 16
USES_LIMIT: Final = 1 << 32
"""NIST SP 800-38D section 8.3: at most 2^32 random 96-bit nonces under one key."""
USES_MAX: Final = USES_LIMIT - 16 * LEASE_USES
"""No lease goes beyond this. The margin of 16 leases covers losses that can't be counted (docs/spec/leases.md)."""
USES_WARN: Final = 1 << 31
"""A key with so many uses should be replaced."""
RESTORE_USES: Final = 1 << 30
"""Added to every key of a restored data directory: uses after the backup are not in it."""

KEY_BYTES: Final = 16
KEY_LAST: Final = b"\xff" * KEY_BYTES

JOURNAL_MAGIC: Final = b"minikms-leases\0j"
FORMAT_VERSION: Final = 1
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

    `steps` are sorted by `last`, and `uses` falls as `last` grows. Of the steps that cover a key the first one holds.
    """

    steps: tuple[Step, ...] = ()
    spent: tuple[SpentRange, ...] = ()

    def added_uses(self, key: bytes) -> int:
        """The uses that the steps add to a key's record."""
        for step in self.steps:
            if key <= step.last:
                return step.uses
        return 0

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
        return Floors(tuple(Step(step.last, min(step.uses, USES_LIMIT)) for step in steps), self.spent)

    def with_spent(self, ranges: list[SpentRange]) -> Floors:
        """Floors with these ranges added. Too many ranges become one that covers them all."""
        spent = sorted({*self.spent, *ranges})
        if len(spent) > SPENT_COUNT_MAX:
            spent = [SpentRange(spent[0].first, max(one.last for one in spent))]
        return Floors(self.steps, tuple(spent))


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


def journal_header() -> bytes:
    """The header, which is all of an empty journal."""
    head = _HEADER.pack(JOURNAL_MAGIC, FORMAT_VERSION)
    return head + _checksum(_HEADER_LABEL, head)


def encode_record(key: bytes, total: int) -> bytes:
    """A record: `key` (16 bytes) has the count `total`."""
    body = key + _TOTAL.pack(total)
    return body + _checksum(_RECORD_LABEL, body)


def parse_journal(content: bytes) -> Journal:
    """Reads a journal. Raises LeaseFormatError for a foreign or damaged header.

    At most one append is not synced, and no use of it was granted. So bad records at the end, up to one append of them,
    are a torn append. They count as one lost lease, since damage of the last durable record looks the same. Each bad
    record before a good one is damage and counts as one lost lease.
    """
    if content[:HEADER_BYTES] != journal_header():
        raise LeaseFormatError(why_unknown(content, JOURNAL_MAGIC))
    totals: dict[bytes, int] = {}
    image = bytearray(content[:HEADER_BYTES])
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


def why_unknown(content: bytes, magic: bytes) -> str:
    """Why a header or footer with other bytes than expected is refused; continues a sentence that names the file."""
    if content[:16] == magic and content[16:20] != FORMAT_VERSION.to_bytes(4, "big"):
        return "was written by another version of this program"
    return "is damaged or is not one of this program's files"


def _checksum(label: bytes, body: bytes) -> bytes:
    return hashlib.sha256(label + body).digest()[:8]
