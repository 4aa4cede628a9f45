"""The DEK files: their directory, the list of those that can't be read, and the locks on them.

Owns: `kms-deks/`: names, bounded reads, durable writes, listing; which key files are known to be unreadable, with the
reasons that `/status` shows; who may change which key's file now. Invariants:
- A file name is built only from a key id that matched `api.KEY_ID_PATTERN`. A listing streams, so a million files take
  no memory.
- While files are being written, reads of them in this process are answered from memory
  (`DekStore.answer_from_memory`). Other processes use `settled_keys.read_settled`.
- A key is in `UnreadableKeys` from the first failure to read its file until the file was read well or the key was
  destroyed. The list is bounded.
- A function that changes or removes a key's file takes the held lock of the key (`HeldKeys`). Only a new file, whose
  key nobody knows yet, is made without one, exclusively.
- A holder of several key locks gets all of them at once or waits holding none, so holders can't deadlock. They must not
  nest. A reader without a lock can learn whether a file it read was changed meanwhile (`KeyLocks.watch`).

`UnreadableKeys` and `KeyLocks` are used in the event loop's thread only. This module must never look into a record, and
an unreadable file must never be the reason to refuse another key.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Self

from minikms import api
from minikms.api.errors import KeyNotFoundError, KeyUnreadableError, KmsRefusedError, StorageUnavailableError
from minikms.keys.dek import FILE_BYTES, not_found
from minikms.platform.files import (
    READ_AHEAD_FILES,
    open_directory,
    read_file_bounded,
    read_file_of,
    read_files_of,
    remove_files,
    sweep_temps,
)
from minikms.platform.sync import sync_file

DIRECTORY: Final = "kms-deks"
SUFFIX: Final = ".json"
SCAN_FILES: Final = 128
"""Files that a scan of all keys reads at a time, in a worker thread beside requests."""
SORTED_IDS: Final = 16_384
"""The ids in a listing that are sorted at a time: about 1.5 MB."""
UNREADABLE_COUNT_MAX: Final = 10_000
LISTED_COUNT_MAX: Final = 100

_OUT_OF_RESOURCES: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))
"""The process or the machine is short of descriptors or memory; the file itself may be good."""


def file_name(key_id: str) -> str:
    """The name of a key's file. Raises KeyNotFoundError for any other text, so no other name is ever opened."""
    if api.KEY_ID_PATTERN.fullmatch(key_id) is None:
        raise KeyNotFoundError("key not found")
    return key_id + SUFFIX


def list_names(directory: str) -> Iterator[str]:
    """The names in a directory, in no order. Raises StorageUnavailableError."""
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                yield entry.name
    except OSError as error:
        raise StorageUnavailableError("a directory can't be listed") from error


def list_key_ids(directory: str) -> Iterator[str]:
    """The ids of all key files in a directory, in no order; other names are skipped. Raises StorageUnavailableError.

    On some file systems a listing may omit a file that is replaced meanwhile, or list it twice (readdir(3p) leaves it
    open).
    """
    for name in list_names(directory):
        key_id = name.removesuffix(SUFFIX)
        if name.endswith(SUFFIX) and api.KEY_ID_PATTERN.fullmatch(key_id):
            yield key_id


class DekStore:
    """The directory of DEK files, open until `close`."""

    def __init__(self, data_dir: str) -> None:
        self.directory = os.path.join(data_dir, DIRECTORY)
        self.directory_fd = open_directory(self.directory)
        self._answers: Mapping[str, bytes] = {}
        self._swept = False

    def answer_from_memory(self, contents: Mapping[str, bytes]) -> None:
        """From here on `read` answers for these keys from `contents`, and for all others from their files. Called
        before files are written, and again without keys when that has ended. `contents` must be a new object each time.
        """
        self._answers = contents

    def read(self, key_id: str) -> bytes:
        """The content of a key, in any thread: that of its file, or the one that is being written. Blocks on the disk.

        Raises KeyNotFoundError if there is none, KeyUnreadableError if it can't be read, and StorageUnavailableError if
        the cause is not the file.
        """
        while True:
            answers = self._answers
            content = answers.get(key_id)
            if content is not None:
                return content
            content = self.read_file(key_id)
            if self._answers is answers:  # else the file may have been written while it was read
                return content

    def read_file(self, key_id: str) -> bytes:
        """Reads what is in the file now, which `read` may know to be changed."""
        name = file_name(key_id)
        usual = read_file_of(name, FILE_BYTES, dir_fd=self.directory_fd)
        if usual is not None:
            return usual
        try:
            data = read_file_bounded(name, FILE_BYTES, dir_fd=self.directory_fd)
        except StorageUnavailableError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _OUT_OF_RESOURCES:
                raise
            raise KeyUnreadableError(f"the file of key {key_id} can't be read: {error}") from None
        if data is None:
            raise not_found(key_id)
        return data

    def read_many(self, key_ids: Iterable[str]) -> list[tuple[str, bytes | KmsRefusedError]]:
        """The content of each key's file, or the error of `read`. For a worker thread."""
        outcomes: list[tuple[str, bytes | KmsRefusedError]] = []
        remaining = iter(key_ids)
        while part := list(itertools.islice(remaining, READ_AHEAD_FILES)):
            answers = self._answers
            contents = read_files_of(map(file_name, part), FILE_BYTES, dir_fd=self.directory_fd)
            settled = self._answers is answers  # else the files may have been written while they were read
            for key_id, content in zip(part, contents, strict=True):
                if content is not None and settled and key_id not in answers:
                    outcomes.append((key_id, content))
                    continue
                try:
                    outcomes.append((key_id, self.read(key_id)))
                except KmsRefusedError as error:
                    outcomes.append((key_id, error.with_traceback(None)))  # this frame has the list: a reference cycle
        return outcomes

    def remove(self, *locks: HeldKeys) -> None:
        """Removes the files of the keys with these locks, durably, where they exist. Blocks on the disk. Raises
        StorageUnavailableError.
        """
        remove_files(self.directory_fd, [file_name(key_id) for held in locks for key_id in held.key_ids])

    def sweep_temps(self) -> None:
        """Removes the temporary files of earlier processes, once in a run. In any thread. Blocks on the disk. Raises
        StorageUnavailableError.
        """
        if not self._swept:
            sweep_temps(self.directory_fd)
            self._swept = True

    def sync_directory(self) -> None:
        """Makes every file of a listing durable: a process that was killed in a create may have left one that a power
        loss would remove. Blocks on the disk. Raises StorageUnavailableError.
        """
        try:
            sync_file(self.directory_fd)
        except OSError as error:
            raise StorageUnavailableError("the directory of the keys can't be synced") from error

    def changed_ns(self) -> int:
        """When a file was added or removed, in Unix nanoseconds. Raises StorageUnavailableError."""
        try:
            return os.fstat(self.directory_fd).st_mtime_ns
        except OSError as error:
            raise StorageUnavailableError("the directory of the keys can't be looked up") from error

    def has(self, key_id: str) -> bool:
        """Whether there is a file of this key. Raises StorageUnavailableError."""
        return self._status(key_id) is not None

    def _status(self, key_id: str) -> os.stat_result | None:
        try:
            return os.stat(file_name(key_id), dir_fd=self.directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageUnavailableError("a key's file can't be looked up") from error

    def is_directory(self, key_id: str) -> bool:
        """Whether a directory has the name of the key's file. Raises StorageUnavailableError."""
        status = self._status(key_id)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def list_ids(self, *, changed: Collection[str] = ()) -> Iterator[str]:
        """`list_key_ids` of this directory, then the ids that are in `changed` when the listing has ended.

        With the set of `KeyLocks.watch` as `changed` no file is missed that is replaced during the listing. SORTED_IDS
        at a time are in order: such files are near each other on the disk, and keys often share a derived key.
        """
        listed = list_key_ids(self.directory)
        while part := sorted(itertools.islice(listed, SORTED_IDS)):
            yield from part
        yield from set(changed)

    def close(self) -> None:
        os.close(self.directory_fd)


class UnreadableKeys:
    """The keys whose files can't be read or do not unwrap, each with the reason, at most UNREADABLE_COUNT_MAX."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self.complete = True
        """False once a key did not fit: then a key that is not in the list may be unreadable too."""

    def add(self, key_id: str, reason: str) -> None:
        """Adds a key; `reason` is for an operator."""
        if key_id in self._reasons or len(self._reasons) < UNREADABLE_COUNT_MAX:
            self._reasons[key_id] = reason
        else:
            self.complete = False

    def remove(self, key_id: str) -> None:
        """Removes a key: its file was read well, or the key was destroyed."""
        self._reasons.pop(key_id, None)

    @property
    def count(self) -> int:
        """At most UNREADABLE_COUNT_MAX."""
        return len(self._reasons)

    def key_ids(self) -> frozenset[str]:
        return frozenset(self._reasons)

    def listed(self) -> dict[str, str]:
        """At most LISTED_COUNT_MAX of the keys, each with its reason."""
        return dict(itertools.islice(self._reasons.items(), LISTED_COUNT_MAX))


class KeyLocks:
    """At most one change of a key's file at a time. Waiters are served in no particular order."""

    def __init__(self) -> None:
        self._held: dict[str, HeldKeys] = {}
        self._watchers: list[set[str]] = []

    def hold(self, key_ids: Iterable[str], *, announced: bool = True) -> HeldKeys:
        """Holds the locks of these keys inside an `async with`. With `announced` the keys are added to every `watch`
        set.
        """
        return HeldKeys(self, tuple(dict.fromkeys(key_ids)), announced)

    @contextmanager
    def watch(self) -> Iterator[set[str]]:
        """The set of the keys that are held now or are announced before the block ends."""
        changed = set(self._held)
        self._watchers.append(changed)
        try:
            yield changed
        finally:
            # By identity: two watchers may hold equal sets.
            self._watchers = [watcher for watcher in self._watchers if watcher is not changed]


class HeldKeys:
    """The locks of some keys, held by one task inside its `async with`. Made by `KeyLocks.hold`. A class, since a
    generator takes several microseconds more.
    """

    __slots__ = ("_announced", "_freed", "_locks", "key_ids")

    def __init__(self, locks: KeyLocks, wanted: tuple[str, ...], announced: bool) -> None:
        self._locks = locks
        self.key_ids = wanted
        self._announced = announced
        self._freed: asyncio.Future[None] | None = None
        """Made by the first task that waits."""

    async def __aenter__(self) -> Self:
        held = self._locks._held
        while blocking := next((held[key_id] for key_id in self.key_ids if key_id in held), None):
            if blocking._freed is None:
                blocking._freed = asyncio.get_running_loop().create_future()
            await asyncio.shield(blocking._freed)
        held.update(dict.fromkeys(self.key_ids, self))
        if self._announced:
            for watcher in self._locks._watchers:
                watcher.update(self.key_ids)
        return self

    def require(self, *key_ids: str) -> tuple[str, ...]:
        """The keys. Raises ValueError, which is a defect of the caller, unless they are held, `key_ids` among them."""
        held = self._locks._held
        if not all(held.get(key_id) is self for key_id in (*self.key_ids, *key_ids)):
            raise ValueError("the file of a key would be changed without its lock")
        return self.key_ids

    async def __aexit__(self, *_: object) -> None:
        for key_id in self.key_ids:
            del self._locks._held[key_id]
        if self._freed is not None:
            self._freed.set_result(None)
