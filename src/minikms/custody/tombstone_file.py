"""The file `kms-tombstones`: which keys were destroyed.

Owns: the appends to the file, and the set of destroyed keys in memory.
Invariants:
- A record is durable before the keyring counts it. So a keyring that counts more records than the file has means that
  the file was cut, and a start refuses it.
- A synced record stays. A start adopts a record that the keyring does not count, if its tag is valid: the destruction
  was requested and audited, and a crash or a failed write came between the record and the keyring. What follows the
  last valid record belongs to an append that was cut off, and the next append replaces it.
- After a failed write or sync the content of the file is unknown, so the next append writes a fresh file that begins
  with the same records.

The chain is computed in the thread of the event loop, which is the only one that uses keys; `append` runs in the disk
thread. It must never take a missing file as "nothing was destroyed", unless the keyring counts no record.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from minikms import api
from minikms.api.errors import StartError, StorageUnavailableError
from minikms.keys import keyring, tombstones
from minikms.keys.dek import key_id_to_bytes
from minikms.keys.tombstones import (
    APPEND_RECORDS_MAX,
    FILE_BYTES_MAX,
    HEADER_BYTES,
    RECORD_BYTES,
    NumberedTombstone,
    ReadTombstones,
    Tombstone,
    TombstoneChain,
    TombstoneFormatError,
    keys_of,
)
from minikms.keys.unlocked import UnlockedKeyring
from minikms.platform.files import read_file_bounded, replace_file_from, write_all_at
from minikms.platform.sync import sync_data

NAME: Final = "kms-tombstones"
RECENT_BYTES_MAX: Final = RECORD_BYTES * APPEND_RECORDS_MAX
"""The bytes of the last records, which are kept in memory: a key that was just destroyed is there."""


class Staged(NamedTuple):
    """Records that follow the last one of the file, and the chain after them."""

    records: bytes
    chain: TombstoneChain


class Tombstones:
    """The destroyed keys of a data directory, and their file. Made by `open_tombstones`. `key_id in tombstones` may be
    asked in any thread.
    """

    def __init__(self, directory_fd: int, read: ReadTombstones, *, intact: bool) -> None:
        """`intact`: the file on disk is exactly `read.content`, so that it can be appended to."""
        self._directory_fd = directory_fd
        self._keys = set(read.keys())
        self._chain = read.chain
        self._recent = read.content[HEADER_BYTES:][-RECENT_BYTES_MAX:]
        self._intact = intact
        self._fd: int | None = None

    def __contains__(self, key_id: object) -> bool:
        if not self._keys or not isinstance(key_id, str) or api.KEY_ID_PATTERN.fullmatch(key_id) is None:
            return False
        return key_id_to_bytes(key_id) in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def count(self) -> int:
        """The number of records."""
        return self._chain.count

    @property
    def head(self) -> bytes:
        """SHA-256 of the file."""
        return self._chain.head

    @property
    def chain(self) -> TombstoneChain:
        """A copy of the chain, after all records."""
        return self._chain.copy()

    def stage(self, mac_key: memoryview, key_ids: Sequence[str], unix_s: int) -> Staged:
        """The records of newly destroyed keys. A key that has one gets no other."""
        chain = self._chain.copy()
        raw = dict.fromkeys(map(key_id_to_bytes, key_ids))
        return Staged(chain.append(mac_key, [Tombstone(key, unix_s) for key in raw if key not in self._keys]), chain)

    def append(self, staged: Staged) -> None:
        """Writes the records; durable on return. Blocks on the disk. Raises StorageUnavailableError."""
        offset = HEADER_BYTES + RECORD_BYTES * self._chain.count
        try:
            if self._intact:
                self._write(staged.records, offset)
            else:
                self._rewrite(staged.records)
        except BaseException:
            # The content of the file is unknown now: the next append writes a fresh file.
            self._drop_fd()
            self._intact = False
            raise
        self._intact = True

    def adopt(self, staged: Staged) -> None:
        """Takes the records of a successful `append` into the set."""
        self._chain = staged.chain
        self._recent = (self._recent + staged.records)[-RECENT_BYTES_MAX:]
        self._keys.update(keys_of(tombstones.HEADER + staged.records))

    def name(self, key_ids: Iterable[str]) -> None:
        """Takes keys into the set that have a tombstone elsewhere, which this file lacks."""
        self._keys.update(map(key_id_to_bytes, key_ids))

    def recent(self, key_id: str) -> NumberedTombstone | None:
        """The record of a key, if it is one of the last."""
        return tombstones.find(self._recent, key_id_to_bytes(key_id), self._chain.count)

    def record(self, key_id: str) -> NumberedTombstone:
        """The record of a destroyed key, read back. Blocks on the disk. Raises StorageUnavailableError."""
        chain = self._chain
        tombstone = tombstones.find(self._read_back(chain), key_id_to_bytes(key_id), chain.count)
        if tombstone is None:
            raise StorageUnavailableError("the file of destroyed keys does not name this key")
        return tombstone

    def records(self) -> bytes:
        """All records, read back. Blocks on the disk. Raises StorageUnavailableError."""
        return self._read_back(self._chain)

    def close(self) -> None:
        """Closes the file. Everything that `append` returned for is on disk already."""
        self._drop_fd()

    def _write(self, records: bytes, offset: int) -> None:
        try:
            if self._fd is None:
                self._fd = os.open(NAME, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory_fd)
            write_all_at(self._fd, records, offset)
            sync_data(self._fd)
        except OSError as error:
            raise StorageUnavailableError("the file of destroyed keys cannot be written") from error

    def _rewrite(self, records: bytes) -> None:
        """Replaces the file by one with its records and these."""
        before = self._read_back(self._chain)
        self._drop_fd()
        replace_file_from(self._directory_fd, NAME, (tombstones.HEADER, before, records))

    def _read_back(self, chain: TombstoneChain) -> bytes:
        """The records of the file that the chain counts. Raises StorageUnavailableError if they are other ones."""
        length = HEADER_BYTES + RECORD_BYTES * chain.count
        records = b""
        if chain.count:
            records = (read_file_bounded(NAME, FILE_BYTES_MAX, dir_fd=self._directory_fd) or b"")[HEADER_BYTES:length]
        read = chain.fresh()
        read.take(records)
        if (read.count, read.head) != (chain.count, chain.head):
            raise StorageUnavailableError("the file of destroyed keys can't be read back; see `minikms doctor`")
        return records

    def _drop_fd(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)


def read_tombstones(content: bytes | None, body: keyring.Body, mac_key: memoryview | None) -> ReadTombstones:
    """The tombstones of a keyring, in `content`, its file. Raises StartError, which says what to do."""
    log = body.tombstone_log
    try:
        return tombstones.read(content, keyring_id=body.keyring_id, count=log.count, head=log.head, mac_key=mac_key)
    except TombstoneFormatError as error:
        raise StartError(
            f"the file {NAME} {error}. It names the keys that were destroyed, and the keyring needs all of them. Put "
            f"the newest {NAME} back beside keyring.json, or restore a backup of the whole data directory "
            "(the runbook says how)"
        ) from None


def load(directory_fd: int) -> bytes | None:
    """The content of the file; None if it is absent. Raises StartError if it can't be read."""
    try:
        return read_file_bounded(NAME, FILE_BYTES_MAX, dir_fd=directory_fd)
    except StorageUnavailableError as error:
        raise StartError(f"{NAME} can't be read: {error}") from None


class OpenedTombstones(NamedTuple):
    """`body`: the body that the next write of the keyring begins with. It counts every record of the file, and has the
    epoch of the keyring that was read.
    """

    tombstones: Tombstones
    body: keyring.Body


def open_tombstones(directory_fd: int, unlocked: UnlockedKeyring) -> OpenedTombstones:
    """The tombstones of an unlocked keyring. The caller holds the lock of the directory, and writes the keyring with
    the returned body. Raises StartError, StorageUnavailableError.
    """
    body = unlocked.body
    read = read_tombstones(load(directory_fd), body, unlocked.tombstone_key)
    intact = not read.torn_bytes and read.chain.count > 0
    if read.adopted:
        # A killed process may have left them in the page cache only. They are durable before the keyring counts them.
        replace_file_from(directory_fd, NAME, (read.content,))
        intact = True
        body = keyring.counting(body, read.chain.count, read.chain.head)
    return OpenedTombstones(Tombstones(directory_fd, read, intact=intact), body)
