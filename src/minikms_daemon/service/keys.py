"""The verbs that hand out keys: create, find or create, read the wrapped form, data keys, random bytes.

Owns: what each of them answers. Invariant: `generate_data_key` is the only verb whose answer may hold key bytes, at the
caller's request; they are made in the arena, and the answer is not kept. It must never answer a key that a power loss
would remove.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from msgspec import UNSET

from minikms import api
from minikms.api.errors import InvalidRequestError, WrongPurposeError
from minikms.audit import Event
from minikms.custody.vault import Indexing, Vault
from minikms.keys.dek import DekRecord, check_key_id
from minikms.memory.arena import fill_random
from minikms_daemon.service.base import AfterLine, VerbTable
from minikms_daemon.service.records import decode_aad

if TYPE_CHECKING:
    from minikms_daemon.service.access import Keys


class KeyVerbs:
    def __init__(self, vault: Vault, table: VerbTable, indexing: Indexing) -> None:
        self._vault = vault
        self._indexing = indexing
        table.later_on_keys(api.CREATE_DEK, vault, self.create_dek_for_thread, durable=True)
        table.later_on_keys(api.GET_OR_CREATE_DEK, vault, self.get_or_create_dek_for_thread, durable=True)
        table.now_on_keys(api.GET_WRAPPED, vault, self.get_wrapped)
        table.later_on_keys(api.GENERATE_DATA_KEY, vault, self.generate_data_key)
        table.now(api.RANDOM, self.random)

    async def create_dek_for_thread(
        self, keys: Keys, request: api.CreateDekRequest, event: Event
    ) -> AfterLine[api.CreateDekAnswer]:
        """Always a new key, on disk before the answer leaves. Its file is made while its audit line is synced."""
        event.thread_id = _check_thread_id(request.thread_id)
        replaces = "" if request.replaces is UNSET else check_key_id(request.replaces)
        purpose: api.Purpose = "thread" if request.purpose is UNSET else request.purpose
        numbered = request.numbered is True
        if numbered:
            await self._indexing.wait_complete(compared=True)
        record = await keys.create_in_log(request.thread_id, purpose=purpose, replaces=replaces, numbered=numbered)
        event.key_id = record.id
        if replaces:
            event.detail = f"replaces {replaces}"
        return AfterLine(partial(self._create_answer, record))

    async def _create_answer(self, record: DekRecord) -> api.CreateDekAnswer:
        await self._vault.journal.file_written(record.id)
        return api.CreateDekAnswer(record.id, record.wrapped)

    async def get_or_create_dek_for_thread(
        self, keys: Keys, request: api.GetOrCreateDekRequest, event: Event
    ) -> api.GetOrCreateDekAnswer:
        """The same key for every caller until it is retired. Audited as `create_dek` when it makes one."""
        event.thread_id = _check_thread_id(request.thread_id)
        purpose: api.Purpose = "thread" if request.purpose is UNSET else request.purpose
        await self._indexing.wait_complete()
        event.key_id, created = await keys.get_or_create(request.thread_id, purpose=purpose)
        if created:
            event.type = api.CREATE_DEK.name
        return api.GetOrCreateDekAnswer(event.key_id, created)

    def get_wrapped(self, keys: Keys, request: api.KeyRequest, event: Event) -> api.WrappedAnswer:
        """The wrapped DEK as it is on disk."""
        event.key_id = check_key_id(request.key_id)
        return api.WrappedAnswer(keys.record(request.key_id).wrapped)

    async def generate_data_key(
        self, keys: Keys, request: api.GenerateDataKeyRequest, event: Event
    ) -> api.DataKeyAnswer:
        """32 random bytes sealed under a key of purpose `data`, and in the clear unless the request says not."""
        event.key_id = check_key_id(request.key_id)
        opened = keys.opened(request.key_id)
        if opened.purpose not in ("data", "derived"):
            raise WrongPurposeError("data keys are made under keys of purpose data or derived")
        opened.check_encrypts()
        aad = opened.record_aad(decode_aad(request.aad))
        with self._vault.arena.allocate() as slot:
            fill_random(slot.view)
            sealed = opened.seal(slot.view, aad)
            answer = api.DataKeyAnswer(request.key_id, sealed)
            if request.plaintext is UNSET or request.plaintext:
                answer.plaintext = bytes(slot.view)
        return answer

    def random(self, request: api.RandomRequest, event: Event) -> api.RandomAnswer:
        """Bytes from the kernel's generator."""
        if not 1 <= request.count <= api.RANDOM_BYTES_MAX:
            raise InvalidRequestError(f"count must be from 1 to {api.RANDOM_BYTES_MAX}")
        event.count = request.count
        return api.RandomAnswer(os.urandom(request.count))


def _check_thread_id(text: str) -> str:
    """The text itself. Raises InvalidRequestError, which does not repeat it."""
    if api.THREAD_ID_PATTERN.fullmatch(text) is None:
        raise InvalidRequestError("thread_id must be 1 to 128 characters of A-Z, a-z, 0-9, '.', '_' and '-'")
    return text
