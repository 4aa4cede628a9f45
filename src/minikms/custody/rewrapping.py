"""One pass of a KEK rotation over all key files.

Owns: reading every file, rewrapping those under another KEK version, keeping the old file as a backup, and putting the
new one in place. Invariants: a backup is durable before its file is replaced; a rewrapped key is unwrapped again and
compared before it goes to the disk; a file that another hand changed meanwhile is left for the next pass; a file whose
replacement the disk did not confirm is written again, as a fresh file. It must never replace a file that it could not
read and unwrap.

Three threads share the work. One reads the next batch; the loop's thread, the only one that works with keys, rewraps
the one before it between requests; one writes that batch aside and, with the same sync, puts the batch before it in
place.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Final

from minikms.crypto.aead import scrub_stack
from minikms.custody.atomic import FileWrite, StagedReplacements
from minikms.custody.dekstore import file_name
from minikms.custody.indexing import read_files
from minikms.custody.vault import Vault
from minikms.errors import KeyNotFoundError, KeyUnreadableError, MiniKmsError
from minikms.keys import dek, keyring
from minikms.keys.dek import DekRecord

BATCH_FILES: Final = 512
CRYPTO_SLICE: Final = 16
"""Rewraps between two looks at other requests: some 0.3 ms."""

Read = tuple[str, bytes | MiniKmsError]


class Rewrapping:
    """Lives in the loop's thread. `reader` reads files, `disk` changes them."""

    def __init__(self, vault: Vault, *, reader: Executor, disk: Executor) -> None:
        self._vault = vault
        self._reader = reader
        self._disk = disk
        self._unconfirmed: set[str] = set()
        self._staged: list[DekRecord] = []
        self.rewrapped = 0
        """Keys done since `begin`."""

    def begin(self) -> None:
        """Another rotation has begun."""
        self.rewrapped = 0
        self._unconfirmed.clear()

    async def run_pass(self, rotation: keyring.Rotation) -> int:
        """Over all files; how many were due and can be read. Raises StorageUnavailableError, with a part of it done."""
        vault = self._vault
        groups = StagedReplacements(vault.store.directory_fd, durable_first=vault.backups.directory_fd)
        found = 0
        self._staged = []
        with vault.locks.watch() as changed:
            key_ids = vault.store.list_ids(changed=changed)
            reading = self._begin_reading(key_ids, rotation.to_version)
            writing: asyncio.Task[None] | None = None
            try:
                while (due := await reading) is not None:
                    reading = self._begin_reading(key_ids, rotation.to_version)
                    records = await self._rewrap(due, rotation.to_version)
                    found += len(records)
                    if writing is not None:
                        await writing
                    writing = asyncio.create_task(self._step(groups, records, changed, rotation.stamp))
                if writing is not None:
                    await writing
                    await self._step(groups, [], changed, rotation.stamp)
            finally:
                # What has begun is waited for, also on the way out of a failure; what is only staged is dropped.
                await asyncio.gather(reading, *([writing] if writing else []), return_exceptions=True)
                await asyncio.get_running_loop().run_in_executor(self._disk, groups.discard)
        return found

    # --- reading -----------------------------------------------------------------------------------------------------

    def _begin_reading(self, key_ids: Iterator[str], to_version: int) -> asyncio.Future[list[Read] | None]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._reader, self._read_due, key_ids, to_version)

    def _read_due(self, key_ids: Iterator[str], to_version: int) -> list[Read] | None:
        """For the reading thread: of the next files those that aren't under the new version; None after the last.

        A look at the bytes is enough: files are parsed only when they are due.
        """
        chunk = list(dict.fromkeys(itertools.islice(key_ids, BATCH_FILES)))
        if not chunk:
            return None
        marker = b'"kek_version":%d,' % to_version
        return [
            (key_id, data)
            for key_id, data in read_files(self._vault.store, chunk)
            if isinstance(data, MiniKmsError) or marker not in data or key_id in self._unconfirmed
        ]

    # --- rewrapping --------------------------------------------------------------------------------------------------

    async def _rewrap(self, due: list[Read], to_version: int) -> list[DekRecord]:
        """The records as they are to be written."""
        if not due:
            return []
        await self._vault.wraps.take(to_version, len(due))
        records: list[DekRecord] = []
        for number, (key_id, data) in enumerate(due):
            record = self._rewrapped(key_id, data, to_version)
            if record is not None:
                records.append(record)
            if number % CRYPTO_SLICE == CRYPTO_SLICE - 1:
                scrub_stack()
                await asyncio.sleep(0)
        scrub_stack()
        return records

    def _rewrapped(self, key_id: str, data: bytes | MiniKmsError, to_version: int) -> DekRecord | None:
        """The record under the new version; None for a key that is gone, or that can't be read, which is noted."""
        vault = self._vault
        if key_id in vault.destroyed:
            return None  # a crash left its file, which the scan of this start removes: it must not come back
        try:
            if isinstance(data, MiniKmsError):
                raise data
            record = dek.parse(data, key_id)
            if record.kek_version == to_version:
                return record
            changed = self._checked_rewrap(record, to_version)
        except KeyNotFoundError:
            return None  # destroyed since it was listed
        except KeyUnreadableError as error:
            vault.damage.note(key_id, str(error))
            return None
        vault.damage.clear(key_id)
        return changed

    def _checked_rewrap(self, record: DekRecord, to_version: int) -> DekRecord:
        """Unwraps, wraps anew, unwraps that and compares. Raises KeyUnreadableError."""
        vault = self._vault
        with vault.arena.allocate() as key, vault.arena.allocate() as again:
            dek.unwrap_into(record, vault.unlocked.kek(record.kek_version), key.view)
            kek = vault.unlocked.kek(to_version)
            changed = dek.rewrap(record, key.view, kek, to_version, vault.nonces.next())
            dek.unwrap_into(changed, kek, again.view)
            if not hmac.compare_digest(key.view, again.view):
                raise KeyUnreadableError(f"key {record.id} did not survive its rewrap")
        return changed

    # --- writing -----------------------------------------------------------------------------------------------------

    async def _step(self, groups: StagedReplacements, records: list[DekRecord], changed: set[str], stamp: str) -> None:
        """Writes these records aside and puts those of the step before in place. Raises the first error, once those
        that the disk did confirm are noted.
        """
        placing, self._staged = self._staged, records
        if not placing and not records:
            return
        async with self._vault.locks.hold([record.id for record in placing], announced=False):
            unchanged = {file_name(record.id): record for record in placing if record.id not in changed}
            skip = {file_name(record.id) for record in placing} - unchanged.keys()
            loop = asyncio.get_running_loop()
            outcomes = await loop.run_in_executor(self._disk, self._write, groups, records, skip, stamp)
            for name, outcome in outcomes.items():
                record = unchanged[name]
                if outcome is None:
                    self._unconfirmed.discard(record.id)
                    self._vault.index.put(record)
                    self.rewrapped += 1
                else:
                    self._unconfirmed.add(record.id)
        for outcome in outcomes.values():
            if outcome is not None:
                raise outcome

    def _write(
        self, groups: StagedReplacements, records: list[DekRecord], skip: set[str], stamp: str
    ) -> dict[str, MiniKmsError | None]:
        """For the disk's thread: backups of these records' files, then the step."""
        replaced = (record.id for record in records if record.id not in self._unconfirmed)
        self._vault.backups.keep(self._vault.store, replaced, stamp)
        return groups.step([FileWrite(file_name(record.id), dek.encode(record)) for record in records], skip=skip)
