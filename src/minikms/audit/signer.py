"""Who signs checkpoints: the seam, and the signer whose seed lies in this process's secret arena.

Owns: the signer protocol and Ed25519 (RFC 8032) for it. Invariants: a key object lives for one call; the seed is read
through its memoryview each time. It must never copy the seed into an object of its own, nor keep a key object.
A signer elsewhere (HSM, cloud) implements the same three members and lets the caller's thread wait for it.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from minikms.audit.record import Head

PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64


class Signer(Protocol):
    """Signs with Ed25519. `sign` may raise OSError when the signer can't be reached: the caller then fails closed."""

    def public_key(self) -> bytes:
        """The 32 raw bytes of the public key."""
        ...

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of `message`."""
        ...


class LocalSigner:
    """Signs with a 32-byte seed that stays where it is, in the arena of the caller."""

    def __init__(self, seed: memoryview) -> None:
        self._seed = seed

    def public_key(self) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(self._seed).public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(self._seed).sign(message)


def signature_is_valid(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` is that of `message` under the raw `public_key`; False for malformed ones too."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class AuditKey(NamedTuple):
    """One version of the audit key: the 32-byte MAC key as a view into the arena, and the signer that goes with it.

    since: the last line under the version before, None where it is not remembered or there was none.
    """

    version: int
    mac_key: memoryview
    signer: Signer
    since: Head | None = None
