"""The items of the batch verbs: their shapes, their bounds, and how many fit one request.

Owns: requests that hold bytes (`minikms.api` has the base64 text that the daemon sees), the checks before encoding, and
the cutting of many items into requests that the daemon takes. Invariants: a text is bounded and ASCII before it is
encoded, so that one caller's item can't make a batch of many callers unreadable; whether an id is well-formed is the
daemon's decision, item by item. No item shows its content in a repr.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NoReturn, TypeVar

import msgspec

from minikms import api
from minikms.api.errors import InvalidRequestError, KmsRefusedError, TooLargeError

_ITEM_TEXT_BYTES_MAX: Final = 128 + 3 * 6 * api.ID_CHARS_MAX
"""The size of an item's field names and ids in JSON, when every character of an id needs an escape of six."""
_ENVELOPE_BYTES_MAX: Final = 1024
BATCH_BYTES_MAX: Final = api.BODY_BYTES_MAX - _ENVELOPE_BYTES_MAX
SEALED_BYTES_MAX: Final = api.PLAINTEXT_BYTES_MAX + api.SEAL_BYTES


class Sent(msgspec.Struct, frozen=True):
    """Base of the requests that hold bytes, which are encoded as base64."""


class EncryptItem(Sent, omit_defaults=True, frozen=True, gc=False, kw_only=True):
    """One value to encrypt. `aad` and `thread_id` must be the same when it is decrypted.

    The daemon refuses the item unless `thread_id`, when given, is the key's thread. `request_id` goes to the audit log.
    """

    key_id: str
    plaintext: bytes
    aad: bytes = b""
    thread_id: str | None = None
    request_id: str | None = None

    def __repr__(self) -> str:
        return f"EncryptItem(key_id={self.key_id!r}, {len(self.plaintext)} bytes)"


class DecryptItem(Sent, omit_defaults=True, frozen=True, gc=False, kw_only=True):
    """One value to decrypt. `ciphertext` is what encrypt answered: nonce(24) | ciphertext | tag(16)."""

    key_id: str
    ciphertext: bytes
    aad: bytes = b""
    thread_id: str | None = None
    request_id: str | None = None

    def __repr__(self) -> str:
        return f"DecryptItem(key_id={self.key_id!r}, {len(self.ciphertext)} bytes)"


class ReencryptItem(Sent, omit_defaults=True, frozen=True, gc=False, kw_only=True):
    """One ciphertext to move from one key to another, under the same `aad`, or to check."""

    ciphertext: bytes
    aad: bytes = b""

    def __repr__(self) -> str:
        return f"ReencryptItem({len(self.ciphertext)} bytes)"


class MacItem(Sent, omit_defaults=True, frozen=True, gc=False, kw_only=True):
    """One value to make a MAC of. `aad` is what it is bound to, as for `EncryptItem`."""

    plaintext: bytes
    aad: bytes = b""

    def __repr__(self) -> str:
        return f"MacItem({len(self.plaintext)} bytes)"


class Batch(Sent, frozen=True):
    """A batch of ENCRYPT_BATCH or DECRYPT_BATCH."""

    items: Sequence[EncryptItem] | Sequence[DecryptItem]


class ReencryptBatch(Sent, frozen=True):
    from_key_id: str
    to_key_id: str
    items: Sequence[ReencryptItem]


class CheckBatch(Sent, omit_defaults=True, frozen=True):
    """A batch of CHECK_BATCH or MAC."""

    key_id: str
    items: Sequence[ReencryptItem] | Sequence[MacItem]
    thread_id: str | None = None


Item = EncryptItem | DecryptItem | ReencryptItem | MacItem
ItemT = TypeVar("ItemT", EncryptItem, DecryptItem, ReencryptItem, MacItem)
Outcome = bytes | KmsRefusedError
"""What a batch gives for one item: the value, or why that item was refused."""
CheckOutcome = KmsRefusedError | None
"""What a check gives for one item: None if it opens, or why it was refused."""


def checked_cost_bytes(item: Item, *, ids_checked: bool = False) -> int:
    """An upper bound of the bytes that the item takes in a body. Ids are not checked again if they are `ids_checked`.

    Raises InvalidRequestError, TooLargeError or TypeError for what could spoil the batch that the item travels in.
    """
    if isinstance(item, (EncryptItem, MacItem)):
        payload, payload_bytes_max = item.plaintext, api.PLAINTEXT_BYTES_MAX
    else:
        payload, payload_bytes_max = item.ciphertext, SEALED_BYTES_MAX
    if not ids_checked and not isinstance(item, (ReencryptItem, MacItem)):
        _check_ids(item.key_id, item.thread_id, item.request_id)
    aad = item.aad
    if not isinstance(payload, bytes) or not isinstance(aad, bytes):
        raise TypeError("plaintext, ciphertext and aad are bytes")
    if len(payload) > payload_bytes_max or len(aad) > api.AAD_BYTES_MAX:
        raise TooLargeError(f"a value has at most {payload_bytes_max} bytes, its aad {api.AAD_BYTES_MAX}")
    return _ITEM_TEXT_BYTES_MAX + (len(payload) + len(aad) + 4) * 4 // 3


def _check_all_ids(items: Sequence[Item]) -> None:
    """Checks only once, in order, what items name alike: most batches are of one key and thread."""
    named = {
        (item.key_id, item.thread_id, item.request_id): None
        for item in items
        if not isinstance(item, (ReencryptItem, MacItem))
    }
    for ids in named:
        _check_ids(*ids)


def _check_ids(key_id: str, thread_id: str | None, request_id: str | None) -> None:
    together = key_id  # nearly always short enough to be looked at as one
    if thread_id is not None:
        together += thread_id
    if request_id is not None:
        together += request_id
    if not isinstance(together, str) or len(together) > api.ID_CHARS_MAX or not together.isascii():
        check_id("key_id", key_id)
        check_id("thread_id", thread_id or "")
        check_id("request_id", request_id or "")


def check_id(name: str, value: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is a str")
    if len(value) > api.ID_CHARS_MAX or not value.isascii():
        invalid(f"{name} has at most {api.ID_CHARS_MAX} ASCII characters")


def invalid(message: str) -> NoReturn:
    """Refuses before anything is sent, as the daemon would."""
    raise InvalidRequestError(message)


def chunks(items: Sequence[ItemT], items_max: int = api.BATCH_ITEMS_MAX) -> Iterator[Sequence[ItemT]]:
    """The items, in order, in runs that each fit one request. Raises as checked_cost_bytes, before the first run."""
    _check_all_ids(items)
    costs = [checked_cost_bytes(item, ids_checked=True) for item in items]
    start = size = 0
    for index, cost in enumerate(costs):
        if index - start == items_max or (size + cost > BATCH_BYTES_MAX and index > start):
            yield items[start:index]
            start, size = index, 0
        size += cost
    if start < len(items):
        yield items[start:]
