"""The lease files of a data directory: the number of uses of each key that are reserved, durably.

Owns: the files `kms-leases` (the journal) and `kms-leases.snapshot`; `minikms.custody.lease_format` has their formats.
The caller holds the lock of the data directory. Calls block on the disk, so the daemon makes all but `LeaseStore.total`
and `LeaseStore.status` in one worker thread; `minikms.custody.leases` is the event loop's side. Invariants:
- `reserve` returns only after the records are synced. If it raises, no count has changed, and the next call begins a
  fresh journal file, since a failed sync proves nothing about the file (`minikms.custody.files`).
- A count is never below the uses that were granted, whatever was interrupted, torn or damaged.
- A merge writes the new snapshot first and an empty journal second. An old journal over a new snapshot changes nothing.
  A snapshot is never changed in place.

It must never take a missing or foreign file as "no uses".
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

from minikms.custody.files import read_file_bounded, replace_file, replace_file_from
from minikms.custody.lease_format import (
    DAMAGED_RECORDS_MAX,
    GROUP_RECORDS_MAX,
    HEADER_BYTES,
    KEY_LAST,
    LEASE_USES_MAX,
    RECORD_BYTES,
    USES_MAX,
    BlockDamagedError,
    Floors,
    Journal,
    LeaseFormatError,
    Snapshot,
    encode_record,
    journal_header,
    parse_journal,
    snapshot_chunks,
)
from minikms.errors import StartError, StorageUnavailableError
from minikms.sync import sync_data

JOURNAL_NAME: Final = "kms-leases"
SNAPSHOT_NAME: Final = "kms-leases.snapshot"
JOURNAL_RECORDS_MERGE: Final = 32_768
"""A journal with this many records is merged into the snapshot (1 MiB; about 30 ms to read at start)."""
JOURNAL_RECORDS_MAX: Final = 4 * JOURNAL_RECORDS_MERGE
"""A journal takes no more records than this; it grows so far only while merges fail."""
JOURNAL_BYTES_MAX: Final = HEADER_BYTES + RECORD_BYTES * (JOURNAL_RECORDS_MAX + GROUP_RECORDS_MAX)
MERGE_RETRY_RECORDS: Final = JOURNAL_RECORDS_MERGE // 8


class LeaseFilesStatus(NamedTuple):
    """For `/status` and `minikms doctor`. `lost_leases`: found at this start; each cost every key LEASE_USES_MAX."""

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
                store._merge(store._floors.with_uses_added(KEY_LAST, store._lost_leases * LEASE_USES_MAX))
        except BaseException:
            store.close()
            raise
        return store

    @staticmethod
    def rebuild(directory: int, newest: bytes) -> None:
        """Writes both files again after a loss: every key up to `newest` only decrypts from then on.

        `newest` is the largest key id (16 bytes) of the data directory. Raises StorageUnavailableError.
        """
        floors = Floors().with_exhausted(newest)
        replace_file_from(directory, SNAPSHOT_NAME, snapshot_chunks(None, {}, floors))
        replace_file(directory, JOURNAL_NAME, journal_header())

    def total(self, key: bytes) -> int:
        """The count of `key` (16 bytes): the uses that are reserved. USES_MAX: it only decrypts. May read one block."""
        with self._lock:
            recorded = self._recorded(key)
        if recorded is None:
            return USES_MAX
        return min(recorded + self._floors.added_uses(key), USES_MAX)

    @property
    def exhausted(self) -> bytes:
        """Every key up to this one (16 bytes) only decrypts; empty if no range of keys does."""
        return self._floors.exhausted

    def is_exhausted(self, key: bytes) -> bool:
        """Whether a restore has ended the encryptions of the key. No I/O; for any thread."""
        return self._floors.is_exhausted(key)

    def reserve(self, wanted: Sequence[tuple[bytes, int]]) -> list[int]:
        """Reserves uses: for each key (16 bytes) a lease of this size, at most LEASE_USES_MAX. Returns the uses that
        were reserved for each, fewer where the key reaches its limit; 0: it only decrypts.

        At most GROUP_RECORDS_MAX leases (ValueError); a key may occur several times. Raises StorageUnavailableError;
        then nothing is reserved.
        """
        if len(wanted) > GROUP_RECORDS_MAX or any(not 0 < uses <= LEASE_USES_MAX for _, uses in wanted):
            raise ValueError("too many leases for one append, or a lease of a wrong size")
        granted: dict[bytes, int] = {}
        answers: list[int] = []
        records = bytearray()
        for key, uses in wanted:
            before = granted.get(key)
            if before is None:
                before = self._recorded(key)
            given = 0 if before is None else min(uses, USES_MAX - self._floors.added_uses(key) - before)
            if before is None or given <= 0:
                answers.append(0)
                continue
            granted[key] = before + given
            records += encode_record(key, before + given)
            answers.append(given)
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

    def exhaust(self, newest: bytes) -> None:
        """After a restore: every key up to `newest` (16 bytes), the largest key id that may have been used since the
        backup, only decrypts from then on. Durable on return. Raises StorageUnavailableError.
        """
        self._merge(self._floors.with_exhausted(newest))

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
        """The count of a key without the steps of the floors; None if it only decrypts or its count is unknown."""
        if self._floors.is_exhausted(key):
            return None
        journaled = self._totals.get(key, 0)
        kept: int | None = None
        if self._snapshot is not None:
            try:
                kept = self._snapshot.find(key)
            except BlockDamagedError:
                return journaled or None
        if not journaled and kept is None and self._floors.is_spent(key):
            return None
        return max(journaled, kept or 0, LEASE_USES_MAX)

    def _append(self, records: bytearray) -> None:
        if self._journal_records + len(records) // RECORD_BYTES > JOURNAL_RECORDS_MAX:
            self._merge(self._floors)  # earlier merges failed; while the snapshot can't be written, nothing is reserved
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
            self._merge_at = self._journal_records + MERGE_RETRY_RECORDS
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
        sync_data(fd)
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
        f"the file {name} in the data directory {what}, so the number of uses of each key is unknown; rebuild the "
        "lease files with `minikms doctor --rebuild-leases`: then all existing keys only decrypt until their threads "
        "get new keys"
    )
