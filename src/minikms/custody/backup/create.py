"""Making and judging a backup archive, also while the daemon serves.

Owns: the order of copying, and what makes an archive good. Invariants:
- The lease journal is copied before its snapshot (docs/spec/leases.md), the DEK files before the keyring, so that the
  keyring knows every KEK that a copied DEK is wrapped under. A KEK that was destroyed meanwhile shows in the judgement,
  and everything is copied again.
- An archive gets its name only after it was read back, every key in it was opened, and its lease files were found to be
  such as a start takes.
- What is read of an archive before its tag was checked is bounded and not looked into.
- The order across processes: whoever backs up the message server's store does so first; keys made later don't matter.
It changes nothing in the data directory and takes no lock. It must never call an archive good that can't be restored.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final, NamedTuple

from minikms import api
from minikms.custody import deks, keyring_file, lease_store
from minikms.custody.backup.archive import (
    SNAPSHOT_BYTES_MAX,
    UNREADABLE_COUNT_MAX,
    ArchiveError,
    ArchiveReader,
    ArchiveWriter,
    AuditHead,
    Entry,
    Manifest,
    dek_entry_name,
    open_archive,
)
from minikms.custody.files import open_directory, read_file_bounded
from minikms.custody.lease_format import DAMAGED_RECORDS_MAX, LeaseFormatError, parse_journal
from minikms.custody.lease_store import check_snapshot
from minikms.custody.rotation_backups import newest_key_id
from minikms.errors import MiniKmsError, StartError, StorageUnavailableError
from minikms.keys import dek, keyring
from minikms.keys.dek import DekRecord
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot

COPY_ATTEMPTS_MAX: Final = 3
CHANGED: Final = "the backup changed while it was being read; what was restored of it must not be used"
_LACKING: Final = "the backup lacks what it needs to be restored"
Progress = Callable[[int, int], None]
"""(done, total) key files."""
OpenKeyring = Callable[[bytes], contextlib.AbstractContextManager[UnlockedKeyring]]


class KeyDestroyedMeanwhileError(ArchiveError):
    """A KEK that a copied key is under is no longer in the keyring; copying again helps."""


class Contents(NamedTuple):
    """An archive that was found good."""

    manifest: Manifest
    keyring: bytes
    sha256: bytes
    buried: int


class Making(NamedTuple):
    """What a new archive says of itself. `audit_head` is asked last."""

    archive_id: str
    created_at: str
    audit_head: Callable[[], AuditHead | None]


class Task(NamedTuple):
    """What both directions need. `open_keyring` opens a keyring file's bytes under `root`."""

    arena: SecretArena
    root: SecretSlot
    open_keyring: OpenKeyring
    progress: Progress


def create(data_dir: str, path: str, task: Task, making: Making) -> Contents:
    """Makes the archive `path`, which must not exist. Raises ArchiveError, StartError, OSError; then there is none."""
    if os.path.lexists(path):
        raise StartError(f"{path} exists already; a backup never overwrites one")
    staging = staging_path(path, making.archive_id)
    with open(staging, "xb", opener=_private) as file:
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed: see `remove_leftover`
            good = _make_good(file, staging, data_dir, task, making)
            os.link(staging, path)
            try:
                _sync(os.path.dirname(os.path.abspath(path)))
            except BaseException:
                os.unlink(path)
                raise
            return good
        finally:
            os.unlink(staging)


def _make_good(file: BinaryIO, staging: str, data_dir: str, task: Task, making: Making) -> Contents:
    attempt = 0
    while True:
        attempt += 1
        file.seek(0)
        file.truncate()
        _write(file, data_dir, task, making)
        file.flush()
        os.fsync(file.fileno())
        try:
            return judge(staging, task)
        except KeyDestroyedMeanwhileError:
            if attempt == COPY_ATTEMPTS_MAX:
                raise


def staging_path(path: str, archive_id: str) -> str:
    """Where an archive lies while it is being made."""
    return f"{path}.{archive_id}.new"


def remove_leftover(path: str, archive_id: str) -> bool:
    """Removes what an interrupted `create` left beside `path`. False: it is being made just now. Raises OSError."""
    staging = staging_path(path, archive_id)
    try:
        descriptor = os.open(staging, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(staging)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def judge(path: str, task: Task) -> Contents:
    """Reads a whole archive and opens every key in it. Raises ArchiveError when it is not good, OSError.

    Read twice: keys are opened only once the whole is known to be authentic, and that needs no memory of them.
    """
    with open_archive(path) as file:
        reader = ArchiveReader(file)
        kept = {entry.name: entry.content for entry in reader.entries(only=(keyring_file.NAME,))}
        manifest = reader.check_tag(task.root.view)
    if keyring_file.NAME not in kept:
        raise ArchiveError(_LACKING)
    data = kept[keyring_file.NAME]
    with task.open_keyring(data) as unlocked:
        buried = _open_all(entries_again(path, reader.sha256), manifest, unlocked, task)
    return Contents(manifest, data, reader.sha256, buried)


def _open_all(entries: Iterator[tuple[str, bytes]], manifest: Manifest, unlocked: UnlockedKeyring, task: Task) -> int:
    """Opens each key, and looks whether a start would take the lease files; the number of keys that the archive's own
    keyring knows as destroyed.
    """
    stones = {stone.key_id for stone in unlocked.body.tombstones}
    buried = keys = 0
    counted = False
    with task.arena.allocate() as slot:
        for name, content in entries:
            key_id = Entry(name, b"").key_id
            if name == lease_store.JOURNAL_NAME:
                _check_journal(content)
                counted = True
            elif name == lease_store.SNAPSHOT_NAME:
                _check_snapshot(content)
            elif key_id:
                keys += 1
                if key_id in stones:
                    buried += 1
                else:
                    _open(_parsed(content, key_id), unlocked, slot)
                task.progress(keys, manifest.keys)
    if not counted or keys != manifest.keys:
        raise ArchiveError(_LACKING)
    return buried


def _open(record: DekRecord, unlocked: UnlockedKeyring, slot: SecretSlot) -> None:
    kek = unlocked.body.kek(record.kek_version)
    if kek is None or kek.state == "destroyed":
        raise KeyDestroyedMeanwhileError(
            f"key {record.id} is wrapped under KEK version {record.kek_version}, which the keyring in the "
            "backup does not have: rotations came between; make the backup again"
        )
    try:
        dek.unwrap_into(record, unlocked.kek(record.kek_version), slot.view)
    except MiniKmsError as error:
        raise ArchiveError(str(error)) from None


def _write(file: BinaryIO, data_dir: str, task: Task, making: Making) -> None:
    writer = ArchiveWriter(file)
    journal = _read(data_dir, lease_store.JOURNAL_NAME, lease_store.JOURNAL_BYTES_MAX)
    if journal is None:
        raise StartError("kms-leases is missing in the data directory; see `minikms doctor`")
    writer.add(lease_store.JOURNAL_NAME, journal)
    snapshot = _read(data_dir, lease_store.SNAPSHOT_NAME, SNAPSHOT_BYTES_MAX)
    if snapshot is not None:
        writer.add(lease_store.SNAPSHOT_NAME, snapshot)
    keys, unreadable = 0, []
    key_ids = sorted(_key_ids(data_dir))
    for number, key_id in enumerate(key_ids, 1):
        try:
            data = _read(os.path.join(data_dir, deks.DIRECTORY), deks.file_name(key_id), dek.FILE_BYTES_MAX)
            if data is None:
                continue  # destroyed since it was listed
            dek.parse(data, key_id)
        except MiniKmsError:
            unreadable.append(key_id)
            continue
        writer.add(dek_entry_name(key_id), data)
        keys += 1
        task.progress(number, len(key_ids))
    data = _read(data_dir, keyring_file.NAME, keyring.FILE_BYTES_MAX)
    if data is None:
        raise StartError(f"there is no keyring in {data_dir}")
    writer.add(keyring_file.NAME, data)
    with task.open_keyring(data) as unlocked:
        manifest = Manifest(
            archive_id=making.archive_id,
            created_at=making.created_at,
            keyring_id=unlocked.body.keyring_id,
            epoch=unlocked.body.epoch,
            root_fingerprint=unlocked.fingerprint(task.root.view),
            keys=keys,
            newest_key_id=newest_key_id(data_dir),  # of those too whose files are not in it, but may be found elsewhere
            audit_head=making.audit_head(),
            unreadable=tuple(unreadable[:UNREADABLE_COUNT_MAX]),
        )
    writer.finish(manifest, task.root.view)


def _key_ids(data_dir: str) -> set[str]:
    """Read twice: a file that is replaced while a directory is being listed may be passed over once."""
    found: set[str] = set()
    for _ in range(2):
        with os.scandir(os.path.join(data_dir, deks.DIRECTORY)) as entries:
            for entry in entries:
                key_id = entry.name.removesuffix(deks.SUFFIX)
                if entry.name.endswith(deks.SUFFIX) and api.KEY_ID_PATTERN.fullmatch(key_id):
                    found.add(key_id)
    return found


def _parsed(content: bytes, key_id: str) -> DekRecord:
    try:
        return dek.parse(content, key_id)
    except MiniKmsError as error:
        raise ArchiveError(str(error)) from None


def _check_journal(journal: bytes) -> None:
    try:
        lost = parse_journal(journal).lost_leases
    except LeaseFormatError as error:
        raise ArchiveError(f"the lease journal in the backup {error}") from None
    if lost > DAMAGED_RECORDS_MAX:
        raise ArchiveError("the lease journal in the backup is damaged in many places; see `minikms doctor`")


def _check_snapshot(snapshot: bytes) -> None:
    try:
        check_snapshot(snapshot)
    except LeaseFormatError as error:
        raise ArchiveError(f"the lease snapshot in the backup {error}") from None


def _read(directory: str, name: str, bytes_max: int) -> bytes | None:
    descriptor = open_directory(directory)
    try:
        return read_file_bounded(name, bytes_max, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _sync(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise StorageUnavailableError("the backup's directory can't be synced") from error
    finally:
        os.close(descriptor)


def entries_again(path: str, expected_sha256: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of an archive that was judged good. Raises ArchiveError at the end if it is another by now."""
    with open_archive(path) as file:
        reader = ArchiveReader(file)
        for entry in reader.entries():
            yield entry.name, entry.content
        if reader.sha256 != expected_sha256:
            raise ArchiveError(CHANGED)
