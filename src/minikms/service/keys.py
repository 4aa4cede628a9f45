"""The verbs that give something out: keys, wrapped keys, data keys, random bytes, the status.

Owns: what is answered for each. Invariants as in `minikms.service`: authorise, act, audit. The one verb whose answer
holds key bytes is `generate_data_key`, at the caller's request; they are made in the arena, and the answer is not
kept. It must never answer a key whose file is not on disk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import msgspec
from msgspec import UNSET

from minikms import api
from minikms.crypto.aead import scrub_stack, seal
from minikms.custody.vault import Vault
from minikms.errors import InvalidRequestError, MiniKmsError, StorageUnavailableError, WrongPurposeError
from minikms.keys.dek import check_key_id
from minikms.memory.arena import fill_random
from minikms.policy import Principal
from minikms.service.base import Audit, Verbs
from minikms.service.records import chosen_request_id, record_aad

_encoder = msgspec.json.Encoder()


class KeyIssuing(Verbs):
    def __init__(self, vault: Vault, audit: Audit, status: Callable[[], dict[str, object]]) -> None:
        super().__init__(vault, audit)
        self._status = status

    async def create_dek_for_thread(self, who: Principal, request: api.CreateDekRequest, request_id: str) -> bytes:
        """Always a new key, on disk before the answer leaves. Role: create."""
        event = self._event("create_dek", who, chosen_request_id(request.request_id, request_id))
        try:
            who.require("create")
            event.thread_id = _check_thread_id(request.thread_id)
            replaces = "" if request.replaces is UNSET else check_key_id(request.replaces)
            purpose: api.Purpose = "thread" if request.purpose is UNSET else request.purpose
            self._audit.require_writable()
            record = await self._vault.create(request.thread_id, purpose=purpose, replaces=replaces)
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        except asyncio.CancelledError:
            self._cut_off(event)
            raise
        event.key_id = record.id
        if replaces:
            event.detail = f"replaces {replaces}"
        await self._audit.add_written(event, durable=True)
        return _encoder.encode(api.CreateDekAnswer(record.id, record.wrapped))

    def get_wrapped(self, who: Principal, key_id: str, request_id: str) -> bytes:
        """The wrapped DEK as it is on disk. Role: decrypt."""
        event = self._event("get_wrapped", who, request_id)
        try:
            who.require("decrypt")
            event.key_id = check_key_id(key_id)
            record = self._vault.record(key_id)
        except MiniKmsError as error:
            self._refused(event, error)
            raise
        self._audit.add(event)
        return _encoder.encode(api.WrappedAnswer(record.wrapped))

    async def generate_data_key(self, who: Principal, request: api.GenerateDataKeyRequest, request_id: str) -> bytes:
        """32 random bytes sealed under a key of purpose `data`, and in the clear unless refused. Role: data_key."""
        event = self._event("generate_data_key", who, request_id)
        try:
            who.require("data_key")
            event.key_id = check_key_id(request.key_id)
            opened = self._vault.opened(request.key_id)
            if opened.purpose != "data":
                raise WrongPurposeError("data keys are made under keys of purpose data; this key is a thread's")
            opened.check_encrypts()
            aad = record_aad(opened, request.aad)
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
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        except asyncio.CancelledError:
            self._cut_off(event)
            raise
        await self._audit.add_written(event, durable=False)
        return _encoder.encode(answer)

    def random(self, who: Principal, request: api.RandomRequest, request_id: str) -> bytes:
        """Bytes from the kernel's generator. Role: data_key."""
        event = self._event("random", who, request_id)
        try:
            who.require("data_key")
            if not 1 <= request.count <= api.RANDOM_BYTES_MAX:
                raise InvalidRequestError(f"count must be from 1 to {api.RANDOM_BYTES_MAX}")
        except MiniKmsError as error:
            self._refused(event, error)
            raise
        event.count = request.count
        self._audit.add(event)
        return _encoder.encode(api.RandomAnswer(os.urandom(request.count)))

    def status(self, who: Principal, request_id: str) -> bytes:
        """What an operator needs to know. Role: monitor."""
        return _encoder.encode(self._monitored("status", who, request_id))

    def metrics(self, who: Principal, request_id: str) -> dict[str, object]:
        """The status, for a page of metrics. Role: monitor."""
        return self._monitored("metrics", who, request_id)

    def _monitored(self, verb: str, who: Principal, request_id: str) -> dict[str, object]:
        event = self._event(verb, who, request_id)
        try:
            who.require("monitor")
        except MiniKmsError as error:
            self._refused(event, error)
            raise
        self._audit.add(event)
        return self._status()


def _check_thread_id(thread_id: str) -> str:
    if api.THREAD_ID_PATTERN.fullmatch(thread_id) is None:
        raise InvalidRequestError("thread_id must be 1 to 128 characters of A-Z, a-z, 0-9, '.', '_' and '-'")
    return thread_id
