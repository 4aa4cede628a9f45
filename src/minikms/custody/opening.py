"""Opening a data directory: which root key, and the keyring under it.

Owns: the decision between making a keyring and opening one, and the epoch of a start. Invariants: a missing root key
never silently becomes an ephemeral one; a missing keyring beside existing keys is refused, never made anew; every
start raises the epoch, durably, before a request is served. It must never keep the root key: its slot is released
here.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final, NamedTuple

from minikms import api
from minikms.crypto.aead import NonceSource
from minikms.custody import archives, backups, clock, dekstore
from minikms.custody.keyringfile import KeyringFile
from minikms.custody.leasestore import JOURNAL_NAME, SNAPSHOT_NAME
from minikms.custody.roots import make_dev_key_file, read_key_descriptor, read_key_file
from minikms.errors import StartError
from minikms.keys import keyring
from minikms.keys.ids import RANDOM_BYTES, make_key_id
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot, fill_random

AUDIT_LOG_NAME: Final = "minikms-audit.log"

NO_KEY_TEXT: Final = (
    "no master key is configured. Make one with\n"
    "  (umask 077; openssl rand -hex 32 > /path/to/master-key)\n"
    "and give it with --master-key-file /path/to/master-key (keep a copy of it elsewhere: without it nothing can be "
    "decrypted), or try things out with --dev, which makes a key file beside the data directory"
)


class RootSource(NamedTuple):
    """Where the root key comes from. At most one of the three; none is refused."""

    file: Path | None = None
    descriptor: int | None = None
    dev_file: Path | None = None


class Opened(NamedTuple):
    unlocked: UnlockedKeyring
    slot: keyring.Slot
    made: bool
    provider: keyring.Provider


def open_keyring(
    *, data_dir: str, file: KeyringFile, source: RootSource, arena: SecretArena, nonces: NonceSource
) -> Opened:
    """Opens the keyring, or makes the first one. Raises StartError, saying what to do; nothing was changed then."""
    data = file.load()
    if data is None:
        _check_is_new(data_dir)
    root, provider = _root(source, arena, may_make=data is None)
    try:
        if data is None:
            unlocked = UnlockedKeyring.create(
                arena,
                root.view,
                keyring_id="kr_" + secrets.token_hex(8),
                provider=provider,
                nonces=nonces.next,
                fill_random=fill_random,
                at=clock.rfc3339(clock.now_ns()),
            )
            file.store_now(unlocked.encode(unlocked.body))
            return Opened(unlocked, unlocked.body.slots[0], True, provider)
        unlocked, slot = UnlockedKeyring.open(arena, root.view, data, nonces=nonces.next)
        return Opened(unlocked, slot, False, provider)
    finally:
        root.release()


def check_newest(unlocked: UnlockedKeyring, seen_epoch: int) -> None:
    """Raises StartError when something else in the directory tells of a later epoch than the keyring's."""
    epoch = unlocked.body.epoch
    if seen_epoch > epoch:
        raise StartError(
            f"keyring.json is older than the audit log: its epoch is {epoch}, the log tells of {seen_epoch}. It does "
            "not know which keys and KEK versions were made or destroyed since. Put the newer keyring.json back, or, "
            "if none is left, start once with --accept-restore"
        )


def raise_epoch(unlocked: UnlockedKeyring, file: KeyringFile, *, restored_below: int = 0) -> None:
    """The epoch of this start, durable. Called after the audit log and the lease files were opened, which tell a first
    start by epoch 1.

    `restored_below`: an older keyring is accepted though this epoch was seen; its KEKs then count as used by what may
    have happened since.
    """
    body = unlocked.body
    at = clock.rfc3339(clock.now_ns())
    if restored_below > body.epoch:
        body = keyring.after_restore(body, seen_epoch=restored_below, at=at)
    body = keyring.next_epoch(body, at=at)
    file.store_now(unlocked.encode(body))
    unlocked.body = body


def newest_key_id(data_dir: str) -> str:
    """The largest id that a key made until now may have: of this moment, or of a file or a backup that is there, for
    the clock may have gone back, and a missing file may be put back from its backup. Raises StorageUnavailableError.
    """
    newest = make_key_id(clock.now_ns() // 1_000_000, b"\xff" * RANDOM_BYTES)
    for directory in (dekstore.DIRECTORY, backups.DIRECTORY):
        path = os.path.join(data_dir, directory)
        for name in dekstore.list_names(path) if os.path.isdir(path) else ():
            key_id = name.partition(dekstore.SUFFIX)[0]
            if key_id > newest and api.KEY_ID_PATTERN.fullmatch(key_id):
                newest = key_id
    return newest


def _check_is_new(data_dir: str) -> None:
    """Nothing but the keyring is there before the keyring is; a restore begins with the register of archives."""
    deks = os.path.join(data_dir, dekstore.DIRECTORY)
    has_keys = os.path.isdir(deks) and any(name.endswith(dekstore.SUFFIX) for name in os.listdir(deks))
    if has_keys or os.path.lexists(os.path.join(data_dir, AUDIT_LOG_NAME)):
        raise StartError(
            "keyring.json is missing, but the data directory holds keys or an audit log. A new keyring could not open "
            "them: restore keyring.json from a backup, or give an empty data directory"
        )
    register = os.path.join(data_dir, archives.DIRECTORY)
    has_leases = any(os.path.lexists(os.path.join(data_dir, name)) for name in (JOURNAL_NAME, SNAPSHOT_NAME))
    if has_leases or (os.path.isdir(register) and os.listdir(register)):
        raise StartError(
            "keyring.json is missing, but the data directory holds a part of a restored backup: the restore was cut "
            "short. Move what is there away and restore again, or give an empty data directory"
        )


def _root(source: RootSource, arena: SecretArena, *, may_make: bool) -> tuple[SecretSlot, keyring.Provider]:
    if source.file is not None:
        return read_key_file(source.file, arena), "file"
    if source.descriptor is not None:
        return read_key_descriptor(source.descriptor, arena), "environment"
    if source.dev_file is None:
        raise StartError(NO_KEY_TEXT)
    if not os.path.lexists(source.dev_file):
        if not may_make:
            raise StartError(
                f"the development key file {source.dev_file} is missing, and a new one would not open this data "
                "directory: put it back, or start over with an empty data directory"
            )
        make_dev_key_file(source.dev_file, arena)
    return read_key_file(source.dev_file, arena), "dev"
