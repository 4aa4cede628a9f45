"""`minikms init`: makes a data directory, and a root key file if there is none, before the first start.

Owns: the root key file of a new directory, and the text about what a person must keep. Invariants: nothing that exists
is overwritten; the lock is held; the result is that of a first start, which is made by the same function. It must never
make a second keyring for a directory that has had one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minikms.cli.console import (
    EXIT_FAILED,
    EXIT_GOOD,
    CommandError,
    DataDir,
    Json,
    MasterKeyFd,
    MasterKeyFile,
    chosen_data_dir,
    chosen_key_file,
    chosen_root,
    print_facts,
    print_json,
)

if TYPE_CHECKING:
    from minikms.roots.providers import RootProvider


def init(
    *,
    data_dir: DataDir = None,
    master_key_file: MasterKeyFile = None,
    json: Json = False,
    master_key_fd: MasterKeyFd = None,
) -> int:
    """Make a data directory. A master key file that does not exist is made too, with a fresh key.

    It shows the public key of the audit log. Keep it outside this machine: with it, `minikms audit verify` judges the
    log without trusting the machine. Exit status: 0 made, 1 there is one already, 2 something is missing.
    """
    directory = chosen_data_dir(data_dir, must_exist=False)
    key_file = chosen_key_file(master_key_file, master_key_fd)
    root = chosen_root(master_key_file, master_key_fd)
    if root is None:
        raise CommandError(
            "say where the root key is, or is to be made: --master-key-file FILE, better not beside the data directory"
        )
    if os.path.lexists(os.path.join(directory, "keyring.json")):
        raise CommandError(f"{directory} has a keyring already; nothing was changed", EXIT_FAILED)
    makes_key = key_file is not None and not os.path.lexists(key_file)
    made = _make(directory, root, key_file if makes_key else None)
    if json:
        print_json({**made, "data_dir": directory, "master_key_made": makes_key})
        return EXIT_GOOD
    if makes_key:
        print(f"Made a root key in {key_file}. Without it nothing can ever be decrypted: keep a copy elsewhere,")
        print("apart from every backup of the data directory.")
    print(f"Made {directory}.")
    print_facts(
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


def _make(directory: str, root: RootProvider, new_key_file: Path | None) -> dict[str, Any]:
    """Opens the directory as a first start does, and closes it. Raises StartError, StorageUnavailableError."""
    from concurrent.futures import ThreadPoolExecutor

    from minikms.base64 import encode_text
    from minikms.custody import keyring_file
    from minikms.datadir import KEYRING_SLOTS, lock_data_dir, open_for_service
    from minikms.memory.arena import SecretArena
    from minikms.roots.key_file import make_key_file

    with lock_data_dir(directory) as lock, SecretArena(KEYRING_SLOTS) as arena, ThreadPoolExecutor(1) as executor:
        if os.path.lexists(os.path.join(directory, keyring_file.NAME)):
            raise CommandError(f"{directory} has a keyring already; nothing was changed", EXIT_FAILED)
        if new_key_file is not None:
            make_key_file(new_key_file, arena)
        data = open_for_service(lock, root, arena=arena, disk=executor, journal=executor)
        body = data.vault.keyring.body
        made = {
            "keyring_id": body.keyring_id,
            "epoch": body.epoch,
            "root_fingerprint": data.slot.fingerprint,
            "audit_public_key": encode_text(body.audit_key.public_key),
        }
        data.close()
        return made
