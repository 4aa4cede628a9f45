"""Ciphers that a test can see as long as something refers to them."""

from __future__ import annotations

import weakref
from typing import ClassVar

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class WatchedCipher:
    """In the place of AESGCM, to which there are no weak references. `errors` are raised by the next wraps."""

    alive: ClassVar[weakref.WeakSet[WatchedCipher]] = weakref.WeakSet()
    errors: ClassVar[list[Exception]] = []

    def __init__(self, key: memoryview) -> None:
        self._cipher = AESGCM(key)
        self.decrypt_into = self._cipher.decrypt_into
        self.alive.add(self)

    def encrypt(self, nonce: bytes, key: memoryview, aad: bytes) -> bytes:
        if self.errors:
            raise self.errors.pop()
        return self._cipher.encrypt(nonce, key, aad)
