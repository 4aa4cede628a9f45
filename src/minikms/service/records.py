"""The verbs of records: encrypt, decrypt, re-encrypt and check, one record or many.

Owns: what a record is encrypted under and bound to, and how the items of a batch are answered. Invariants: a refused
item does not stop the others of its batch; a cipher object lives for one turn or one call. It must never put plaintext
or ciphertext into an audit event.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import UNSET, UnsetType

from minikms import api
from minikms.audit import Event
from minikms.base64 import decode_canonical, encode
from minikms.crypto.aead import LONG_TEXT_BYTES, NONCE_BYTES, OVERHEAD_BYTES, scrub_long_text
from minikms.crypto.labels import caller_field
from minikms.custody.vault import OpenDek, Vault
from minikms.errors import DecryptionError, MiniKmsError, WrongPurposeError
from minikms.keys.dek import check_key_id
from minikms.policy import Principal
from minikms.service.access import Keys
from minikms.service.base import VerbTable, count_refused, cut
from minikms.service.encoding import Encoding, ReadBytes, RefusedItem, Reply, encoding_of, refused_item

CIPHERTEXT_BYTES_MAX: Final = api.PLAINTEXT_BYTES_MAX + OVERHEAD_BYTES
_TOO_SHORT: Final = "the ciphertext is too short to hold a nonce and a tag"
_DOES_NOT_OPEN: Final = "the ciphertext does not open under this key, thread and aad"


class RecordVerbs:
    def __init__(self, vault: Vault, table: VerbTable) -> None:
        self._vault = vault
        self._table = table
        self._audit_add = table.audit.add
        self._cached = vault.cache.get
        self._next_nonce = vault.nonces.next
        table.now_on_keys(api.ENCRYPT, vault, self.encrypt_one)
        self._encrypt = table[api.ENCRYPT]
        self._last_event = Event(type="encrypt", actor="")
        """Of the last encryption without a request id. The next one adds it again if key and caller are the same."""
        table.hot(api.ENCRYPT, self.encrypt)
        table.now_on_keys(api.DECRYPT, vault, self.decrypt)
        table.now_on_keys(api.ENCRYPT_BATCH, vault, self.encrypt_batch)
        table.now_on_keys(api.DECRYPT_BATCH, vault, self.decrypt_batch)
        table.now_on_keys(api.REENCRYPT_BATCH, vault, self.reencrypt_batch)
        table.now_on_keys(api.CHECK_BATCH, vault, self.check_batch)

    # --- one record --------------------------------------------------------------------------------------------------

    def encrypt(self, who: Principal, item: api.EncryptItem, request_id: str) -> Reply | Awaitable[Reply]:
        """nonce | ciphertext | tag of one plaintext."""
        # A hot verb, see `base`: what the other verbs share is written out here for a caller without limits and a key
        # that is opened. All others take `_encrypt`.
        opened = self._cached(item.key_id) if who.scope is None and "encrypt" in who.roles else None
        if opened is None:
            return self._encrypt(who, item, request_id)
        if item.request_id is not UNSET:
            request_id = cut(item.request_id)
        try:
            if item.thread_id is not UNSET:
                opened.check_thread(item.thread_id)
            if opened.state != "active":
                opened.check_encrypts()
            plaintext = decode_canonical(item.plaintext, api.PLAINTEXT_BYTES_MAX, "plaintext")
            aad = opened.aad_if_none if item.aad is UNSET else _aad(opened, item.aad, decode_canonical)
            nonce = self._next_nonce()
            cipher = opened.cipher or self._vault.turn_cipher(opened)
            sealed = nonce + cipher.encrypt(nonce, plaintext, aad)
            if len(plaintext) > LONG_TEXT_BYTES:
                scrub_long_text()
        except Exception as error:
            self._table.refused(_encrypt_event(who, opened, request_id), error)
            raise
        event = self._last_event
        if request_id or event.key_id != opened.key_id or event.pid != who.pid or event.actor != who.actor:
            event = _encrypt_event(who, opened, request_id)
            if not request_id:
                self._last_event = event
        self._audit_add(event)
        return b'{"ciphertext":"' + encode(sealed) + b'"}'

    def encrypt_one(self, keys: Keys, item: api.EncryptItem, event: Event) -> bytes:
        """The same in the frame of the other verbs."""
        opened = self._open_for(keys, event, item)
        opened.check_encrypts()
        plaintext = decode_canonical(item.plaintext, api.PLAINTEXT_BYTES_MAX, "plaintext")
        aad = _aad(opened, item.aad, decode_canonical)
        nonce = self._next_nonce()
        sealed = nonce + self._vault.turn_cipher(opened).encrypt(nonce, plaintext, aad)
        if len(plaintext) > LONG_TEXT_BYTES:
            scrub_long_text()
        return b'{"ciphertext":"' + encode(sealed) + b'"}'

    def decrypt(self, keys: Keys, item: api.DecryptItem, event: Event) -> bytes:
        """The plaintext of one ciphertext."""
        opened = self._open_for(keys, event, item)
        sealed = _sealed(item.ciphertext, decode_canonical)
        aad = _aad(opened, item.aad, decode_canonical)
        try:
            plaintext = _decrypt(self._vault.turn_cipher(opened), sealed, aad)
        finally:
            if len(sealed) > LONG_TEXT_BYTES + OVERHEAD_BYTES:
                scrub_long_text()
        return b'{"plaintext":"' + encode(plaintext) + b'"}'

    def _open_for(self, keys: Keys, event: Event, item: api.EncryptItem | api.DecryptItem) -> OpenDek:
        key_id = item.key_id
        opened = self._cached(key_id) if keys is self._vault else None
        if opened is None:
            event.key_id = check_key_id(key_id)
            opened = keys.opened(key_id)
        else:
            event.key_id = key_id
        if item.thread_id is not UNSET:
            opened.check_thread(item.thread_id)
        return opened

    # --- many records ------------------------------------------------------------------------------------------------

    def encrypt_batch(self, keys: Keys, request: api.EncryptBatchRequest, event: Event) -> Reply:
        """Encrypts each item; a refused item does not stop the others."""
        encoding = encoding_of(request)
        read = encoding.read
        outcomes: list[bytes | RefusedItem] = []
        last_key_id = ""
        opened: OpenDek | None = None
        cipher: AESGCM | None = None
        next_nonce = self._next_nonce
        for item in request.items:
            try:
                # One cipher object serves a run of items under one key, and is dropped with this call.
                if opened is None or cipher is None or item.key_id != last_key_id:
                    opened = keys.opened(check_key_id(item.key_id))
                    cipher = AESGCM(opened.view)
                    last_key_id = item.key_id
                if isinstance(item.thread_id, str):
                    opened.check_thread(item.thread_id)
                if opened.state != "active":
                    opened.check_encrypts()
                plaintext = read(item.plaintext, api.PLAINTEXT_BYTES_MAX, "plaintext")
                aad = _aad(opened, item.aad, read) if item.aad else opened.aad_if_none
                nonce = next_nonce()
                outcomes.append(nonce + cipher.encrypt(nonce, plaintext, aad))
            except MiniKmsError as error:
                outcomes.append(refused_item(error))
        scrub_long_text()
        return _items(encoding, "ciphertext", outcomes, event)

    def decrypt_batch(self, keys: Keys, request: api.DecryptBatchRequest, event: Event) -> Reply:
        """Decrypts each item; a refused item does not stop the others."""
        encoding = encoding_of(request)
        read = encoding.read
        outcomes: list[bytes | RefusedItem] = []
        last_key_id = ""
        opened: OpenDek | None = None
        cipher: AESGCM | None = None
        for item in request.items:
            # What the verbs share is written out here: it saves four calls an item.
            try:
                if opened is None or cipher is None or item.key_id != last_key_id:
                    opened = keys.opened(check_key_id(item.key_id))
                    cipher = AESGCM(opened.view)
                    last_key_id = item.key_id
                if isinstance(item.thread_id, str) and item.thread_id != opened.thread_id:
                    opened.check_thread(item.thread_id)
                sealed = read(item.ciphertext, CIPHERTEXT_BYTES_MAX, "ciphertext")
                if len(sealed) < OVERHEAD_BYTES:
                    raise DecryptionError(_TOO_SHORT)
                aad = opened.aad_if_none
                if item.aad:
                    aad = opened.aad_prefix + caller_field(read(item.aad, api.AAD_BYTES_MAX, "aad"))
                outcomes.append(cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad))
            except InvalidTag:
                outcomes.append(refused_item(DecryptionError(_DOES_NOT_OPEN)))
            except MiniKmsError as error:
                outcomes.append(refused_item(error))
        scrub_long_text()
        return _items(encoding, "plaintext", outcomes, event)

    def reencrypt_batch(self, keys: Keys, request: api.ReencryptBatchRequest, event: Event) -> Reply:
        """Moves ciphertexts between keys of one thread; the plaintext never leaves."""
        event.key_ids = [check_key_id(request.from_key_id), check_key_id(request.to_key_id)]
        record = keys.record(request.from_key_id)
        target = keys.opened(request.to_key_id)
        target.check_thread(record.thread_id)
        if target.purpose != record.purpose:
            raise WrongPurposeError("records move only between keys of one purpose")
        target.check_encrypts()
        encoding = encoding_of(request)
        read = encoding.read
        outcomes: list[bytes | RefusedItem] = []
        # Opening the second key may evict and zero the first, so each cipher is made at once.
        source = keys.opened(request.from_key_id)
        opening = AESGCM(source.view)
        target = keys.opened(request.to_key_id)
        sealing = AESGCM(target.view)
        for item in request.items:
            try:
                bound = caller_field(read(item.aad, api.AAD_BYTES_MAX, "aad") if item.aad else b"")
                plaintext = _decrypt(opening, _sealed(item.ciphertext, read), source.aad_prefix + bound)
                nonce = self._next_nonce()
                outcomes.append(nonce + sealing.encrypt(nonce, plaintext, target.aad_prefix + bound))
            except MiniKmsError as error:
                outcomes.append(refused_item(error))
        scrub_long_text()
        return _items(encoding, "ciphertext", outcomes, event)

    def check_batch(self, keys: Keys, request: api.CheckBatchRequest, event: Event) -> Reply:
        """Which ciphertexts open under one key. The answer holds nothing of their plaintext."""
        event.key_ids = [check_key_id(request.key_id)]
        opened = keys.opened(request.key_id)
        if isinstance(request.thread_id, str):
            opened.check_thread(request.thread_id)
        encoding = encoding_of(request)
        refused = _refused_of(request.items, opened, encoding.read)
        count_refused(event, len(refused))
        return encoding.answer(api.CheckBatchAnswer(len(request.items) - len(refused), refused))


def _encrypt_event(who: Principal, opened: OpenDek, request_id: str) -> Event:
    return Event(
        type="encrypt", actor=who.actor, pid=who.pid, key_id=opened.key_id, outcome="ok", request_id=request_id
    )


def _items(encoding: Encoding, member: str, outcomes: list[bytes | RefusedItem], event: Event) -> Reply:
    """The answer to a batch; `member` holds an item's value. Adds to the event how many were refused."""
    count_refused(event, list(map(type, outcomes)).count(RefusedItem))
    return encoding.items(member, outcomes)


def decode_aad(aad: str | UnsetType) -> bytes:
    """The caller's associated data; an absent aad is an empty one."""
    return b"" if aad is UNSET else decode_canonical(aad, api.AAD_BYTES_MAX, "aad")


def _aad(opened: OpenDek, aad: str | UnsetType, read: ReadBytes) -> bytes:
    """The record's associated data."""
    if not aad:  # an absent aad is an empty one
        return opened.aad_if_none
    return opened.aad_prefix + caller_field(read(aad, api.AAD_BYTES_MAX, "aad"))


def _sealed(given: str, read: ReadBytes) -> bytes:
    sealed = read(given, CIPHERTEXT_BYTES_MAX, "ciphertext")
    if len(sealed) < OVERHEAD_BYTES:
        raise DecryptionError(_TOO_SHORT)
    return sealed


def _decrypt(cipher: AESGCM, sealed: bytes, aad: bytes) -> bytes:
    try:
        return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)
    except InvalidTag:
        raise DecryptionError(_DOES_NOT_OPEN) from None


def _refused_of(items: Sequence[api.ReencryptItem], opened: OpenDek, read: ReadBytes) -> list[api.RefusedItemAnswer]:
    """The items that do not open. No plaintext becomes an object: all go into one buffer, which is zeroed."""
    refused: list[api.RefusedItemAnswer] = []
    decrypt_into = AESGCM(opened.view).decrypt_into
    longest = max((len(item.ciphertext) for item in items), default=0)
    scratch = memoryview(bytearray(min(longest, CIPHERTEXT_BYTES_MAX)))
    try:
        for index, item in enumerate(items):
            try:
                sealed = _sealed(item.ciphertext, read)
                aad = _aad(opened, item.aad, read)
                decrypt_into(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad, scratch[: len(sealed) - OVERHEAD_BYTES])
            except InvalidTag:
                refused.append(api.RefusedItemAnswer(index, _DOES_NOT_OPEN, DecryptionError.code))
            except MiniKmsError as error:
                refused.append(api.RefusedItemAnswer(index, str(error), error.code))
    finally:
        scrub_long_text()
        scratch[:] = bytes(len(scratch))
    return refused
