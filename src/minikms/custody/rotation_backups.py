"""Rotation backups: the DEK files that a KEK rotation replaced, in `kms-deks-backup/`.

Owns: the single backups `<key id>.json.<stamp>`: names, creation, listing and removal; and the pruning of both kinds.
The other kind is in `minikms.custody.batch_backups`. Invariants: a single backup is a hard link
of the file that a rewrap is about to replace; it is made and durable before the replacement. A name is never used for
two contents. All suffixes in use are remembered, so the backups of a destroyed key are found without another listing.
The last readable copy of a key is not pruned. Everything here blocks on the disk and runs in one worker thread. It must
never change the files of live keys.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from minikms import api
from minikms.api.errors import KeyUnreadableError, StorageUnavailableError
from minikms.custody.batch_backups import LINES_COUNT_MAX, BatchBackups, list_batch_files, list_stamps
from minikms.custody.create_log import read_logged
from minikms.custody.deks import DIRECTORY as DEK_DIRECTORY
from minikms.custody.deks import SUFFIX, DekStore, file_name, list_names
from minikms.custody.files import now_ns, open_directory, read_file_bounded, replace_file, sweep_temps
from minikms.keys.dek import FILE_BYTES, KEY_ID_RANDOM_BYTES, make_key_id
from minikms.sync import sync_file

DIRECTORY: Final = "kms-deks-backup"
SAME_NAME_MAX: Final = 100
"""Backups of one key with the same stamp."""
STAMP_CHARS: Final = 15
_SUFFIX: Final = re.compile(r"[0-9]{8}T[0-9]{6}(?:-[0-9]{1,3})?", re.ASCII)


class RotationBackup(NamedTuple):
    """A file in the directory. `suffix` is the stamp of the rotation, with `-1`, `-2`, … where it was taken."""

    name: str
    key_id: str
    suffix: str


class RotationBackups:
    """The directory of rotation backups, open until `close`."""

    def __init__(self, data_dir: str) -> None:
        self.directory = os.path.join(data_dir, DIRECTORY)
        self.directory_fd = open_directory(self.directory)
        self.batches = BatchBackups(self.directory)
        self._suffixes: set[str] | None = None
        self._swept = False

    def keep(self, store: DekStore, key_ids: Iterable[str], stamp: str) -> None:
        """Links each key's current file under `stamp`, unless the same content is kept under it already.

        A key without a file is skipped. The caller calls `sync` before it replaces a file. Raises
        StorageUnavailableError.
        """
        try:
            for key_id in key_ids:
                self._link(store, key_id, stamp)
        except OSError as error:
            raise StorageUnavailableError("a rotation backup can't be created") from error

    def add(self, key_id: str, content: bytes, stamp: str) -> None:
        """Keeps a content that is not in the key's file, durably. Raises StorageUnavailableError."""
        for number in range(SAME_NAME_MAX):
            suffix = stamp if number == 0 else f"{stamp}-{number}"
            name = f"{file_name(key_id)}.{suffix}"
            try:
                found = read_file_bounded(name, FILE_BYTES, dir_fd=self.directory_fd)
            except StorageUnavailableError:
                continue  # a damaged backup
            if found in (None, content):
                replace_file(self.directory_fd, name, content)
                if self._suffixes is not None:
                    self._suffixes.add(suffix)
                return
        raise StorageUnavailableError(f"a key has {SAME_NAME_MAX} rotation backups with the same stamp")

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
        raise StorageUnavailableError(f"a key has {SAME_NAME_MAX} rotation backups with the same stamp")

    def _same_content(self, store: DekStore, live: str, name: str) -> bool:
        try:
            kept = read_file_bounded(name, FILE_BYTES, dir_fd=self.directory_fd)
        except StorageUnavailableError:
            return False  # a damaged backup: the file is linked under another name
        return kept is not None and kept == read_file_bounded(live, FILE_BYTES, dir_fd=store.directory_fd)

    def listed(self) -> Iterator[RotationBackup]:
        """All single backups, in no order; other names are skipped. Raises StorageUnavailableError."""
        for name in list_names(self.directory):
            key_id, found, suffix = name.partition(SUFFIX + ".")
            if found and api.KEY_ID_PATTERN.fullmatch(key_id) and _SUFFIX.fullmatch(suffix):
                yield RotationBackup(name, key_id, suffix)

    def read(self, backup: RotationBackup) -> bytes | None:
        """The content of the file; None if it was removed since it was listed. Raises KeyUnreadableError."""
        try:
            return read_file_bounded(backup.name, FILE_BYTES, dir_fd=self.directory_fd)
        except StorageUnavailableError as error:
            raise KeyUnreadableError(f"a rotation backup of key {backup.key_id} can't be read: {error}") from None

    def suffixes(self) -> set[str]:
        """All suffixes of single backups in use. The first call reads the directory."""
        if self._suffixes is None:
            self._suffixes = {backup.suffix for backup in self.listed()}
        return self._suffixes

    def remove_of(self, key_ids: Sequence[str]) -> list[int]:
        """Removes the single backups of destroyed keys, durably; the number removed of each. Raises
        StorageUnavailableError.
        """
        suffixes = sorted(self.suffixes())
        names = ([f"{file_name(key_id)}.{suffix}" for suffix in suffixes] for key_id in key_ids)
        counts = [self._unlink(of_key) for of_key in names]
        self.sync()
        return counts

    def remove_of_all(self, key_ids: Container[str]) -> int:
        """As `remove_of`, for all destroyed keys; the number removed. It reads the directory."""
        return self._remove([backup.name for backup in self.listed() if backup.key_id in key_ids])

    def prune(
        self, store: DekStore, *, before: str | None, spare: Container[str], destroyed: Container[str]
    ) -> Iterator[int]:
        """Removes the backups with a stamp before `before` (`YYYYMMDDTHHMMSS`; None: all), durably.

        Each step removes the backups of up to LINES_COUNT_MAX keys, and yields the number removed; others may use the
        backups between two steps. It keeps the backups of the keys in `spare`, and of keys without a file that are not
        in `destroyed`. Raises StorageUnavailableError.
        """

        def keeps(key_id: str) -> bool:
            return key_id in spare or not (store.has(key_id) or key_id in destroyed)

        older = [backup for backup in self.listed() if before is None or backup.suffix < before]
        for first in range(0, len(older), LINES_COUNT_MAX):
            part = older[first : first + LINES_COUNT_MAX]
            count = self._remove([backup.name for backup in part if not keeps(backup.key_id)])
            self._suffixes = None
            yield count
        yield from self.batches.prune(before=before, keeps=keeps)

    def oldest_stamp_of(self, rotations: int) -> str | None:
        """The oldest stamp of the newest `rotations` rotations; None if there are not more rotations than that."""
        stamps = sorted({suffix[:STAMP_CHARS] for suffix in self.suffixes()}.union(self.batches.stamps()))
        return stamps[-rotations] if len(stamps) > rotations else None

    def _remove(self, names: Iterable[str]) -> int:
        count = self._unlink(names)
        self.sync()
        return count

    def _unlink(self, names: Iterable[str]) -> int:
        count = 0
        try:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.directory_fd)
                    count += 1
        except OSError as error:
            raise StorageUnavailableError("a rotation backup can't be removed") from error
        return count

    def sync(self) -> None:
        """Makes the single backups durable. Raises StorageUnavailableError."""
        try:
            sync_file(self.directory_fd)
        except OSError as error:
            raise StorageUnavailableError("the rotation backups can't be synced") from error

    def sweep_temps(self) -> None:
        """Removes the temporary files of earlier processes, once in a run. In any thread. Raises
        StorageUnavailableError.
        """
        if not self._swept:
            sweep_temps(self.directory_fd)
            self.batches.sweep_temps()
            self._swept = True

    def close(self) -> None:
        """Closes the directory."""
        os.close(self.directory_fd)


def newest_key_id(data_dir: str) -> str:
    """An id that no key created until now exceeds. Raises StorageUnavailableError.

    It is the largest of the ids of this moment, of the key files, of the create log, and of the rotation backups: the
    clock may have been set back, and a missing file may be restored from its rotation backup.
    """
    newest = make_key_id(now_ns() // 1_000_000, b"\xff" * KEY_ID_RANDOM_BYTES)
    newest = max([newest, *read_logged(data_dir)])
    for directory in (DEK_DIRECTORY, DIRECTORY):
        path = os.path.join(data_dir, directory)
        for name in list_names(path) if os.path.isdir(path) else ():
            key_id = name.partition(SUFFIX)[0]
            if key_id > newest and api.KEY_ID_PATTERN.fullmatch(key_id):
                newest = key_id
    backups = os.path.join(data_dir, DIRECTORY)
    for stamp in list_stamps(backups) if os.path.isdir(backups) else ():
        newest = max([newest, *(file.last for file in list_batch_files(backups, stamp))])
    return newest
