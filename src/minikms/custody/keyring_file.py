"""The file `keyring.json`, and its changes while the daemon runs.

Owns: the bounded read and the durable replacement of the file; the order of the keyring's changes. Invariants:
- The old file stays until the new one is on disk. Changes run one at a time, each from the newest body. The body in
  memory is the newest durable one: a change takes effect in both or in neither, even if its caller is cancelled.

`StoredKeyring` runs in the event loop's thread; only the file I/O runs in an executor.
`KeyringFile` must never parse the bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from minikms.api.errors import (
    SealedError,
    StandbyError,
    StorageUnavailableError,
    StorageUncertainError,
)
from minikms.custody.replication import Changes, Written
from minikms.keys.keyring import FILE_BYTES_MAX, Body
from minikms.keys.unlocked import UnlockedKeyring
from minikms.platform.files import read_file_bounded, replace_file
from minikms.platform.workers import in_worker

NAME: Final = "keyring.json"


class KeyringFile:
    """Reads and replaces the keyring file. `directory_fd`: the data directory; the caller closes it."""

    def __init__(self, directory_fd: int, executor: Executor) -> None:
        self._directory_fd = directory_fd
        self._executor = executor

    def load(self) -> bytes | None:
        """The bytes of the file, or None if it doesn't exist. Raises StorageUnavailableError if it can't be read."""
        return read_file_bounded(NAME, FILE_BYTES_MAX, dir_fd=self._directory_fd)

    def store_now(self, data: bytes) -> None:
        """Replaces the file; it is durable on return. Blocks on disk I/O. Raises StorageUnavailableError."""
        replace_file(self._directory_fd, NAME, data)

    def store(self, data: bytes, first: Callable[[], None] | None = None) -> asyncio.Future[None]:
        """Calls `first`, then `store_now`, in the executor. Raises the errors of both."""

        def write() -> None:
            if first is not None:
                first()
            self.store_now(data)

        return in_worker(self._executor, write)

    def store_or_know(self, data: bytes) -> asyncio.Future[None]:
        """`store_now` in the executor. Raises StorageUncertainError if the new file may be on the disk, and another
        StorageUnavailableError if the former file is still there.
        """

        def write() -> None:
            try:
                self.store_now(data)
            except StorageUnavailableError as error:
                if self._may_hold(data):
                    raise StorageUncertainError("the disk did not confirm the keyring") from error
                raise

        return in_worker(self._executor, write)

    def _may_hold(self, data: bytes) -> bool:
        """Whether the file has this content, or can't be read."""
        try:
            return self.load() == data
        except StorageUnavailableError:
            return True


class StoredKeyring:
    """The unlocked keyring and its file, which change together."""

    def __init__(self, unlocked: UnlockedKeyring, file: KeyringFile, changes: Changes) -> None:
        self._unlocked = unlocked
        self._file = file
        self.changes = changes
        self._lock = asyncio.Lock()
        self._sealed = False

    def seal(self) -> None:
        """The keys are zeroed: every later change raises SealedError. A file that is being written stays."""
        self._sealed = True

    @property
    def body(self) -> Body:
        """The newest durable body."""
        return self._unlocked.body

    async def change(
        self,
        make: Callable[[Body], Body],
        *,
        first: Callable[[], None] | None = None,
        beside: Callable[[], Written] = Written,
    ) -> Body:
        """Replaces the body by `make(body)`; returns the new body once it is durable.

        `make` runs without a switch to another task. Keys that it makes for a body that is not stored are zeroed, and
        those that the new body no longer has. If it returns the body it was given, nothing is written. If it raises,
        `change` raises the same error and changes nothing. `first` runs in the executor before the file is written: it
        makes durable what the new body relies on, which `beside` returns for the database. If it raises, nothing
        changes. Raises StorageUnavailableError, SealedError, StandbyError.
        """
        async with self._lock:
            self.require_changes()
            try:
                body = make(self.body)
                if body is not self.body:
                    await self._store(body, first, beside())
            finally:
                self._unlocked.settle()
            return body

    @asynccontextmanager
    async def held(self) -> AsyncIterator[Callable[[Body], Awaitable[None]]]:
        """No other change runs inside the block. It gets a function that replaces the body, durable on return. The
        function raises SealedError, StorageUncertainError if the new body may be on disk or in the database, and
        another StorageUnavailableError if it is not. Raises SealedError, StandbyError.
        """
        async with self._lock:
            self.require_changes()
            try:
                yield self._replace
            finally:
                self._unlocked.settle()

    def require_keys(self) -> None:
        if self._sealed:
            raise SealedError("the key service is sealed, so no key is changed")

    def require_changes(self) -> None:
        """Call it before keys are made for the next body: those of a body that is followed may have their versions.
        Raises SealedError, StandbyError.
        """
        self.require_keys()
        self.changes.require_serving()

    async def idle(self) -> None:
        """Returns when the changes that have begun have ended, with the keys that were made for them."""
        async with self._lock:
            return

    async def _replace(self, body: Body) -> None:
        self.require_keys()
        data = self._unlocked.encode(body)
        try:
            await self._write(body, partial(self._file.store_or_know, data), Written(keyring=data))
        except (StorageUnavailableError, StandbyError) as error:
            if self.changes.replication is not None:
                raise StorageUncertainError("the database may have the keyring") from error
            raise
        self.require_keys()

    async def store_again(self) -> None:
        """Writes the newest durable body once more. Raises StorageUnavailableError, SealedError, StandbyError."""
        async with self._lock:
            self.require_keys()
            await self._store(self.body, None, Written())

    async def follow(self, data: bytes, body: Body) -> None:
        """Replaces the body by one that the database has, durably; `data`: its file. Raises as `store_again`."""
        async with self._lock:
            self.require_keys()
            try:
                await self._stored(partial(self._file.store, data), body)
            finally:
                self._unlocked.settle()

    async def _store(self, body: Body, first: Callable[[], None] | None, beside: Written) -> None:
        data = self._unlocked.encode(body)
        await self._write(body, partial(self._file.store, data, first), beside._replace(keyring=data))

    async def _write(self, body: Body, store: Callable[[], asyncio.Future[None]], written: Written) -> None:
        await self.changes.write(written, partial(self._stored, store, body))

    async def _stored(self, store: Callable[[], asyncio.Future[None]], body: Body) -> None:
        """Waits for the write of `body`, then makes it the one in memory."""
        writing = store()
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # The write goes on in its thread. The next change must not begin before its outcome is known.
            await asyncio.wait([writing])
            if not writing.cancelled() and writing.exception() is None:
                self._unlocked.body = body
            raise
        finally:
            del writing  # the traceback of its error leads to this frame
        self._unlocked.body = body
