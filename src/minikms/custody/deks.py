"""The DEK files: their directory, the list of those that can't be read, and the locks on them.

Owns: `kms-deks/`: names, bounded reads, durable writes, listing; which key files are known to be unreadable, with the
reasons that `/status` shows; who may change which key's file now. Invariants:
- A file name is built only from a key id that matched `api.KEY_ID_PATTERN`. A file is replaced whole. A listing
  streams, so a million files take no memory.
- A key is in `UnreadableKeys` from the first failure to read its file until the file was read well or the key was
  destroyed. The list is bounded.
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
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from minikms import api
from minikms.custody.files import GroupCommit, open_directory, read_file_bounded, remove_file
from minikms.errors import KeyNotFoundError, KeyUnreadableError, MiniKmsError, StorageUnavailableError
from minikms.keys.dek import FILE_BYTES_MAX

DIRECTORY: Final = "kms-deks"
SUFFIX: Final = ".json"
SCAN_FILES: Final = 128
"""Files that a scan of all keys reads at a time, in a worker thread beside requests."""
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
    """The directory of DEK files, open until `close`. `executor` runs the writes."""

    def __init__(self, data_dir: str, executor: Executor) -> None:
        self.directory = os.path.join(data_dir, DIRECTORY)
        self.directory_fd = open_directory(self.directory)
        self._group = GroupCommit(self.directory_fd, executor)

    def read(self, key_id: str) -> bytes:
        """The content of the key's file. Blocks on the disk.

        Raises KeyNotFoundError if there is none, KeyUnreadableError if it can't be read, and StorageUnavailableError if
        the cause is not the file.
        """
        try:
            data = read_file_bounded(file_name(key_id), FILE_BYTES_MAX, dir_fd=self.directory_fd)
        except StorageUnavailableError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _OUT_OF_RESOURCES:
                raise
            raise KeyUnreadableError(f"the file of key {key_id} can't be read: {error}") from None
        if data is None:
            raise KeyNotFoundError("key not found")
        return data

    def read_many(self, key_ids: Iterable[str]) -> list[tuple[str, bytes | MiniKmsError]]:
        """The content of each key's file, or the error of `read`. For a worker thread."""
        found: list[tuple[str, bytes | MiniKmsError]] = []
        for key_id in key_ids:
            try:
                found.append((key_id, self.read(key_id)))
            except MiniKmsError as error:
                found.append((key_id, error))
        return found

    async def create(self, key_id: str, data: bytes) -> None:
        """Writes a new file, durable on return. Raises StorageUnavailableError; then there is no file."""
        await self._group.submit(file_name(key_id), data, exclusive=True)

    async def replace(self, key_id: str, data: bytes) -> None:
        """Replaces a key's file, durable on return. Raises StorageUnavailableError."""
        await self._group.submit(file_name(key_id), data)

    def remove(self, key_id: str) -> None:
        """Removes a key's file durably, if it is there. Blocks on the disk. Raises StorageUnavailableError."""
        remove_file(self.directory_fd, file_name(key_id))

    def has(self, key_id: str) -> bool:
        """Whether there is a file of this key. Raises StorageUnavailableError."""
        try:
            os.stat(file_name(key_id), dir_fd=self.directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageUnavailableError("a key's file can't be looked up") from error
        return True

    def list_ids(self, *, changed: Collection[str] = ()) -> Iterator[str]:
        """`list_key_ids` of this directory, then the ids that are in `changed` when the listing has ended.

        With the set of `KeyLocks.watch` as `changed` no file is missed that is replaced during the listing.
        """
        yield from list_key_ids(self.directory)
        yield from set(changed)

    async def drain(self) -> None:
        """Returns when no write is waiting or under way."""
        await self._group.drain()

    def close(self) -> None:
        """Closes the directory, after `drain`."""
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
        """All keys of the list."""
        return frozenset(self._reasons)

    def listed(self) -> dict[str, str]:
        """At most LISTED_COUNT_MAX of the keys, each with its reason."""
        return dict(itertools.islice(self._reasons.items(), LISTED_COUNT_MAX))


class KeyLocks:
    """At most one change of a key's file at a time. Waiters are served in no particular order."""

    def __init__(self) -> None:
        self._held: dict[str, asyncio.Future[None]] = {}
        self._watchers: list[set[str]] = []

    @asynccontextmanager
    async def hold(self, key_ids: Iterable[str], *, announced: bool = True) -> AsyncIterator[None]:
        """Holds the locks of these keys inside the block. With `announced` the keys are added to every `watch` set."""
        wanted = tuple(dict.fromkeys(key_ids))
        while blocking := next((self._held[key_id] for key_id in wanted if key_id in self._held), None):
            await asyncio.shield(blocking)
        freed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.update(dict.fromkeys(wanted, freed))
        if announced:
            for watcher in self._watchers:
                watcher.update(wanted)
        try:
            yield
        finally:
            for key_id in wanted:
                del self._held[key_id]
            freed.set_result(None)

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
