"""The vault: opened DEKs, their key files, and the scan of all key files after a start.

Owns: the cache of opened DEKs; every change of a DEK's file except its rewrap: create, retire, destroy; filling the key
index in the background, and what a start has to complete: it retires a replaced key that a crash left active, and
removes the files and rotation backups of destroyed keys. Invariants:
- A key id is answered only after its file and its directory entry are durable.
- One change of a file at a time (`KeyLocks`); a change reads the file again while it holds the lock.
- A create takes the KEK version in the same step of the event loop in which it wraps the DEK. A rotation waits for the
  creates that took the older version (`WrapReservation.creates_done`).
- An unreadable file is an error of its own key, and of no other.
- An opened key is valid until the next key is opened or until its user awaits; after that it may have been zeroed.
- The daemon answers before and during the scan. The scan reads files in a worker thread, a few at a time. A damaged
  file is listed with its reason and stops nothing; a failing disk is tried again.

All cryptography runs in the event loop's thread; only waits for the disk run elsewhere. It must never decide who may do
what, and the scan must never change a key that neither a tombstone nor a newer key of the same thread names.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from concurrent.futures import Executor
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms import api
from minikms.crypto import labels
from minikms.crypto.aead import NonceSource, scrub_stack
from minikms.custody.deks import SCAN_FILES, DekStore, KeyLocks, UnreadableKeys
from minikms.custody.files import now_ns, now_rfc3339, rfc3339
from minikms.custody.keyring_file import KeyringFile, StoredKeyring, WrapReservation
from minikms.custody.leases import Leases, UseLease
from minikms.custody.rotation_backups import RotationBackups
from minikms.errors import (
    ConflictError,
    KeyDestroyedError,
    KeyNotFoundError,
    KeyRetiredError,
    KeyUnreadableError,
    MiniKmsError,
    WrongThreadError,
)
from minikms.keys import dek, keyring
from minikms.keys.cache import KeyCache
from minikms.keys.dek import KEY_ID_RANDOM_BYTES, DekRecord, DekState, key_id_to_bytes, make_key_id, move_dek
from minikms.keys.index import KeyIndex
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot, fill_random

CACHE_KEYS_MAX: Final = 16_384
CACHE_AGE_SECONDS_MAX: Final = 3600
SCAN_PAUSE_SECONDS: Final = 0.001
SCAN_RETRY_SECONDS: Final = 5.0


class OpenDek:
    """A DEK in the arena, with everything that its use needs. `release` zeroes it."""

    __slots__ = (
        "aad_if_none",
        "aad_prefix",
        "cipher",
        "key_id",
        "lease",
        "purpose",
        "slot",
        "state",
        "thread_id",
        "view",
    )

    def __init__(self, record: DekRecord, slot: SecretSlot, lease: UseLease) -> None:
        self.key_id = record.id
        self.thread_id = record.thread_id
        self.purpose = record.purpose
        self.state: DekState = record.state
        self.aad_prefix = labels.record_aad_prefix(key_id=record.id, thread_id=record.thread_id)
        self.aad_if_none = labels.record_aad(self.aad_prefix, b"")
        self.lease = lease
        self.slot = slot
        self.view = slot.view
        self.cipher: AESGCM | None = None
        """For the current turn of the event loop only: see `Vault.turn_cipher`."""

    def release(self) -> None:
        """Zeroes the key."""
        self.cipher = None
        self.slot.release()

    def __repr__(self) -> str:
        return f"<OpenDek {self.key_id} {self.state}>"

    def record_aad(self, caller_aad: bytes) -> bytes:
        """The associated data of a record under this key."""
        return labels.record_aad(self.aad_prefix, caller_aad)

    def check_thread(self, thread_id: str) -> None:
        """Raises WrongThreadError unless the key belongs to the thread."""
        if thread_id != self.thread_id:
            raise WrongThreadError("the key belongs to another thread")

    def check_encrypts(self) -> None:
        """Raises KeyRetiredError unless the key is active."""
        if self.state != "active":
            raise KeyRetiredError(f"key {self.key_id} is retired: it only decrypts; use the thread's current key")


class Vault:
    """The keys of a data directory. `executor` is the one thread that changes key files and keyring."""

    def __init__(
        self,
        *,
        arena: SecretArena,
        unlocked: UnlockedKeyring,
        keyring_file: KeyringFile,
        store: DekStore,
        rotation_backups: RotationBackups,
        leases: Leases,
        executor: Executor,
        nonces: NonceSource,
        cache_keys_max: int = CACHE_KEYS_MAX,
    ) -> None:
        self.arena = arena
        self.unlocked = unlocked
        self.keyring = StoredKeyring(unlocked, keyring_file)
        self.wrap_reservation = WrapReservation(self.keyring)
        self.store = store
        self.rotation_backups = rotation_backups
        self._executor = executor
        self.leases = leases
        self.nonces = nonces
        self.locks = KeyLocks()
        self.cache: KeyCache[OpenDek] = KeyCache(
            count_max=cache_keys_max, age_ns_max=CACHE_AGE_SECONDS_MAX * 1_000_000_000
        )
        self.index = KeyIndex()
        self.unreadable = UnreadableKeys()
        self.destroyed = {tombstone.key_id for tombstone in unlocked.body.tombstones}
        self._turn_keys: list[OpenDek] = []

    # --- reading -----------------------------------------------------------------------------------------------------

    def opened(self, key_id: str) -> OpenDek:
        """The opened key, from the cache or from its file.

        Raises KeyNotFoundError, KeyDestroyedError, KeyUnreadableError, StorageUnavailableError, ArenaFullError.
        """
        found = self.cache.get(key_id)
        if found is not None:
            return found
        record = self.record(key_id)
        slot = self.arena.allocate()
        try:
            dek.unwrap_into(record, self.unlocked.kek(record.kek_version), slot.view)
        except BaseException as error:
            slot.release()
            if isinstance(error, KeyUnreadableError):
                self.unreadable.add(key_id, str(error))
            raise
        finally:
            scrub_stack()  # here, where the KEK's schedule lies: the turn may end at another depth of the stack
        self.unreadable.remove(key_id)
        opened = OpenDek(record, slot, self.leases.get(key_id_to_bytes(key_id)))
        self.cache.put(key_id, opened, time.monotonic_ns())
        return opened

    def record(self, key_id: str) -> DekRecord:
        """The key's record as it is on disk now. Raises as `opened`, except ArenaFullError."""
        if key_id in self.destroyed:
            raise KeyDestroyedError(f"key {key_id} was destroyed; what it encrypted can't be read again")
        try:
            return dek.parse(self.store.read(key_id), key_id)
        except KeyUnreadableError as error:
            self.unreadable.add(key_id, str(error))
            raise

    # --- ciphers of a turn -------------------------------------------------------------------------------------------

    def turn_cipher(self, opened: OpenDek) -> AESGCM:
        """The key's cipher, kept until `end_turn`. Its key schedule is on the heap, so it must not outlive the turn.

        Only for a verb that answers in this turn of the event loop. Making a cipher costs twice as much as using it.
        """
        cipher = opened.cipher
        if cipher is None:
            cipher = opened.cipher = AESGCM(opened.view)
            self._turn_keys.append(opened)
        return cipher

    def end_turn(self) -> None:
        """Drops the ciphers of the turn (OpenSSL clears their memory) and overwrites the used part of the stack."""
        for opened in self._turn_keys:
            opened.cipher = None
        self._turn_keys.clear()
        scrub_stack()

    # --- changing ----------------------------------------------------------------------------------------------------

    async def create(self, thread_id: str, *, purpose: api.Purpose = "thread", replaces: str = "") -> DekRecord:
        """A new key, durable on return. `replaces` names a key of the same thread, which is retired.

        A crash between the two files leaves both keys active, and the new record names the old one. The scan of the
        next start then retires the old one.
        """
        if replaces:
            self.check_replaces(self.record(replaces), thread_id, purpose)
        version = await self.wrap_reservation.begin_create()
        try:
            record = self._make_key(thread_id, purpose, replaces, version)
            await self.store.create(record.id, dek.encode(record))
        finally:
            self.wrap_reservation.end_create(version)
        self.index.put(record)
        if replaces:
            try:
                await self.retire(replaces, replaced_by=record.id, again=True)
            except MiniKmsError:
                await self._remove_new_key(record.id)
                raise
        return record

    def check_replaces(self, old: DekRecord, thread_id: str, purpose: api.Purpose) -> None:
        """Raises unless a new key of `thread_id` may replace `old`."""
        if old.thread_id != thread_id:
            raise WrongThreadError("the key to replace belongs to another thread")
        if old.purpose != purpose:
            raise ConflictError("the key to replace has another purpose")

    def _make_key(self, thread_id: str, purpose: api.Purpose, replaces: str, version: int) -> DekRecord:
        """A fresh wrapped key. The key itself leaves the arena here: a wait for the disk must not hold a slot."""
        created_ns = now_ns()
        key_id = make_key_id(created_ns // 1_000_000, os.urandom(KEY_ID_RANDOM_BYTES))
        with self.arena.allocate() as slot:
            fill_random(slot.view)
            record = dek.new(
                key_id=key_id,
                thread_id=thread_id,
                purpose=purpose,
                created_at=rfc3339(created_ns),
                kek=self.unlocked.kek(version),
                kek_version=version,
                dek=slot.view,
                nonce=self.nonces.next(),
                replaces=replaces,
            )
        scrub_stack()
        self.leases.granted_at_creation(key_id_to_bytes(key_id))
        return record

    async def _remove_new_key(self, key_id: str) -> None:
        """Removes a new key that no caller knows. If the disk refuses this too, the next start finds the key and
        retires the one that it replaces.
        """
        with contextlib.suppress(MiniKmsError):
            async with self.locks.hold((key_id,)):
                await asyncio.get_running_loop().run_in_executor(self._executor, self.store.remove, key_id)
                self.index.remove(key_id)

    async def retire(self, key_id: str, *, replaced_by: str = "", again: bool = False) -> DekRecord:
        """Retires the key: it only decrypts from here on. With `again` a retired key is no error and stays as it is."""
        async with self.locks.hold((key_id,)):
            record = self.record(key_id)
            if again and record.state == "retired":
                return record
            changed = dek.retired(record, at=now_rfc3339(), replaced_by=replaced_by)
            try:
                await self.store.replace(key_id, dek.encode(changed))
            except BaseException:
                # The new file may be in place without being durable, so the next use of the key reads the file again.
                self.cache.drop(key_id)
                raise
            self.index.put(changed)
            if (opened := self.cache.get(key_id)) is not None:
                opened.state = changed.state
        return changed

    def check_destroyable(self, key_id: str) -> None:
        """Raises unless the key is retired, or destroyed already: ConflictError for an active key."""
        if key_id not in self.destroyed:
            move_dek(self.record(key_id).state, "destroy")

    async def destroy(self, key_id: str) -> int:
        """Destroys a retired key: first the tombstone, then its rotation backups, then its file.

        Returns the number of rotation backups removed. A repeated call removes what an interrupted one left. Raises
        ConflictError for an active key.
        """
        async with self.locks.hold((key_id,)):
            self.check_destroyable(key_id)
            if key_id not in self.destroyed:
                at = now_rfc3339()
                await self.keyring.change(lambda body: keyring.add_tombstone(body, key_id, at=at))
                self.destroyed.add(key_id)
                self.cache.drop(key_id)
                self.index.remove(key_id)
                self.unreadable.remove(key_id)
            return await self.remove_files(key_id)

    async def remove_files(self, key_id: str) -> int:
        """Removes the rotation backups and the file of a destroyed key, durably; the number of rotation backups.

        The caller holds the key's lock.
        """

        def remove() -> int:
            # The file goes last: while it exists, the scan of the next start knows that something is left to remove.
            count = self.rotation_backups.remove_of(key_id)
            self.store.remove(key_id)
            return count

        return await asyncio.get_running_loop().run_in_executor(self._executor, remove)

    def expire(self) -> None:
        """Zeroes the opened keys that are older than CACHE_AGE_SECONDS_MAX."""
        self.cache.expire(time.monotonic_ns())

    def close(self) -> None:
        """Zeroes every key."""
        self.cache.clear()
        self.unlocked.release()


class Indexing:
    """The scan of all key files. `executor` reads them. `complete`: whether the index has all keys."""

    def __init__(self, vault: Vault, executor: Executor) -> None:
        self._vault = vault
        self._executor = executor
        self.complete = False

    async def run(self) -> None:
        """Reads every key file once, then completes what a crash interrupted. Returns when both are done."""
        while not self.complete:
            try:
                await self._scan()
            except MiniKmsError:
                await asyncio.sleep(SCAN_RETRY_SECONDS)
            else:
                self.complete = True

    async def _scan(self) -> None:
        vault = self._vault
        loop = asyncio.get_running_loop()
        key_ids = await loop.run_in_executor(self._executor, self._newest_first)
        replacing: list[DekRecord] = []
        while key_ids:
            chunk = [key_ids.pop() for _ in range(min(SCAN_FILES, len(key_ids)))]
            for key_id, data in await loop.run_in_executor(self._executor, vault.store.read_many, chunk):
                record = await self._add(key_id, data)
                if record is not None and record.replaces:
                    replacing.append(record)
            await asyncio.sleep(SCAN_PAUSE_SECONDS)
        for record in replacing:
            await self._retire_replaced(record)
        if vault.destroyed:
            await loop.run_in_executor(self._executor, vault.rotation_backups.remove_of_all, vault.destroyed)

    def _newest_first(self) -> list[str]:
        """All key ids, sorted, so that the scan, which takes from the end, only appends to the index.

        During a rotation the directory is listed twice: a listing may omit a file that is being replaced.
        """
        listings = 1 if self._vault.keyring.body.rotation is None else 2
        return sorted({key_id for _ in range(listings) for key_id in self._vault.store.list_ids()}, reverse=True)

    async def _add(self, key_id: str, data: bytes | MiniKmsError) -> DekRecord | None:
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
            vault.unreadable.add(key_id, str(error))
            return None
        vault.index.put(record, only_new=True)
        return record

    async def _retire_replaced(self, new: DekRecord) -> None:
        try:
            old = self._vault.record(new.replaces)
            if old.state == "active":
                self._vault.check_replaces(old, new.thread_id, new.purpose)
                await self._vault.retire(old.id, replaced_by=new.id, again=True)
        except MiniKmsError:
            return  # the old key was destroyed, can't be read (then it is listed), or is of another thread
