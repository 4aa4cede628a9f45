"""Creation and verification of a backup archive, also while the daemon serves.

Owns: the order of copying, and the conditions under which an archive is good. Invariants:
- The DEK files are copied before the keyring, so the keyring has every KEK that a copied DEK is wrapped under. If a KEK
  was destroyed meanwhile, the verification fails and everything is copied again. The file of tombstones, which only
  grows, is copied after the keyring, so it has every record that the keyring counts.
- An archive gets its name only after it was read back and every key in it was unwrapped. Until then, and until
  `remove_leftover`, it has the name `staging_path`.
- Before the tag of an archive was checked, its content is read with bounds and not parsed.
- A key file that the daemon overwrites meanwhile is read again until it is whole (`minikms.custody.settled_keys`).
- The message server's store is backed up before the key service, so every key that the store needs is in the archive.

It changes nothing in the data directory and takes no lock. It must never report an archive as good that can't be
restored.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Callable, Container, Iterator
from typing import BinaryIO, Final, NamedTuple

from minikms.api.errors import KmsRefusedError, StartError, StorageUnavailableError
from minikms.archives.archive import (
    UNREADABLE_COUNT_MAX,
    ArchiveError,
    ArchiveManifest,
    ArchiveReader,
    ArchiveWriter,
    AuditHead,
    Entry,
    TagKey,
    dek_entry_name,
    open_archive,
)
from minikms.crypto import roots
from minikms.custody import keyring_file, tombstone_file
from minikms.custody.settled_keys import SettledKeys, newest_key_id
from minikms.custody.tombstone_file import read_tombstones
from minikms.keys import dek, keyring
from minikms.keys.dek import UNWRAPS_SLICE, DekRecord, bytes_to_key_id
from minikms.keys.tombstones import FILE_BYTES_MAX as TOMBSTONES_BYTES_MAX
from minikms.keys.tombstones import Tombstone
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.platform.files import read_file_in
from minikms.platform.sync import sync_file

COPY_ATTEMPTS_MAX: Final = 3
CHANGED: Final = "the backup changed while it was being read; do not use a data directory that was restored from it"
RETIRED_NAMED_MAX: Final = 20
_INCOMPLETE: Final = "the backup is incomplete: its keyring or a key is missing"
Progress = Callable[[int, int], None]
"""Called with the number of key files that are done, and of all."""
OpenKeyring = Callable[[bytes], contextlib.AbstractContextManager[UnlockedKeyring]]


class KekDestroyedMeanwhileError(ArchiveError):
    """A copied key is wrapped under a KEK that the copied keyring no longer has. Another copy succeeds."""


class KeyDoesNotUnwrapError(ArchiveError):
    """A copied key does not unwrap. If it was copied while a rotation overwrote it, another copy succeeds."""


class RetiredKeys(NamedTuple):
    """How many there are, and the ids of the first RETIRED_NAMED_MAX."""

    keys: int
    named: list[str]


class VerifiedArchive(NamedTuple):
    """A good archive. `keyring`: the bytes of its keyring file. `sha256`: of everything that its tag covers.
    `tombstones`: the keys that were destroyed when it was made. `retired`: those that were
    retired then, and may have been destroyed since.
    """

    manifest: ArchiveManifest
    keyring: bytes
    sha256: bytes
    tombstones: list[Tombstone]
    retired: RetiredKeys


class NewArchive(NamedTuple):
    """The identity of an archive to create. `audit_head` is called after everything was copied."""

    archive_id: str
    created_at: str
    audit_head: Callable[[], AuditHead | None]


class Task(NamedTuple):
    """What creation, verification and restore need. `open_keyring` opens the bytes of a keyring file under `root`."""

    arena: SecretArena
    root: SecretSlot
    open_keyring: OpenKeyring
    progress: Progress


def create(data_dir: str, path: str, task: Task, new: NewArchive) -> VerifiedArchive:
    """Creates the archive `path`, which must not exist, durably. Call `remove_leftover` afterwards, or `remove_failed`
    if it raises ArchiveError, StartError, StorageUnavailableError, OSError.
    """
    if os.path.lexists(path):
        raise StartError(f"{path} exists already; a backup never overwrites one")
    staging = staging_path(path, new.archive_id)
    with open(staging, "xb", opener=_private) as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed: see `remove_leftover`
        good = _write_verified(file, staging, data_dir, task, new)
        os.link(staging, path)
        _sync(path)
        return good


def _write_verified(file: BinaryIO, staging: str, data_dir: str, task: Task, new: NewArchive) -> VerifiedArchive:
    attempt = 0
    while True:
        attempt += 1
        file.seek(0)
        file.truncate()
        _write(file, data_dir, task, new)
        file.flush()
        sync_file(file.fileno())
        try:
            return verify(staging, task)
        except (KekDestroyedMeanwhileError, KeyDoesNotUnwrapError):
            if attempt == COPY_ATTEMPTS_MAX:
                raise


def staging_path(path: str, archive_id: str) -> str:
    """The path of an archive while it is being created."""
    return f"{path}.{archive_id}.new"


def remove_failed(path: str, archive_id: str) -> bool:
    """Removes what a failed `create` left under both names, as `remove_leftover`."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samefile(staging_path(path, archive_id), path):
            os.unlink(path)
    return remove_leftover(path, archive_id)


def remove_leftover(path: str, archive_id: str) -> bool:
    """Removes the file that an interrupted `create` left, durably; False if `create` is still running. Raises OSError,
    StorageUnavailableError.
    """
    staging = staging_path(path, archive_id)
    try:
        descriptor = os.open(staging, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            _sync(staging)  # an earlier removal may have failed at it
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(staging)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    _sync(staging)
    return True


def verify(path: str, task: Task) -> VerifiedArchive:
    """Reads a whole archive and unwraps every key in it. Raises ArchiveError if it is not good, OSError.

    It reads the file twice: first to authenticate the whole, then to unwrap the keys. So the keys need not be kept in
    memory.
    """
    with open_archive(path) as file:
        reader = ArchiveReader(file)
        files = {entry.name: entry.content for entry in reader.entries(only=(keyring_file.NAME, tombstone_file.NAME))}
        manifest = reader.check_tag(task.root.view, task.arena)
    if keyring_file.NAME not in files:
        raise ArchiveError(_INCOMPLETE)
    data = files[keyring_file.NAME]
    with task.open_keyring(data) as unlocked:
        stones = _tombstones(files.get(tombstone_file.NAME), unlocked)
        destroyed = {bytes_to_key_id(stone.key) for stone in stones}
        retired = _check_entries(reread_entries(path, reader.sha256), manifest, unlocked, destroyed, task)
    return VerifiedArchive(manifest, data, reader.sha256, stones, retired)


def _tombstones(content: bytes | None, unlocked: UnlockedKeyring) -> list[Tombstone]:
    try:
        return read_tombstones(content, unlocked.body, unlocked.tombstone_key).stones()
    except StartError as error:
        raise ArchiveError(f"the backup can't be restored: {error}") from None


def _check_entries(
    entries: Iterator[Entry],
    manifest: ArchiveManifest,
    unlocked: UnlockedKeyring,
    destroyed: Container[str],
    task: Task,
) -> RetiredKeys:
    """Checks that each key unwraps unless it was destroyed."""
    keys = retired = 0
    named: list[str] = []
    while part := list(itertools.islice(entries, UNWRAPS_SLICE)):
        with task.arena.allocate() as slot, dek.Unwrapper(unlocked.kek_cipher, slot.view) as unwrapper:
            for entry in part:
                key_id = entry.key_id
                if key_id:
                    keys += 1
                    if key_id not in destroyed:
                        record = parsed_dek(entry.content, key_id)
                        _unwrap(record, unlocked, unwrapper)
                        if record.state == "retired":
                            retired += 1
                            named += [key_id] if retired <= RETIRED_NAMED_MAX else []
        task.progress(keys, manifest.keys)
    if keys != manifest.keys:
        raise ArchiveError(_INCOMPLETE)
    return RetiredKeys(retired, named)


def _unwrap(record: DekRecord, unlocked: UnlockedKeyring, unwrapper: dek.Unwrapper) -> None:
    kek = unlocked.body.kek(record.kek_version)
    if kek is None or kek.state == "destroyed":
        raise KekDestroyedMeanwhileError(
            f"key {record.id} is wrapped under KEK version {record.kek_version}, which the keyring in the backup does "
            "not have, since KEKs were rotated and destroyed meanwhile; make the backup again"
        )
    try:
        unwrapper.unwrap(record)
    except KmsRefusedError as error:
        raise KeyDoesNotUnwrapError(str(error)) from None


def _write(file: BinaryIO, data_dir: str, task: Task, new: NewArchive) -> None:
    writer = ArchiveWriter(file)
    keys, unreadable = 0, []
    with SettledKeys(data_dir) as settled:
        key_ids = settled.key_ids()
        for key in settled.each(key_ids):
            if isinstance(key.record, KmsRefusedError):
                unreadable.append(key.key_id)
                continue
            writer.add(dek_entry_name(key.key_id), key.content)
            keys += 1
            task.progress(keys + len(unreadable), len(key_ids))
    data = read_file_in(data_dir, keyring_file.NAME, keyring.FILE_BYTES_MAX)
    if data is None:
        raise StartError(f"there is no keyring in {data_dir}")
    writer.add(keyring_file.NAME, data)
    stones = read_file_in(data_dir, tombstone_file.NAME, TOMBSTONES_BYTES_MAX)
    if stones is not None:
        writer.add(tombstone_file.NAME, stones)
    with task.open_keyring(data) as unlocked:
        manifest = ArchiveManifest(
            archive_id=new.archive_id,
            created_at=new.created_at,
            keyring_id=unlocked.body.keyring_id,
            epoch=unlocked.body.epoch,
            root_fingerprint=roots.fingerprint(task.root.view),
            keys=keys,
            newest_key_id=newest_key_id(data_dir),  # also of keys whose files could not be read
            audit_head=new.audit_head(),
            unreadable=tuple(unreadable[:UNREADABLE_COUNT_MAX]),
        )
        keys_of_slots = [TagKey(slot.slot_id, slot.fingerprint, key) for slot, key in unlocked.slot_auth_keys()]
        writer.finish(manifest, keys_of_slots)


def parsed_dek(content: bytes, key_id: str) -> DekRecord:
    try:
        return dek.parse(content, key_id)
    except KmsRefusedError as error:
        raise ArchiveError(str(error)) from None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _sync(path: str) -> None:
    """The directory of the path."""
    descriptor = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_file(descriptor)
    except OSError as error:
        raise StorageUnavailableError("the backup's directory can't be synced") from error
    finally:
        os.close(descriptor)


def reread_entries(path: str, expected_sha256: bytes) -> Iterator[Entry]:
    """The entries of an authenticated archive, read again. Raises ArchiveError at the end if the file has changed."""
    with open_archive(path) as file:
        reader = ArchiveReader(file)
        yield from reader.entries()
        if reader.sha256 != expected_sha256:
            raise ArchiveError(CHANGED)
