"""Backups of key files that a KEK rotation replaced: the journals of its batches, in `kms-deks-backup/`.

Owns: `<stamp>/<first key id>-<last key id>.journal`, a journal that was renamed once its files were durable
(docs/spec/journal.md). Names, listing, blanking and pruning. Invariants:
- The name of a journal has the first and the last of its keys, so those that may hold a key are found by name. A name
  is never used for two contents.
- A record of a destroyed key is overwritten with zeros, in place and durably, before `blank` returns. After a failed
  sync the content is written to a new file, and the old file is never synced again (`minikms.platform.files`).
- A file that can't be read is an error of the keys that it may hold, and stops no other work. It stays, and so does a
  damaged record until its key is destroyed: either may be the last copy of a key. Only an operator removes the file.
- Records that the caller keeps are not pruned; a journal with such records stays, and its other records become blank.
  The last readable copy of a key is not pruned.

Everything here blocks on the disk. `journals`, `read_journal` and `destroyed_in` run in any thread, all else in one
worker thread. It must never change the files of live keys.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from struct import Struct
from types import MappingProxyType
from typing import Final, NamedTuple

from minikms.api.errors import KeyUnreadableError, StorageUnavailableError
from minikms.custody import journal_format
from minikms.custody.deks import DekStore, list_names
from minikms.custody.journal_format import BLANK, BYTES_MAX, MAGIC, RECORD_BYTES
from minikms.keys.dek import FILE_BYTES, KEY_ID_BYTES, key_id_to_bytes
from minikms.platform.directory_lock import make_private_directory
from minikms.platform.files import (
    SYNCFS_FILES_MIN,
    closed_after,
    open_directory,
    opened_file,
    patch_file,
    remove_file,
    replace_file,
    sweep_temps,
)
from minikms.platform.sync import sync_directory, sync_file, syncfs, syncfs_reports

DIRECTORY: Final = "kms-deks-backup"
SAME_NAME_MAX: Final = 100
"""Backups of one stamp with the same name."""
BLANK_FILES_MAX: Final = 32
"""Files that one job blanks: the other jobs of its thread wait for it."""
_STAMP: Final = re.compile(r"[0-9]{8}T[0-9]{6}", re.ASCII)
_ID: Final = r"k_[0-7][0-9a-hjkmnp-tv-z]{25}"
_NAME: Final = re.compile(rf"({_ID})-({_ID})(?:\.[0-9]{{1,2}})?\.journal", re.ASCII)


class JournalFile(NamedTuple):
    """The journal of a batch. Its records are of keys with ids from `first` to `last`."""

    stamp: str
    name: str
    first: str
    last: str


class KeysWithin(NamedTuple):
    """A journal that may have records of these keys."""

    file: JournalFile
    key_ids: Sequence[str]


class FoundRecords(NamedTuple):
    """The records of keys that are to be destroyed, by file; and the keys that a file may hold that can't be read or
    written, each with the reason.
    """

    files: dict[JournalFile, list[BackupRecord]]
    unreadable: dict[str, StorageUnavailableError]


class BackupRecord(NamedTuple):
    """A record of a journal that is not blank: the old content of the file of `key_id`, of a create the new one. A
    damaged record has no content, and no key id if it does not name one key; one that a crash left half written is
    not damaged.
    """

    key_id: str
    content: bytes
    offset: int
    damaged: bool = False


class RotationBackups:
    """The directory of backups, open until `close`."""

    def __init__(self, data_dir: str) -> None:
        self.directory = os.path.join(data_dir, DIRECTORY)
        self.directory_fd = open_directory(self.directory)
        self._files: dict[str, list[JournalFile]] | None = None
        self._unsure: set[JournalFile] = set()
        """Files whose last write or sync failed: what the page cache has of them may not be on the disk."""
        self._swept = False
        self.unreadable: dict[str, str] = {}
        """For an operator: the files of which it is not known whether they hold a destroyed key, with the reasons."""
        self.damaged: set[str] = set()
        """For an operator: the files with damaged records."""

    def sweep_temps(self) -> None:
        """Removes the temporary files of earlier processes, once in a run. In any thread. Raises
        StorageUnavailableError.
        """
        if not self._swept:
            sweep_temps(self.directory_fd)
            for stamp in list_stamps(self.directory):
                if not os.path.islink(self._path(stamp)):  # else it is not of this program
                    with contextlib.suppress(FileNotFoundError), self._opened(stamp) as descriptor:
                        sweep_temps(descriptor)
            self._swept = True

    def close(self) -> None:
        os.close(self.directory_fd)

    def adopt(self, directory_fd: int, name: str, stamp: str, first: str, last: str) -> None:
        """Renames a journal, whose files are durable, from the data directory to the backups of `stamp`; durable on
        return. Raises StorageUnavailableError; then call it again.
        """
        files = self._by_stamp().setdefault(stamp, [])
        try:
            make_private_directory(self._path(stamp))
            if not files:  # the process that made the directory may have been killed before it synced
                sync_directory(self.directory)
            with self._opened(stamp) as descriptor:
                names = set(os.listdir(descriptor))
                for number in range(SAME_NAME_MAX):
                    to = f"{first}-{last}.journal" if number == 0 else f"{first}-{last}.{number}.journal"
                    if to not in names:
                        break
                else:
                    raise StorageUnavailableError(f"a batch of keys has {SAME_NAME_MAX} backups with the same stamp")
                with contextlib.suppress(FileNotFoundError):  # an earlier call has renamed it
                    os.rename(name, to, src_dir_fd=directory_fd, dst_dir_fd=descriptor)
                    files.append(JournalFile(stamp, to, first, last))
                sync_file(descriptor)
            sync_file(directory_fd)
        except OSError as error:
            raise StorageUnavailableError("the journal can't be kept as a rotation backup") from error

    def stamps(self) -> list[str]:
        """The stamps of all rotations with backups, in order. Raises StorageUnavailableError."""
        return sorted(self._by_stamp())

    def journals(self) -> list[JournalFile]:
        """All journals. Raises StorageUnavailableError."""
        return all_journals(self.directory)

    def _by_stamp(self) -> dict[str, list[JournalFile]]:
        if self._files is None:
            stamps = list_stamps(self.directory)
            self._files = {stamp: list_journals(self.directory, stamp) for stamp in stamps}
            listed = {_place(file) for file in itertools.chain.from_iterable(self._files.values())}
            for name in self.unreadable.keys() - listed:
                self.unreadable.pop(name, None)
            self.damaged &= listed
        return self._files

    def read_journal(self, file: JournalFile) -> list[BackupRecord]:
        """The records that are not blank; none of a file that was removed meanwhile. Raises KeyUnreadableError."""
        try:
            with self._opened(file.stamp) as descriptor:
                return _backup_records(_parts(descriptor, file.name))
        except FileNotFoundError:
            return []
        except StorageUnavailableError as error:
            raise KeyUnreadableError(f"the backup {_place(file)} can't be read: {error}") from None

    def files_of(self, key_ids: Iterable[str]) -> list[KeysWithin]:
        """The files that may have records of these keys. Raises StorageUnavailableError."""
        ordered = sorted(key_ids)
        matches: list[KeysWithin] = []
        for file in itertools.chain.from_iterable(self._by_stamp().values()):
            within = ordered[bisect_left(ordered, file.first) : bisect_right(ordered, file.last)]
            if within:
                matches.append(KeysWithin(file, within))
        return matches

    def find(self, within: KeysWithin) -> list[BackupRecord]:
        """The records of these keys in the file, for `blank`. Raises StorageUnavailableError if it can't be read, or
        has some and can't be written.
        """
        file, key_ids = within
        try:
            with self._opened(file.stamp) as descriptor:
                records = _going(_parts(descriptor, file.name), key_ids)
                writable = not records or os.access(file.name, os.W_OK, dir_fd=descriptor)
        except FileNotFoundError:
            records, writable = [], True  # it was removed
        except StorageUnavailableError as error:
            raise self._failed(file, error) from error.__cause__
        if not writable:
            raise self._failed(file, StorageUnavailableError("it can't be written"))
        self.unreadable.pop(_place(file), None)
        return records

    def blank(
        self,
        files: Sequence[KeysWithin],
        *,
        within: Mapping[JournalFile, Sequence[BackupRecord]] = MappingProxyType({}),
        anew: Container[str] = (),
    ) -> Counter[str]:
        """Overwrites the records of destroyed keys, durably on return. Returns the number of records of each key.

        `found`: what `find` has read; other files are read. A record never moves within its file. `anew`: keys whose
        removal an earlier run or request may have begun. A blank record of them may be blank in the page cache only, so
        their files are replaced by new ones.

        Raises StorageUnavailableError if a file can't be read or written. The others are blanked even then.
        """
        counts: Counter[str] = Counter()
        failure: StorageUnavailableError | None = None
        patched: list[JournalFile] = []
        with closed_after(
            open_directory(self.directory)
        ) as root:  # before the writes: `syncfs` reports failures that come after it
            by_syncfs = len(files) >= SYNCFS_FILES_MIN and syncfs_reports(root)
            for file, key_ids in files:
                fresh = file in self._unsure or any(key_id in anew for key_id in key_ids)
                copy = bytearray() if fresh else None
                try:
                    with self._opened(file.stamp) as descriptor:
                        if fresh or file not in within:
                            matches = _going(_parts(descriptor, file.name, copy), key_ids)
                        else:  # it may have records of keys whose destruction was refused
                            matches = [each for each in within[file] if not each.key_id or each.key_id in key_ids]
                        if copy is not None:
                            self._write_anew(descriptor, file, copy, matches)
                        elif matches:
                            patched.append(file)
                            self._patch(descriptor, file, matches, sync=not by_syncfs)
                except FileNotFoundError:
                    continue  # the stamp was pruned
                except StorageUnavailableError as error:
                    failure = failure or self._failed(file, error)
                else:
                    self.unreadable.pop(_place(file), None)
                    counts.update(record.key_id for record in matches)
            if by_syncfs and patched:
                self._sync_all(root, patched)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # the traceback of an error leads to this frame
        return counts

    def _patch(self, descriptor: int, file: JournalFile, removed: Sequence[BackupRecord], *, sync: bool) -> None:
        self._unsure.add(file)
        patch_file(descriptor, file.name, [(record.offset, BLANK) for record in removed], sync=sync)
        if sync:
            self._unsure.discard(file)

    def _sync_all(self, root: int, patched: Iterable[JournalFile]) -> None:
        try:
            syncfs(root)
        except OSError as error:
            raise StorageUnavailableError("rotation backups can't be synced") from error
        self._unsure.difference_update(patched)

    def _write_anew(
        self, descriptor: int, file: JournalFile, content: bytearray, removed: Sequence[BackupRecord]
    ) -> None:
        """`content`: as it was read when `going` was found. A second read may find a record again that was blank: after
        a failed sync the kernel may drop the pages.
        """
        for record in removed:
            content[record.offset : record.offset + RECORD_BYTES] = BLANK
        replace_file(descriptor, file.name, bytes(content))
        self._unsure.discard(file)

    def _failed(self, file: JournalFile, error: StorageUnavailableError) -> StorageUnavailableError:
        self.unreadable[_place(file)] = str(error)
        # The name of the file has two key ids, which the caller need not know of; `/status` tells those who may.
        failure = StorageUnavailableError(
            f"a rotation backup of {file.stamp} may hold the key and can't be read or written; correct or remove the "
            "file that the warnings of /status name"
        )
        failure.__cause__ = error.__cause__
        return failure

    def destroyed_in(self, file: JournalFile, destroyed: Container[str]) -> KeysWithin | None:
        """The keys of `destroyed` that have a record in the file, for `blank`; None if it needs no blanking. It reads
        the whole file, and notes whether it is damaged. Raises StorageUnavailableError.
        """
        key_ids: set[str] = set()
        half_blank = damaged = False
        try:
            with self._opened(file.stamp) as descriptor:
                for offset, record in _records(_parts(descriptor, file.name)):
                    change = journal_format.parse(record)
                    named = journal_format.ids_in(record) if change is None else (change.key_id,)
                    gone = [key_id for key_id in named if key_id in destroyed]
                    key_ids.update(gone)
                    if change is None:
                        half_blank = half_blank or journal_format.is_half_blank(record, offset)
                        damaged = damaged or not (gone or journal_format.has_empty_sector(record, offset))
        except FileNotFoundError:
            pass
        except StorageUnavailableError as error:
            self.unreadable[_place(file)] = str(error)
            raise
        self.unreadable.pop(_place(file), None)
        self._note(file, damaged=damaged)
        if key_ids or half_blank or file in self._unsure:
            return KeysWithin(file, sorted(key_ids))
        return None

    def oldest_stamp_of(self, rotations: int) -> str | None:
        """The oldest stamp of the newest `rotations` rotations; None if there are not more rotations than that."""
        stamps = self.stamps()
        return stamps[-rotations] if len(stamps) > rotations else None

    def prune(
        self, store: DekStore, *, before: str | None, spare: Container[str], destroyed: Container[str]
    ) -> Iterator[int]:
        """Removes the records of stamps before `before` (`YYYYMMDDTHHMMSS`; None: all), durably.

        Of keys that are not in `destroyed` it keeps damaged records and those of keys without a file; also those of the
        keys in `spare`. Each step is the work of one file, and yields the number of records removed; others may use the
        backups between two steps. Raises StorageUnavailableError; then a part was removed.
        """

        def keeps(record: BackupRecord) -> bool:
            key_id = record.key_id
            if record.damaged or not key_id:
                return record.damaged and key_id not in destroyed
            return key_id in spare or not (store.has(key_id) or key_id in destroyed)

        for stamp in self.stamps():
            if before is not None and stamp >= before:
                continue
            for file in list_journals(self.directory, stamp):
                try:
                    with self._opened(stamp) as descriptor:
                        count = self._prune_file(descriptor, file, keeps)
                except FileNotFoundError:
                    break
                finally:
                    self._files = None
                yield count
            self._remove_if_empty(stamp)
            self._files = None

    def _prune_file(self, descriptor: int, file: JournalFile, keeps: Callable[[BackupRecord], bool]) -> int:
        copy = bytearray() if file in self._unsure else None
        try:
            records = _backup_records(_parts(descriptor, file.name, copy))
        except StorageUnavailableError as error:
            self.unreadable[_place(file)] = str(error)
            return 0
        prunable = [record for record in records if not keeps(record)]
        self._note(file, damaged=any(record.damaged and keeps(record) for record in records))
        if len(prunable) == len(records):
            remove_file(descriptor, file.name)
        elif copy is not None:
            self._write_anew(descriptor, file, copy, prunable)
        elif prunable:
            self._patch(descriptor, file, prunable, sync=True)
        return len(prunable)

    def _note(self, file: JournalFile, *, damaged: bool) -> None:
        (self.damaged.add if damaged else self.damaged.discard)(_place(file))

    def _remove_if_empty(self, stamp: str) -> None:
        try:
            os.rmdir(self._path(stamp))
        except OSError:
            return  # a file of it is kept, or is not of this program
        try:
            sync_directory(self.directory)
        except OSError as error:
            raise StorageUnavailableError("a rotation backup can't be removed") from error

    def _opened(self, stamp: str) -> AbstractContextManager[int]:
        return closed_after(open_directory(self._path(stamp)))

    def _path(self, stamp: str) -> str:
        return os.path.join(self.directory, stamp)


def list_stamps(directory: str) -> list[str]:
    """The stamps that have a directory below `directory`. Raises StorageUnavailableError."""
    return sorted(
        name
        for name in list_names(directory)
        if _STAMP.fullmatch(name) and _is_directory(os.path.join(directory, name))
    )


def _is_directory(path: str) -> bool:
    """False if it is gone. Raises StorageUnavailableError: what can't be looked at may hold a key."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageUnavailableError("a rotation backup can't be looked at") from error


def list_journals(directory: str, stamp: str) -> list[JournalFile]:
    """The journals of a stamp, by first key id; other names are skipped. None of a stamp that is pruned meanwhile.
    Raises StorageUnavailableError.
    """
    try:
        matches = list(map(_NAME.fullmatch, list_names(os.path.join(directory, stamp))))
    except StorageUnavailableError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return sorted(JournalFile(stamp, match[0], match[1], match[2]) for match in matches if match)


def all_journals(directory: str) -> list[JournalFile]:
    """The journals of all stamps; none if there is no such directory. Raises StorageUnavailableError."""
    stamps = list_stamps(directory) if _is_directory(directory) else ()
    return [file for stamp in stamps for file in list_journals(directory, stamp)]


def _place(file: JournalFile) -> str:
    return f"{file.stamp}/{file.name}"


def _parts(descriptor: int, name: str, copy: bytearray | None = None) -> Iterator[tuple[int, bytes]]:
    """The records of a journal, PART_RECORDS at a time, each part with its offset. `copy` gets all that is read. Raises
    FileNotFoundError, StorageUnavailableError.
    """
    with opened_file(name, dir_fd=descriptor) as (fd, length):
        if length > BYTES_MAX or (length - len(MAGIC)) % RECORD_BYTES:
            raise StorageUnavailableError("it is longer than a journal, or a part of it is missing")
        if copy is not None:
            copy += os.pread(fd, len(MAGIC), 0)
        for offset in range(len(MAGIC), length, _PART_BYTES):
            part = os.pread(fd, _PART_BYTES, offset)
            if len(part) != min(_PART_BYTES, length - offset):
                raise StorageUnavailableError("a part of it is missing")
            if copy is not None:
                copy += part
            yield offset, part


def _records(parts: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    for start, part in parts:
        for place in range(0, len(part), RECORD_BYTES):
            record = part[place : place + RECORD_BYTES]
            if record != BLANK:
                yield start + place, record


def _backup_records(parts: Iterable[tuple[int, bytes]]) -> list[BackupRecord]:
    records: list[BackupRecord] = []
    for offset, record in _records(parts):
        change = journal_format.parse(record)
        named = journal_format.ids_in(record) if change is None else {change.key_id}
        key_id = next(iter(named)) if len(named) == 1 else ""
        # A damaged record is none that can be unwrapped.
        content = b"" if change is None else change.old or change.new
        damaged = change is None and not journal_format.has_empty_sector(record, offset)
        records.append(BackupRecord(key_id, content, offset, damaged))
    return records


def _going(parts: Iterable[tuple[int, bytes]], key_ids: Iterable[str]) -> list[BackupRecord]:
    """The records of these keys, and those that a crash left half blank."""
    matches: list[BackupRecord] = []
    named = {form: key_id for key_id in key_ids for form in (key_id_to_bytes(key_id), b'{"id":"%s' % key_id.encode())}
    marks = {0, *(form[-1] for form in named)}  # the id of a half blank record is zero
    for start, part in parts:
        marked = zip(*(part[mark::RECORD_BYTES] for mark in _MARKS), strict=True)
        for place, apart in zip(range(0, len(part), RECORD_BYTES), map(marks.isdisjoint, marked), strict=True):
            if apart or part.startswith(BLANK, place):
                continue
            raw_id, old, new = _IDS.unpack_from(part, place)
            key_id = named.get(raw_id) or named.get(old) or named.get(new, "")
            if key_id or journal_format.is_half_blank(part[place : place + RECORD_BYTES], start + place):
                matches.append(BackupRecord(key_id, b"", start + place))
    return matches


_PART_BYTES: Final = journal_format.PART_RECORDS * RECORD_BYTES
_ID_TEXT_BYTES: Final = len(b'{"id":"k_01jd0000000000000000000000')
"""How a content names its key."""
_CONTENT: Final = f"{_ID_TEXT_BYTES}s{FILE_BYTES - _ID_TEXT_BYTES}x"
_IDS: Final = Struct(f"{KEY_ID_BYTES}s{_CONTENT}{_CONTENT}{journal_format.CHECKSUM_BYTES}x")
"""The three places of a record that name its key."""
_OLD_MARK: Final = KEY_ID_BYTES + _ID_TEXT_BYTES - 1
_MARKS: Final = (KEY_ID_BYTES - 1, _OLD_MARK, _OLD_MARK + FILE_BYTES)
"""The places of their last bytes. Only a record that has the last byte of a wanted id at one of them is unpacked."""
