"""Opening the audit keys for a command: from the root key, through the keyring, into this process's arena.

Owns: which root key a command uses, and the change of the audit key. Invariants: raw keys lie only in an arena, which
is zeroed when the command ends; reading takes no lock and changes nothing; changing takes the lock. It must never
make a keyring, nor show a key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from minikms.audit import AuditLog, ExpectedLog
from minikms.audit.record import Head
from minikms.audit.rules import Trust
from minikms.crypto.aead import NonceSource
from minikms.custody import files, keyring_file
from minikms.custody.files import DataDirLock, InUseError, open_directory, read_file_bounded
from minikms.custody.keyring_file import KeyringFile
from minikms.datadir import keys_of, since
from minikms.errors import StartError, StorageUnavailableError
from minikms.keys import keyring
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot, fill_random
from minikms.roots.key_file import read_key_descriptor, read_key_file

DEV_KEY_SUFFIX: Final = ".master-key"
ARENA_SLOTS: Final = 512
"""Root and keyring key, KEK versions, two slots an audit key version."""


class RootKey(NamedTuple):
    """Where the root key comes from: a file, or the descriptor that `rootkey` moved the environment's into."""

    file: Path | None
    descriptor: int | None


class OpenAuditKeys(NamedTuple):
    """All versions: MAC keys as views that live as long as the context, and public keys."""

    mac_keys: Mapping[int, memoryview]
    public_keys: frozenset[bytes]
    since: Mapping[int, Head]

    def trust(self) -> Trust:
        return Trust(public_keys=self.public_keys, mac_keys=self.mac_keys, since=self.since)


@contextmanager
def open_audit_keys(data_dir: str, root_key: RootKey) -> Iterator[OpenAuditKeys]:
    """The audit keys of `data_dir`, beside a live daemon. Raises StartError when the root key or keyring is missing."""
    with ExitStack() as stack:
        unlocked = _unlock(stack, data_dir, root_key, _read_keyring(data_dir))
        versions = [key.version for key in unlocked.body.audit_keys]
        yield OpenAuditKeys(
            mac_keys={version: unlocked.audit_key(version)[0] for version in versions},
            public_keys=frozenset(key.public_key for key in unlocked.body.audit_keys),
            since={key.version: head for key in unlocked.body.audit_keys if (head := since(key)) is not None},
        )


class NewAuditKey(NamedTuple):
    version: int
    public_key: bytes
    head: dict[str, str | int]


def rotate_audit_key(data_dir: str, root_key: RootKey) -> NewAuditKey:
    """Make a new audit key and use it from the next line on. The daemon must not be running.

    The keyring holds the new key durably before the log names it; a crash between the two is completed by the next
    start. Raises StartError when the directory is in use or its log can't be continued, StorageUnavailableError and
    AuditUnavailableError when the disk fails.
    """
    if not os.path.lexists(os.path.join(data_dir, keyring_file.NAME)):
        raise StartError(f"there is no keyring in {data_dir}")
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(DataDirLock(data_dir))
        except InUseError as error:
            raise StartError(
                f"{error}; the audit key changes only while the daemon is stopped: stop it, or the message server that "
                "started it and would start it again, run this again, and start it"
            ) from None
        file = KeyringFile(lock.directory_fd, stack.enter_context(ThreadPoolExecutor(1)))
        unlocked = _unlock(stack, data_dir, root_key, file.load())
        # First the log as it is: whatever an earlier crash left is completed under the keys that it knows.
        log = _open_log(data_dir, unlocked)
        try:
            last = log.settle()
            now = files.rfc3339(files.now_ns())
            made = unlocked.make_audit_key(
                fill_random,
                version=unlocked.body.audit_key.version + 1,
                at=now,
                since_seq=last.seq,
                since_sig=last.sig,
            )
            body = keyring.add_audit_key(unlocked.body, made, at=now)
            file.store_now(unlocked.encode(body))
            unlocked.body = body
            log.change_key(keys_of(unlocked).current)
        finally:
            log.close()
        return NewAuditKey(made.version, made.public_key, log.head)


def _open_log(data_dir: str, unlocked: UnlockedKeyring) -> AuditLog:
    current, former = keys_of(unlocked)
    _, seed = unlocked.audit_key(current.version)
    return AuditLog.open(
        data_dir,
        audit_key=current.mac_key,
        seed=seed,
        now_ns=files.now_ns,
        key_version=current.version,
        former=former,
        since=current.since,
        expected=ExpectedLog(exists=True),
    )


def _read_keyring(data_dir: str) -> bytes:
    try:
        directory = open_directory(data_dir)
    except OSError as error:
        raise StartError(f"the data directory {data_dir} can't be opened: {error.strerror}") from None
    try:
        data = read_file_bounded(keyring_file.NAME, keyring.FILE_BYTES_MAX, dir_fd=directory)
    except StorageUnavailableError as error:
        raise StartError(f"keyring.json can't be read: {error}") from None
    finally:
        os.close(directory)
    if data is None:
        raise StartError(f"there is no keyring in {data_dir}")
    return data


def _unlock(stack: ExitStack, data_dir: str, root_key: RootKey, data: bytes | None) -> UnlockedKeyring:
    if data is None:
        raise StartError(f"there is no keyring in {data_dir}")
    arena = SecretArena(ARENA_SLOTS)
    stack.callback(arena.close)
    root = _root(data_dir, root_key, arena)
    try:
        unlocked, _ = UnlockedKeyring.open(arena, root.view, data, nonces=NonceSource().next)
    finally:
        root.release()
    return unlocked


def _root(data_dir: str, root_key: RootKey, arena: SecretArena) -> SecretSlot:
    if root_key.file is not None and root_key.descriptor is not None:
        raise StartError("both a master key and a master key file are given; unset one of the two variables")
    if root_key.descriptor is not None:
        return read_key_descriptor(root_key.descriptor, arena)
    if root_key.file is not None:
        return read_key_file(root_key.file, arena)
    path = os.path.abspath(data_dir)
    dev_file = Path(path + DEV_KEY_SUFFIX)
    if dev_file.exists():
        return read_key_file(dev_file, arena)
    raise StartError(
        "give the master key with --master-key-file, or only the log's public key with --public-key: "
        "the one that was shown when the data directory was made"
    )
