"""Wrapped DEKs and records: what each is bound to.

Owns: the associated data of a wrapped DEK and of a record. Invariants: a wrapped DEK is bound to key id, thread id,
purpose, algorithm and KEK version; a record to format version, key id, the key's thread id and the caller's aad. A
record copied to another place or planted under another key does not open. docs/spec/formats.md has the bytes.
"""

from __future__ import annotations

from typing import Final

from minikms.crypto import labels

ALGORITHM: Final = "AES-256-GCM"
RECORD_FORMAT: Final = 1


def dek_aad(*, key_id: str, thread_id: str, purpose: str, algorithm: str, kek_version: int) -> bytes:
    return labels.aad(
        labels.DEK,
        key_id.encode(),
        thread_id.encode(),
        purpose.encode(),
        algorithm.encode(),
        labels.number(kek_version),
    )


def record_aad_prefix(*, key_id: str, thread_id: str) -> bytes:
    """All of a record's associated data but the caller's: constant for a key, so made once."""
    return labels.aad(labels.RECORD, labels.number(RECORD_FORMAT), key_id.encode(), thread_id.encode())


def caller_part(caller_aad: bytes) -> bytes:
    """What follows the prefix in a record's associated data."""
    return len(caller_aad).to_bytes(4, "big") + caller_aad


def record_aad(prefix: bytes, caller_aad: bytes) -> bytes:
    return prefix + caller_part(caller_aad)
