"""The directory of DEK files.

Owns: `kms-deks/`: names, bounded reads, durable writes, listing. Invariants: a name is built only from a key id that
matched `api.KEY_ID_PATTERN`; a file is replaced whole (`custody.atomic`); listing streams, so that a million files take
no memory. It must never look into a record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Final

from minikms import api
from minikms.custody.atomic import GroupCommit, open_directory, read_file_bounded
from minikms.errors import KeyNotFoundError, KeyUnreadableError, StorageUnavailableError
from minikms.keys.dek import FILE_BYTES_MAX

DIRECTORY: Final = "kms-deks"
SUFFIX: Final = ".json"


class DekStore:
    def __init__(self, data_dir: str, executor: Executor) -> None:
        self.directory = os.path.join(data_dir, DIRECTORY)
        self.directory_fd = open_directory(self.directory)
        self._group = GroupCommit(self.directory_fd, executor)

    def read(self, key_id: str) -> bytes:
        """The key's file. Raises KeyNotFoundError, KeyUnreadableError."""
        try:
            data = read_file_bounded(file_name(key_id), FILE_BYTES_MAX, dir_fd=self.directory_fd)
        except StorageUnavailableError as error:
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

    def list_ids(self) -> Iterator[str]:
        """The ids of all key files, in no order; names that are no key's are passed over."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                key_id = entry.name.removesuffix(SUFFIX)
                if entry.name.endswith(SUFFIX) and api.KEY_ID_PATTERN.fullmatch(key_id):
                    yield key_id

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
