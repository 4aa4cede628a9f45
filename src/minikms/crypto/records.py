"""Records and MACs under a DEK: nonces, the keys that are derived for records, and the ciphers of a turn.

Owns: drawing the prefixes of nonces (see `aead`), the derived keys in the arena, and the cipher objects until the turn
of the event loop ends. Many records share a prefix, so that few keys are derived: at most RECORDS_PER_PREFIX records of
a run, in all, have one prefix. Nothing of this is on disk.

Invariants:
- A prefix and the rest of each nonce come from the kernel's generator. A process that was copied while it ran (by a
  snapshot of its virtual machine, say) repeats nonces; the threat model says so.
- At most DERIVED_KEYS_MAX derived keys are in the arena, and no more than take half of it. One goes with its DEK
  (`RecordKey.release`).
- A cipher object and a `Kdf` hold key schedules, so `RecordKeys.end_turn` drops them, and so does `release`. A DEK has
  one cipher at a time: that of its last record. It is kept for the turn, about a millisecond under load, because making
  it takes 0.7 µs and using it 0.4 µs, and clients send several requests for one key in a turn.
- A MAC is one-shot, with the view of the arena as its key: OpenSSL copies the key to its heap for the call and clears
  the copy, and the end of the turn overwrites the stack.
- A `RecordKey` may have been released as soon as another key is opened; then each use of it raises.

It must never do I/O, or return anything but an error for what does not open.
"""

from __future__ import annotations

import hmac
import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms.api.errors import DecryptionError
from minikms.crypto.aead import LONG_TEXT_BYTES, NONCE_BYTES, OVERHEAD_BYTES, PREFIX_BYTES, DerivedKeys, Kdf, scrub
from minikms.crypto.labels import MAC, aad
from minikms.memory.arena import SecretArena, SecretSlot

RECORDS_PER_PREFIX: Final = 1 << 24
"""So that 2^40 records under one DEK repeat a nonce with a chance below 2^-32: docs/spec/formats.md derives it."""
DERIVED_KEYS_MAX: Final = 16_384

_SUFFIX_BYTES: Final = NONCE_BYTES - PREFIX_BYTES
_POOL_COUNT: Final = 512
_LONG_SEALED_BYTES: Final = LONG_TEXT_BYTES + OVERHEAD_BYTES
_TOO_SHORT: Final = "the ciphertext is too short to hold a nonce and a tag"
_DOES_NOT_OPEN: Final = "the ciphertext does not open under this key, thread and aad"


class RecordKeys:
    """What the opened DEKs of a run share. Each start and each unseal makes a new one, with a new prefix."""

    def __init__(self, arena: SecretArena) -> None:
        self.derived = DerivedKeys(arena, count_max=min(DERIVED_KEYS_MAX, arena.slots // 2))
        self.used: list[RecordKey] = []
        """The DEKs that have a cipher in this turn."""
        self.stack_used = False
        """Whether this turn has opened or derived a key, made a MAC, or sealed or opened a text of more than
        LONG_TEXT_BYTES: see `aead.scrub`.
        """
        self.prefix = b""
        """The nonce prefix of the next record."""
        self._left = 0
        self.suffixes: list[bytes] = []
        """The rest of the nonces of the next records under `prefix`. Each is used once. They are not secret."""

    def next_suffix(self) -> bytes:
        """The rest of the next record's nonce. It may change `prefix`."""
        if not self.suffixes:
            if not self._left:
                self.prefix = os.urandom(PREFIX_BYTES)
                self._left = RECORDS_PER_PREFIX
            count = min(_POOL_COUNT, self._left)
            self._left -= count
            drawn = os.urandom(_SUFFIX_BYTES * count)
            self.suffixes = [drawn[start : start + _SUFFIX_BYTES] for start in range(0, len(drawn), _SUFFIX_BYTES)]
        return self.suffixes.pop()

    def end_turn(self) -> None:
        """Drops the ciphers of the turn, and overwrites what they have left in registers and on the stack."""
        self.drop_ciphers()
        scrub(stack=self.stack_used)
        self.stack_used = False

    def drop_ciphers(self) -> None:
        """Drops the ciphers of the turn; OpenSSL clears their memory."""
        for key in self.used:
            key.drop_cipher()
        self.used.clear()


class RecordKey:
    """A DEK in the arena, which seals and opens records. `release` zeroes it and what was derived from it."""

    __slots__ = ("_cipher", "_kdf", "_keys", "_prefix", "derived", "slot")

    def __init__(self, slot: SecretSlot, keys: RecordKeys) -> None:
        self.slot = slot
        self._keys = keys
        self.derived: dict[bytes, SecretSlot] = {}
        """The derived key of each nonce prefix. `RecordKeys.derived` bounds them."""
        self._prefix = b""
        """The nonce prefix of the records of `_cipher`; empty while there is none."""
        self._cipher: AESGCM
        """The cipher of the last record, for the current turn of the event loop only."""
        self._kdf: Kdf | None = None
        """Likewise."""

    @property
    def view(self) -> memoryview:
        """The key."""
        return self.slot.view

    def release(self) -> None:
        self.drop_cipher()
        self._keys.derived.forget(self.derived)
        self.slot.release()

    def drop_cipher(self) -> None:
        """At the end of the turn."""
        if self._prefix:
            self._prefix = b""
            del self._cipher
        self._kdf = None

    def seal(self, plaintext: bytes | memoryview, aad: bytes) -> bytes:
        """nonce | ciphertext | tag of one record."""
        keys = self._keys
        suffixes = keys.suffixes
        suffix = suffixes.pop() if suffixes else keys.next_suffix()
        prefix = keys.prefix
        if len(plaintext) > LONG_TEXT_BYTES:
            keys.stack_used = True
        return (
            prefix
            + suffix
            + (self._cipher if prefix == self._prefix else self._other_cipher(prefix)).encrypt(suffix, plaintext, aad)
        )

    def open(self, sealed: bytes, aad: bytes) -> bytes:
        """The plaintext of one record. Raises DecryptionError."""
        if not OVERHEAD_BYTES <= len(sealed) <= _LONG_SEALED_BYTES:
            self._check_length(sealed)
        prefix = sealed[:PREFIX_BYTES]
        try:  # without a name for the cipher: whoever keeps the error would keep it in this frame
            return (self._cipher if prefix == self._prefix else self._other_cipher(prefix)).decrypt(
                sealed[PREFIX_BYTES:NONCE_BYTES], sealed[NONCE_BYTES:], aad
            )
        except InvalidTag:
            raise DecryptionError(_DOES_NOT_OPEN) from None

    def check(self, sealed: bytes, aad: bytes, scratch: memoryview) -> None:
        """Checks that the record opens, into `scratch`, which the caller zeroes. Raises DecryptionError."""
        if not OVERHEAD_BYTES <= len(sealed) <= _LONG_SEALED_BYTES:
            self._check_length(sealed)
        prefix, target = sealed[:PREFIX_BYTES], scratch[: len(sealed) - OVERHEAD_BYTES]
        try:
            (self._cipher if prefix == self._prefix else self._other_cipher(prefix)).decrypt_into(
                sealed[PREFIX_BYTES:NONCE_BYTES], sealed[NONCE_BYTES:], aad, target
            )
        except InvalidTag:
            raise DecryptionError(_DOES_NOT_OPEN) from None

    def mac(self, plaintext: bytes, caller_aad: bytes) -> bytes:
        """HMAC-SHA-256. A key that makes MACs must never seal or open records."""
        self._keys.stack_used = True
        return hmac.digest(self.slot.view, aad(MAC, caller_aad, plaintext), "sha256")

    def _check_length(self, sealed: bytes) -> None:
        if len(sealed) < OVERHEAD_BYTES:
            raise DecryptionError(_TOO_SHORT)
        self._keys.stack_used = True

    def _other_cipher(self, prefix: bytes) -> AESGCM:
        """The cipher of the derived key, kept until another is used or the turn ends. Making one costs twice as much as
        using it.
        """
        if not self._prefix and self._kdf is None:
            self._keys.used.append(self)
        slot = self.derived.get(prefix)
        if slot is None:
            self._keys.stack_used = True
            if self._kdf is None:
                self._kdf = Kdf(self.slot.view)
            slot = self._keys.derived.add(self.derived, prefix, self._kdf)
        self._cipher = AESGCM(slot.view)
        self._prefix = prefix
        return self._cipher
