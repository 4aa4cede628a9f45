"""The register of backup archives: `kms-archives/<archive id>.json` in the data directory.

Owns: which archives were made of this data directory, so that the receipt of a destroyed key can name those that may
still hold it. Invariants: an archive is registered before its first byte is copied, and stays registered until it is
known to be gone; the one that a directory was restored from is registered before anything else of it is there, so that
what a restore left half-way is not taken for a new directory; one file an archive, so that a backup beside a live
daemon changes no file of the daemon's. Nothing in it is secret or believed to be authentic: it only names files. It
must never remove an archive by itself, nor keep silent about an entry that it can't read.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from typing import Final

import msgspec

from minikms.custody.files import make_private_directory, open_directory, read_file_bounded, remove_file, replace_file
from minikms.errors import StorageUnavailableError
from minikms.keys.ids import key_id_unix_ms

DIRECTORY: Final = "kms-archives"
ENTRY_BYTES_MAX: Final = 16 * 1024
_NAME: Final = re.compile(r"(a_[0-9a-f]{16})\.json", re.ASCII)


class Registered(msgspec.Struct, frozen=True):
    """`ended_ms` is 0 while the archive is being made, and when that was interrupted. Times are Unix ms. No key
    in the archive has a larger id than `newest_key_id`.
    """

    archive_id: str
    path: str
    begun_ms: int
    ended_ms: int = 0
    keys: int = 0
    bytes: int = 0
    newest_key_id: str = ""

    def may_hold(self, key_id: str) -> bool:
        """Ids tell more than times: the clock may have gone back in between."""
        if not self.ended_ms or key_id <= self.newest_key_id:
            return True
        return not self.newest_key_id and self.ended_ms >= key_id_unix_ms(key_id)


def new_archive_id() -> str:
    return "a_" + secrets.token_hex(8)


class ArchiveRegister:
    """Made for one operation; holds nothing open."""

    def __init__(self, data_dir: str) -> None:
        self._data_dir = data_dir
        self._directory = os.path.join(data_dir, DIRECTORY)

    def put(self, entry: Registered) -> None:
        """Durable when this returns. Raises OSError, StorageUnavailableError."""
        owner = os.stat(self._data_dir)
        make_private_directory(self._directory)
        descriptor = open_directory(self._directory)
        try:
            _give(descriptor, owner)
            name = f"{entry.archive_id}.json"
            replace_file(descriptor, name, msgspec.json.encode(entry) + b"\n")
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
            try:
                _give(file, owner)
            finally:
                os.close(file)
        finally:
            os.close(descriptor)

    def listed(self) -> list[Registered]:
        """Every archive, oldest first; what can't be read is passed over. Raises OSError, StorageUnavailableError."""
        return _oldest_first(self._read_all())

    def may_hold(self, key_id: str) -> list[str]:
        """The paths of the archives that may hold a key: those that ended after its creation, or may not have ended.

        That something can't be read is no error, for the key is destroyed by then, but is said in its place.
        """
        try:
            found = self._read_all()
        except (OSError, StorageUnavailableError):
            return [f"unknown: {DIRECTORY} in the data directory can't be read"]
        unknown = [f"unknown: {DIRECTORY}/{name} can't be read" for name in sorted(found) if found[name] is None]
        return [*(entry.path for entry in _oldest_first(found) if entry.may_hold(key_id)), *unknown]

    def _read_all(self) -> dict[str, Registered | None]:
        """By name of its file; None for one that can't be read."""
        try:
            descriptor = open_directory(self._directory)
        except FileNotFoundError:
            return {}
        found: dict[str, Registered | None] = {}
        try:
            for name in os.listdir(descriptor):
                match = _NAME.fullmatch(name)
                if match is not None:
                    entry = _read(descriptor, name)
                    found[name] = entry if entry is not None and entry.archive_id == match[1] else None
        finally:
            os.close(descriptor)
        return found

    def forget(self, archive_id: str) -> None:
        """The archive is gone. Raises StorageUnavailableError."""
        descriptor = open_directory(self._directory)
        try:
            remove_file(descriptor, f"{archive_id}.json")
        finally:
            os.close(descriptor)


def _read(descriptor: int, name: str) -> Registered | None:
    try:
        data = read_file_bounded(name, ENTRY_BYTES_MAX, dir_fd=descriptor)
        return None if data is None else msgspec.json.decode(data, type=Registered)
    except (StorageUnavailableError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _oldest_first(found: dict[str, Registered | None]) -> list[Registered]:
    readable = (entry for entry in found.values() if entry is not None)
    return sorted(readable, key=lambda entry: (entry.begun_ms, entry.archive_id))


def _give(descriptor: int, owner: os.stat_result) -> None:
    """To the data directory's user, when root makes the backup: the daemon must be able to read it.

    By descriptor, and no file that has another name too: that user may change the directory meanwhile.
    """
    status = os.fstat(descriptor)
    if os.geteuid() == 0 and (stat.S_ISDIR(status.st_mode) or status.st_nlink == 1):
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
