"""KEK rotation: never a moment in which a crash loses a key.

Owns: the steps below, their order, and resuming. Each step is durable before the next begins.
1. `begin`: the new KEK version is in the keyring as `pending`, and the new root's slot if one is given. From here on
   either root opens a keyring that knows both versions, and creates use the new one.
2. Creates that took the old version have reached the disk; then every file under another version than the new one is
   rewrapped (`custody.rewrapping`), over the whole listing again until one pass finds nothing to do.
3. `promote`: the new version is active, the old one retired.
A restart finds `rotation` in the keyring and goes on with step 2. A file that can't be read is listed and left; it does
not stop the rotation, and keeps its KEK from being destroyed. It must never remove a slot: whether the new root key has
been proved is `minikms.lifecycle`'s to say.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Final, NamedTuple

from minikms.crypto.aead import scrub_stack
from minikms.custody import clock
from minikms.custody.rewrapping import Rewrapping
from minikms.custody.vault import Vault
from minikms.errors import ConflictError, MiniKmsError, StorageUnavailableError
from minikms.keys import keyring
from minikms.memory.arena import SecretSlot, fill_random

RETRY_SECONDS_MIN: Final = 0.25
RETRY_SECONDS_MAX: Final = 5.0
PASSES_MAX: Final = 100


class Begun(NamedTuple):
    """`newly`: false when this very rotation runs or was done already. `slot_id`: of the root key given, or empty."""

    newly: bool
    slot_id: str


class KekRotation:
    """The rotation of this data directory, if one runs. Lives in the loop's thread."""

    def __init__(
        self,
        vault: Vault,
        rewrapping: Rewrapping,
        *,
        together: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """`together` is held around the long part, in which the loop's thread and the workers take turns."""
        self._vault = vault
        self._together = together
        self._rewrapping = rewrapping
        self._starting = asyncio.Lock()
        self.last_error = ""

    @property
    def running(self) -> keyring.Rotation | None:
        return self._vault.keyring.body.rotation

    @property
    def rewrapped(self) -> int:
        """Keys rewrapped by the present rotation, or the last one, in this run."""
        return self._rewrapping.rewrapped

    def status(self) -> dict[str, object] | None:
        """Progress for `/status`; None when no rotation runs."""
        rotation = self.running
        if rotation is None:
            return None
        return {
            "from_version": rotation.from_version,
            "to_version": rotation.to_version,
            "started_at": rotation.started_at,
            "new_root": bool(rotation.slot_id),
            "rewrapped": self.rewrapped,
            "last_error": self.last_error,
        }

    # --- beginning ---------------------------------------------------------------------------------------------------

    async def begin(self, root: SecretSlot | None) -> Begun:
        """Step 1, unless this very rotation runs or was done already; then nothing is changed.

        Raises ConflictError for another rotation meanwhile, or a root key that was rotated away;
        StorageUnavailableError.
        """
        async with self._starting:
            if root is None:
                return await self._begin_without_root()
            body = self._vault.keyring.body
            given = self._vault.unlocked.fingerprint(root.view)
            present = body.slot_for(given)
            if body.rotation is not None:
                if present is not None and present.slot_id == body.rotation.slot_id:
                    return Begun(False, present.slot_id)
                raise ConflictError("another rotation is running; wait for it, see /status")
            if present is not None:
                if present.slot_id == body.slots[-1].slot_id:
                    return Begun(False, present.slot_id)
                raise ConflictError("this root key still opens the keyring but is not the newest; give a fresh one")
            if any(old.fingerprint == given for old in body.retired_roots):
                raise ConflictError("this root key was rotated away before; give a fresh one")
            await self._begin(root)
            return Begun(True, self._vault.keyring.body.slots[-1].slot_id)

    @asynccontextmanager
    async def excluded(self) -> AsyncIterator[None]:
        """No rotation runs or begins inside the block. Raises ConflictError when one runs."""
        async with self._starting:
            if self.running is not None:
                raise ConflictError("a rotation is running; wait for it, see /status")
            yield

    async def _begin_without_root(self) -> Begun:
        rotation = self.running
        if rotation is None:
            await self._begin(None)
            return Begun(True, "")
        if rotation.slot_id:
            raise ConflictError("a rotation to a new root key is running; wait for it, see /status")
        return Begun(False, "")

    async def _begin(self, root: SecretSlot | None) -> None:
        unlocked = self._vault.unlocked
        made: list[int] = []

        def next_body(body: keyring.Body) -> keyring.Body:
            keyring.check_has_room(body, new_root=root is not None)
            now_ns = clock.now_ns()
            at = clock.rfc3339(now_ns)
            added = None
            if root is not None:
                # Named after the epoch that it comes with, so no other slot has this id.
                added = unlocked.make_root(root.view, "request", fill_random, slot_id=f"s{body.epoch + 1}", at=at)
            version = max(kek.version for kek in body.keks) + 1
            made.append(version)
            sealed_under = added.link.version if added else body.key_version
            kek = unlocked.make_kek(fill_random, version=version, state="pending", at=at, key_version=sealed_under)
            scrub_stack()
            return keyring.begin_rotation(body, kek=kek, root=added, stamp=clock.stamp(now_ns), at=at)

        try:
            await self._vault.keyring.change(next_body)
        finally:
            # Whatever became of it: what the body in memory does not know is not kept.
            unlocked.settle()
            for version in made:
                if self._vault.keyring.body.kek(version) is None:
                    unlocked.forget_kek(version)
        self._rewrapping.begin()
        self.last_error = ""

    # --- the long part -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Finishes a rotation that has begun, if there is one; tries a failing disk again until it takes the writes."""
        pause = RETRY_SECONDS_MIN
        while (rotation := self.running) is not None:
            try:
                await self._vault.wraps.drained(rotation.from_version)
                with self._together():
                    await self._rewrap_all(rotation)
                await self._vault.keyring.change(lambda body: keyring.promote(body, at=self._vault.now()))
            except Exception as error:  # noqa: BLE001  a rotation that has begun must end, whatever went wrong
                self.last_error = str(error) if isinstance(error, MiniKmsError) else f"defect: {type(error).__name__}"
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)
                continue
            self.last_error = ""

    async def _rewrap_all(self, rotation: keyring.Rotation) -> None:
        for _ in range(PASSES_MAX):
            if await self._rewrapping.run_pass(rotation) == 0:
                return
        raise StorageUnavailableError("key files under the former KEK version keep appearing")
