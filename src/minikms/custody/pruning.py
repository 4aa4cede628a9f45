"""What may be destroyed for good: KEK versions that nothing needs, and backups that nobody needs.

Owns: the census of what live files and backups are wrapped under, and the decision. Invariants: a KEK version is
destroyed only when every live file and every backup was read, unwraps, and is under another version, also those files
that were replaced while the directory was being listed; a file that can't be read or does not unwrap keeps every
version, for it may need any; the backups of a key whose file is missing or can't be read are kept, for they may be its
last copy. It must never run beside a rotation, nor trust what a file says of itself: each is unwrapped.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Container
from concurrent.futures import Executor
from typing import Final, NamedTuple, TypeVar

from minikms import api
from minikms.crypto.aead import scrub_stack
from minikms.custody.indexing import read_files
from minikms.custody.vault import Vault
from minikms.errors import KeyNotFoundError, KeyUnreadableError, MiniKmsError
from minikms.keys import dek, keyring

CHUNK_FILES: Final = 128
UNWRAPS_SLICE: Final = 32
"""Unwraps between two looks at other requests."""

T = TypeVar("T")
Read = tuple[str, bytes | MiniKmsError]


class Census(NamedTuple):
    """The KEK versions that files are wrapped under, and the keys of those that can't be read."""

    versions: set[int]
    unreadable: set[str]


class Pruning:
    """`reader` reads files, `disk` changes them."""

    def __init__(self, vault: Vault, *, reader: Executor, disk: Executor) -> None:
        self._vault = vault
        self._reader = reader
        self._disk = disk

    async def prune(self, *, backups: bool, before: str | None = None) -> api.PruneKekAnswer:
        """With `backups`, first removes those of stamps before `before` (None: all); then destroys each retired KEK
        version that nothing needs. Raises StorageUnavailableError, with a part of it done.
        """
        live = await self._live_census()
        removed = await self._remove_backups(before, live.unreadable) if backups else 0
        kept_in_backups = await self._backup_census()
        destroyed: list[int] = []
        kept: list[api.KeptKek] = []
        for kek in self._vault.keyring.body.keks:
            if kek.state != "retired":
                continue
            why = _why_kept(kek.version, live, kept_in_backups)
            if why:
                kept.append(api.KeptKek(kek.version, why))
                continue
            await self._destroy(kek.version)
            destroyed.append(kek.version)
        return api.PruneKekAnswer(destroyed, kept, removed)

    async def keep_rotations(self, count: int) -> int:
        """Right after a rotation: removes the backups of all but the newest `count`; the number of backups removed."""
        before = await _in(self._disk, lambda: self._vault.backups.stamp_to_keep(count))
        # The rotation has just read every file, so the damaged ones are known, unless they are too many to be listed.
        if before is None or not self._vault.damage.complete:
            return 0
        return await self._remove_backups(before, self._vault.damage.key_ids())

    async def _remove_backups(self, before: str | None, spare: Container[str]) -> int:
        vault = self._vault
        return await _in(
            self._disk, lambda: vault.backups.prune(vault.store, before=before, spare=spare, gone=vault.destroyed)
        )

    async def _destroy(self, version: int) -> None:
        at = self._vault.now()
        await self._vault.keyring.change(lambda body: keyring.destroy_kek(body, version, at=at))
        self._vault.unlocked.forget_kek(version)

    # --- the census --------------------------------------------------------------------------------------------------

    async def _live_census(self) -> Census:
        store = self._vault.store
        with self._vault.locks.watch() as changed:
            key_ids = store.list_ids(changed=changed)
            return await self._census(lambda: read_files(store, list(itertools.islice(key_ids, CHUNK_FILES))))

    async def _backup_census(self) -> Census:
        store = self._vault.backups
        backups = store.listed()

        def read() -> list[Read]:
            found: list[Read] = []
            for backup in itertools.islice(backups, CHUNK_FILES):
                try:
                    data = store.read(backup)
                except KeyUnreadableError as error:
                    found.append((backup.key_id, error))
                else:
                    found.append((backup.key_id, KeyNotFoundError("key not found") if data is None else data))
            return found

        return await self._census(read)

    async def _census(self, read: Callable[[], list[Read]]) -> Census:
        """Unwraps all that `read`, in the reading thread, gives until it gives nothing more."""
        census = Census(set(), set())
        while chunk := await _in(self._reader, read):
            for number, (key_id, data) in enumerate(chunk):
                self._count(census, key_id, data)
                if number % UNWRAPS_SLICE == UNWRAPS_SLICE - 1:
                    scrub_stack()
                    await asyncio.sleep(0)
            scrub_stack()
        return census

    def _count(self, census: Census, key_id: str, data: bytes | MiniKmsError) -> None:
        try:
            if isinstance(data, MiniKmsError):
                raise data
            record = dek.parse(data, key_id)
            with self._vault.arena.allocate() as key:
                dek.unwrap_into(record, self._vault.unlocked.kek(record.kek_version), key.view)
        except KeyNotFoundError:
            return  # removed since it was listed
        except KeyUnreadableError:
            census.unreadable.add(key_id)
        else:
            census.versions.add(record.kek_version)


def _why_kept(version: int, live: Census, backups: Census) -> str:
    """Why a KEK version must stay; empty when nothing needs it."""
    if version in live.versions:
        return "a key is wrapped under it; rotate the KEK"
    if version in backups.versions:
        return "a backup of a key is wrapped under it; prune the backups"
    if live.unreadable or backups.unreadable:
        return "the file or backup of a key can't be read and may need it, see keys.unreadable_files in /status"
    return ""


async def _in(executor: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work)
