"""The data directory of a member: a host of a key service that several hosts have.

Owns: what a member does with its directory in each mode. While it serves, each change is confirmed by the database
before it is written here (`minikms.custody.commit_queue`). Otherwise it takes changes from the database
(`minikms.custody.following`). Owns also the mark, and the filling of an empty database. Invariants: it never serves and
follows at once; the mark on disk names only changes that are here as a whole, and its numbers never decrease; a member
that lacks a change of the database serves no more until it has followed.

It runs in the event loop's thread; the disk is used in an executor. It must never decide that it serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import msgspec
from msgspec import UNSET

from minikms import api
from minikms.api.errors import (
    ConflictError,
    KeysNotReadError,
    ReplicaRolledBackError,
    StandbyError,
    StorageUnavailableError,
)
from minikms.custody import replica_file
from minikms.custody.commit_queue import CommitQueue, Position
from minikms.custody.following import Following
from minikms.custody.journal_format import Change
from minikms.custody.keyring_file import KeyringFile
from minikms.custody.replica_file import Mark
from minikms.custody.replication import Written
from minikms.custody.vault import Vault
from minikms.keys.replica import EntrySum, entry
from minikms.keys.tombstones import RECORD_BYTES
from minikms.platform.files import replace_file
from minikms.platform.workers import in_worker

SUMMED_SLICE: Final = 64
"""Key files whose terms of the sum are computed before requests get a turn."""


class MemberDirectory:
    """Made by `minikms.datadir.open_for_service`. It is the `minikms.custody.replication.Replication` of its vault."""

    def __init__(
        self, vault: Vault, keyring_file: KeyringFile, *, directory_fd: int, disk: Executor, mark: Mark
    ) -> None:
        self._vault = vault
        self._keyring_file = keyring_file
        self._directory_fd = directory_fd
        self._disk = disk
        self._mark = self._written = mark
        self._queue = CommitQueue(lambda state, key_version: state.signed(vault.unlocked, key_version))
        self._following = Following(vault, disk)
        self._one_follows = asyncio.Lock()
        self._serving = asyncio.Event()

    @property
    def mark(self) -> Mark:
        """The newest mark. While the files have to be compared with the database again, its number is 0, so that the
        database gives all of them.
        """
        return msgspec.structs.replace(self._mark, number=0) if self._following.repairs else self._mark

    @property
    def fills(self) -> bool:
        """It fills an empty database when it takes over: `fill` comes after `serve`, before the first change."""
        return self._mark.begins

    @property
    def scanned(self) -> bool:
        """Whether the sum over the key files is known. Otherwise the member needs `scan`; it can neither follow nor
        take over.
        """
        return self.serves or self._following.entries is not None

    @property
    def behind(self) -> bool:
        """The database has a change that is not written here: it must follow before it serves."""
        return self._queue.failed

    @property
    def serves(self) -> bool:
        """Whether changes are taken, or the database is being filled."""
        return self._queue.term is not None

    # --- serving -----------------------------------------------------------------------------------------------------

    def serve(self, term: int, number: int) -> None:
        """Takes changes from here on, as the member that has the lease in `term`. `number`: of the database's last
        change. Raises ConflictError unless this directory has exactly the same changes, or fills the database.
        """
        entries = self._following.entries
        busy = self._one_follows.locked() or self._queue.writing
        if entries is None or busy or self.behind or not (self._following.agrees or self.fills):
            raise ConflictError("this host has to follow before it serves")
        body = self._vault.unlocked.body
        position = Position(number, body.tombstone_log.count, body.epoch, body.key_version, entries)
        if self.fills:
            position = Position(number, key_version=body.key_version)
        elif number != self._mark.number or term < self._mark.term:
            raise ConflictError(f"the database has {number} changes in term {term}, and this host other ones")
        self._queue.begin(term, position, number_min=self._mark.number)
        if not self.fills:
            self._serving.set()

    def stop_serving(self) -> None:
        """Changes that wait and later ones raise StandbyError. Idempotent."""
        if not self.serves:
            return
        self._queue.stop()
        self._serving.clear()
        if not self.fills:
            self._following.entries = None if self.behind else self._queue.position.entries

    def require_serving(self) -> None:
        if not self._serving.is_set():
            raise StandbyError

    async def serving(self) -> None:
        await self._serving.wait()

    @asynccontextmanager
    async def committed(self, written: Written) -> AsyncIterator[None]:
        self.require_serving()
        async with self._committed(written):
            yield

    @asynccontextmanager
    async def _committed(self, written: Written) -> AsyncIterator[None]:
        try:
            async with self._queue.committed(written, partial(self._delta, written)):
                yield
        finally:
            if self.behind:
                self.stop_serving()

    async def _delta(self, written: Written) -> EntrySum:
        """What the change makes of the sum. Raises the errors of `DekStore.read`."""
        unlocked, store = self._vault.unlocked, self._vault.store
        removals = (Change(key_id, store.read(key_id), b"") for key_id in written.destroyed)
        added = new = old = 0
        for number, change in enumerate((*written.files, *removals), 1):
            added += bool(change.new) - bool(change.old)
            new += entry(unlocked, change.key_id, change.new) if change.new else 0
            old += entry(unlocked, change.key_id, change.old) if change.old else 0
            if number % SUMMED_SLICE == 0:
                await asyncio.sleep(0)
        return EntrySum().changed(added=added, new=new, old=old)

    async def next_commit(self, seconds: float) -> api.ReplicaCommit | None:
        """The commit that is out, the same bytes again; otherwise the next one; None if nothing waits for so long."""
        return await self._queue.next(seconds)

    def confirm(self, number: int) -> None:
        """The database has `number` changes, by a commit of this member. Raises ConflictError for another number."""
        self._queue.confirm(number)
        if self._queue.term is not None and number > self._mark.number:
            begins = self._mark.begins and not self._queue.position.epoch  # until the keyring is there
            self._mark = msgspec.structs.replace(self._mark, term=self._queue.term, number=number, begins=begins)
        if self.behind:
            self.stop_serving()

    async def fill(self) -> None:
        """Puts every key file and all tombstones into an empty database, then the keyring, after which others can
        follow. Call it after `serve` where `fills` is true. Raises StandbyError, StorageUnavailableError, and
        KeyUnreadableError for a damaged file.
        """
        vault = self._vault
        body = vault.unlocked.body
        await in_worker(self._disk, vault.journal.flush)  # a file that the disk has refused is in the journal only
        key_ids = await in_worker(
            self._disk, lambda: [key_id for key_id in vault.store.list_ids() if key_id not in vault.destroyed]
        )
        for start in range(0, len(key_ids), api.REPLICA_FILES_MAX):
            part = key_ids[start : start + api.REPLICA_FILES_MAX]
            present = await self._following.present(part)
            await self._following.verified(present)
            async with self._committed(Written([Change(key_id, b"", content) for key_id, content in present.items()])):
                pass
        records = await in_worker(self._disk, vault.destroyed.records)
        data = await in_worker(self._disk, self._keyring_file.load)
        if vault.unlocked.body is not body or data is None:
            raise StorageUnavailableError("the keyring has changed while the database was filled; try again")
        step = (api.REPLICA_BYTES_MAX - len(data)) // RECORD_BYTES * RECORD_BYTES
        while len(records) > step > 0:
            async with self._committed(Written(tombstones=records[:step])):
                records = records[step:]
        async with self._committed(Written(keyring=data, tombstones=records)):
            pass
        self._serving.set()
        await self.write_mark()

    # --- following ---------------------------------------------------------------------------------------------------

    async def scan(self) -> None:
        """Computes the sum over all key files. Raises StorageUnavailableError."""
        async with self._one_follows:
            self._settle()
            if not self.scanned:
                await self._following.scan()

    def review(self) -> None:
        """Needs another scan: the files may have changed since the last one."""
        self._following.entries = None

    async def follow(self, request: api.ReplicaFollowRequest) -> None:
        """Verifies a part of what the database has, then applies it. After the last part the mark is written.

        Raises ReplicaRolledBackError, ReplicaForkedError, ConflictError for parts in another order, NeedsRootError for
        a keyring under a new keyring key, and StorageUnavailableError; then nothing of the part is applied, except
        after a StorageUnavailableError: then `scan` comes first.
        """
        head = request.head
        if head is UNSET:
            return
        if self._following.entries is None and self._one_follows.locked():
            raise KeysNotReadError("the key files of this host are being read")
        async with self._one_follows:
            if self.serves:
                raise ConflictError("this host serves")
            await self._vault.keyring.idle()
            self._settle()
            if self._following.entries is None:
                raise KeysNotReadError("the key files of this host have to be read first")
            if not head.state or head.keyring == "":
                if self._mark.number and not self.fills:
                    seen = self._mark.number
                    raise ReplicaRolledBackError(f"the database is empty, and this host has seen change {seen}")
                return
            state = await self._following.follow(request, head, self._mark)
            if state is not None:
                self._mark = msgspec.structs.replace(self._mark, term=state.term, number=state.number, begins=False)
            if self._mark != self._written:
                await self.write_mark()

    def _settle(self) -> None:
        """After it served: where a change could not be written, goes back to the last one before it. Raises
        StorageUnavailableError while changes are being written.
        """
        queue = self._queue
        if queue.writing and not self.serves:
            raise StorageUnavailableError("the last changes are still being written")
        if queue.failed:
            self._mark = msgspec.structs.replace(self._mark, number=min(self._mark.number, queue.whole))
            self._following.entries = None
            queue.failed = False

    async def write_mark(self) -> None:
        """Writes the mark, durably, with the last change that is here as a whole. Raises StorageUnavailableError."""
        queue, mark = self._queue, self._mark
        if queue.writing or queue.failed:
            mark = msgspec.structs.replace(mark, number=min(mark.number, queue.whole))
        content = replica_file.encode(mark, self._vault.unlocked)
        await in_worker(self._disk, partial(replace_file, self._directory_fd, replica_file.NAME, content))
        self._written = mark

    def note_seals(self, seals: int) -> None:
        """Sets the count of seals that this member has obeyed, if it is higher; `write_mark` keeps it."""
        self._mark = msgspec.structs.replace(self._mark, seals=max(seals, self._mark.seals))

    def may_begin(self) -> None:
        """An operator has decided that this member may fill an empty database; `write_mark` keeps it."""
        self._mark = msgspec.structs.replace(self._mark, begins=True)
