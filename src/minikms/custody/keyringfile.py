"""The keyring file.

Owns: `keyring.json`: reading it bounded, replacing it durably. Invariants: the old content stays until the new one
is on disk under its name; one write at a time. It must never parse what it carries.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Final

from minikms.custody.atomic import read_file_bounded, replace_file
from minikms.errors import StartError, StorageUnavailableError
from minikms.keys.keyring import FILE_BYTES_MAX

NAME: Final = "keyring.json"


class KeyringFile:
    """`directory_fd` is the data directory's; it stays the caller's."""

    def __init__(self, directory_fd: int, executor: Executor) -> None:
        self._directory_fd = directory_fd
        self._executor = executor

    def load(self) -> bytes | None:
        """The file's bytes, None when there is none. Raises StartError when it can't be read."""
        try:
            return read_file_bounded(NAME, FILE_BYTES_MAX, dir_fd=self._directory_fd)
        except StorageUnavailableError as error:
            raise StartError(f"keyring.json can't be read: {error}") from None

    def store_now(self, data: bytes) -> None:
        """Replaces the file and waits for the disk: at start, before requests are served. Raises
        StorageUnavailableError.
        """
        replace_file(self._directory_fd, NAME, data)

    async def store(self, data: bytes) -> None:
        """Replaces the file; durable when this returns. Raises StorageUnavailableError."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self.store_now, data)
