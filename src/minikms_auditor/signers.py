"""The private keys that sign tree checkpoints.

Owns: the local signer, whose key lies in a file, and the verifier key of each signer; keys in tokens and clouds are
those of `minikms_tokens`. Invariants: the local key lies in the arena, and each signature makes and frees its own key
object; the first signer is an Ed25519 one, because witnesses need that. It must never show a private key.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from minikms.api.errors import KeyTextError, StartError, StartLaterError
from minikms.audit import note
from minikms.audit.note import Signature, VerifierKey
from minikms.memory import SecretArena, SecretSlot, read_key_fd_into
from minikms.platform.trusted_file import ROOT_UID
from minikms_auditor.config import FILE_SCHEME, AuditorFiles
from minikms_tokens import Algorithm, Signer, TokenError, open_signer

_TYPES: Final[dict[Algorithm, int]] = {"ed25519": note.TYPE_ED25519, "ecdsa-p256-sha256": note.TYPE_ECDSA}


class LocalKey(Signer):
    """An Ed25519 key whose 32 bytes lie in the arena."""

    def __init__(self, slot: SecretSlot) -> None:
        self._slot = slot

    @property
    def algorithm(self) -> Algorithm:
        return "ed25519"

    def public_key(self) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(self._slot.view).public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(self._slot.view).sign(message)

    def close(self) -> None:
        self._slot.release()


class Signers:
    """All signers of a log, opened, with their public keys known. `close` them when done."""

    def __init__(self, origin: str, keys: Sequence[Signer]) -> None:
        self._keys = tuple(keys)
        self.verifiers = tuple(VerifierKey(origin, _TYPES[key.algorithm], key.public_key()) for key in self._keys)
        """Their verifier keys, in order. Their name is the origin."""
        if self.verifiers[0].type != note.TYPE_ED25519:
            raise StartError("the first signer must have an Ed25519 key, which witnesses verify")
        if len({verifier.public_key for verifier in self.verifiers}) != len(self.verifiers):
            raise StartError("two signers have the same key, which verifiers refuse")

    def sign(self, text: str) -> tuple[Signature, ...]:
        """The signatures of all signers over the text of a note. Raises TokenError."""
        signatures = []
        for key, verifier in zip(self._keys, self.verifiers, strict=True):
            try:
                signature = note.sign(verifier, key.sign(text.encode()))
            except TokenError as error:
                raise TokenError(f"the signer {verifier.key_id.hex()} can't sign: {error}") from None
            if not verifier.verifies(text, signature):
                raise TokenError(f"the signer {verifier.key_id.hex()} has made a signature that does not verify")
            signatures.append(signature)
        return tuple(signatures)

    def close(self) -> None:
        _close(self._keys)


def open_signers(origin: str, uris: Sequence[str], files: AuditorFiles, arena: SecretArena) -> Signers:
    """Opens the signers. A token or cloud that is away is a StartError, because a verifier key is made of its public
    key. The first signature connects again, in the hardened process, so that a path that is missing there shows at
    once.
    """
    keys: list[Signer] = []
    try:
        for uri in uris:
            keys.append(_open(uri, files, arena))
        return Signers(origin, keys)
    except BaseException:
        _close(keys)
        raise


def _close(keys: Sequence[Signer]) -> None:
    for key in keys:
        with contextlib.suppress(TokenError):  # a call that hangs ends with the process
            key.close()


def _open(uri: str, files: AuditorFiles, arena: SecretArena) -> Signer:
    if uri.startswith(FILE_SCHEME):
        return LocalKey(_read_key(files.path(uri.removeprefix(FILE_SCHEME)), arena))
    try:
        signer = open_signer(uri)
        signer.public_key()  # from here on it is known
        signer.close()
    except TokenError as error:
        raise StartLaterError(f"the signer {uri.partition(':')[0]}:… can't be used: {error}") from None
    return signer


def _read_key(path: Path, arena: SecretArena) -> SecretSlot:
    """A file in the form of a root key's: 64 hexadecimal characters, for its owner alone. Raises StartError."""
    slot = arena.allocate()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (ROOT_UID, os.geteuid()):
                raise StartError(f"the signing key {path} must be a file of root or of this user")
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise StartError(f"other users can read the signing key {path}: chmod 0600 it")
            read_key_fd_into(fd, slot)
        finally:
            os.close(fd)
    except OSError as error:
        slot.release()
        raise StartError(f"the signing key {path} can't be read: {error.strerror}") from None
    except KeyTextError as error:
        slot.release()
        raise StartError(f"the signing key {path} is none: {error}") from None
    except BaseException:
        slot.release()
        raise
    return slot
