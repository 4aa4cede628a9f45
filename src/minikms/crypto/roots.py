"""What may be known of a root key: its fingerprint and its commitment.

Owns: both derivations. Invariants: the root key is a 32-byte uniformly random view of the arena; both outputs are
public and reveal nothing of it (HMAC-SHA-256 is a PRF). MACs are one-shot with the view as key: a kept HMAC object
holds midstates that forge.
"""

from __future__ import annotations

import hmac

from minikms.crypto import labels

FINGERPRINT_HEX_CHARS = 16


def fingerprint(root: memoryview) -> str:
    """16 hex characters that name a root key to a person: HMAC-SHA-256(root, label), cut to 8 bytes."""
    return hmac.digest(root, labels.ROOT_FINGERPRINT, "sha256").hex()[:FINGERPRINT_HEX_CHARS]


def commitment(root: memoryview, slot_id: str) -> bytes:
    """32 bytes that commit a slot to its root key.

    GCM does not commit to its key: one ciphertext can be made to open under two. HKDF-Expand (RFC 5869 section 2.3;
    the extract step may be skipped for a uniformly random key, section 3.3) with one output block.
    """
    return hmac.digest(root, labels.aad(labels.ROOT_COMMITMENT, slot_id.encode()) + b"\x01", "sha256")


def archive_tag(root: memoryview, digest: bytes) -> bytes:
    """32 bytes that authenticate a backup archive by its SHA-256: HMAC-SHA-256(root, label, digest)."""
    return hmac.digest(root, labels.aad(labels.ARCHIVE, digest), "sha256")


def same(given: bytes, expected: bytes) -> bool:
    """Whether two tags are the same, in constant time."""
    return hmac.compare_digest(given, expected)
