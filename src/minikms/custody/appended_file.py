"""A file of the data directory that grows by appends, each of them durable, until its content is replaced.

Owns: the appends and the replacement; the caller owns the content. `policy-budgets.log` is such a file. Invariants:
what `append` and `replace` returned for is on disk. The first write of a run, and each write after a failed one,
replaces the file, because the end of its content is unknown. It must never take a file that it can't read as an empty
one.
"""

from __future__ import annotations

import contextlib
import os

from minikms.custody.files import read_file_bounded, replace_file, write_all_at
from minikms.errors import StorageUnavailableError
from minikms.sync import sync_data


class AppendedFile:
    """The file `name` in an open directory, which stays the caller's. Its methods block on the disk; one thread at a
    time.
    """

    def __init__(self, directory_fd: int, name: str, *, bytes_max: int) -> None:
        self._directory_fd = directory_fd
        self._name = name
        self._bytes_max = bytes_max
        self._fd: int | None = None
        self._size = 0

    @property
    def appendable(self) -> bool:
        """Whether the end of the file is known. Otherwise only `replace` writes."""
        return self._fd is not None

    def read(self) -> bytes | None:
        """The content; None if there is no file. Raises StorageUnavailableError, also for one that is too long."""
        return read_file_bounded(self._name, self._bytes_max, dir_fd=self._directory_fd)

    def append(self, data: bytes) -> None:
        """Adds `data`, durably. Raises StorageUnavailableError; then the file is no longer appendable."""
        if self._fd is None:
            raise StorageUnavailableError("a file has to be replaced before it grows")
        try:
            write_all_at(self._fd, data, self._size)
            sync_data(self._fd)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise StorageUnavailableError("a file cannot be written") from error
            raise
        self._size += len(data)

    def replace(self, data: bytes) -> None:
        """Makes `data` the content, durably. Raises StorageUnavailableError."""
        self.close()
        replace_file(self._directory_fd, self._name, data)
        try:
            self._fd = os.open(self._name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory_fd)
        except OSError as error:
            raise StorageUnavailableError("a file cannot be opened") from error
        self._size = len(data)

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)
