"""Restore of a backup archive into an empty data directory.

Owns: the order of the writes. The caller holds the lock of the target directory. Invariants: nothing is written before
the whole archive was verified. Nothing is overwritten. The archive is registered first and the keyring is written last,
so after an interrupted restore the daemon neither starts nor creates a new keyring. Keys that were destroyed, by the
tombstones of the archive or of a newer keyring, are not restored. Every key counts 2^30 more uses, and every KEK in use
2^26 more wraps, since the archive does not know those made after it. It must never lower a count.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from minikms.custody import deks, keyring_file, lease_store, rotation_backups
from minikms.custody.backup.archive import ArchiveError
from minikms.custody.backup.create import CHANGED, Task, VerifiedArchive, reread_entries
from minikms.custody.backup.register import ArchiveRegister, Registered
from minikms.custody.files import (
    GROUP_FILES_MAX,
    LOCK_NAME,
    FileWrite,
    make_private_directory,
    open_directory,
    replace_file,
    write_files,
)
from minikms.custody.lease_store import LeaseStore
from minikms.errors import ConflictError
from minikms.keys import keyring
from minikms.keys.dek import key_id_to_bytes
from minikms.keys.keyring import Body, Tombstone
from minikms.keys.unlocked import UnlockedKeyring


class Target(NamedTuple):
    """An empty, locked directory, the tombstones that it gets, and the entry for the archive in its register."""

    directory: str
    directory_fd: int
    tombstones: tuple[Tombstone, ...]
    source: Registered


class Restored(NamedTuple):
    """`keys`: restored ones. `left_out`: keys of the archive that have a tombstone. `epoch`: of the new keyring."""

    keys: int
    left_out: int
    epoch: int


def check_empty(directory_fd: int, directory: str) -> None:
    """Raises ConflictError if the directory holds anything except the lock file."""
    if set(os.listdir(directory_fd)) - {LOCK_NAME}:
        raise ConflictError(
            f"{directory} is not empty, and a restore never overwrites anything; move its content away first"
        )


def newer_tombstones(archived: Body, newer: Body | None) -> tuple[Tombstone, ...]:
    """The tombstones of the archive and of a newer keyring, if one is given.

    Raises ConflictError if that keyring does not have the same keyring id.
    """
    if newer is None:
        return archived.tombstones
    if newer.keyring_id != archived.keyring_id:
        raise ConflictError(
            f"the keyring {newer.keyring_id} is not a later version of the backup's keyring {archived.keyring_id}"
        )
    known = {tombstone.key_id for tombstone in archived.tombstones}
    return (*archived.tombstones, *(tombstone for tombstone in newer.tombstones if tombstone.key_id not in known))


def restore(
    path: str,
    good: VerifiedArchive,
    task: Task,
    unlocked: UnlockedKeyring,
    target: Target,
    *,
    at: str,
) -> Restored:
    """Writes the archive at `path` into `target`. `unlocked` is the keyring of the archive.

    Raises ArchiveError, StorageUnavailableError, StartError; then the target is incomplete, and the daemon refuses it.
    """
    ArchiveRegister(target.directory).put(target.source)
    for name in (deks.DIRECTORY, rotation_backups.DIRECTORY):
        make_private_directory(os.path.join(target.directory, name))
    keys = _write_files(path, good, task, target)
    if good.manifest.newest_key_id:
        store = LeaseStore.open(target.directory_fd, create=False)
        try:
            store.add_restore_uses(key_id_to_bytes(good.manifest.newest_key_id))
        finally:
            store.close()
    body = keyring.next_epoch(unlocked.body, at=at, tombstones=target.tombstones)
    for kek in body.keks:
        if kek.state in ("active", "pending"):
            body = keyring.reserve_wraps(body, kek.version, keyring.RESTORE_WRAPS, at=at)
    replace_file(target.directory_fd, keyring_file.NAME, unlocked.encode(body))
    unlocked.body = body
    return Restored(keys, good.manifest.keys - keys, body.epoch)


def _write_files(path: str, good: VerifiedArchive, task: Task, target: Target) -> int:
    """Writes all files except the keyring; the number of keys."""
    group: list[FileWrite] = []
    count = read = 0
    destroyed = {tombstone.key_id for tombstone in target.tombstones}
    directory_fd = open_directory(os.path.join(target.directory, deks.DIRECTORY))
    try:
        for entry in reread_entries(path, good.sha256):
            read += 1 if entry.key_id else 0
            if read > good.manifest.keys:  # the file was replaced, perhaps by one that would fill the disk
                raise ArchiveError(CHANGED)
            if not entry.key_id and entry.name != keyring_file.NAME:
                replace_file(target.directory_fd, _lease_file(entry.name), entry.content)
            elif entry.key_id and entry.key_id not in destroyed:
                group.append(FileWrite(deks.file_name(entry.key_id), entry.content))
                count += 1
            if len(group) == GROUP_FILES_MAX:
                write_files(directory_fd, group)
                group.clear()
                task.progress(count, good.manifest.keys)
        if group:
            write_files(directory_fd, group)
    finally:
        os.close(directory_fd)
    return count


def _lease_file(name: str) -> str:
    if name not in (lease_store.JOURNAL_NAME, lease_store.SNAPSHOT_NAME):
        raise ArchiveError("the backup was altered: it names a file that no backup has")
    return name
