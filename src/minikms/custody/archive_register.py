"""The register of backup archives: `kms-archives/<archive id>.json` in the data directory.

Owns: the list of the archives that were made of this data directory. The receipt of a destroyed key names those that
may still contain it. Invariants: an archive is registered before its first byte is copied, and stays registered until
it is known to be removed, durably and under both of its names. A restore registers its archive before it writes
anything else, so an interrupted restore is not taken for a new data directory. Each archive has a file of its own, so a
backup beside a live daemon changes no file of the daemon. The entries are neither secret nor authenticated: they only
name files. It must never remove an archive, and never pass silently over an entry that it can't read when a receipt is
written.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Sequence
from typing import Final

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import StorageUnavailableError
from minikms.platform.directory_lock import make_private_directory
from minikms.platform.files import (
    closed_after,
    open_directory,
    read_file_bounded,
    remove_file,
    replace_file,
    sweep_temps,
)

DIRECTORY: Final = "kms-archives"
ENTRY_BYTES_MAX: Final = 16 * 1024
TEMP_AGE_NS_MIN: Final = 3600 * 1_000_000_000
"""A younger temporary file may belong to a backup that runs now, beside the daemon."""
_NAME: Final = re.compile(r"(a_[0-9a-f]{16})\.json", re.ASCII)


class RegisteredArchive(msgspec.Struct, frozen=True):
    """An archive of the register. Times are in Unix ms; `ended_ms` is 0 while the archive is being made and after an
    interruption. No key in a finished archive has a larger id than `newest_key_id`. A finished archive was verified;
    `damaged`: the last verification after that failed.
    """

    archive_id: str
    path: str
    begun_ms: int
    ended_ms: int = 0
    keys: int = 0
    bytes: int = 0
    newest_key_id: str = ""
    damaged: bool = False

    def may_hold(self, key_id: str) -> bool:
        """Whether the archive may contain the key. It compares ids, since the clock may have been set back."""
        return not self.ended_ms or key_id <= self.newest_key_id


def new_archive_id() -> str:
    """`a_` and 16 random hex characters."""
    return "a_" + secrets.token_hex(8)


class ArchiveRegister:
    """The register of a data directory. It keeps no file open."""

    def __init__(self, data_dir: str) -> None:
        self._data_dir = data_dir
        self._directory = os.path.join(data_dir, DIRECTORY)

    def put(self, entry: RegisteredArchive) -> None:
        """Adds or replaces an entry, durably. Raises OSError, StorageUnavailableError."""
        owner = os.stat(self._data_dir)
        make_private_directory(self._directory)
        with closed_after(open_directory(self._directory)) as descriptor:
            _give(descriptor, owner)
            name = f"{entry.archive_id}.json"
            replace_file(descriptor, name, msgspec.json.encode(entry) + b"\n")
            with closed_after(
                os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
            ) as file:
                _give(file, owner)

    def sweep_temps(self) -> None:
        """Removes the temporary files that a crash left, TEMP_AGE_NS_MIN after it. Raises StorageUnavailableError."""
        with contextlib.suppress(FileNotFoundError), closed_after(open_directory(self._directory)) as descriptor:
            sweep_temps(descriptor, age_ns_min=TEMP_AGE_NS_MIN)

    def listed(self) -> list[RegisteredArchive]:
        """The entries, oldest first, without unreadable ones. Raises OSError, StorageUnavailableError."""
        return _oldest_first(self._read_all())

    def may_hold(self, key_ids: Sequence[str]) -> list[list[str]]:
        """For each key the paths of the archives that may contain it.

        An unreadable register or entry is not an error, since the key is destroyed already; a text takes its place.
        """
        try:
            registered = self._read_all()
        except (OSError, StorageUnavailableError):
            return [[f"unknown: {DIRECTORY} in the data directory can't be read"]] * len(key_ids)
        unknown = [
            f"unknown: {DIRECTORY}/{name} can't be read" for name in sorted(registered) if registered[name] is None
        ]
        readable = _oldest_first(registered)
        return [[*(entry.path for entry in readable if entry.may_hold(key_id)), *unknown] for key_id in key_ids]

    def _read_all(self) -> dict[str, RegisteredArchive | None]:
        """The entries by file name; None for an unreadable one."""
        try:
            descriptor = open_directory(self._directory)
        except FileNotFoundError:
            return {}
        registered: dict[str, RegisteredArchive | None] = {}
        with closed_after(descriptor):
            for name in os.listdir(descriptor):
                match = _NAME.fullmatch(name)
                if match is not None:
                    entry = _read(descriptor, name)
                    registered[name] = entry if entry is not None and entry.archive_id == match[1] else None
        return registered

    def forget(self, archive_id: str) -> None:
        """Removes the entry of an archive that no longer exists. Raises StorageUnavailableError."""
        with closed_after(open_directory(self._directory)) as descriptor:
            remove_file(descriptor, f"{archive_id}.json")


def _read(descriptor: int, name: str) -> RegisteredArchive | None:
    try:
        data = read_file_bounded(name, ENTRY_BYTES_MAX, dir_fd=descriptor)
        return None if data is None else msgspec.json.decode(data, type=RegisteredArchive)
    except (StorageUnavailableError, *UNDECODABLE):
        return None


def _oldest_first(registered: dict[str, RegisteredArchive | None]) -> list[RegisteredArchive]:
    readable = (entry for entry in registered.values() if entry is not None)
    return sorted(readable, key=lambda entry: (entry.begun_ms, entry.archive_id))


def _give(descriptor: int, owner: os.stat_result) -> None:
    """If root makes the backup, gives the file to the owner of the data directory, so that the daemon can read it.

    It works on a descriptor and leaves a file with several links alone, since that owner may change the directory
    meanwhile.
    """
    status = os.fstat(descriptor)
    if os.geteuid() == 0 and (stat.S_ISDIR(status.st_mode) or status.st_nlink == 1):
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
