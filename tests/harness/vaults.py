"""A vault over real files, without a daemon, for the tests of custody.

Owns: opening a data directory in this process, with its parts joined as in the daemon. Invariants: real threads, real
files, a real keyring; only the arena is plain memory. It asserts nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from minikms import datadir
from minikms.audit import Event
from minikms.custody.rotation import KekRotation, Pruning
from minikms.custody.vault import Indexing, Vault
from minikms.keys import dek
from minikms.keys.dek import DekRecord
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.roots.providers import KeyFile

ARENA_SLOTS = 96


class OpenedVault:
    """The parts, joined; made by `opened_vault`."""

    def __init__(self, directory: Path, vault: Vault, *, reader: ThreadPoolExecutor, disk: ThreadPoolExecutor) -> None:
        self.directory = directory
        self.vault = vault
        self.arena = vault.arena
        self.reader = reader
        self.rotation = KekRotation(vault, reader=reader, disk=disk)
        self.pruning = Pruning(vault, reader=reader, disk=disk)
        self.indexing = Indexing(vault, reader)

    # --- what is on disk ---

    def file(self, key_id: str) -> Path:
        return self.directory / "kms-deks" / f"{key_id}.json"

    def on_disk(self, key_id: str) -> DekRecord:
        return dek.parse(self.file(key_id).read_bytes(), key_id)

    def keks_on_disk(self, key_ids: Iterable[str]) -> set[int]:
        return {self.on_disk(key_id).kek_version for key_id in key_ids}

    def backups(self, key_id: str = "") -> list[Path]:
        return sorted((self.directory / "kms-deks-backup").glob(f"{key_id}*"))

    def kek_states(self) -> dict[int, str]:
        return {kek.version: kek.state for kek in self.vault.keyring.body.keks}

    # --- doing ---

    async def make(self, count: int, thread_id: str = "t") -> list[str]:
        """Keys made at once, as many connections would."""
        records = await asyncio.gather(*(self.vault.create(thread_id) for _ in range(count)))
        return [record.id for record in records]

    def keys(self, key_ids: Iterable[str]) -> dict[str, bytes]:
        """The key of each, as it opens now."""
        found = {}
        for key_id in key_ids:
            self.vault.cache.drop(key_id)
            found[key_id] = bytes(self.vault.opened(key_id).view)
        return found

    async def rotate(self, root: SecretSlot | None = None) -> None:
        await self.rotation.begin(root)
        await self.rotation.run()

    def slot_of(self, root: bytes) -> SecretSlot:
        slot = self.arena.allocate()
        slot.view[:] = root
        return slot


class SilentAudit:
    """Takes every event and keeps none."""

    def add(self, event: Event) -> None:
        pass

    async def add_written(self, event: Event, *, durable: bool) -> None:
        pass

    def require_writable(self) -> None:
        pass


def key_file(directory: Path) -> Path:
    """The root key of a data directory, beside it; made when it is not there."""
    path = directory.with_name(directory.name + ".key")
    if not path.exists():
        path.touch(0o600)
        path.write_text(os.urandom(32).hex() + "\n")
    return path


@asynccontextmanager
async def opened_vault(
    directory: Path, *, slots: int = ARENA_SLOTS, cache_keys_max: int = 16, key: Path | None = None
) -> AsyncIterator[OpenedVault]:
    """A start, and at the end of the block a stop. A directory that isn't there is made."""
    with (
        datadir.lock_data_dir(str(directory)) as lock,
        SecretArena(slots, force_fallback=True) as arena,
        ThreadPoolExecutor(1) as disk,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as journal,
    ):
        data = datadir.open_for_service(
            lock,
            KeyFile(key or key_file(directory)),
            arena=arena,
            disk=disk,
            journal=journal,
            options=datadir.Options(audit_fsync="never", cache_keys_max=cache_keys_max),
        )
        try:
            yield OpenedVault(directory, data.vault, reader=reader, disk=disk)
        finally:
            await data.drain()
            data.close()
