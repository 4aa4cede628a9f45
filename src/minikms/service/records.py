"""One method per verb: authorise, act, audit.

Owns: what each verb does and who may do it. Invariants: every verb that is reached leaves one audit event, refused and
cut off ones too, queued before its answer is returned (the daemon writes the turn's events before the turn's answers
leave); a change of keys is on disk, and its audit line too, before its answer. It must never put key bytes, plaintext
or ciphertext into an event, and never answer after a failure.

A hot verb (`encrypt`, `decrypt` and their batches) answers at once, as ready JSON bytes, or returns an awaitable
where a key's use lease has to reach the disk first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterable, Sequence
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import UNSET, UnsetType

from minikms import api
from minikms.audit import Event
from minikms.base64 import decode_canonical, encode
from minikms.crypto.aead import NONCE_BYTES, OVERHEAD_BYTES, scrub_stack
from minikms.custody.leases import UseLease
from minikms.custody.vault import OpenDek, Vault
from minikms.errors import (
    DecryptionError,
    MiniKmsError,
    StorageUnavailableError,
    TooManyError,
    WrongPurposeError,
)
from minikms.keys.dek import check_key_id
from minikms.policy import Principal
from minikms.service.base import Audit, Verbs

CIPHERTEXT_BYTES_MAX: Final = api.PLAINTEXT_BYTES_MAX + OVERHEAD_BYTES
_DOES_NOT_OPEN: Final = "the ciphertext does not open under this key, thread and aad"

_encoder = msgspec.json.Encoder()


class KeyService(Verbs):
    """The verbs of records: encrypt, decrypt, one or many; re-encrypt and check many."""

    def __init__(self, vault: Vault, audit: Audit) -> None:
        super().__init__(vault, audit)
        self._cached = vault.cache.get
        self._next_nonce = vault.nonces.next

    # --- encrypt and decrypt -----------------------------------------------------------------------------------------

    def encrypt(self, who: Principal, item: api.EncryptItem, request_id: str) -> bytes | Awaitable[bytes]:
        """nonce | ciphertext | tag of one plaintext. Role: encrypt."""
        # The one verb whose every call and lookup was measured: what the others share stands here spelled out.
        if item.request_id is not UNSET:
            request_id = _cut(item.request_id)
        event = Event(type="encrypt", actor=who.actor, pid=who.pid, request_id=request_id)
        try:
            if "encrypt" not in who.roles:
                who.require("encrypt")
            opened = self._cached(item.key_id)
            if opened is None or item.thread_id is not UNSET:
                opened = self._open_for(event, item)
            else:
                event.key_id = item.key_id
            if opened.state != "active":
                opened.check_encrypts()
            plaintext = decode_canonical(item.plaintext, api.PLAINTEXT_BYTES_MAX, "plaintext")
            aad = opened.aad_if_none if item.aad is UNSET else record_aad(opened, item.aad)
            if not opened.lease.take(1):
                return self._encrypt_later(opened, plaintext, aad, event)
            nonce = self._next_nonce()
            cipher = opened.cipher or self._vault.turn_cipher(opened)
            sealed = nonce + cipher.encrypt(nonce, plaintext, aad)
        except MiniKmsError as error:
            self._refused(event, error)
            raise
        self._audit.add(event)
        return b'{"ciphertext":"' + encode(sealed) + b'"}'

    async def _encrypt_later(self, opened: OpenDek, plaintext: bytes, aad: bytes, event: Event) -> bytes:
        """The same once the key's lease is durable. The key is looked up again: it may have been retired meanwhile."""
        try:
            await self._vault.leases.extend([(opened.lease, 1)])
            opened = self._vault.opened(opened.key_id)
            opened.check_encrypts()
            if not opened.lease.take(1):
                raise StorageUnavailableError("the key's uses are being reserved; try again")
            nonce = self._vault.nonces.next()
            sealed = nonce + AESGCM(opened.view).encrypt(nonce, plaintext, aad)
            scrub_stack()  # here: the turn ends at another depth of the stack than a task runs at
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        except asyncio.CancelledError:
            self._cut_off(event)
            raise
        await self._audit.add_written(event, durable=False)
        return b'{"ciphertext":"' + encode(sealed) + b'"}'

    def decrypt(self, who: Principal, item: api.DecryptItem, request_id: str) -> bytes:
        """The plaintext of one ciphertext. Role: decrypt."""
        event = self._event("decrypt", who, chosen_request_id(item.request_id, request_id))
        try:
            who.require("decrypt")
            opened = self._open_for(event, item)
            sealed = _sealed(item.ciphertext)
            aad = record_aad(opened, item.aad)
            plaintext = _decrypt(self._vault.turn_cipher(opened), sealed, aad)
        except MiniKmsError as error:
            self._refused(event, error)
            raise
        self._audit.add(event)
        return b'{"plaintext":"' + encode(plaintext) + b'"}'

    def encrypt_batch(
        self, who: Principal, request: api.EncryptBatchRequest, request_id: str
    ) -> bytes | Awaitable[bytes]:
        """Encrypts each item; a refused item does not stop the others. Role: encrypt, per item."""
        event = self._batch_event("encrypt_batch", who, request.items, request_id)
        counts: dict[str, int] = {}
        for item in request.items:
            counts[item.key_id] = counts.get(item.key_id, 0) + 1
        low = [
            (lease, count) for key_id, count in counts.items() if (lease := self._low_lease(key_id, count)) is not None
        ]
        if low and "encrypt" in who.roles:
            return self._encrypt_batch_later(who, request, event, low)
        answer = self._encrypt_all(who, request, event)
        self._audit.add(event)
        return answer

    async def _encrypt_batch_later(
        self, who: Principal, request: api.EncryptBatchRequest, event: Event, low: list[tuple[UseLease, int]]
    ) -> bytes:
        # If the disk refuses the leases, the items that need them are refused one by one.
        try:
            with contextlib.suppress(StorageUnavailableError):
                await self._vault.leases.extend(low)
        except asyncio.CancelledError:
            self._cut_off(event)
            raise
        answer = self._encrypt_all(who, request, event)
        scrub_stack()
        await self._audit.add_written(event, durable=False)
        return answer

    def _encrypt_all(self, who: Principal, request: api.EncryptBatchRequest, event: Event) -> bytes:
        parts: list[bytes] = []
        failed = 0
        last_key_id = ""
        opened: OpenDek | None = None
        cipher: AESGCM | None = None
        next_nonce = self._vault.nonces.next
        for item in request.items:
            try:
                # One cipher object serves a run of items under one key, and is dropped with this call.
                if opened is None or cipher is None or item.key_id != last_key_id:
                    who.require("encrypt")
                    opened = self._vault.opened(check_key_id(item.key_id))
                    cipher = AESGCM(opened.view)
                    last_key_id = item.key_id
                if item.thread_id is not UNSET:
                    opened.check_thread(item.thread_id)
                opened.check_encrypts()
                plaintext = decode_canonical(item.plaintext, api.PLAINTEXT_BYTES_MAX, "plaintext")
                aad = record_aad(opened, item.aad)
                if not opened.lease.take(1):
                    raise StorageUnavailableError("the key's uses are being reserved; try again")
                nonce = next_nonce()
                parts.append(b'{"ciphertext":"' + encode(nonce + cipher.encrypt(nonce, plaintext, aad)) + b'"}')
            except MiniKmsError as error:
                failed += 1
                parts.append(_item_error(error))
        _count_refused(event, failed)
        return b'{"items":[' + b",".join(parts) + b"]}"

    def decrypt_batch(self, who: Principal, request: api.DecryptBatchRequest, request_id: str) -> bytes:
        """Decrypts each item; a refused item does not stop the others. Role: decrypt, per item."""
        event = self._batch_event("decrypt_batch", who, request.items, request_id)
        parts: list[bytes] = []
        failed = 0
        last_key_id = ""
        opened: OpenDek | None = None
        cipher: AESGCM | None = None
        for item in request.items:
            try:
                if opened is None or cipher is None or item.key_id != last_key_id:
                    who.require("decrypt")
                    opened = self._vault.opened(check_key_id(item.key_id))
                    cipher = AESGCM(opened.view)
                    last_key_id = item.key_id
                if item.thread_id is not UNSET:
                    opened.check_thread(item.thread_id)
                sealed = _sealed(item.ciphertext)
                plaintext = _decrypt(cipher, sealed, record_aad(opened, item.aad))
                parts.append(b'{"plaintext":"' + encode(plaintext) + b'"}')
            except MiniKmsError as error:
                failed += 1
                parts.append(_item_error(error))
        _count_refused(event, failed)
        self._audit.add(event)
        return b'{"items":[' + b",".join(parts) + b"]}"

    def reencrypt_batch(
        self, who: Principal, request: api.ReencryptBatchRequest, request_id: str
    ) -> bytes | Awaitable[bytes]:
        """Moves ciphertexts between keys of one thread; the plaintext never leaves. Roles: decrypt, encrypt."""
        event = self._event("reencrypt_batch", who, request_id)
        event.count = len(request.items)
        try:
            who.require("decrypt")
            who.require("encrypt")
            if len(request.items) > api.BATCH_ITEMS_MAX:
                raise TooManyError(f"a batch holds at most {api.BATCH_ITEMS_MAX} items; send several")
            event.key_ids = [check_key_id(request.from_key_id), check_key_id(request.to_key_id)]
            source = self._vault.record(request.from_key_id)
            target = self._vault.opened(request.to_key_id)
            target.check_thread(source.thread_id)
            if target.purpose != source.purpose:
                raise WrongPurposeError("records move only between keys of one purpose")
            target.check_encrypts()
            if not target.lease.covers(len(request.items)):
                return self._reencrypt_later(target.lease, request, event)
            answer = self._reencrypt_all(request, event)
        except MiniKmsError as error:
            self._refused(event, error)
            raise
        self._audit.add(event)
        return answer

    async def _reencrypt_later(self, lease: UseLease, request: api.ReencryptBatchRequest, event: Event) -> bytes:
        try:
            await self._vault.leases.extend([(lease, len(request.items))])
            self._vault.opened(request.to_key_id).check_encrypts()  # it may have been retired meanwhile
            answer = self._reencrypt_all(request, event)
            scrub_stack()
        except MiniKmsError as error:
            await self._refused_later(event, error)
            raise
        except asyncio.CancelledError:
            self._cut_off(event)
            raise
        await self._audit.add_written(event, durable=False)
        return answer

    def _reencrypt_all(self, request: api.ReencryptBatchRequest, event: Event) -> bytes:
        parts: list[bytes] = []
        failed = 0
        # Opening the second key may put the first out of the cache and zero it, so each cipher is made at once.
        source = self._vault.opened(request.from_key_id)
        opening = AESGCM(source.view)
        target = self._vault.opened(request.to_key_id)
        sealing = AESGCM(target.view)
        for item in request.items:
            try:
                bound = _bound_aad(item.aad)
                plaintext = _decrypt(opening, _sealed(item.ciphertext), source.aad_prefix + bound)
                if not target.lease.take(1):
                    raise StorageUnavailableError("the key's uses are being reserved; try again")
                nonce = self._vault.nonces.next()
                sealed = nonce + sealing.encrypt(nonce, plaintext, target.aad_prefix + bound)
                parts.append(b'{"ciphertext":"' + encode(sealed) + b'"}')
            except MiniKmsError as error:
                failed += 1
                parts.append(_item_error(error))
        _count_refused(event, failed)
        return b'{"items":[' + b",".join(parts) + b"]}"

    def check_batch(self, who: Principal, request: api.CheckBatchRequest, request_id: str) -> bytes:
        """Tells which ciphertexts open under one key, and nothing of what is in them. Role: decrypt."""
        event = self._event("check_batch", who, request_id)
        event.count = len(request.items)
        try:
            who.require("decrypt")
            if len(request.items) > api.BATCH_ITEMS_MAX:
                raise TooManyError(f"a batch holds at most {api.BATCH_ITEMS_MAX} items; send several")
            event.key_ids = [check_key_id(request.key_id)]
            opened = self._vault.opened(request.key_id)
            if request.thread_id is not UNSET:
                opened.check_thread(request.thread_id)
        except MiniKmsError as error:
            self._refused(event, error)
            raise
        refused = _refused_of(request.items, opened)
        _count_refused(event, len(refused))
        self._audit.add(event)
        return _encoder.encode(api.CheckBatchAnswer(len(request.items) - len(refused), refused))

    def malformed(self, verb: str, who: Principal, error: MiniKmsError, request_id: str) -> None:
        """A request that reached a verb, but whose body is not one: it is audited like any other refusal."""
        self._refused(self._event(verb, who, request_id), error)

    # --- shared ------------------------------------------------------------------------------------------------------

    def _open_for(self, event: Event, item: api.EncryptItem | api.DecryptItem) -> OpenDek:
        key_id = item.key_id
        opened = self._vault.cache.get(key_id)
        if opened is None:
            event.key_id = check_key_id(key_id)
            opened = self._vault.opened(key_id)
        else:
            event.key_id = key_id
        if item.thread_id is not UNSET:
            opened.check_thread(item.thread_id)
        return opened

    def _low_lease(self, key_id: str, count: int) -> UseLease | None:
        """The key's lease if it does not cover `count` uses. A key that can't be opened has its error told per item."""
        try:
            lease = self._vault.opened(check_key_id(key_id)).lease
        except MiniKmsError:
            return None
        return None if lease.covers(count) else lease

    def _batch_event(
        self, verb: str, who: Principal, items: Sequence[api.EncryptItem | api.DecryptItem], request_id: str
    ) -> Event:
        event = self._event(verb, who, request_id)
        event.count = len(items)
        if len(items) > api.BATCH_ITEMS_MAX:
            error = TooManyError(f"a batch holds at most {api.BATCH_ITEMS_MAX} items; send several")
            self._refused(event, error)
            raise error
        event.key_ids = _distinct(_cut(item.key_id) for item in items)
        event.request_ids = _distinct(_cut(item.request_id) for item in items if item.request_id is not UNSET)
        return event


def record_aad(opened: OpenDek, aad: str | UnsetType) -> bytes:
    """The record's associated data; an absent aad is an empty one."""
    return opened.aad_if_none if aad is UNSET else opened.aad_prefix + _bound_aad(aad)


def _bound_aad(aad: str | UnsetType) -> bytes:
    """What follows a key's prefix in a record's associated data: the caller's part and its length."""
    caller = b"" if aad is UNSET else decode_canonical(aad, api.AAD_BYTES_MAX, "aad")
    return len(caller).to_bytes(4, "big") + caller


def _sealed(text: str) -> bytes:
    sealed = decode_canonical(text, CIPHERTEXT_BYTES_MAX, "ciphertext")
    if len(sealed) < OVERHEAD_BYTES:
        raise DecryptionError("the ciphertext is too short to hold a nonce and a tag")
    return sealed


def _decrypt(cipher: AESGCM, sealed: bytes, aad: bytes) -> bytes:
    try:
        return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)
    except InvalidTag:
        raise DecryptionError(_DOES_NOT_OPEN) from None


def _refused_of(items: Sequence[api.ReencryptItem], opened: OpenDek) -> list[api.RefusedItemAnswer]:
    """The items that do not open. No plaintext becomes an object: all go into one buffer, which is zeroed."""
    refused: list[api.RefusedItemAnswer] = []
    decrypt_into = AESGCM(opened.view).decrypt_into
    longest = max((len(item.ciphertext) for item in items), default=0)
    scratch = memoryview(bytearray(min(longest, CIPHERTEXT_BYTES_MAX)))
    try:
        for index, item in enumerate(items):
            try:
                sealed = _sealed(item.ciphertext)
                aad = record_aad(opened, item.aad)
                decrypt_into(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad, scratch[: len(sealed) - OVERHEAD_BYTES])
            except InvalidTag:
                refused.append(api.RefusedItemAnswer(index, _DOES_NOT_OPEN, DecryptionError.code))
            except MiniKmsError as error:
                refused.append(api.RefusedItemAnswer(index, str(error), error.code))
    finally:
        scratch[:] = bytes(len(scratch))
    return refused


def _item_error(error: MiniKmsError) -> bytes:
    return _encoder.encode(api.ErrorAnswer(str(error), error.code))


def _count_refused(event: Event, failed: int) -> None:
    if failed:
        event.outcome = "partly_refused"
        event.detail = f"{failed} refused"


def chosen_request_id(given: str | UnsetType, header: str) -> str:
    """The request's own id where it names one, else that of the HTTP header."""
    return header if given is UNSET else _cut(given)


def _cut(text: str) -> str:
    """An id as the audit log may hold it: an invalid one is cut short, so that a stranger can't fill the log."""
    return text if len(text) <= api.ID_CHARS_MAX else text[:32] + "…"


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
