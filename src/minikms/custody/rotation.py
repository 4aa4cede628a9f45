"""KEK rotation, and the pruning of KEK versions and rotation backups.

Owns: the steps of a rotation, their order, and their resumption; the rewrap of every key file; the decision which KEK
versions and rotation backups may be removed.

A rotation has three steps. Each is durable before the next begins.
1. `begin`: the keyring gets the new KEK version as `pending`, and the slot of the new root key if there is one. From
   here on either root key opens a keyring with both KEK versions, and creates use the new version.
2. When the creates that took the old version are on disk, every key file under another version is rewrapped. Passes
   over the whole directory are repeated until one finds nothing to do.
3. The new version becomes active, and the old one retired.
After a restart a rotation that the keyring names continues with step 2. The owner of the root keys calls
`drop_older_slots` once it has proved that the new root key is stored.

A pass reads every file, rewraps those under another KEK version, keeps the old file as a rotation backup, and replaces
it. Three threads share the work: the reader reads the next batch; the event loop's thread, the only one that uses keys,
rewraps the batch before it, between requests; the disk thread writes that batch to temporary files and, with the same
sync, puts the batch before that in place.

Invariants:
- At any moment a crash leaves every key readable.
- A rotation backup is durable before its file is replaced. A rewrapped key is unwrapped again and compared before it is
  written. A file that another request changes meanwhile is left for the next pass. A file whose replacement the disk
  did not confirm is written again, to a new temporary file.
- A file that can't be read is listed and left as it is. It does not stop a rotation, but no KEK version is destroyed
  while there is one.
- A KEK version is destroyed only after every key file and every rotation backup was read and unwrapped under another
  version, including the files that were replaced during the listing.
- The rotation backups of a key whose file is missing or unreadable stay, since they may be its last copy.

It must never replace a file that it could not unwrap, prune while a rotation runs, or trust the KEK version that a file
claims when it decides what to destroy.
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
from minikms.crypto import roots
from minikms.crypto.aead import scrub_stack
from minikms.custody.deks import SCAN_FILES, file_name
from minikms.custody.files import FileWrite, StagedReplacements, now_ns, now_rfc3339, rfc3339, stamp
from minikms.custody.vault import Vault
from minikms.errors import ConflictError, KeyNotFoundError, KeyUnreadableError, MiniKmsError, StorageUnavailableError
from minikms.keys import dek, keyring
from minikms.keys.dek import DekRecord
from minikms.memory.arena import SecretSlot, fill_random

BATCH_FILES: Final = 512
REWRAPS_SLICE: Final = 16
"""Rewraps before other requests get a turn of the event loop: about 0.3 ms."""
UNWRAPS_SLICE: Final = 32
"""Unwraps before other requests get a turn of the event loop."""
PASSES_MAX: Final = 100
RETRY_SECONDS_MIN: Final = 0.25
RETRY_SECONDS_MAX: Final = 5.0

T = TypeVar("T")
ReadFile = tuple[str, bytes | MiniKmsError]
"""(key id, the content of its file or why it can't be read)."""


class Begun(NamedTuple):
    """`newly`: false if the requested rotation runs or was done already. `slot_id`: of the given root key, or empty."""

    newly: bool
    slot_id: str


class KekRotation:
    """The rotation of a data directory. Used in the event loop's thread; `reader` reads files, `disk` changes them."""

    def __init__(
        self,
        vault: Vault,
        *,
        reader: Executor,
        disk: Executor,
        around_passes: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """`around_passes` gives the context in which step 2 runs."""
        self._vault = vault
        self._reader = reader
        self._disk = disk
        self._around_passes = around_passes
        self._starting = asyncio.Lock()
        self._unconfirmed: set[str] = set()
        self._staged: list[DekRecord] = []
        self.rewrapped = 0
        """Keys that were rewrapped in this run by the current rotation, or by the last one."""
        self.last_error = ""

    @property
    def running(self) -> keyring.Rotation | None:
        """The rotation that the keyring names; None if there is none."""
        return self._vault.keyring.body.rotation

    def status(self) -> dict[str, object] | None:
        """Progress for `/status`; None if no rotation runs."""
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

    # --- step 1 ------------------------------------------------------------------------------------------------------

    async def begin(self, root: SecretSlot | None) -> Begun:
        """Step 1, unless the requested rotation runs or was done already; then nothing changes.

        root: the new root key; None if the root key stays.

        Raises ConflictError if another rotation runs or the root key was used before, and StorageUnavailableError.
        """
        async with self._starting:
            slot_id = self._begun_before(root)
            if slot_id is not None:
                return Begun(False, slot_id)
            body = await self._begin(root)
            return Begun(True, body.slots[-1].slot_id if root is not None else "")

    def _begun_before(self, root: SecretSlot | None) -> str | None:
        """The slot id of `root`, or empty without one, if this rotation has begun or is done; None if it has not."""
        body = self._vault.keyring.body
        rotation = body.rotation
        if root is None:
            if rotation is not None and rotation.slot_id:
                raise ConflictError("a rotation to a new root key is running; wait for it, see /status")
            return None if rotation is None else ""
        given = roots.fingerprint(root.view)
        slot = body.slot_for(given)
        if rotation is not None:
            if slot is None or slot.slot_id != rotation.slot_id:
                raise ConflictError("another rotation is running; wait for it, see /status")
            return slot.slot_id
        if slot is not None:
            if slot is not body.slots[-1]:
                raise ConflictError("this root key still opens the keyring but is not the newest; give a fresh one")
            return slot.slot_id
        if any(old.fingerprint == given for old in body.retired_roots):
            raise ConflictError("this root key was rotated away before; give a fresh one")
        return None

    async def _begin(self, root: SecretSlot | None) -> keyring.Body:
        unlocked = self._vault.unlocked
        made: list[int] = []

        def next_body(body: keyring.Body) -> keyring.Body:
            keyring.check_has_room(body, new_root=root is not None)
            begun_ns = now_ns()
            at = rfc3339(begun_ns)
            added = None
            if root is not None:
                # Named after the epoch that it comes with, so no other slot has this id.
                added = unlocked.make_root(root.view, "request", fill_random, slot_id=f"s{body.epoch + 1}", at=at)
            version = max(kek.version for kek in body.keks) + 1
            made.append(version)
            sealed_under = added.link.version if added else body.key_version
            kek = unlocked.make_kek(fill_random, version=version, state="pending", at=at, key_version=sealed_under)
            scrub_stack()
            return keyring.begin_rotation(body, kek=kek, root=added, stamp=stamp(begun_ns), at=at)

        try:
            body = await self._vault.keyring.change(next_body)
        finally:
            # Also after a failure: keys that the body in memory does not name are zeroed.
            unlocked.settle()
            for version in made:
                if self._vault.keyring.body.kek(version) is None:
                    unlocked.forget_kek(version)
        self.rewrapped = 0
        self._unconfirmed.clear()
        self.last_error = ""
        return body

    @asynccontextmanager
    async def excluded(self) -> AsyncIterator[None]:
        """No rotation runs or begins inside the block. Raises ConflictError if one runs."""
        async with self._starting:
            if self.running is not None:
                raise ConflictError("a rotation is running; wait for it, see /status")
            yield

    async def drop_older_slots(self, slot_id: str) -> list[str]:
        """Removes every slot but `slot_id`, the newest; the fingerprints of their root keys, which open nothing now.

        Raises ConflictError for a slot that is not the newest, StorageUnavailableError.
        """
        before = self._vault.keyring.body.slots
        at = now_rfc3339()
        body = await self._vault.keyring.change(
            lambda body: keyring.drop_slots_except(body, slot_id, at=at) if len(body.slots) > 1 else body
        )
        return [slot.fingerprint for slot in before if slot not in body.slots]

    # --- steps 2 and 3 -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Completes the running rotation, if there is one. Tries a failing disk again until it accepts the writes."""
        pause = RETRY_SECONDS_MIN
        while (rotation := self.running) is not None:
            try:
                await self._vault.wrap_reservation.creates_done(rotation.from_version)
                with self._around_passes():
                    await self._rewrap_all(rotation)
                await self._vault.keyring.change(lambda body: keyring.promote(body, at=now_rfc3339()))
            except Exception as error:  # noqa: BLE001  a rotation that has begun must be completed after any failure
                self.last_error = str(error) if isinstance(error, MiniKmsError) else f"defect: {type(error).__name__}"
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)
                continue
            self.last_error = ""

    async def _rewrap_all(self, rotation: keyring.Rotation) -> None:
        for _ in range(PASSES_MAX):
            if await self.run_pass(rotation) == 0:
                return
        raise StorageUnavailableError("key files under the former KEK version keep appearing")

    async def run_pass(self, rotation: keyring.Rotation) -> int:
        """One pass over all files; the number of those that were due and readable.

        Raises StorageUnavailableError; then a part of the files was rewrapped.
        """
        vault = self._vault
        staging = StagedReplacements(vault.store.directory_fd, durable_first=vault.rotation_backups.directory_fd)
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
                    writing = asyncio.create_task(self._step(staging, records, changed, rotation.stamp))
                if writing is not None:
                    await writing
                    await self._step(staging, [], changed, rotation.stamp)
            finally:
                # After a failure too: wait for what has begun, and discard what is only staged.
                await asyncio.gather(reading, *([writing] if writing else []), return_exceptions=True)
                await _run_in(self._disk, staging.discard)
        return found

    def _begin_reading(self, key_ids: Iterator[str], to_version: int) -> asyncio.Future[list[ReadFile] | None]:
        return asyncio.get_running_loop().run_in_executor(self._reader, self._read_due, key_ids, to_version)

    def _read_due(self, key_ids: Iterator[str], to_version: int) -> list[ReadFile] | None:
        """In the reader: of the next BATCH_FILES files those not under the new version; None after the last file.

        It only searches the bytes for the version; a file is parsed if it is due.
        """
        chunk = list(dict.fromkeys(itertools.islice(key_ids, BATCH_FILES)))
        if not chunk:
            return None
        marker = b'"kek_version":%d,' % to_version
        return [
            (key_id, data)
            for key_id, data in self._vault.store.read_many(chunk)
            if isinstance(data, MiniKmsError) or marker not in data or key_id in self._unconfirmed
        ]

    async def _rewrap(self, due: list[ReadFile], to_version: int) -> list[DekRecord]:
        """The records to write."""
        if not due:
            return []
        await self._vault.wrap_reservation.take(to_version, len(due))
        records: list[DekRecord] = []
        for number, (key_id, data) in enumerate(due):
            record = self._rewrapped(key_id, data, to_version)
            if record is not None:
                records.append(record)
            if number % REWRAPS_SLICE == REWRAPS_SLICE - 1:
                scrub_stack()
                await asyncio.sleep(0)
        scrub_stack()
        return records

    def _rewrapped(self, key_id: str, data: bytes | MiniKmsError, to_version: int) -> DekRecord | None:
        """The record under the new version; None if the key was destroyed, or can't be read (then it is listed)."""
        vault = self._vault
        if key_id in vault.destroyed:
            return None  # a crash left the file, and the scan of this start removes it: it must not be written again
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
            vault.unreadable.add(key_id, str(error))
            return None
        vault.unreadable.remove(key_id)
        return changed

    def _checked_rewrap(self, record: DekRecord, to_version: int) -> DekRecord:
        """Unwraps the key, wraps it anew, unwraps the result and compares. Raises KeyUnreadableError."""
        vault = self._vault
        with vault.arena.allocate() as key, vault.arena.allocate() as again:
            dek.unwrap_into(record, vault.unlocked.kek(record.kek_version), key.view)
            kek = vault.unlocked.kek(to_version)
            changed = dek.rewrap(record, key.view, kek, to_version, vault.nonces.next())
            dek.unwrap_into(changed, kek, again.view)
            if not hmac.compare_digest(key.view, again.view):
                raise KeyUnreadableError(f"key {record.id} did not survive its rewrap; its file was not changed")
        return changed

    async def _step(self, staging: StagedReplacements, records: list[DekRecord], changed: set[str], stamp: str) -> None:
        """Writes these records to temporary files and puts those of the previous step in place.

        Raises the first error, after the files that the disk did confirm were counted.
        """
        placing, self._staged = self._staged, records
        if not placing and not records:
            return
        async with self._vault.locks.hold([record.id for record in placing], announced=False):
            unchanged = {file_name(record.id): record for record in placing if record.id not in changed}
            skip = {file_name(record.id) for record in placing} - unchanged.keys()
            outcomes = await _run_in(self._disk, lambda: self._write(staging, records, skip, stamp))
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
        self, staging: StagedReplacements, records: list[DekRecord], skip: set[str], stamp: str
    ) -> dict[str, MiniKmsError | None]:
        """In the disk thread: the rotation backups of these records' files, then the step of `staging`."""
        replaced = (record.id for record in records if record.id not in self._unconfirmed)
        self._vault.rotation_backups.keep(self._vault.store, replaced, stamp)
        return staging.step([FileWrite(file_name(record.id), dek.encode(record)) for record in records], skip=skip)


class Census(NamedTuple):
    """The KEK versions that files unwrap under, and the keys whose files can't be read or do not unwrap."""

    versions: set[int]
    unreadable: set[str]


class Pruning:
    """Removes rotation backups and destroys KEK versions. `reader` reads files, `disk` changes them."""

    def __init__(self, vault: Vault, *, reader: Executor, disk: Executor) -> None:
        self._vault = vault
        self._reader = reader
        self._disk = disk

    async def prune(self, *, backups: bool, before: str | None = None) -> api.PruneKekAnswer:
        """Destroys each retired KEK version that no file needs. Call it inside `KekRotation.excluded`.

        With `backups` it first removes the rotation backups with stamps before `before` (None: all). Raises
        StorageUnavailableError; then a part was done.
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
        """Removes the backups of all but the newest `count` rotations; the number of backups removed.

        Call it right after a rotation, which has read every file: then all unreadable keys are known, unless there are
        too many for the list.
        """
        before = await _run_in(self._disk, lambda: self._vault.rotation_backups.oldest_stamp_of(count))
        if before is None or not self._vault.unreadable.complete:
            return 0
        return await self._remove_backups(before, self._vault.unreadable.key_ids())

    async def _remove_backups(self, before: str | None, spare: Container[str]) -> int:
        vault = self._vault
        prune = vault.rotation_backups.prune
        return await _run_in(
            self._disk, lambda: prune(vault.store, before=before, spare=spare, destroyed=vault.destroyed)
        )

    async def _destroy(self, version: int) -> None:
        at = now_rfc3339()
        await self._vault.keyring.change(lambda body: keyring.destroy_kek(body, version, at=at))
        self._vault.unlocked.forget_kek(version)

    async def _live_census(self) -> Census:
        store = self._vault.store
        with self._vault.locks.watch() as changed:
            key_ids = store.list_ids(changed=changed)
            return await self._census(lambda: store.read_many(itertools.islice(key_ids, SCAN_FILES)))

    async def _backup_census(self) -> Census:
        store = self._vault.rotation_backups
        backups = store.listed()

        def read() -> list[ReadFile]:
            found: list[ReadFile] = []
            for backup in itertools.islice(backups, SCAN_FILES):
                try:
                    data = store.read(backup)
                except KeyUnreadableError as error:
                    found.append((backup.key_id, error))
                else:
                    found.append((backup.key_id, KeyNotFoundError("key not found") if data is None else data))
            return found

        return await self._census(read)

    async def _census(self, read: Callable[[], list[ReadFile]]) -> Census:
        """Unwraps the files that `read` returns; it is called in the reader until it returns none."""
        census = Census(set(), set())
        while chunk := await _run_in(self._reader, read):
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
    """Why a KEK version must stay; empty if no file needs it."""
    if version in live.versions:
        return "a key is wrapped under it; rotate the KEK"
    if version in backups.versions:
        return "a rotation backup of a key is wrapped under it; prune the rotation backups"
    if live.unreadable or backups.unreadable:
        return "a key's file or rotation backup can't be read and may need it; see keys.unreadable_files in /status"
    return ""


async def _run_in(executor: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work)
