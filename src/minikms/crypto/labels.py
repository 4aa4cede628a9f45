"""Labels and the encoding of associated data.

Owns: one label per use of a key, and `aad`, the only way to build associated data. Invariants: no label is a prefix
of another (each ends in NUL, and none holds NUL elsewhere); every field is length-prefixed, so two different lists of
fields never encode to the same bytes. A label must never be used for two purposes.
"""

from __future__ import annotations

from typing import Final

ROOT_FINGERPRINT: Final = b"minikms/root-fingerprint/v1\0"
ROOT_COMMITMENT: Final = b"minikms/root-commitment/v1\0"
SLOT: Final = b"minikms/slot/v1\0"
KEYRING_KEY: Final = b"minikms/keyring-key/v1\0"
KEK: Final = b"minikms/kek/v1\0"
AUDIT_KEY: Final = b"minikms/audit-key/v1\0"
AUDIT_SEED: Final = b"minikms/audit-seed/v1\0"
KEYRING: Final = b"minikms/keyring/v1\0"
DEK: Final = b"minikms/dek/v1\0"
RECORD: Final = b"minikms/record/v1\0"
STREAM: Final = b"minikms/stream/v1\0"
ARCHIVE: Final = b"minikms/archive/v1\0"


def field(value: bytes) -> bytes:
    """`value` behind its length: 4 bytes, big-endian."""
    return len(value).to_bytes(4, "big") + value


def aad(label: bytes, *fields: bytes) -> bytes:
    """Associated data: the label, then every field behind its length."""
    return label + b"".join([len(value).to_bytes(4, "big") + value for value in fields])


def number(value: int) -> bytes:
    """A counter or version as a field: 8 bytes, big-endian."""
    return value.to_bytes(8, "big")
