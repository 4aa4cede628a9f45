"""Labels, and the associated data that binds a wrapped DEK or a record to its place.

Owns: one label per use of a key, `aad`, which is the only encoding of associated data, and the fields that wrapped DEKs
and records are bound to. Invariants: no label is a prefix of another (each ends in its only NUL); every field is
length-prefixed, so two different lists of fields never have the same encoding; a wrapped DEK is bound to key id, thread
id, purpose, algorithm, KEK version and, if it has one, its number; a record is bound to its format version, key id,
the key's thread id and the caller's aad, so it does not open at another place or under another key.
docs/spec/formats.md has the bytes. A label must never be used for two purposes.
"""

from __future__ import annotations

from typing import Final

from minikms.api import contract

ALGORITHM: Final = "XAES-256-GCM"
RECORD_FORMAT: Final = 1

ROOT_FINGERPRINT: Final = b"minikms/root-fingerprint/v1\0"
ROOT_COMMITMENT: Final = b"minikms/root-commitment/v1\0"
SLOT_KEM: Final = b"minikms/slot-kem/v2\0"
SLOT_AUTH: Final = b"minikms/slot-auth/v2\0"
SLOT_SEALED: Final = b"minikms/slot-sealed/v2\0"
SLOT_MAC: Final = b"minikms/slot-mac/v2\0"
SLOT_AUTH_KEY: Final = b"minikms/slot-auth-key/v2\0"
ROOT_PIN: Final = b"minikms/root-pin/v1\0"
KEK: Final = b"minikms/kek/v1\0"
AUDIT_KEY: Final = b"minikms/audit-key/v1\0"
AUDIT_SEED: Final = b"minikms/audit-seed/v1\0"
KEYRING: Final = b"minikms/keyring/v1\0"
KEY_INDEX: Final = b"minikms/key-index/v1\0"
TOMBSTONE_KEY: Final = b"minikms/tombstone-key/v1\0"
TOMBSTONE: Final = b"minikms/tombstone/v1\0"
DEK: Final = b"minikms/dek/v1\0"
DEK_NUMBERED: Final = b"minikms/dek/v2\0"
RECORD: Final = b"minikms/record/v1\0"
MAC: Final = b"minikms/mac/v1\0"
STREAM: Final = contract.STREAM_LABEL
ARCHIVE_SLOT: Final = b"minikms/archive-slot/v1\0"
REPLICA_ENTRY: Final = b"minikms/replica-entry/v1\0"
REPLICA_STATE: Final = b"minikms/replica-state/v1\0"
REPLICA_MARK: Final = b"minikms/replica-mark/v1\0"
REPLICA_AUTH: Final = b"minikms/replica-auth/v1\0"
SHARE_CHECKSUM: Final = b"minikms/share-checksum/v1\0"
SHARE_DIGEST: Final = b"minikms/share-digest/v1\0"


def aad(label: bytes, *fields: bytes) -> bytes:
    """Associated data: the label, then each field after its length (4 bytes, big-endian)."""
    return label + b"".join([len(value).to_bytes(4, "big") + value for value in fields])


def number(value: int) -> bytes:
    """A counter or version as a field: 8 bytes, big-endian."""
    return value.to_bytes(8, "big")


def dek_aad(
    *, key_id: str, thread_id: str, purpose: str, algorithm: str, kek_version: int, in_thread: int = 0
) -> bytes:
    """The associated data of a wrapped DEK."""
    prefix = dek_aad_prefix(
        key_id=key_id, thread_id=thread_id, purpose=purpose, algorithm=algorithm, in_thread=in_thread
    )
    return prefix + kek_version_field(kek_version)


def dek_aad_prefix(*, key_id: str, thread_id: str, purpose: str, algorithm: str, in_thread: int = 0) -> bytes:
    """A DEK's associated data without the KEK version, which is the only field that a rewrap changes. `in_thread`: the
    number of the DEK in its thread, 0 for none.
    """
    fields = (key_id.encode(), thread_id.encode(), purpose.encode(), algorithm.encode())
    return aad(DEK_NUMBERED, *fields, number(in_thread)) if in_thread else aad(DEK, *fields)


def kek_version_field(kek_version: int) -> bytes:
    """The last field of a DEK's associated data, behind the prefix."""
    return aad(b"", number(kek_version))


def record_aad_prefix(*, key_id: str, thread_id: str) -> bytes:
    """A record's associated data without the caller's. It is constant for a key, so it is made once."""
    return aad(RECORD, number(RECORD_FORMAT), key_id.encode(), thread_id.encode())


def caller_field(caller_aad: bytes) -> bytes:
    """The last field of a record's associated data, behind the prefix."""
    return len(caller_aad).to_bytes(4, "big") + caller_aad


def record_aad(prefix: bytes, caller_aad: bytes) -> bytes:
    """The associated data of a record: the prefix, then the caller's aad as the last field."""
    return prefix + caller_field(caller_aad)
