"""The verbs of the KEK, rotate and prune; and the task that finishes a rotation.

Owns: what the two verbs answer and record, the task that finishes a rotation which has begun, the rotation that follows
the removal of a root key, and when a root key that was replaced is removed. Invariants: a rotation leaves two audit
lines, one when it has begun, with the caller, and one when it is done. Once begun it goes on, whatever becomes of the
request, and a restart resumes it. A root key that is to be replaced opens the keyring until the new one was proved: by
a start under it, or by a rewritten key file that was read back. After a removal the KEK is rotated until no removed
root key could ever open the one in use. It must never answer `ok` before every readable key is under the new version.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from msgspec import UNSET

from minikms import api
from minikms.api.base64 import decode_canonical
from minikms.api.errors import (
    AuditUnavailableError,
    InvalidRequestError,
    KmsRefusedError,
    StandbyError,
    StorageUnavailableError,
    TooManyError,
    WrongSlotError,
)
from minikms.audit import Event
from minikms.custody.vault import Vault
from minikms.http import Response
from minikms.keys import root_slots
from minikms.keys.dek import check_key_id
from minikms.keys.keyring import Body, Rotation
from minikms.memory.arena import SecretSlot
from minikms.platform.clock import now_rfc3339
from minikms.roots.pin import PinFile
from minikms.roots.providers import REPLACEABLE
from minikms_daemon.rotation import KekRotation, Pruning
from minikms_daemon.service.base import AUDIT_RETRY_SECONDS, AfterLine, VerbTable, another_line
from minikms_daemon.service.encoding import json_answer
from minikms_daemon.service.records import CIPHERTEXT_BYTES_MAX, decode_aad
from minikms_daemon.service.root_removal import RootRemoval

if TYPE_CHECKING:
    from minikms_daemon.service.access import Keys

REVOCATION_RETRY_SECONDS: Final = 5.0
REVOCATION_RETRY_SECONDS_MAX: Final = 300.0
ROTATIONS_KEPT: Final = 5
"""Number of the newest rotations whose backups are kept."""

RootRewriter = Callable[[SecretSlot], Awaitable[None]]

_STAMP: Final = re.compile(r"[0-9]{8}T[0-9]{6}", re.ASCII)


class RotateToRoot(api.RotateKekRequest):
    """A request whose new root key was taken out of the body into the arena. The caller releases `root`."""

    root: SecretSlot | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class KekVerbs:
    """`proved_slot_id`: the slot of the root key that the next start will use, which is that of this run or of the
    rewritten file; empty if this run was opened by a root key that the next start may not have. `rewrite_root` writes a
    new root key into the key file (`--rewrite-master-key-file`); None: the operator does. `removal` removes a root key
    that was replaced. `pin` names the root keys that may be added.
    """

    vault: Vault
    table: VerbTable
    rotation: KekRotation
    pruning: Pruning
    removal: RootRemoval
    proved_slot_id: str
    rewrite_root: RootRewriter | None = None
    pin: PinFile | None = None

    def __post_init__(self) -> None:
        self._audit = self.table.audit
        self._runner: asyncio.Task[None] | None = None
        self._ends: dict[int, asyncio.Future[None]] = {}
        """The end of the rotation to each KEK version: resolved when it is finished, or done while the log can't be
        written.
        """
        self._end: asyncio.Future[None] | None = None
        """The end of the rotation that is done and not yet finished."""
        self.finishing: Rotation | None = None
        """The rotation that runs, until also the root keys that it replaces are removed."""
        self._stopping = False
        self._writing_owed = asyncio.Lock()
        self.rewrite_failed = False
        """The key file could not be rewritten: both root keys open the keyring, and status warns."""
        self.replacing_error = ""
        """Why a root key that was replaced could not be removed; empty when it could."""
        self.revocation_error = ""
        """Why the rotation after a removal can't begin, or what keeps the revocation from its end; else empty."""
        self._asked = asyncio.Event()
        """Set when something may have begun or is due, while the runner waits for keys that can't be read."""
        self.table.later_on_keys(api.ROTATE_KEK, self.vault, self.rotate_kek, durable=True)
        self.table.later_on_keys(api.PRUNE_KEK, self.vault, self.prune_keks, durable=True)

    async def rotate_kek(
        self, keys: Keys, request: api.RotateKekRequest, event: Event
    ) -> AfterLine[api.RotateKekAnswer]:
        """Rotates the KEK, and to a new root key where one is given. Answers 202 if the rotation is not waited for."""
        root = request.root if isinstance(request, RotateToRoot) else None
        samples = [] if request.verify is UNSET else request.verify
        self._check_samples(keys, samples)
        if root is not None and self.pin is not None:
            self.pin.check_new(root.view)

        def check(body: Body) -> None:
            keys.refresh()
            if root is not None:
                self._check_replaceable(body)

        rotation = await self.rotation.begin(root, replaces=self.proved_slot_id, check=check)
        if request.priority is not UNSET:
            self.rotation.priority = request.priority
        version = self.vault.keyring.body.wrapping_kek.version  # before the KEK rotation that a removal asks for
        end = self._end_of_rotation()
        try:
            if root is not None:
                await self._rewrite_key_file(root, rotation.slot_id)
        finally:
            self.ensure_running()
        event.detail = "begun" if rotation.newly else "running or done already"
        event.facts = self._facts(new_root=int(root is not None))
        wait = request.wait is not False
        return AfterLine(partial(self._wait_for_rotation, end, version, keys, samples, wait=wait, event=event))

    async def _wait_for_rotation(
        self,
        end: asyncio.Future[None] | None,
        version: int,
        keys: Keys,
        samples: list[api.VerifySample],
        *,
        wait: bool,
        event: Event,
    ) -> api.RotateKekAnswer | Response:
        """`end`: of the rotation to KEK `version`; None if it was done before."""
        if end is None:
            await self.drop_replaced_roots()
        elif wait:
            try:
                await asyncio.shield(end)
            finally:
                del end  # the traceback of its error leads to this frame
        else:
            return Response(202, json_answer(self._answer("running", version)))
        try:
            self._check_samples(keys, samples)
        except KmsRefusedError as error:
            failed = another_line(event, "a sample that opened before the rotation does not open after it")
            failed.outcome = error.code
            await self._audit.add_written(failed, durable=False)
            raise
        return self._answer("ok", version)

    def progress(self) -> dict[str, Any] | None:
        """The rotation that runs, until also the root keys that it replaces are removed; or one that follows the
        removal of a root key and has not begun; None if there is neither. For `/status`.
        """
        rotation = self.rotation.running or self.finishing
        if rotation is not None:
            return self.rotation.progress(rotation)
        body = self.vault.keyring.body
        if not body.revocation_due or self.revocation_error:
            return None
        from_version, to_version = body.wrapping_kek.version, max(kek.version for kek in body.keks) + 1
        due = Rotation(from_version, to_version, started_at=body.revoking[-1].removed_at, stamp="")
        return {**self.rotation.progress(due), "rewrapped": 0, "last_error": ""}

    def ensure_running(self) -> None:
        """Starts the task that finishes a rotation which has begun or is due, unless it runs."""
        idle = self._runner is None or self._runner.done()
        body = self.vault.keyring.body
        due = body.rotation is not None or bool(body.revoking) or any(root_slots.OwedLines.of(body))
        self._asked.set()
        if idle and due and not self._stopping:
            self._runner = asyncio.ensure_future(self._run())

    def interrupt(self) -> None:
        """Nothing of a running rotation begins from now on; the next start or unseal goes on with it. Idempotent: the
        runner is cancelled once.
        """
        if not self._stopping and self._runner is not None:
            self._runner.cancel()
        self._stopping = True

    def resume(self) -> None:
        """After `stop`: a rotation may go on, once `ensure_running` is called."""
        self._ends.clear()
        self._stopping = False

    async def stop(self) -> None:
        """Interrupts a running rotation between two of its steps; the next start goes on with it."""
        self.interrupt()
        if self._runner is not None and not self._runner.done():
            await asyncio.wait([self._runner])
        for end in self._ends.values():
            end.cancel()

    def _end_of_rotation(self) -> asyncio.Future[None] | None:
        """Resolved when the rotation that runs now is done; None when none does."""
        rotation = self.rotation.running
        if rotation is None:
            return None
        return self._ends.setdefault(rotation.to_version, asyncio.get_running_loop().create_future())

    async def _run(self) -> None:
        await self._write_owed_lines()
        try:
            while (rotation := await self._running_or_due()) is not None:
                self.finishing = rotation
                await self.rotation.run()
                facts = self._facts(rewrapped=self.rotation.rewrapped, unreadable=self.vault.unreadable.count)
                self._end = self._ends.get(rotation.to_version)
                await self._write_until_done("rotate_kek_done", facts)
                await self._write_owed_lines()
                with contextlib.suppress(KmsRefusedError):  # the next rotation tries again
                    await self.pruning.keep_rotations(ROTATIONS_KEPT)
                await self.drop_replaced_roots()
                self._resolve_end()
                self._ends.pop(rotation.to_version, None)
        finally:
            self.finishing = None

    async def _running_or_due(self) -> Rotation | None:
        """The rotation that runs. It begins one where a removed root key could still open the KEK in use, and ends a
        revocation that unreadable keys have kept open.
        """
        pause = REVOCATION_RETRY_SECONDS
        while (rotation := await self._running_or_begun()) is None and self.vault.keyring.body.revoking:
            self._asked.clear()
            self.finishing = None
            try:
                await self.rotation.end_revocation()
                unread = self.rotation.unread
                reason = f"{unread} keys can't be read, and may be under a former KEK version" if unread else ""
            except KmsRefusedError as error:
                reason = str(error)
            self.revocation_error = reason
            await self._write_owed_lines()
            if reason:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._asked.wait()
                pause = min(2 * pause, REVOCATION_RETRY_SECONDS_MAX)
        return rotation

    async def _running_or_begun(self) -> Rotation | None:
        while self.rotation.running is None and self.vault.keyring.body.revocation_due:
            try:
                rotation = await self.rotation.begin(None)
            except KmsRefusedError as error:
                self.revocation_error = f"its KEK rotation can't begin: {error}"
                self.finishing = None
                await asyncio.sleep(REVOCATION_RETRY_SECONDS)
                continue
            if rotation.newly:
                await self._write_until_done(
                    "rotate_kek", self._facts(new_root=0), detail="begun: a root key was removed"
                )
        if self.rotation.running is not None:
            self.revocation_error = ""
        return self.rotation.running

    async def drop_replaced_roots(self) -> None:
        """Removes the root keys that a proved one replaces, once no rotation runs."""
        proved = self.proved_slot_id
        if self.rotation.running is not None or not root_slots.replaced_by(self.vault.keyring.body, proved):
            return
        try:
            await self.removal.remove(lambda body: root_slots.replaced_by(body, proved), proved=proved)
        except KmsRefusedError as error:
            self.replacing_error = str(error)  # the next start tries again, and so does the next rotation
        else:
            self.replacing_error = ""
        self.ensure_running()
        await self._write_owed_lines()

    async def _write_owed_lines(self) -> None:
        """Writes the lines about root keys that the keyring says are owed. After a crash some may be written twice."""
        async with self._writing_owed:
            owed = root_slots.OwedLines.of(self.vault.keyring.body)
            for what, fingerprints in (("root_keys_dropped", owed.dropped), ("root_removed", owed.removed)):
                if fingerprints:
                    await self._write_until_done(what, self._facts(fingerprints=",".join(sorted(fingerprints))))
            if any(owed):
                with contextlib.suppress(StorageUnavailableError, StandbyError):  # then they are written once more
                    await self.vault.keyring.change(lambda body: owed.written(body, at=now_rfc3339()))

    def _check_replaceable(self, body: Body) -> None:
        """Checks that a new root key can replace the one of this run. Raises WrongSlotError."""
        if not self.proved_slot_id:
            raise WrongSlotError(
                "the daemon was unsealed with a root key that was given to it, so it does not know which one its next "
                "start uses: seal it and unseal it from its source first, or add the new root key with POST /roots and "
                "remove the old one"
            )
        slot = body.slot(self.proved_slot_id)
        if slot is None:
            raise WrongSlotError(
                "the root key under which the daemon was started was removed, so none can replace it; add the new one "
                "with POST /roots"
            )
        if slot.provider not in REPLACEABLE:
            raise WrongSlotError(
                f"the daemon was started under a root key of provider {slot.provider}, which a key in a request does "
                "not replace; add the new root key with POST /roots, and remove the old one"
            )

    async def _rewrite_key_file(self, root: SecretSlot, slot_id: str) -> None:
        if self.rewrite_root is None:
            return
        try:
            await self.rewrite_root(root)
        except (OSError, KmsRefusedError):
            self.rewrite_failed = True
        else:
            self.rewrite_failed = False
            self.proved_slot_id = slot_id

    async def _write_until_done(self, what: str, facts: dict[str, str | int], *, detail: str = "") -> None:
        """Writes a line about what the daemon did by itself, and tries again until the log can be written.

        When an attempt fails, the requests that wait for the rotation wait no longer: while the log can't be written,
        their answers fail.
        """
        written = False
        while not written:
            try:
                event = Event(type=what, actor="minikms", detail=detail, facts=dict(facts))
                await self._audit.add_written(event, durable=True)
                written = True
            except AuditUnavailableError:
                self._resolve_end()
                await asyncio.sleep(AUDIT_RETRY_SECONDS)

    def _resolve_end(self) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_result(None)
        self._end = None

    def _facts(self, **facts: str | int) -> dict[str, str | int]:
        body = self.vault.keyring.body
        return {"epoch": body.epoch, "kek_version": body.wrapping_kek.version, **facts}

    def _answer(self, status: Literal["ok", "running"], version: int) -> api.RotateKekAnswer:
        return api.RotateKekAnswer(status, version, self.rotation.rewrapped)

    def _check_samples(self, keys: Keys, samples: list[api.VerifySample]) -> None:
        """Decrypts each sample with a key that is read again from its file. Raises the error of the first that does not
        open. It asks a caller that a policy limits for the rights of CHECK_BATCH, which tells the same.
        """
        if len(samples) > api.VERIFY_SAMPLES_MAX:
            raise TooManyError(f"verify takes at most {api.VERIFY_SAMPLES_MAX} samples; send fewer")
        if samples:
            keys = keys.of_verb(api.CHECK_BATCH)
        for sample in samples:
            self.vault.cache.drop(check_key_id(sample.key_id))
            opened = keys.opened(sample.key_id)
            sealed = decode_canonical(sample.ciphertext, CIPHERTEXT_BYTES_MAX, "ciphertext")
            aad = opened.record_aad(decode_aad(sample.aad))
            opened.open(sealed, aad)

    async def prune_keks(self, keys: Keys, request: api.PruneKekRequest, event: Event) -> api.PruneKekAnswer:
        """Destroys retired KEK versions that no live or backup file needs. That concerns the keys of all threads."""
        permit = keys.permit_all_threads
        permit()
        before = None if request.backups_before is UNSET else _check_stamp(request.backups_before)
        backups = before is not None or (request.backups is not UNSET and request.backups)
        async with self.rotation.excluded():
            permit()
            await self._audit.add_written(another_line(event, "begun"), durable=True)
            try:
                answer = await self.pruning.prune(backups=backups, before=before, permit=permit)
            except KmsRefusedError:
                # Some may be destroyed even then. With the epoch in the log, no older keyring is accepted.
                event.facts = {"epoch": self.vault.keyring.body.epoch}
                raise
        event.facts = {
            "backups_removed": answer.backups_removed,
            "destroyed": ",".join(map(str, answer.destroyed)),
            "epoch": self.vault.keyring.body.epoch,
        }
        return answer


def _check_stamp(text: str) -> str:
    if _STAMP.fullmatch(text) is None:
        raise InvalidRequestError("backups_before must be a stamp such as 20261124T150000 (UTC)")
    return text
