"""The verbs of records: encrypt, decrypt, re-encrypt and check, one record or many; and MACs.

Owns: what a record is encrypted under and bound to, and how the items of a batch are answered. Invariants: a refused
item does not stop the others of its batch. A long batch gives way to other requests and then opens its keys anew: a
retirement, a destruction or a change of the policy holds for the items that are left, and a seal ends the batch. It
must never put plaintext or ciphertext into an audit event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET, UnsetType

from minikms import api
from minikms.api.base64 import decode_canonical, encode
from minikms.api.errors import KmsRefusedError, WrongPurposeError
from minikms.audit import Event
from minikms.crypto.labels import caller_field
from minikms.custody.open_dek import OpenDek
from minikms.custody.vault import Vault
from minikms.keys.dek import check_key_id
from minikms.policy.principal import Principal
from minikms_daemon.service.base import Later, VerbTable, count_refused, cut
from minikms_daemon.service.encoding import Encoding, ReadBytes, RefusedItem, Reply, encoding_of, refused_item

if TYPE_CHECKING:
    from minikms_daemon.service.access import Keys

CIPHERTEXT_BYTES_MAX: Final = api.PLAINTEXT_BYTES_MAX + api.SEAL_BYTES
SLICE_SECONDS_MAX: Final = 0.002
"""A batch that has worked for this long gives way. Opening a key takes 30 µs, or a read from the disk. An item of 250
bytes takes 3 µs, so the batches of the message server (at most 256 items) are not split where their keys are open."""
SLICE_ITEMS_COUNT: Final = 32
"""Items between two looks at the clock. It is also looked at before a key, once one had to be opened."""


Outcomes = list[bytes | RefusedItem]
Work = Callable[["Keys", Sequence[Any], ReadBytes, Outcomes], None]
"""Adds the outcomes of the items that have none. It may end before the last, but adds one at least."""


class RecordVerbs:
    def __init__(self, vault: Vault, table: VerbTable) -> None:
        self._vault = vault
        self._going_on = asyncio.Lock()
        """The lock of the batch that works in this turn of the event loop, of those that have given way."""
        self._table = table
        self._audit_add = table.audit.add
        self._cached = vault.cache.get
        table.now_on_keys(api.ENCRYPT, vault, self.encrypt_one)
        self._encrypt = table[api.ENCRYPT]
        self._last_event = Event(type="encrypt", actor="")
        """The event of the last encryption without a request id. The next one adds it again if key and caller are the
        same.
        """
        table.hot(api.ENCRYPT, self.encrypt)
        table.now_on_keys(api.DECRYPT, vault, self.decrypt)
        table.now_on_keys(api.ENCRYPT_BATCH, vault, self.encrypt_batch)
        table.now_on_keys(api.DECRYPT_BATCH, vault, self.decrypt_batch)
        table.now_on_keys(api.REENCRYPT_BATCH, vault, self.reencrypt_batch)
        table.now_on_keys(api.CHECK_BATCH, vault, self.check_batch)
        table.now_on_keys(api.MAC, vault, self.mac)

    # --- one record --------------------------------------------------------------------------------------------------

    def encrypt(self, who: Principal, item: api.EncryptItemRequest, request_id: str) -> Reply | Awaitable[Reply]:
        """nonce | ciphertext | tag of one plaintext."""
        # A hot verb, see `base`: what the other verbs share is written out here for a caller without limits and a key
        # that is opened. All others take `_encrypt`.
        opened = self._cached(item.key_id) if who.scope is None and "encrypt" in who.roles else None
        if opened is None:
            return self._encrypt(who, item, request_id)
        if item.request_id is not UNSET:
            request_id = cut(item.request_id)
        try:
            sealed = _encrypted(opened, item, decode_canonical)
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

    def encrypt_one(self, keys: Keys, item: api.EncryptItemRequest, event: Event) -> bytes:
        """The same in the frame of the other verbs."""
        sealed = _encrypted(self._open_for(keys, event, item.key_id), item, decode_canonical)
        return b'{"ciphertext":"' + encode(sealed) + b'"}'

    def decrypt(self, keys: Keys, item: api.DecryptItemRequest, event: Event) -> bytes:
        opened = self._open_for(keys, event, item.key_id)
        if item.thread_id is not UNSET:
            opened.check_thread(item.thread_id)
        sealed = decode_canonical(item.ciphertext, CIPHERTEXT_BYTES_MAX, "ciphertext")
        plaintext = opened.open(sealed, _aad(opened, item.aad, decode_canonical))
        return b'{"plaintext":"' + encode(plaintext) + b'"}'

    def _open_for(self, keys: Keys, event: Event, key_id: str) -> OpenDek:
        opened = self._cached(key_id) if keys is self._vault else None
        if opened is None:
            event.key_id = check_key_id(key_id)
            opened = keys.opened(key_id)
        else:
            event.key_id = key_id
        return opened

    # --- many records ------------------------------------------------------------------------------------------------

    def encrypt_batch(self, keys: Keys, request: api.EncryptBatchRequest, event: Event) -> Reply | Later:
        """Encrypts each item; a refused item does not stop the others."""
        return self._in_slices(self._encrypt_items, keys, request, "ciphertext", event)

    def _encrypt_items(
        self, keys: Keys, items: Sequence[api.EncryptItemRequest], read: ReadBytes, outcomes: Outcomes
    ) -> None:
        until_s, cache = time.monotonic() + SLICE_SECONDS_MAX, self._vault.cache
        misses, last_key_id = cache.misses, ""
        opened: OpenDek | None = None
        while True:
            for item in items[len(outcomes) : len(outcomes) + SLICE_ITEMS_COUNT]:
                try:
                    if opened is None or item.key_id != last_key_id:
                        if cache.misses != misses and time.monotonic() >= until_s:
                            return
                        opened = keys.opened(check_key_id(item.key_id))
                        last_key_id = item.key_id
                    outcomes.append(_encrypted(opened, item, read))
                except KmsRefusedError as error:
                    outcomes.append(refused_item(error))
            if len(outcomes) == len(items) or time.monotonic() >= until_s:
                return

    def decrypt_batch(self, keys: Keys, request: api.DecryptBatchRequest, event: Event) -> Reply | Later:
        """Decrypts each item; a refused item does not stop the others."""
        return self._in_slices(self._decrypt_items, keys, request, "plaintext", event)

    def _decrypt_items(
        self, keys: Keys, items: Sequence[api.DecryptItemRequest], read: ReadBytes, outcomes: Outcomes
    ) -> None:
        # As `_encrypt_items` and `decrypt`, written out: a shared function would cost a call for each item.
        until_s, cache = time.monotonic() + SLICE_SECONDS_MAX, self._vault.cache
        misses, last_key_id = cache.misses, ""
        opened: OpenDek | None = None
        while True:
            for item in items[len(outcomes) : len(outcomes) + SLICE_ITEMS_COUNT]:
                try:
                    if opened is None or item.key_id != last_key_id:
                        if cache.misses != misses and time.monotonic() >= until_s:
                            return
                        opened = keys.opened(check_key_id(item.key_id))
                        last_key_id = item.key_id
                    if isinstance(item.thread_id, str) and item.thread_id != opened.thread_id:
                        opened.check_thread(item.thread_id)
                    sealed = read(item.ciphertext, CIPHERTEXT_BYTES_MAX, "ciphertext")
                    aad = opened.aad_if_none
                    if item.aad:
                        aad = opened.aad_prefix + caller_field(read(item.aad, api.AAD_BYTES_MAX, "aad"))
                    outcomes.append(opened.open(sealed, aad))
                except KmsRefusedError as error:
                    outcomes.append(refused_item(error))
            if len(outcomes) == len(items) or time.monotonic() >= until_s:
                return

    def _in_slices(self, work: Work, keys: Keys, request: Any, member: str, event: Event) -> Reply | Later:
        """The answer to a batch, at once or in later turns."""
        encoding, items = encoding_of(request), request.items
        outcomes: Outcomes = []
        work(keys, items, encoding.read, outcomes)

        async def go_on() -> Reply:
            while len(outcomes) < len(items):
                async with self._going_on:
                    await asyncio.sleep(0)
                    work(keys, items, encoding.read, outcomes)
            return _items(encoding, member, outcomes, event)

        return _items(encoding, member, outcomes, event) if len(outcomes) == len(items) else Later(go_on)

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
        texts: list[tuple[bytes, bytes] | RefusedItem] = []
        # All are opened before the first is sealed, since opening the second key may evict and zero the first.
        source = keys.opened(request.from_key_id)
        for item in request.items:
            try:
                sealed = read(item.ciphertext, CIPHERTEXT_BYTES_MAX, "ciphertext")
                bound = caller_field(read(item.aad, api.AAD_BYTES_MAX, "aad") if item.aad else b"")
                texts.append((source.open(sealed, source.aad_prefix + bound), bound))
            except KmsRefusedError as error:
                texts.append(refused_item(error))
        target = keys.opened(request.to_key_id)
        outcomes: list[bytes | RefusedItem] = [
            each if isinstance(each, RefusedItem) else target.seal(each[0], target.aad_prefix + each[1])
            for each in texts
        ]
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

    def mac(self, keys: Keys, request: api.MacRequest, event: Event) -> Reply:
        """A MAC of each item, also under a retired key: what was made with it is still compared and searched. One item
        that can't be read refuses all.
        """
        event.key_ids = [check_key_id(request.key_id)]
        opened = keys.opened(request.key_id)
        if isinstance(request.thread_id, str):
            opened.check_thread(request.thread_id)
        encoding = encoding_of(request)
        read = encoding.read
        return encoding.answer(
            api.MacAnswer(
                [
                    opened.mac(
                        read(item.plaintext, api.PLAINTEXT_BYTES_MAX, "plaintext"),
                        read(item.aad, api.AAD_BYTES_MAX, "aad") if item.aad else b"",
                    )
                    for item in request.items
                ]
            )
        )


def _encrypted(opened: OpenDek, item: api.EncryptItemRequest, read: ReadBytes) -> bytes:
    """nonce | ciphertext | tag of one plaintext. Raises KmsRefusedError."""
    if isinstance(item.thread_id, str):  # without one it is UNSET, or None in MessagePack
        opened.check_thread(item.thread_id)
    if opened.state != "active":
        opened.check_encrypts()
    plaintext = read(item.plaintext, api.PLAINTEXT_BYTES_MAX, "plaintext")
    return opened.seal(plaintext, _aad(opened, item.aad, read) if item.aad else opened.aad_if_none)


def _encrypt_event(who: Principal, opened: OpenDek, request_id: str) -> Event:
    return Event(
        type="encrypt", actor=who.actor, pid=who.pid, key_id=opened.key_id, outcome="ok", request_id=request_id
    )


def _items(encoding: Encoding, member: str, outcomes: list[bytes | RefusedItem], event: Event) -> Reply:
    """The answer to a batch; `member` holds an item's value. Adds to the event how many were refused."""
    refused_count = list(map(type, outcomes)).count(RefusedItem)
    count_refused(event, refused_count)
    return encoding.items(member, outcomes, refused_count)


def decode_aad(aad: str | UnsetType) -> bytes:
    """The caller's associated data; an absent aad is an empty one."""
    return b"" if aad is UNSET else decode_canonical(aad, api.AAD_BYTES_MAX, "aad")


def _aad(opened: OpenDek, aad: str | UnsetType, read: ReadBytes) -> bytes:
    """The record's associated data."""
    if not aad:  # an absent aad is an empty one
        return opened.aad_if_none
    return opened.aad_prefix + caller_field(read(aad, api.AAD_BYTES_MAX, "aad"))


def _refused_of(
    items: Sequence[api.ReencryptItemRequest], opened: OpenDek, read: ReadBytes
) -> list[api.RefusedItemAnswer]:
    """The items that do not open. No plaintext becomes an object: all go into one buffer, which is zeroed."""
    refused: list[api.RefusedItemAnswer] = []
    longest = max((len(item.ciphertext) for item in items), default=0)
    scratch = memoryview(bytearray(min(longest, CIPHERTEXT_BYTES_MAX)))
    try:
        for index, item in enumerate(items):
            try:
                sealed = read(item.ciphertext, CIPHERTEXT_BYTES_MAX, "ciphertext")
                opened.check(sealed, _aad(opened, item.aad, read), scratch)
            except KmsRefusedError as error:
                refused.append(api.RefusedItemAnswer(index, str(error), error.code))
    finally:
        scratch[:] = bytes(len(scratch))
    return refused
