"""How many keys each KEK version has wrapped, and which creates are under way under it.

Owns: the reservation of wraps in the keyring (a KEK's nonces are random, so their number is bounded: NIST SP 800-38D
section 8.3), and the count of creates that have taken a version but not reached the disk. Invariants: no wrap is made
that a durable reservation does not cover, so a crash may waste wraps but never forget one; whoever waits in `drained`
sees every create that took the version before. Lives in the loop's thread. It must never choose an older version than
the one that the keyring says to wrap under.
"""

from __future__ import annotations

import asyncio

from minikms.custody import clock
from minikms.custody.keyringkeeper import KeyringKeeper
from minikms.errors import KeyExhaustedError
from minikms.keys import keyring


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
            return keyring.reserve_wraps(body, version, reserved, at=clock.rfc3339(clock.now_ns()))

        await self._keeper.change(reserve)
        self._left[version] = self._left.get(version, 0) + reserved
