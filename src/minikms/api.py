"""The wire contract of miniKMS: request and answer shapes, error codes, bounds.

Owns: every name, pattern and limit that both a client and the daemon must agree on. It is the only module that both
import. Invariants: no I/O, no cryptography, no state; a bound is a named constant with its unit last; no shape shows
plaintext or a key in its repr.
It must never hold a default that weakens a check (an absent field is `UNSET`, never `""`).

All binary values travel as standard base64 with padding (RFC 4648 section 4), canonical: a value that would
encode to other characters than those sent is refused.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

# --- bounds -----------------------------------------------------------------------------------------------------
BODY_BYTES_MAX: Final = 16 * 1024 * 1024
HEAD_BYTES_MAX: Final = 16 * 1024
HEADERS_COUNT_MAX: Final = 64
BATCH_ITEMS_MAX: Final = 1024
CONNECTIONS_MAX: Final = 2048
PIPELINED_REQUESTS_MAX: Final = 64
PLAINTEXT_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of one item. Four times the message size that the server accepts; base64 of it still fits a body."""
AAD_BYTES_MAX: Final = 4096
REQUEST_ID_CHARS_MAX: Final = 128
ID_CHARS_MAX: Final = 128
LIST_KEYS_COUNT_MAX: Final = 1000
RANDOM_BYTES_MAX: Final = 4096
VERIFY_SAMPLES_MAX: Final = 64

# --- identifiers ------------------------------------------------------------------------------------------------
THREAD_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
KEY_ID_PATTERN: Final = re.compile(r"k_[0-7][0-9a-hjkmnp-tv-z]{25}", re.ASCII)
"""`k_` and 128 bits in lower-case Crockford base 32: 48 bits of Unix milliseconds, then 80 random bits (as a ULID)."""
REQUEST_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)

REQUEST_ID_HEADER: Final = "x-request-id"

# --- error codes ------------------------------------------------------------------------------------------------
# Stable words: a client may switch on them. docs/spec/api.md says when each is sent.
CODE_INVALID_REQUEST: Final = "invalid_request"
CODE_UNAUTHORIZED: Final = "unauthorized"
CODE_FORBIDDEN: Final = "forbidden"
CODE_NOT_FOUND: Final = "not_found"
CODE_METHOD_NOT_ALLOWED: Final = "method_not_allowed"
CODE_KEY_NOT_FOUND: Final = "key_not_found"
CODE_KEY_RETIRED: Final = "key_retired"
CODE_KEY_DESTROYED: Final = "key_destroyed"
CODE_KEY_EXHAUSTED: Final = "key_exhausted"
CODE_KEY_UNREADABLE: Final = "key_unreadable"
CODE_WRONG_THREAD: Final = "wrong_thread"
CODE_WRONG_PURPOSE: Final = "wrong_purpose"
CODE_DECRYPTION_FAILED: Final = "decryption_failed"
CODE_TOO_LARGE: Final = "too_large"
CODE_TOO_MANY: Final = "too_many"
CODE_TIMEOUT: Final = "timeout"
CODE_CONFLICT: Final = "conflict"
CODE_AUDIT_UNAVAILABLE: Final = "audit_unavailable"
CODE_STORAGE_UNAVAILABLE: Final = "storage_unavailable"
CODE_SHUTTING_DOWN: Final = "shutting_down"
CODE_INTERRUPTED: Final = "interrupted"
CODE_INTERNAL: Final = "internal"

Purpose = Literal["thread", "data"]
State = Literal["active", "retired", "destroyed"]


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """Base of all requests: an unknown field is refused, so that a mistyped `aad` is never ignored."""


class CreateDekRequest(Request):
    thread_id: str
    replaces: str | UnsetType = UNSET
    purpose: Purpose | UnsetType = UNSET
    request_id: str | UnsetType = UNSET


class CreateDekAnswer(msgspec.Struct):
    key_id: str
    wrapped: bytes


class WrappedAnswer(msgspec.Struct):
    wrapped: bytes


class EncryptItem(Request):
    """`plaintext` and `aad` are base64 text; the daemon decodes them strictly (msgspec would accept lax base64)."""

    key_id: str
    plaintext: str
    aad: str | UnsetType = UNSET
    thread_id: str | UnsetType = UNSET
    request_id: str | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"EncryptItem(key_id={self.key_id!r})"


class DecryptItem(Request):
    key_id: str
    ciphertext: str
    aad: str | UnsetType = UNSET
    thread_id: str | UnsetType = UNSET
    request_id: str | UnsetType = UNSET


class EncryptBatchRequest(Request):
    items: list[EncryptItem]


class DecryptBatchRequest(Request):
    items: list[DecryptItem]


class EncryptAnswer(msgspec.Struct):
    ciphertext: bytes


class DecryptAnswer(msgspec.Struct):
    plaintext: bytes

    def __repr__(self) -> str:
        return f"DecryptAnswer({len(self.plaintext)} bytes)"


class EncryptBatchItemAnswer(msgspec.Struct, omit_defaults=True):
    """Exactly one of `ciphertext` and `error`+`code`."""

    ciphertext: bytes | UnsetType = UNSET
    error: str | UnsetType = UNSET
    code: str | UnsetType = UNSET


class DecryptBatchItemAnswer(msgspec.Struct, omit_defaults=True):
    """Exactly one of `plaintext` and `error`+`code`."""

    plaintext: bytes | UnsetType = UNSET
    error: str | UnsetType = UNSET
    code: str | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"DecryptBatchItemAnswer(code={self.code!r})"


class EncryptBatchAnswer(msgspec.Struct):
    items: list[EncryptBatchItemAnswer]


class DecryptBatchAnswer(msgspec.Struct):
    items: list[DecryptBatchItemAnswer]


class ErrorAnswer(msgspec.Struct):
    error: str
    code: str


# --- the life of a key, and keys for the caller's own use -----------------------------------------------------------


class ReencryptItem(Request):
    """Of /check_batch too."""

    ciphertext: str
    aad: str | UnsetType = UNSET


class ReencryptBatchRequest(Request):
    """Answered by EncryptBatchAnswer. Both keys are of one thread."""

    from_key_id: str
    to_key_id: str
    items: list[ReencryptItem]


class CheckBatchRequest(Request):
    """Answered by CheckBatchAnswer. Whether `items` open under the key; no plaintext is answered."""

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


class KeyAnswer(msgspec.Struct, frozen=True):
    """One key. `created_at` is RFC 3339 in UTC; `uses_max` an upper bound of its uses so far."""

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


class DestroyKeyRequest(Request):
    """The id repeated, so that no slip of a path destroys a key."""

    key_id: str


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


class RandomRequest(Request):
    count: int


class RandomAnswer(msgspec.Struct):
    random: bytes

    def __repr__(self) -> str:
        return f"RandomAnswer({len(self.random)} bytes)"


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


class DestroyKeyAnswer(msgspec.Struct, frozen=True):
    """The receipt. `archives` names what may still hold the key: backup archives made while it lived."""

    key_id: str
    state: State
    backups_removed: int
    archives: list[str]


class RotateKekAnswer(msgspec.Struct, frozen=True):
    """`rewrapped` counts the keys done so far; `status` is `running` when the rotation was not waited for."""

    status: Literal["ok", "running"]
    kek_version: int
    rewrapped: int
