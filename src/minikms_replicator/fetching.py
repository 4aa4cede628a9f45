"""Filling the data directory of a host that has joined, from the tables.

Owns: which files the command `fetch` writes and in which order: key files, tombstones, last the keyring; and which keys
the tables have, for a person who compares them with a host's. Invariants:
the directory is locked, belongs to a host that joins, and has no keyring yet, so an interrupted run changes nothing
that is in use, and can be repeated; the daemon that starts there verifies what is written, not this module.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final, NamedTuple

from minikms import api
from minikms.api.base64 import decode_canonical
from minikms.api.errors import StartError
from minikms.api.replica_verbs import ReplicaEvidence, ReplicaFile
from minikms.platform.directory_lock import DataDirLock, make_private_directory
from minikms.platform.files import (
    FileWrite,
    closed_after,
    open_directory,
    remove_files,
    replace_file,
    replace_file_from,
    sweep_temps,
    write_files,
)
from minikms_replicator.tables import CONTENT_BYTES_MAX, RECORD_BYTES, Tables, TablesError

KEYRING: Final = "keyring.json"
MARK: Final = "kms-replica.json"
TOMBSTONES: Final = "kms-tombstones"
DEKS: Final = "kms-deks"
SUFFIX: Final = ".json"
HEADER: Final = b"minikms-stones\0t" + (1).to_bytes(4, "big") + bytes(12)
"""The header of the tombstone file (docs/spec/tombstones.md)."""
KEY_BYTES: Final = 16
"""The size of the key id, the first part of a tombstone."""


class Fetched(NamedTuple):
    """`number`: of the last change."""

    number: int
    files: int
    tombstones: int


async def fetch(tables: Tables, data_dir: str) -> Fetched:
    """Fills the data directory of a new host. Raises StartError, StorageUnavailableError, TablesError, one of
    FAILURES."""
    with DataDirLock(data_dir) as lock:
        names = os.listdir(lock.directory_fd)
        if KEYRING in names or MARK not in names:
            raise StartError(f"{data_dir} is not that of a host that has just joined (minikms replica join)")
        sweep_temps(lock.directory_fd)
        deks = os.path.join(lock.directory, DEKS)
        make_private_directory(deks)
        return await _fetch(tables, lock.directory_fd, deks)


async def _fetch(tables: Tables, directory: int, deks: str) -> Fetched:
    records: list[bytes] = []
    written: set[str] = set()
    async with tables.snapshot():
        head = await tables.head()
        if head.empty:
            raise TablesError("the tables are empty: start the first member, which fills them")
        keyring = await tables.keyring()
        with closed_after(open_directory(deks)) as descriptor:
            async for part in tables.parts(-1, 0):
                files = [_file(file) for file in part.files]
                write_files(descriptor, files)
                written.update(file.name for file in files)
                records.append(part.tombstones)
            sweep_temps(descriptor)
            remove_files(descriptor, sorted(set(os.listdir(descriptor)) - written))
    replace_file_from(directory, TOMBSTONES, (HEADER, *records))
    replace_file(directory, KEYRING, keyring)
    return Fetched(head.number, len(written), sum(map(len, records)) // RECORD_BYTES)


async def evidence(tables: Tables) -> ReplicaEvidence:
    """What the tables have, from one snapshot. Raises TablesError, one of FAILURES."""
    keys: dict[str, str] = {}
    destroyed: list[str] = []
    async with tables.snapshot():
        head = await tables.head()
        async for part in tables.parts(-1, 0):
            for file in part.files:
                content = decode_canonical(file.content, CONTENT_BYTES_MAX, "a key file")
                keys[file.key_id] = hashlib.sha256(content).hexdigest()
            stones = part.tombstones
            destroyed += (stones[at : at + KEY_BYTES].hex() for at in range(0, len(stones), RECORD_BYTES))
    return ReplicaEvidence(head.keyring_id, "", head.term, head.number, keys, destroyed)


def _file(file: ReplicaFile) -> FileWrite:
    if api.KEY_ID_PATTERN.fullmatch(file.key_id) is None:
        raise TablesError("a key file in the database has no key id as its name")
    return FileWrite(file.key_id + SUFFIX, decode_canonical(file.content, CONTENT_BYTES_MAX, "a key file"))
