"""The verb table: each verb's name, path, roles, request, answer and possible refusals.

Owns: everything about a verb that client and daemon share. Routing, decoding, authorisation, audit lines, metrics, both
clients and docs/minikms-openapi.yaml follow from these entries; `minikms_daemon.service` has one method for each.
Invariants: a name occurs once, and so does a path with a method; a verb is repeatable only if carrying it out twice
does no harm. The table must never say that a caller without a role may use a verb: only `HEALTH` and `READY` ask for
none, and they are not in `VERBS`.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from minikms.api.audit_verbs import AUDIT_VERBS
from minikms.api.contract import (
    CODE_CONFLICT,
    CODE_DECRYPTION_FAILED,
    CODE_INTERNAL,
    CODE_INTERRUPTED,
    CODE_INVALID_POLICY,
    CODE_KEY_DESTROYED,
    CODE_KEY_NOT_FOUND,
    CODE_KEY_RETIRED,
    CODE_KEY_UNREADABLE,
    CODE_NOT_PINNED,
    CODE_STORAGE_UNAVAILABLE,
    CODE_TOO_MANY,
    CODE_WRONG_PURPOSE,
    CODE_WRONG_SLOT,
    CODE_WRONG_THREAD,
)
from minikms.api.replica_verbs import REPLICA_VERBS
from minikms.api.root_verbs import ROOT_VERBS
from minikms.api.seal_verbs import SEAL_VERBS
from minikms.api.status import StatusAnswer
from minikms.api.verb import Base64, Purpose, Request, State, Verb

_KEY: Final = (CODE_KEY_NOT_FOUND, CODE_KEY_DESTROYED, CODE_KEY_UNREADABLE)
_OPEN_KEY: Final = (*_KEY, CODE_INTERNAL)
_WRITE: Final = (CODE_STORAGE_UNAVAILABLE, CODE_INTERRUPTED)


# --- encrypt and decrypt -----------------------------------------------------------------------------------------


class EncryptItemRequest(Request):
    key_id: str
    plaintext: Base64
    aad: Base64 | UnsetType = UNSET
    thread_id: str | UnsetType = UNSET
    request_id: str | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"EncryptItemRequest(key_id={self.key_id!r})"


class EncryptAnswer(msgspec.Struct):
    ciphertext: bytes


ENCRYPT: Final = Verb(
    "encrypt",
    "POST",
    "/encrypt",
    ("encrypt",),
    EncryptItemRequest,
    EncryptAnswer,
    "Encrypt one plaintext",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_WRONG_PURPOSE, CODE_KEY_RETIRED),
    repeatable=True,
    proxied=True,
)


class DecryptItemRequest(Request):
    key_id: str
    ciphertext: Base64
    aad: Base64 | UnsetType = UNSET
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
    DecryptItemRequest,
    DecryptAnswer,
    "Decrypt one ciphertext",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_WRONG_PURPOSE, CODE_DECRYPTION_FAILED),
    repeatable=True,
    proxied=True,
    charged_as="decrypts",
    answers_plaintext=True,
)


class EncryptBatchRequest(Request):
    items: list[EncryptItemRequest]


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
    "Encrypt a list of plaintexts. Each item has its own result",
    (CODE_TOO_MANY,),
    repeatable=True,
    roles_by_item=True,
    proxied=True,
)


class DecryptBatchRequest(Request):
    items: list[DecryptItemRequest]


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
    "Decrypt a list of ciphertexts. Each item has its own result",
    (CODE_TOO_MANY,),
    repeatable=True,
    roles_by_item=True,
    proxied=True,
    charged_as="decrypts",
    answers_plaintext=True,
)

# --- keys: create and read -----------------------------------------------------------------------------------------


class CreateDekRequest(Request):
    """`numbered`: the key gets the next number of its thread. `replaces` then names its newest numbered key, and is
    absent if there is none.
    """

    thread_id: str
    replaces: str | UnsetType = UNSET
    purpose: Purpose | UnsetType = UNSET
    numbered: bool | UnsetType = UNSET
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
    "Create a key for a thread. The key is durable before the answer",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_CONFLICT, *_WRITE),
    proxied=True,
)


class GetOrCreateDekRequest(Request):
    thread_id: str
    purpose: Purpose | UnsetType = UNSET
    request_id: str | UnsetType = UNSET


class GetOrCreateDekAnswer(msgspec.Struct, frozen=True):
    """`created`: the key is new. It is durable before the answer, new or not."""

    key_id: str
    created: bool


GET_OR_CREATE_DEK: Final = Verb(
    "get_or_create_dek",
    "POST",
    "/get_or_create_dek_for_thread",
    ("create",),
    GetOrCreateDekRequest,
    GetOrCreateDekAnswer,
    "Find the newest active key of a thread. Create one if there is none",
    (CODE_KEY_UNREADABLE, CODE_INTERNAL, *_WRITE),
    repeatable=True,
    proxied=True,
)


class KeyRequest(Request):
    """`key_id` comes from the path or from the query."""

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
    "Read a key, wrapped under its KEK",
    _KEY,
    repeatable=True,
    proxied=True,
)

# --- the daemon ------------------------------------------------------------------------------------------------------

STATUS: Final = Verb(
    "status",
    "GET",
    "/status",
    ("monitor",),
    Request,
    StatusAnswer,
    "Read the status of the daemon: keys, audit log, memory, hardening, warnings",
    repeatable=True,
    proxied=True,
)
METRICS: Final = Verb(
    "metrics",
    "GET",
    "/metrics",
    ("monitor",),
    Request,
    str,
    "Read the metrics in the text format of Prometheus",
    repeatable=True,
)


class PolicyAnswer(msgspec.Struct, frozen=True):
    """The policy in force. `sha256`: of its file, in hexadecimal. `generation` rises with each policy of this run."""

    sha256: str
    generation: int


RELOAD_POLICY: Final = Verb(
    "policy_reload",
    "POST",
    "/policy/reload",
    ("rotate",),
    Request,
    PolicyAnswer,
    "Read the policy file again, and take it into force if it is valid",
    (CODE_INVALID_POLICY, CODE_CONFLICT, CODE_INTERRUPTED),
    repeatable=True,
)
HEALTH: Final = Verb(
    "health",
    "GET",
    "/health",
    (),
    Request,
    str,
    "Check that the daemon answers. Every peer that can connect may ask",
    repeatable=True,
)
"""Not in `VERBS`: every peer gets the answer, authorised or not, and it is not audited."""

# --- many records of one key -----------------------------------------------------------------------------------------


class ReencryptItemRequest(Request):
    """One ciphertext of /reencrypt_batch or /check_batch."""

    ciphertext: Base64
    aad: Base64 | UnsetType = UNSET


class ReencryptBatchRequest(Request):
    """The answer is an EncryptBatchAnswer. Both keys belong to one thread."""

    from_key_id: str
    to_key_id: str
    items: list[ReencryptItemRequest]


REENCRYPT_BATCH: Final = Verb(
    "reencrypt_batch",
    "POST",
    "/reencrypt_batch",
    ("decrypt", "encrypt"),
    ReencryptBatchRequest,
    EncryptBatchAnswer,
    "Re-encrypt ciphertexts of one key under another key of the same thread",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_WRONG_PURPOSE, CODE_KEY_RETIRED, CODE_TOO_MANY),
    repeatable=True,
    proxied=True,
    charged_as="reencrypts",
)


class CheckBatchRequest(Request):
    """Asks which `items` decrypt under the key. The answer is a CheckBatchAnswer, which holds no plaintext."""

    key_id: str
    items: list[ReencryptItemRequest]
    thread_id: str | UnsetType = UNSET


class RefusedItemAnswer(msgspec.Struct, frozen=True):
    """A ciphertext that does not decrypt. `item` is its index in the request, from 0."""

    item: int
    error: str
    code: str


class CheckBatchAnswer(msgspec.Struct, frozen=True):
    """`opened` counts the items that decrypt. `refused` lists the others, in the order of the request."""

    opened: int
    refused: list[RefusedItemAnswer]


CHECK_BATCH: Final = Verb(
    "check_batch",
    "POST",
    "/check_batch",
    ("decrypt",),
    CheckBatchRequest,
    CheckBatchAnswer,
    "Check which ciphertexts decrypt under a key. The answer holds no plaintext",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_TOO_MANY),
    repeatable=True,
    proxied=True,
    charged_as="reencrypts",
)


class MacItemRequest(Request):
    """One value of /mac."""

    plaintext: Base64
    aad: Base64 | UnsetType = UNSET

    def __repr__(self) -> str:
        return "MacItemRequest()"


class MacRequest(Request):
    """`key_id` names a key of purpose `mac`."""

    key_id: str
    items: list[MacItemRequest]
    thread_id: str | UnsetType = UNSET


class MacAnswer(msgspec.Struct, frozen=True):
    """A MAC of 32 bytes for each item, in order."""

    macs: list[bytes]


MAC: Final = Verb(
    "mac",
    "POST",
    "/mac",
    ("encrypt",),
    MacRequest,
    MacAnswer,
    "Compute HMAC-SHA-256 of a list of plaintexts under a key of purpose `mac`",
    (*_OPEN_KEY, CODE_WRONG_THREAD, CODE_WRONG_PURPOSE, CODE_TOO_MANY),
    repeatable=True,
    proxied=True,
    charged_as="decrypts",
)

# --- keys for the caller's own use -----------------------------------------------------------------------------------


class GenerateDataKeyRequest(Request):
    """`key_id` names a key of purpose `data` or `derived`. With `plaintext: false` the answer has no `plaintext`."""

    key_id: str
    aad: Base64 | UnsetType = UNSET
    plaintext: bool | UnsetType = UNSET


class DataKeyAnswer(msgspec.Struct, omit_defaults=True):
    """`plaintext` is the new key, 32 bytes. `ciphertext` is the same key encrypted; /decrypt decrypts it."""

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
    "Generate a random key for the caller, encrypted under a key of purpose `data`",
    (*_OPEN_KEY, CODE_WRONG_PURPOSE, CODE_KEY_RETIRED),
    proxied=True,
    answers_plaintext=True,
)
"""Not repeatable: each answer is a new key, and the audit log would record one that the caller never received."""


class RandomRequest(Request):
    count: int


class RandomAnswer(msgspec.Struct):
    random: bytes

    def __repr__(self) -> str:
        return f"RandomAnswer({len(self.random)} bytes)"


RANDOM: Final = Verb(
    "random",
    "POST",
    "/random",
    ("data_key",),
    RandomRequest,
    RandomAnswer,
    "Generate random bytes",
    repeatable=True,
    proxied=True,
)

# --- the KEK ---------------------------------------------------------------------------------------------------------


class VerifySample(Request):
    """A ciphertext that the caller knows to decrypt."""

    key_id: str
    ciphertext: Base64
    aad: Base64 | UnsetType = UNSET


Priority = Literal["low", "normal", "high"]


class RotateKekRequest(Request):
    """`new_kek_hex` (64 hex characters) is the new root key. Without it, the root key stays the same. `priority`:
    whether the rotation or other requests go first, `normal` by default. A rotation that already runs takes it too.
    """

    new_kek_hex: str | UnsetType = UNSET
    wait: bool | UnsetType = UNSET
    priority: Priority | UnsetType = UNSET
    verify: list[VerifySample] | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"RotateKekRequest(wait={self.wait!r})"


class RotateKekAnswer(msgspec.Struct, frozen=True):
    """`rewrapped` counts the keys that are rewrapped so far. `status` is `running` if the rotation has not ended."""

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
    "Rotate the KEK, and replace the root key if the request has a new one",
    (
        *_OPEN_KEY,
        CODE_CONFLICT,
        CODE_WRONG_PURPOSE,
        CODE_WRONG_SLOT,
        CODE_NOT_PINNED,
        CODE_TOO_MANY,
        CODE_DECRYPTION_FAILED,
        *_WRITE,
    ),
    may_answer_202=True,
    root_field="new_kek_hex",
)


class PruneKekRequest(Request):
    """`backups`: also remove the backups of DEK files. `backups_before`: only backups older than this time, written
    `YYYYMMDDTHHMMSS`.
    """

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
    "Destroy the KEK versions that no file needs",
    (CODE_CONFLICT, *_WRITE),
)

# --- keys: list, retire, destroy -------------------------------------------------------------------------------------


class ListKeysRequest(Request):
    """`cursor` is `next_cursor` of the previous page. The default of `limit` is LIST_KEYS_COUNT_DEFAULT."""

    thread_id: str | UnsetType = UNSET
    state: str | UnsetType = UNSET
    cursor: str | UnsetType = UNSET
    limit: int | UnsetType = UNSET


class KeyAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One key. `created_at` is RFC 3339 in UTC. `number`: in its thread; absent for a key without one."""

    key_id: str
    thread_id: str
    purpose: Purpose
    state: State
    kek_version: int
    created_at: str
    number: int = 0


class KeyListAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One page. `next_cursor` is absent on the last page. `indexing`: the daemon is still reading key files after its
    start, so keys may be missing.
    """

    keys: list[KeyAnswer]
    next_cursor: str | None = None
    indexing: bool = False


LIST_KEYS: Final = Verb(
    "list_keys",
    "GET",
    "/keys",
    ("monitor",),
    ListKeysRequest,
    KeyListAnswer,
    "List keys, one page per request",
    repeatable=True,
    proxied=True,
)
GET_KEY: Final = Verb(
    "get_key",
    "GET",
    "/keys/{key_id}",
    ("monitor",),
    KeyRequest,
    KeyAnswer,
    "Read the metadata of a key",
    _KEY,
    repeatable=True,
    proxied=True,
)
RETIRE_KEY: Final = Verb(
    "retire_key",
    "POST",
    "/keys/{key_id}/retire",
    ("create",),
    KeyRequest,
    KeyAnswer,
    "Retire a key: it decrypts, but no longer encrypts",
    (*_KEY, *_WRITE),
    repeatable=True,
    proxied=True,
)


class DestroyKeyRequest(KeyRequest):
    """`key_id` repeats the key id of the path, so that a mistyped path destroys no key. With `thread_id` only a key of
    that thread is destroyed; a key that is destroyed already has none."""

    thread_id: str | UnsetType = UNSET


class DestroyKeyAnswer(msgspec.Struct, frozen=True):
    """What the receipt says. `archives` names the backup archives that may still hold the key; `tombstone` is the
    number of its tombstone. An older daemon gives nothing after `archives`."""

    key_id: str
    state: State
    backups_removed: int
    archives: list[str]
    destroyed_at: str = ""
    epoch: int = 0
    tombstone: int = 0
    tombstone_tag: str = ""


DESTROY_KEY: Final = Verb(
    "destroy_key",
    "POST",
    "/keys/{key_id}/destroy",
    ("destroy",),
    DestroyKeyRequest,
    DestroyKeyAnswer,
    "Destroy a retired key. Nothing can decrypt its ciphertexts after that",
    (CODE_KEY_NOT_FOUND, CODE_KEY_UNREADABLE, CODE_WRONG_THREAD, CODE_CONFLICT, *_WRITE),
    key_id_in_body=True,
)

VERBS: Final[tuple[Verb[Any, Any], ...]] = (
    ENCRYPT, DECRYPT, ENCRYPT_BATCH, DECRYPT_BATCH, CREATE_DEK, GET_OR_CREATE_DEK, GET_WRAPPED, STATUS, METRICS,
    RELOAD_POLICY, REENCRYPT_BATCH, CHECK_BATCH, MAC, GENERATE_DATA_KEY, RANDOM, ROTATE_KEK, PRUNE_KEK, LIST_KEYS,
    GET_KEY, RETIRE_KEY, DESTROY_KEY, *ROOT_VERBS, *SEAL_VERBS, *AUDIT_VERBS, *REPLICA_VERBS,
)  # fmt: skip
"""Every verb that needs a role. Each use leaves an audit line; of `REPORT_AUDIT_POSITION` only the first report and
refused ones do (docs/spec/api.md), of `REPLICA_FOLLOW` and `REPLICA_NEXT` only refused ones.
"""
