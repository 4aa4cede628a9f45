"""The verbs of a key's life: list, retire, destroy.

Owns: who may change keys, and what is told of each change. Invariants as in `minikms.service`: authorise, act, audit;
every change is on disk, and its audit line too, before its answer. A destruction leaves two lines, one before it
begins, for it can't be undone. It must never answer while a change is half on disk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

import msgspec

from minikms import api
from minikms.audit import Event
from minikms.custody.backup.register import ArchiveRegister
from minikms.custody.vault import Indexing, Vault
from minikms.errors import InvalidRequestError, MiniKmsError
from minikms.keys import dek
from minikms.keys.dek import DekRecord, check_key_id, key_id_to_bytes
from minikms.policy import Principal
from minikms.service.base import Audit, Verbs

A = TypeVar("A")
T = TypeVar("T")

_encoder = msgspec.json.Encoder()


class KeyLifecycle(Verbs):
    """`reader` is where files are read for listings."""

    def __init__(self, *, vault: Vault, audit: Audit, indexing: Indexing, reader: Executor) -> None:
        super().__init__(vault, audit)
        self._indexing = indexing
        self._reader = reader
        self._archives = ArchiveRegister(os.path.dirname(vault.store.directory))

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
            keys = await self._in_reader(self._describe_all, page.key_ids)
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        except asyncio.CancelledError:
            self._cut_off(event)
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
        except asyncio.CancelledError:
            self._cut_off(event)
            raise
        await self._audit.add_written(event, durable=False)
        return _encoder.encode(answer)

    def _describe_all(self, key_ids: list[str]) -> list[api.KeyAnswer]:
        """For a worker thread; a key that is unreadable or gone since is passed over."""
        found: list[api.KeyAnswer] = []
        for key_id, data in self._vault.store.read_many(key_ids):
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
            uses_max=self._vault.leases.uses_max(key_id_to_bytes(record.id)),
        )

    # --- retiring and destroying -------------------------------------------------------------------------------------

    async def retire(self, who: Principal, key_id: str, request_id: str) -> bytes:
        """The key only decrypts from here on; one that is retired already stays so. Role: create."""
        event = self._event("retire_key", who, request_id)
        try:
            who.require("create")
            event.key_id = check_key_id(key_id)
            self._audit.require_writable()
            record = await self._vault.retire(key_id, again=True)
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        except asyncio.CancelledError:
            self._cut_off(event)
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
            self._vault.check_destroyable(key_id)
            await self._audit.add_written(self._begun(event), durable=True)
            backups_removed = await self._destroyed(key_id, event)
            archives = await self._in_reader(self._archives.may_hold, key_id)
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        except asyncio.CancelledError:
            self._cut_off(event)
            raise
        event.facts = {"backups_removed": backups_removed, "epoch": self._vault.keyring.body.epoch}
        await self._audit.add_written(event, durable=True)
        return _encoder.encode(api.DestroyKeyAnswer(key_id, "destroyed", backups_removed, archives))

    async def _destroyed(self, key_id: str, event: Event) -> int:
        try:
            return await self._vault.destroy(key_id)
        except MiniKmsError:
            # The tombstone may be on disk all the same: the log tells its epoch, so that no older keyring passes.
            event.facts = {"epoch": self._vault.keyring.body.epoch}
            raise

    async def _in_reader(self, work: Callable[[A], T], argument: A) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reader, work, argument)

    def _begun(self, event: Event) -> Event:
        return Event(
            type=event.type,
            actor=event.actor,
            pid=event.pid,
            key_id=event.key_id,
            request_id=event.request_id,
            detail="begun",
        )
