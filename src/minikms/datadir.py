"""The audit key versions of an unlocked keyring, as the log takes them.

Owns: which version is current, and which the log may still end under. It must never copy a key: it hands out views.

What the audit log tells of the keyring's epochs.

Owns: finding the highest epoch in the newest lines of the log, so that a keyring put back from an old copy is told at
the next start. Invariants: it reads the end of one file and at most one other, and changes nothing; lines with an epoch
(`start`, `stop`, and each change of the keyring) are written after the keyring that has it. It must never be taken for
proof that a keyring is the newest: who puts the log back too is not found here, but by the clients that remember.

Opening a data directory: which root key, and the keyring under it.

Owns: the decision between making a keyring and opening one, and the epoch of a start. Invariants: a missing root key
never silently becomes an ephemeral one; a missing keyring beside existing keys is refused, never made anew; every
start raises the epoch, durably, before a request is served. It must never keep the root key: its slot is released
here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
from pathlib import Path
from typing import Final, NamedTuple

from minikms.audit.chain import AuditKey, LocalSigner
from minikms.audit.reader import LOG_NAME, DamagedSegmentError, each_segment, list_segments
from minikms.audit.record import Head
from minikms.audit.recovery import AuditKeys
from minikms.crypto.aead import NonceSource
from minikms.custody import deks as dekstore
from minikms.custody import files
from minikms.custody.backup import register as archives
from minikms.custody.keyring_file import KeyringFile
from minikms.custody.lease_store import JOURNAL_NAME, SNAPSHOT_NAME
from minikms.errors import StartError
from minikms.keys import keyring
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot, fill_random
from minikms.roots.key_file import make_dev_key_file, read_key_descriptor, read_key_file


def keys_of(unlocked: UnlockedKeyring) -> AuditKeys:
    """The newest version and those before it: a change of key reaches the keyring first, and the log's end later."""
    *earlier, current = (_audit_key(unlocked, key) for key in unlocked.body.audit_keys)
    return AuditKeys(current=current, former=tuple(earlier))


def since(key: keyring.AuditKey) -> Head | None:
    """The log's last line under the version before `key`, as the keyring remembers it; None of the first version."""
    return Head(key.since_seq, key.since_sig) if key.since_seq else None


def _audit_key(unlocked: UnlockedKeyring, key: keyring.AuditKey) -> AuditKey:
    mac_key, seed = unlocked.audit_key(key.version)
    return AuditKey(key.version, mac_key, LocalSigner(seed), since(key))


TAIL_BYTES_MAX: Final = 32 * 1024 * 1024
_READ_BYTES: Final = 1024 * 1024
_OVERLAP_BYTES: Final = 64
_EPOCH: Final = re.compile(rb'"epoch":([0-9]{1,18})[,}]')


def highest_epoch(directory: str) -> int:
    """The highest epoch in the last TAIL_BYTES_MAX of the file being written; where it tells of none, since it was
    begun after the last start, in the file before it. 0 when there is none, or no log. Raises OSError.
    """
    return _in_open_file(directory) or _in_newest_closed_file(directory)


def _in_open_file(directory: str) -> int:
    try:
        # O_NONBLOCK: a FIFO in the log's place would keep the start waiting.
        fd = os.open(os.path.join(directory, LOG_NAME), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return 0
    try:
        end = os.fstat(fd).st_size
        begin = max(0, end - TAIL_BYTES_MAX)
        highest = 0
        while begin < end:
            data = os.pread(fd, _READ_BYTES + _OVERLAP_BYTES, begin)
            highest = max(highest, _highest_in(data))
            begin += _READ_BYTES
        return highest
    finally:
        os.close(fd)


def _in_newest_closed_file(directory: str) -> int:
    """The whole file, for it may be compressed. One that is damaged is for `minikms audit verify` to name."""
    highest = 0
    with contextlib.suppress(FileNotFoundError, DamagedSegmentError):
        newest = max(list_segments(directory), default=0)
        for file in itertools.islice(each_segment(directory, after=newest - 1), 1 if newest else 0):
            for line in file.lines():
                if b'"epoch":' in line:
                    highest = max(highest, _highest_in(line))
    return highest


def _highest_in(data: bytes) -> int:
    return max(map(int, _EPOCH.findall(data)), default=0)


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
                at=files.rfc3339(files.now_ns()),
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
    at = files.rfc3339(files.now_ns())
    if restored_below > body.epoch:
        body = keyring.after_restore(body, seen_epoch=restored_below, at=at)
    body = keyring.next_epoch(body, at=at)
    file.store_now(unlocked.encode(body))
    unlocked.body = body


def _check_is_new(data_dir: str) -> None:
    """Nothing but the keyring is there before the keyring is; a restore begins with the register of archives."""
    deks = os.path.join(data_dir, dekstore.DIRECTORY)
    has_keys = os.path.isdir(deks) and any(name.endswith(dekstore.SUFFIX) for name in os.listdir(deks))
    if has_keys or os.path.lexists(os.path.join(data_dir, LOG_NAME)):
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
