"""The verbs as values: what each sends, and how its answer is read. No sockets, no time.

Owns: the request bytes and the answer shape of every verb, for both clients. Invariants: a text that goes into a
request is bounded and ASCII before it is encoded, so that one caller's item can't make a batch of many callers
unreadable; an answer is decoded into a typed value or refused as a whole; `retry` is true only for verbs that may be
carried out twice without harm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from msgspec import UNSET, UnsetType

from minikms import api
from minikms.client.errors import (
    InvalidRequestError,
    KmsProtocolError,
    KmsRefusedError,
    TooLargeError,
    refusal,
)
from minikms.client.wire import Answer

T = TypeVar("T")

_ITEM_TEXT_BYTES_MAX: Final = 128 + 3 * 6 * api.ID_CHARS_MAX
"""Of an item's field names and ids in JSON, when every character of an id needs a `\\u00xx` escape."""
_ENVELOPE_BYTES_MAX: Final = 1024
_KEK_HEX: Final = re.compile(rb"[0-9a-fA-F]{64}")
BATCH_BYTES_MAX: Final = api.BODY_BYTES_MAX - _ENVELOPE_BYTES_MAX

_encode: Final = msgspec.json.Encoder().encode


class Call(NamedTuple, Generic[T]):
    """One request. `body` is None for a GET; a `bytearray` holds a key and is zeroed once it has been sent."""

    target: bytes
    body: bytes | bytearray | None
    retry: bool
    decode: Callable[[bytes], T]


# --- items -------------------------------------------------------------------------------------------------------


class EncryptItem(msgspec.Struct, omit_defaults=True, frozen=True, gc=False, kw_only=True):
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


class DecryptItem(msgspec.Struct, omit_defaults=True, frozen=True, gc=False, kw_only=True):
    """One value to decrypt. `ciphertext` is what encrypt answered: nonce(12) | ciphertext | tag(16)."""

    key_id: str
    ciphertext: bytes
    aad: bytes = b""
    thread_id: str | None = None
    request_id: str | None = None

    def __repr__(self) -> str:
        return f"DecryptItem(key_id={self.key_id!r}, {len(self.ciphertext)} bytes)"


class ReencryptItem(msgspec.Struct, omit_defaults=True, frozen=True, gc=False, kw_only=True):
    """One ciphertext to move from one key to another, under the same `aad`."""

    ciphertext: bytes
    aad: bytes = b""

    def __repr__(self) -> str:
        return f"ReencryptItem({len(self.ciphertext)} bytes)"


Item = EncryptItem | DecryptItem | ReencryptItem
ItemT = TypeVar("ItemT", EncryptItem, DecryptItem, ReencryptItem)
Outcome = bytes | KmsRefusedError
"""What a batch gives for one item: the value, or why that item was refused."""


def payload_of(item: Item) -> bytes:
    return item.plaintext if isinstance(item, EncryptItem) else item.ciphertext


def cost_bytes(item: Item) -> int:
    """At least as many bytes as the item takes in a body."""
    return _ITEM_TEXT_BYTES_MAX + (len(payload_of(item)) + len(item.aad) + 4) * 4 // 3


def check_item(item: Item) -> None:
    """Raises InvalidRequestError or TooLargeError for what could spoil the batch that the item travels in.

    Whether an id is well-formed is the daemon's to say, item by item.
    """
    if not isinstance(item, ReencryptItem):
        _check_text("key_id", item.key_id)
        if item.thread_id is not None:
            _check_text("thread_id", item.thread_id)
        if item.request_id is not None:
            _check_text("request_id", item.request_id)
    payload = payload_of(item)
    if not isinstance(payload, bytes) or not isinstance(item.aad, bytes):
        raise TypeError("plaintext, ciphertext and aad are bytes")
    if len(payload) > api.PLAINTEXT_BYTES_MAX + 28 or len(item.aad) > api.AAD_BYTES_MAX:  # 28: nonce and tag
        raise TooLargeError(
            413, api.CODE_TOO_LARGE, f"a value has at most {api.PLAINTEXT_BYTES_MAX} bytes, its aad {api.AAD_BYTES_MAX}"
        )


def _check_text(name: str, value: str) -> None:
    if len(value) > api.ID_CHARS_MAX or not value.isascii():
        _invalid(f"{name} has at most {api.ID_CHARS_MAX} ASCII characters")


def _invalid(message: str) -> NoReturn:
    raise InvalidRequestError(400, api.CODE_INVALID_REQUEST, message)


def chunks(items: Sequence[ItemT]) -> Iterator[Sequence[ItemT]]:
    """The items, in order, in runs that each fit one request. Raises as check_item."""
    for item in items:  # all of them before the first leaves
        check_item(item)
    start = size = 0
    for index, item in enumerate(items):
        cost = cost_bytes(item)
        if index - start == api.BATCH_ITEMS_MAX or (size + cost > BATCH_BYTES_MAX and index > start):
            yield items[start:index]
            start, size = index, 0
        size += cost
    if start < len(items):
        yield items[start:]


# --- answers -----------------------------------------------------------------------------------------------------


class KeyInfo(msgspec.Struct, frozen=True):
    """What `keys` tells of one key. `created_at` is RFC 3339 in UTC; `uses_max` an upper bound of its uses so far."""

    key_id: str
    thread_id: str
    purpose: str
    state: str
    kek_version: int | str
    created_at: str
    uses_max: int


class KeyPage(msgspec.Struct, frozen=True):
    """One page of keys; `next_cursor` is None on the last."""

    keys: list[KeyInfo]
    next_cursor: str | None = None


class DataKey(msgspec.Struct, frozen=True):
    """A key for the caller's own use. Store `ciphertext`, use `plaintext` and forget it; None if it was not asked
    for."""

    key_id: str
    ciphertext: bytes
    plaintext: bytes | None = None

    def __repr__(self) -> str:
        return f"DataKey(key_id={self.key_id!r})"


class KekRotation(msgspec.Struct, frozen=True):
    """`status` is `ok`, or `running` when it was not waited for. `rewrapped` counts the keys done so far."""

    status: str
    kek_version: int | str
    rewrapped: int = 0


class _Random(msgspec.Struct):
    drawn: bytes = msgspec.field(name="bytes")


def read(call: Call[T], answer: Answer) -> T:
    """The value of an answer. Raises KmsRefusedError or KmsProtocolError."""
    if answer.status in (200, 202):
        try:
            return call.decode(answer.body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise KmsProtocolError("the key service's answer has not the shape of its verb") from error
    raise _refusal_of(answer)


def _refusal_of(answer: Answer) -> KmsRefusedError:
    try:
        refused = _decode_error(answer.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise KmsProtocolError(f"the key service answered {answer.status} without saying why") from error
    return refusal(refused.code, refused.error, answer.status)


_decode_error = msgspec.json.Decoder(api.ErrorAnswer).decode
_decode_created = msgspec.json.Decoder(api.CreateDekAnswer).decode
_decode_wrapped = msgspec.json.Decoder(api.WrappedAnswer).decode
_decode_encrypted = msgspec.json.Decoder(api.EncryptAnswer).decode
_decode_decrypted = msgspec.json.Decoder(api.DecryptAnswer).decode
_decode_encrypted_items = msgspec.json.Decoder(api.EncryptBatchAnswer).decode
_decode_decrypted_items = msgspec.json.Decoder(api.DecryptBatchAnswer).decode
_decode_object = msgspec.json.Decoder(dict[str, object]).decode
_decode_page = msgspec.json.Decoder(KeyPage).decode
_decode_key = msgspec.json.Decoder(KeyInfo).decode
_decode_data_key = msgspec.json.Decoder(DataKey).decode
_decode_rotation = msgspec.json.Decoder(KekRotation).decode
_decode_random = msgspec.json.Decoder(_Random).decode


def _outcome(value: bytes | UnsetType, error: str | UnsetType, code: str | UnsetType) -> Outcome:
    if isinstance(value, bytes):
        if error is UNSET and code is UNSET:
            return value
    elif isinstance(error, str) and isinstance(code, str):
        return refusal(code, error)
    raise KmsProtocolError("an item of the key service's answer is neither a value nor an error")


def _reader_of_batch(count: int, *, sealed: bool) -> Callable[[bytes], list[Outcome]]:
    """Reads the answer to a batch of `count` items: exactly as many, each a value or an error."""

    def decode(body: bytes) -> list[Outcome]:
        if sealed:
            outcomes = [
                _outcome(item.ciphertext, item.error, item.code) for item in _decode_encrypted_items(body).items
            ]
        else:
            outcomes = [_outcome(item.plaintext, item.error, item.code) for item in _decode_decrypted_items(body).items]
        if len(outcomes) != count:
            raise KmsProtocolError(f"the key service answered {len(outcomes)} items of {count}")
        return outcomes

    return decode


# --- verbs -------------------------------------------------------------------------------------------------------


def health() -> Call[bool]:
    def decode(body: bytes) -> bool:
        if body.strip() != b"ok":
            raise KmsProtocolError("the key service's health is not `ok`")
        return True

    return Call(b"/health", None, True, decode)


def status() -> Call[dict[str, object]]:
    return Call(b"/status", None, True, _decode_object)


def create_dek_for_thread(
    thread_id: str, replaces: str | None, purpose: api.Purpose | None, request_id: str | None
) -> Call[api.CreateDekAnswer]:
    _check_text("thread_id", thread_id)
    request = api.CreateDekRequest(
        thread_id, _given(replaces), UNSET if purpose is None else purpose, _given(request_id)
    )
    return Call(b"/create_dek_for_thread", _json(request), False, _decode_created)


def get_wrapped(key_id: str) -> Call[bytes]:
    _check_text("key_id", key_id)
    return Call(b"/get_wrapped?key_id=" + _quoted(key_id), None, True, lambda body: _decode_wrapped(body).wrapped)


def encrypt(item: EncryptItem) -> Call[bytes]:
    return Call(b"/encrypt", _encode(item), True, lambda body: _decode_encrypted(body).ciphertext)


def decrypt(item: DecryptItem) -> Call[bytes]:
    return Call(b"/decrypt", _encode(item), True, lambda body: _decode_decrypted(body).plaintext)


def encrypt_batch(items: Sequence[EncryptItem]) -> Call[list[Outcome]]:
    return Call(b"/encrypt_batch", _encode({"items": items}), True, _reader_of_batch(len(items), sealed=True))


def decrypt_batch(items: Sequence[DecryptItem]) -> Call[list[Outcome]]:
    return Call(b"/decrypt_batch", _encode({"items": items}), True, _reader_of_batch(len(items), sealed=False))


def reencrypt_batch(
    from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], request_id: str | None
) -> Call[list[Outcome]]:
    _check_text("from_key_id", from_key_id)
    _check_text("to_key_id", to_key_id)
    request: dict[str, object] = {"from_key_id": from_key_id, "to_key_id": to_key_id, "items": items}
    if request_id is not None:
        _check_text("request_id", request_id)
        request["request_id"] = request_id
    return Call(b"/reencrypt_batch", _encode(request), True, _reader_of_batch(len(items), sealed=True))


def generate_data_key(key_id: str, aad: bytes, with_plaintext: bool, request_id: str | None) -> Call[DataKey]:
    """Not retried: each answer is another key, and the lost one would stay in the audit log unexplained."""
    request: dict[str, object] = {"key_id": key_id}
    if aad:
        request["aad"] = aad
    if request_id is not None:
        request["request_id"] = request_id
    target = b"/generate_data_key" if with_plaintext else b"/generate_data_key_without_plaintext"
    return Call(target, _encode(request), False, _decode_data_key)


def random(count_bytes: int) -> Call[bytes]:
    def decode(body: bytes) -> bytes:
        value = _decode_random(body).drawn
        if len(value) != count_bytes:
            raise KmsProtocolError("the key service answered another number of random bytes")
        return value

    return Call(b"/random", _encode({"bytes": count_bytes}), True, decode)


def rotate_kek(
    new_kek_hex: bytes | bytearray | str | None, wait: bool, verify: Sequence[DecryptItem]
) -> Call[KekRotation]:
    """The new key is checked here, since it is joined into the body as it is; the body is zeroed after it was sent."""
    body = bytearray(b"{")
    if new_kek_hex is not None:
        digits = new_kek_hex.encode("ascii", "replace") if isinstance(new_kek_hex, str) else new_kek_hex
        if _KEK_HEX.fullmatch(digits) is None:
            _invalid("new_kek_hex has 64 hexadecimal characters")
        body += b'"new_kek_hex":"'
        body += digits
        body += b'",'
    if verify:
        samples = [{"key_id": item.key_id, "ciphertext": item.ciphertext, "aad": item.aad} for item in verify]
        body += b'"verify":' + _encode(samples) + b","
    body += b'"wait":true}' if wait else b'"wait":false}'
    return Call(b"/rotate_kek", body, False, _decode_rotation)


def list_keys(thread_id: str | None, state: api.State | None, cursor: str | None, limit: int | None) -> Call[KeyPage]:
    given = {"thread_id": thread_id, "state": state, "cursor": cursor, "limit": limit}
    query = urlencode({name: value for name, value in given.items() if value is not None})
    return Call(f"/keys?{query}".encode("ascii") if query else b"/keys", None, True, _decode_page)


def get_key(key_id: str) -> Call[KeyInfo]:
    return Call(b"/keys/" + _quoted(key_id), None, True, _decode_key)


def retire_key(key_id: str, request_id: str | None) -> Call[dict[str, object]]:
    request = {} if request_id is None else {"request_id": request_id}
    return Call(b"/keys/" + _quoted(key_id) + b"/retire", _encode(request), False, _decode_object)


def destroy_key(key_id: str) -> Call[dict[str, object]]:
    """The key id travels twice, in the path and in the body, so that no slip of a path destroys a key."""
    return Call(b"/keys/" + _quoted(key_id) + b"/destroy", _encode({"key_id": key_id}), False, _decode_object)


def _given(value: str | None) -> str | UnsetType:
    if value is None:
        return UNSET
    _check_text("an id", value)
    return value


def _json(request: api.Request) -> bytes:
    return _encode(request)


def _quoted(key_id: str) -> bytes:
    _check_text("key_id", key_id)
    return quote(key_id, safe="").encode("ascii")
