"""The keyring file.

Owns: `keyring.json`: reading it bounded, replacing it durably. Invariants: the old content stays until the new one
is on disk under its name; one write at a time. It must never parse what it carries.

The keyring in memory and its file, changed together.

Owns: the order of the keyring's changes. Invariants: one change at a time; the body in memory is the newest that is
durable, and a change that was begun ends in both or in neither, also when its caller is cancelled. Lives in the loop's
thread; only the wait for the disk runs elsewhere. It must never write a body that was made from an older one.

How many keys each KEK version has wrapped, and which creates are under way under it.

Owns: the reservation of wraps in the keyring (a KEK's nonces are random, so their number is bounded: NIST SP 800-38D
section 8.3), and the count of creates that have taken a version but not reached the disk. Invariants: no wrap is made
that a durable reservation does not cover, so a crash may waste wraps but never forget one; whoever waits in `drained`
sees every create that took the version before. Lives in the loop's thread. It must never choose an older version than
the one that the keyring says to wrap under.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from minikms.custody import files
from minikms.custody.files import read_file_bounded, replace_file
from minikms.errors import KeyExhaustedError, StartError, StorageUnavailableError
from minikms.keys import keyring
from minikms.keys.keyring import FILE_BYTES_MAX, Body
from minikms.keys.unlocked import UnlockedKeyring

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


class KeyringKeeper:
    def __init__(self, unlocked: UnlockedKeyring, file: KeyringFile) -> None:
        self.unlocked = unlocked
        self._file = file
        self._lock = asyncio.Lock()

    @property
    def body(self) -> Body:
        return self.unlocked.body

    async def change(self, make: Callable[[Body], Body]) -> Body:
        """Makes the next body from the present one, in one step of the loop, and returns it once it is durable.

        `make` may return the body it was given: then there is nothing to do. What it raises passes through, and nothing
        has changed then. Raises StorageUnavailableError.
        """
        async with self._lock:
            body = make(self.body)
            if body is not self.body:
                await self._store(body)
            return body

    async def _store(self, body: Body) -> None:
        writing = asyncio.ensure_future(self._file.store(self.unlocked.encode(body)))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # The write goes on in its thread; the next change must not begin before it is known how it ended.
            await asyncio.wait([writing])
            if not writing.cancelled() and writing.exception() is None:
                self.unlocked.body = body
            raise
        self.unlocked.body = body


class KekWraps:
    def __init__(self, keeper: KeyringKeeper) -> None:
        self._keeper = keeper
        self._left: dict[int, int] = {}
        self._creating: dict[int, int] = {}
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def begin_create(self) -> int:
        """The KEK version to wrap a new DEK under, with one wrap of it. Followed by `end_create`, whatever happens.

        The caller seals before it awaits anything. Raises KeyExhaustedError, StorageUnavailableError.
        """
        while True:
            version = self._keeper.body.wrapping_kek.version
            if self._left.get(version, 0) > 0:
                self._left[version] -= 1
                self._creating[version] = self._creating.get(version, 0) + 1
                return version
            await self._reserve(version, 1)

    def end_create(self, version: int) -> None:
        """The create that took `version` is on disk, or has failed."""
        self._creating[version] -= 1
        if not self._creating[version]:
            del self._creating[version]
            for waiting_for, done in self._waiting:
                if waiting_for == version and not done.done():
                    done.set_result(None)
            self._waiting = [entry for entry in self._waiting if not entry[1].done()]

    async def drained(self, version: int) -> None:
        """Returns when no create that took `version` is still on its way to disk."""
        while self._creating.get(version, 0):
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((version, done))
            await done

    async def take(self, version: int, count: int) -> None:
        """Takes `count` wraps of a version, at most KEK_WRAPS_LEASE. Raises as `begin_create`."""
        if not 0 <= count <= keyring.KEK_WRAPS_LEASE:
            raise ValueError("more wraps than are reserved at a time")
        while self._left.get(version, 0) < count:
            await self._reserve(version, count)
        self._left[version] = self._left.get(version, 0) - count

    async def _reserve(self, version: int, count: int) -> None:
        """Extends the wraps that may be made under a version, durably, unless another caller just has."""
        reserved = 0

        def reserve(body: keyring.Body) -> keyring.Body:
            nonlocal reserved
            if self._left.get(version, 0) >= count:
                return body
            kek = body.kek(version)
            if kek is None or kek.wraps_reserved > keyring.KEK_WRAPS_MAX:
                raise KeyExhaustedError("the KEK has wrapped as many keys as it may; rotate the KEK")
            reserved = keyring.KEK_WRAPS_LEASE
            return keyring.reserve_wraps(body, version, reserved, at=files.rfc3339(files.now_ns()))

        await self._keeper.change(reserve)
        self._left[version] = self._left.get(version, 0) + reserved
