"""The vault: opened DEKs over the files that hold them.

Owns: the cache of opened DEKs, and every change of a DEK's file: create, retire, rewrap, destroy. Invariants:
- A key id is answered only after its file and directory entry are durable.
- One change of a file at a time (`KeyLocks`); a change re-reads the file inside the lock.
- Creates take the wrapping KEK in the turn in which they seal; `creates_drained` lets a rotation wait for those that
  took the older one.
- A bad file is an error of its own key, and of no other.
All cryptography runs in the loop's thread; only waits for the disk run elsewhere. It must never decide who may do what.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms import api
from minikms.crypto import envelope
from minikms.crypto.aead import NonceSource, scrub_stack
from minikms.custody import clock
from minikms.custody.atomic import remove_file
from minikms.custody.backups import BackupStore
from minikms.custody.dekstore import DekStore, file_name
from minikms.custody.keyringfile import KeyringFile
from minikms.custody.leases import Leases, UseLease
from minikms.errors import ConflictError, KeyDestroyedError, KeyExhaustedError, KeyRetiredError, WrongThreadError
from minikms.keys import dek, keyring
from minikms.keys.cache import KeyCache
from minikms.keys.dek import DekRecord
from minikms.keys.ids import key_id_to_bytes, make_key_id
from minikms.keys.index import KeyIndex
from minikms.keys.states import DekState, move_dek
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot, fill_random

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
        self.aad_prefix = envelope.record_aad_prefix(key_id=record.id, thread_id=record.thread_id)
        self.aad_if_none = envelope.record_aad(self.aad_prefix, b"")
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
        return envelope.record_aad(self.aad_prefix, caller_aad)

    def check_thread(self, thread_id: str) -> None:
        if thread_id != self.thread_id:
            raise WrongThreadError("the key belongs to another thread")

    def check_encrypts(self) -> None:
        if self.state != "active":
            raise KeyRetiredError(f"key {self.key_id} is retired: it only decrypts; use the thread's current key")


class KeyLocks:
    """At most one change of a key's file at a time. Waiting is in no order; holders must not nest."""

    def __init__(self) -> None:
        self._held: dict[str, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def hold(self, key_ids: Iterable[str]) -> AsyncIterator[None]:
        wanted = tuple(key_ids)
        while blocking := next((self._held[key_id] for key_id in wanted if key_id in self._held), None):
            await asyncio.shield(blocking)
        freed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.update(dict.fromkeys(wanted, freed))
        try:
            yield
        finally:
            for key_id in wanted:
                del self._held[key_id]
            freed.set_result(None)


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
        self.keyring_file = keyring_file
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
        self.destroyed = {stone.key_id for stone in unlocked.body.tombstones}
        self._keyring_lock = asyncio.Lock()
        self._turn_keys: list[OpenDek] = []
        self._wraps_left: dict[int, int] = {}
        self._creating: dict[int, int] = {}
        self._drained = asyncio.Condition()

    # --- reading -----------------------------------------------------------------------------------------------------

    def opened(self, key_id: str) -> OpenDek:
        """The opened key, from the cache or its file. Raises Key{NotFound,Destroyed,Unreadable}Error."""
        found = self.cache.get(key_id)
        if found is not None:
            return found
        record = self.record(key_id)
        slot = self.arena.allocate()
        try:
            dek.unwrap_into(record, self.unlocked.kek(record.kek_version), slot.view)
        except BaseException:
            slot.release()
            raise
        opened = OpenDek(record, slot, self.leases.get(key_id_to_bytes(key_id)))
        self.cache.put(key_id, opened, time.monotonic_ns())
        return opened

    def record(self, key_id: str) -> DekRecord:
        """The key's record as it is on disk now."""
        if key_id in self.destroyed:
            raise KeyDestroyedError(f"key {key_id} was destroyed; what it encrypted can't be read again")
        return dek.parse(self.store.read(key_id), key_id)

    def uses_max(self, key_id: str) -> int:
        """An upper bound of the key's uses. May read the disk; for any thread."""
        return self.leases.uses_max(key_id_to_bytes(key_id))

    def now(self) -> str:
        """The time as records carry it."""
        return clock.rfc3339(clock.now_ns())

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
            old = self.record(replaces)
            if old.thread_id != thread_id:
                raise WrongThreadError("the key to replace belongs to another thread")
            if old.purpose != purpose:
                raise ConflictError("the key to replace has another purpose")
        version = await self._take_wrap()
        try:
            record, opened = self._seal_new(thread_id, purpose, replaces, version)
            try:
                await self.store.create(record.id, dek.encode(record))
            except BaseException:
                opened.release()
                raise
        finally:
            await self._finish_create(version)
        self.cache.put(record.id, opened, time.monotonic_ns())
        self.index.put(record)
        if replaces:
            await self.retire(replaces, replaced_by=record.id, again=True)
        return record

    def _seal_new(self, thread_id: str, purpose: api.Purpose, replaces: str, version: int) -> tuple[DekRecord, OpenDek]:
        now_ns = clock.now_ns()
        key_id = make_key_id(now_ns // 1_000_000, os.urandom(10))
        slot = self.arena.allocate()
        try:
            fill_random(slot.view)
            record = dek.new(
                key_id=key_id,
                thread_id=thread_id,
                purpose=purpose,
                created_at=clock.rfc3339(now_ns),
                kek=self.unlocked.kek(version),
                kek_version=version,
                dek=slot.view,
                nonce=self.nonces.next(),
                replaces=replaces,
            )
            return record, OpenDek(record, slot, self.leases.granted_at_creation(key_id_to_bytes(key_id)))
        except BaseException:
            slot.release()
            raise

    async def retire(self, key_id: str, *, replaced_by: str = "", again: bool = False) -> DekRecord:
        """Makes the key decrypt only. `again`: a key that is retired already is left as it is, without an error."""
        async with self.locks.hold((key_id,)):
            record = self.record(key_id)
            if again and record.state == "retired":
                return record
            changed = dek.retired(record, at=self.now(), replaced_by=replaced_by)
            await self.store.replace(key_id, dek.encode(changed))
            self.reload(changed)
        return changed

    async def destroy(self, key_id: str) -> int:
        """Buries a retired key: tombstone first, then its file and its backups; how many backups there were.

        A repeated request removes what an interrupted one left. Raises ConflictError for a key that is active.
        """
        async with self.locks.hold((key_id,)):
            if key_id not in self.destroyed:
                move_dek(self.record(key_id).state, "destroy")
                async with self.keyring_change():
                    at = self.now()
                    await self.store_body(keyring.bury(self.unlocked.body, key_id, at=at))
                self.destroyed.add(key_id)
                self.cache.drop(key_id)
                self.index.remove(key_id)
            return await self.remove_files(key_id)

    async def remove_files(self, key_id: str) -> int:
        """Removes a destroyed key's file and backups, durably; how many backups there were."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._remove_files, key_id)

    def _remove_files(self, key_id: str) -> int:
        remove_file(self.store.directory_fd, file_name(key_id))
        return self.backups.remove_of(key_id)

    def reload(self, record: DekRecord) -> None:
        """Brings index and opened key up to a changed record; the DEK itself never changes."""
        self.index.put(record)
        opened = self.cache.get(record.id)
        if opened is not None:
            opened.state = record.state

    # --- the keyring -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def keyring_change(self) -> AsyncIterator[None]:
        """Held around reading the body, making the next one, and `store_body`."""
        async with self._keyring_lock:
            yield

    async def store_body(self, body: keyring.Body) -> None:
        """Makes `body` durable, then current. Call inside `keyring_change`."""
        await self.keyring_file.store(self.unlocked.encode(body))
        self.unlocked.body = body

    async def drop_older_slots(self, slot_id: str) -> list[str]:
        """From here on only this root key opens the keyring; the fingerprints of those that no longer do."""
        async with self.keyring_change():
            body = self.unlocked.body
            gone = [slot.fingerprint for slot in body.slots if slot.slot_id != slot_id]
            if gone:
                await self.store_body(keyring.drop_slots_except(body, slot_id, at=self.now()))
            return gone

    async def _take_wrap(self) -> int:
        """The KEK version to wrap a new DEK under; counts the wrap and the create. The caller seals in this turn."""
        while True:
            version = self.unlocked.body.wrapping_kek.version
            if self._wraps_left.get(version, 0) > 0:
                self._wraps_left[version] -= 1
                self._creating[version] = self._creating.get(version, 0) + 1
                return version
            await self.reserve_wraps(version)

    async def take_wraps(self, version: int, count: int) -> None:
        """Counts `count` wraps under a version, reserving more in the keyring first when needed."""
        while self._wraps_left.get(version, 0) < count:
            await self.reserve_wraps(version)
        self._wraps_left[version] -= count

    async def reserve_wraps(self, version: int) -> None:
        """Extends the wraps that may be made under a KEK version, durably, before any of them is made."""
        async with self.keyring_change():
            if self._wraps_left.get(version, 0) > 0:
                return
            kek = self.unlocked.body.kek(version)
            if kek is None or kek.wraps_reserved > keyring.KEK_WRAPS_MAX:
                raise KeyExhaustedError("the KEK has wrapped as many keys as it may; rotate the KEK")
            body = keyring.reserve_wraps(self.unlocked.body, version, keyring.KEK_WRAPS_LEASE, at=self.now())
            await self.store_body(body)
            self._wraps_left[version] = self._wraps_left.get(version, 0) + keyring.KEK_WRAPS_LEASE

    async def _finish_create(self, version: int) -> None:
        async with self._drained:
            self._creating[version] -= 1
            self._drained.notify_all()

    async def creates_drained(self, version: int) -> None:
        """Returns when no create that took KEK `version` is still on its way to disk."""
        async with self._drained:
            await self._drained.wait_for(lambda: self._creating.get(version, 0) == 0)

    def expire(self) -> None:
        """Zeroes opened keys that are older than CACHE_AGE_SECONDS_MAX."""
        self.cache.expire(time.monotonic_ns())

    def close(self) -> None:
        """Zeroes every key."""
        self.cache.clear()
        self.unlocked.release()
