"""The verbs of the KEK, rotate and prune; and the task that finishes a rotation.

Owns: what the two verbs answer and record, the task that finishes a rotation which has begun, and when the slots of
older root keys are dropped. Invariants: a rotation leaves two audit lines, one when it has begun, with the caller, and
one when it is done. Once begun it goes on, whatever becomes of the request, and a restart resumes it. An older root key
opens the keyring until the newest was proved: by a start under it, or by a rewritten key file that was read back. It
must never answer `ok` before every readable key is under the new version.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Literal

from msgspec import UNSET

from minikms import api
from minikms.audit import Event
from minikms.base64 import decode_canonical
from minikms.crypto.aead import open_sealed, scrub_stack
from minikms.custody.rotation import KekRotation, Pruning
from minikms.custody.vault import Vault
from minikms.errors import AuditUnavailableError, InvalidRequestError, MiniKmsError, TooManyError
from minikms.http import Response
from minikms.keys.dek import check_key_id
from minikms.memory.arena import SecretSlot
from minikms.service.base import AfterLine, VerbTable, another_line, json_answer
from minikms.service.records import CIPHERTEXT_BYTES_MAX, decode_aad

AUDIT_RETRY_SECONDS: Final = 1.0
ROTATIONS_KEPT: Final = 5
"""The backups of so many rotations are kept."""

RootRewriter = Callable[[SecretSlot], Awaitable[None]]

_STAMP: Final = re.compile(r"[0-9]{8}T[0-9]{6}", re.ASCII)


class RotateToRoot(api.RotateKekRequest):
    """A request whose new root key was taken out of the body into the arena. The caller releases `root`."""

    root: SecretSlot | None = None


class KekVerbs:
    """`opened_slot_id`: the slot under which this run was started. `rewrite_root` writes a new root key into the key
    file (`--rewrite-master-key-file`); None: the operator does.
    """

    def __init__(
        self,
        *,
        vault: Vault,
        table: VerbTable,
        rotation: KekRotation,
        pruning: Pruning,
        opened_slot_id: str,
        rewrite_root: RootRewriter | None = None,
        rotations_kept: int = ROTATIONS_KEPT,
    ) -> None:
        self._vault = vault
        self._audit = table.audit
        self._rotation = rotation
        self._pruning = pruning
        self._proved_slot_id = opened_slot_id
        self._rewrite_root = rewrite_root
        self._rotations_kept = rotations_kept
        self._runner: asyncio.Task[None] | None = None
        self._ends: dict[int, asyncio.Future[None]] = {}
        """By KEK version: resolved when the rotation to it is done and the first attempt to write its line was made."""
        self._stopping = False
        self.rewrite_failed = False
        """The key file could not be rewritten: both root keys open the keyring, and status warns."""
        table.later(api.ROTATE_KEK, self.rotate_kek, durable=True)
        table.later(api.PRUNE_KEK, self.prune_keks, durable=True)

    async def rotate_kek(self, request: api.RotateKekRequest, event: Event) -> AfterLine[api.RotateKekAnswer]:
        """Rotates the KEK, and to a new root key where one is given. Answers 202 if the rotation is not waited for."""
        root = request.root if isinstance(request, RotateToRoot) else None
        samples = [] if request.verify is UNSET else request.verify
        self._check_samples(samples)
        begun = await self._rotation.begin(root)
        end = self._end_of_rotation()
        try:
            if root is not None:
                await self._rewrite_key_file(root, begun.slot_id)
        finally:
            self.ensure_running()
        event.detail = "begun" if begun.newly else "running or done already"
        event.facts = self._facts(new_root=int(root is not None))
        return AfterLine(partial(self._wait_for_rotation, end, samples, wait=request.wait is not False, event=event))

    async def _wait_for_rotation(
        self, end: asyncio.Future[None] | None, samples: list[api.VerifySample], *, wait: bool, event: Event
    ) -> api.RotateKekAnswer | Response:
        if end is None:
            await self.drop_older_roots()
        elif wait:
            await asyncio.shield(end)
        else:
            return Response(202, json_answer(self._answer("running")))
        try:
            self._check_samples(samples)
        except MiniKmsError as error:
            failed = another_line(event, "a sample that opened before the rotation does not open after it")
            failed.outcome = error.code
            await self._audit.add_written(failed, durable=False)
            raise
        return self._answer("ok")

    def ensure_running(self) -> None:
        """Starts the task that finishes a rotation which has begun, unless it runs."""
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
            await self._write_until_done("rotate_kek_done", facts, end=self._ends.pop(rotation.to_version, None))
            with contextlib.suppress(MiniKmsError):  # the next rotation tries again
                await self._pruning.keep_rotations(self._rotations_kept)
            await self.drop_older_roots()

    async def drop_older_roots(self) -> None:
        """Drops the slots of older root keys, once the newest was proved and no rotation runs."""
        slots = self._vault.keyring.body.slots
        if self._rotation.running is not None or len(slots) < 2 or slots[-1].slot_id != self._proved_slot_id:
            return
        try:
            dropped = await self._rotation.drop_older_slots(self._proved_slot_id)
        except MiniKmsError:
            return  # status warns of them; the next start tries again
        await self._write_until_done("root_keys_dropped", self._facts(fingerprints=",".join(dropped)))

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

    async def _write_until_done(
        self, what: str, facts: dict[str, str | int], *, end: asyncio.Future[None] | None = None
    ) -> None:
        """Writes a line about what the daemon did by itself, and tries again until the log can be written.

        `end` is resolved after the first attempt: while the log can't be written, the answer to who waits fails.
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

    def _answer(self, status: Literal["ok", "running"]) -> api.RotateKekAnswer:
        version = self._vault.keyring.body.wrapping_kek.version
        return api.RotateKekAnswer(status, version, self._rotation.rewrapped)

    def _check_samples(self, samples: list[api.VerifySample]) -> None:
        """Decrypts each sample with a key that is read again from its file. Raises the error of the first that does not
        open.
        """
        if len(samples) > api.VERIFY_SAMPLES_MAX:
            raise TooManyError(f"verify takes at most {api.VERIFY_SAMPLES_MAX} samples; send fewer")
        for sample in samples:
            self._vault.cache.drop(check_key_id(sample.key_id))
            opened = self._vault.opened(sample.key_id)
            sealed = decode_canonical(sample.ciphertext, CIPHERTEXT_BYTES_MAX, "ciphertext")
            aad = opened.record_aad(decode_aad(sample.aad))
            try:
                open_sealed(opened.view, sealed, aad)
            finally:
                scrub_stack()

    async def prune_keks(self, request: api.PruneKekRequest, event: Event) -> api.PruneKekAnswer:
        """Destroys retired KEK versions that no live or backup file needs."""
        before = None if request.backups_before is UNSET else _check_stamp(request.backups_before)
        backups = before is not None or (request.backups is not UNSET and request.backups)
        async with self._rotation.excluded():
            await self._audit.add_written(another_line(event, "begun"), durable=True)
            try:
                answer = await self._pruning.prune(backups=backups, before=before)
            except MiniKmsError:
                # Some may be destroyed all the same. With the epoch in the log, no older keyring is accepted.
                event.facts = {"epoch": self._vault.keyring.body.epoch}
                raise
        event.facts = {
            "backups_removed": answer.backups_removed,
            "destroyed": ",".join(map(str, answer.destroyed)),
            "epoch": self._vault.keyring.body.epoch,
        }
        return answer


def _check_stamp(text: str) -> str:
    if _STAMP.fullmatch(text) is None:
        raise InvalidRequestError("backups_before must be a stamp such as 20261124T150000 (UTC)")
    return text
