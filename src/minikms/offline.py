"""Changes of a data directory that no daemon serves: another root key, another audit key, no auditor, other hosts.

Owns: the order in which keyring, audit log and mark change together. Invariants: the lock is held; a keyring or
tombstones older than the log are refused; a crash between two steps leaves what the next start completes or an operator
repeats. The keyring of a replicated directory changes only where all members have the change, so not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from minikms import api
from minikms.api.errors import ConflictError, DecryptionError, InvalidRequestError, StartError
from minikms.audit import AuditLog, Event, ExpectedLog
from minikms.audit.epochs import highest_epoch
from minikms.crypto.aead import NonceSource
from minikms.crypto.slots import Newcomer, newcomer
from minikms.custody import replica_file
from minikms.custody.keyring_file import KeyringFile
from minikms.custody.log_directory import lock_log_directory
from minikms.custody.replica_file import Mark
from minikms.custody.tombstone_file import open_tombstones
from minikms.datadir import (
    KEYRING_SLOTS,
    DataDir,
    audit_keys,
    check_alone,
    check_newest,
    check_tombstones,
    read_keyring,
)
from minikms.keys import keyring, members, root_slots
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot, fill_random
from minikms.platform import clock
from minikms.platform.directory_lock import LOCK_NAME, DataDirLock, InUseError
from minikms.platform.files import remove_file
from minikms.roots.key_file import make_key_file
from minikms.roots.providers import RootProvider


def add_root(
    data: DataDir, root: SecretSlot, provider: str, shares: keyring.ShareSet | None = None
) -> keyring.RootSlot:
    """Adds a root key to a directory that nothing else uses yet. The slot and its audit line are durable on return.

    Raises ConflictError, StorageUnavailableError, AuditUnavailableError: the slot may be stored then.
    """
    unlocked = data.vault.unlocked
    at = clock.now_rfc3339()

    def with_slot(body: keyring.Body) -> keyring.Body:
        slot_id = root_slots.next_slot_id(body)
        return root_slots.add_slot(
            body, unlocked.make_slot(root.view, provider, slot_id=slot_id, at=at, shares=shares), at=at
        )

    body = asyncio.run(data.vault.keyring.change(with_slot))
    slot = body.slots[-1]
    facts: dict[str, str | int] = {"slot_id": slot.slot_id, "fingerprint": slot.fingerprint, "provider": provider}
    data.log.add(Event(type="add_root", actor="minikms", pid=os.getpid(), facts=facts | {"epoch": body.epoch}))
    data.log.commit()
    data.log.sync.fdatasync()
    return slot


class NewAuditKey(NamedTuple):
    """`head` is the last line of the log: the one that names the new key."""

    version: int
    public_key: bytes
    head: dict[str, str | int]


def rotate_audit_key(directory: str, root: RootProvider) -> NewAuditKey:
    """Makes a new audit key and uses it from the next line on. The daemon must not be running.

    The keyring holds the new key durably before the log names it; the next start completes what a crash between the two
    leaves. Raises as `_opened_offline`.
    """
    with _opened_offline(directory, root, "the audit key changes") as opened:
        key, unlocked, log = opened.make_audit_key(), opened.unlocked, opened.log
        opened.store(keyring.add_audit_key(unlocked.body, unlocked.member_id, key, at=clock.now_rfc3339()))
        log.change_key(audit_keys(unlocked).current)
        log.sync.fdatasync()
        return NewAuditKey(key.version, key.public_key, log.head)


def detach_auditor(directory: str, root: RootProvider) -> str:
    """Forgets the origin of the auditor, which is returned. The daemon must not be running.

    The line about it is durable before the keyring changes; a crash between the two leaves the auditor attached, and
    the line is written again. Raises as `_opened_offline`, and StartError when there is no origin.
    """
    with _opened_offline(directory, root, "an auditor is detached") as opened:
        unlocked = opened.unlocked
        origin = unlocked.audit.audit_origin
        if not origin:
            raise StartError("no auditor is attached")
        opened.write_line("detach_auditor", {"origin": origin})
        opened.store(keyring.without_audit_origin(unlocked.body, unlocked.member_id, at=clock.now_rfc3339()))
        return origin


def init_replica(directory: str, root: RootProvider, name: str) -> Mark:
    """Makes the directory that of the first of several hosts. The daemon must not be running.

    The line about it is durable first, then the keyring, then the mark; a crash before the mark leaves one host, and
    this can be repeated. Raises as `_opened_offline`, and InvalidRequestError.
    """
    _check_name(name)
    with _opened_offline(directory, root, "a host becomes the first of several") as opened:
        unlocked = opened.unlocked
        check_alone(unlocked.body)
        mark = Mark(member_id=members.FIRST_ID, name=name, begins=True)
        opened.write_line("replica_init", {"member_id": mark.member_id, "name": name})
        opened.store(members.begun(unlocked.body, name, opened.slot.slot_id, at=clock.now_rfc3339()))
        replica_file.write(opened.directory_fd, mark, unlocked)
        return mark


def leave_replica(directory: str, root: RootProvider) -> Mark:
    """Makes the directory of a member that of one host again; its former mark. The daemon must not be running.

    The line about it is durable first, then the keyring, which has a fresh audit key, then the log names that, then the
    mark goes; a crash before that is completed when this is repeated. Raises as `_opened_offline`, and ConflictError if
    the keyring can't hold another audit key.
    """
    with _opened_offline(directory, root, "a host leaves the others", member=True) as opened:
        unlocked, mark = opened.unlocked, opened.mark
        if mark is None:
            raise StartError(f"{directory} has no {replica_file.NAME}: it is that of one host")
        if unlocked.body.members:
            opened.write_line("replica_leave", {"member_id": mark.member_id, "number": mark.number})
            key, in_use = opened.make_audit_key(), opened.log.writer.key.version
            body = keyring.with_audit_key(unlocked.body, mark.member_id, key, in_use=in_use)
            opened.store(members.alone(body, mark.member_id, at=clock.now_rfc3339()))
            unlocked.member_id = ""
            opened.log.change_key(audit_keys(unlocked).current)
            opened.log.sync.fdatasync()
        remove_file(opened.directory_fd, replica_file.NAME)
        return mark


def join_replica(
    directory: str, root: RootProvider, invitation: api.ReplicaInvitation, name: str, *, key_file: Path | None = None
) -> api.AddReplicaRequest:
    """The request of a new host, whose directory gets a mark and nothing else. `key_file`: made if it does not exist.

    Raises InvalidRequestError, ConflictError if the directory is not empty, StartError, StorageUnavailableError.
    """
    _check_name(name)
    with DataDirLock(directory) as lock, SecretArena(KEYRING_SLOTS) as arena:
        if set(os.listdir(lock.directory_fd)) - {LOCK_NAME, replica_file.NAME}:
            raise ConflictError(f"{directory} is not empty: a host joins with an empty data directory")
        if key_file is not None:
            make_key_file(key_file, arena)
        root.prepare(arena, new_keyring=True)
        with root.read(arena) as key:
            new = _newcomer(arena, key, invitation)
        replica_file.write(
            lock.directory_fd, Mark(member_id=invitation.member_id, name=name, seals=invitation.seals), None
        )
    return members.request(new, name, root.name)


def _newcomer(arena: SecretArena, root: SecretSlot, invitation: api.ReplicaInvitation) -> Newcomer:
    slot_id = invitation.slot_id
    if (
        invitation.format == members.INVITATION_FORMAT
        and api.SLOT_ID_PATTERN.fullmatch(slot_id)
        and invitation.member_id == members.member_id_for(slot_id)
        and 0 <= invitation.seals <= api.REPLICA_NUMBER_MAX
    ):
        with contextlib.suppress(DecryptionError), arena.allocate() as auth:
            return newcomer(root.view, auth.view, invitation.keyring_id, slot_id, invitation.public_key)
    raise InvalidRequestError("this is no invitation of `minikms replica invite`")


def _check_name(name: str) -> None:
    if api.MEMBER_NAME_PATTERN.fullmatch(name) is None:
        raise InvalidRequestError("the name of a host has 1 to 63 characters of a-z, 0-9, - and ., as host names do")


class _Opened(NamedTuple):
    """`slot`: the one that the root key opened. `mark`: None for a host that is alone."""

    directory_fd: int
    file: KeyringFile
    unlocked: UnlockedKeyring
    log: AuditLog
    slot: keyring.RootSlot
    mark: Mark | None

    def write_line(self, kind: str, facts: dict[str, str | int]) -> None:
        """Durably."""
        self.log.add(Event(type=kind, actor="minikms", pid=os.getpid(), facts=facts))
        self.log.sign_and_sync()

    def make_audit_key(self) -> keyring.AuditKeyEntry:
        """For all lines after the last one, which is signed."""
        last, version = self.log.sign_and_sync(), self.unlocked.audit.current.version + 1
        return self.unlocked.make_audit_key(
            fill_random, version=version, at=clock.now_rfc3339(), since_seq=last.seq, since_sig=last.sig
        )

    def store(self, body: keyring.Body) -> None:
        """Durably."""
        self.file.store_now(self.unlocked.encode(body))
        self.unlocked.body = body


@contextmanager
def _opened_offline(directory: str, root: RootProvider, change: str, *, member: bool = False) -> Iterator[_Opened]:
    """Keyring and audit log, for a change of both while no daemon runs. `change`: what happens, as subject and verb.
    `member`: the directory of a host of several is changed too.

    The body of the keyring counts every tombstone. Raises StartError when the directory is in use, its keyring is older
    than its log, or the log can't be continued; StorageUnavailableError and AuditUnavailableError when the disk fails.
    """
    read_keyring(directory)  # before the lock, which would make a missing directory
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(DataDirLock(directory))
        except InUseError as error:
            raise StartError(
                f"{error}; {change} only while the daemon is stopped: stop it, or the message server that "
                "started it and would start it again, run this again, and start it"
            ) from None
        stored = replica_file.read(lock.directory_fd)
        if stored is not None and not member:
            raise StartError(
                f"{change} only where the directory is that of one host, and this is one of several: `minikms replica "
                "leave` makes it one again"
            )
        file = KeyringFile(lock.directory_fd, stack.enter_context(ThreadPoolExecutor(1)))
        data = file.load() or b""
        left = not keyring.parse_file(data)[0].members  # by an interrupted `leave_replica`
        member_id = "" if stored is None or left else stored.mark.member_id
        arena = stack.enter_context(SecretArena(KEYRING_SLOTS))
        with root.read(arena) as key:
            unlocked, slot = UnlockedKeyring.open(arena, key.view, data, nonces=NonceSource().next, member_id=member_id)
        stack.callback(unlocked.release)
        mark = None if stored is None else stored.check(unlocked)
        log_dir = lock_log_directory(lock)
        # The change raises the epoch, so an older keyring would pass for a newer one at the next start.
        check_newest(unlocked.body.epoch, highest_epoch(log_dir))
        # First the log as it is: an interrupted step is completed under the keys that the log knows.
        log = AuditLog(log_dir, audit_keys(unlocked), expected=ExpectedLog(exists=True))
        stack.callback(log.close)
        destroyed, unlocked.body = open_tombstones(lock.directory_fd, unlocked)
        destroyed.close()
        check_tombstones(destroyed, log)
        yield _Opened(lock.directory_fd, file, unlocked, log, slot, mark)
