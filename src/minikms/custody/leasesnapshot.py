"""The lease snapshot: the counts of all keys, sorted, in blocks that are checked when they are read.

Owns: the format and the reading of `kms-leases.snapshot`; docs/spec/leases.md has the layout. Invariants: opening reads
only the footer and the index (16 bytes for 170 keys), so it costs nothing with a million keys; every block is checked
each time it is read; a damaged block hides only the keys of its own range. The file is never changed in place. Blocks
are read with `pread`, not mapped: a failing disk is then an error and not a SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from minikms.custody.leaseformat import (
    FORMAT_VERSION,
    KEY_BYTES,
    KEY_LAST,
    SPENT_COUNT_MAX,
    STEPS_COUNT_MAX,
    Floors,
    LeaseFormatError,
    SpentRange,
    Step,
)

SNAPSHOT_MAGIC: Final = b"minikms-leases\0s"
ENTRY_BYTES: Final = 24
BLOCK_BYTES: Final = 4096
BLOCK_ENTRIES: Final = 170
_BLOCK_DATA_BYTES: Final = BLOCK_ENTRIES * ENTRY_BYTES  # and 16 bytes of checksum
_BLOCK_LABEL: Final = b"minikms lease block v1\0"
_FOOTER_LABEL: Final = b"minikms lease footer v1\0"
_FOOTER: Final = struct.Struct(">16sIIQII32s")
_STEP: Final = struct.Struct(">16sQ")


class BlockDamagedError(Exception):
    """The block that would hold the key can't be read: its count is unknown. Inside the room."""


class _Footer(NamedTuple):
    blocks: int
    entries: int
    index_sha256: bytes
    floors: Floors


class Snapshot:
    """An open snapshot. Takes the descriptor over; `close` closes it. Several threads may read it at once: a listing
    looks up counts while the journal's worker reserves or merges.
    """

    def __init__(self, fd: int) -> None:
        """Raises LeaseFormatError, or OSError if the disk does; the descriptor stays the caller's then."""
        footer, index = _read_end(os.fstat(fd).st_size, lambda size, offset: _pread(fd, size, offset))
        self._fd = fd
        self._first_keys = [index[at : at + KEY_BYTES] for at in range(0, len(index), KEY_BYTES)]
        self._recent: tuple[int, bytes] = (-1, b"")
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
        recent, data = self._recent  # in one look: another thread may put its own there at any moment
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
        self._recent = (number, data)
        return data

    def block_range(self, number: int) -> SpentRange:
        """The keys that a block is responsible for, present or not."""
        last = KEY_LAST
        if number + 1 < len(self._first_keys):
            last = (int.from_bytes(self._first_keys[number + 1], "big") - 1).to_bytes(KEY_BYTES, "big")
        return SpentRange(self._first_keys[number], last)


def check_snapshot(content: bytes) -> None:
    """Raises LeaseFormatError for what `Snapshot` would not open."""
    _read_end(len(content), lambda size, offset: content[offset : offset + size])


def _read_end(file_size: int, read: Callable[[int, int], bytes]) -> tuple[_Footer, bytes]:
    """The footer and the index. `read` gives so many bytes from an offset."""
    footer = _decode_footer(read(BLOCK_BYTES, max(0, file_size - BLOCK_BYTES)))
    index_bytes = footer.blocks * KEY_BYTES
    if file_size != footer.blocks * BLOCK_BYTES + index_bytes + BLOCK_BYTES:
        raise LeaseFormatError("is cut short or has bytes added")
    index = read(index_bytes, footer.blocks * BLOCK_BYTES)
    if hashlib.sha256(index).digest() != footer.index_sha256:
        raise LeaseFormatError("has a damaged index")
    return footer, index


def snapshot_chunks(old: Snapshot | None, totals: Mapping[bytes, int], floors: Floors) -> Iterator[bytes]:
    """A new snapshot's file, part by part: the old one's entries and `totals` merged; the larger count of a key holds.

    Memory is bounded by `totals`. Damaged blocks of the old one become spent ranges of the new one.
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
    keys = sorted(totals)
    taken = (
        0  # of `keys`; the last block's range is open-ended, so what is left after the loop is for an empty snapshot
    )
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
    return hashlib.sha256(_BLOCK_LABEL + number.to_bytes(4, "big") + data).digest()[:16]


def _encode_footer(footer: _Footer) -> bytes:
    steps, spent = footer.floors
    body = _FOOTER.pack(
        SNAPSHOT_MAGIC, FORMAT_VERSION, footer.blocks, footer.entries, len(steps), len(spent), footer.index_sha256
    )
    body += b"".join([_STEP.pack(*step) for step in steps]) + b"".join([first + last for first, last in spent])
    body = body.ljust(BLOCK_BYTES - 16, b"\0")
    return body + hashlib.sha256(_FOOTER_LABEL + body).digest()[:16]


def _decode_footer(raw: bytes) -> _Footer:
    body, checksum = raw[:-16], raw[-16:]
    if raw[:16] == SNAPSHOT_MAGIC and raw[16:20] != FORMAT_VERSION.to_bytes(4, "big"):
        raise LeaseFormatError("was written by another version of this program")
    if len(raw) != BLOCK_BYTES or checksum != hashlib.sha256(_FOOTER_LABEL + body).digest()[:16]:
        raise LeaseFormatError("is damaged or is not one of this program's files")
    _, _, blocks, entries, step_count, spent_count, index_sha256 = _FOOTER.unpack_from(body)
    if step_count > STEPS_COUNT_MAX or spent_count > SPENT_COUNT_MAX or blocks != -(-entries // BLOCK_ENTRIES):
        raise LeaseFormatError("contradicts itself")
    at = _FOOTER.size
    steps = [Step(*_STEP.unpack_from(body, at + _STEP.size * number)) for number in range(step_count)]
    at += _STEP.size * step_count
    spans = [body[at + 32 * number : at + 32 * number + 32] for number in range(spent_count)]
    spent = [SpentRange(span[:KEY_BYTES], span[KEY_BYTES:]) for span in spans]
    return _Footer(blocks, entries, index_sha256, Floors(tuple(steps), tuple(spent)))


def _pread(fd: int, size: int, offset: int) -> bytes:
    parts = []
    while size > 0 and (part := os.pread(fd, size, offset)):
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return b"".join(parts)
