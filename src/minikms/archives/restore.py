"""Restore of a backup archive into an empty data directory.

Owns: the order of the writes. The caller holds the lock of the target directory. Invariants: nothing is written before
the whole archive was verified. Nothing is overwritten. The archive is registered first and the keyring is written last,
after the first lines of the audit log, so after an interrupted restore the daemon neither starts nor creates a new
keyring. A key with a tombstone, in the archive or beside a newer keyring, is not restored. If a newer keyring is given,
the restored keyring opens under the root keys of the newer one only. It is that of one host, whatever it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from minikms.api.base64 import decode_exact
from minikms.api.errors import ConflictError
from minikms.archives.archive import ArchiveError, AuditHead
from minikms.archives.create import CHANGED, Task, VerifiedArchive, reread_entries
from minikms.custody import deks, keyring_file, rotation_backups, tombstone_file
from minikms.custody.archive_register import ArchiveRegister, RegisteredArchive
from minikms.keys import keyring, members, root_slots, tombstones
from minikms.keys.dek import bytes_to_key_id
from minikms.keys.keyring import AUDIT_KEYS_COUNT_MAX, RETIRED_ROOTS_MAX, AuditKeyEntry, Body
from minikms.keys.root_slots import Resealed
from minikms.keys.tombstones import ReadTombstones, Tombstone, TombstoneChain
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import fill_random
from minikms.platform.directory_lock import LOCK_NAME, make_private_directory
from minikms.platform.files import FileWrite, closed_after, make_files, open_directory, replace_file, replace_file_from


class Target(NamedTuple):
    """An empty, locked directory, the tombstones that it gets, and the entry for the archive in its register."""

    directory: str
    directory_fd: int
    tombstones: Sequence[Tombstone]
    source: RegisteredArchive


class RestoredArchive(NamedTuple):
    """`keys`: restored ones. `left_out`: keys of the archive that have a tombstone. `epoch`: of the new keyring.

    `roots`: the fingerprints of the root keys that open it. `roots_removed`: those that the newer keyring has no more.
    """

    keys: int
    left_out: int
    epoch: int
    roots: list[str]
    roots_removed: list[str]


def check_empty(directory_fd: int, directory: str) -> None:
    """Checks that the directory holds nothing except the lock file. Raises ConflictError."""
    if set(os.listdir(directory_fd)) - {LOCK_NAME}:
        raise ConflictError(
            f"{directory} is not empty, and a restore never overwrites anything; move its content away first"
        )


class NewerKeyring(NamedTuple):
    """A later state of the archive's keyring, opened, and its tombstones."""

    unlocked: UnlockedKeyring
    tombstones: Sequence[Tombstone]


def all_tombstones(keyring_id: str, archived: Sequence[Tombstone], newer: NewerKeyring | None) -> list[Tombstone]:
    """The tombstones of the archive and of a newer keyring, if one is given.

    Raises ConflictError if that keyring does not have the same keyring id.
    """
    if newer is None:
        return list(archived)
    if newer.unlocked.body.keyring_id != keyring_id:
        raise ConflictError(
            f"the keyring {newer.unlocked.body.keyring_id} is not a later version of the backup's keyring "
            f"{keyring_id}: it belongs to another data directory, such as that of a new installation; restore without "
            "--newer-keyring (the runbook, `Move to another machine`)"
        )
    known = {stone.key for stone in archived}
    return [*archived, *(stone for stone in newer.tombstones if stone.key not in known)]


def restore(
    path: str,
    good: VerifiedArchive,
    task: Task,
    unlocked: UnlockedKeyring,
    target: Target,
    *,
    begin_log: Callable[[], None],
    at: str,
    newer: NewerKeyring | None = None,
) -> RestoredArchive:
    """Writes the archive at `path` into `target`. `unlocked` is the keyring of the archive. `begin_log` writes the
    first lines of the audit log, durably, under the keyring that is stored next.

    Raises ArchiveError, StorageUnavailableError, StartError; then the target is incomplete, and the daemon refuses it.
    """
    ArchiveRegister(target.directory).put(target.source)
    for name in (deks.DIRECTORY, rotation_backups.DIRECTORY):
        make_private_directory(os.path.join(target.directory, name))
    keys = _write_files(path, good, task, target)
    removed = [] if newer is None else _take_root_keys(unlocked, newer.unlocked, good.manifest.audit_head, at=at)
    written = _write_tombstones(target.directory_fd, unlocked, target.tombstones)
    written.tombstones.close()
    unlocked.body = body = members.alone(written.body, unlocked.member_id, at=at)
    begin_log()
    replace_file(target.directory_fd, keyring_file.NAME, unlocked.encode(body))
    roots = [slot.fingerprint for slot in body.slots]
    return RestoredArchive(keys, good.manifest.keys - keys, body.epoch, roots, removed)


def _take_root_keys(unlocked: UnlockedKeyring, later: UnlockedKeyring, last: AuditHead | None, *, at: str) -> list[str]:
    """Gives the keyring the root keys of `later`, and, if they differ, a fresh keyring key and audit key. `last`: the
    line of the former log that the audit key comes after. Returns the fingerprints of the removed root keys.
    """
    body = unlocked.body
    removed = root_slots.removed_by(body, later.body)
    if not removed and {slot.fingerprint for slot in body.slots} == {slot.fingerprint for slot in later.body.slots}:
        return []
    resealed = unlocked.make_resealed_for(later, fill_random)
    sig = None if last is None else decode_exact(last.sig, keyring.HEAD_BYTES)
    audit_key = unlocked.make_audit_key(
        fill_random,
        version=unlocked.audit.current.version + 1,
        at=at,
        since_seq=1 if last is None else last.seq,
        since_sig=sig
        or bytes(keyring.HEAD_BYTES),  # zeros, which no line has, so no log under a former key is continued
        key_version=resealed.key_version,
    )
    unlocked.body = with_slots_of(body, later.body, resealed, audit_key)
    unlocked.settle()
    opened_it = {slot.fingerprint for slot in body.slots}
    return [root.fingerprint for root in removed if root.fingerprint in opened_it]


def _write_files(path: str, good: VerifiedArchive, task: Task, target: Target) -> int:
    """Writes the files of the keys; the number of them."""
    count = 0
    destroyed = {bytes_to_key_id(stone.key) for stone in target.tombstones}

    def files() -> Iterator[FileWrite]:
        nonlocal count
        read = 0
        for entry in reread_entries(path, good.sha256):
            key_id = entry.key_id
            read += 1 if key_id else 0
            if read > good.manifest.keys:  # the file was replaced, perhaps by one that would fill the disk
                raise ArchiveError(CHANGED)
            if key_id and key_id not in destroyed:
                yield FileWrite(deks.file_name(key_id), entry.content)
                count += 1
                task.progress(count, good.manifest.keys)

    with closed_after(open_directory(os.path.join(target.directory, deks.DIRECTORY))) as directory_fd:
        make_files(directory_fd, files())
    return count


def with_slots_of(body: Body, later: Body, resealed: Resealed, audit_key: AuditKeyEntry) -> Body:
    """The body of a restored keyring with the root keys of `later`, a later state of it. `resealed` has the slots of
    `later`. `audit_key`: the key of the new log. The epoch stays, and the former audit keys as far as there is room.
    """
    revoked = (*root_slots.removed_by(body, later), *body.revoking)
    unique = tuple({root.fingerprint: root for root in reversed(revoked)}.values())
    stay = {slot.fingerprint for slot in later.slots}
    former = {slot.slot_id: slot.fingerprint for slot in body.slots}
    rotation = body.rotation
    if rotation is not None and former.get(rotation.slot_id) not in stay:
        rotation = msgspec.structs.replace(rotation, slot_id="")
    too_many = tuple(keyring.RetiredRoot(root.fingerprint, root.removed_at) for root in unique[RETIRED_ROOTS_MAX:])
    retired = tuple(old for old in (*body.retired_roots, *too_many) if old.fingerprint not in stay)
    return msgspec.structs.replace(
        body,
        key_version=resealed.key_version,
        slots=resealed.slots,
        keks=resealed.keks,
        audit_keys=(*resealed.audit_keys, audit_key)[-AUDIT_KEYS_COUNT_MAX:],
        members=resealed.members,
        tombstone_log=resealed.tombstone_log,
        rotation=rotation,
        revoking=tuple(root for root in unique[:RETIRED_ROOTS_MAX] if root.fingerprint not in stay),
        retired_roots=retired[-RETIRED_ROOTS_MAX:],
    )


def _write_tombstones(
    directory_fd: int, unlocked: UnlockedKeyring, stones: Sequence[Tombstone]
) -> tombstone_file.OpenedTombstones:
    """Replaces the file by one with these tombstones, durably, and makes the body that counts them.

    It also replaces a file that another keyring has left. Raises StorageUnavailableError.
    """
    body = unlocked.body
    chain = TombstoneChain(body.keyring_id)
    content = tombstones.HEADER + chain.append(unlocked.tombstone_key, stones)
    replace_file_from(directory_fd, tombstone_file.NAME, (content,))
    file = tombstone_file.Tombstones(directory_fd, ReadTombstones(content, chain, 0, 0), intact=True)
    return tombstone_file.OpenedTombstones(file, keyring.counting(body, chain.count, chain.head))
