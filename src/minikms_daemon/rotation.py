"""KEK rotation, and the pruning of KEK versions and rotation backups.

Owns: the steps of a rotation, their order, and their resumption; the rewrap of every key file; the decision which KEK
versions and rotation backups may be removed.

A rotation has three steps. Each is durable before the next begins.
1. `begin`: the keyring gets the new KEK version as `pending`, and the slot of the new root key if there is one. From
   here on creates use the new version, and the new root key opens the keyring too.
2. When the creates that took the old version are on disk, every key file under another version is rewrapped. Passes
   over the whole directory are repeated until one finds nothing to do.
3. The new version becomes active, and the old one retired.
After a restart a rotation that the keyring names continues with step 2.

A pass reads the files that the index does not have under the new KEK version, rewraps those under another version, and
gives them to `minikms.custody.journal`, one batch at a time. Three threads share the work: the reader reads the
next batch; the event loop's thread, the only one that uses keys, rewraps the batch before it; the disk thread writes
the batch before that. The first pass takes the keys of the index in the order of their ids, so that the backups
have disjoint ranges. The passes after it list the directory, which is the authority on which keys there are.

Requests get a turn of the event loop after each few keys (`PACES`).

Invariants:
- At any moment a crash leaves every key readable.
- A rotation backup is durable before its file is replaced. A rewrapped key is unwrapped again and compared before it is
  written. A file that another request changes meanwhile is left for the next pass.
- A version becomes active only after the files of every batch are durable.
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
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Container, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from minikms import api
from minikms.api.errors import (
    ConflictError,
    KeyNotFoundError,
    KeyUnreadableError,
    KmsRefusedError,
    StorageUnavailableError,
    copy_of,
)
from minikms.crypto import roots
from minikms.custody.deks import SCAN_FILES
from minikms.custody.journal_format import Change
from minikms.custody.vault import Permit, Vault, permitted
from minikms.keys import dek, keyring, root_slots
from minikms.keys.dek import UNWRAPS_SLICE, key_id_to_bytes
from minikms.memory.arena import SecretSlot, fill_random
from minikms.platform.clock import HOUR_NS, now_ns, now_rfc3339, rfc3339, stamp
from minikms.platform.workers import in_worker

BATCH_FILES: Final = 1024
INDEXED_SLICE: Final = 128
"""Keys whose index entries are changed before requests get a turn."""
PASSES_MAX: Final = 100
RETRY_SECONDS_MIN: Final = 0.25
RETRY_SECONDS_MAX: Final = 5.0

T = TypeVar("T")
ReadFile = tuple[str, bytes | KmsRefusedError]
"""(key id, the content of its file or why it can't be read)."""


class Pace(NamedTuple):
    """How a rotation shares the event loop: after `keys` keys it gives requests a turn and waits `pause_seconds`."""

    keys: int
    pause_seconds: float


PACES: Final[dict[api.Priority, Pace]] = {
    "low": Pace(keys=3, pause_seconds=0.001),
    "normal": Pace(keys=3, pause_seconds=0.0),
    "high": Pace(keys=64, pause_seconds=0.0),
}


class Begun(NamedTuple):
    """`newly`: false if the requested rotation runs or was done already. `slot_id`: of the given root key, or empty."""

    newly: bool
    slot_id: str


@dataclass(eq=False, repr=False)
class KekRotation:
    """The rotation of a data directory. Used in the event loop's thread; `reader` reads files, `disk` changes them.
    `around_passes` gives the context in which step 2 runs.
    """

    vault: Vault
    reader: Executor
    disk: Executor
    around_passes: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    def __post_init__(self) -> None:
        self._starting = asyncio.Lock()
        self.unread = 0
        """Keys whose files the last pass could not read. They may be under any KEK version."""
        self.rewrapped = 0
        """Keys that were rewrapped in this run by the current rotation, or by the last one."""
        self.last_error = ""
        self.priority: api.Priority = "normal"
        """The priority of the rotation that runs."""

    @property
    def running(self) -> keyring.Rotation | None:
        """The rotation that the keyring names; None if there is none."""
        return self.vault.keyring.body.rotation

    def progress(self, rotation: keyring.Rotation) -> dict[str, Any]:
        """Progress of `rotation`, the one that runs or ran last, for `/status`."""
        return {
            "from_version": rotation.from_version,
            "to_version": rotation.to_version,
            "started_at": rotation.started_at,
            "new_root": bool(rotation.slot_id),
            "rewrapped": self.rewrapped,
            "last_error": self.last_error,
        }

    # --- step 1 ------------------------------------------------------------------------------------------------------

    async def begin(
        self, root: SecretSlot | None, *, replaces: str = "", check: Callable[[keyring.Body], None] | None = None
    ) -> Begun:
        """Step 1, unless the requested rotation runs or was done already; then nothing changes.

        root: the new root key; None if the root key stays. replaces: the slot that it is to replace. check: raises if
        the body does not allow that.

        Raises ConflictError if another rotation runs or the root key was used before, StorageUnavailableError, and the
        errors of `check`.
        """
        unlocked = self.vault.unlocked
        slot_id: str | None = None

        def next_body(body: keyring.Body) -> keyring.Body:
            nonlocal slot_id
            if check is not None:
                check(body)
            slot_id = self._begun_before(body, root, replaces)
            if slot_id is not None:
                return body
            keyring.check_has_room(body, kek=True, slot=root is not None)
            begun_ns = now_ns()
            at = rfc3339(begun_ns)
            if root is not None:  # the root key that it replaces is removed later
                root_slots.check_pace(self.vault.unlocked.audit, now=at, hour_ago=rfc3339(begun_ns - HOUR_NS))
            slot = None
            if root is not None:
                slot = unlocked.make_slot(
                    root.view, "request", slot_id=root_slots.next_slot_id(body), at=at, replaces=replaces
                )
            version = max(kek.version for kek in body.keks) + 1
            kek = unlocked.make_kek(fill_random, version=version, state="pending", at=at)
            return keyring.begin_rotation(body, kek=kek, slot=slot, stamp=stamp(begun_ns), at=at)

        async with self._starting:
            body = await self.vault.keyring.change(next_body)
            if slot_id is not None:
                return Begun(False, slot_id)
            self.rewrapped = 0
            self.last_error = ""
            self.priority = "normal"
            return Begun(True, body.slots[-1].slot_id if root is not None else "")

    def _begun_before(self, body: keyring.Body, root: SecretSlot | None, replaces: str) -> str | None:
        """The slot id of `root`, or empty without one, if this rotation has begun or is done; None if it has not."""
        rotation = body.rotation
        if root is None:
            if rotation is not None and rotation.slot_id:
                raise ConflictError("a rotation to a new root key is running; wait for it, see /status")
            return None if rotation is None else ""
        fingerprint = roots.fingerprint(root.view)
        slot = body.slot_for(fingerprint)
        if slot is None:
            root_slots.check_is_new(body, fingerprint)
        else:
            replaced = any(other.replaces == slot.slot_id for other in body.slots)
            if slot.replaces or (slot.slot_id == replaces and not replaced):
                return slot.slot_id
            raise ConflictError("this root key opens the keyring already, in another slot; give a fresh one")
        if rotation is not None:
            raise ConflictError("another rotation is running; wait for it, see /status")
        return None

    @asynccontextmanager
    async def excluded(self) -> AsyncIterator[None]:
        """No rotation runs or begins inside the block. Raises ConflictError if one runs."""
        async with self._starting:
            if self.running is not None:
                raise ConflictError("a rotation is running; wait for it, see /status")
            yield

    # --- steps 2 and 3 -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Completes the running rotation, if there is one. Tries a failing disk again until it accepts the writes, and
        waits while another member serves.
        """
        pause = RETRY_SECONDS_MIN
        while True:
            if self.running is not None:
                await self.vault.changes.serving()
            if (rotation := self.running) is None:
                return
            try:
                await self.vault.new_keys.groups.group_ended()
                with self.around_passes():
                    await self._rewrap_all(rotation)
                await self.vault.keyring.change(self._promoted)
            except Exception as error:  # noqa: BLE001  a rotation that has begun must be completed after any failure
                is_known = isinstance(error, KmsRefusedError)
                self.last_error = str(error) if is_known else f"defect: {type(error).__name__}"
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)
                continue
            self.last_error = ""

    def _promoted(self, body: keyring.Body) -> keyring.Body:
        at = now_rfc3339()
        promoted = keyring.promote(body, at=at)
        return promoted if self.unread else keyring.end_revocation(promoted, at=at)

    async def end_revocation(self) -> None:
        """Rewraps the files that the last rotation could not read, and ends the revocation of removed root keys if none
        is left. Call it while no rotation runs or is due. Raises StorageUnavailableError, SealedError.
        """
        async with self._starting:
            body = self.vault.keyring.body
            version, at_ns = body.wrapping_kek.version, now_ns()
            if body.rotation is not None:
                return
            again = keyring.Rotation(version, version, started_at=rfc3339(at_ns), stamp=stamp(at_ns))
            if unread := sorted(self.vault.unreadable.key_ids()):
                await self._run_pass(again, partial(_these, unread))
            if not self.unread:
                await self._rewrap_all(again)
            if not self.unread:
                await self.vault.keyring.change(lambda body: keyring.end_revocation(body, at=now_rfc3339()))

    async def _rewrap_all(self, rotation: keyring.Rotation) -> None:
        await self._run_pass(rotation, self._indexed)
        # After the removal of a root key the index is not enough: an older file that somebody has put back is wrapped
        # under a KEK that the removed root key opens.
        reads_all = bool(self.vault.keyring.body.revoking)
        for _ in range(PASSES_MAX):
            if await self.run_pass(rotation, reads_all=reads_all) == 0:
                return
        raise StorageUnavailableError("key files under the former KEK version keep appearing")

    async def run_pass(self, rotation: keyring.Rotation, *, reads_all: bool = False) -> int:
        """Makes one pass over the directory. Returns the number of files that were due and readable. `reads_all`: it
        also reads the files that the index has under the version.

        Raises StorageUnavailableError; then a part of the files was rewrapped.
        """
        return await self._run_pass(rotation, partial(self._listed, reads_all=reads_all))

    async def _indexed(self, to_version: int, _changed: set[str]) -> AsyncIterator[list[str]]:
        """The keys that the index has under another version, in order."""
        after: bytes | None = b""
        due: list[str] = []
        while after is not None:
            key_ids, after = self.vault.index.under_other_keks(to_version, after=after, limit=SCAN_FILES)
            due += key_ids
            if len(due) >= BATCH_FILES:
                yield due
                due = []
            await asyncio.sleep(0)
        yield due

    async def _listed(self, to_version: int, changed: set[str], *, reads_all: bool) -> AsyncIterator[list[str]]:
        """The keys of the directory, in no order; unless `reads_all`, without those that the index has under the
        version. A listing may have a key twice.
        """
        key_ids = self.vault.store.list_ids(changed=changed)
        kek_version = self.vault.index.kek_version
        due: list[str] = []
        while chunk := await in_worker(self.reader, lambda: list(itertools.islice(key_ids, SCAN_FILES))):
            due += [key_id for key_id in chunk if reads_all or kek_version(key_id) != to_version]
            if len(due) >= BATCH_FILES:
                yield list(dict.fromkeys(due))
                due = []
        yield list(dict.fromkeys(due))

    async def _run_pass(
        self, rotation: keyring.Rotation, listing: Callable[[int, set[str]], AsyncIterator[list[str]]]
    ) -> int:
        count = self.unread = 0
        with self.vault.locks.watch() as changed:
            key_ids = listing(rotation.to_version, changed)
            reading = asyncio.create_task(self._read_due(key_ids, rotation.to_version))
            writing: asyncio.Task[None] | None = None
            recent: deque[set[str]] = deque(maxlen=2)
            try:
                while (due := await reading) is not None:
                    reading = asyncio.create_task(self._read_due(key_ids, rotation.to_version))
                    # A content that was read before the batch of its key was written is older than the file.
                    written_late = frozenset().union(*recent)
                    due = [one for one in due if one[0] not in written_late]
                    recent.append({key_id for key_id, _ in due})
                    batch = await self._rewrap(due, rotation.to_version)
                    count += len(batch)
                    if writing is not None:
                        await writing
                    writing = asyncio.create_task(self._write(batch, rotation.to_version, changed, rotation.stamp))
                if writing is not None:
                    await writing
            finally:
                await asyncio.gather(*filter(None, (reading, writing)), return_exceptions=True)
                del reading, writing  # the traceback of an error of theirs leads to this frame
        await in_worker(self.disk, self.vault.journal.flush)
        return count

    async def _read_due(self, key_ids: AsyncIterator[list[str]], to_version: int) -> list[ReadFile] | None:
        """The next files that are not under the version; None after the last one.

        The reader only searches the bytes for the version; a file is parsed if it is due.
        """
        marker = b'"kek_version":%d,' % to_version
        async for chunk in key_ids:
            if not chunk:
                continue
            files = await in_worker(self.reader, partial(self.vault.store.read_many, chunk))
            return [(key_id, data) for key_id, data in files if isinstance(data, KmsRefusedError) or marker not in data]
        return None

    async def _rewrap(self, due: list[ReadFile], to_version: int) -> list[Change]:
        """The changes to write."""
        batch: list[Change] = []
        with self.vault.arena.allocate() as key, self.vault.arena.allocate() as again:
            async for part in self._paced(due):
                batch += self._rewrapped(part, to_version, key.view, again.view)
        return batch

    def _rewrapped(self, part: Sequence[ReadFile], to_version: int, key: memoryview, again: memoryview) -> list[Change]:
        """The keys under the new version, without those that are there already, were destroyed, or can't be read (these
        are listed).
        """
        vault = self.vault
        changes: list[Change] = []
        with dek.Rewrapper(vault.unlocked.kek_cipher, to_version, key=key, again=again) as rewrapper:
            for key_id, data in part:
                if key_id in vault.destroyed:
                    continue  # a crash left the file, and the scan of this start removes it: don't write it again
                try:
                    if isinstance(data, KmsRefusedError):
                        raise copy_of(data)
                    record = dek.parse(data, key_id)
                    if record.kek_version == to_version:
                        continue  # spelled in a way that the reader's search does not know
                    changed = rewrapper.rewrap(record, vault.nonces.next())
                except KeyNotFoundError:
                    vault.unreadable.remove(key_id)
                    continue  # destroyed since it was listed
                except KeyUnreadableError as error:
                    self.unread += 1
                    vault.unreadable.add(key_id, str(error))
                    continue
                vault.unreadable.remove(key_id)
                changes.append(Change.summed(key_id, data, dek.encode(changed)))
        return changes

    async def _write(self, batch: list[Change], to_version: int, changed: set[str], stamp: str) -> None:
        """Writes a batch, except the keys that another request changed or destroyed since they were read. Raises
        StorageUnavailableError.
        """
        vault = self.vault
        async with vault.locks.hold([change.key_id for change in batch], announced=False) as held:
            # A destruction whose request was cancelled goes on without the lock.
            batch = [each for each in batch if each.key_id not in changed and each.key_id not in vault.destroyed]
            if not batch:
                return
            await vault.changes.replace(held, batch, stamp)
            for start in range(0, len(batch), INDEXED_SLICE):
                part = batch[start : start + INDEXED_SLICE]
                raw_ids = [key_id_to_bytes(change.key_id) for change in part]
                missing = frozenset(vault.index.set_kek(raw_ids, to_version))
                for raw_id, change in zip(raw_ids, part, strict=True) if missing else ():
                    # The scan of this start has not read it yet, or it was destroyed meanwhile.
                    if raw_id in missing and change.key_id not in vault.destroyed:
                        vault.index.put(dek.parse(change.new, change.key_id))
                self.rewrapped += len(part)
                await asyncio.sleep(0)

    async def _paced(self, items: Sequence[T]) -> AsyncIterator[Sequence[T]]:
        """The items in parts, with a turn for requests after each."""
        at = 0
        while at < len(items):
            pace = PACES[self.priority]
            yield items[at : at + pace.keys]
            at += pace.keys
            await asyncio.sleep(pace.pause_seconds)


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
        self.progress: dict[str, int] | None = None
        """The progress of a prune that runs, for `/status`."""

    async def prune(
        self, *, backups: bool, before: str | None = None, permit: Permit = permitted
    ) -> api.PruneKekAnswer:
        """Destroys each retired KEK version that no file needs. Call it inside `KekRotation.excluded`. `permit` is
        asked after each wait, before something is removed.

        With `backups` it first removes the rotation backups with stamps before `before` (None: all). Raises
        StorageUnavailableError; then a part was done.
        """
        self.progress = {"read": 0, "total": len(self._vault.index)}
        try:
            return await self._prune(before, permit, backups=backups)
        finally:
            self.progress = None

    async def _prune(self, before: str | None, permit: Permit, *, backups: bool) -> api.PruneKekAnswer:
        # A file that the disk has refused is in the journal only.
        await in_worker(self._disk, self._vault.journal.flush)
        live = await self._live_census()
        permit()
        removed = await self._remove_backups(before, live.unreadable, permit) if backups else 0
        kept_in_backups = await self._backup_census()
        destroyed: list[int] = []
        keks: list[api.KeptKek] = []
        for kek in self._vault.keyring.body.keks:
            if kek.state != "retired":
                continue
            why = _why_kept(kek.version, live, kept_in_backups)
            if why:
                keks.append(api.KeptKek(kek.version, why))
                continue
            await self._destroy(kek.version, permit)
            destroyed.append(kek.version)
        return api.PruneKekAnswer(destroyed, keks, removed)

    async def keep_rotations(self, count: int) -> int:
        """Removes the backups of all but the newest `count` rotations; the number of backups removed.

        Call it right after a rotation, which has read every file: then all unreadable keys are known, unless there are
        too many for the list.
        """
        before = await in_worker(self._disk, lambda: self._vault.rotation_backups.oldest_stamp_of(count))
        if before is None or not self._vault.unreadable.complete:
            return 0
        return await self._remove_backups(before, self._vault.unreadable.key_ids(), permitted)

    async def _remove_backups(self, before: str | None, spare: Container[str], permit: Permit) -> int:
        """Removes backups in many short jobs: the creates and other changes of keys need the same thread."""
        vault = self._vault
        steps = vault.rotation_backups.prune(vault.store, before=before, spare=spare, destroyed=vault.destroyed)
        removed = 0
        while True:
            permit()
            count = await in_worker(self._disk, lambda: next(steps, None))
            if count is None:
                return removed
            removed += count

    async def _destroy(self, version: int, permit: Permit) -> None:
        at = now_rfc3339()

        def destroy(body: keyring.Body) -> keyring.Body:
            permit()
            return keyring.destroy_kek(body, version, at=at)

        await self._vault.keyring.change(destroy)

    async def _live_census(self) -> Census:
        store = self._vault.store
        with self._vault.locks.watch() as changed:
            key_ids = store.list_ids(changed=changed)
            return await self._census(lambda: store.read_many(itertools.islice(key_ids, SCAN_FILES)))

    async def _backup_census(self) -> Census:
        backups = self._vault.rotation_backups
        journals = await in_worker(self._reader, backups.journals)
        if self.progress is not None:
            self.progress["total"] += len(journals) * BATCH_FILES
        files = iter(journals)

        def read() -> list[ReadFile]:
            for file in files:
                try:
                    records = backups.read_journal(file)
                except KeyUnreadableError as error:
                    return [(file.first, error)]
                if records:
                    return [(record.key_id, record.content) for record in records]
            return []

        return await self._census(read)

    async def _census(self, read: Callable[[], list[ReadFile]]) -> Census:
        """Unwraps the files that `read` returns; it is called in the reader until it returns none."""
        census = Census(set(), set())
        reading = in_worker(self._reader, read)
        try:
            while chunk := await reading:
                reading = in_worker(self._reader, read)  # meanwhile
                if self.progress is not None:
                    self.progress["read"] += len(chunk)
                for start in range(0, len(chunk), UNWRAPS_SLICE):
                    self._count(census, chunk[start : start + UNWRAPS_SLICE])
                    await asyncio.sleep(0)
        finally:
            reading.cancel()
        return census

    def _count(self, census: Census, part: Sequence[ReadFile]) -> None:
        vault = self._vault
        with vault.arena.allocate() as key, dek.Unwrapper(vault.unlocked.kek_cipher, key.view) as unwrapper:
            for key_id, data in part:
                if isinstance(data, bytes) and key_id in vault.destroyed:
                    continue  # what is left of it needs no KEK
                try:
                    if isinstance(data, KmsRefusedError):
                        raise copy_of(data)
                    record = dek.parse(data, key_id)
                    unwrapper.unwrap(record)
                except KeyNotFoundError:
                    continue  # removed since it was listed
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
        return "a key's file or rotation backup can't be read and may need it; see the warnings of /status"
    return ""


async def _these(key_ids: list[str], _to_version: int, _changed: set[str]) -> AsyncIterator[list[str]]:
    """These keys, as a listing of a pass."""
    yield key_ids
