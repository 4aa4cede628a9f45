"""Restoring a backup archive into an empty place.

Owns: the order of writing. Invariants: nothing is written before the whole archive was judged good; nothing is ever
overwritten; the archive is registered first and the keyring written last, so that a restore that was cut short does not
start, and is not taken for a new directory either; keys that were destroyed since, as far as a newer keyring tells, are
not brought back; every key counts 2^30 uses more, and every KEK 2^26 wraps, for those after the archive are not in it.
The caller holds the lock of the target. It must never lower a count.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from minikms.custody import deks as dekstore
from minikms.custody import keyring_file, lease_store, rotation_backups
from minikms.custody.backup.archive import ArchiveError, Entry
from minikms.custody.backup.create import CHANGED, Contents, Task, entries_again
from minikms.custody.backup.register import ArchiveRegister, Registered
from minikms.custody.files import LOCK_NAME, make_private_directory, open_directory, replace_file, replace_many
from minikms.custody.lease_store import LeaseStore
from minikms.errors import ConflictError
from minikms.keys import keyring
from minikms.keys.ids import key_id_to_bytes
from minikms.keys.keyring import Body, Tombstone
from minikms.keys.unlocked import UnlockedKeyring

GROUP_FILES: Final = 512
"""More than any KEK wraps between two backups; a KEK bears 64 restores."""


class Target(NamedTuple):
    """An empty directory under its lock, what to do differently from the archive, and how the register names that."""

    directory: str
    directory_fd: int
    tombstones: tuple[Tombstone, ...]
    source: Registered


class Restored(NamedTuple):
    """`left_out`: keys of the archive that were destroyed before or after it was made."""

    keys: int
    left_out: int
    epoch: int


def check_empty(directory_fd: int, directory: str) -> None:
    """Raises ConflictError when the target holds anything but the lock that is held on it."""
    if set(os.listdir(directory_fd)) - {LOCK_NAME}:
        raise ConflictError(
            f"{directory} is not empty, and a restore overwrites nothing: move what is there away first"
        )


def newer_tombstones(archived: Body, newer: Body | None) -> tuple[Tombstone, ...]:
    """The tombstones to restore with: the archive's, and those that a later keyring has beside them.

    Raises ConflictError when that keyring is another one's.
    """
    if newer is None:
        return archived.tombstones
    if newer.keyring_id != archived.keyring_id:
        raise ConflictError(f"the keyring {newer.keyring_id} is not a later one of the backup's {archived.keyring_id}")
    known = {stone.key_id for stone in archived.tombstones}
    return (*archived.tombstones, *(stone for stone in newer.tombstones if stone.key_id not in known))


def restore(
    path: str,
    good: Contents,
    task: Task,
    unlocked: UnlockedKeyring,
    target: Target,
    *,
    at: str,
) -> Restored:
    """Writes the archive into `directory`, empty and locked. `unlocked` is the archive's keyring.

    Raises ArchiveError, StorageUnavailableError, StartError; the target then holds a part that does not start.
    """
    ArchiveRegister(target.directory).put(target.source)
    for name in (dekstore.DIRECTORY, rotation_backups.DIRECTORY):
        make_private_directory(os.path.join(target.directory, name))
    keys = _write_files(path, good, task, target)
    if good.manifest.newest_key_id:
        store = LeaseStore.open(target.directory_fd, create=False)
        try:
            store.add_restore_penalty(key_id_to_bytes(good.manifest.newest_key_id))
        finally:
            store.close()
    body = keyring.next_epoch(unlocked.body, at=at, tombstones=target.tombstones)
    for kek in body.keks:
        if kek.state in ("active", "pending"):
            body = keyring.reserve_wraps(body, kek.version, keyring.RESTORE_WRAPS, at=at)
    replace_file(target.directory_fd, keyring_file.NAME, unlocked.encode(body))
    unlocked.body = body
    return Restored(keys, good.manifest.keys - keys, body.epoch)


def _write_files(path: str, good: Contents, task: Task, target: Target) -> int:
    """All files but the keyring; the number of keys."""
    group: list[tuple[str, bytes]] = []
    count = read = 0
    buried = {stone.key_id for stone in target.tombstones}
    deks = open_directory(os.path.join(target.directory, dekstore.DIRECTORY))
    try:
        for name, content in entries_again(path, good.sha256):
            key_id = Entry(name, b"").key_id
            read += 1 if key_id else 0
            if read > good.manifest.keys:  # another archive by now, which may go on until the disk is full
                raise ArchiveError(CHANGED)
            if not key_id and name != keyring_file.NAME:
                replace_file(target.directory_fd, _lease_file(name), content)
            elif key_id and key_id not in buried:
                group.append((dekstore.file_name(key_id), content))
                count += 1
            if len(group) == GROUP_FILES:
                replace_many(deks, group)
                group.clear()
                task.progress(count, good.manifest.keys)
        if group:
            replace_many(deks, group)
    finally:
        os.close(deks)
    return count


def _lease_file(name: str) -> str:
    if name not in (lease_store.JOURNAL_NAME, lease_store.SNAPSHOT_NAME):
        raise ArchiveError("the backup names a file that no backup has")
    return name
