"""Destruction of keys in groups: the tombstones of many keys take one append and one write of the keyring.

Owns: the order in which keys are destroyed. `minikms.platform.group_commit` forms the groups. A group has three steps,
each durable before the next: the records are appended to `kms-tombstones`, the keyring counts them, the rotation
backups and the files of the keys are removed. Invariants: what the third step needs is read before the first one, and
a key whose rotation backups can't be read or written is refused there and stays as it is. An answer comes after the
third step. From the first step on a key is destroyed in this run too, whatever becomes of the others: its record is on
disk, and the next start would adopt it; or the database of a replicated key service has it. An error says whether the
key is destroyed. A repeated request completes what failed; `Destruction.unfinished` has the keys that need one.

It runs in the event loop's thread; the disk is used in an executor. It must never remove a file before its tombstone is
durable.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from minikms.api.errors import KmsRefusedError, StorageUnavailableError
from minikms.custody.deks import HeldKeys
from minikms.custody.keyring_file import StoredKeyring
from minikms.custody.replication import Written
from minikms.custody.rotation_backups import FoundRecords
from minikms.custody.tombstone_file import Staged, Tombstones
from minikms.keys import keyring
from minikms.keys.keyring import Body
from minikms.keys.tombstones import NumberedTombstone
from minikms.keys.unlocked import UnlockedKeyring
from minikms.platform.clock import now_ns, rfc3339
from minikms.platform.group_commit import GroupCommit

GROUP_KEYS_MAX: Final = 512
"""Fewer than `minikms.keys.tombstones.APPEND_RECORDS_MAX`."""


class Removal(NamedTuple):
    """The number of rotation backups that a destroyed key was removed from, and the archives that may hold it."""

    backups: int
    archives: list[str]


class Destroyed(NamedTuple):
    """What a receipt says of a destroyed key."""

    backups: int
    archives: list[str]
    tombstone: NumberedTombstone


@dataclass(eq=False, repr=False)
class Destruction:
    """The destructions of a data directory.

    `find_records` prepares `remove_files`, and raises StorageUnavailableError if no key can be destroyed. `forget`
    drops what the caller keeps of a destroyed key in memory. `remove_files` removes the files of the keys with these
    locks, durably; its second argument has those of the keys that were destroyed before, so that their removal may have
    been interrupted.
    """

    tombstones: Tombstones
    unlocked: UnlockedKeyring
    stored: StoredKeyring
    find_records: Callable[[Sequence[str]], Awaitable[FoundRecords]]
    forget: Callable[[str], None]
    remove_files: Callable[[Sequence[HeldKeys], Container[str], FoundRecords], Awaitable[list[Removal]]]

    def __post_init__(self) -> None:
        self.groups = GroupCommit(self._destroy, items_max=GROUP_KEYS_MAX)
        self.unfinished: set[str] = set()
        """Destroyed keys whose tombstone could not be counted, or whose bytes could not be removed."""

    async def destroy(self, held: HeldKeys) -> Removal:
        """Destroys the one key whose lock is held, durably on return.

        Raises StorageUnavailableError, ConflictError; a repeated call completes what failed. If the caller is cancelled
        after its group has begun, the group goes on without the lock.
        """
        held.require()
        return await self.groups.submit(held)

    async def _destroy(self, locks: list[HeldKeys]) -> Sequence[Removal | KmsRefusedError]:
        key_ids = [key_id for held in locks for key_id in held.key_ids]
        repeated = frozenset(key_id for key_id in key_ids if key_id in self.tombstones)
        try:
            records = await self.find_records(key_ids)
        except StorageUnavailableError as error:
            return [self._failed(key_id, error, begun=False) for key_id in key_ids]
        outcomes: dict[str, Removal | KmsRefusedError] = {
            key_id: self._failed(key_id, error, begun=False) for key_id, error in records.unreadable.items()
        }
        removable = [held for held in locks if records.unreadable.keys().isdisjoint(held.key_ids)]
        # Destroyed before: they fail again, but their other backups are blanked.
        stuck = [held for held in locks if not (records.unreadable.keys() & repeated).isdisjoint(held.key_ids)]
        try:
            await self._write_tombstones([key_id for held in (*removable, *stuck) for key_id in held.key_ids])
        except StorageUnavailableError as error:
            return [outcomes.get(key_id) or self._failed(key_id, error) for key_id in key_ids]
        for part in (removable, stuck):
            outcomes.update(await self._remove(part, repeated, records))
        return [outcomes[key_id] for key_id in key_ids]

    async def _remove(
        self, locks: Sequence[HeldKeys], repeated: Container[str], records: FoundRecords
    ) -> dict[str, Removal | KmsRefusedError]:
        """Step three: blanks the records of the keys and removes their files."""
        key_ids = [key_id for held in locks for key_id in held.key_ids]
        if not key_ids:
            return {}
        try:
            removed = await self.remove_files(locks, repeated, records)
        except StorageUnavailableError as error:
            return {key_id: self._failed(key_id, error) for key_id in key_ids}
        self.unfinished.difference_update(key_ids)
        return dict(zip(key_ids, removed, strict=True))

    def _failed(self, key_id: str, error: StorageUnavailableError, *, begun: bool = True) -> StorageUnavailableError:
        """`begun`: its tombstone may have been written."""
        if key_id in self.tombstones:
            self.unfinished.add(key_id)
            text = f"the key is destroyed and opens no more, but its bytes may stay: {error}; miniKMS tries again"
        elif begun:
            text = f"{error}; the key opens as before, but the next start may find it destroyed: try again"
        else:
            text = f"{error}; the key is not destroyed, and opens as before"
        failure = StorageUnavailableError(text)
        failure.__cause__ = error.with_traceback(None)
        return failure

    async def _write_tombstones(self, key_ids: list[str]) -> None:
        """Steps one and two. Writes nothing if the keyring counts the records of all these keys."""
        tombstones = self.tombstones
        unix_ns = now_ns()
        staged: Staged | None = None
        begun = appended = False

        def make(body: Body) -> Body:
            nonlocal staged
            staged = tombstones.stage(self.unlocked.tombstone_key, key_ids, unix_ns // 1_000_000_000)
            if not staged.records and body.tombstone_log.count == tombstones.count:
                return body
            return keyring.with_tombstones(body, staged.chain.count, staged.chain.head, at=rfc3339(unix_ns))

        def append() -> None:
            nonlocal begun, appended
            begun = True
            if staged is not None and staged.records:
                tombstones.append(staged)
                appended = True

        def beside() -> Written:
            new = [key_id for key_id in key_ids if key_id not in tombstones]
            return Written(tombstones=b"" if staged is None else staged.records, destroyed=new)

        try:
            await self.stored.change(make, first=append, beside=beside)
        finally:
            confirmed = begun and self.stored.changes.replication is not None
            if appended and staged is not None:
                tombstones.adopt(staged)
            elif confirmed:
                tombstones.name(key_ids)
            if appended or confirmed:
                for key_id in key_ids:
                    self.forget(key_id)
