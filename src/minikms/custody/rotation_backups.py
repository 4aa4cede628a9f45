"""The backups that a KEK rotation leaves: `kms-deks-backup/<key id>.json.<stamp>`.

Owns: their names, making, finding and removal. Invariants: a backup is a hard link of the file that a rewrap is about
to replace, made and durable before the replacement; a name is never used for two contents; a suffix seen once is
remembered, so that a destroyed key's backups are found without reading the directory again; the last readable copy of a
key is not pruned. All of it blocks on the disk and runs in one worker thread. It must never touch the files of live
keys.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Container, Iterable, Iterator
from typing import Final, NamedTuple

from minikms import api
from minikms.custody.deks import DIRECTORY as DEK_DIRECTORY
from minikms.custody.deks import SUFFIX, DekStore, file_name, list_names
from minikms.custody.files import now_ns, open_directory, read_file_bounded
from minikms.errors import KeyUnreadableError, StorageUnavailableError
from minikms.keys import dek
from minikms.keys.ids import RANDOM_BYTES, make_key_id

DIRECTORY: Final = "kms-deks-backup"
SAME_NAME_MAX: Final = 100
STAMP_CHARS: Final = 15
_SUFFIX: Final = re.compile(r"[0-9]{8}T[0-9]{6}(?:-[0-9]{1,3})?", re.ASCII)


class Backup(NamedTuple):
    name: str
    key_id: str
    suffix: str


class BackupStore:
    def __init__(self, data_dir: str) -> None:
        self.directory = os.path.join(data_dir, DIRECTORY)
        self.directory_fd = open_directory(self.directory)
        self._suffixes: set[str] | None = None

    def keep(self, store: DekStore, key_ids: Iterable[str], stamp: str) -> None:
        """Links each key's present file under `stamp`. A key whose very file is kept already is passed over.

        A key that is gone is passed over, too. The caller makes `directory_fd` durable before it replaces a file.
        Raises StorageUnavailableError.
        """
        try:
            for key_id in key_ids:
                self._link(store, key_id, stamp)
        except OSError as error:
            raise StorageUnavailableError("a key's file can't be kept as a backup") from error

    def _link(self, store: DekStore, key_id: str, stamp: str) -> None:
        live = file_name(key_id)
        for number in range(SAME_NAME_MAX):
            suffix = stamp if number == 0 else f"{stamp}-{number}"
            name = f"{live}.{suffix}"
            try:
                os.link(live, name, src_dir_fd=store.directory_fd, dst_dir_fd=self.directory_fd, follow_symlinks=False)
            except FileExistsError:
                if self._same_content(store, live, name):
                    return
                continue
            except FileNotFoundError:
                return  # destroyed meanwhile
            if self._suffixes is not None:
                self._suffixes.add(suffix)
            return
        raise StorageUnavailableError("a key has too many backups of one second")

    def _same_content(self, store: DekStore, live: str, name: str) -> bool:
        try:
            kept = read_file_bounded(name, dek.FILE_BYTES_MAX, dir_fd=self.directory_fd)
        except StorageUnavailableError:
            return False  # a damaged backup: the file is kept again, under another name
        return kept is not None and kept == read_file_bounded(live, dek.FILE_BYTES_MAX, dir_fd=store.directory_fd)

    def listed(self) -> Iterator[Backup]:
        """Every backup, in no order; other names are passed over. Raises StorageUnavailableError."""
        for name in list_names(self.directory):
            key_id, found, suffix = name.partition(SUFFIX + ".")
            if found and api.KEY_ID_PATTERN.fullmatch(key_id) and _SUFFIX.fullmatch(suffix):
                yield Backup(name, key_id, suffix)

    def read(self, backup: Backup) -> bytes | None:
        """The backup's content; None when it is gone since it was listed. Raises KeyUnreadableError."""
        try:
            return read_file_bounded(backup.name, dek.FILE_BYTES_MAX, dir_fd=self.directory_fd)
        except StorageUnavailableError as error:
            raise KeyUnreadableError(f"a backup of key {backup.key_id} can't be read: {error}") from None

    def suffixes(self) -> set[str]:
        """All suffixes in use. The first call reads the directory."""
        if self._suffixes is None:
            self._suffixes = {backup.suffix for backup in self.listed()}
        return self._suffixes

    def remove_of(self, key_id: str) -> int:
        """Removes every backup of a key, durably; the number removed. Raises StorageUnavailableError."""
        return self._remove(f"{file_name(key_id)}.{suffix}" for suffix in sorted(self.suffixes()))

    def remove_of_all(self, key_ids: Container[str]) -> int:
        """Removes every backup of each of these keys, durably; the number removed. Raises StorageUnavailableError."""
        return self._remove([backup.name for backup in self.listed() if backup.key_id in key_ids])

    def prune(self, store: DekStore, *, before: str | None, spare: Container[str], gone: Container[str]) -> int:
        """Removes backups of stamps before `before` (`YYYYMMDDTHHMMSS`; None: all), durably; the number removed.

        Kept: those of the keys in `spare`, and of a key whose file is missing though it is not in `gone`, the destroyed
        ones. Raises StorageUnavailableError.
        """
        doomed = [
            backup.name
            for backup in self.listed()
            if (before is None or backup.suffix < before)
            and backup.key_id not in spare
            and (store.has(backup.key_id) or backup.key_id in gone)
        ]
        count = self._remove(doomed)
        self._suffixes = None
        return count

    def stamp_to_keep(self, rotations: int) -> str | None:
        """The stamp of the oldest of the newest so many rotations; None when there are not more than that."""
        stamps = sorted({suffix[:STAMP_CHARS] for suffix in self.suffixes()})
        return stamps[-rotations] if len(stamps) > rotations else None

    def _remove(self, names: Iterable[str]) -> int:
        count = 0
        try:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.directory_fd)
                    count += 1
            os.fsync(self.directory_fd)
        except OSError as error:
            raise StorageUnavailableError("a backup can't be removed") from error
        return count

    def close(self) -> None:
        os.close(self.directory_fd)


def newest_key_id(data_dir: str) -> str:
    """The largest id that a key made until now may have: of this moment, or of a file or a backup that is there, for
    the clock may have gone back, and a missing file may be put back from its backup. Raises StorageUnavailableError.
    """
    newest = make_key_id(now_ns() // 1_000_000, b"\xff" * RANDOM_BYTES)
    for directory in (DEK_DIRECTORY, DIRECTORY):
        path = os.path.join(data_dir, directory)
        for name in list_names(path) if os.path.isdir(path) else ():
            key_id = name.partition(SUFFIX)[0]
            if key_id > newest and api.KEY_ID_PATTERN.fullmatch(key_id):
                newest = key_id
    return newest
