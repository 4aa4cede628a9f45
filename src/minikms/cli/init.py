"""`minikms init`: makes a data directory, and a root key file if there is none, before the first start.

Owns: the order of the making, and what a person must keep. Invariants: nothing that exists is overwritten or used for
something else; the lock is held; what it leaves is what a first start would have made; the root key never becomes an
object. It must never make a second keyring for a directory that has had one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from minikms.cli import console
from minikms.cli.console import (
    EXIT_GOOD,
    EXIT_WANTING,
    CommandError,
    DataDir,
    Json,
    MasterKeyFd,
    MasterKeyFile,
    chosen_data_dir,
    chosen_key_file,
)


def init(
    *,
    data_dir: DataDir = None,
    master_key_file: MasterKeyFile = None,
    json: Json = False,
    master_key_fd: MasterKeyFd = None,
) -> int:
    """Make a data directory. A master key file that does not exist is made too, with a fresh key.

    It shows the public key of the audit log: keep that outside this machine, it is what `minikms audit verify` needs
    to judge the log without trusting the machine. Exit status: 0 made, 1 there is one already, 2 something is missing.
    """
    directory = chosen_data_dir(data_dir, must_exist=False)
    key_file = chosen_key_file(master_key_file)
    if key_file is None and master_key_fd is None:
        raise CommandError(
            "say where the root key is, or is to be made: --master-key-file FILE, better not beside the data directory"
        )
    if key_file is not None and master_key_fd is not None:
        raise CommandError("both a master key and a master key file are given; unset one of the two variables")
    if os.path.lexists(os.path.join(directory, "keyring.json")):
        raise CommandError(f"{directory} has a keyring already; nothing was changed", EXIT_WANTING)
    makes_key = key_file is not None and not os.path.lexists(key_file)
    made = _make(directory, key_file, master_key_fd)
    if json:
        console.print_json({**made, "data_dir": directory, "master_key_made": makes_key})
        return EXIT_GOOD
    if makes_key:
        print(f"Made a root key in {key_file}. Without it nothing can ever be decrypted: keep a copy elsewhere,")
        print("apart from every backup of the data directory.")
    print(f"Made {directory}.")
    console.print_facts(
        [
            ("keyring", made["keyring_id"]),
            ("root key", f"{made['root_fingerprint']}   its fingerprint, no secret"),
            ("audit log", f"{made['audit_public_key']}   its public key: keep it outside this machine"),
        ],
        indent=2,
    )
    source = f" --master-key-file {key_file}" if key_file is not None else ""
    print(f"Start it with: minikms --socket PATH --data-dir {directory}{source}")
    return EXIT_GOOD


def _make(directory: str, key_file: Path | None, descriptor: int | None) -> dict[str, Any]:
    """What a first start makes: keyring, lease files, audit log. Raises StartError, StorageUnavailableError."""
    from concurrent.futures import ThreadPoolExecutor

    from minikms import datadir
    from minikms.base64 import encode_text
    from minikms.cli.auditkeys import ARENA_SLOTS
    from minikms.crypto.aead import NonceSource
    from minikms.custody import deks, rotation_backups
    from minikms.custody.files import DataDirLock, make_private_directory
    from minikms.custody.keyring_file import KeyringFile
    from minikms.custody.lease_store import LeaseStore
    from minikms.memory.arena import SecretArena
    from minikms.roots.key_file import make_dev_key_file

    with DataDirLock(directory) as lock, SecretArena(ARENA_SLOTS) as arena, ThreadPoolExecutor(1) as executor:
        for name in (deks.DIRECTORY, rotation_backups.DIRECTORY):
            make_private_directory(os.path.join(directory, name))
        if key_file is not None and not os.path.lexists(key_file):
            make_dev_key_file(key_file, arena)
        file = KeyringFile(lock.directory_fd, executor)
        if file.load() is not None:
            raise CommandError(f"{directory} has a keyring already; nothing was changed", EXIT_WANTING)
        opened = datadir.open_keyring(
            data_dir=directory,
            file=file,
            source=datadir.RootSource(file=key_file, descriptor=descriptor),
            arena=arena,
            nonces=NonceSource(),
        )
        try:
            _begin_log(directory, opened)
            LeaseStore.open(lock.directory_fd, create=True).close()
            datadir.raise_epoch(opened.unlocked, file)
            body = opened.unlocked.body
            return {
                "keyring_id": body.keyring_id,
                "epoch": body.epoch,
                "root_fingerprint": opened.slot.fingerprint,
                "audit_public_key": encode_text(body.audit_key.public_key),
            }
        finally:
            opened.unlocked.release()


def _begin_log(directory: str, opened: Any) -> None:
    from minikms.audit import AuditLog
    from minikms.custody import files

    audit_key = opened.unlocked.body.audit_key
    mac_key, seed = opened.unlocked.audit_key(audit_key.version)
    log = AuditLog.open(directory, audit_key=mac_key, seed=seed, now_ns=files.now_ns, key_version=audit_key.version)
    log.close()
