"""One pass of a KEK rotation over all key files.

Owns: reading every file, rewrapping those under another KEK version, keeping the old file as a backup, and putting the
new one in place. Invariants: a backup is durable before its file is replaced; a rewrapped key is unwrapped again and
compared before it goes to the disk; a file that another hand changed meanwhile is left for the next pass; a file whose
replacement the disk did not confirm is written again, as a fresh file. It must never replace a file that it could not
read and unwrap.

Three threads share the work. One reads the next batch; the loop's thread, the only one that works with keys, rewraps
the one before it between requests; one writes that batch aside and, with the same sync, puts the batch before it in
place.

What may be destroyed for good: KEK versions that nothing needs, and backups that nobody needs.

Owns: the census of what live files and backups are wrapped under, and the decision. Invariants: a KEK version is
destroyed only when every live file and every backup was read, unwraps, and is under another version, also those files
that were replaced while the directory was being listed; a file that can't be read or does not unwrap keeps every
version, for it may need any; the backups of a key whose file is missing or can't be read are kept, for they may be its
last copy. It must never run beside a rotation, nor trust what a file says of itself: each is unwrapped.

KEK rotation: never a moment in which a crash loses a key.

Owns: the steps below, their order, and resuming. Each step is durable before the next begins.
1. `begin`: the new KEK version is in the keyring as `pending`, and the new root's slot if one is given. From here on
   either root opens a keyring that knows both versions, and creates use the new one.
2. Creates that took the old version have reached the disk; then every file under another version than the new one is
   rewrapped (`custody.rewrapping`), over the whole listing again until one pass finds nothing to do.
3. `promote`: the new version is active, the old one retired.
A restart finds `rotation` in the keyring and goes on with step 2. A file that can't be read is listed and left; it does
not stop the rotation, and keeps its KEK from being destroyed. It must never remove a slot: whether the new root key has
been proved is `minikms.service.keks`'s to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
from collections.abc import AsyncIterator, Callable, Container, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Final, NamedTuple, TypeVar

from minikms import api
from minikms.crypto.aead import scrub_stack
from minikms.custody import files
from minikms.custody.deks import file_name
from minikms.custody.files import FileWrite, StagedReplacements
from minikms.custody.vault import Vault, read_files
from minikms.errors import ConflictError, KeyNotFoundError, KeyUnreadableError, MiniKmsError, StorageUnavailableError
from minikms.keys import dek, keyring
from minikms.keys.dek import DekRecord
from minikms.memory.arena import SecretSlot, fill_random

BATCH_FILES: Final = 512
CRYPTO_SLICE: Final = 16
"""Rewraps between two looks at other requests: some 0.3 ms."""

Read = tuple[str, bytes | MiniKmsError]


class Rewrapping:
    """Lives in the loop's thread. `reader` reads files, `disk` changes them."""

    def __init__(self, vault: Vault, *, reader: Executor, disk: Executor) -> None:
        self._vault = vault
        self._reader = reader
        self._disk = disk
        self._unconfirmed: set[str] = set()
        self._staged: list[DekRecord] = []
        self.rewrapped = 0
        """Keys done since `begin`."""

    def begin(self) -> None:
        """Another rotation has begun."""
        self.rewrapped = 0
        self._unconfirmed.clear()

    async def run_pass(self, rotation: keyring.Rotation) -> int:
        """Over all files; how many were due and can be read. Raises StorageUnavailableError, with a part of it done."""
        vault = self._vault
        groups = StagedReplacements(vault.store.directory_fd, durable_first=vault.backups.directory_fd)
        found = 0
        self._staged = []
        with vault.locks.watch() as changed:
            key_ids = vault.store.list_ids(changed=changed)
            reading = self._begin_reading(key_ids, rotation.to_version)
            writing: asyncio.Task[None] | None = None
            try:
                while (due := await reading) is not None:
                    reading = self._begin_reading(key_ids, rotation.to_version)
                    records = await self._rewrap(due, rotation.to_version)
                    found += len(records)
                    if writing is not None:
                        await writing
                    writing = asyncio.create_task(self._step(groups, records, changed, rotation.stamp))
                if writing is not None:
                    await writing
                    await self._step(groups, [], changed, rotation.stamp)
            finally:
                # What has begun is waited for, also on the way out of a failure; what is only staged is dropped.
                await asyncio.gather(reading, *([writing] if writing else []), return_exceptions=True)
                await asyncio.get_running_loop().run_in_executor(self._disk, groups.discard)
        return found

    # --- reading -----------------------------------------------------------------------------------------------------

    def _begin_reading(self, key_ids: Iterator[str], to_version: int) -> asyncio.Future[list[Read] | None]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._reader, self._read_due, key_ids, to_version)

    def _read_due(self, key_ids: Iterator[str], to_version: int) -> list[Read] | None:
        """For the reading thread: of the next files those that aren't under the new version; None after the last.

        A look at the bytes is enough: files are parsed only when they are due.
        """
        chunk = list(dict.fromkeys(itertools.islice(key_ids, BATCH_FILES)))
        if not chunk:
            return None
        marker = b'"kek_version":%d,' % to_version
        return [
            (key_id, data)
            for key_id, data in read_files(self._vault.store, chunk)
            if isinstance(data, MiniKmsError) or marker not in data or key_id in self._unconfirmed
        ]

    # --- rewrapping --------------------------------------------------------------------------------------------------

    async def _rewrap(self, due: list[Read], to_version: int) -> list[DekRecord]:
        """The records as they are to be written."""
        if not due:
            return []
        await self._vault.wraps.take(to_version, len(due))
        records: list[DekRecord] = []
        for number, (key_id, data) in enumerate(due):
            record = self._rewrapped(key_id, data, to_version)
            if record is not None:
                records.append(record)
            if number % CRYPTO_SLICE == CRYPTO_SLICE - 1:
                scrub_stack()
                await asyncio.sleep(0)
        scrub_stack()
        return records

    def _rewrapped(self, key_id: str, data: bytes | MiniKmsError, to_version: int) -> DekRecord | None:
        """The record under the new version; None for a key that is gone, or that can't be read, which is noted."""
        vault = self._vault
        if key_id in vault.destroyed:
            return None  # a crash left its file, which the scan of this start removes: it must not come back
        try:
            if isinstance(data, MiniKmsError):
                raise data
            record = dek.parse(data, key_id)
            if record.kek_version == to_version:
                return record
            changed = self._checked_rewrap(record, to_version)
        except KeyNotFoundError:
            return None  # destroyed since it was listed
        except KeyUnreadableError as error:
            vault.damage.note(key_id, str(error))
            return None
        vault.damage.clear(key_id)
        return changed

    def _checked_rewrap(self, record: DekRecord, to_version: int) -> DekRecord:
        """Unwraps, wraps anew, unwraps that and compares. Raises KeyUnreadableError."""
        vault = self._vault
        with vault.arena.allocate() as key, vault.arena.allocate() as again:
            dek.unwrap_into(record, vault.unlocked.kek(record.kek_version), key.view)
            kek = vault.unlocked.kek(to_version)
            changed = dek.rewrap(record, key.view, kek, to_version, vault.nonces.next())
            dek.unwrap_into(changed, kek, again.view)
            if not hmac.compare_digest(key.view, again.view):
                raise KeyUnreadableError(f"key {record.id} did not survive its rewrap")
        return changed

    # --- writing -----------------------------------------------------------------------------------------------------

    async def _step(self, groups: StagedReplacements, records: list[DekRecord], changed: set[str], stamp: str) -> None:
        """Writes these records aside and puts those of the step before in place. Raises the first error, once those
        that the disk did confirm are noted.
        """
        placing, self._staged = self._staged, records
        if not placing and not records:
            return
        async with self._vault.locks.hold([record.id for record in placing], announced=False):
            unchanged = {file_name(record.id): record for record in placing if record.id not in changed}
            skip = {file_name(record.id) for record in placing} - unchanged.keys()
            loop = asyncio.get_running_loop()
            outcomes = await loop.run_in_executor(self._disk, self._write, groups, records, skip, stamp)
            for name, outcome in outcomes.items():
                record = unchanged[name]
                if outcome is None:
                    self._unconfirmed.discard(record.id)
                    self._vault.index.put(record)
                    self.rewrapped += 1
                else:
                    self._unconfirmed.add(record.id)
        for outcome in outcomes.values():
            if outcome is not None:
                raise outcome

    def _write(
        self, groups: StagedReplacements, records: list[DekRecord], skip: set[str], stamp: str
    ) -> dict[str, MiniKmsError | None]:
        """For the disk's thread: backups of these records' files, then the step."""
        replaced = (record.id for record in records if record.id not in self._unconfirmed)
        self._vault.backups.keep(self._vault.store, replaced, stamp)
        return groups.step([FileWrite(file_name(record.id), dek.encode(record)) for record in records], skip=skip)


CHUNK_FILES: Final = 128
UNWRAPS_SLICE: Final = 32
"""Unwraps between two looks at other requests."""

T = TypeVar("T")


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


RETRY_SECONDS_MIN: Final = 0.25
RETRY_SECONDS_MAX: Final = 5.0
PASSES_MAX: Final = 100


class Begun(NamedTuple):
    """`newly`: false when this very rotation runs or was done already. `slot_id`: of the root key given, or empty."""

    newly: bool
    slot_id: str


class KekRotation:
    """The rotation of this data directory, if one runs. Lives in the loop's thread."""

    def __init__(
        self,
        vault: Vault,
        rewrapping: Rewrapping,
        *,
        together: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """`together` is held around the long part, in which the loop's thread and the workers take turns."""
        self._vault = vault
        self._together = together
        self._rewrapping = rewrapping
        self._starting = asyncio.Lock()
        self.last_error = ""

    @property
    def running(self) -> keyring.Rotation | None:
        return self._vault.keyring.body.rotation

    @property
    def rewrapped(self) -> int:
        """Keys rewrapped by the present rotation, or the last one, in this run."""
        return self._rewrapping.rewrapped

    def status(self) -> dict[str, object] | None:
        """Progress for `/status`; None when no rotation runs."""
        rotation = self.running
        if rotation is None:
            return None
        return {
            "from_version": rotation.from_version,
            "to_version": rotation.to_version,
            "started_at": rotation.started_at,
            "new_root": bool(rotation.slot_id),
            "rewrapped": self.rewrapped,
            "last_error": self.last_error,
        }

    # --- beginning ---------------------------------------------------------------------------------------------------

    async def begin(self, root: SecretSlot | None) -> Begun:
        """Step 1, unless this very rotation runs or was done already; then nothing is changed.

        Raises ConflictError for another rotation meanwhile, or a root key that was rotated away;
        StorageUnavailableError.
        """
        async with self._starting:
            if root is None:
                return await self._begin_without_root()
            body = self._vault.keyring.body
            given = self._vault.unlocked.fingerprint(root.view)
            present = body.slot_for(given)
            if body.rotation is not None:
                if present is not None and present.slot_id == body.rotation.slot_id:
                    return Begun(False, present.slot_id)
                raise ConflictError("another rotation is running; wait for it, see /status")
            if present is not None:
                if present.slot_id == body.slots[-1].slot_id:
                    return Begun(False, present.slot_id)
                raise ConflictError("this root key still opens the keyring but is not the newest; give a fresh one")
            if any(old.fingerprint == given for old in body.retired_roots):
                raise ConflictError("this root key was rotated away before; give a fresh one")
            await self._begin(root)
            return Begun(True, self._vault.keyring.body.slots[-1].slot_id)

    @asynccontextmanager
    async def excluded(self) -> AsyncIterator[None]:
        """No rotation runs or begins inside the block. Raises ConflictError when one runs."""
        async with self._starting:
            if self.running is not None:
                raise ConflictError("a rotation is running; wait for it, see /status")
            yield

    async def _begin_without_root(self) -> Begun:
        rotation = self.running
        if rotation is None:
            await self._begin(None)
            return Begun(True, "")
        if rotation.slot_id:
            raise ConflictError("a rotation to a new root key is running; wait for it, see /status")
        return Begun(False, "")

    async def _begin(self, root: SecretSlot | None) -> None:
        unlocked = self._vault.unlocked
        made: list[int] = []

        def next_body(body: keyring.Body) -> keyring.Body:
            keyring.check_has_room(body, new_root=root is not None)
            now_ns = files.now_ns()
            at = files.rfc3339(now_ns)
            added = None
            if root is not None:
                # Named after the epoch that it comes with, so no other slot has this id.
                added = unlocked.make_root(root.view, "request", fill_random, slot_id=f"s{body.epoch + 1}", at=at)
            version = max(kek.version for kek in body.keks) + 1
            made.append(version)
            sealed_under = added.link.version if added else body.key_version
            kek = unlocked.make_kek(fill_random, version=version, state="pending", at=at, key_version=sealed_under)
            scrub_stack()
            return keyring.begin_rotation(body, kek=kek, root=added, stamp=files.stamp(now_ns), at=at)

        try:
            await self._vault.keyring.change(next_body)
        finally:
            # Whatever became of it: what the body in memory does not know is not kept.
            unlocked.settle()
            for version in made:
                if self._vault.keyring.body.kek(version) is None:
                    unlocked.forget_kek(version)
        self._rewrapping.begin()
        self.last_error = ""

    # --- the long part -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Finishes a rotation that has begun, if there is one; tries a failing disk again until it takes the writes."""
        pause = RETRY_SECONDS_MIN
        while (rotation := self.running) is not None:
            try:
                await self._vault.wraps.drained(rotation.from_version)
                with self._together():
                    await self._rewrap_all(rotation)
                await self._vault.keyring.change(lambda body: keyring.promote(body, at=self._vault.now()))
            except Exception as error:  # noqa: BLE001  a rotation that has begun must end, whatever went wrong
                self.last_error = str(error) if isinstance(error, MiniKmsError) else f"defect: {type(error).__name__}"
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)
                continue
            self.last_error = ""

    async def _rewrap_all(self, rotation: keyring.Rotation) -> None:
        for _ in range(PASSES_MAX):
            if await self._rewrapping.run_pass(rotation) == 0:
                return
        raise StorageUnavailableError("key files under the former KEK version keep appearing")
