"""The verbs that hand out keys: create, read the wrapped form, data keys, random bytes.

Owns: what each of them answers. Invariant: `generate_data_key` is the only verb whose answer may hold key bytes, at the
caller's request; they are made in the arena, and the answer is not kept. It must never answer a key whose file is not
on disk.
"""

from __future__ import annotations

import os

from msgspec import UNSET

from minikms import api
from minikms.audit import Event
from minikms.crypto.aead import scrub_stack, seal
from minikms.custody.vault import Vault
from minikms.errors import InvalidRequestError, StorageUnavailableError, WrongPurposeError
from minikms.keys.dek import check_key_id
from minikms.memory.arena import fill_random
from minikms.service.base import VerbTable
from minikms.service.records import decode_aad


class KeyVerbs:
    def __init__(self, vault: Vault, table: VerbTable) -> None:
        self._vault = vault
        table.later(api.CREATE_DEK, self.create_dek_for_thread, durable=True)
        table.now(api.GET_WRAPPED, self.get_wrapped)
        table.later(api.GENERATE_DATA_KEY, self.generate_data_key)
        table.now(api.RANDOM, self.random)

    async def create_dek_for_thread(self, request: api.CreateDekRequest, event: Event) -> api.CreateDekAnswer:
        """Always a new key, on disk before the answer leaves."""
        if api.THREAD_ID_PATTERN.fullmatch(request.thread_id) is None:
            raise InvalidRequestError("thread_id must be 1 to 128 characters of A-Z, a-z, 0-9, '.', '_' and '-'")
        event.thread_id = request.thread_id
        replaces = "" if request.replaces is UNSET else check_key_id(request.replaces)
        purpose: api.Purpose = "thread" if request.purpose is UNSET else request.purpose
        record = await self._vault.create(request.thread_id, purpose=purpose, replaces=replaces)
        event.key_id = record.id
        if replaces:
            event.detail = f"replaces {replaces}"
        return api.CreateDekAnswer(record.id, record.wrapped)

    def get_wrapped(self, request: api.KeyRequest, event: Event) -> api.WrappedAnswer:
        """The wrapped DEK as it is on disk."""
        event.key_id = check_key_id(request.key_id)
        return api.WrappedAnswer(self._vault.record(request.key_id).wrapped)

    async def generate_data_key(self, request: api.GenerateDataKeyRequest, event: Event) -> api.DataKeyAnswer:
        """32 random bytes sealed under a key of purpose `data`, and in the clear unless the request says not."""
        event.key_id = check_key_id(request.key_id)
        opened = self._vault.opened(request.key_id)
        if opened.purpose != "data":
            raise WrongPurposeError("data keys are made under keys of purpose data; this key is a thread's")
        opened.check_encrypts()
        aad = opened.record_aad(decode_aad(request.aad))
        if not opened.lease.covers(1):
            await self._vault.leases.extend([(opened.lease, 1)])
            opened = self._vault.opened(request.key_id)
            opened.check_encrypts()
        if not opened.lease.take(1):
            raise StorageUnavailableError("the key's uses are being reserved; try again")
        with self._vault.arena.allocate() as made:
            fill_random(made.view)
            sealed = seal(opened.view, self._vault.nonces.next(), made.view, aad)
            scrub_stack()
            answer = api.DataKeyAnswer(request.key_id, sealed)
            if request.plaintext is UNSET or request.plaintext:
                answer.plaintext = bytes(made.view)
        return answer

    def random(self, request: api.RandomRequest, event: Event) -> api.RandomAnswer:
        """Bytes from the kernel's generator."""
        if not 1 <= request.count <= api.RANDOM_BYTES_MAX:
            raise InvalidRequestError(f"count must be from 1 to {api.RANDOM_BYTES_MAX}")
        event.count = request.count
        return api.RandomAnswer(os.urandom(request.count))
