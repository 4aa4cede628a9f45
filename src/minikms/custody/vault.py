"""The vault: opened DEKs over the files that hold them.

Owns: the cache of opened DEKs, and every change of a DEK's file: create, retire, destroy. Invariants:
- A key id is answered only after its file and directory entry are durable.
- One change of a file at a time (`KeyLocks`); a change re-reads the file inside the lock.
- Creates take the wrapping KEK in the turn in which they seal; `wraps.drained` lets a rotation wait for those that took
  the older one.
- A bad file is an error of its own key, and of no other.
- An opened key is good until the next key is opened, or until its user awaits: then it may have been zeroed.
All cryptography runs in the loop's thread; only waits for the disk run elsewhere. It must never decide who may do what.

The scan of all DEK files after a start.

Owns: filling the key index in the background, and what a start has to finish: a replaced key that a crash left active
is retired, files and backups of a destroyed key are removed. Invariants: the daemon answers before and during the scan;
files are read in a worker thread, a few at a time, so that requests don't wait; a bad file is listed with its reason
and stops nothing; a failing disk is tried again. It must never change a key that the tombstones or a newer key of the
same thread do not speak of.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, TypeVar

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms import api
from minikms.crypto import labels
from minikms.crypto.aead import NonceSource, scrub_stack
from minikms.custody import files
from minikms.custody.deks import Damage, DekStore, KeyLocks, file_name
from minikms.custody.files import remove_file
from minikms.custody.keyring_file import KekWraps, KeyringFile, KeyringKeeper
from minikms.custody.leases import Leases, UseLease
from minikms.custody.rotation_backups import BackupStore
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
from minikms.keys.dek import DekRecord
from minikms.keys.ids import key_id_to_bytes, make_key_id
from minikms.keys.index import KeyIndex
from minikms.keys.states import DekState, move_dek
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot, fill_random

T = TypeVar("T")

CACHE_KEYS_MAX: Final = 16_384
CACHE_AGE_SECONDS_MAX: Final = 3600


class OpenDek:
    """A DEK in the arena, with what is needed to use it. `release` zeroes it."""

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
        """Of the present turn only: see `Vault.turn_cipher`."""

    def release(self) -> None:
        self.cipher = None
        self.slot.release()

    def __repr__(self) -> str:
        return f"<OpenDek {self.key_id} {self.state}>"

    def record_aad(self, caller_aad: bytes) -> bytes:
        """The associated data of a record under this key."""
        return labels.record_aad(self.aad_prefix, caller_aad)

    def check_thread(self, thread_id: str) -> None:
        if thread_id != self.thread_id:
            raise WrongThreadError("the key belongs to another thread")

    def check_encrypts(self) -> None:
        if self.state != "active":
            raise KeyRetiredError(f"key {self.key_id} is retired: it only decrypts; use the thread's current key")


class Vault:
    def __init__(
        self,
        *,
        arena: SecretArena,
        unlocked: UnlockedKeyring,
        keyring_file: KeyringFile,
        store: DekStore,
        backups: BackupStore,
        leases: Leases,
        executor: Executor,
        nonces: NonceSource,
        cache_keys_max: int = CACHE_KEYS_MAX,
    ) -> None:
        self.arena = arena
        self.unlocked = unlocked
        self.keyring = KeyringKeeper(unlocked, keyring_file)
        self.wraps = KekWraps(self.keyring)
        self.store = store
        self.backups = backups
        self._executor = executor
        self.leases = leases
        self.nonces = nonces
        self.locks = KeyLocks()
        self.cache: KeyCache[OpenDek] = KeyCache(
            count_max=cache_keys_max, age_ns_max=CACHE_AGE_SECONDS_MAX * 1_000_000_000
        )
        self.index = KeyIndex()
        self.damage = Damage()
        self.destroyed = {stone.key_id for stone in unlocked.body.tombstones}
        self._turn_keys: list[OpenDek] = []

    # --- reading -----------------------------------------------------------------------------------------------------

    def opened(self, key_id: str) -> OpenDek:
        """The opened key, from the cache or its file.

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
                self.damage.note(key_id, str(error))
            raise
        finally:
            scrub_stack()  # here, where the KEK's schedule lies: the turn may end at another depth of the stack
        self.damage.clear(key_id)
        opened = OpenDek(record, slot, self.leases.get(key_id_to_bytes(key_id)))
        self.cache.put(key_id, opened, time.monotonic_ns())
        return opened

    def record(self, key_id: str) -> DekRecord:
        """The key's record as it is on disk now."""
        if key_id in self.destroyed:
            raise KeyDestroyedError(f"key {key_id} was destroyed; what it encrypted can't be read again")
        try:
            return dek.parse(self.store.read(key_id), key_id)
        except KeyUnreadableError as error:
            self.damage.note(key_id, str(error))
            raise

    def uses_max(self, key_id: str) -> int:
        """An upper bound of the key's uses. May read the disk; for any thread."""
        return self.leases.uses_max(key_id_to_bytes(key_id))

    def now(self) -> str:
        """The time as records carry it."""
        return files.rfc3339(files.now_ns())

    # --- ciphers of a turn -------------------------------------------------------------------------------------------

    def turn_cipher(self, opened: OpenDek) -> AESGCM:
        """The key's cipher, kept until `end_turn`: its schedule lies on the heap, so it must not outlive the turn.

        Only for a verb that answers in this very turn. Making one costs twice as much as using it.
        """
        cipher = opened.cipher
        if cipher is None:
            cipher = opened.cipher = AESGCM(opened.view)
            self._turn_keys.append(opened)
        return cipher

    def end_turn(self) -> None:
        """Drops the turn's ciphers (OpenSSL clears what they hold) and overwrites what the last left on the stack."""
        for opened in self._turn_keys:
            opened.cipher = None
        self._turn_keys.clear()
        scrub_stack()

    # --- changing ----------------------------------------------------------------------------------------------------

    async def create(self, thread_id: str, *, purpose: api.Purpose = "thread", replaces: str = "") -> DekRecord:
        """A new key, durable when this returns. `replaces` retires that key of the same thread in the same step.

        A crash between the two files leaves both keys active and the new one saying what it replaces; the scan of the
        next start retires the old one.
        """
        if replaces:
            self.check_replaces(self.record(replaces), thread_id, purpose)
        version = await self.wraps.begin_create()
        try:
            record = self._seal_new(thread_id, purpose, replaces, version)
            await self.store.create(record.id, dek.encode(record))
        finally:
            self.wraps.end_create(version)
        self.index.put(record)
        if replaces:
            try:
                await self.retire(replaces, replaced_by=record.id, again=True)
            except MiniKmsError:
                await self._withdraw(record.id)
                raise
        return record

    def check_replaces(self, old: DekRecord, thread_id: str, purpose: api.Purpose) -> None:
        """Raises unless a new key of `thread_id` may replace `old`."""
        if old.thread_id != thread_id:
            raise WrongThreadError("the key to replace belongs to another thread")
        if old.purpose != purpose:
            raise ConflictError("the key to replace has another purpose")

    def _seal_new(self, thread_id: str, purpose: api.Purpose, replaces: str, version: int) -> DekRecord:
        """A fresh key, which leaves the arena right here: waiting for the disk must not hold slots."""
        now_ns = files.now_ns()
        key_id = make_key_id(now_ns // 1_000_000, os.urandom(10))
        with self.arena.allocate() as slot:
            fill_random(slot.view)
            record = dek.new(
                key_id=key_id,
                thread_id=thread_id,
                purpose=purpose,
                created_at=files.rfc3339(now_ns),
                kek=self.unlocked.kek(version),
                kek_version=version,
                dek=slot.view,
                nonce=self.nonces.next(),
                replaces=replaces,
            )
        scrub_stack()
        self.leases.granted_at_creation(key_id_to_bytes(key_id))
        return record

    async def _withdraw(self, key_id: str) -> None:
        """Takes back a new key that nobody was told of. If the disk refuses this too, the next start finds the key and
        finishes what it was made for.
        """
        with contextlib.suppress(MiniKmsError):
            async with self.locks.hold((key_id,)):
                await self._in_worker(remove_file, self.store.directory_fd, file_name(key_id))
                self.index.remove(key_id)

    async def retire(self, key_id: str, *, replaced_by: str = "", again: bool = False) -> DekRecord:
        """Makes the key decrypt only. `again`: a key that is retired already is left as it is, without an error."""
        async with self.locks.hold((key_id,)):
            record = self.record(key_id)
            if again and record.state == "retired":
                return record
            changed = dek.retired(record, at=self.now(), replaced_by=replaced_by)
            try:
                await self.store.replace(key_id, dek.encode(changed))
            except BaseException:
                # It may be in place, if not for sure: whoever uses the key next looks at the file.
                self.cache.drop(key_id)
                raise
            self.index.put(changed)
            if (opened := self.cache.get(key_id)) is not None:
                opened.state = changed.state
        return changed

    def check_destroyable(self, key_id: str) -> None:
        """Raises unless `destroy` would do something: ConflictError for a key that is active."""
        if key_id not in self.destroyed:
            move_dek(self.record(key_id).state, "destroy")

    async def destroy(self, key_id: str) -> int:
        """Buries a retired key: tombstone first, then its backups and its file; how many backups there were.

        A repeated request removes what an interrupted one left. Raises ConflictError for a key that is active.
        """
        async with self.locks.hold((key_id,)):
            self.check_destroyable(key_id)
            if key_id not in self.destroyed:
                at = self.now()
                await self.keyring.change(lambda body: keyring.bury(body, key_id, at=at))
                self.destroyed.add(key_id)
                self.cache.drop(key_id)
                self.index.remove(key_id)
                self.damage.clear(key_id)
            return await self.remove_files(key_id)

    async def remove_files(self, key_id: str) -> int:
        """Removes a destroyed key's backups and file, durably; how many backups there were."""
        return await self._in_worker(self._remove_files, key_id)

    def _remove_files(self, key_id: str) -> int:
        # The file goes last: as long as it is there, the scan of the next start sees that something is left to do.
        count = self.backups.remove_of(key_id)
        remove_file(self.store.directory_fd, file_name(key_id))
        return count

    async def drop_older_slots(self, slot_id: str) -> list[str]:
        """From here on only this root key, the newest, opens the keyring; the fingerprints of the others.

        Raises ConflictError when it is not the newest, StorageUnavailableError.
        """
        before = self.keyring.body.slots
        at = self.now()
        body = await self.keyring.change(
            lambda body: keyring.drop_slots_except(body, slot_id, at=at) if len(body.slots) > 1 else body
        )
        return [slot.fingerprint for slot in before if slot not in body.slots]

    async def _in_worker(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(*arguments))

    def expire(self) -> None:
        """Zeroes opened keys that are older than CACHE_AGE_SECONDS_MAX."""
        self.cache.expire(time.monotonic_ns())

    def close(self) -> None:
        """Zeroes every key."""
        self.cache.clear()
        self.unlocked.release()


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
