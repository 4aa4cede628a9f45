"""Batch backups: the contents that a batch of a KEK rotation replaced, one line for each key, in one file.

Owns: `kms-deks-backup/<stamp>/<first key id>-<last key id>.jsonl` (docs/spec/formats.md): names, creation, listing,
blanking and pruning. Invariants:
- A line has `minikms.keys.dek.FILE_BYTES` bytes and is the content of one key's file. The lines of a file are sorted by
  key id, and the name has the first and the last of them, so a key is looked up by names, without an index.
- A file gets its name only when it is durable. A name is never used for two contents.
- The line of a destroyed key is overwritten with spaces, in place and durably, before `blank` returns. After a failed
  sync the content is written to a new file, and the old file is never synced again (`minikms.custody.files`).
- A file that can't be read is an error of the keys that it may hold, and stops no other work. No one removes it: it may
  hold the last copy of a key.
- Lines that the caller keeps are not pruned; a file with such lines stays, and its other lines become blank.

Everything here blocks on the disk. `write`, `files_of`, `blank` and `prune` run in one worker thread; `listed`, `read`
and `destroyed_in` in any. It must never change the files of live keys.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from minikms.api.errors import KeyUnreadableError, StorageUnavailableError
from minikms.custody.deks import list_names
from minikms.custody.files import (
    SYNCFS_FILES_MIN,
    make_private_directory,
    open_directory,
    patch_file,
    read_file_bounded,
    remove_file,
    replace_file,
    sweep_temps,
    syncfs,
    syncfs_reports,
)
from minikms.keys.dek import FILE_BYTES
from minikms.sync import sync_directory

LINES_COUNT_MAX: Final = 4096
"""Lines of one file."""
SAME_NAME_MAX: Final = 100
"""Files of one stamp with the same first and last key."""
BLANK_FILES_MAX: Final = 32
"""Files that one job blanks: the other jobs of its thread wait for it."""
BLANK: Final = b" " * (FILE_BYTES - 1) + b"\n"
"""The line of a destroyed key."""

_STAMP: Final = re.compile(r"[0-9]{8}T[0-9]{6}", re.ASCII)
_ID: Final = r"k_[0-7][0-9a-hjkmnp-tv-z]{25}"
_NAME: Final = re.compile(rf"({_ID})-({_ID})(?:\.[0-9]{{1,2}})?\.jsonl", re.ASCII)
_LINE_ID: Final = re.compile(rb'\{"id":"(' + _ID.encode("ascii") + rb')"')


class BatchFile(NamedTuple):
    """A batch backup. Its lines are of keys with ids from `first` to `last`."""

    stamp: str
    name: str
    first: str
    last: str


class KeysWithin(NamedTuple):
    """A batch backup that may have lines of these keys."""

    file: BatchFile
    key_ids: Sequence[str]


class Line(NamedTuple):
    """A line of a batch backup, not blank. `key_id` is empty if the line does not begin as a record does."""

    key_id: str
    content: bytes
    offset: int = 0


class BatchBackups:
    """The batch backups below `directory`, whose descriptor belongs to the caller."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._files: dict[str, list[BatchFile]] | None = None
        self._unsure: set[BatchFile] = set()
        """Files whose last write or sync failed: what the page cache has of them may not be on the disk."""
        self._swept = False
        self.unreadable: dict[str, str] = {}
        """For an operator: the files of which it is not known whether they hold a destroyed key, with the reasons."""

    def stamps(self) -> list[str]:
        """The stamps of all rotations with batch backups, in order. Raises StorageUnavailableError."""
        return sorted(self._by_stamp())

    def listed(self) -> Iterator[BatchFile]:
        """All batch backups. Raises StorageUnavailableError."""
        for stamp in list_stamps(self._directory):
            yield from list_batch_files(self._directory, stamp)

    def _by_stamp(self) -> dict[str, list[BatchFile]]:
        if self._files is None:
            stamps = list_stamps(self._directory)
            self._files = {stamp: list_batch_files(self._directory, stamp) for stamp in stamps}
            listed = {_place(file) for file in itertools.chain.from_iterable(self._files.values())}
            for name in self.unreadable.keys() - listed:
                self.unreadable.pop(name, None)
        return self._files

    def write(self, stamp: str, lines: Sequence[Line]) -> None:
        """Writes a batch backup, durably. `lines`: at most LINES_COUNT_MAX, of FILE_BYTES each, in any order.

        Raises StorageUnavailableError; then a file without a use may be there, which a repeated call writes again.
        """
        content = b"".join(line.content for line in sorted(lines))
        first, last = min(lines).key_id, max(lines).key_id
        files = self._by_stamp().setdefault(stamp, [])
        try:
            make_private_directory(self._path(stamp))
            if not files:
                # The process that made the directory may have been killed before it synced.
                sync_directory(self._directory)
            descriptor = open_directory(self._path(stamp))
        except OSError as error:
            raise StorageUnavailableError("a rotation backup can't be created") from error
        try:
            for number in range(SAME_NAME_MAX):
                name = f"{first}-{last}.jsonl" if number == 0 else f"{first}-{last}.{number}.jsonl"
                if not _has_other_content(descriptor, name, content):
                    if (file := BatchFile(stamp, name, first, last)) not in files:
                        files.append(file)  # before it is there: a failure may leave it in place
                    # Even if the same content is there, since an earlier attempt may have failed at its last sync.
                    replace_file(descriptor, name, content)
                    return
        finally:
            os.close(descriptor)
        raise StorageUnavailableError(f"a batch of keys has {SAME_NAME_MAX} backups with the same stamp")

    def read(self, file: BatchFile) -> list[Line]:
        """The lines that are not blank; none if the file was removed since it was listed. Raises KeyUnreadableError."""
        try:
            with self._opened(file.stamp) as descriptor:
                return _lines(_content(descriptor, file.name))
        except FileNotFoundError:
            return []
        except StorageUnavailableError as error:
            raise KeyUnreadableError(f"the batch backup {_place(file)} can't be read: {error}") from None

    def files_of(self, key_ids: Iterable[str]) -> list[KeysWithin]:
        """The files that may have lines of these keys. Raises StorageUnavailableError."""
        ordered = sorted(key_ids)
        found: list[KeysWithin] = []
        for file in itertools.chain.from_iterable(self._by_stamp().values()):
            within = ordered[bisect_left(ordered, file.first) : bisect_right(ordered, file.last)]
            if within:
                found.append(KeysWithin(file, within))
        return found

    def blank(self, files: Sequence[KeysWithin], *, anew: Container[str] = ()) -> Counter[str]:
        """Overwrites the lines of destroyed keys, durably on return. Returns the number of lines of each key.

        `anew`: keys whose removal an earlier run or request may have begun. A blank line of them may be blank in the
        page cache only, so their files are replaced by new ones.

        Raises StorageUnavailableError if a file can't be read or written. The others are blanked even then.
        """
        counts: Counter[str] = Counter()
        failure: StorageUnavailableError | None = None
        patched: list[BatchFile] = []
        root = open_directory(self._directory)  # before the writes: `syncfs` reports failures that come after it
        try:
            by_syncfs = len(files) >= SYNCFS_FILES_MIN and syncfs_reports(root)
            for file, key_ids in files:
                fresh = file in self._unsure or any(key_id in anew for key_id in key_ids)
                try:
                    with self._opened(file.stamp) as descriptor:
                        content = _content(descriptor, file.name)
                        going = _going(content, key_ids)
                        if fresh:
                            self._write_anew(descriptor, file, content, going)
                        elif going:
                            patched.append(file)
                            self._patch(descriptor, file, going, sync=not by_syncfs)
                except FileNotFoundError:
                    continue  # the stamp was pruned
                except StorageUnavailableError as error:
                    failure = failure or self._failed(file, error)
                else:
                    self.unreadable.pop(_place(file), None)
                    counts.update(line.key_id for line in going)
            if by_syncfs and patched:
                self._sync_all(root, patched)
        finally:
            os.close(root)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # the traceback of an error leads to this frame
        return counts

    def _patch(self, descriptor: int, file: BatchFile, going: Sequence[Line], *, sync: bool) -> None:
        self._unsure.add(file)
        patch_file(descriptor, file.name, [(line.offset, BLANK) for line in going], sync=sync)
        if sync:
            self._unsure.discard(file)

    def _sync_all(self, root: int, patched: Iterable[BatchFile]) -> None:
        try:
            syncfs(root)
        except OSError as error:
            raise StorageUnavailableError("rotation backups can't be synced") from error
        self._unsure.difference_update(patched)

    def _write_anew(self, descriptor: int, file: BatchFile, content: bytes, going: Sequence[Line]) -> None:
        fresh = bytearray(content)
        for line in going:
            fresh[line.offset : line.offset + FILE_BYTES] = BLANK
        if fresh:  # else it was removed
            replace_file(descriptor, file.name, bytes(fresh))
        self._unsure.discard(file)

    def _failed(self, file: BatchFile, error: StorageUnavailableError) -> StorageUnavailableError:
        self.unreadable[_place(file)] = str(error)
        # The name of the file has two key ids, which the caller need not know of; `/status` tells those who may.
        failure = StorageUnavailableError(
            f"a rotation backup of {file.stamp} may hold the key and can't be read or written; correct or remove the "
            "file that the warnings of /status name"
        )
        failure.__cause__ = error.__cause__
        return failure

    def destroyed_in(self, file: BatchFile, destroyed: Container[str]) -> KeysWithin | None:
        """The keys of `destroyed` that have a line in the file, for `blank`; None if it needs no blanking. It reads the
        whole file. Raises StorageUnavailableError.
        """
        try:
            with self._opened(file.stamp) as descriptor:
                content = _content(descriptor, file.name)
        except FileNotFoundError:
            content = b""
        except StorageUnavailableError as error:
            self.unreadable[_place(file)] = str(error)
            raise
        self.unreadable.pop(_place(file), None)
        matches = (_LINE_ID.match(content, offset) for offset in range(0, len(content), FILE_BYTES))
        found = [key_id for match in matches if match and (key_id := match[1].decode("ascii")) in destroyed]
        if found or file in self._unsure or _going(content, ()):
            return KeysWithin(file, found)
        return None

    def prune(self, *, before: str | None, keeps: Callable[[str], bool]) -> Iterator[int]:
        """Removes the lines of stamps before `before` (None: all) except those of keys that `keeps` accepts, durably.
        Each step is the work of one file, and yields the number of lines removed; others may use the backups between
        two steps. Raises StorageUnavailableError; then a part was removed.
        """
        for stamp in self.stamps():
            if before is not None and stamp >= before:
                continue
            for file in list_batch_files(self._directory, stamp):
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

    def _prune_file(self, descriptor: int, file: BatchFile, keeps: Callable[[str], bool]) -> int:
        try:
            content = _content(descriptor, file.name)
        except StorageUnavailableError as error:
            self.unreadable[_place(file)] = str(error)
            return 0
        lines = _lines(content)
        going = [line for line in lines if not (line.key_id and keeps(line.key_id))]
        if len(going) == len(lines):
            remove_file(descriptor, file.name)
        elif file in self._unsure:
            self._write_anew(descriptor, file, content, going)
        elif going:
            self._patch(descriptor, file, going, sync=True)
        return len(going)

    def _remove_if_empty(self, stamp: str) -> None:
        try:
            os.rmdir(self._path(stamp))
        except OSError:
            return  # a file of it is kept, or is not of this program
        try:
            sync_directory(self._directory)
        except OSError as error:
            raise StorageUnavailableError("a rotation backup can't be removed") from error

    def sweep_temps(self) -> None:
        """Removes the temporary files of earlier processes, each of which may hold a whole batch, once in a run. Raises
        StorageUnavailableError.
        """
        if self._swept:
            return
        for stamp in list_stamps(self._directory):
            if not os.path.islink(self._path(stamp)):  # else it is not of this program
                with contextlib.suppress(FileNotFoundError), self._opened(stamp) as descriptor:
                    sweep_temps(descriptor)
        self._swept = True

    @contextlib.contextmanager
    def _opened(self, stamp: str) -> Iterator[int]:
        descriptor = open_directory(self._path(stamp))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _path(self, stamp: str) -> str:
        return os.path.join(self._directory, stamp)


def list_stamps(directory: str) -> list[str]:
    """The stamps that have a directory below `directory`. Raises StorageUnavailableError."""
    return sorted(
        name
        for name in list_names(directory)
        if _STAMP.fullmatch(name) and os.path.isdir(os.path.join(directory, name))
    )


def list_batch_files(directory: str, stamp: str) -> list[BatchFile]:
    """The batch backups of a stamp, by first key id; other names are skipped. None of a stamp that is pruned meanwhile.
    Raises StorageUnavailableError.
    """
    try:
        matches = list(map(_NAME.fullmatch, list_names(os.path.join(directory, stamp))))
    except StorageUnavailableError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return sorted(BatchFile(stamp, match[0], match[1], match[2]) for match in matches if match)


def _place(file: BatchFile) -> str:
    return f"{file.stamp}/{file.name}"


def _has_other_content(descriptor: int, name: str, content: bytes) -> bool:
    try:
        found = read_file_bounded(name, LINES_COUNT_MAX * FILE_BYTES, dir_fd=descriptor)
    except StorageUnavailableError:
        return True  # a damaged backup: the lines are written under another name
    return found is not None and found != content


def _content(descriptor: int, name: str) -> bytes:
    return read_file_bounded(name, LINES_COUNT_MAX * FILE_BYTES, dir_fd=descriptor) or b""


def _lines(content: bytes) -> list[Line]:
    found: list[Line] = []
    for offset in range(0, len(content), FILE_BYTES):
        line = content[offset : offset + FILE_BYTES]
        if line != BLANK:
            match = _LINE_ID.match(line)
            found.append(Line(match[1].decode("ascii") if match else "", line, offset))
    return found


def _going(content: bytes, key_ids: Iterable[str]) -> list[Line]:
    """The lines of these keys, and those that a crash left half blank."""
    going: list[Line] = []
    for key_id in key_ids:
        at = content.find(b'{"id":"%s"' % key_id.encode("ascii"))
        while at >= 0:
            if at % FILE_BYTES == 0:
                going.append(Line(key_id, content[at : at + FILE_BYTES], at))
            at = content.find(b'{"id":"%s"' % key_id.encode("ascii"), at + 1)
    begins = content[::FILE_BYTES]
    number = begins.find(b" ")
    while number >= 0:
        at = number * FILE_BYTES
        line = content[at : at + FILE_BYTES]
        if line != BLANK:
            going.append(Line("", line, at))
        number = begins.find(b" ", number + 1)
    return going
