"""The verbs of a key's life: list, read, retire, destroy.

Owns: what each of them answers and records. Invariants: a change is on disk before its audit line is written, and the
line before the answer. A destruction leaves two audit lines, one before it begins, because it can't be undone. If the
disk fails halfway, the daemon completes it and writes a third one. It must never answer while a change is half on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING

from msgspec import UNSET

from minikms import api
from minikms.api.errors import AuditUnavailableError, InvalidRequestError, KmsRefusedError
from minikms.audit import Event
from minikms.audit.record import DETAIL_CHARS_MAX, Facts, escape
from minikms.custody.destruction import Destroyed
from minikms.custody.vault import REMOVAL_RETRY_SECONDS, Indexing, Vault
from minikms.keys import dek
from minikms.keys.dek import DekRecord, check_key_id
from minikms.platform.clock import rfc3339
from minikms.platform.workers import in_worker
from minikms_daemon.service.base import AUDIT_RETRY_SECONDS, VerbTable, another_line

if TYPE_CHECKING:
    from minikms_daemon.service.access import Keys


class LifecycleVerbs:
    """`reader` runs the reading of files for listings."""

    def __init__(self, *, vault: Vault, table: VerbTable, indexing: Indexing, reader: Executor) -> None:
        self._vault = vault
        self._audit = table.audit
        self._indexing = indexing
        self._reader = reader
        table.later_on_keys(api.LIST_KEYS, vault, self.list_keys)
        table.now_on_keys(api.GET_KEY, vault, self.get_key)
        table.later_on_keys(api.RETIRE_KEY, vault, self.retire, durable=True)
        table.later_on_keys(api.DESTROY_KEY, vault, self.destroy, durable=True)

    async def list_keys(self, keys: Keys, request: api.ListKeysRequest, event: Event) -> api.KeyListAnswer:
        """One page of keys, oldest first."""
        thread_id, state = (None if value is UNSET else value for value in (request.thread_id, request.state))
        cursor = "" if request.cursor is UNSET else request.cursor
        limit = api.LIST_KEYS_COUNT_DEFAULT if request.limit is UNSET else request.limit
        if state not in (None, "active", "retired"):
            raise InvalidRequestError("state must be active or retired; a destroyed key has no record")
        if not 1 <= limit <= api.LIST_KEYS_COUNT_MAX:
            raise InvalidRequestError(f"limit must be a number from 1 to {api.LIST_KEYS_COUNT_MAX}")
        indexing = not self._indexing.complete  # with the page: the index may become complete while the files are read
        page = keys.page(after=cursor, limit=limit, thread_id=thread_id, state=state)
        described = await in_worker(self._reader, partial(self._describe_all, page.key_ids))
        of_thread = [key for key in described if thread_id is None or key.thread_id == thread_id]
        # By the policy in force now, and the threads in the files.
        visible = [key for key in of_thread if keys.allows_thread(key.thread_id)]
        event.count = len(visible)
        return api.KeyListAnswer(visible, page.next_after or None, indexing=indexing)

    def get_key(self, keys: Keys, request: api.KeyRequest, event: Event) -> api.KeyAnswer:
        event.key_id = check_key_id(request.key_id)
        return self._describe(keys.record(request.key_id))

    def _describe_all(self, key_ids: list[str]) -> list[api.KeyAnswer]:
        """For a worker thread. Skips a key that is unreadable or was destroyed meanwhile."""
        answers: list[api.KeyAnswer] = []
        for key_id, data in self._vault.store.read_many(key_ids):
            try:
                if isinstance(data, bytes):
                    answers.append(self._describe(dek.parse(data, key_id)))
            except KmsRefusedError:
                continue
        return answers

    def _describe(self, record: DekRecord) -> api.KeyAnswer:
        return api.KeyAnswer(
            key_id=record.id,
            thread_id=record.thread_id,
            purpose=record.purpose,
            state=record.state,
            kek_version=record.kek_version,
            created_at=record.created_at,
            number=record.number,
        )

    async def retire(self, keys: Keys, request: api.KeyRequest, event: Event) -> api.KeyAnswer:
        """From here on the key only decrypts; a retired key stays as it is."""
        event.key_id = check_key_id(request.key_id)
        record = await keys.retire(request.key_id, again=True)
        event.thread_id = record.thread_id
        return self._describe(record)

    async def destroy(self, keys: Keys, request: api.DestroyKeyRequest, event: Event) -> api.DestroyKeyAnswer:
        """Destroys the key and its backups permanently; answers a receipt."""
        key_id = event.key_id = check_key_id(request.key_id)
        keys.check_destroyable(key_id, None if request.thread_id is UNSET else request.thread_id)
        await self._audit.add_written(another_line(event, "begun"), durable=True)
        try:
            done = await keys.destroy(key_id)
        except KmsRefusedError:
            # The tombstone may be on disk even then. With its epoch in the log, no older keyring is accepted.
            event.facts = {"epoch": self._vault.keyring.body.epoch}
            raise
        event.facts, (backups, archives, stone) = self._receipt(done), done
        at, epoch = rfc3339(stone.unix_s * 1_000_000_000), self._vault.keyring.body.epoch
        return api.DestroyKeyAnswer(key_id, "destroyed", backups, archives, at, epoch, stone.number, stone.tag.hex())

    def _receipt(self, done: Destroyed) -> Facts:
        """The facts of a line that is a receipt. The log signs it (`minikms.audit.receipt`)."""
        return {
            "archives": _named(done.archives),
            "backups_removed": done.backups,
            "destroyed_at": done.tombstone.unix_s,
            "epoch": self._vault.keyring.body.epoch,
            "tombstone": done.tombstone.number,
            "tombstone_tag": done.tombstone.tag.hex(),
        }

    async def complete_destructions(self) -> None:
        """Tries again, until it is cancelled, what the disk refused after a key's tombstone was written."""
        while True:
            await asyncio.sleep(REMOVAL_RETRY_SECONDS)
            await self._vault.changes.serving()
            for key_id in sorted(self._vault.unfinished_destructions):
                if key_id not in self._vault.unfinished_destructions:
                    continue  # a request completed it
                with contextlib.suppress(KmsRefusedError):
                    self._audit.require_writable()
                    await self._write_completed(key_id, await self._vault.destroy(key_id))

    async def _write_completed(self, key_id: str, done: Destroyed) -> None:
        """Tries again until the log can be written: the line is the only one that says that the bytes are removed."""
        while True:
            event = Event(type=api.DESTROY_KEY.name, actor="minikms", key_id=key_id, detail="completed")
            event.facts = self._receipt(done)
            try:
                await self._audit.add_written(event, durable=True)
            except AuditUnavailableError:
                await asyncio.sleep(AUDIT_RETRY_SECONDS)
            else:
                return


def _named(archives: Sequence[str]) -> str:
    """The paths that one fact of an audit line holds, and the number of the others."""
    room = DETAIL_CHARS_MAX - len(f"and {len(archives)} more")
    named: list[str] = []
    for path in archives:
        room -= len(escape(path, DETAIL_CHARS_MAX)) + len(", ")
        if room < 0:
            return ", ".join([*named, f"and {len(archives) - len(named)} more"])
        named.append(path)
    return ", ".join(named)
