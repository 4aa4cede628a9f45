"""KEK rotation: never a moment in which a crash loses a key.

Owns: the steps below, their order, and resuming. Each step is durable before the next begins.
1. `begin`: the new KEK version is in the keyring as `pending`, and the new root's slot if one is given. From here on
   either root opens a keyring that knows both versions, and creates use the new one.
2. `rewrap`: creates that took the old version have reached the disk. Every file under another version than the new
one is
   kept as a backup, replaced by its rewrapped form (checked by unwrapping it first), in groups. This is repeated over
   the whole listing until one pass finds nothing to do.
3. `promote`: the new version is active, the old one retired.
A restart finds `rotation` in the keyring and goes on with step 2. A file that can't be read is listed and left; it does
not stop the rotation, and keeps its KEK from being destroyed. It must never remove a slot: that is `custody.slots`.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Final

from minikms.crypto.aead import scrub_stack
from minikms.custody import clock
from minikms.custody.atomic import FileWrite, write_group
from minikms.custody.backups import BackupStore
from minikms.custody.dekstore import file_name
from minikms.custody.indexing import Indexing, read_files
from minikms.custody.vault import Vault
from minikms.errors import ConflictError, KeyNotFoundError, KeyUnreadableError, MiniKmsError
from minikms.keys import dek, keyring
from minikms.keys.dek import DekRecord
from minikms.memory.arena import SecretSlot, fill_random

BATCH_FILES: Final = 256
CRYPTO_SLICE: Final = 32
"""Rewraps between two looks at other requests: about a quarter of a millisecond."""
RETRY_SECONDS: Final = 5.0
PASSES_MAX: Final = 100


class KekRotation:
    """The rotation of this data directory, if one runs. Lives in the loop's thread."""

    def __init__(self, vault: Vault, backups: BackupStore, indexing: Indexing, executor: Executor) -> None:
        self._vault = vault
        self._backups = backups
        self._indexing = indexing
        self._executor = executor
        self._starting = asyncio.Lock()
        self.rewrapped = 0
        """Keys rewrapped by the present rotation, or the last one, in this run."""
        self.last_error = ""

    @property
    def running(self) -> keyring.Rotation | None:
        return self._vault.unlocked.body.rotation

    def status(self) -> dict[str, object] | None:
        """Progress for `/status`; None when no rotation runs."""
        rotation = self.running
        if rotation is None:
            return None
        index = self._vault.index
        return {
            "from_version": rotation.from_version,
            "to_version": rotation.to_version,
            "started_at": rotation.started_at,
            "new_root": bool(rotation.slot_id),
            "rewrapped": self.rewrapped,
            "total": len(index) if self._indexing.complete else None,
            "last_error": self.last_error,
        }

    # --- beginning ---------------------------------------------------------------------------------------------------

    async def begin(self, root: SecretSlot | None) -> bool:
        """Step 1. False: this very rotation runs or was done already, and nothing was changed.

        Raises ConflictError for another rotation meanwhile, or a root key that was rotated away;
        StorageUnavailableError.
        """
        async with self._starting, self._vault.keyring_change():
            body = self._vault.unlocked.body
            if root is None:
                if body.rotation is None:
                    await self._begin(body, None)
                    return True
                if body.rotation.slot_id:
                    raise ConflictError("a rotation to a new root key is running; wait for it, see /status")
                return False
            given = self._vault.unlocked.fingerprint(root.view)
            present = body.slot_for(given)
            if body.rotation is not None:
                if present is not None and present.slot_id == body.rotation.slot_id:
                    return False
                raise ConflictError("another rotation is running; wait for it, see /status")
            if present is not None:
                if present.slot_id == body.slots[-1].slot_id:
                    return False
                raise ConflictError("this root key still opens the keyring but is not the newest; give a fresh one")
            if any(old.fingerprint == given for old in body.retired_roots):
                raise ConflictError("this root key was rotated away before; give a fresh one")
            await self._begin(body, root)
            return True

    async def _begin(self, body: keyring.Body, root: SecretSlot | None) -> None:
        keyring.check_has_room(body, new_root=root is not None)
        now_ns = clock.now_ns()
        at = clock.rfc3339(now_ns)
        unlocked = self._vault.unlocked
        version = max(kek.version for kek in body.keks) + 1
        try:
            added = None
            key_version = body.key_version
            if root is not None:
                # An epoch is written once, so no other slot has this id.
                added = unlocked.make_root(root.view, "request", fill_random, slot_id=f"s{body.epoch}", at=at)
                key_version = added.link.version
            kek = unlocked.make_kek(fill_random, version=version, state="pending", at=at, key_version=key_version)
            scrub_stack()
            await self._vault.store_body(
                keyring.begin_rotation(body, kek=kek, root=added, stamp=clock.stamp(now_ns), at=at)
            )
        except BaseException:
            unlocked.forget_kek(version)
            raise
        finally:
            unlocked.settle()
        self.rewrapped = 0
        self.last_error = ""

    # --- the long part -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Finishes a rotation that has begun, if there is one; a failing disk is tried again until it takes writes."""
        while (rotation := self.running) is not None:
            try:
                await self._vault.creates_drained(rotation.from_version)
                for _ in range(PASSES_MAX):
                    if await self._pass(rotation) == 0:
                        break
                async with self._vault.keyring_change():
                    body = keyring.promote(self._vault.unlocked.body, at=clock.rfc3339(clock.now_ns()))
                    await self._vault.store_body(body)
            except MiniKmsError as error:
                self.last_error = str(error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self.last_error = ""

    async def _pass(self, rotation: keyring.Rotation) -> int:
        """One pass over all files; how many were rewrapped."""
        loop = asyncio.get_running_loop()
        names = self._vault.store.list_ids()
        done = 0
        while chunk := await loop.run_in_executor(self._executor, _next_chunk, names):
            stale = await loop.run_in_executor(self._executor, self._stale, chunk, rotation.to_version)
            if stale:
                done += await self._rewrap(stale, rotation)
        return done

    def _stale(self, key_ids: list[str], to_version: int) -> list[str]:
        """Those whose file isn't under the new version. A look at the bytes: of a million, only the due are parsed."""
        marker = b'"kek_version":%d,' % to_version
        return [
            key_id
            for key_id, data in read_files(self._vault.store, key_ids)
            if isinstance(data, MiniKmsError) or marker not in data
        ]

    async def _rewrap(self, key_ids: list[str], rotation: keyring.Rotation) -> int:
        loop = asyncio.get_running_loop()
        await self._vault.take_wraps(rotation.to_version, len(key_ids))
        async with self._vault.locks.hold(key_ids):
            files = await loop.run_in_executor(self._executor, read_files, self._vault.store, key_ids)
            changed: list[DekRecord] = []
            for number, (key_id, data) in enumerate(files):
                record = self._rewrapped(key_id, data, rotation.to_version)
                if record is not None:
                    changed.append(record)
                if number % CRYPTO_SLICE == CRYPTO_SLICE - 1:
                    scrub_stack()
                    await asyncio.sleep(0)
            scrub_stack()
            if changed:
                await loop.run_in_executor(self._executor, self._replace, changed, rotation.stamp)
            for record in changed:
                self._vault.reload(record)
                self.rewrapped += 1
        return len(changed)

    def _rewrapped(self, key_id: str, data: bytes | MiniKmsError, to_version: int) -> DekRecord | None:
        """The record under the new version; None when there is nothing to do, or nothing that can be done."""
        unlocked = self._vault.unlocked
        try:
            if isinstance(data, MiniKmsError):
                raise data
            record = dek.parse(data, key_id)
            if record.kek_version == to_version:
                return None
            with self._vault.arena.allocate() as key, self._vault.arena.allocate() as again:
                dek.unwrap_into(record, unlocked.kek(record.kek_version), key.view)
                kek = unlocked.kek(to_version)
                changed = dek.rewrap(record, key.view, kek, to_version, self._vault.nonces.next())
                dek.unwrap_into(changed, kek, again.view)
                if not hmac.compare_digest(key.view, again.view):
                    raise KeyUnreadableError(f"key {key_id} did not survive its rewrap")
        except KeyNotFoundError:
            return None  # destroyed since it was listed
        except MiniKmsError as error:
            self._indexing.note_unreadable(key_id, str(error))
            return None
        return changed

    def _replace(self, records: list[DekRecord], stamp: str) -> None:
        """Backups, then the new files. For a worker thread. Raises the first error; what was replaced stays so."""
        self._backups.keep(self._vault.store, [record.id for record in records], stamp)
        writes = [FileWrite(file_name(record.id), dek.encode(record)) for record in records]
        for outcome in write_group(self._vault.store.directory_fd, writes):
            if outcome is not None:
                raise outcome


def _next_chunk(names: Iterator[str]) -> list[str]:
    return list(itertools.islice(names, BATCH_FILES))
