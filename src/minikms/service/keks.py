"""The verbs of the KEK: rotate, prune; and the rotation as the daemon's own doing.

Owns: who may rotate, what is told of it, the task that finishes a rotation that has begun, and when the older root
keys' slots go. Invariants as in `minikms.service`: authorise, act, audit. A rotation leaves two lines: when it has
begun, by whom, and when it is done; once begun it goes on, whoever asked and whatever fails, and a restart resumes it.
An older root key opens the keyring until the newest was proved: by a start under it, or by a rewritten key file that
was read back. It must never answer `ok` before every readable key is under the new version.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from msgspec import UNSET

from minikms import api
from minikms.audit import Event
from minikms.base64 import decode_canonical
from minikms.crypto.aead import open_sealed, scrub_stack
from minikms.custody.rotation import KekRotation, Pruning
from minikms.custody.vault import Vault
from minikms.errors import AuditUnavailableError, InvalidRequestError, MiniKmsError, TooManyError
from minikms.keys.dek import check_key_id
from minikms.memory.arena import SecretSlot
from minikms.policy import Principal
from minikms.service.base import Audit, Verbs
from minikms.service.records import CIPHERTEXT_BYTES_MAX

AUDIT_RETRY_SECONDS: Final = 1.0
ROTATIONS_KEPT: Final = 5
"""Of how many rotations the backups are kept."""

RootRewriter = Callable[[SecretSlot], Awaitable[None]]

_STAMP: Final = re.compile(r"[0-9]{8}T[0-9]{6}", re.ASCII)
_encoder = msgspec.json.Encoder()


class KekVerbs(Verbs):
    """`opened_slot_id`: the slot under which this run was started. `rewrite_root` writes a new root key into the key
    file (`--rewrite-master-key-file`); None: the operator does.
    """

    def __init__(
        self,
        *,
        vault: Vault,
        audit: Audit,
        rotation: KekRotation,
        pruning: Pruning,
        opened_slot_id: str,
        rewrite_root: RootRewriter | None = None,
        rotations_kept: int = ROTATIONS_KEPT,
    ) -> None:
        super().__init__(vault, audit)
        self._rotation = rotation
        self._pruning = pruning
        self._proved_slot_id = opened_slot_id
        self._rewrite_root = rewrite_root
        self._rotations_kept = rotations_kept
        self._runner: asyncio.Task[None] | None = None
        self._ends: dict[int, asyncio.Future[None]] = {}
        """By KEK version: resolved once the rotation to it is done, and its line was tried to be written."""
        self._stopping = False
        self.rewrite_failed = False
        """Whether the key file could not be rewritten: then both root keys open the keyring, and status warns."""

    async def rotate_kek(
        self, who: Principal, request: api.RotateKekRequest, root: SecretSlot | None, request_id: str
    ) -> tuple[int, bytes]:
        """Rotates the KEK, and to a new root key where one is given; (HTTP status, answer). Role: rotate."""
        event = self._event("rotate_kek", who, request_id)
        samples = [] if request.verify is UNSET else request.verify
        try:
            who.require("rotate")
            self._audit.require_writable()
            self._check_samples(samples)
            begun = await self._rotation.begin(root)
            end = self._end_of_rotation()
            try:
                if root is not None:
                    await self._rewrite_key_file(root, begun.slot_id)
            finally:
                self.ensure_running()
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        except asyncio.CancelledError:
            self._cut_off(event)
            raise
        event.detail = "begun" if begun.newly else "running or done already"
        event.facts = self._facts(new_root=int(root is not None))
        await self._audit.add_written(event, durable=True)
        if end is None:
            await self.drop_older_roots()
        elif request.wait is False:
            return 202, self._answer("running")
        else:
            await asyncio.shield(end)
        try:
            self._check_samples(samples)
        except MiniKmsError as error:
            after = self._event("rotate_kek", who, request_id)
            after.detail = "a sample that opened before the rotation does not open after it"
            await self._refused_later(after, error)
            raise
        return 200, self._answer("ok")

    def ensure_running(self) -> None:
        """Sees to it that a rotation that has begun is being finished."""
        idle = self._runner is None or self._runner.done()
        if idle and self._rotation.running is not None and not self._stopping:
            self._runner = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """Interrupts a running rotation between two of its steps; the next start goes on with it."""
        self._stopping = True
        if self._runner is not None and not self._runner.done():
            self._runner.cancel()
            await asyncio.wait([self._runner])
        for end in self._ends.values():
            end.cancel()

    def _end_of_rotation(self) -> asyncio.Future[None] | None:
        """Resolved when the rotation that runs now is done; None when none does."""
        rotation = self._rotation.running
        if rotation is None:
            return None
        return self._ends.setdefault(rotation.to_version, asyncio.get_running_loop().create_future())

    async def _run(self) -> None:
        while (rotation := self._rotation.running) is not None:
            await self._rotation.run()
            facts = self._facts(rewrapped=self._rotation.rewrapped, unreadable=self._vault.unreadable.count)
            await self._write_surely("rotate_kek_done", facts, end=self._ends.pop(rotation.to_version, None))
            with contextlib.suppress(MiniKmsError):  # the next rotation tries again
                await self._pruning.keep_rotations(self._rotations_kept)
            await self.drop_older_roots()

    async def drop_older_roots(self) -> None:
        """Drops the slots of older root keys, once the newest was proved and no rotation runs."""
        slots = self._vault.keyring.body.slots
        if self._rotation.running is not None or len(slots) < 2 or slots[-1].slot_id != self._proved_slot_id:
            return
        try:
            gone = await self._rotation.drop_older_slots(self._proved_slot_id)
        except MiniKmsError:
            return  # status warns that they are there; the next start tries again
        await self._write_surely("root_keys_dropped", self._facts(fingerprints=",".join(gone)))

    async def _rewrite_key_file(self, root: SecretSlot, slot_id: str) -> None:
        if self._rewrite_root is None:
            return
        try:
            await self._rewrite_root(root)
        except (OSError, MiniKmsError):
            self.rewrite_failed = True
        else:
            self.rewrite_failed = False
            self._proved_slot_id = slot_id

    async def _write_surely(
        self, what: str, facts: dict[str, str | int], *, end: asyncio.Future[None] | None = None
    ) -> None:
        """A line about the daemon's own doing waits until the log can be written; what was done can't be undone.

        Who waits for `end` waits for the first attempt only: then the answer fails as long as the log does.
        """
        written = False
        while not written:
            try:
                await self._audit.add_written(Event(type=what, actor="minikms", facts=dict(facts)), durable=True)
                written = True
            except AuditUnavailableError:
                await asyncio.sleep(AUDIT_RETRY_SECONDS)
            if end is not None and not end.done():
                end.set_result(None)

    def _facts(self, **facts: str | int) -> dict[str, str | int]:
        body = self._vault.keyring.body
        return {"epoch": body.epoch, "kek_version": body.wrapping_kek.version, **facts}

    def _answer(self, status: str) -> bytes:
        version = self._vault.keyring.body.wrapping_kek.version
        return _encoder.encode({"status": status, "kek_version": version, "rewrapped": self._rotation.rewrapped})

    def _check_samples(self, samples: list[api.VerifySample]) -> None:
        """Decrypts each sample with a key read anew from its file. Raises what is wrong with the first that doesn't
        open.
        """
        if len(samples) > api.VERIFY_SAMPLES_MAX:
            raise TooManyError(f"verify takes at most {api.VERIFY_SAMPLES_MAX} samples")
        for sample in samples:
            self._vault.cache.drop(check_key_id(sample.key_id))
            opened = self._vault.opened(sample.key_id)
            sealed = decode_canonical(sample.ciphertext, CIPHERTEXT_BYTES_MAX, "ciphertext")
            aad = b"" if sample.aad is UNSET else decode_canonical(sample.aad, api.AAD_BYTES_MAX, "aad")
            try:
                open_sealed(opened.view, sealed, opened.record_aad(aad))
            finally:
                scrub_stack()

    async def prune_keks(self, who: Principal, request: api.PruneKekRequest, request_id: str) -> bytes:
        """Destroys retired KEK versions that no live or backup file needs. Role: destroy."""
        event = self._event("prune_kek", who, request_id)
        try:
            who.require("destroy")
            before = None if request.backups_before is UNSET else _check_stamp(request.backups_before)
            backups = before is not None or (request.backups is not UNSET and request.backups)
            begun = self._event("prune_kek", who, request_id)
            begun.detail = "begun"
            async with self._rotation.excluded():
                await self._audit.add_written(begun, durable=True)
                answer = await self._pruned(backups, before, event)
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        except asyncio.CancelledError:
            self._cut_off(event)
            raise
        event.facts = {
            "backups_removed": answer.backups_removed,
            "destroyed": ",".join(map(str, answer.destroyed)),
            "epoch": self._vault.keyring.body.epoch,
        }
        await self._audit.add_written(event, durable=True)
        return _encoder.encode(answer)

    async def _pruned(self, backups: bool, before: str | None, event: Event) -> api.PruneKekAnswer:
        try:
            return await self._pruning.prune(backups=backups, before=before)
        except MiniKmsError:
            # Some may be destroyed all the same: the log tells the epoch, so that no older keyring passes.
            event.facts = {"epoch": self._vault.keyring.body.epoch}
            raise


def _check_stamp(text: str) -> str:
    if _STAMP.fullmatch(text) is None:
        raise InvalidRequestError("backups_before must be a stamp such as 20261124T150000 (UTC)")
    return text
