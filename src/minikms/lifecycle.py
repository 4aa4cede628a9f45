"""The verbs of a key's life: list, retire, destroy, rotate the KEK, prune.

Owns: who may change keys, and what is told of each change. Invariants as in `minikms.service`: authorise, act, audit;
every change is on disk, and its audit line too, before its answer. A rotation leaves two lines: when it has begun, by
whom, and when it is done. It must never answer while a change is half on disk.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, TypeVar

import msgspec
from msgspec import UNSET

from minikms import api
from minikms.audit import Event
from minikms.base64 import decode_canonical
from minikms.crypto.aead import open_sealed
from minikms.custody.archives import ArchiveRegister
from minikms.custody.indexing import Indexing, read_files
from minikms.custody.rotation import KekRotation
from minikms.custody.vault import Vault
from minikms.errors import (
    AuditUnavailableError,
    ConflictError,
    InvalidRequestError,
    KeyNotFoundError,
    MiniKmsError,
    StartError,
    TooManyError,
)
from minikms.keys import dek, keyring
from minikms.keys.dek import DekRecord
from minikms.keys.ids import check_key_id
from minikms.memory.arena import SecretSlot
from minikms.policy import Principal
from minikms.service import CIPHERTEXT_BYTES_MAX, Audit, Verbs

AUDIT_RETRY_SECONDS: Final = 1.0
SCAN_CHUNK_KEYS: Final = 512

T = TypeVar("T")

_STAMP: Final = re.compile(r"[0-9]{8}T[0-9]{6}", re.ASCII)
_encoder = msgspec.json.Encoder()


class KeyLifecycle(Verbs):
    """`rewrite_root` writes the new root into the key file (`--rewrite-master-key-file`); None: the operator does."""

    def __init__(
        self,
        *,
        vault: Vault,
        audit: Audit,
        rotation: KekRotation,
        indexing: Indexing,
        executor: Executor,
        opened_slot_id: str,
        rewrite_root: Callable[[SecretSlot], None] | None,
    ) -> None:
        super().__init__(vault, audit)
        self._rotation = rotation
        self._indexing = indexing
        self._executor = executor
        self._archives = ArchiveRegister(os.path.dirname(vault.store.directory))
        self._proved_slot_id = opened_slot_id
        self._rewrite_root = rewrite_root
        self._runner: asyncio.Task[None] | None = None
        self.rewrite_failed = False
        """Whether the key file could not be rewritten: then both root keys open the keyring, and status warns."""

    # --- listing -----------------------------------------------------------------------------------------------------

    async def list_keys(
        self, who: Principal, *, thread_id: str | None, state: str | None, cursor: str, limit: int, request_id: str
    ) -> bytes:
        """One page of keys, oldest first. Role: monitor."""
        event = self._event("list_keys", who, request_id)
        try:
            who.require("monitor")
            if state not in (None, "active", "retired"):
                raise InvalidRequestError("state must be active or retired; a destroyed key has no record")
            if cursor:
                check_key_id(cursor)
            page = self._vault.index.page(after=cursor, limit=limit, thread_id=thread_id, state=state)
            keys = await self._in_worker(self._describe_all, page.key_ids)
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        event.count = len(keys)
        await self._audit.add_written(event, durable=False)
        found = [key for key in keys if thread_id is None or key.thread_id == thread_id]
        answer = api.KeyListAnswer(found, page.next_after or None, indexing=not self._indexing.complete)
        return _encoder.encode(answer)

    async def get_key(self, who: Principal, key_id: str, request_id: str) -> bytes:
        """One key. Role: monitor."""
        event = self._event("get_key", who, request_id)
        try:
            who.require("monitor")
            event.key_id = check_key_id(key_id)
            answer = self._describe(self._vault.record(key_id))
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        await self._audit.add_written(event, durable=False)
        return _encoder.encode(answer)

    def _describe_all(self, key_ids: list[str]) -> list[api.KeyAnswer]:
        """For a worker thread; a key that is unreadable or gone since is passed over."""
        found: list[api.KeyAnswer] = []
        for key_id, data in read_files(self._vault.store, key_ids):
            try:
                if isinstance(data, bytes):
                    found.append(self._describe(dek.parse(data, key_id)))
            except MiniKmsError:
                continue
        return found

    def _describe(self, record: DekRecord) -> api.KeyAnswer:
        return api.KeyAnswer(
            key_id=record.id,
            thread_id=record.thread_id,
            purpose=record.purpose,
            state=record.state,
            kek_version=record.kek_version,
            created_at=record.created_at,
            uses_max=self._vault.uses_max(record.id),
        )

    # --- retiring and destroying -------------------------------------------------------------------------------------

    async def retire(self, who: Principal, key_id: str, request_id: str) -> bytes:
        """The key only decrypts from here on; one that is retired already stays so. Role: create."""
        event = self._event("retire_key", who, request_id)
        try:
            who.require("create")
            event.key_id = check_key_id(key_id)
            record = await self._vault.retire(key_id, again=True)
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        event.thread_id = record.thread_id
        await self._audit.add_written(event, durable=True)
        return _encoder.encode(self._describe(record))

    async def destroy(self, who: Principal, key_id: str, request: api.DestroyKeyRequest, request_id: str) -> bytes:
        """The key is gone for good, with its backups; answers a receipt. Role: destroy."""
        event = self._event("destroy_key", who, request_id)
        try:
            who.require("destroy")
            event.key_id = check_key_id(key_id)
            if request.key_id != key_id:
                raise InvalidRequestError("the key id in the body must repeat the one in the path")
            backups_removed = await self._vault.destroy(key_id)
            archives = await self._in_worker(self._archives.may_hold, key_id)
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        event.facts = {"backups_removed": backups_removed}
        await self._audit.add_written(event, durable=True)
        return _encoder.encode(api.DestroyKeyAnswer(key_id, "destroyed", backups_removed, archives))

    # --- the KEK -----------------------------------------------------------------------------------------------------

    async def rotate_kek(
        self, who: Principal, request: api.RotateKekRequest, root: SecretSlot | None, request_id: str
    ) -> tuple[int, bytes]:
        """Rotates the KEK, and to a new root key where one is given; (HTTP status, answer). Role: rotate."""
        event = self._event("rotate_kek", who, request_id)
        samples = [] if request.verify is UNSET else request.verify
        try:
            who.require("rotate")
            self._check_samples(samples)
            begun = await self._begin(root)
            event.detail = "begun" if begun else "running or done already"
            event.facts = {
                "kek_version": self._vault.unlocked.body.wrapping_kek.version,
                "new_root": int(root is not None),
            }
            await self._audit.add_written(event, durable=True)
        except AuditUnavailableError:
            self.ensure_rotating()  # it has begun, and must end
            raise
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        runner = self.ensure_rotating()
        if request.wait is False:
            return 202, self._rotation_answer("running" if self._rotation.running else "ok")
        if runner is not None:
            await asyncio.shield(runner)
        self._check_samples(samples)
        return 200, self._rotation_answer("ok")

    async def _begin(self, root: SecretSlot | None) -> bool:
        begun = await self._rotation.begin(root)
        if root is not None and self._rewrite_root is not None:
            try:
                await self._in_worker(self._rewrite_root, root)
            except (OSError, StartError):
                self.rewrite_failed = True
            else:
                self.rewrite_failed = False
                self._proved_slot_id = self._vault.unlocked.body.slots[-1].slot_id
        return begun

    def ensure_rotating(self) -> asyncio.Task[None] | None:
        """The task that finishes a begun rotation; None when there is none to finish."""
        if self._runner is not None and not self._runner.done():
            return self._runner
        if self._rotation.running is None:
            return None
        self._runner = asyncio.ensure_future(self._run_rotation())
        return self._runner

    async def stop(self) -> None:
        """Interrupts a running rotation between two of its steps; the next start goes on with it."""
        if self._runner is not None and not self._runner.done():
            self._runner.cancel()
            await asyncio.wait([self._runner])

    async def _run_rotation(self) -> None:
        while self._rotation.running is not None:  # again when another one began while the last line was being written
            await self._rotation.run()
            facts: dict[str, str | int] = {
                "kek_version": self._vault.unlocked.body.wrapping_kek.version,
                "rewrapped": self._rotation.rewrapped,
                "unreadable": self._indexing.unreadable_count,
            }
            await self._write_surely("rotate_kek_done", facts)
            await self.drop_proved_slots()

    async def drop_proved_slots(self) -> None:
        """Drops the slots of older root keys, once the newest was proved and no rotation runs."""
        body = self._vault.unlocked.body
        if self._rotation.running is not None or len(body.slots) < 2 or body.slots[-1].slot_id != self._proved_slot_id:
            return
        gone = await self._vault.drop_older_slots(self._proved_slot_id)
        await self._write_surely("root_keys_dropped", {"fingerprints": ",".join(gone)})

    async def _write_surely(self, what: str, facts: dict[str, str | int]) -> None:
        """A line about the daemon's own doing waits until the log can be written; what was done can't be undone."""
        while True:
            try:
                await self._audit.add_written(Event(type=what, actor="minikms", facts=dict(facts)), durable=True)
            except AuditUnavailableError:
                await asyncio.sleep(AUDIT_RETRY_SECONDS)
            else:
                return

    def _rotation_answer(self, status: str) -> bytes:
        version = self._vault.unlocked.body.wrapping_kek.version
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
            open_sealed(opened.view, sealed, opened.record_aad(aad))

    async def prune_keks(self, who: Principal, request: api.PruneKekRequest, request_id: str) -> bytes:
        """Destroys retired KEK versions that no live or backup file names. Role: destroy."""
        event = self._event("prune_kek", who, request_id)
        try:
            who.require("destroy")
            if self._rotation.running is not None:
                raise ConflictError("a rotation is running; wait for it, see /status")
            before = None if request.backups_before is UNSET else _check_stamp(request.backups_before)
            removed = 0
            if before is not None or (request.backups is not UNSET and request.backups):
                removed = await self._in_worker(lambda: self._vault.backups.prune(before=before))
            destroyed, kept = await self._destroy_unused_keks()
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        event.facts = {"backups_removed": removed, "destroyed": ",".join(map(str, destroyed))}
        await self._audit.add_written(event, durable=True)
        return _encoder.encode(api.PruneKekAnswer(destroyed, kept, removed))

    async def _destroy_unused_keks(self) -> tuple[list[int], list[api.KeptKek]]:
        live, live_unreadable = await self._in_worker(self._live_kek_versions)
        kept_in_backups, backups_unreadable = await self._in_worker(self._vault.backups.kek_versions)
        destroyed: list[int] = []
        kept: list[api.KeptKek] = []
        for kek in self._vault.unlocked.body.keks:
            if kek.state != "retired":
                continue
            why = ""
            if kek.version in live:
                why = "a key is wrapped under it; rotate the KEK"
            elif kek.version in kept_in_backups:
                why = "a backup of a key is wrapped under it; prune the backups"
            elif live_unreadable or backups_unreadable:
                why = "a key file or backup can't be read and may need it; see `minikms doctor`"
            if why:
                kept.append(api.KeptKek(kek.version, why))
                continue
            async with self._vault.keyring_change():
                await self._vault.store_body(
                    keyring.destroy_kek(self._vault.unlocked.body, kek.version, at=self._vault.now())
                )
            self._vault.unlocked.forget_kek(kek.version)
            destroyed.append(kek.version)
        return destroyed, kept

    def _live_kek_versions(self) -> tuple[set[int], int]:
        """For a worker thread: the versions that live files are under, and how many files can't be read."""
        versions: set[int] = set()
        unreadable = 0
        for key_id in self._vault.store.list_ids():
            try:
                versions.add(dek.parse(self._vault.store.read(key_id), key_id).kek_version)
            except KeyNotFoundError:
                continue  # destroyed since it was listed
            except MiniKmsError:
                unreadable += 1
        return versions, unreadable

    # --- shared ------------------------------------------------------------------------------------------------------

    async def _in_worker(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(*arguments))


def _check_stamp(text: str) -> str:
    if _STAMP.fullmatch(text) is None:
        raise InvalidRequestError("backups_before must be a stamp such as 20261124T150000 (UTC)")
    return text
