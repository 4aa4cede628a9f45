"""The verb table: each verb's name, path, roles, request, answer and possible refusals.

Owns: everything about a verb that client and daemon share. Routing, decoding, authorisation, audit lines, metrics, both
clients and docs/minikms-openapi.yaml follow from these entries; `minikms.service` has one method for each. Invariants:
a name and a path occur once; a verb is repeatable only if carrying it out twice does no harm. The table must never say
that a caller without a role may use a verb: only `HEALTH` asks for none, and it is not in `VERBS`.
"""

from __future__ import annotations

from typing import Any, Final, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from minikms.api.contract import (
    CODE_CONFLICT,
    CODE_DECRYPTION_FAILED,
    CODE_INTERNAL,
    CODE_INTERRUPTED,
    CODE_KEY_DESTROYED,
    CODE_KEY_EXHAUSTED,
    CODE_KEY_NOT_FOUND,
    CODE_KEY_RETIRED,
    CODE_KEY_UNREADABLE,
    CODE_STORAGE_UNAVAILABLE,
    CODE_TOO_MANY,
    CODE_WRONG_PURPOSE,
    CODE_WRONG_THREAD,
)

Role = Literal["create", "encrypt", "decrypt", "rotate", "destroy", "data_key", "audit", "monitor"]
Purpose = Literal["thread", "data"]
State = Literal["active", "retired", "destroyed"]


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """Base of all requests: an unknown field is refused, so that a mistyped `aad` is never ignored."""


RequestT = TypeVar("RequestT", bound=Request)
AnswerT = TypeVar("AnswerT")


class Verb(msgspec.Struct, Generic[RequestT, AnswerT], frozen=True, eq=False):
    """One operation of the key service. Verbs are compared by identity.

    name: in the audit log, in metrics, and as the operation of the OpenAPI document. path: `{key_id}` stands for the
    `key_id` of a KeyRequest; other fields are the query of a GET and the body of a POST. roles: the caller needs all.
    answer: the type of the JSON answer; `str` for plain text.
    """

    name: str
    method: Literal["GET", "POST"]
    path: str
    roles: tuple[Role, ...]
    request: type[RequestT]
    answer: type[AnswerT]
    summary: str
    refusals: tuple[str, ...] = ()
    """Codes beside those that every verb may answer. `internal` here: a 503, when no slot for another key is free."""
    repeatable: bool = False
    """A client may send the request again when it does not know whether the first one was carried out."""
    roles_by_item: bool = False
    """A caller without the role gets 200, and `forbidden` for each item."""
    key_id_in_body: bool = False
    """The body repeats the key id of the path."""
    may_answer_202: bool = False
    """With the same answer, while the work goes on."""

    @property
    def is_batch(self) -> bool:
        """The request has a list `items` of at most BATCH_ITEMS_MAX."""
        return "items" in self.request.__struct_fields__

    @property
    def has_body(self) -> bool:
        return self.method == "POST" and (self.key_id_in_body or "{key_id}" not in self.path)


_KEY: Final = (CODE_KEY_NOT_FOUND, CODE_KEY_DESTROYED, CODE_KEY_UNREADABLE)
_OPEN_KEY: Final = (*_KEY, CODE_INTERNAL)
_WRITE: Final = (CODE_STORAGE_UNAVAILABLE, CODE_INTERRUPTED)


class ErrorAnswer(msgspec.Struct):
    error: str
    code: str


# --- encrypt and decrypt -----------------------------------------------------------------------------------------


class EncryptItem(Request):
    """`plaintext` and `aad` are base64 text; the daemon decodes them strictly (msgspec would accept lax base64)."""

    key_id: str
    plaintext: str
    aad: str | UnsetType = UNSET
    thread_id: str | UnsetType = UNSET
    request_id: str | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"EncryptItem(key_id={self.key_id!r})"


class EncryptAnswer(msgspec.Struct):
    ciphertext: bytes


ENCRYPT: Final = Verb(
    "encrypt",
    "POST",
    "/encrypt",
    ("encrypt",),
    EncryptItem,
    EncryptAnswer,
    "Encrypt one text",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_KEY_RETIRED, CODE_KEY_EXHAUSTED, CODE_STORAGE_UNAVAILABLE),
    repeatable=True,
)


class DecryptItem(Request):
    key_id: str
    ciphertext: str
    aad: str | UnsetType = UNSET
    thread_id: str | UnsetType = UNSET
    request_id: str | UnsetType = UNSET


class DecryptAnswer(msgspec.Struct):
    plaintext: bytes

    def __repr__(self) -> str:
        return f"DecryptAnswer({len(self.plaintext)} bytes)"


DECRYPT: Final = Verb(
    "decrypt",
    "POST",
    "/decrypt",
    ("decrypt",),
    DecryptItem,
    DecryptAnswer,
    "Decrypt one text",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_DECRYPTION_FAILED),
    repeatable=True,
)


class EncryptBatchRequest(Request):
    items: list[EncryptItem]


class EncryptBatchItemAnswer(msgspec.Struct, omit_defaults=True):
    """Exactly one of `ciphertext` and `error`+`code`."""

    ciphertext: bytes | UnsetType = UNSET
    error: str | UnsetType = UNSET
    code: str | UnsetType = UNSET


class EncryptBatchAnswer(msgspec.Struct):
    items: list[EncryptBatchItemAnswer]


ENCRYPT_BATCH: Final = Verb(
    "encrypt_batch",
    "POST",
    "/encrypt_batch",
    ("encrypt",),
    EncryptBatchRequest,
    EncryptBatchAnswer,
    "Encrypt many; each item has its own outcome",
    (CODE_TOO_MANY,),
    repeatable=True,
    roles_by_item=True,
)


class DecryptBatchRequest(Request):
    items: list[DecryptItem]


class DecryptBatchItemAnswer(msgspec.Struct, omit_defaults=True):
    """Exactly one of `plaintext` and `error`+`code`."""

    plaintext: bytes | UnsetType = UNSET
    error: str | UnsetType = UNSET
    code: str | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"DecryptBatchItemAnswer(code={self.code!r})"


class DecryptBatchAnswer(msgspec.Struct):
    items: list[DecryptBatchItemAnswer]


DECRYPT_BATCH: Final = Verb(
    "decrypt_batch",
    "POST",
    "/decrypt_batch",
    ("decrypt",),
    DecryptBatchRequest,
    DecryptBatchAnswer,
    "Decrypt many; each item has its own outcome",
    (CODE_TOO_MANY,),
    repeatable=True,
    roles_by_item=True,
)

# --- keys: create and read -----------------------------------------------------------------------------------------


class CreateDekRequest(Request):
    thread_id: str
    replaces: str | UnsetType = UNSET
    purpose: Purpose | UnsetType = UNSET
    request_id: str | UnsetType = UNSET


class CreateDekAnswer(msgspec.Struct):
    key_id: str
    wrapped: bytes


CREATE_DEK: Final = Verb(
    "create_dek",
    "POST",
    "/create_dek_for_thread",
    ("create",),
    CreateDekRequest,
    CreateDekAnswer,
    "A new key for a thread, on disk before the answer",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_KEY_EXHAUSTED, CODE_CONFLICT, *_WRITE),
)


class KeyRequest(Request):
    """`key_id` is the one of the path or of the query."""

    key_id: str


class WrappedAnswer(msgspec.Struct):
    wrapped: bytes


GET_WRAPPED: Final = Verb(
    "get_wrapped",
    "GET",
    "/get_wrapped",
    ("decrypt",),
    KeyRequest,
    WrappedAnswer,
    "A key as it is sealed under the current KEK",
    _KEY,
    repeatable=True,
)

# --- the daemon ------------------------------------------------------------------------------------------------------

STATUS: Final = Verb(
    "status",
    "GET",
    "/status",
    ("monitor",),
    Request,
    dict[str, object],
    "What an operator needs to know",
    repeatable=True,
)
METRICS: Final = Verb(
    "metrics",
    "GET",
    "/metrics",
    ("monitor",),
    Request,
    str,
    "The same as numbers, for Prometheus (docs/metrics.md)",
    repeatable=True,
)
HEALTH: Final = Verb(
    "health",
    "GET",
    "/health",
    (),
    Request,
    str,
    "That the daemon answers; to everybody who can connect",
    repeatable=True,
)
"""Not in `VERBS`: it is answered to every peer, authorised or not, and is not audited."""

# --- many records of one key -----------------------------------------------------------------------------------------


class ReencryptItem(Request):
    """One ciphertext of /reencrypt_batch or /check_batch."""

    ciphertext: str
    aad: str | UnsetType = UNSET


class ReencryptBatchRequest(Request):
    """Answered by EncryptBatchAnswer. Both keys are of one thread."""

    from_key_id: str
    to_key_id: str
    items: list[ReencryptItem]


REENCRYPT_BATCH: Final = Verb(
    "reencrypt_batch",
    "POST",
    "/reencrypt_batch",
    ("decrypt", "encrypt"),
    ReencryptBatchRequest,
    EncryptBatchAnswer,
    "Encrypt under another key of the same thread what is under one",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_WRONG_PURPOSE, CODE_KEY_RETIRED, CODE_STORAGE_UNAVAILABLE, CODE_TOO_MANY),
    repeatable=True,
)


class CheckBatchRequest(Request):
    """Asks which `items` open under the key. Answered by CheckBatchAnswer, which holds no plaintext."""

    key_id: str
    items: list[ReencryptItem]
    thread_id: str | UnsetType = UNSET


class RefusedItemAnswer(msgspec.Struct, frozen=True):
    """`item` is its index, from 0."""

    item: int
    error: str
    code: str


class CheckBatchAnswer(msgspec.Struct, frozen=True):
    """Every item is counted in `opened` or named in `refused`, which is in the order of the items."""

    opened: int
    refused: list[RefusedItemAnswer]


CHECK_BATCH: Final = Verb(
    "check_batch",
    "POST",
    "/check_batch",
    ("decrypt",),
    CheckBatchRequest,
    CheckBatchAnswer,
    "Whether many texts open under one key; none is answered",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_TOO_MANY),
    repeatable=True,
)

# --- keys for the caller's own use -----------------------------------------------------------------------------------


class GenerateDataKeyRequest(Request):
    """`key_id` names a key of purpose `data`; with `plaintext: false` the answer has only the sealed form."""

    key_id: str
    aad: str | UnsetType = UNSET
    plaintext: bool | UnsetType = UNSET


class DataKeyAnswer(msgspec.Struct, omit_defaults=True):
    """`ciphertext` is `plaintext` (32 bytes) as /encrypt would answer it; /decrypt opens it."""

    key_id: str
    ciphertext: bytes
    plaintext: bytes | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"DataKeyAnswer(key_id={self.key_id!r})"


GENERATE_DATA_KEY: Final = Verb(
    "generate_data_key",
    "POST",
    "/generate_data_key",
    ("data_key",),
    GenerateDataKeyRequest,
    DataKeyAnswer,
    "A fresh key of the caller's own, sealed under a key of purpose `data`",
    (*_OPEN_KEY, CODE_WRONG_PURPOSE, CODE_KEY_RETIRED, CODE_KEY_EXHAUSTED, CODE_STORAGE_UNAVAILABLE),
)
"""Not repeatable: each answer is another key, and the audit log would hold one that the caller never got."""


class RandomRequest(Request):
    count: int


class RandomAnswer(msgspec.Struct):
    random: bytes

    def __repr__(self) -> str:
        return f"RandomAnswer({len(self.random)} bytes)"


RANDOM: Final = Verb(
    "random", "POST", "/random", ("data_key",), RandomRequest, RandomAnswer, "Random bytes", repeatable=True
)

# --- the KEK ---------------------------------------------------------------------------------------------------------


class VerifySample(Request):
    """A record that the caller knows to be readable."""

    key_id: str
    ciphertext: str
    aad: str | UnsetType = UNSET


class RotateKekRequest(Request):
    """`new_kek_hex` (64 hex characters) makes that key the root key; without it the root stays."""

    new_kek_hex: str | UnsetType = UNSET
    wait: bool | UnsetType = UNSET
    verify: list[VerifySample] | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"RotateKekRequest(wait={self.wait!r})"


class RotateKekAnswer(msgspec.Struct, frozen=True):
    """`rewrapped` counts the keys done so far; `status` is `running` when the rotation was not waited for."""

    status: Literal["ok", "running"]
    kek_version: int
    rewrapped: int


ROTATE_KEK: Final = Verb(
    "rotate_kek",
    "POST",
    "/rotate_kek",
    ("rotate",),
    RotateKekRequest,
    RotateKekAnswer,
    "Rotate the KEK, and to a new root key where one is given",
    (*_OPEN_KEY, CODE_CONFLICT, CODE_TOO_MANY, CODE_DECRYPTION_FAILED, *_WRITE),
    may_answer_202=True,
)


class PruneKekRequest(Request):
    """`backups`: also remove backups of DEK files, all of them or those from before a stamp (`YYYYMMDDTHHMMSS`)."""

    backups: bool | UnsetType = UNSET
    backups_before: str | UnsetType = UNSET


class KeptKek(msgspec.Struct, frozen=True):
    version: int
    why: str


class PruneKekAnswer(msgspec.Struct, frozen=True):
    destroyed: list[int]
    kept: list[KeptKek]
    backups_removed: int


PRUNE_KEK: Final = Verb(
    "prune_kek",
    "POST",
    "/kek/prune",
    ("destroy",),
    PruneKekRequest,
    PruneKekAnswer,
    "Destroy KEK versions that no file names any more",
    (CODE_CONFLICT, *_WRITE),
)

# --- keys: list, retire, destroy -------------------------------------------------------------------------------------


class ListKeysRequest(Request):
    """`cursor` is `next_cursor` of the page before; without `limit`, LIST_KEYS_COUNT_DEFAULT keys."""

    thread_id: str | UnsetType = UNSET
    state: str | UnsetType = UNSET
    cursor: str | UnsetType = UNSET
    limit: int | UnsetType = UNSET


class KeyAnswer(msgspec.Struct, frozen=True):
    """One key. `created_at` is RFC 3339 in UTC; `uses_max` is an upper bound of its uses so far."""

    key_id: str
    thread_id: str
    purpose: Purpose
    state: State
    kek_version: int
    created_at: str
    uses_max: int


class KeyListAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One page; `next_cursor` is absent on the last. `indexing`: a start is still reading files, so keys may be
    missing.
    """

    keys: list[KeyAnswer]
    next_cursor: str | None = None
    indexing: bool = False


LIST_KEYS: Final = Verb(
    "list_keys", "GET", "/keys", ("monitor",), ListKeysRequest, KeyListAnswer, "Keys, a page at a time", repeatable=True
)
GET_KEY: Final = Verb(
    "get_key", "GET", "/keys/{key_id}", ("monitor",), KeyRequest, KeyAnswer, "One key", _KEY, repeatable=True
)
RETIRE_KEY: Final = Verb(
    "retire_key",
    "POST",
    "/keys/{key_id}/retire",
    ("create",),
    KeyRequest,
    KeyAnswer,
    "From here on the key decrypts only",
    (*_KEY, *_WRITE),
    repeatable=True,
)


class DestroyKeyRequest(KeyRequest):
    """`key_id` repeats the one in the path, so that a mistyped path destroys no key."""


class DestroyKeyAnswer(msgspec.Struct, frozen=True):
    """The receipt. `archives` names the backup archives that may still hold the key, made while it existed."""

    key_id: str
    state: State
    backups_removed: int
    archives: list[str]


DESTROY_KEY: Final = Verb(
    "destroy_key",
    "POST",
    "/keys/{key_id}/destroy",
    ("destroy",),
    DestroyKeyRequest,
    DestroyKeyAnswer,
    "Destroy a retired key, and whatever only it opens",
    (CODE_KEY_NOT_FOUND, CODE_KEY_UNREADABLE, CODE_CONFLICT, *_WRITE),
    key_id_in_body=True,
)

VERBS: Final[tuple[Verb[Any, Any], ...]] = tuple(
    value for value in globals().values() if isinstance(value, Verb) and value.roles
)
"""Every verb that is authorised and audited, in the order above."""
