"""The bytes of the lease files: journal records, and the floors that lift many keys at once.

Owns: the codec of `kms-leases` and the arithmetic of floors; docs/spec/leases.md has the layout. Pure: no I/O. The file
`kms-leases.snapshot` is in `leasesnapshot`.

The count of a key is an upper bound of its uses ever made. Invariants:
- A key without a record counts as `LEASE_USES`: its first lease is granted by the file that creates it.
- A journal record raises its key's count by exactly one lease, so n lost records hide at most n leases of any one key.
- Counts only grow: of two records of a key the larger holds, so a journal may be replayed over a newer snapshot.
- What can't be read counts as spent, never as unused.
The checksums find accidents. They are not keyed: who can write these files can also put back older ones.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NamedTuple

LEASE_USES: Final = 1 << 16
USES_LIMIT: Final = 1 << 32
"""NIST SP 800-38D section 8.3: at most 2^32 random 96-bit nonces under one key."""
USES_MAX: Final = USES_LIMIT - 16 * LEASE_USES
"""No lease passes this. The margin is for what the bound of lost records can't see (docs/spec/leases.md)."""
USES_WARN: Final = 1 << 31
RESTORE_USES: Final = 1 << 30

KEY_BYTES: Final = 16
KEY_LAST: Final = b"\xff" * KEY_BYTES

JOURNAL_MAGIC: Final = b"minikms-leases\0j"
FORMAT_VERSION: Final = 1
RECORD_BYTES: Final = 32
HEADER_BYTES: Final = 32
GROUP_RECORDS_MAX: Final = 4096
"""Of one append, and so of a torn one."""
DAMAGED_RECORDS_MAX: Final = 64
"""More lost records than this (2^22 uses added to every key) is not an accident to go on from."""
STEPS_COUNT_MAX: Final = 64
SPENT_COUNT_MAX: Final = 32

_RECORD_LABEL: Final = b"minikms lease record v1\0"
_HEADER_LABEL: Final = b"minikms lease journal v1\0"
_TOTAL: Final = struct.Struct(">Q")
_HEADER: Final = struct.Struct(">16sI4x")


class LeaseFormatError(Exception):
    """A lease file that this version can't make sense of. Inside the room; `LeaseStore` turns it into a StartError."""


class Step(NamedTuple):
    """Every key up to and including `last` has had `uses` more than its record says."""

    last: bytes
    uses: int


class SpentRange(NamedTuple):
    """Keys from `first` to `last` (both included) without a record: the record may be lost, so they are spent."""

    first: bytes
    last: bytes


class Floors(NamedTuple):
    """What holds for ranges of keys. Key ids order by creation, so "every key that exists now" is a range.

    `steps` are sorted by `last`, and `uses` falls as `last` grows; of the steps that cover a key the first one holds.
    """

    steps: tuple[Step, ...] = ()
    spent: tuple[SpentRange, ...] = ()

    def added_uses(self, key: bytes) -> int:
        for step in self.steps:
            if key <= step.last:
                return step.uses
        return 0

    def is_spent(self, key: bytes) -> bool:
        return any(spent.first <= key <= spent.last for spent in self.spent)

    def penalised(self, last: bytes, uses: int) -> Floors:
        """Floors under which every key up to `last` has `uses` more."""
        steps = [Step(step.last, step.uses + uses) if step.last <= last else step for step in self.steps]
        if all(step.last != last for step in steps):
            steps.append(Step(last, self.added_uses(last) + uses))
        steps.sort()
        while len(steps) > STEPS_COUNT_MAX:
            # The oldest keys' step takes in the next: conservative, and it changes nothing for newer keys.
            steps[1] = Step(steps[1].last, steps[0].uses)
            del steps[0]
        return Floors(tuple(Step(step.last, min(step.uses, USES_LIMIT)) for step in steps), self.spent)

    def with_spent(self, ranges: list[SpentRange]) -> Floors:
        """Floors with these ranges spent as well; too many become one that covers them all."""
        spent = sorted({*self.spent, *ranges})
        if len(spent) > SPENT_COUNT_MAX:
            spent = [SpentRange(spent[0].first, max(one.last for one in spent))]
        return Floors(self.steps, tuple(spent))


class Journal(NamedTuple):
    """A journal as read. `image` is its header and its good records; `lost_leases` bounds what a key may lack."""

    totals: dict[bytes, int]
    image: bytearray
    torn_bytes: int
    damaged_records: int

    @property
    def lost_leases(self) -> int:
        return self.damaged_records + (1 if self.torn_bytes else 0)


def journal_header() -> bytes:
    head = _HEADER.pack(JOURNAL_MAGIC, FORMAT_VERSION)
    return head + _checksum(_HEADER_LABEL, head)


def encode_record(key: bytes, total: int) -> bytes:
    body = key + _TOTAL.pack(total)
    return body + _checksum(_RECORD_LABEL, body)


def parse_journal(content: bytes) -> Journal:
    """Read a journal. Raises LeaseFormatError for a foreign or damaged header.

    Only one append can be unsynced, and nobody was told of it. So bad records at the end, up to one append of them, are
    torn; as the last durable record gone bad looks the same, they count as one lost lease. Bad ones before a good one
    are damage, and count one each.
    """
    if content[:HEADER_BYTES] != journal_header():
        raise LeaseFormatError(_why_not(content, JOURNAL_MAGIC))
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


def _why_not(content: bytes, magic: bytes) -> str:
    if content[:16] == magic and content[16:20] != FORMAT_VERSION.to_bytes(4, "big"):
        return "was written by another version of this program"
    return "is damaged or is not one of this program's files"


def _checksum(label: bytes, body: bytes) -> bytes:
    return hashlib.sha256(label + body).digest()[:8]
