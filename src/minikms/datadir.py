"""The one way to open a data directory.

Owns the order in which its parts are opened, for each mode:
- `open_for_service`, under the lock: root key, keyring, its epoch against the audit log's, audit log, tombstones,
  the epoch of this start, the removal of temporary files, the journal of key files,
  then the vault. The daemon, `minikms_daemon.embedded` and `minikms init` open so. It may be called again in the
  same process: a failure or `DataDir.close` gives everything back but the lock and the arena, which are the caller's.
- `open_for_reading`, without the lock, beside a running daemon: the keyring only, and nothing changes.

Invariants: each step is a precondition of the next; the root key is released as soon as the keyring is open; a missing
keyring beside existing keys is refused, never made again; every start raises the epoch, durably, before a request is
served; a keyring older than the audit log is refused unless the restore is accepted. That check is no proof that a
keyring is the newest: an old log that was put back too passes it, and only clients that remember the epoch find that.
It must never keep or copy a root key.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from minikms.api import SOCKET_PATH_BYTES_MAX
from minikms.api.errors import (
    AuditUnavailableError,
    KmsRefusedError,
    StartError,
    StartLaterError,
    StorageUnavailableError,
)
from minikms.audit import AuditKey, AuditLog, ExpectedLog
from minikms.audit.chain import Ed25519Signer, KeyState
from minikms.audit.epochs import highest_epoch
from minikms.audit.log import DEFAULT_LIMITS, FsyncPolicy, LogLimits
from minikms.audit.reader import LOG_NAME, DamagedSegmentError, each_segment
from minikms.audit.record import LineRef
from minikms.audit.repair import IF_RESTORED, AuditKeys
from minikms.audit.verify import Verifier
from minikms.crypto.aead import NonceSource
from minikms.crypto.records import DERIVED_KEYS_MAX
from minikms.crypto.shares import SHARES_COUNT_MAX
from minikms.custody import (
    archive_register,
    deks,
    journal,
    kept_index,
    keyring_file,
    replica_file,
    rotation_backups,
    tombstone_file,
)
from minikms.custody.journal import Journal, Replayed
from minikms.custody.keyring_file import KeyringFile
from minikms.custody.log_directory import NAME as LOG_DIRECTORY_NAME
from minikms.custody.log_directory import claim_log_directory, log_directory
from minikms.custody.tombstone_file import Tombstones, open_tombstones
from minikms.custody.vault import CACHE_KEYS_MAX, Vault
from minikms.keys import keyring, root_slots
from minikms.keys.index import HASH_KEY_BYTES, KeyIndex
from minikms.keys.unlocked import WRAPPING_KEYS_MAX, UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot, fill_random
from minikms.platform import clock, files
from minikms.platform.directory_lock import DataDirLock, InUseError, make_private_directory
from minikms.platform.files import read_file_bounded
from minikms.processes.peer import overflow_uid
from minikms.roots.key_file import FileOwner
from minikms.roots.pin import PinFile
from minikms.roots.providers import KeyFile, RootProvider, provider_of
from minikms.roots.sources import Source

if TYPE_CHECKING:
    from minikms.custody.member import MemberDirectory

KEYRING_SLOTS: Final = (
    2 * keyring.AUDIT_KEYS_COUNT_MAX
    + keyring.KEKS_OPEN_COUNT_MAX
    + WRAPPING_KEYS_MAX
    + keyring.SLOTS_MAX
    + keyring.SLOTS_MAX * SHARES_COUNT_MAX
    + 64
)
"""Arena slots beside the cached DEKs: pairs of audit keys, KEK versions and keys derived from them, the authentication
keys of slots, given shares of every set, and 64 for root keys, keyring keys, the tombstone key and keys in the making.
"""
SERVICE_SLOTS: Final = KEYRING_SLOTS + DERIVED_KEYS_MAX
"""Arena slots of a daemon beside the cached DEKs."""


class Options(NamedTuple):
    """How a start opens a data directory; see the flags of `minikms serve`. `if_restored`: what to do if the log
    lacks the line `expect_audit_head`, as a sentence without a full stop. `audit_dir`: the directory of the audit log;
    None: the data directory. `lock_data_dir` was called with it. `index_threads`: whether the key index keeps threads.
    `later_keyring`: the content of a later keyring's file, which a member is about to follow.
    """

    accept_restore: bool = False
    accept_audit_loss: bool = False
    expect_audit_head: LineRef | None = None
    if_restored: str = IF_RESTORED
    audit_dir: str | None = None
    audit_fsync: FsyncPolicy = "interval"
    audit_hash_thread_ids: bool = False
    audit_limits: LogLimits = DEFAULT_LIMITS
    index_threads: bool = False
    pin: PinFile | None = None
    cache_keys_max: int = CACHE_KEYS_MAX
    later_keyring: bytes = b""


DEFAULT_OPTIONS: Final = Options()


@dataclass(frozen=True, kw_only=True)
class DataDir:
    """A data directory opened for service. Made by `open_for_service`."""

    vault: Vault
    log: AuditLog
    slot: keyring.RootSlot
    """The slot of the keyring that the root key opened."""
    found_epoch: int
    seen_epoch: int
    """Before this start: the epoch of the keyring, and the highest one in the audit log."""
    replayed: Replayed
    """The result of this start's replay of the journal of an interrupted run."""
    directory_fd: int
    why_no_index: str
    """Why the index that the last stop has kept is not used; empty if it is, or if there is none."""
    member: MemberDirectory | None
    """What a member of a replicated key service does with it; None for any other directory."""

    def keep_index(self) -> None:
        """Keeps a complete key index for the next start, after `Vault.drain`, except that of a member, whose start
        raises no epoch. Raises StorageUnavailableError.
        """
        vault = self.vault
        if vault.index.complete and self.member is None:
            kept_index.keep(self.directory_fd, vault.store, vault.unlocked, vault.index)

    def close(self) -> None:
        """Closes the files and zeroes the keys, after `Vault.drain`. Raises AuditUnavailableError when the end of the
        audit log could not be written; everything is closed all the same.
        """
        try:
            self.log.close()
        finally:
            self.vault.close()
            self.vault.destroyed.close()
            self.vault.journal.close()
            self.vault.store.close()
            self.vault.rotation_backups.close()

    def abandon(self) -> None:
        """Closes after `Vault.seal` and `Vault.drain`. The audit log ends as after a crash: it can't be signed."""
        self.log.abandon()
        self.close()


# --- for service --------------------------------------------------------------------------------------------------


def lock_data_dir(directory: str, audit_dir: str | None = None) -> DataDirLock:
    """Takes the lock, and makes the directory and its subdirectories where they are missing. `audit_dir`: the directory
    of the audit log, which is locked too.

    Raises StartError, also when another process owns the directory or the log does not lie there, and OSError.
    """
    try:
        lock = DataDirLock(directory)
    except InUseError as error:
        stop = "Stop that process first" + (f", with `kill {error.pid}`" if error.pid is not None else "")
        raise StartLaterError(f"{error}. {stop}: only one may use a data directory") from None
    try:
        with written_at_start(os.path.join(lock.directory, LOG_DIRECTORY_NAME)):
            claim_log_directory(lock, audit_dir)
        for name in (deks.DIRECTORY, rotation_backups.DIRECTORY):
            make_private_directory(os.path.join(lock.directory, name))
    except BaseException:
        lock.close()
        raise
    return lock


def open_for_service(
    lock: DataDirLock, root: RootProvider, *, arena: SecretArena, disk: Executor, options: Options = DEFAULT_OPTIONS
) -> DataDir:
    """Opens the directory of `lock_data_dir`, or makes its first keyring, and raises the epoch. The keyring of a member
    stays as it is: it changes with the database, and the epoch rises when the member begins to serve.

    `disk` waits for the disk, one job at a time: key files and keyring.

    Raises StartError, which names a file that can't be written and the reason, and OSError; nothing stays open then.
    """
    directory = lock.directory
    log_dir = options.audit_dir or directory
    nonces = NonceSource()
    file = KeyringFile(lock.directory_fd, disk)
    with ExitStack() as undo:
        unlocked, slot = open_keyring(
            directory, file, root, arena=arena, nonces=nonces, pin=options.pin, later=options.later_keyring
        )
        undo.callback(unlocked.release)
        epoch = unlocked.body.epoch
        stored = replica_file.read(lock.directory_fd)
        if stored is None:
            check_alone(unlocked.body)
        mark = None if stored is None else stored.check(unlocked)
        # Epoch 1: the keyring was made, and no start has come so far as to raise it. A new member begins its own log.
        has_log = epoch > 1 if mark is None or mark.begins else mark.number > 0
        with written_at_start(os.path.join(log_dir, LOG_NAME)):
            seen = highest_epoch(log_dir)
        if not options.accept_restore:
            check_newest(epoch, seen)
        with written_at_start(os.path.join(log_dir, LOG_NAME)):
            log = AuditLog(
                log_dir,
                audit_keys(unlocked),
                expected=ExpectedLog(has_log, options.expect_audit_head, options.if_restored),
                accept_loss=options.accept_audit_loss,
                fsync=options.audit_fsync,
                hash_thread_ids=options.audit_hash_thread_ids,
                limits=options.audit_limits,
            )
        undo.callback(_close_unused, log)
        with written_at_start(os.path.join(directory, tombstone_file.NAME)):
            destroyed, body = open_tombstones(lock.directory_fd, unlocked)
        undo.callback(destroyed.close)
        if not options.accept_restore:
            check_tombstones(destroyed, log)
        if mark is None:
            body = keyring.without_audit_keys(body, unlocked.member_id, before=oldest_audit_key(log_dir, unlocked))
            with written_at_start(os.path.join(directory, keyring_file.NAME)):
                _raise_epoch(unlocked, body, file, seen_epoch=seen, proved_slot_id=slot.slot_id)
        log.writer.state = lambda: KeyState(unlocked.body.epoch, destroyed.count)
        with written_at_start(os.path.join(directory, deks.DIRECTORY)):
            store = deks.DekStore(directory)
        undo.callback(store.close)
        with written_at_start(os.path.join(directory, rotation_backups.DIRECTORY)):
            backups = rotation_backups.RotationBackups(directory)
        undo.callback(backups.close)
        with written_at_start(os.path.join(directory, f"{files.TEMP_PREFIX}*")):
            files.sweep_temps(lock.directory_fd)
            with contextlib.suppress(StorageUnavailableError):  # then no key is destroyed
                backups.sweep_temps()
        index, why_no_index = KeyIndex(os.urandom(HASH_KEY_BYTES)), ""
        try:  # before the replay, which changes the directory of the key files
            if mark is None:
                index = kept_index.take(lock.directory_fd, store, unlocked, epoch=epoch, threads=options.index_threads)
        except kept_index.NotKeptError as error:
            why_no_index = str(error)
        if options.index_threads and not len(index):
            index.keep_threads()
        stamp = clock.stamp(clock.now_ns())
        with written_at_start(os.path.join(directory, journal.NAME)):
            replayed = journal.replay(
                lock.directory_fd, store, backups, destroyed=destroyed, has_kek=unlocked.body.has_kek, stamp=stamp
            )
        vault = Vault(
            arena=arena,
            unlocked=unlocked,
            keyring_file=file,
            store=store,
            rotation_backups=backups,
            journal=Journal(lock.directory_fd, store, backups, disk),
            destroyed=destroyed,
            executor=disk,
            nonces=nonces,
            index=index,
            cache_keys_max=options.cache_keys_max,
        )
        member = None
        if mark is not None:
            try:
                from minikms.custody.member import MemberDirectory  # in a daemon only if it started as a member
            except ImportError:
                raise StartError(f"{replica_file.NAME} was made while the daemon ran: restart it") from None
            member = MemberDirectory(vault, file, directory_fd=lock.directory_fd, disk=disk, mark=mark)
            vault.changes.replication = member
        undo.pop_all()
    return DataDir(
        vault=vault,
        log=log,
        slot=slot,
        found_epoch=epoch,
        seen_epoch=seen,
        replayed=replayed,
        directory_fd=lock.directory_fd,
        why_no_index=why_no_index,
        member=member,
    )


def open_keyring(
    directory: str,
    file: KeyringFile,
    root: RootProvider,
    *,
    arena: SecretArena,
    nonces: NonceSource,
    pin: PinFile | None = None,
    later: bytes = b"",
) -> tuple[UnlockedKeyring, keyring.RootSlot]:
    """The first step: compares the root key with the pin file, then opens the keyring, or makes the first one. Returns
    also the slot that the root key opens. `later`: see `Options.later_keyring`.

    Raises StartError; no keyring was made or changed then, but the source may have made its root key file.
    """
    with written_at_start(os.path.join(directory, keyring_file.NAME)):
        data = file.load()
    member_id = replica_file.member_id(directory)
    if data is None:
        _check_is_new(directory)
        if member_id:
            raise StartLaterError(
                "keyring.json is missing, and this host is a member of a replicated key service: fetch the keyring "
                "from the database with `minikms-replicator fetch`"
            )
    root.prepare(arena, new_keyring=data is None)
    with root.read(arena) as key:
        if pin is not None:
            pin.check_opens(key.view, None if data is None else keyring.parse_file(data)[0].keyring_id)
        if data is not None:
            unlocked, slot = UnlockedKeyring.open(
                arena, key.view, data, nonces=nonces.next, member_id=member_id, if_wrong=root.if_wrong
            )
            try:
                if later:
                    unlocked.expect(key.view, later)
            except BaseException:
                unlocked.release()
                raise
            return unlocked, slot
        unlocked = UnlockedKeyring.create(
            arena,
            key.view,
            keyring_id="kr_" + secrets.token_hex(8),
            provider=root.name,
            nonces=nonces.next,
            fill_random=fill_random,
            at=clock.now_rfc3339(),
        )
    try:
        with written_at_start(os.path.join(directory, keyring_file.NAME)):
            file.store_now(unlocked.encode(unlocked.body))
    except BaseException:
        unlocked.release()
        raise
    return unlocked, unlocked.body.slots[0]


@contextmanager
def written_at_start(path: str) -> Iterator[None]:
    """Turns a failure of the disk into a StartLaterError for the operator: `path`, the reason, and what to do. What the
    user of the process may not do is a StartError: another start changes nothing.
    """
    try:
        yield
    except (StorageUnavailableError, AuditUnavailableError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, PermissionError):
            raise StartError(f"{path} can't be read or written: {files.denied_private(path)}") from error
        reason = (isinstance(cause, OSError) and cause.strerror) or str(error)
        raise StartLaterError(
            f"{path} can't be read or written: {reason}. Free space on its file system, or correct what the reason "
            "says, and start again"
        ) from error


def _check_is_new(directory: str) -> None:
    """The keyring is made before everything else, and restored after everything else."""
    key_files = os.path.join(directory, deks.DIRECTORY)
    has_keys = os.path.isdir(key_files) and any(name.endswith(deks.SUFFIX) for name in os.listdir(key_files))
    has_log = os.path.lexists(os.path.join(log_directory(directory), LOG_NAME))
    has_archives = os.path.lexists(os.path.join(directory, archive_register.DIRECTORY))
    if has_archives and not has_log:
        raise StartError(
            "keyring.json is missing, but the data directory holds a part of a restored backup: the restore was "
            "interrupted. Move what is there away and restore again, or give an empty data directory"
        )
    if has_keys or has_log:
        raise StartError(
            "keyring.json is missing, but the data directory holds keys or an audit log. A new keyring could not open "
            "them: restore keyring.json from a backup, or give an empty data directory. After a restore that was "
            "interrupted, move what is there away and restore again"
        )


def check_newest(epoch: int, seen: int) -> None:
    """Checks that the audit log has seen no later keyring than the one of `epoch`."""
    if seen > epoch:
        raise StartError(
            f"keyring.json is older than the audit log: its epoch is {epoch}, the log has {seen}. It does not know "
            "which keys and KEK versions were made or destroyed since. Put the newer keyring.json back, or, if "
            "none is left, start once with --accept-restore"
        )


def check_alone(body: keyring.Body) -> None:
    """Checks that no other hosts use the keyring: without its member file, this host would serve beside them."""
    if any(member.audit is not None for member in body.members):
        raise StartError(
            f"the keyring has the members of a key service on several hosts, and {replica_file.NAME} is missing: "
            "put it back, or let this host join anew"
        )


def check_tombstones(destroyed: Tombstones, log: AuditLog) -> None:
    """Checks that there are as many tombstones as the audit log has counted."""
    counted = log.writer.state().tombstones
    if counted > destroyed.count:
        raise StartError(
            f"{tombstone_file.NAME} is older than the audit log: it names {destroyed.count} destroyed keys, the log "
            f"has counted {counted}. Put the newer keyring.json and {tombstone_file.NAME} back, or, if none are left, "
            "start once with --accept-restore"
        )


def oldest_audit_key(directory: str, unlocked: UnlockedKeyring) -> int:
    """The version of the audit key that the first line of the log is under. 0 if that is not certain: no line verifies,
    or it begins the log, since a former log that was moved aside may be under any key.
    """
    verifier = Verifier(audit_keys(unlocked).trust())
    with contextlib.suppress(DamagedSegmentError):
        for file in each_segment(directory):
            verifier.feed(file.first_line())
            break
    begins = verifier.chain.head is not None and verifier.chain.head.seq == 1
    return 0 if verifier.findings or begins else verifier.key.version


def _raise_epoch(
    unlocked: UnlockedKeyring, body: keyring.Body, file: KeyringFile, *, seen_epoch: int, proved_slot_id: str
) -> None:
    """Makes the epoch of this start durable. The steps before need the old one: they recognise a first start by it.

    `body` counts every tombstone of the file. The start is a test of the root key of slot `proved_slot_id`. The
    epoch is above every one that was seen.
    """
    if seen_epoch > body.epoch:
        body = msgspec.structs.replace(body, epoch=seen_epoch)
    at = clock.now_rfc3339()
    body = keyring.next_epoch(root_slots.mark_tested(body, proved_slot_id, at=at), at=at)
    file.store_now(unlocked.encode(body))
    unlocked.body = body
    unlocked.settle()


def _close_unused(log: AuditLog) -> None:
    """Closes the log of a start that failed; the error of the start is the one to report."""
    with contextlib.suppress(KmsRefusedError):
        log.close()


def root_provider(
    source: Source,
    data_dir: str | None,
    *,
    shared: FileOwner | None,
    unlock_uids: frozenset[int],
    keyring_id: Callable[[], str] | None = None,
) -> RootProvider:
    """The provider of a source that asks no person. `data_dir`: whose keyring the unlock service is asked for, and what
    `dev:` lies beside. `shared`: of a key file that its group may read. `keyring_id`: of a keyring that lies elsewhere.
    Raises StartError.
    """
    if keyring_id is None and data_dir is not None:
        keyring_id = partial(_read_keyring_id, data_dir)
    if source.name == "unlock" and source.argument and keyring_id is not None:
        if len(os.fsencode(source.argument)) > SOCKET_PATH_BYTES_MAX:
            raise StartError(f"a socket path has 1 to {SOCKET_PATH_BYTES_MAX} bytes: --root unlock:SOCKET")
        from minikms.roots.unlock_service import UnlockService  # in a daemon only if it is configured

        return UnlockService(source.argument, unlock_uids - {overflow_uid()}, keyring_id)
    root = provider_of(source, data_dir=data_dir)
    return replace(root, shared=shared) if isinstance(root, KeyFile) else root


def _read_keyring_id(data_dir: str) -> str:
    """The id of the keyring in a data directory, not yet authenticated. Raises StartError."""
    return keyring.parse_file(read_keyring(data_dir))[0].keyring_id


# --- the audit log ------------------------------------------------------------------------------------------------


def audit_keys(unlocked: UnlockedKeyring) -> AuditKeys:
    """Views of all audit key versions. The log may still end under an earlier one: a change of key reaches the keyring
    first.
    """
    *former, current = (_audit_key(unlocked, key) for key in unlocked.audit.audit_keys)
    member = unlocked.body.member(unlocked.member_id)
    return AuditKeys(current, tuple(former), unconfirmed=member is not None and member.unconfirmed)


def _audit_key(unlocked: UnlockedKeyring, key: keyring.AuditKeyEntry) -> AuditKey:
    mac_key, seed = unlocked.audit_key(key.version)
    since = LineRef(key.since_seq, key.since_sig) if key.since_seq else None
    return AuditKey(key.version, mac_key, Ed25519Signer(seed), since)


# --- for reading --------------------------------------------------------------------------------------------------


@contextmanager
def open_for_reading(directory: str, root: RootProvider) -> Iterator[UnlockedKeyring]:
    """The keyring as it is on disk now, in an arena of its own. Takes no lock, changes nothing. Raises StartError."""
    data, member_id = read_keyring(directory), replica_file.member_id(directory)
    with SecretArena(KEYRING_SLOTS) as arena, ExitStack() as opened:
        with root.read(arena) as key:
            unlocked = opened.enter_context(opened_keyring(arena, key, data, member_id))
        yield unlocked


@contextmanager
def opened_root(root: RootProvider) -> Iterator[tuple[SecretArena, SecretSlot]]:
    """The root key in an arena of its own, for `opened_keyring` and for an archive's tag. Raises StartError."""
    with SecretArena(KEYRING_SLOTS) as arena, root.read(arena) as key:
        yield arena, key


@contextmanager
def opened_keyring(arena: SecretArena, root: SecretSlot, data: bytes, member_id: str = "") -> Iterator[UnlockedKeyring]:
    """The content of a keyring file, from anywhere, authenticated and opened. `member_id`: whose audit keys; by
    default those of the first host. Raises StartError, naming both fingerprints.
    """
    unlocked, _ = UnlockedKeyring.open(arena, root.view, data, nonces=NonceSource().next, member_id=member_id)
    try:
        yield unlocked
    finally:
        unlocked.release()


def read_keyring(directory: str) -> bytes:
    """The content of the keyring file, not yet authenticated. Raises StartError when it is missing or unreadable."""
    path = os.path.join(directory, keyring_file.NAME)
    with written_at_start(path):
        data = read_file_bounded(path, keyring.FILE_BYTES_MAX)
    if data is None:
        raise StartError(
            f"there is no keyring in {directory}: make one with `minikms init`, or name the data directory that has one"
        )
    return data
