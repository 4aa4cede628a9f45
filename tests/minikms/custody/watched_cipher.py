"""Objects with key schedules that a test can see as long as something refers to them."""

from __future__ import annotations

import weakref
from functools import partial
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from minikms.crypto import aead


def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every cipher and every key derivation of `XaesCipher` is in `alive`."""
    monkeypatch.setattr(aead, "AESGCM", WatchedCipher)
    monkeypatch.setattr(aead, "Cipher", WatchedSchedule)


def alive() -> bool:
    return bool(WatchedCipher.alive or WatchedSchedule.alive)


class WatchedCipher:
    """In the place of AESGCM, to which there are no weak references. `errors` are raised by the next wraps."""

    alive: ClassVar[weakref.WeakSet[WatchedCipher]] = weakref.WeakSet()
    errors: ClassVar[list[Exception]] = []

    def __init__(self, key: memoryview) -> None:
        cipher = AESGCM(key)
        self.encrypt = partial(_encrypt, cipher)
        self.decrypt = cipher.decrypt
        self.decrypt_into = cipher.decrypt_into
        self.alive.add(self)


def _encrypt(cipher: AESGCM, nonce: bytes, key: memoryview, aad: bytes) -> bytes:
    """A function, as the frames of an error would refer to the object of a method."""
    if WatchedCipher.errors:
        raise WatchedCipher.errors.pop()
    return cipher.encrypt(nonce, key, aad)


class WatchedSchedule:
    """In the place of Cipher."""

    alive: ClassVar[weakref.WeakSet[WatchedSchedule]] = weakref.WeakSet()

    def __init__(self, key: AES, mode: ECB) -> None:
        self.update_into = Cipher(key, mode).encryptor().update_into
        self.alive.add(self)

    def encryptor(self) -> WatchedSchedule:
        return self
