"""HPKE in base mode, single shot (RFC 9180), to ML-KEM-768 with X25519: the sender's side.

Owns: encapsulation, the combiner of X-Wing (draft-connolly-cfrg-xwing-kem, section 5.3), the key schedule, and sealing.
The library's `Suite` opens what this seals. It does not seal, because it draws both ephemeral secrets from OpenSSL's
generator. That generator keeps its state on the heap, so that a reader of the memory computes what it returns next.

Invariants: the ephemeral X25519 key comes from the kernel's generator, so a sealed key stays secret from who knows the
state of OpenSSL's, which gives the message of ML-KEM. Every secret made here is overwritten before `seal` returns. It
must never be given `aad`: RFC 9180 allows it, and the formats have none.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Final

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms.api.errors import DecryptionError
from minikms.memory import fill_random, zero, zero_bytes

MLKEM_PUBLIC_KEY_BYTES: Final = 1184
X25519_KEY_BYTES: Final = 32
PUBLIC_KEY_BYTES: Final = MLKEM_PUBLIC_KEY_BYTES + X25519_KEY_BYTES
ENCAPSULATED_BYTES: Final = 1088 + X25519_KEY_BYTES

SUITE_ID: Final = b"HPKE" + bytes.fromhex("647a 0001 0002")
"""X-Wing, HKDF-SHA256, AES-256-GCM: RFC 9180, section 5.1."""
_VERSION: Final = b"HPKE-v1"
_XWING_LABEL: Final = b"\\.//^\\"
_SHARED_SECRET_BYTES: Final = 32
_AEAD_NONCE_BYTES: Final = 12
_MODE_BASE: Final = b"\0"
_NO_SALT: Final = bytes(32)


def seal(
    public: bytes, info: bytes, plaintext: memoryview, *, random: Callable[[memoryview], None] = fill_random
) -> bytes:
    """The encapsulated key, the ciphertext and its tag. `random` fills the ephemeral X25519 key.

    Raises:
        DecryptionError: `public` is not a public key.
    """
    ephemeral = memoryview(bytearray(X25519_KEY_BYTES))
    secrets: list[bytes] = []
    try:
        random(ephemeral)
        mlkem = MLKEM768PublicKey.from_public_bytes(public[:MLKEM_PUBLIC_KEY_BYTES])
        x25519 = X25519PublicKey.from_public_bytes(public[MLKEM_PUBLIC_KEY_BYTES:])
        private = X25519PrivateKey.from_private_bytes(ephemeral)
        sent_x = private.public_key().public_bytes_raw()
        shared_m, sent_m = mlkem.encapsulate()
        secrets.append(shared_m)
        secrets.append(shared_x := private.exchange(x25519))
        secrets.append(shared := combined(shared_m, shared_x, sent_x, public[MLKEM_PUBLIC_KEY_BYTES:]))
        key, nonce = key_schedule(SUITE_ID, shared, info)
        secrets.append(key)
        return sent_m + sent_x + AESGCM(key).encrypt(nonce, plaintext, None)
    except ValueError:
        raise DecryptionError("the public key of a slot is not valid") from None
    finally:
        zero(ephemeral)
        for secret in secrets:
            zero_bytes(secret)


def combined(shared_m: bytes, shared_x: bytes, sent_x: bytes, public_x: bytes) -> bytes:
    """The shared secret of X-Wing, which the caller overwrites."""
    text = memoryview(bytearray(2 * _SHARED_SECRET_BYTES))
    text[:_SHARED_SECRET_BYTES], text[_SHARED_SECRET_BYTES:] = shared_m, shared_x
    hashed = hashlib.sha3_256(text)
    zero(text)
    hashed.update(sent_x + public_x + _XWING_LABEL)
    return hashed.digest()


def key_schedule(suite_id: bytes, shared: bytes, info: bytes) -> tuple[bytes, bytes]:
    """The key, which the caller overwrites, and the nonce of the first message: RFC 9180, section 5.1, in base mode."""
    context = (
        _MODE_BASE
        + _labeled_extract(suite_id, _NO_SALT, b"psk_id_hash", b"")
        + _labeled_extract(suite_id, _NO_SALT, b"info_hash", info)
    )
    secret = _labeled_extract(suite_id, shared, b"secret", b"")
    try:
        key = _labeled_expand(suite_id, secret, b"key", context, _SHARED_SECRET_BYTES)
        nonce = _labeled_expand(suite_id, secret, b"base_nonce", context, _AEAD_NONCE_BYTES)
    finally:
        zero_bytes(secret)
    return key, nonce[:_AEAD_NONCE_BYTES]


def _labeled_extract(suite_id: bytes, salt: bytes, label: bytes, text: bytes) -> bytes:
    return hmac.digest(salt, _VERSION + suite_id + label + text, "sha256")


def _labeled_expand(suite_id: bytes, secret: bytes, label: bytes, info: bytes, size: int) -> bytes:
    """The first block of it, of which a shorter result is the beginning."""
    return hmac.digest(secret, size.to_bytes(2, "big") + _VERSION + suite_id + label + info + b"\x01", "sha256")
