"""AES-256-GCM (NIST SP 800-38D) with keys that stay in the secret arena.

Owns: sealing, opening, and authentication tags over public data. Sealed form: nonce(12) | ciphertext | tag(16).
Invariants: a cipher object holds a key schedule on the heap, so each function here makes one for its call and drops it
(OpenSSL clears it). Three callers keep one, at most until the turn of the event loop ends: `Vault.turn_cipher` of
`minikms.custody.vault`; `minikms.custody.new_keys`, for a group of keys that it makes without a switch to another task;
and `Rewrapper` of `minikms.keys.dek`. `scrub_stack` overwrites the key schedule that the last call left on the stack,
and `scrub_long_text` what a text of more than LONG_TEXT_BYTES leaves there. The caller passes the nonce: random, never
repeated under a key (at most 2^32 of them, SP 800-38D section 8.3). If a tag does not match, it must never return
anything but an error, nor say why.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms.errors import DecryptionError

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = NONCE_BYTES + TAG_BYTES

LONG_TEXT_BYTES: Final = 256
"""For a longer text OpenSSL's code for AVX-512 makes up to 48 powers of the hash key of GCM on the stack, and leaves
them. Whoever has one can forge records under the key, but read none. Associated data leaves none, however long it is.
"""

_NONCE_POOL_COUNT: Final = 512
_ZERO_CIPHER: Final = AESGCM(bytes(KEY_BYTES))
"""A cipher of a zero key, which is no secret, so it may be kept. Making one for each `scrub_stack` would cost as much
as the scrubbing.
"""
_ZERO_NONCE: Final = bytes(NONCE_BYTES)
_ZERO_TEXT: Final = bytes(4 * 16)
_LONG_ZERO_TEXT: Final = bytes(64 * 16)
"""Long enough for all 48 powers."""
_LONG_SEALED: Final = bytearray(_ZERO_CIPHER.encrypt(_ZERO_NONCE, _LONG_ZERO_TEXT, None))
_DEEP_ENCRYPT: Final = partial(_ZERO_CIPHER.encrypt, _ZERO_NONCE, _LONG_ZERO_TEXT)
_DEEP_DECRYPT: Final = partial(_ZERO_CIPHER.decrypt, _ZERO_NONCE, bytes(_LONG_SEALED))


class NonceSource:
    """Random nonces, read from the kernel a few hundred at a time. Each is returned once.

    The pool is not secret, because a nonce is sent with its ciphertext. A forked child must not use it, because it
    would repeat nonces; the daemon never forks.
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
    """nonce | ciphertext | tag. `plaintext` may be a view of the arena; it is not copied."""
    return nonce + AESGCM(key).encrypt(nonce, plaintext, aad)


def seal_with(cipher: AESGCM, nonce: bytes, plaintext: bytes | memoryview, aad: bytes) -> bytes:
    """As `seal`, with a cipher that the caller made and drops."""
    return nonce + cipher.encrypt(nonce, plaintext, aad)


def open_sealed(key: memoryview, sealed: bytes, aad: bytes) -> bytes:
    """The plaintext of `sealed`, which must not be a key. Raises DecryptionError."""
    if len(sealed) < OVERHEAD_BYTES:
        raise DecryptionError("the ciphertext is too short to hold a nonce and a tag")
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)
    except InvalidTag:
        raise DecryptionError("the ciphertext does not open under this key, thread and aad") from None
    finally:
        scrub_long_text()


def open_into(key: memoryview, sealed: bytes, aad: bytes, target: memoryview) -> None:
    """Opens a wrapped key into `target`, a view of the arena. The plaintext must have exactly `len(target)` bytes.

    Raises DecryptionError and zeroes `target`.
    """
    open_with(AESGCM(key), sealed, aad, target)


def open_with(cipher: AESGCM, sealed: bytes, aad: bytes, target: memoryview) -> None:
    """`open_into`, under the key of a cipher that the caller keeps for a turn of the event loop."""
    if len(sealed) != len(target) + OVERHEAD_BYTES:
        raise DecryptionError("the wrapped key has the wrong length")
    try:
        cipher.decrypt_into(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad, target)
    except InvalidTag:
        target[:] = bytes(len(target))
        raise DecryptionError("the wrapped key does not open") from None


def authenticate(key: memoryview, nonce: bytes, data: bytes) -> bytes:
    """nonce | tag over `data` (GMAC: GCM with an empty plaintext, SP 800-38D section 3)."""
    return nonce + AESGCM(key).encrypt(nonce, b"", data)


def check_authentic(key: memoryview, tag: bytes, data: bytes) -> None:
    """Raises DecryptionError unless `tag` is the tag of `data`, as `authenticate` makes it."""
    if len(tag) != OVERHEAD_BYTES:
        raise DecryptionError("the tag has the wrong length")
    try:
        AESGCM(key).decrypt(tag[:NONCE_BYTES], tag[NONCE_BYTES:], data)
    except InvalidTag:
        raise DecryptionError("the data was altered") from None


def scrub_stack() -> None:
    """Overwrites what the last cipher left on the stack: its key schedule and its text, which may have been a key.

    It encrypts and decrypts a few blocks under a zero key, so that its stack frames cover the earlier ones. Making a
    cipher leaves nothing on the stack that would have to be covered too: a test measures this.
    """
    _ZERO_CIPHER.decrypt(_ZERO_NONCE, _ZERO_CIPHER.encrypt(_ZERO_NONCE, _ZERO_TEXT, None), None)


def scrub_long_text() -> None:
    """Overwrites the powers of the hash key that a cipher leaves on the stack for a long text.

    The function that used the cipher must call it: they lie deeper than what `scrub_stack` covers from the depth at
    which a turn ends. It does not replace `scrub_stack`.

    The interpreter reaches a method up to 128 bytes deeper at its first calls than later. So two calls go through
    `partial`, which is always as deep and deeper than both, and one uses a method whose frames are less deep.
    """
    _DEEP_ENCRYPT(None)
    _DEEP_DECRYPT(None)
    _ZERO_CIPHER.encrypt_into(_ZERO_NONCE, _LONG_ZERO_TEXT, None, _LONG_SEALED)
