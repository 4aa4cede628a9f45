"""The file `keyring.json`, its changes while the daemon runs, and the reservation of wraps in it.

Owns: the bounded read and the durable replacement of the file; the order of the keyring's changes; the number of
reserved and unused wraps of each KEK version; the number of DEK creations in progress under each KEK version.
Invariants:
- The old file stays until the new one is on disk. Changes run one at a time, each from the newest body. The body in
  memory is the newest durable one: a change takes effect in both or in neither, even if its caller is cancelled.
- No wrap is made without a durable reservation. So a crash may waste reserved wraps, but each wrap that was made is
  counted. KEK nonces are random, so the number of wraps is bounded (NIST SP 800-38D, section 8.3).
- New DEKs are wrapped under the keyring's current wrapping KEK, never under an older version.

`StoredKeyring` and `WrapReservation` run in the event loop's thread; only the file I/O runs in an executor.
`KeyringFile` must never parse the bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from minikms.custody.files import now_rfc3339, read_file_bounded, replace_file
from minikms.errors import KeyExhaustedError, StartError, StorageUnavailableError
from minikms.keys import keyring
from minikms.keys.keyring import FILE_BYTES_MAX, Body
from minikms.keys.unlocked import UnlockedKeyring

NAME: Final = "keyring.json"


class KeyringFile:
    """Reads and replaces the keyring file. `directory_fd`: the data directory; the caller closes it."""

    def __init__(self, directory_fd: int, executor: Executor) -> None:
        self._directory_fd = directory_fd
        self._executor = executor

    def load(self) -> bytes | None:
        """The bytes of the file, or None if it doesn't exist. Raises StartError if it can't be read."""
        try:
            return read_file_bounded(NAME, FILE_BYTES_MAX, dir_fd=self._directory_fd)
        except StorageUnavailableError as error:
            raise StartError(f"keyring.json can't be read: {error}") from None

    def store_now(self, data: bytes) -> None:
        """Replaces the file; it is durable on return. Blocks on disk I/O. Raises StorageUnavailableError."""
        replace_file(self._directory_fd, NAME, data)

    async def store(self, data: bytes) -> None:
        """`store_now` in the executor."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self.store_now, data)


class StoredKeyring:
    """The unlocked keyring and its file, which change together."""

    def __init__(self, unlocked: UnlockedKeyring, file: KeyringFile) -> None:
        self._unlocked = unlocked
        self._file = file
        self._lock = asyncio.Lock()

    @property
    def body(self) -> Body:
        """The newest durable body."""
        return self._unlocked.body

    async def change(self, make: Callable[[Body], Body]) -> Body:
        """Replaces the body by `make(body)`; returns the new body once it is durable.

        `make` runs without a switch to another task. If it returns the body it was given, nothing is written. If it
        raises, `change` raises the same error and changes nothing. Raises StorageUnavailableError.
        """
        async with self._lock:
            body = make(self.body)
            if body is not self.body:
                await self._store(body)
            return body

    async def _store(self, body: Body) -> None:
        writing = asyncio.ensure_future(self._file.store(self._unlocked.encode(body)))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # The write goes on in its thread. The next change must not begin before its outcome is known.
            await asyncio.wait([writing])
            if not writing.cancelled() and writing.exception() is None:
                self._unlocked.body = body
            raise
        self._unlocked.body = body


class WrapReservation:
    """Counts the reserved and unused wraps, and the DEK creations in progress, of each KEK version."""

    def __init__(self, stored: StoredKeyring) -> None:
        self._stored = stored
        self._left: dict[int, int] = {}
        self._creating: dict[int, int] = {}
        self._idle: dict[
            int, asyncio.Future[None]
        ] = {}  # by version: resolved when no creation is in progress under it

    async def begin_create(self) -> int:
        """Takes one wrap for a new DEK and returns the KEK version. The caller must call `end_create` in every case.

        The caller must wrap the DEK before it awaits anything. Raises KeyExhaustedError, StorageUnavailableError.
        """
        while True:
            version = self._stored.body.wrapping_kek.version
            if self._left.get(version, 0) > 0:
                self._left[version] -= 1
                self._creating[version] = self._creating.get(version, 0) + 1
                return version
            await self._reserve(version, 1)

    def end_create(self, version: int) -> None:
        """Ends a creation that took `version`: its DEK is on disk, or it failed."""
        self._creating[version] -= 1
        if not self._creating[version]:
            del self._creating[version]
            if (idle := self._idle.pop(version, None)) is not None:
                idle.set_result(None)

    async def creates_done(self, version: int) -> None:
        """Waits until no creation that took `version` is in progress."""
        while self._creating.get(version, 0):
            idle = self._idle.setdefault(version, asyncio.get_running_loop().create_future())
            await asyncio.shield(idle)

    async def take(self, version: int, count: int) -> None:
        """Takes `count` wraps of a version, at most KEK_WRAPS_LEASE. Raises the errors of `begin_create`."""
        if not 0 <= count <= keyring.KEK_WRAPS_LEASE:
            raise ValueError("more wraps than are reserved at a time")
        while self._left.get(version, 0) < count:
            await self._reserve(version, count)
        self._left[version] = self._left.get(version, 0) - count

    async def _reserve(self, version: int, count: int) -> None:
        """Reserves KEK_WRAPS_LEASE more wraps, durably, unless another caller has just done so."""
        reserved = 0

        def reserve(body: Body) -> Body:
            nonlocal reserved
            if self._left.get(version, 0) >= count:
                return body
            kek = body.kek(version)
            if kek is None or kek.wraps_reserved > keyring.KEK_WRAPS_MAX:
                raise KeyExhaustedError("the KEK has reached its limit of wrapped keys; rotate the KEK")
            reserved = keyring.KEK_WRAPS_LEASE
            return keyring.reserve_wraps(body, version, reserved, at=now_rfc3339())

        await self._stored.change(reserve)
        self._left[version] = self._left.get(version, 0) + reserved
