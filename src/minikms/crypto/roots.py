"""Derivations from a root key: fingerprint, commitment to a slot, and pin.

Invariants: the root key is a view of the arena, 32 uniformly random bytes; the results are public and reveal nothing
about it (HMAC-SHA-256 is a PRF). Each MAC is one-shot with the view as its key, because an HMAC object holds midstates
that are enough to forge MACs. It must never keep or copy the root key.
"""

from __future__ import annotations

import hmac

from minikms.crypto import labels

FINGERPRINT_HEX_CHARS = 16


def fingerprint(root: memoryview) -> str:
    """16 hex characters that identify a root key to people: the first 8 bytes of HMAC-SHA-256(root, label)."""
    return hmac.digest(root, labels.ROOT_FINGERPRINT, "sha256").hex()[:FINGERPRINT_HEX_CHARS]


def commitment(root: memoryview, slot_id: str) -> bytes:
    """32 bytes that commit a slot to its root key, because GCM does not commit: one ciphertext can open under two keys.

    One output block of HKDF-Expand (RFC 5869 section 2.3). A uniformly random key needs no extract step (section 3.3).
    """
    return hmac.digest(root, labels.aad(labels.ROOT_COMMITMENT, slot_id.encode()) + b"\x01", "sha256")


def pin(root: memoryview) -> str:
    """64 hex characters that only a holder of the root key can make: HMAC-SHA-256(root, label)."""
    return hmac.digest(root, labels.ROOT_PIN, "sha256").hex()
