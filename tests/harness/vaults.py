"""A vault over real files, without a daemon, for the tests of custody.

Owns: opening a data directory in this process, with its parts joined as in the daemon. Invariants: real threads, real
files, a real keyring; only the arena is plain memory. It asserts nothing.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from minikms import api, datadir
from minikms.audit import Event
from minikms.custody.journal_format import decode
from minikms.custody.vault import Indexing, Permit, Vault, permitted
from minikms.keys import dek
from minikms.keys.dek import DekRecord
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.roots.providers import KeyFile
from minikms_daemon.audit.turns import TurnAudit
from minikms_daemon.rotation import Begun, KekRotation, Pruning
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.keks import KekVerbs
from minikms_daemon.service.root_removal import RootRemoval

ARENA_SLOTS = 96


async def create(
    vault: Vault, thread_id: str, *, purpose: api.Purpose = "thread", replaces: str = "", permit: Permit = permitted
) -> DekRecord:
    """A new key, as the verb makes it, with its file."""
    record = await vault.create_in_log(thread_id, purpose=purpose, replaces=replaces, permit=permit)
    await vault.journal.file_written(record.id)
    return record


class OpenedVault:
    """The parts, joined; made by `opened_vault`."""

    def __init__(
        self, directory: Path, data: datadir.DataDir, key: Path, *, reader: ThreadPoolExecutor, disk: ThreadPoolExecutor
    ) -> None:
        self.directory = directory
        self.key = key
        self.data = data
        self.vault = vault = data.vault
        self.log = data.log
        self.slot = data.slot
        self.replayed = data.replayed
        self.arena = vault.arena
        self.reader = reader
        self.rotation = KekRotation(vault, reader=reader, disk=disk)
        self.pruning = Pruning(vault, reader=reader, disk=disk)
        self.indexing = Indexing(vault, reader)
        self.audit = TurnAudit(data.log, disk)
        self.removal = RootRemoval(vault, self.audit)

    # --- what is on disk ---

    def file(self, key_id: str) -> Path:
        return self.directory / "kms-deks" / f"{key_id}.json"

    def on_disk(self, key_id: str) -> DekRecord:
        return dek.parse(self.file(key_id).read_bytes(), key_id)

    def keks_on_disk(self, key_ids: Iterable[str]) -> set[int]:
        return {self.on_disk(key_id).kek_version for key_id in key_ids}

    def backups(self, key_id: str = "") -> list[bytes]:
        """The old contents in all rotation backups, or those of a key."""
        paths = sorted((self.directory / "kms-deks-backup").rglob("*.journal"))
        found = [each for path in paths if path.is_file() for each in decode(path.read_bytes()).intact]
        return [each.old for each in found if each.old and key_id in ("", each.key_id)]

    def kek_states(self) -> dict[int, str]:
        return {kek.version: kek.state for kek in self.vault.keyring.body.keks}

    # --- doing ---

    async def make(self, count: int, thread_id: str = "t") -> list[str]:
        """Keys made at once, as many connections would."""
        records = await asyncio.gather(*(create(self.vault, thread_id) for _ in range(count)))
        return [record.id for record in records]

    def keys(self, key_ids: Iterable[str]) -> dict[str, bytes]:
        """The key of each, as it opens now."""
        found = {}
        for key_id in key_ids:
            self.vault.cache.drop(key_id)
            found[key_id] = bytes(self.vault.opened(key_id).view)
        return found

    async def begin(self, root: SecretSlot | None = None) -> Begun:
        """Step 1 of a rotation; a new root key replaces the one of this start."""
        return await self.rotation.begin(root, replaces=self.slot.slot_id)

    def kek_verbs(self, table: VerbTable) -> KekVerbs:
        return KekVerbs(
            vault=self.vault,
            table=table,
            rotation=self.rotation,
            pruning=self.pruning,
            removal=self.removal,
            proved_slot_id=self.slot.slot_id,
        )

    async def rotate(self, root: SecretSlot | None = None) -> None:
        await self.begin(root)
        await self.rotation.run()

    def slot_of(self, root: bytes) -> SecretSlot:
        slot = self.arena.allocate()
        slot.view[:] = root
        return slot


def copied_vault(one: OpenedVault, to: Path) -> None:
    """The directory and its root key as they are now: what a process that is killed at this moment leaves."""
    shutil.copytree(one.directory, to)
    shutil.copy2(one.key, to.with_name(to.name + ".key"))


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
    directory: Path,
    *,
    slots: int = ARENA_SLOTS,
    cache_keys_max: int = 16,
    key: Path | None = None,
    accept_restore: bool = False,
    threads: bool = False,
    later_keyring: bytes = b"",
) -> AsyncIterator[OpenedVault]:
    """A start, and at the end of the block a stop. A directory that isn't there is made."""
    with (
        datadir.lock_data_dir(str(directory)) as lock,
        SecretArena(slots, force_fallback=True) as arena,
        ThreadPoolExecutor(1) as disk,
        ThreadPoolExecutor(1) as reader,
    ):
        used = key or key_file(directory)
        data = datadir.open_for_service(
            lock,
            KeyFile(used),
            arena=arena,
            disk=disk,
            options=datadir.Options(
                accept_restore=accept_restore,
                audit_fsync="never",
                cache_keys_max=cache_keys_max,
                index_threads=threads,
                later_keyring=later_keyring,
            ),
        )
        try:
            yield OpenedVault(directory, data, used, reader=reader, disk=disk)
        finally:
            await data.vault.drain()
            data.close()
