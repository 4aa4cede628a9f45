"""AES-256-GCM (NIST SP 800-38D) with keys that stay in the secret arena.

Owns: sealing, opening, and the tag over data that needs no secrecy. Sealed form: nonce(12) | ciphertext | tag(16).
Invariants: a cipher object holds a key schedule on the heap, so it is made for one call and dropped (OpenSSL clears
it); the schedule that the last call left on the stack is overwritten by `scrub_stack`. Nonces are given by the
caller: random, never repeated under a key (at most 2^32 of them, SP 800-38D section 8.3). It must never return
anything but an error when a tag does not match, nor tell why.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms.errors import DecryptionError

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = NONCE_BYTES + TAG_BYTES

_NONCE_POOL_COUNT: Final = 512
_ZERO_KEY: Final = bytes(KEY_BYTES)
_ZERO_NONCE: Final = bytes(NONCE_BYTES)
_ZERO_TEXT: Final = bytes(4 * 16)


class NonceSource:
    """Random nonces, drawn from the kernel a few hundred at a time.

    Each nonce is handed out once. The pool is not secret: a nonce is sent with its ciphertext. It must not be shared
    with a forked child, which would repeat it; the daemon never forks.
    """

    __slots__ = ("_pool",)

    def __init__(self) -> None:
        self._pool: list[bytes] = []

    def next(self) -> bytes:
        if not self._pool:
            drawn = os.urandom(NONCE_BYTES * _NONCE_POOL_COUNT)
            self._pool = [drawn[start : start + NONCE_BYTES] for start in range(0, len(drawn), NONCE_BYTES)]
        return self._pool.pop()


def seal(key: memoryview, nonce: bytes, plaintext: bytes | memoryview, aad: bytes) -> bytes:
    """nonce | ciphertext | tag. `plaintext` may be a view of the arena: no copy of it is made."""
    return nonce + AESGCM(key).encrypt(nonce, plaintext, aad)


def open_sealed(key: memoryview, sealed: bytes, aad: bytes) -> bytes:
    """The plaintext of `sealed`, for what isn't a key. Raises DecryptionError."""
    if len(sealed) < OVERHEAD_BYTES:
        raise DecryptionError("the ciphertext is too short to hold a nonce and a tag")
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)
    except InvalidTag:
        raise DecryptionError("the ciphertext does not open under this key, thread and aad") from None


def open_into(key: memoryview, sealed: bytes, aad: bytes, target: memoryview) -> None:
    """Opens a wrapped key straight into the arena. `sealed` must hold exactly `len(target)` bytes of plaintext.

    Raises DecryptionError and leaves `target` zeroed.
    """
    if len(sealed) != len(target) + OVERHEAD_BYTES:
        raise DecryptionError("the wrapped key has the wrong length")
    try:
        AESGCM(key).decrypt_into(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad, target)
    except InvalidTag:
        target[:] = bytes(len(target))
        raise DecryptionError("the wrapped key does not open") from None


def authenticate(key: memoryview, nonce: bytes, data: bytes) -> bytes:
    """nonce | tag over `data` (GMAC: GCM with an empty plaintext, SP 800-38D section 3)."""
    return nonce + AESGCM(key).encrypt(nonce, b"", data)


def check_authentic(key: memoryview, tag: bytes, data: bytes) -> None:
    """Raises DecryptionError unless `tag` is that of `data`."""
    if len(tag) != OVERHEAD_BYTES:
        raise DecryptionError("the tag has the wrong length")
    try:
        AESGCM(key).decrypt(tag[:NONCE_BYTES], tag[NONCE_BYTES:], data)
    except InvalidTag:
        raise DecryptionError("the data was altered") from None


def scrub_stack() -> None:
    """Overwrites what the last cipher left on the stack: its key schedule, and the text that it worked on, which was a
    key if it wrapped or unwrapped one. Both directions, over a few blocks, so that each frame is met again.
    """
    cipher = AESGCM(_ZERO_KEY)
    cipher.decrypt(_ZERO_NONCE, cipher.encrypt(_ZERO_NONCE, _ZERO_TEXT, None), None)
