"""What goes into a batch, and how much of it.

Owns: the items of the batch verbs, the checks that come before encoding, and the cutting of many items into requests
that the daemon takes. Invariants: a text is bounded and ASCII before it is encoded, so that one caller's item can't
make a batch of many callers unreadable; whether an id is well-formed is the daemon's to say, item by item. No item
shows its content in a repr.

The verbs as values: what each sends, and how its answer is read. No sockets, no time.

Owns: the request and the answer of every verb, for both clients. Invariants: an answer is decoded into a typed value
or refused as a whole, a batch has as many outcomes as items; `retry` is true only for verbs that may be carried out
twice without harm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from msgspec import UNSET, UnsetType

from minikms import api
from minikms.client.errors import InvalidRequestError, KmsProtocolError, KmsRefusedError, TooLargeError, refusal
from minikms.client.wire import Answer

_ITEM_TEXT_BYTES_MAX: Final = 128 + 3 * 6 * api.ID_CHARS_MAX
"""Of an item's field names and ids in JSON, when every character of an id needs an escape of six."""
_ENVELOPE_BYTES_MAX: Final = 1024
BATCH_BYTES_MAX: Final = api.BODY_BYTES_MAX - _ENVELOPE_BYTES_MAX
SEALED_BYTES_MAX: Final = api.PLAINTEXT_BYTES_MAX + 28
"""With nonce(12) and tag(16)."""


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
    """One ciphertext to move from one key to another, under the same `aad`, or to check."""

    ciphertext: bytes
    aad: bytes = b""

    def __repr__(self) -> str:
        return f"ReencryptItem({len(self.ciphertext)} bytes)"


Item = EncryptItem | DecryptItem | ReencryptItem
ItemT = TypeVar("ItemT", EncryptItem, DecryptItem, ReencryptItem)
Outcome = bytes | KmsRefusedError
"""What a batch gives for one item: the value, or why that item was refused."""
Verdict = KmsRefusedError | None
"""What a check gives for one item: None if it opens, or why it was refused."""


def checked_cost_bytes(item: Item) -> int:
    """At least as many bytes as the item takes in a body.

    Raises InvalidRequestError, TooLargeError or TypeError for what could spoil the batch that the item travels in.
    """
    if isinstance(item, EncryptItem):
        payload, payload_bytes_max = item.plaintext, api.PLAINTEXT_BYTES_MAX
    else:
        payload, payload_bytes_max = item.ciphertext, SEALED_BYTES_MAX
    if not isinstance(item, ReencryptItem):
        _check_ids(item.key_id, item.thread_id, item.request_id)
    aad = item.aad
    if not isinstance(payload, bytes) or not isinstance(aad, bytes):
        raise TypeError("plaintext, ciphertext and aad are bytes")
    if len(payload) > payload_bytes_max or len(aad) > api.AAD_BYTES_MAX:
        message = f"a value has at most {payload_bytes_max} bytes, its aad {api.AAD_BYTES_MAX}"
        raise TooLargeError(413, api.CODE_TOO_LARGE, message)
    return _ITEM_TEXT_BYTES_MAX + (len(payload) + len(aad) + 4) * 4 // 3


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
    raise InvalidRequestError(400, api.CODE_INVALID_REQUEST, message)


def chunks(items: Sequence[ItemT], items_max: int = api.BATCH_ITEMS_MAX) -> Iterator[Sequence[ItemT]]:
    """The items, in order, in runs that each fit one request. Raises as checked_cost_bytes, before the first run."""
    costs = [checked_cost_bytes(item) for item in items]
    start = size = 0
    for index, cost in enumerate(costs):
        if index - start == items_max or (size + cost > BATCH_BYTES_MAX and index > start):
            yield items[start:index]
            start, size = index, 0
        size += cost
    if start < len(items):
        yield items[start:]


T = TypeVar("T")

_KEK_HEX: Final = re.compile(rb"[0-9a-fA-F]{64}")


class Call(NamedTuple, Generic[T]):
    """One request. `body` is None for a GET; a `bytearray` holds a key: wipe it once the call has ended."""

    target: bytes
    body: bytes | bytearray | None
    retry: bool
    decode: Callable[[bytes], T]
    request_id: str | None = None

    def __repr__(self) -> str:
        return f"Call({self.target!r})"

    def named(self, request_id: str | None) -> Call[T]:
        """The same under the caller's request id, which the audit log keeps."""
        if request_id is not None and api.REQUEST_ID_PATTERN.fullmatch(request_id) is None:
            self.wipe()
            invalid(f"a request id is 1 to {api.REQUEST_ID_CHARS_MAX} characters of A-Z a-z 0-9 . _ : / + = -")
        return self._replace(request_id=request_id)

    def wipe(self) -> None:
        """Zeroes a body that holds a key."""
        if isinstance(self.body, bytearray):
            self.body[:] = bytes(len(self.body))


# --- answers -----------------------------------------------------------------------------------------------------

_encode: Final = msgspec.json.Encoder().encode
_decode_error: Final = msgspec.json.Decoder(api.ErrorAnswer).decode
_decode_created: Final = msgspec.json.Decoder(api.CreateDekAnswer).decode
_decode_wrapped: Final = msgspec.json.Decoder(api.WrappedAnswer).decode
_decode_encrypted: Final = msgspec.json.Decoder(api.EncryptAnswer).decode
_decode_decrypted: Final = msgspec.json.Decoder(api.DecryptAnswer).decode
_decode_encrypted_items: Final = msgspec.json.Decoder(api.EncryptBatchAnswer).decode
_decode_decrypted_items: Final = msgspec.json.Decoder(api.DecryptBatchAnswer).decode
_decode_checked: Final = msgspec.json.Decoder(api.CheckBatchAnswer).decode
_decode_object: Final = msgspec.json.Decoder(dict[str, object]).decode
_decode_keys: Final = msgspec.json.Decoder(api.KeyListAnswer).decode
_decode_key: Final = msgspec.json.Decoder(api.KeyAnswer).decode
_decode_destroyed: Final = msgspec.json.Decoder(api.DestroyKeyAnswer).decode
_decode_pruned: Final = msgspec.json.Decoder(api.PruneKekAnswer).decode
_decode_data_key: Final = msgspec.json.Decoder(api.DataKeyAnswer).decode
_decode_rotation: Final = msgspec.json.Decoder(api.RotateKekAnswer).decode
_decode_random: Final = msgspec.json.Decoder(api.RandomAnswer).decode


def read(call: Call[T], answer: Answer) -> T:
    """The value of an answer. Raises KmsRefusedError or KmsProtocolError."""
    try:
        if answer.status in (200, 202):
            return call.decode(answer.body)
        refused = _decode_error(answer.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise KmsProtocolError(f"the key service's answer ({answer.status}) has not the shape of its verb") from error
    raise refusal(refused.code, refused.error, answer.status)


def _refused(value: bytes | UnsetType, error: str | UnsetType, code: str | UnsetType) -> KmsRefusedError:
    if value is UNSET and isinstance(error, str) and isinstance(code, str):
        return refusal(code, error)
    raise KmsProtocolError("an item of the key service's answer is neither a value nor an error")


def _ciphertexts(body: bytes) -> list[Outcome]:
    return [
        item.ciphertext
        if isinstance(item.ciphertext, bytes) and item.error is UNSET and item.code is UNSET
        else _refused(item.ciphertext, item.error, item.code)
        for item in _decode_encrypted_items(body).items
    ]


def _plaintexts(body: bytes) -> list[Outcome]:
    return [
        item.plaintext
        if isinstance(item.plaintext, bytes) and item.error is UNSET and item.code is UNSET
        else _refused(item.plaintext, item.error, item.code)
        for item in _decode_decrypted_items(body).items
    ]


def _counted(decode: Callable[[bytes], list[Outcome]], count: int) -> Callable[[bytes], list[Outcome]]:
    def decode_counted(body: bytes) -> list[Outcome]:
        outcomes = decode(body)
        if len(outcomes) != count:
            raise KmsProtocolError(f"the key service answered {len(outcomes)} items of {count}")
        return outcomes

    return decode_counted


def _verdicts(count: int) -> Callable[[bytes], list[Verdict]]:
    def decode(body: bytes) -> list[Verdict]:
        answer = _decode_checked(body)
        verdicts: list[Verdict] = [None] * count
        after = -1
        for refused in answer.refused:
            if not after < refused.item < count:
                raise KmsProtocolError(f"the key service refused item {refused.item} of {count} after item {after}")
            after = refused.item
            verdicts[after] = refusal(refused.code, refused.error)
        if answer.opened + len(answer.refused) != count:
            raise KmsProtocolError(f"the key service answered other than {count} items")
        return verdicts

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
    thread_id: str, replaces: str | None, purpose: api.Purpose | None
) -> Call[api.CreateDekAnswer]:
    check_id("thread_id", thread_id)
    request: dict[str, str] = {"thread_id": thread_id}
    if replaces is not None:
        check_id("replaces", replaces)
        request["replaces"] = replaces
    if purpose is not None:
        request["purpose"] = purpose
    return Call(b"/create_dek_for_thread", _encode(request), False, _decode_created)


def get_wrapped(key_id: str) -> Call[bytes]:
    return Call(b"/get_wrapped?key_id=" + _quoted(key_id), None, True, lambda body: _decode_wrapped(body).wrapped)


def encrypt(item: EncryptItem) -> Call[bytes]:
    return Call(b"/encrypt", _encode(item), True, lambda body: _decode_encrypted(body).ciphertext)


def decrypt(item: DecryptItem) -> Call[bytes]:
    return Call(b"/decrypt", _encode(item), True, lambda body: _decode_decrypted(body).plaintext)


def encrypt_batch(items: Sequence[EncryptItem]) -> Call[list[Outcome]]:
    return Call(b"/encrypt_batch", _encode({"items": items}), True, _counted(_ciphertexts, len(items)))


def decrypt_batch(items: Sequence[DecryptItem]) -> Call[list[Outcome]]:
    return Call(b"/decrypt_batch", _encode({"items": items}), True, _counted(_plaintexts, len(items)))


def reencrypt_batch(from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem]) -> Call[list[Outcome]]:
    check_id("from_key_id", from_key_id)
    check_id("to_key_id", to_key_id)
    body = _encode({"from_key_id": from_key_id, "to_key_id": to_key_id, "items": items})
    return Call(b"/reencrypt_batch", body, True, _counted(_ciphertexts, len(items)))


def check_batch(key_id: str, items: Sequence[ReencryptItem], thread_id: str | None) -> Call[list[Verdict]]:
    check_id("key_id", key_id)
    request: dict[str, object] = {"key_id": key_id, "items": items}
    if thread_id is not None:
        check_id("thread_id", thread_id)
        request["thread_id"] = thread_id
    return Call(b"/check_batch", _encode(request), True, _verdicts(len(items)))


def generate_data_key(key_id: str, aad: bytes, with_plaintext: bool) -> Call[api.DataKeyAnswer]:
    """Not repeated: each answer is another key, and a lost one would stand in the audit log unexplained."""
    check_id("key_id", key_id)
    request: dict[str, object] = {"key_id": key_id, "plaintext": with_plaintext}
    if aad:
        request["aad"] = aad
    return Call(b"/generate_data_key", _encode(request), False, _decode_data_key)


def random(count: int) -> Call[bytes]:
    def decode(body: bytes) -> bytes:
        value = _decode_random(body).random
        if len(value) != count:
            raise KmsProtocolError("the key service answered another number of random bytes")
        return value

    return Call(b"/random", _encode({"count": count}), True, decode)


def rotate_kek(
    new_kek_hex: bytes | bytearray | str | None, wait: bool, verify: Sequence[DecryptItem]
) -> Call[api.RotateKekAnswer]:
    """A new key is checked here, since it is put into the body as it is: last, into a body of its final size, for one
    that grows leaves copies.
    """
    before = b'{"wait":true' if wait else b'{"wait":false'
    if verify:
        samples = [{"key_id": item.key_id, "ciphertext": item.ciphertext, "aad": item.aad} for item in verify]
        before += b',"verify":' + _encode(samples)
    if new_kek_hex is None:
        return Call(b"/rotate_kek", before + b"}", False, _decode_rotation)
    digits = new_kek_hex.encode("ascii", "replace") if isinstance(new_kek_hex, str) else new_kek_hex
    if _KEK_HEX.fullmatch(digits) is None:
        invalid("new_kek_hex has 64 hexadecimal characters")
    before += b',"new_kek_hex":"'
    body = bytearray(len(before) + len(digits) + 2)
    body[: len(before)] = before
    body[len(before) : -2] = digits
    body[-2:] = b'"}'
    return Call(b"/rotate_kek", body, False, _decode_rotation)


def list_keys(
    thread_id: str | None, state: api.State | None, cursor: str | None, limit: int | None
) -> Call[api.KeyListAnswer]:
    given = {"thread_id": thread_id, "state": state, "cursor": cursor, "limit": limit}
    query = urlencode({name: value for name, value in given.items() if value is not None})
    return Call(f"/keys?{query}".encode("ascii") if query else b"/keys", None, True, _decode_keys)


def get_key(key_id: str) -> Call[api.KeyAnswer]:
    return Call(b"/keys/" + _quoted(key_id), None, True, _decode_key)


def retire_key(key_id: str) -> Call[api.KeyAnswer]:
    return Call(b"/keys/" + _quoted(key_id) + b"/retire", b"{}", True, _decode_key)  # a retired key stays retired


def destroy_key(key_id: str) -> Call[api.DestroyKeyAnswer]:
    return Call(b"/keys/" + _quoted(key_id) + b"/destroy", _encode({"key_id": key_id}), False, _decode_destroyed)


def prune_kek(backups: bool, backups_before: str | None) -> Call[api.PruneKekAnswer]:
    request: dict[str, object] = {"backups": backups}
    if backups_before is not None:
        request["backups_before"] = backups_before
    return Call(b"/kek/prune", _encode(request), False, _decode_pruned)


def _quoted(key_id: str) -> bytes:
    check_id("key_id", key_id)
    return quote(key_id, safe="").encode("ascii")
