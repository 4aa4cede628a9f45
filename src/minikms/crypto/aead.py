"""XAES-256-GCM (C2SP, https://c2sp.org/XAES-256-GCM) with keys that stay in the secret arena.

Owns: sealing, opening, and authentication tags over public data. Sealed form: nonce(24) | ciphertext | tag(16). The
first half of the nonce, the *prefix*, and the key derive the key of AES-256-GCM (NIST SP 800-38D); the second half is
its nonce. So a key never runs out: docs/spec/formats.md says how much it may seal.

Invariants: objects of the library hold key schedules on the heap, and a `Kdf` buffers of derived keys. So each function
here makes them for its call and drops them (OpenSSL clears its own). Three callers keep some, at most until the turn of
the event loop ends: `minikms.crypto.records`; `minikms.custody.new_keys`, for a group of keys that it makes without a
switch to another task; and `Unwrapper` of `minikms.keys.dek`. `scrub` overwrites what the calls since the last one have
left in registers and on the stack. The daemon calls it at the end of each turn with requests (`RecordKeys.end_turn`)
and of each turn in which a task used a key (`SealableServer.end_steps`); nothing else has to. The caller passes the
nonce: random, never repeated under a key. If a tag does not match, it must never return anything but an error, nor
say why.
"""

from __future__ import annotations

import ctypes
import os
from collections import OrderedDict
from types import TracebackType
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from minikms.api.errors import DecryptionError
from minikms.memory.arena import SecretArena, SecretSlot

KEY_BYTES: Final = 32
PREFIX_BYTES: Final = 12
"""The part of the nonce that the derived key depends on."""
NONCE_BYTES: Final = 24
TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = NONCE_BYTES + TAG_BYTES

LONG_TEXT_BYTES: Final = 256
"""For a longer text OpenSSL's code for AVX-512 makes up to 48 powers of the hash key of GCM on the stack, and leaves
them. With one of them records can be forged under the key, but not read. Associated data of any length leaves none.
"""

_BLOCK_BYTES: Final = 16
STACK_BYTES: Final = 32 * 1024
"""The stack that `scrub` overwrites. A request is handled 17 KiB deeper than the end of its turn, because libuv has the
events of a wait on the stack; the frames of a cipher end 5 KiB below that.
"""
_HEADERS: Final = b"\0\1X\0", b"\0\2X\0"
"""What CMAC gets before the prefix, for each half of a derived key: a counter, the label X, and 0."""
_ECB: Final = ECB()  # noqa: S305 - CMAC of one block is this; no text is encrypted with it
_DOUBLED: Final = bytes(byte << 1 & 0xFF for byte in range(256))
_CARRIED: Final = bytes(byte >> 7 for byte in range(256))
_REDUCED: Final = bytes(0x87 * (byte >> 7) for byte in range(256))
"""For each byte, its carry reduced: doubling in GF(2^128) shifts a bit out, which these bits replace."""

_SUFFIX_BYTES: Final = NONCE_BYTES - PREFIX_BYTES
NONCES_PER_PREFIX: Final = 512
"""The nonces of a `NonceSource` with one prefix. Wraps that are made or opened together then share a derived key."""
_ZERO_CIPHER: Final = AESGCM(bytes(KEY_BYTES))
"""A cipher of a zero key, which is no secret, so it may be kept. Making one for each `scrub` would cost as much
as the scrubbing.
"""
_ZERO_NONCE: Final = bytes(_SUFFIX_BYTES)
_ZERO_TEXT: Final = bytes(4 * 16)


class _Zeroes(ctypes.Structure):
    _fields_ = (("zeroes", ctypes.c_char * STACK_BYTES),)


_ZEROES: Final = _Zeroes()
_PUT_ON_STACK: Final = ctypes.pythonapi["Py_IsInitialized"]
"""A function that ignores its argument."""
_PUT_ON_STACK.argtypes = (_Zeroes,)


class NonceSource:
    """Random nonces, read from the kernel a few hundred at a time, with one prefix. Each is returned once.

    The pool is not secret, because a nonce is sent with its ciphertext. A forked child must not use it, because it
    would repeat nonces; the daemon never forks.
    """

    __slots__ = ("_pool",)

    def __init__(self) -> None:
        self._pool: list[bytes] = []

    def next(self) -> bytes:
        if not self._pool:
            prefix, drawn = os.urandom(PREFIX_BYTES), os.urandom(_SUFFIX_BYTES * NONCES_PER_PREFIX)
            self._pool = [
                prefix + drawn[start : start + _SUFFIX_BYTES] for start in range(0, len(drawn), _SUFFIX_BYTES)
            ]
        return self._pool.pop()


class Kdf:
    """Derives keys of AES-256-GCM from a key and prefixes of nonces: NIST SP 800-108r1 in counter mode, with CMAC over
    AES-256 (SP 800-38B). CMAC of one whole block is one block of AES, of the text and K1.

    It holds the key's schedule, K1 and the last derived key on the heap, so it must not outlive the turn of the event
    loop. They are cleared with the object.
    """

    __slots__ = ("_blocks", "_encryptor", "_k1", "_made")

    def __init__(self, key: memoryview) -> None:
        self._blocks = blocks = bytearray(KEY_BYTES)
        """What is encrypted: for each half of a derived key its header and the prefix, plus K1."""
        self._made = block = bytearray(KEY_BYTES + _BLOCK_BYTES - 1)  # the library asks for almost a block more
        self._k1 = k1 = bytearray(_BLOCK_BYTES)
        self._encryptor = Cipher(AES(key), _ECB).encryptor()
        self._encryptor.update_into(blocks, block)
        # K1 is twice the encrypted block of zeroes, in GF(2^128). Its bytes pass through integers of which CPython has
        # one shared object each, as the text of a key does in the arena.
        for place, following in enumerate(range(1, _BLOCK_BYTES)):
            k1[place] = _DOUBLED[block[place]] | _CARRIED[block[following]]
        k1[-1] = _DOUBLED[block[_BLOCK_BYTES - 1]] ^ _REDUCED[block[0]]
        for place, (first, second) in enumerate(zip(*_HEADERS, strict=True)):
            blocks[place] = first ^ k1[place]
            blocks[place + _BLOCK_BYTES] = second ^ k1[place]

    def derive_into(self, prefix: bytes, target: memoryview) -> None:
        """The derived key, 32 bytes."""
        blocks, k1 = self._blocks, self._k1
        place = _BLOCK_BYTES - PREFIX_BYTES
        for byte in prefix:
            blocks[place] = blocks[place + _BLOCK_BYTES] = byte ^ k1[place]
            place += 1
        self._encryptor.update_into(blocks, self._made)
        target[:] = memoryview(self._made)[:KEY_BYTES]

    def __del__(self) -> None:
        self._blocks[:] = bytes(KEY_BYTES)
        self._made[:KEY_BYTES] = bytes(KEY_BYTES)
        self._k1[:] = bytes(_BLOCK_BYTES)


class DerivedKeys:
    """Derived keys that are kept in the arena: at most `count_max`; the oldest makes room. Each is in the dictionary of
    the key that it was derived from, by its prefix.
    """

    __slots__ = ("_arena", "_count_max", "_kept")

    def __init__(self, arena: SecretArena, *, count_max: int) -> None:
        self._arena = arena
        self._count_max = count_max
        self._kept: OrderedDict[SecretSlot, tuple[dict[bytes, SecretSlot], bytes]] = OrderedDict()
        """Oldest first."""

    def add(self, of_key: dict[bytes, SecretSlot], prefix: bytes, kdf: Kdf) -> SecretSlot:
        """Derives the key of `prefix` and keeps it in `of_key`, the dictionary of the key that `kdf` is of."""
        if len(self._kept) >= self._count_max:
            slot, (owner, former) = self._kept.popitem(last=False)
            del owner[former]
            slot.release()
        slot = self._arena.allocate()
        kdf.derive_into(prefix, slot.view)
        of_key[prefix], self._kept[slot] = slot, (of_key, prefix)
        return slot

    def forget(self, of_key: dict[bytes, SecretSlot]) -> None:
        """Zeroes those of a key."""
        for slot in of_key.values():
            del self._kept[slot]
            slot.release()
        of_key.clear()


class XaesCipher:
    """A key's cipher for many texts, in a `with` block, which must end in the same turn of the event loop: until then
    it holds what a `Kdf` holds, and the schedule of the last derived key.
    """

    __slots__ = ("_cipher", "_derived", "_kdf", "_keep", "_key", "_prefix")

    def __init__(
        self, key: memoryview, derived: dict[bytes, SecretSlot] | None = None, keep: DerivedKeys | None = None
    ) -> None:
        """derived, keep: where derived keys are kept."""
        self._key: memoryview | None = key
        self._derived = {} if derived is None else derived
        self._keep = keep
        self._kdf: Kdf | None = None
        self._prefix = b""
        self._cipher: AESGCM | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, _error: object, _trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drops what it holds. It can't be used any more."""
        self._cipher = self._kdf = self._key = None

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
            self._cipher = self._new_cipher(prefix)
            self._prefix = prefix
        return self._cipher

    def _new_cipher(self, prefix: bytes) -> AESGCM:
        if self._key is None:
            raise ValueError("the cipher was closed")
        slot = self._derived.get(prefix)
        if slot is not None:
            return AESGCM(slot.view)
        if self._kdf is None:
            self._kdf = Kdf(self._key)
        if self._keep is not None:
            return AESGCM(self._keep.add(self._derived, prefix, self._kdf).view)
        derived = bytearray(KEY_BYTES)
        try:
            self._kdf.derive_into(prefix, memoryview(derived))
            return AESGCM(derived)
        finally:
            derived[:] = bytes(KEY_BYTES)


def seal(key: memoryview, nonce: bytes, plaintext: bytes | memoryview, aad: bytes) -> bytes:
    """nonce | ciphertext | tag of at most LONG_TEXT_BYTES. `plaintext` may be a view of the arena; it is not copied."""
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


def open_into(key: memoryview, sealed: bytes, aad: bytes, target: memoryview) -> None:
    """`XaesCipher.open_into`, for one key."""
    with XaesCipher(key) as cipher:
        cipher.open_into(sealed, aad, target)


def authenticate(key: memoryview, nonce: bytes, data: bytes) -> bytes:
    """nonce | tag over `data` (GMAC: GCM with an empty plaintext, SP 800-38D section 3)."""
    return seal(key, nonce, b"", data)


def check_authentic(key: memoryview, tag: bytes, data: bytes) -> None:
    """Checks that `tag` is the tag of `data`, as `authenticate` makes it. Raises DecryptionError."""
    if len(tag) != OVERHEAD_BYTES:
        raise DecryptionError("the tag has the wrong length")
    try:
        with XaesCipher(key) as cipher:
            cipher.open_sealed(tag, data)
    except InvalidTag:
        raise DecryptionError("the data was altered") from None


def scrub(*, stack: bool = True) -> None:
    """Overwrites what the ciphers used since the last call have left in registers, and on the stack below the caller:
    key schedules, and texts, which may have been keys. The caller must be less deep in the stack than every use of a
    cipher, and at most STACK_BYTES less deep.

    stack: False spares a third of the time where only texts of at most LONG_TEXT_BYTES were sealed and opened under
    keys that were derived before: that leaves something in registers only.
    """
    if stack:
        _PUT_ON_STACK(_ZEROES)  # a structure that is passed by value lies on the stack as a whole
    _ZERO_CIPHER.decrypt(_ZERO_NONCE, _ZERO_CIPHER.encrypt(_ZERO_NONCE, _ZERO_TEXT, None), None)
