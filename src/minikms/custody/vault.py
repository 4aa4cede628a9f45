"""The vault: opened DEKs, their key files, and the scan of all key files after a start.

Owns: the cache of opened DEKs; every change of a DEK's file except its rewrap: create, retire, destroy; filling the key
index in the background, and what a start has to complete: it retires a replaced key that a crash left active, and
removes the files and rotation backups of destroyed keys. Invariants:
- A key id is answered only after the content of its file is durable, in the journal or in the file.
- One change of a file at a time (`KeyLocks`); a change reads the file again while it holds the lock.
- One create of a thread at a time: a key is found by `get_or_create` only after its create has ended, because a create
  that can't retire the key it replaces removes the new one.
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
import itertools
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from minikms import api
from minikms.api.errors import (
    ConflictError,
    KeyDestroyedError,
    KeyNotFoundError,
    KeyUnreadableError,
    KmsRefusedError,
    StandbyError,
    StorageUnavailableError,
    WrongThreadError,
    copy_of,
)
from minikms.crypto.aead import NonceSource
from minikms.crypto.records import RecordKeys
from minikms.custody.archive_register import ArchiveRegister
from minikms.custody.deks import LISTED_COUNT_MAX, SCAN_FILES, DekStore, HeldKeys, KeyLocks, UnreadableKeys
from minikms.custody.destruction import Destroyed, Destruction, Removal
from minikms.custody.journal import Journal
from minikms.custody.journal_format import Change
from minikms.custody.keyring_file import KeyringFile, StoredKeyring
from minikms.custody.new_keys import NewKeys, Wanted
from minikms.custody.open_dek import OpenDek
from minikms.custody.replication import Changes
from minikms.custody.rotation_backups import BLANK_FILES_MAX, FoundRecords, JournalFile, KeysWithin, RotationBackups
from minikms.custody.tombstone_file import Tombstones
from minikms.custody.unlimited import UnlimitedCaller
from minikms.keys import dek
from minikms.keys.cache import KeyCache
from minikms.keys.dek import DekRecord, check_key_id, move_dek
from minikms.keys.index import KeyIndex, KeyPage
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena
from minikms.platform.clock import now_rfc3339
from minikms.platform.files import remove_left_temps
from minikms.platform.logs import Log
from minikms.platform.workers import in_worker

CACHE_KEYS_MAX: Final = 16_384
CACHE_AGE_SECONDS_MAX: Final = 3600
SCAN_PAUSE_SECONDS: Final = 0.001
SCAN_RETRY_SECONDS: Final = 5.0
INDEX_WAIT_SECONDS_MAX: Final = 5.0
"""Shorter than the 8 s for which the message server waits for an answer."""
REMOVAL_RETRY_SECONDS: Final = 60.0
"""Pause before what the disk refused to remove of destroyed keys is tried again."""

T = TypeVar("T")
Permit = Callable[[], None]
"""Called after each wait of a change, before anything of it is done. It raises to refuse the change."""


def permitted() -> None:
    """The `Permit` of callers whose rights are not limited to threads."""


@dataclass(eq=False, repr=False, kw_only=True)
class Vault(UnlimitedCaller):
    """The keys of a data directory. `executor` is the one thread that changes key files and keyring."""

    arena: SecretArena
    unlocked: UnlockedKeyring
    keyring_file: KeyringFile
    store: DekStore
    rotation_backups: RotationBackups
    journal: Journal
    destroyed: Tombstones
    executor: Executor
    nonces: NonceSource
    """The nonces of wraps."""
    index: KeyIndex
    cache_keys_max: int = CACHE_KEYS_MAX

    def __post_init__(self) -> None:
        self.changes = Changes(self.journal)
        self.keyring = StoredKeyring(self.unlocked, self.keyring_file, self.changes)
        self.record_keys = RecordKeys(self.arena)
        self.locks = KeyLocks()
        self._creating = KeyLocks()
        """The locks of threads that get a key. Taken before a lock of `locks`, never inside one."""
        self.cache: KeyCache[OpenDek] = KeyCache(
            count_max=self.cache_keys_max, age_ns_max=CACHE_AGE_SECONDS_MAX * 1_000_000_000
        )
        self.new_keys = NewKeys(
            arena=self.arena,
            unlocked=self.unlocked,
            stored=self.keyring,
            changes=self.changes,
            nonces=self.nonces,
            index=self.index,
        )
        self.unreadable = UnreadableKeys()
        self.replacing: dict[str, DekRecord] = {}
        """Keys that were not retired when they were replaced, each with the new one. `Indexing` retires them."""
        self._archives = ArchiveRegister(os.path.dirname(self.store.directory))
        self._destruction = Destruction(
            self.destroyed,
            self.unlocked,
            self.keyring,
            find_records=self._find_records,
            forget=self.forget,
            remove_files=self.remove_files,
        )

    # --- reading -----------------------------------------------------------------------------------------------------

    def opened(self, key_id: str) -> OpenDek:
        """The opened key, from the cache or from its file.

        Raises KeyNotFoundError, KeyDestroyedError, KeyUnreadableError, StorageUnavailableError, ArenaFullError.
        """
        cached = self.cache.get(key_id)
        if cached is not None:
            return cached
        record = self.record(key_id)
        slot = self.arena.allocate()
        self.record_keys.stack_used = True
        try:
            dek.unwrap_into(record, self.unlocked.kek_cipher(record.kek_version), slot.view)
        except BaseException as error:
            slot.release()
            if isinstance(error, KeyUnreadableError):
                self.unreadable.add(key_id, str(error))
            raise
        self.unreadable.remove(key_id)
        opened = OpenDek(record, slot, self.record_keys)
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

    # --- changing ----------------------------------------------------------------------------------------------------

    async def create_in_log(
        self,
        thread_id: str,
        *,
        purpose: api.Purpose = "thread",
        replaces: str = "",
        numbered: bool = False,
        permit: Permit = permitted,
    ) -> DekRecord:
        """A new key, durable on return. `replaces` names a key of the same thread, which is retired. The file of the
        new key may still be under way on return: see `Journal.file_written`. With `numbered` it has the thread's next
        number, and `replaces` is its newest numbered key; the index must be complete.

        A crash between the two files leaves both keys active, and the new record names the old one. So does a disk that
        refuses the second file, for a numbered key, which others may use already. The next start retires the old one.
        """
        async with self._creating.hold((thread_id,)):
            permit()
            number = self._next_number(thread_id, replaces) if numbered else 0
            later_than = replaces if numbered else ""
            return await self._create(
                thread_id, purpose, replaces=replaces, later_than=later_than, number=number, permit=permit
            )

    async def get_or_create(
        self, thread_id: str, *, purpose: api.Purpose, permit: Permit = permitted
    ) -> tuple[str, bool]:
        """The id of the thread's newest active key of this purpose, and whether it was made here. Durable on return.

        A newest key that no longer encrypts stays as it is and gets a successor, which is newer even if the clock was
        set back. So at most one key is opened, however many the thread has.

        The index must be complete (`Indexing.wait_complete`). Calls for one thread are answered one after the other, so
        that they return one key. A key that the index has and that does not open is an error, never a reason for a new
        one. Raises as `opened` and `create_in_log`.
        """
        async with self._creating.hold((thread_id,)):
            permit()
            newest = self._newest_active(thread_id, purpose)
            if newest is not None and newest.state == "active":
                return newest.key_id, False
            later_than = "" if newest is None else newest.key_id
            key_id = (await self._create(thread_id, purpose, later_than=later_than, permit=permit)).id
            await self.journal.file_written(key_id)  # with the lock: the line of the create is written before others'
            return key_id, True

    def _newest_active(self, thread_id: str, purpose: api.Purpose) -> OpenDek | None:
        """The newest key of the thread and purpose that is active according to the index, opened."""
        for key_id in self.index.active_of(thread_id, purpose):
            try:
                opened = self.opened(key_id)  # authenticates the thread and the purpose of the file
            except KeyNotFoundError:
                raise KeyUnreadableError(f"the file of key {key_id} is missing; restore it from a backup") from None
            if (opened.thread_id, opened.purpose) == (thread_id, purpose):  # else two tags of the index are equal
                return opened
        return None

    async def _create(
        self,
        thread_id: str,
        purpose: api.Purpose,
        *,
        replaces: str = "",
        later_than: str = "",
        number: int = 0,
        permit: Permit,
    ) -> DekRecord:
        """The caller holds the thread's lock. The new id sorts after `later_than`."""
        permit()
        if replaces:
            self.check_replaces(self.record(replaces), thread_id, purpose)
        record = await self.new_keys.make(Wanted(thread_id, purpose, permit, replaces, later_than, number))
        if replaces:
            try:
                await self.retire(replaces, replaced_by=record.id, again=True)
            except KmsRefusedError:
                if self.changes.replication is not None:
                    self.replacing[replaces] = record
                elif not number:
                    await self._remove_new_key(record.id)
                raise
        return record

    def _next_number(self, thread_id: str, replaces: str) -> int:
        """The number of the thread's next key, with the errors of `dek.next_number`; KeyUnreadableError while a file
        can't be read: it may be of this thread.
        """
        if self.unreadable.count:
            raise KeyUnreadableError("a key file can't be read, so the last number of the thread is not known")
        return dek.next_number(next(self._numbered(thread_id), None), replaces)

    def _numbered(self, thread_id: str) -> Iterator[DekRecord]:
        return dek.numbered(map(self.record, self.index.newest_of(thread_id)), thread_id)

    def check_replaces(self, old: DekRecord, thread_id: str, purpose: api.Purpose) -> None:
        """Checks that a new key of `thread_id` may replace `old`."""
        if old.thread_id != thread_id:
            raise WrongThreadError("the key to replace belongs to another thread")
        if old.purpose != purpose:
            raise ConflictError("the key to replace has another purpose")

    async def _remove_new_key(self, key_id: str) -> None:
        """Removes a new key that no caller knows. If the disk refuses this too, the next start may find the key."""

        def remove() -> None:
            self.journal.forget(held.key_ids)
            self.store.remove(held)

        with contextlib.suppress(KmsRefusedError):
            async with self.locks.hold((key_id,)) as held:
                try:
                    await in_worker(self.executor, remove)
                finally:
                    self.index.remove(key_id)  # it may have no file, and the log forgets it in any case

    async def retire(
        self, key_id: str, *, replaced_by: str = "", again: bool = False, permit: Permit = permitted
    ) -> DekRecord:
        """Retires the key: it only decrypts from here on. With `again` a retired key is no error and stays as it is."""
        async with self.locks.hold((key_id,)) as held:
            await self.journal.file_written(key_id)  # by the group that creates it
            permit()
            record = self.record(key_id)
            if again and record.state == "retired":
                return record
            changed = dek.retired(record, at=now_rfc3339(), replaced_by=replaced_by)
            try:
                await self.changes.replace(held, [Change(key_id, self.store.read(key_id), dek.encode(changed))])
            except BaseException:
                # The new file may be in place without being durable, so the next use of the key reads the file again.
                self.cache.drop(key_id)
                raise
            self.index.put(changed)
            if (opened := self.cache.get(key_id)) is not None:
                opened.state = changed.state
        return changed

    def check_destroyable(self, key_id: str, of_thread: str | None = None) -> None:
        """Checks that the key is retired, or destroyed already. Raises ConflictError for an active key, and
        WrongThreadError for a key of another thread than the named one.
        """
        if key_id not in self.destroyed:
            record = self.record(key_id)
            if of_thread not in (None, record.thread_id):
                raise WrongThreadError("the key belongs to another thread")
            move_dek(record.state, "destroy")
            if record.number:
                newest = list(itertools.islice(self._numbered(record.thread_id), 2))
                if len(newest) > 1 and newest[0].id == key_id:
                    raise ConflictError("the newest numbered key is destroyed last, so that no number is used again")

    async def destroy(self, key_id: str, *, permit: Permit = permitted) -> Destroyed:
        """Destroys a retired key: first the tombstone, then its rotation backups, then its file.

        A repeated call removes what an interrupted one left. Raises ConflictError for an active key, and
        StorageUnavailableError, which says whether the key is destroyed; it is not if a rotation backup that may hold
        it could not be read before.
        """
        async with self.locks.hold((key_id,)) as held:
            permit()
            self.check_destroyable(key_id)
            removed = await self._destruction.destroy(held)
        tombstone = self.destroyed.recent(key_id)
        if tombstone is None:
            tombstone = await in_worker(self.executor, partial(self.destroyed.record, key_id))
        return Destroyed(*removed, tombstone)

    @property
    def unfinished_destructions(self) -> AbstractSet[str]:
        """Destroyed keys whose bytes could not be removed: `destroy` has to be called again for them."""
        return self._destruction.unfinished

    def forget(self, key_id: str) -> None:
        """Drops what is in memory of a key that is destroyed."""
        self.cache.drop(key_id)
        self.index.remove(key_id)
        self.unreadable.remove(key_id)

    def adopt(self, record: DekRecord) -> None:
        """Takes what a key's file has now into memory, after a change that the database had first."""
        self.cache.drop(record.id)
        self.unreadable.remove(record.id)
        self.index.put(record)
        if record.state == "retired":
            self.replacing.pop(record.id, None)
        self.note_replaced(record)

    def note_replaced(self, new: DekRecord) -> bool:
        """Notes a key that may be active although `new` replaces it. The index may not have read it yet."""
        if not new.replaces or new.replaces in self.destroyed:
            return False
        replaced = self.index.entry(new.replaces)
        if due := replaced is None or replaced.state == "active":
            self.replacing.setdefault(new.replaces, new)
        return due

    async def _find_records(self, key_ids: Sequence[str]) -> FoundRecords:
        """The records of keys in rotation backups. Raises StorageUnavailableError if no key can be destroyed now, for a
        reason that does not come from one backup.
        """
        backups = self.rotation_backups
        records = FoundRecords({}, {})

        def jobs() -> Iterator[bool]:
            self._sweep_temps()
            self.journal.forget(())  # a journal that could not be written refuses
            for number, within in enumerate(backups.files_of(key_ids), 1):
                try:
                    records.files[within.file] = backups.find(within)
                except StorageUnavailableError as error:
                    records.unreadable.update(dict.fromkeys(within.key_ids, error.with_traceback(None)))
                if number % BLANK_FILES_MAX == 0:
                    yield True

        await self._in_short_jobs(jobs())
        return records

    async def remove_files(
        self, locks: Sequence[HeldKeys], repeated: Container[str], within: FoundRecords | None = None
    ) -> list[Removal]:
        """Removes the rotation backups and the files of the destroyed keys with these locks, durably. It removes
        temporary files first, which may hold their bytes.

        `repeated`: those whose removal may have been interrupted. `found`: the records that were read before. Raises
        StorageUnavailableError; then the files of the keys may be there.
        """
        key_ids = [key_id for held in locks for key_id in held.key_ids]
        backups = self.rotation_backups
        records: Counter[str] = Counter()
        archives: list[list[str]] = []
        read = {} if within is None else within.files

        def jobs() -> Iterator[bool]:
            self._sweep_temps()
            # A key without a file was removed completely.
            anew = frozenset(key_id for key_id in key_ids if key_id in repeated and self.store.has(key_id))
            files = backups.files_of(key_ids)
            failure: StorageUnavailableError | None = None
            for start in range(0, len(files), BLANK_FILES_MAX):
                if start:
                    yield True
                try:
                    records.update(backups.blank(files[start : start + BLANK_FILES_MAX], within=read, anew=anew))
                except StorageUnavailableError as error:
                    failure = failure or error
            if failure is not None:
                try:
                    raise failure
                finally:
                    del failure  # the traceback of an error leads to this frame
            # The files go last: while one exists, a later start or request knows that something is left to remove.
            self.journal.forget(key_ids)
            self.store.remove(*locks)
            archives.extend(self._archives.may_hold(key_ids))  # an archive that is begun later does not hold the keys

        await self._in_short_jobs(jobs())
        return [Removal(records[key_id], of_key) for key_id, of_key in zip(key_ids, archives, strict=True)]

    def _sweep_temps(self) -> None:
        self.store.sweep_temps()
        self.rotation_backups.sweep_temps()
        remove_left_temps()

    async def _in_short_jobs(self, jobs: Iterator[bool]) -> None:
        """Has the disk thread do the work, with a job for each BLANK_FILES_MAX backups."""
        more = partial(next, jobs, False)
        while await in_worker(self.executor, more):
            pass

    async def blank_records(self, within: KeysWithin) -> None:
        """Blanks records of destroyed keys in a backup, durably. Raises StorageUnavailableError."""
        await in_worker(self.executor, partial(self.rotation_backups.blank, [within]))

    def page(self, *, after: str, limit: int, thread_id: str | None, state: str | None) -> KeyPage:
        """Pages as `KeyIndex.page`. Raises InvalidRequestError for an `after` that is no key id."""
        after = check_key_id(after) if after else ""
        return self.index.page(after=after, limit=limit, thread_id=thread_id, state=state)

    # --- the end -----------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Waits for the writes that have begun. No new ones may begin."""
        await self._destruction.groups.drain()
        await self.new_keys.groups.drain()
        await self.journal.drain()

    def expire(self) -> None:
        """Zeroes the opened keys that are older than CACHE_AGE_SECONDS_MAX."""
        self.cache.expire(time.monotonic_ns())

    def seal(self) -> None:
        """Zeroes every key, and drops the ciphers. Everything that needs a key fails from then on.

        Writes that have begun go on; the caller waits for them with `drain`.
        """
        self.record_keys.drop_ciphers()
        self.keyring.seal()
        self.close()

    def close(self) -> None:
        """Zeroes every key. Idempotent."""
        self.cache.clear()
        self.unlocked.release()


class Indexing:
    """The scan of all key files. `executor` reads them. It fills the index, or compares the files with the one that the
    last stop has kept.
    """

    def __init__(self, vault: Vault, executor: Executor) -> None:
        self._vault = vault
        self._executor = executor
        self._completed = asyncio.Event()
        self._left: list[str] = []
        """Destroyed keys that have a file."""
        self._changed: list[str] = []
        """Keys whose files differed from the kept index."""

    @property
    def complete(self) -> bool:
        return self._vault.index.complete

    def status(self) -> dict[str, object]:
        """For `/status`: how many keys there are, as far as the scan knows."""
        vault = self._vault
        return {
            "indexing": not self.complete,
            "by_state": {state: count for state, count in vault.index.by_state.items() if count},
            "by_kek_version": {str(kek): count for kek, count in vault.index.by_kek.items() if count},
            "destroyed": len(vault.destroyed),
            "unreadable": vault.unreadable.count,
            "unreadable_files": vault.unreadable.listed(),
            "writable": not vault.journal.refusal,
            "unavailable_reason": vault.journal.refusal,
        }

    async def wait_complete(self, *, compared: bool = False) -> None:
        """Returns once the index has all keys; with `compared`, once every file was read in this run. Raises
        StorageUnavailableError after INDEX_WAIT_SECONDS_MAX.
        """
        if self._completed.is_set() or (self.complete and not compared):
            return
        try:
            async with asyncio.timeout(INDEX_WAIT_SECONDS_MAX):
                await self._completed.wait()
        except TimeoutError:
            raise StorageUnavailableError(
                "the key files are still being read after the start, so it is not known whether the thread has a key; "
                "try again later"
            ) from None

    async def run(self) -> None:
        """Reads every key file once, then removes what is left of destroyed keys. Returns when both are done; a member
        goes on to retire keys that were replaced.
        """
        scan = self._compare if self.complete else self._scan
        while True:
            try:
                await scan()
                break
            except KmsRefusedError:
                await asyncio.sleep(SCAN_RETRY_SECONDS)
        self._vault.index.complete = True
        self._completed.set()
        if self._changed:
            logger = Log()
            first = self._changed[:LISTED_COUNT_MAX]
            logger.warning("key files have changed since the last stop", keys=len(self._changed), first=first)
        await self._remove_destroyed()
        while self._vault.changes.replication is not None:
            await self._vault.changes.serving()
            await self._retire_all_replaced()
            await asyncio.sleep(REMOVAL_RETRY_SECONDS)

    async def _scan(self) -> None:
        key_ids = await in_worker(self._executor, self._newest_first)
        self._left = []
        while key_ids:
            chunk = [key_ids.pop() for _ in range(min(SCAN_FILES, len(key_ids)))]
            for record in await self._read(chunk):
                self._vault.index.put(record, only_new=True)
                self._vault.note_replaced(record)
        await self._retire_all_replaced()

    async def _compare(self) -> None:
        """Corrects the index where a key file differs from it."""
        vault, index = self._vault, self._vault.index
        self._left = []
        next_after, ended = "", False
        while not ended:
            chunk, next_after = index.page(after=next_after, limit=SCAN_FILES, thread_id=None, state=None)
            remaining = set(chunk)
            for record in await self._read(chunk):
                if index.entry(record.id) == index.entry_of(record):
                    remaining.remove(record.id)
                if vault.note_replaced(record):
                    await self._retire_replaced(record)
            for key_id in sorted(remaining):
                await self._correct(key_id)
            ended = not next_after
        listing = vault.store.list_ids()
        while chunk := await in_worker(self._executor, lambda: list(itertools.islice(listing, SCAN_FILES))):
            for key_id in chunk:
                if index.entry(key_id) is None:
                    await self._correct(key_id)
            await asyncio.sleep(SCAN_PAUSE_SECONDS)

    async def _correct(self, key_id: str) -> None:
        """Puts into the index what the key's file has, which nobody changes meanwhile."""
        vault, index = self._vault, self._vault.index
        async with vault.locks.hold((key_id,), announced=False):
            await vault.new_keys.groups.group_ended()  # the index has its keys then
            before = index.entry(key_id)
            records = await self._read([key_id])
            for record in records:
                vault.unreadable.remove(key_id)
                index.put(record)
            if not records:
                index.remove(key_id)
            if before != index.entry(key_id):
                self._changed.append(key_id)

    async def _read(self, key_ids: list[str]) -> list[DekRecord]:
        """The records of these keys, without those that can't be read (these are listed) or were destroyed."""
        await asyncio.sleep(SCAN_PAUSE_SECONDS)
        read = await in_worker(self._executor, partial(self._vault.store.read_many, key_ids))
        records = (self._record(key_id, data) for key_id, data in read)
        return [record for record in records if record is not None]

    async def _remove_destroyed(self) -> None:
        """Removes the files and rotation backups of destroyed keys that a crash or a copied directory left. It reads
        every backup, and so notes those that are damaged. What fails stops nothing else, and is tried again.
        """
        backups = self._vault.rotation_backups
        key_ids: Sequence[str] = self._left
        files: Sequence[JournalFile] | None = None
        while True:
            key_ids = await self._failed(key_ids, self._remove_left)
            with contextlib.suppress(KmsRefusedError):
                if files is None:
                    files = await in_worker(self._executor, backups.journals)
                files = await self._failed(files, self._blank)
            if not key_ids and files is not None and not files:
                return
            await asyncio.sleep(REMOVAL_RETRY_SECONDS)

    async def _failed(self, items: Sequence[T], work: Callable[[T], Awaitable[None]]) -> list[T]:
        """The items that `work` fails for."""
        failed: list[T] = []
        for item in items:
            try:
                await work(item)
            except KmsRefusedError:
                failed.append(item)
            await asyncio.sleep(SCAN_PAUSE_SECONDS)
        return failed

    async def _remove_left(self, key_id: str) -> None:
        async with self._vault.locks.hold((key_id,)) as held:
            await self._vault.remove_files([held], (key_id,))

    async def _blank(self, file: JournalFile) -> None:
        backups, destroyed = self._vault.rotation_backups, self._vault.destroyed
        key_ids = await in_worker(self._executor, partial(backups.destroyed_in, file, destroyed))
        if key_ids is not None:
            await self._vault.blank_records(key_ids)

    def _newest_first(self) -> list[str]:
        """All key ids, sorted, so that the scan, which takes from the end, only appends to the index.

        During a rotation the directory is listed twice: a listing may omit a file that is being replaced.
        """
        listings = 1 if self._vault.keyring.body.rotation is None else 2
        key_ids = sorted({key_id for _ in range(listings) for key_id in self._vault.store.list_ids()}, reverse=True)
        self._vault.store.sync_directory()
        return key_ids

    def _record(self, key_id: str, data: bytes | KmsRefusedError) -> DekRecord | None:
        vault = self._vault
        if key_id in vault.destroyed:
            self._left.append(key_id)
            return None
        try:
            if isinstance(data, KmsRefusedError):
                raise copy_of(data)
            record = dek.parse(data, key_id)
            vault.unlocked.kek(record.kek_version)
        except KeyNotFoundError:
            return None  # destroyed since it was listed
        except KeyUnreadableError as error:
            vault.unreadable.add(key_id, str(error))
            return None
        return record

    async def _retire_all_replaced(self) -> None:
        for record in list(self._vault.replacing.values()):
            await self._retire_replaced(record)

    async def _retire_replaced(self, new: DekRecord) -> None:
        try:
            old = self._vault.record(new.replaces)
            if old.state == "active":
                self._vault.check_replaces(old, new.thread_id, new.purpose)
                await self._vault.retire(old.id, replaced_by=new.id, again=True)
        except StandbyError:
            return
        except KmsRefusedError:
            pass  # the old key was destroyed, can't be read (then it is listed), or is of another thread
        self._vault.replacing.pop(new.replaces, None)
