"""DEK files as another process reads them: a backup, `minikms doctor` and `minikms audit`, beside the daemon or after a
crash.

Owns: which keys a data directory has, and the content of each: what the next start would make of the key's file and the
journal. Owns also which keys damaged records name. Invariants:
- A file that the daemon overwrites or makes meanwhile is read again until it is whole (`read_settled`).
- The journal is parsed once for each change of it, not once for each key.

It takes no lock and changes nothing. It must never unwrap a key.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Self

from minikms.api.errors import KeyUnreadableError, KmsRefusedError, StartError, StorageUnavailableError
from minikms.custody import journal, keyring_file
from minikms.custody.deks import DIRECTORY, file_name, list_key_ids
from minikms.custody.journal_format import BYTES_MAX, Chain, chains, decode, is_whole
from minikms.custody.rotation_backups import DIRECTORY as BACKUPS
from minikms.custody.rotation_backups import all_journals
from minikms.keys import dek, keyring
from minikms.keys.dek import FILE_BYTES, KEY_ID_RANDOM_BYTES, DekRecord, make_key_id
from minikms.platform.clock import now_ns
from minikms.platform.files import READ_AHEAD_FILES, open_directory, read_file_bounded, read_files_of

CLOCK_TICK_NS: Final = 1_000_000_000
"""A file that was changed more recently may change again without another time of change."""
SETTLE_READS_MAX: Final = 6
SETTLE_SECONDS: Final = 0.01
"""Pause after a read that differed or was not valid. An overwrite takes microseconds."""
LISTINGS_COUNT: Final = 2
"""One listing may omit a file that is replaced meanwhile."""


class SettledKey(NamedTuple):
    """A key, the content of its file, and its record or why there is none."""

    key_id: str
    content: bytes
    record: DekRecord | KmsRefusedError


class _Version(NamedTuple):
    """Tells one content of a file from another."""

    inode: int
    size: int
    changed_ns: int


class _Journal(NamedTuple):
    """`has_kek`: of the keyring that was read after it."""

    chains: dict[str, Chain]
    damaged: list[set[str]]
    has_kek: Callable[[int], bool]


_NO_JOURNAL: Final = _Journal({}, [], lambda _version: False)


class SettledKeys:
    """The keys of a data directory. A context manager; used in one thread. Raises StorageUnavailableError."""

    def __init__(self, data_dir: str) -> None:
        self._files = os.path.join(data_dir, DIRECTORY)
        self._backups = os.path.join(data_dir, BACKUPS)
        with contextlib.ExitStack() as undo:
            self._directory_fd = open_directory(data_dir)
            undo.callback(os.close, self._directory_fd)
            self._files_fd: int | None = None
            with contextlib.suppress(FileNotFoundError):
                self._files_fd = open_directory(self._files)
            undo.pop_all()
        self.recovered = 0
        """Keys that `read` answered from the journal."""
        self.unread: list[str] = []
        """Rotation backups that `damaged` could not read, or that were cut."""
        self._journal: tuple[_Version | None, _Journal] = (None, _NO_JOURNAL)

    def close(self) -> None:
        os.close(self._directory_fd)
        if self._files_fd is not None:
            os.close(self._files_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def key_ids(self) -> list[str]:
        """The keys that have a file, or of which the journal has a create, in order.

        Raises StorageUnavailableError, StartError.
        """
        return sorted(set(self.listed()))

    def listed(self) -> Iterator[str]:
        """The same, in no order and with repetitions."""
        # First: a journal is removed only after the files of its keys were made.
        yield from [key_id for key_id, chain in self._journalled().chains.items() if chain.made]
        for _ in range(LISTINGS_COUNT if self._files_fd is not None else 0):
            yield from list_key_ids(self._files)

    def each(self, key_ids: Iterable[str]) -> Iterator[SettledKey]:
        """What `read` returns of these keys, or its error, without those that have no file. Raises as `key_ids`."""
        remaining = iter(key_ids)
        while part := list(itertools.islice(remaining, READ_AHEAD_FILES)):
            contents: Sequence[bytes | None] = [None] * len(part)
            if self._files_fd is not None:
                contents = read_files_of(map(file_name, part), FILE_BYTES, dir_fd=self._files_fd, twice=True)
            journalled = self._journalled().chains  # after the files, as in `read`
            for key_id, file_content in zip(part, contents, strict=True):
                record: DekRecord | KmsRefusedError | None = None
                content = file_content
                if content is not None and key_id not in journalled:
                    with contextlib.suppress(KeyUnreadableError):
                        record = dek.parse(content, key_id)
                if record is None:
                    try:
                        content = self.read(key_id)
                        record = None if content is None else dek.parse(content, key_id)
                    except KmsRefusedError as error:
                        content, record = b"", error.with_traceback(None)
                if content is not None and record is not None:
                    yield SettledKey(key_id, content, record)

    def read(self, key_id: str) -> bytes | None:
        """The content of a key's file; None if there is none.

        After a crash the file may be missing, empty, or hold an earlier content or a mixture until the next start: what
        a replay would write is returned. Raises StorageUnavailableError, KeyNotFoundError, StartError.
        """
        content = self._read_file(key_id)
        journalled = self._journalled()
        chain = journalled.chains.get(key_id)
        if chain is None:
            if content is None or not dek.is_valid(content, key_id):
                return self._read_file(key_id)  # it may have been made since, and the journal removed
            return content
        due = chain.due(content, journalled.has_kek)
        if due is None:
            return content
        self.recovered += due != content
        return due

    def damaged(self) -> Iterator[set[str]]:
        """The key ids in each damaged record of the journal and the rotation backups. Afterwards `unread` has the
        backups that could not be read, or are damaged. Raises StorageUnavailableError, StartError.
        """
        yield from self._journalled().damaged
        for file in all_journals(self._backups):
            place = os.path.join(file.stamp, file.name)
            try:
                content = read_file_bounded(os.path.join(self._backups, place), BYTES_MAX)
                damaged = [] if content is None else decode(content).damaged
                yield from damaged
            except (StorageUnavailableError, StartError):
                self.unread.append(place)
            else:
                if content is not None and (damaged or not is_whole(content)):
                    self.unread.append(place)

    def _read_file(self, key_id: str) -> bytes | None:
        name = file_name(key_id)
        if self._files_fd is None:
            return None
        return read_settled(name, dir_fd=self._files_fd, is_valid=lambda data: dek.is_valid(data, key_id))

    def _journalled(self) -> _Journal:
        version = self._version(journal.NAME)
        before, parsed = self._journal
        if version is None or version != before:
            content = read_file_bounded(journal.NAME, BYTES_MAX, dir_fd=self._directory_fd)
            parsed = _NO_JOURNAL
            if content is not None:
                intact, damaged = decode(content)
                parsed = _Journal(chains(intact), damaged, self._has_kek())
            # Records are written in place: one may follow within the same tick of the clock.
            is_settled = version is not None and time.time_ns() - version.changed_ns > CLOCK_TICK_NS
            self._journal = (version if is_settled else None, parsed)
        return parsed

    def _has_kek(self) -> Callable[[int], bool]:
        """Whether the keyring has a KEK; the keyring is not authenticated here. Raises StorageUnavailableError,
        StartError.
        """
        data = read_file_bounded(keyring_file.NAME, keyring.FILE_BYTES_MAX, dir_fd=self._directory_fd)
        return _NO_JOURNAL.has_kek if data is None else keyring.parse_file(data)[0].has_kek

    def _version(self, name: str) -> _Version | None:
        """None if there is no such file."""
        try:
            status = os.stat(name, dir_fd=self._directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageUnavailableError("a file can't be looked up") from error
        return _Version(status.st_ino, status.st_size, status.st_mtime_ns)


def newest_key_id(data_dir: str) -> str:
    """An id that no key created until now exceeds. Raises StorageUnavailableError.

    It is the largest of the ids of this moment, of the key files, of the journal, and of the rotation backups: the
    clock may have been set back, and a missing file may be restored from its rotation backup.
    """
    newest = make_key_id(now_ns() // 1_000_000, b"\xff" * KEY_ID_RANDOM_BYTES)
    with SettledKeys(data_dir) as settled:
        newest = max(itertools.chain([newest], settled.listed()))
    return max([newest, *(file.last for file in all_journals(os.path.join(data_dir, BACKUPS)))])


def read_settled(name: str, *, dir_fd: int, is_valid: Callable[[bytes], bool]) -> bytes | None:
    """The content of a DEK file, for a process beside the daemon; None if there is none. Blocks on the disk.

    The daemon may be overwriting the file, and a read beside a write can return a mixture. So the file is read again
    until the content is valid and was read twice. After SETTLE_READS_MAX reads it is returned as it is. Raises
    StorageUnavailableError.
    """
    before: bytes | None = None
    for number in range(SETTLE_READS_MAX):
        content = read_file_bounded(name, FILE_BYTES, dir_fd=dir_fd)
        if content is None or (content == before and is_valid(content)):
            return content
        if number:
            time.sleep(SETTLE_SECONDS)
        before = content
    return before
