"""The scan of all DEK files after a start.

Owns: filling the key index in the background, and what a start has to finish: a replaced key that a crash left active
is retired, files and backups of a destroyed key are removed. Invariants: the daemon answers before and during the scan;
files are read in a worker thread, a few at a time, so that requests don't wait; a bad file is listed with its reason
and stops nothing; a failing disk is tried again. It must never change a key that the tombstones or a newer key of the
same thread do not speak of.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Final

from minikms.custody.dekstore import DekStore
from minikms.custody.vault import Vault
from minikms.errors import KeyNotFoundError, KeyUnreadableError, MiniKmsError
from minikms.keys import dek
from minikms.keys.dek import DekRecord

CHUNK_FILES: Final = 128
PAUSE_SECONDS: Final = 0.001
RETRY_SECONDS: Final = 5.0


class Indexing:
    """One scan. `complete` tells whether listings have everything."""

    def __init__(self, vault: Vault, executor: Executor) -> None:
        self._vault = vault
        self._executor = executor
        self.complete = False

    async def run(self) -> None:
        """Reads every file once, then finishes what a crash interrupted. Returns when both are done."""
        while not self.complete:
            try:
                await self._scan()
            except MiniKmsError:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self.complete = True

    async def _scan(self) -> None:
        loop = asyncio.get_running_loop()
        # In order of id: then the index only ever grows at its end.
        # A listing may pass over a file that a resumed rotation replaces meanwhile.
        listings = 1 if self._vault.keyring.body.rotation is None else 2
        key_ids = await loop.run_in_executor(self._executor, _newest_first, self._vault.store, listings)
        replacing: list[DekRecord] = []
        while key_ids:
            chunk = [key_ids.pop() for _ in range(min(CHUNK_FILES, len(key_ids)))]
            for key_id, data in await loop.run_in_executor(self._executor, read_files, self._vault.store, chunk):
                record = await self._take(key_id, data)
                if record is not None and record.replaces:
                    replacing.append(record)
            await asyncio.sleep(PAUSE_SECONDS)
        for record in replacing:
            await self._finish_replacing(record)
        if self._vault.destroyed:
            await loop.run_in_executor(self._executor, self._vault.backups.remove_of_all, self._vault.destroyed)

    async def _take(self, key_id: str, data: bytes | MiniKmsError) -> DekRecord | None:
        vault = self._vault
        if key_id in vault.destroyed:
            async with vault.locks.hold((key_id,)):
                await vault.remove_files(key_id)
            return None
        try:
            if isinstance(data, MiniKmsError):
                raise data
            record = dek.parse(data, key_id)
            vault.unlocked.kek(record.kek_version)
        except KeyNotFoundError:
            return None  # destroyed since it was listed
        except KeyUnreadableError as error:
            vault.damage.note(key_id, str(error))
            return None
        vault.index.put(record, only_new=True)
        return record

    async def _finish_replacing(self, new: DekRecord) -> None:
        try:
            old = self._vault.record(new.replaces)
            if old.state == "active":
                self._vault.check_replaces(old, new.thread_id, new.purpose)
                await self._vault.retire(old.id, replaced_by=new.id, again=True)
        except MiniKmsError:
            return  # destroyed since, or unreadable and listed as such, or of another thread


def _newest_first(store: DekStore, listings: int) -> list[str]:
    found: set[str] = set()
    for _ in range(listings):
        found.update(store.list_ids())
    return sorted(found, reverse=True)


def read_files(store: DekStore, key_ids: list[str]) -> list[tuple[str, bytes | MiniKmsError]]:
    """Each key's file, or why it can't be read. For a worker thread."""
    found: list[tuple[str, bytes | MiniKmsError]] = []
    for key_id in key_ids:
        try:
            found.append((key_id, store.read(key_id)))
        except MiniKmsError as error:
            found.append((key_id, error))
    return found
