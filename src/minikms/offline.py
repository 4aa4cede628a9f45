"""Changes of a data directory that no daemon serves: another root key, another audit key, no auditor.

Owns: the order in which keyring and audit log change together. Invariants: the lock is held; a keyring or tombstones
older than the log are refused; a crash between the two leaves what the next start completes or an operator repeats.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from minikms.api.errors import StartError
from minikms.audit import AuditLog, Event, ExpectedLog
from minikms.audit.epochs import highest_epoch
from minikms.custody.keyring_file import KeyringFile
from minikms.custody.log_directory import lock_log_directory
from minikms.custody.tombstone_file import open_tombstones
from minikms.datadir import (
    DataDir,
    audit_keys,
    check_newest,
    check_tombstones,
    open_audit_log,
    open_for_reading,
    read_keyring,
)
from minikms.keys import keyring, root_slots
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretSlot, fill_random
from minikms.platform import clock
from minikms.platform.directory_lock import DataDirLock, InUseError
from minikms.roots.providers import RootProvider


def add_root(
    data: DataDir, root: SecretSlot, provider: str, shares: keyring.ShareSet | None = None
) -> keyring.RootSlot:
    """Adds a root key to a directory that nothing else uses yet. The slot and its audit line are durable on return.

    Raises ConflictError, StorageUnavailableError, AuditUnavailableError: the slot may be stored then.
    """
    unlocked = data.vault.unlocked
    at = _now()

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
    with _opened_offline(directory, root, "the audit key changes") as (file, unlocked, log):
        last = log.sign_and_sync()
        key = unlocked.make_audit_key(
            fill_random, version=unlocked.audit.current.version + 1, at=_now(), since_seq=last.seq, since_sig=last.sig
        )
        body = keyring.add_audit_key(unlocked.body, unlocked.member_id, key, at=_now())
        file.store_now(unlocked.encode(body))
        unlocked.body = body
        log.change_key(audit_keys(unlocked).current)
        log.sync.fdatasync()
        return NewAuditKey(key.version, key.public_key, log.head)


def detach_auditor(directory: str, root: RootProvider) -> str:
    """Forgets the origin of the auditor, which is returned. The daemon must not be running.

    The line about it is durable before the keyring changes; a crash between the two leaves the auditor attached, and
    the line is written again. Raises as `_opened_offline`, and StartError when there is no origin.
    """
    with _opened_offline(directory, root, "an auditor is detached") as (file, unlocked, log):
        origin = unlocked.audit.audit_origin
        if not origin:
            raise StartError("no auditor is attached")
        log.add(Event(type="detach_auditor", actor="minikms", pid=os.getpid(), facts={"origin": origin}))
        log.sign_and_sync()
        body = keyring.without_audit_origin(unlocked.body, unlocked.member_id, at=_now())
        file.store_now(unlocked.encode(body))
        return origin


@contextmanager
def _opened_offline(
    directory: str, root: RootProvider, change: str
) -> Iterator[tuple[KeyringFile, UnlockedKeyring, AuditLog]]:
    """Keyring and audit log, for a change of both while no daemon runs. `change`: what happens, as subject and verb.

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
        file = KeyringFile(lock.directory_fd, stack.enter_context(ThreadPoolExecutor(1)))
        unlocked = stack.enter_context(open_for_reading(directory, root))
        log_dir = lock_log_directory(lock)
        # The change raises the epoch, so an older keyring would pass for a newer one at the next start.
        check_newest(unlocked.body.epoch, highest_epoch(log_dir))
        # First the log as it is: an interrupted step is completed under the keys that the log knows.
        log = open_audit_log(log_dir, unlocked, expected=ExpectedLog(exists=True))
        stack.callback(log.close)
        destroyed, unlocked.body = open_tombstones(lock.directory_fd, unlocked)
        destroyed.close()
        check_tombstones(destroyed, log)
        yield file, unlocked, log


def _now() -> str:
    return clock.rfc3339(clock.now_ns())
