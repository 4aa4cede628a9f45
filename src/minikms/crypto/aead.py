"""XAES-256-GCM (C2SP, https://c2sp.org/XAES-256-GCM) with keys that stay in the secret arena.

Owns: sealing, opening, and authentication tags over public data. Sealed form: nonce(24) | ciphertext | tag(16). The
first half of the nonce, the *prefix*, and the key derive the key of AES-256-GCM (NIST SP 800-38D); the second half is
its nonce. So a key never runs out: docs/spec/formats.md says how much it may seal.

Invariants: objects of the library hold key schedules on the heap, and a `Kdf` buffers of derived keys. So each function
here makes them for its call and drops them (OpenSSL clears its own). Three callers keep some, at most until the turn of
the event loop ends: `minikms.crypto.records`; `minikms.custody.new_keys`, for a group of keys that it makes without a
switch to another task; and `Rewrapper` of `minikms.keys.dek`. `scrub_stack` overwrites what the last call left on the
stack, and `scrub_long_text` what a text of more than LONG_TEXT_BYTES leaves there. The caller passes the nonce: random,
never repeated under a key. If a tag does not match, it must never return anything but an error, nor say why.
"""

from __future__ import annotations

import os
from functools import partial
from types import TracebackType
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC

from minikms.api.errors import DecryptionError
from minikms.memory import zero_bytes

KEY_BYTES: Final = 32
PREFIX_BYTES: Final = 12
"""The part of the nonce that the derived key depends on."""
NONCE_BYTES: Final = 24
TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = NONCE_BYTES + TAG_BYTES

LONG_TEXT_BYTES: Final = 256
"""For a longer text OpenSSL's code for AVX-512 makes up to 48 powers of the hash key of GCM on the stack, and leaves
them. Whoever has one can forge records under the key, but read none. Associated data leaves none, however long it is.
"""

_HALVES: Final = ((b"\0\1X\0", slice(0, 16)), (b"\0\2X\0", slice(16, 32)))
"""Of a derived key: what CMAC gets before the prefix (a counter, the label X, and 0), and which bytes it gives."""

_NONCE_POOL_COUNT: Final = 512
_ZERO_CIPHER: Final = AESGCM(bytes(KEY_BYTES))
"""A cipher of a zero key, which is no secret, so it may be kept. Making one for each `scrub_stack` would cost as much
as the scrubbing.
"""
_ZERO_NONCE: Final = bytes(NONCE_BYTES - PREFIX_BYTES)
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


class Kdf:
    """Derives keys of AES-256-GCM from a key and prefixes of nonces: NIST SP 800-108r1 in counter mode, with CMAC over
    AES-256 (SP 800-38B), which the library also computes.

    It holds the key's schedule and CMAC's K1 on the heap, so it must not outlive the turn of the event loop. OpenSSL
    clears them with the object.
    """

    __slots__ = ("_mac",)

    def __init__(self, key: memoryview) -> None:
        self._mac = CMAC(AES(key))

    def derive_into(self, prefix: bytes, target: memoryview) -> None:
        """The derived key, 32 bytes."""
        for counter, half in _HALVES:
            mac = self._mac.copy()
            mac.update(counter + prefix)
            made = mac.finalize()
            target[half] = made
            zero_bytes(made)


class XaesCipher:
    """A key's cipher for many texts, in a `with` block, which must end in the same turn of the event loop: until then
    it holds what a `Kdf` holds, and the schedule of the last derived key.
    """

    __slots__ = ("_cipher", "_derived", "_kdf", "_prefix")

    def __init__(self, key: memoryview) -> None:
        self._kdf: Kdf | None = Kdf(key)
        self._derived = bytearray(KEY_BYTES)
        self._prefix = b""
        self._cipher: AESGCM | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, _error: object, _trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drops what it holds. It can't be used any more."""
        self._cipher = self._kdf = None

    def seal(self, nonce: bytes, plaintext: bytes | memoryview, aad: bytes) -> bytes:
        """nonce | ciphertext | tag. `plaintext` may be a view of the arena; it is not copied."""
        return nonce + self._of(nonce).encrypt(nonce[PREFIX_BYTES:], plaintext, aad)

    def open_sealed(self, sealed: bytes, aad: bytes) -> bytes:
        """The plaintext, which must not be a key. Raises InvalidTag."""
        return self._of(sealed).decrypt(sealed[PREFIX_BYTES:NONCE_BYTES], sealed[NONCE_BYTES:], aad)

    def open_into(self, sealed: bytes, aad: bytes, target: memoryview) -> None:
        """Opens a wrapped key into `target`, a view of the arena. The plaintext must have exactly `len(target)` bytes.

        Raises DecryptionError and zeroes `target`.
        """
        if len(sealed) != len(target) + OVERHEAD_BYTES:
            raise DecryptionError("the wrapped key has the wrong length")
        try:
            self._of(sealed).decrypt_into(sealed[PREFIX_BYTES:NONCE_BYTES], sealed[NONCE_BYTES:], aad, target)
        except InvalidTag:
            target[:] = bytes(len(target))
            raise DecryptionError("the wrapped key does not open") from None

    def _of(self, nonce: bytes) -> AESGCM:
        """The cipher of the derived key, for the nonce at the beginning of `nonce`."""
        prefix = nonce[:PREFIX_BYTES]
        if self._cipher is None or prefix != self._prefix:
            if self._kdf is None:
                raise ValueError("the cipher was closed")
            try:
                self._kdf.derive_into(prefix, memoryview(self._derived))
                self._cipher = AESGCM(self._derived)
            finally:
                self._derived[:] = bytes(KEY_BYTES)
            self._prefix = prefix
        return self._cipher


def seal(key: memoryview, nonce: bytes, plaintext: bytes | memoryview, aad: bytes) -> bytes:
    """nonce | ciphertext | tag. `plaintext` may be a view of the arena; it is not copied."""
    with XaesCipher(key) as cipher:
        return cipher.seal(nonce, plaintext, aad)


def open_sealed(key: memoryview, sealed: bytes, aad: bytes) -> bytes:
    """The plaintext of `sealed`, which must not be a key. Raises DecryptionError."""
    if len(sealed) < OVERHEAD_BYTES:
        raise DecryptionError("the ciphertext is too short to hold a nonce and a tag")
    try:
        with XaesCipher(key) as cipher:
            return cipher.open_sealed(sealed, aad)
    except InvalidTag:
        raise DecryptionError("the ciphertext does not open under this key, thread and aad") from None
    finally:
        scrub_long_text()


def open_into(key: memoryview, sealed: bytes, aad: bytes, target: memoryview) -> None:
    """`XaesCipher.open_into`, for one key."""
    with XaesCipher(key) as cipher:
        cipher.open_into(sealed, aad, target)


def authenticate(key: memoryview, nonce: bytes, data: bytes) -> bytes:
    """nonce | tag over `data` (GMAC: GCM with an empty plaintext, SP 800-38D section 3)."""
    return seal(key, nonce, b"", data)


def check_authentic(key: memoryview, tag: bytes, data: bytes) -> None:
    """Raises DecryptionError unless `tag` is the tag of `data`, as `authenticate` makes it."""
    if len(tag) != OVERHEAD_BYTES:
        raise DecryptionError("the tag has the wrong length")
    try:
        with XaesCipher(key) as cipher:
            cipher.open_sealed(tag, data)
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
