"""The directory of DEK files.

Owns: `kms-deks/`: names, bounded reads, durable writes, listing. Invariants: a name is built only from a key id that
matched `api.KEY_ID_PATTERN`; a file is replaced whole (`custody.atomic`); listing streams, so that a million files take
no memory. It must never look into a record.

The key files that can't be read, with the reason of each.

Owns: the list that `/status` shows. Invariants: a key is on it from the first failure to read its file until the file
was read well again, or the key destroyed; it is bounded. Lives in the loop's thread. It must never be the reason to
refuse another key.

At most one change of a key's file at a time.

Owns: who may change which key's file now, and telling a reader that read without a lock whether what it read still
holds. Invariants: a holder of several keys gets all of them or waits holding none, so holders can't block each other in
a circle; holders must not nest. Lives in the loop's thread. It must never do I/O.
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
from minikms.custody.files import GroupCommit, open_directory, read_file_bounded
from minikms.errors import KeyNotFoundError, KeyUnreadableError, StorageUnavailableError
from minikms.keys.dek import FILE_BYTES_MAX

DIRECTORY: Final = "kms-deks"
SUFFIX: Final = ".json"
_PASSING: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))
"""The process or the machine is short of something."""


class DekStore:
    def __init__(self, data_dir: str, executor: Executor) -> None:
        self.directory = os.path.join(data_dir, DIRECTORY)
        self.directory_fd = open_directory(self.directory)
        self._group = GroupCommit(self.directory_fd, executor)

    def read(self, key_id: str) -> bytes:
        """The key's file. Raises KeyNotFoundError, KeyUnreadableError, and StorageUnavailableError for what is not the
        file's fault.
        """
        try:
            data = read_file_bounded(file_name(key_id), FILE_BYTES_MAX, dir_fd=self.directory_fd)
        except StorageUnavailableError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _PASSING:
                raise
            raise KeyUnreadableError(f"the file of key {key_id} can't be read: {error}") from None
        if data is None:
            raise KeyNotFoundError("key not found")
        return data

    async def create(self, key_id: str, data: bytes) -> None:
        """A new file, durable when this returns. Raises StorageUnavailableError; then there is none."""
        await self._group.submit(file_name(key_id), data, exclusive=True)

    async def replace(self, key_id: str, data: bytes) -> None:
        """The new content of a key's file, durable when this returns. Raises StorageUnavailableError."""
        await self._group.submit(file_name(key_id), data)

    def has(self, key_id: str) -> bool:
        """Whether there is a file of this key. Raises StorageUnavailableError."""
        try:
            os.stat(file_name(key_id), dir_fd=self.directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageUnavailableError("a key's file can't be looked for") from error
        return True

    def list_ids(self, *, changed: Collection[str] = ()) -> Iterator[str]:
        """The ids of all key files, in no order; names that are no key's are passed over. One may come twice when files
        are replaced meanwhile. Raises StorageUnavailableError.

        On some file systems a listing may pass over a file that is replaced meanwhile (readdir(3p) leaves it open). So
        the ids that are in `changed` once the listing has ended come as well (`KeyLocks.watch`).
        """
        for name in list_names(self.directory):
            key_id = name.removesuffix(SUFFIX)
            if name.endswith(SUFFIX) and api.KEY_ID_PATTERN.fullmatch(key_id):
                yield key_id
        yield from set(changed)

    async def drain(self) -> None:
        """Returns when nothing is on its way to disk."""
        await self._group.drain()

    def close(self) -> None:
        os.close(self.directory_fd)


def file_name(key_id: str) -> str:
    """Raises KeyNotFoundError for what can't be a key's id, so that no other name is ever opened."""
    if api.KEY_ID_PATTERN.fullmatch(key_id) is None:
        raise KeyNotFoundError("key not found")
    return key_id + SUFFIX


def list_names(directory: str) -> Iterator[str]:
    """The names in a directory, as they come. Raises StorageUnavailableError."""
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                yield entry.name
    except OSError as error:
        raise StorageUnavailableError("a directory can't be listed") from error


NOTED_COUNT_MAX: Final = 10_000
LISTED_COUNT_MAX: Final = 100


class Damage:
    def __init__(self) -> None:
        self._noted: dict[str, str] = {}
        self.complete = True
        """False once there was no room for one: then it can't be known from here which keys are sound."""

    def note(self, key_id: str, why: str) -> None:
        """Its file can't be read, or does not open. `why` is for an operator."""
        if key_id in self._noted or len(self._noted) < NOTED_COUNT_MAX:
            self._noted[key_id] = why
        else:
            self.complete = False

    def clear(self, key_id: str) -> None:
        """Its file was read well, or is gone for good."""
        self._noted.pop(key_id, None)

    @property
    def count(self) -> int:
        """At most NOTED_COUNT_MAX."""
        return len(self._noted)

    def key_ids(self) -> frozenset[str]:
        return frozenset(self._noted)

    def listed(self) -> dict[str, str]:
        """Some of them, by key id, each with its reason."""
        return dict(itertools.islice(self._noted.items(), LISTED_COUNT_MAX))


class KeyLocks:
    """Waiting is in no order."""

    def __init__(self) -> None:
        self._held: dict[str, asyncio.Future[None]] = {}
        self._watchers: list[set[str]] = []

    @asynccontextmanager
    async def hold(self, key_ids: Iterable[str], *, announced: bool = True) -> AsyncIterator[None]:
        """Returns once no other holder has any of these keys. Watchers hear of it, unless it is the watcher itself."""
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
        """A set of the keys that are held now, and of those that are announced until the block ends."""
        changed = set(self._held)
        self._watchers.append(changed)
        try:
            yield changed
        finally:
            # By identity: two watchers may hold equal sets.
            self._watchers = [watcher for watcher in self._watchers if watcher is not changed]
