"""The scan of all DEK files after a start.

Owns: filling the key index in the background, and what a start has to finish: a replaced key that a crash left active
is retired, the file of a destroyed key is removed. Invariants: the daemon answers before and during the scan; files
are read in a worker thread, a few at a time, so that requests don't wait; a bad file is listed with its reason and
stops nothing. It must never change a key that the tombstones or a newer key do not speak of.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Final

from minikms.custody.dekstore import DekStore
from minikms.custody.vault import Vault
from minikms.errors import KeyNotFoundError, MiniKmsError
from minikms.keys import dek
from minikms.keys.dek import DekRecord
from minikms.keys.index import KeyIndex

CHUNK_FILES: Final = 128
PAUSE_SECONDS: Final = 0.001
UNREADABLE_LISTED_MAX: Final = 100


class Indexing:
    """One scan. `complete` tells whether listings have everything."""

    def __init__(self, vault: Vault, index: KeyIndex, executor: Executor) -> None:
        self._vault = vault
        self._index = index
        self._executor = executor
        self.complete = False
        self.unreadable: dict[str, str] = {}
        self.unreadable_count = 0

    async def run(self) -> None:
        """Reads every file once, then finishes what a crash interrupted."""
        loop = asyncio.get_running_loop()
        names = self._vault.store.list_ids()
        replacing: list[DekRecord] = []
        while chunk := await loop.run_in_executor(self._executor, _next_chunk, names):
            files = await loop.run_in_executor(self._executor, read_files, self._vault.store, chunk)
            for key_id, data in files:
                record = await self._take(key_id, data)
                if record is not None and record.replaces:
                    replacing.append(record)
            await asyncio.sleep(PAUSE_SECONDS)
        for record in replacing:
            await self._finish_replacing(record)
        self.complete = True

    async def _take(self, key_id: str, data: bytes | MiniKmsError) -> DekRecord | None:
        if key_id in self._vault.destroyed:
            await self._vault.remove_files(key_id)
            return None
        try:
            if isinstance(data, MiniKmsError):
                raise data
            record = dek.parse(data, key_id)
            self._vault.unlocked.kek(record.kek_version)
        except KeyNotFoundError:
            return None  # destroyed since it was listed
        except MiniKmsError as error:
            self.note_unreadable(key_id, str(error))
            return None
        self._index.put(record, only_new=True)
        return record

    def note_unreadable(self, key_id: str, why: str) -> None:
        """Lists a bad file; beyond a bound only their number."""
        if key_id not in self.unreadable:
            self.unreadable_count += 1
            if len(self.unreadable) < UNREADABLE_LISTED_MAX:
                self.unreadable[key_id] = why

    async def _finish_replacing(self, record: DekRecord) -> None:
        try:
            if self._vault.record(record.replaces).state == "active":
                await self._vault.retire(record.replaces, replaced_by=record.id, again=True)
        except MiniKmsError:
            return  # destroyed since, or unreadable and listed as such


def _next_chunk(names: Iterator[str]) -> list[str]:
    return list(itertools.islice(names, CHUNK_FILES))


def read_files(store: DekStore, key_ids: list[str]) -> list[tuple[str, bytes | MiniKmsError]]:
    """Each key's file, or why it can't be read. For a worker thread."""
    found: list[tuple[str, bytes | MiniKmsError]] = []
    for key_id in key_ids:
        try:
            found.append((key_id, store.read(key_id)))
        except MiniKmsError as error:
            found.append((key_id, error))
    return found
