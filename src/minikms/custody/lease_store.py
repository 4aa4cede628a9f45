"""The lease files of a data directory: the number of uses of each key that are reserved, durably.

Owns: the files `kms-leases` (the journal) and `kms-leases.snapshot`, and the format of the snapshot: the counts of all
keys, sorted, in blocks with checksums. docs/spec/leases.md has the layout. The caller holds the lock of the data
directory. Calls block on the disk, so the daemon makes all but `LeaseStore.total` and `LeaseStore.status` in one worker
thread; `minikms.custody.leases` is the event loop's side. Invariants:
- `reserve` returns only after the records are synced. If it raises, no count has changed, and the next call begins a
  fresh journal file, since a failed sync proves nothing about the file (`minikms.custody.files`).
- A count is never below the uses that were granted, whatever was interrupted, torn or damaged.
- A merge writes the new snapshot first and an empty journal second. An old journal over a new snapshot changes nothing.
- A snapshot is never changed in place. Opening it reads only the footer and the index (16 bytes for 170 keys), so a
  million keys do not slow down a start. A block is checked each time it is read, and a damaged block hides only the
  keys of its own range. Blocks are read with `pread` and not mapped, so a failing disk is an error and not a SIGBUS.

It must never take a missing or foreign file as "no uses".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from minikms.custody.files import read_file_bounded, replace_file, replace_file_from
from minikms.custody.lease_format import (
    DAMAGED_RECORDS_MAX,
    FORMAT_VERSION,
    GROUP_RECORDS_MAX,
    HEADER_BYTES,
    KEY_BYTES,
    KEY_LAST,
    LEASE_USES,
    RECORD_BYTES,
    RESTORE_USES,
    SPENT_COUNT_MAX,
    STEPS_COUNT_MAX,
    USES_MAX,
    Floors,
    Journal,
    LeaseFormatError,
    SpentRange,
    Step,
    encode_record,
    journal_header,
    parse_journal,
    why_unknown,
)
from minikms.errors import StartError, StorageUnavailableError

JOURNAL_NAME: Final = "kms-leases"
SNAPSHOT_NAME: Final = "kms-leases.snapshot"
JOURNAL_RECORDS_MERGE: Final = 32_768
"""A journal with so many records is merged into the snapshot (1 MiB; about 30 ms to read at start)."""
JOURNAL_RECORDS_MAX: Final = 4 * JOURNAL_RECORDS_MERGE
"""A journal with so many records, since merges fail, takes no more."""
JOURNAL_BYTES_MAX: Final = HEADER_BYTES + RECORD_BYTES * (JOURNAL_RECORDS_MAX + GROUP_RECORDS_MAX)
_MERGE_RETRY_RECORDS: Final = JOURNAL_RECORDS_MERGE // 8

# --- the snapshot -----------------------------------------------------------------------------------------------------

SNAPSHOT_MAGIC: Final = b"minikms-leases\0s"
ENTRY_BYTES: Final = 24
BLOCK_BYTES: Final = 4096
BLOCK_ENTRIES: Final = 170
_BLOCK_DATA_BYTES: Final = BLOCK_ENTRIES * ENTRY_BYTES
_CHECKSUM_BYTES: Final = 16
_BLOCK_LABEL: Final = b"minikms lease block v1\0"
_FOOTER_LABEL: Final = b"minikms lease footer v1\0"
_FOOTER: Final = struct.Struct(">16sIIQII32s")
_STEP: Final = struct.Struct(">16sQ")


class BlockDamagedError(Exception):
    """The block that would hold the key can't be read, so its count is unknown. Only used inside this module."""


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
        recent, data = self._recent  # one read of the attribute: another thread may replace it at any moment
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
    """The bytes of a new snapshot, in parts: the entries of the old one merged with `totals`. The larger count holds.

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
    return hashlib.sha256(_BLOCK_LABEL + number.to_bytes(4, "big") + data).digest()[:_CHECKSUM_BYTES]


def _encode_footer(footer: _Footer) -> bytes:
    steps, spent = footer.floors
    body = _FOOTER.pack(
        SNAPSHOT_MAGIC, FORMAT_VERSION, footer.blocks, footer.entries, len(steps), len(spent), footer.index_sha256
    )
    body += b"".join([_STEP.pack(*step) for step in steps]) + b"".join([first + last for first, last in spent])
    body = body.ljust(BLOCK_BYTES - _CHECKSUM_BYTES, b"\0")
    return body + hashlib.sha256(_FOOTER_LABEL + body).digest()[:_CHECKSUM_BYTES]


def _decode_footer(raw: bytes) -> _Footer:
    body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    intact = len(raw) == BLOCK_BYTES and checksum == hashlib.sha256(_FOOTER_LABEL + body).digest()[:_CHECKSUM_BYTES]
    if not intact or raw[:20] != SNAPSHOT_MAGIC + FORMAT_VERSION.to_bytes(4, "big"):
        raise LeaseFormatError(why_unknown(raw, SNAPSHOT_MAGIC))
    _, _, blocks, entries, step_count, spent_count, index_sha256 = _FOOTER.unpack_from(body)
    if step_count > STEPS_COUNT_MAX or spent_count > SPENT_COUNT_MAX or blocks != -(-entries // BLOCK_ENTRIES):
        raise LeaseFormatError("is inconsistent")
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


# --- the store --------------------------------------------------------------------------------------------------------


class LeaseFilesStatus(NamedTuple):
    """For `/status` and `minikms doctor`. `lost_leases`: found at this start and added to the count of every key."""

    journal_records: int
    snapshot_entries: int
    lost_leases: int
    write_failures: int
    merge_failures: int


class LeaseStore:
    """Made by `open`. `total` may be called from any thread, everything else from one at a time."""

    def __init__(self, directory: int, journal: Journal, snapshot: Snapshot | None) -> None:
        """Use `open`."""
        self._directory = directory
        self._snapshot = snapshot
        self._floors = snapshot.floors if snapshot is not None else Floors()
        self._totals = journal.totals
        self._image = journal.image  # the header and all good records: the content of a fresh journal file
        self._fd: int | None = None  # None: the next write begins with a fresh journal file
        self._lock = threading.Lock()  # protects snapshot and totals: other threads call `total`
        self._merge_at = JOURNAL_RECORDS_MERGE
        self._lost_leases = journal.lost_leases
        self._write_failures = 0
        self._merge_failures = 0

    @classmethod
    def open(cls, directory: int, *, create: bool) -> LeaseStore:
        """Opens the lease files of an open directory, which belongs to the caller. Writes only to create or to repair.

        With `create`, which is for the first start of a data directory, an absent journal is created. Otherwise an
        absent journal is a StartError, and so are foreign or badly damaged files. Raises StorageUnavailableError if the
        disk fails.
        """
        snapshot = _open_snapshot(directory)
        try:
            store = cls(directory, _open_journal(directory, create=create and snapshot is None), snapshot)
        except BaseException:
            if snapshot is not None:
                snapshot.close()
            raise
        try:
            if store._lost_leases:
                store._merge(store._floors.with_uses_added(KEY_LAST, store._lost_leases * LEASE_USES))
        except BaseException:
            store.close()
            raise
        return store

    @staticmethod
    def rebuild(directory: int, newest: bytes) -> None:
        """Writes both files anew after a loss: every key up to `newest` counts as spent and only decrypts from then on.

        `newest` is the largest key id (16 bytes) of the data directory. Raises StorageUnavailableError.
        """
        floors = Floors(spent=(SpentRange(bytes(KEY_BYTES), newest),))
        replace_file_from(directory, SNAPSHOT_NAME, snapshot_chunks(None, {}, floors))
        replace_file(directory, JOURNAL_NAME, journal_header())

    def total(self, key: bytes) -> int:
        """The count of `key` (16 bytes): the uses that are reserved, at most USES_MAX. May read one block."""
        with self._lock:
            recorded = self._recorded(key)
        if recorded is None:
            return USES_MAX
        return min(recorded + self._floors.added_uses(key), USES_MAX)

    def reserve(self, keys: Sequence[bytes]) -> list[int | None]:
        """Reserves one more lease for each key (16 bytes); for each its new count, or None if that would pass USES_MAX.

        At most GROUP_RECORDS_MAX keys (ValueError); a key may occur twice. Raises StorageUnavailableError; then nothing
        is reserved.
        """
        if len(keys) > GROUP_RECORDS_MAX:
            raise ValueError("too many keys for one append")
        granted: dict[bytes, int] = {}
        answers: list[int | None] = []
        records = bytearray()
        for key in keys:
            before = granted.get(key)
            if before is None:
                before = self._recorded(key)
            added = self._floors.added_uses(key)
            if before is None or before + LEASE_USES + added > USES_MAX:
                answers.append(None)
                continue
            granted[key] = before + LEASE_USES
            records += encode_record(key, before + LEASE_USES)
            answers.append(before + LEASE_USES + added)
        if records:
            self._append(records)
            with self._lock:
                self._totals.update(granted)
        return answers

    @property
    def merge_due(self) -> bool:
        """Whether the journal is long enough for `merge`."""
        return self._journal_records >= self._merge_at

    def merge(self) -> None:
        """Moves the counts of the journal into a new snapshot.

        Raises StorageUnavailableError; then nothing is lost, and the merge is due again after some more records.
        """
        self._merge(self._floors)

    def add_restore_uses(self, newest: bytes, uses: int = RESTORE_USES) -> None:
        """After a restore: adds `uses` to every key up to `newest` (16 bytes), the largest key id that may have been
        used since the backup. Durable on return. A repetition adds again. Raises StorageUnavailableError.
        """
        self._merge(self._floors.with_uses_added(newest, uses))

    def status(self) -> LeaseFilesStatus:
        """The sizes of the files, and the failures of this run."""
        snapshot = self._snapshot
        return LeaseFilesStatus(
            self._journal_records,
            snapshot.entries if snapshot is not None else 0,
            self._lost_leases,
            self._write_failures,
            self._merge_failures,
        )

    def close(self) -> None:
        """Closes the files. Everything that `reserve` returned is on disk already."""
        self._drop_fd()
        with self._lock:
            snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None:
            snapshot.close()

    @property
    def _journal_records(self) -> int:
        return (len(self._image) - HEADER_BYTES) // RECORD_BYTES

    def _recorded(self, key: bytes) -> int | None:
        """The count of a key without the steps of the floors; None if it is unknown, which means spent."""
        journaled = self._totals.get(key, 0)
        kept: int | None = None
        if self._snapshot is not None:
            try:
                kept = self._snapshot.find(key)
            except BlockDamagedError:
                return journaled or None
        if not journaled and kept is None and self._floors.is_spent(key):
            return None
        return max(journaled, kept or 0, LEASE_USES)

    def _append(self, records: bytearray) -> None:
        if self._journal_records + len(records) // RECORD_BYTES > JOURNAL_RECORDS_MAX:
            raise StorageUnavailableError("the lease journal is full, since merges into the snapshot fail")
        try:
            fd = self._fd if self._fd is not None else self._begin_file()
            _write_durably(fd, records, len(self._image))
        except BaseException:
            # The content of the file is unknown now, so the next write begins with a fresh file.
            self._drop_fd()
            self._write_failures += 1
            raise
        self._image += records

    def _begin_file(self) -> int:
        replace_file(self._directory, JOURNAL_NAME, bytes(self._image))
        try:
            self._fd = os.open(JOURNAL_NAME, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError as error:
            raise StorageUnavailableError("the lease journal cannot be opened") from error
        return self._fd

    def _drop_fd(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _merge(self, floors: Floors) -> None:
        try:
            replace_file_from(self._directory, SNAPSHOT_NAME, snapshot_chunks(self._snapshot, self._totals, floors))
            merged = _reopen_snapshot(self._directory)
            with self._lock:
                old, self._snapshot = self._snapshot, merged
                self._floors = merged.floors
            if old is not None:
                old.close()
            # The snapshot now has everything that is in the journal.
            self._drop_fd()
            replace_file(self._directory, JOURNAL_NAME, journal_header())
        except BaseException:
            self._merge_failures += 1
            self._merge_at = self._journal_records + _MERGE_RETRY_RECORDS
            raise
        with self._lock:
            self._totals = {}
        self._image = bytearray(journal_header())
        self._merge_at = JOURNAL_RECORDS_MERGE


def _write_durably(fd: int, records: bytearray, offset: int) -> None:
    try:
        view = memoryview(records)
        while view:
            written = os.pwrite(fd, view, offset)
            view = view[written:]
            offset += written
        os.fdatasync(fd)
    except OSError as error:
        raise StorageUnavailableError("the lease journal cannot be written") from error


def _open_journal(directory: int, *, create: bool) -> Journal:
    content = read_file_bounded(JOURNAL_NAME, JOURNAL_BYTES_MAX, dir_fd=directory)
    if content is None:
        if not create:
            raise _start_error(JOURNAL_NAME, "is missing")
        content = journal_header()
        replace_file(directory, JOURNAL_NAME, content)
    try:
        journal = parse_journal(content)
    except LeaseFormatError as error:
        raise _start_error(JOURNAL_NAME, str(error)) from error
    if journal.lost_leases > DAMAGED_RECORDS_MAX:
        raise _start_error(JOURNAL_NAME, f"has more than {DAMAGED_RECORDS_MAX} damaged records")
    return journal


def _open_snapshot(directory: int) -> Snapshot | None:
    try:
        fd = os.open(SNAPSHOT_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageUnavailableError("the lease snapshot cannot be opened") from error
    try:
        return Snapshot(fd)
    except LeaseFormatError as error:
        os.close(fd)
        raise _start_error(SNAPSHOT_NAME, str(error)) from error
    except OSError as error:
        os.close(fd)
        raise StorageUnavailableError("the lease snapshot cannot be read") from error


def _reopen_snapshot(directory: int) -> Snapshot:
    try:
        snapshot = _open_snapshot(directory)
    except StartError as error:
        raise StorageUnavailableError("the new lease snapshot can't be read back") from error
    if snapshot is None:
        raise StorageUnavailableError("the new lease snapshot has vanished")
    return snapshot


def _start_error(name: str, what: str) -> StartError:
    return StartError(
        f"the file {name} in the data directory {what}, so the number of uses of each key is unknown; restore a backup "
        "of the whole data directory, which allows for the uses since then, or rebuild the lease files with `minikms "
        "doctor --rebuild-leases`: then all existing keys only decrypt until their threads get new keys"
    )
