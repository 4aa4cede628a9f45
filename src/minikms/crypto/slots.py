"""Slots: the keyring key sealed to a key pair that is derived from a root key.

Owns: what is derived from a root key for its slot (the key pair and the slot's authentication key), sealing to the
public key, opening with the root key, the MACs over what was sealed and over a backup archive, and what a new host
hands over so that a slot is made for its root key. The bytes are in docs/spec/formats.md and docs/spec/backup.md.

The keyring key is sealed with HPKE in base mode (RFC 9180) to the hybrid KEM of ML-KEM-768 and X25519 (X-Wing, KEM id
0x647a), with HKDF-SHA256 and AES-256-GCM: `hpke` seals, the library opens. So a keyring key can be sealed to a slot
without its root key, and a keyring file that was stolen is safe from a quantum computer. HPKE does not authenticate who
sealed; the MAC does, under a key that only holders of the root key or of a keyring key have.

Invariants: everything sealed is bound to keyring, slot, commitment and key number. Key objects live for one call, and
a bytes object that holds a key is overwritten as soon as the library has returned it. It must never open what was
sealed before the caller has compared the MAC.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

from minikms.api.errors import DecryptionError, StartError
from minikms.crypto import hpke, labels, roots
from minikms.crypto.aead import KEY_BYTES, TAG_BYTES
from minikms.crypto.hpke import ENCAPSULATED_BYTES, X25519_KEY_BYTES
from minikms.memory import zero, zero_bytes

MLKEM_SEED_BYTES: Final = 64
SEALED_BYTES: Final = ENCAPSULATED_BYTES + KEY_BYTES + TAG_BYTES
MAC_BYTES: Final = 32
COMMITMENT_BYTES: Final = 32

INVITATION: Final = "invitation"
"""The id that stands for a slot in the key pair of an invitation, which a keyring key derives. No slot has this id."""
DIGEST_HEX_CHARS: Final = 32
"""128 bits: nobody finds a second request with the digest of the first."""

_HASH_BYTES: Final = 32


class SlotBinding(NamedTuple):
    """The place where a keyring key is sealed: it opens nowhere else. `key_number` is the number of the keyring key."""

    keyring_id: str
    slot_id: str
    commitment: bytes
    key_number: int


class Newcomer(NamedTuple):
    """What a slot is made of, for a root key on another host. `fingerprint`: of the root key. `sealed_auth`: the slot's
    authentication key, sealed to the key of an invitation.
    """

    keyring_id: str
    slot_id: str
    fingerprint: str
    commitment: bytes
    public_key: bytes
    sealed_auth: bytes

    @property
    def digest(self) -> str:
        """32 hex characters that people compare on both hosts. They cover every field. The fingerprint of the root key
        alone would not show that an attacker has replaced the public key.
        """
        return hashlib.sha256(_auth_info(self) + self.sealed_auth).hexdigest()[:DIGEST_HEX_CHARS]


def derived(root: memoryview, auth_key: memoryview, keyring_id: str, slot_id: str) -> Newcomer:
    """What a slot of the root key is made of. `auth_key`: gets the slot's authentication key; it is not sealed."""
    auth_key_into(root, keyring_id, slot_id, auth_key)
    commitment, public = roots.commitment(root, slot_id), public_key(root, keyring_id, slot_id)
    return Newcomer(keyring_id, slot_id, roots.fingerprint(root), commitment, public, b"")


def newcomer(root: memoryview, auth_key: memoryview, keyring_id: str, slot_id: str, invited: bytes) -> Newcomer:
    """Derives a slot like `derived`, sealed for the host that adds it. `invited`: the public key of its invitation.
    Raises DecryptionError if that is none.
    """
    unsealed = derived(root, auth_key, keyring_id, slot_id)
    return unsealed._replace(sealed_auth=hpke.seal(invited, _auth_info(unsealed), auth_key))


def open_auth_into(keyring_key: memoryview, new: Newcomer, target: memoryview) -> None:
    """The authentication key of a newcomer, whose invitation was made under the keyring key. Raises DecryptionError."""
    _open_into(_private_key(keyring_key, new.keyring_id, INVITATION), _auth_info(new), new.sealed_auth, target)


def public_key(root: memoryview, keyring_id: str, slot_id: str) -> bytes:
    """The public key of the slot: ML-KEM-768, then X25519."""
    mlkem, x25519 = _private_key(root, keyring_id, slot_id)
    return mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()


def auth_key_into(root: memoryview, keyring_id: str, slot_id: str, target: memoryview) -> None:
    """The slot's authentication key, which `mac` takes."""
    _expand_into(root, labels.aad(labels.SLOT_AUTH, keyring_id.encode(), slot_id.encode()), target)


def seal(public: bytes, binding: SlotBinding, keyring_key: memoryview) -> bytes:
    """The keyring key, sealed to the slot's public key. Raises DecryptionError if that is not a public key."""
    return hpke.seal(public, _info(binding), keyring_key)


def open_into(root: memoryview, binding: SlotBinding, sealed: bytes, target: memoryview) -> None:
    """Opens the keyring key into `target`. Call it after the MAC was compared. Raises DecryptionError."""
    _open_into(_private_key(root, binding.keyring_id, binding.slot_id), _info(binding), sealed, target)


def mac(auth_key: memoryview, binding: SlotBinding, sealed: bytes) -> bytes:
    """Authenticates `sealed`, which HPKE does not: HMAC-SHA-256 under the slot's authentication key."""
    data = labels.aad(
        labels.SLOT_MAC,
        binding.keyring_id.encode(),
        binding.slot_id.encode(),
        labels.number(binding.key_number),
        hashlib.sha256(sealed).digest(),
    )
    return hmac.digest(auth_key, data, "sha256")


def archive_tag(auth_key: memoryview, slot_id: str, digest: bytes) -> bytes:
    """Authenticates a backup archive by its SHA-256, under the slot's authentication key."""
    return hmac.digest(auth_key, labels.aad(labels.ARCHIVE_SLOT, slot_id.encode(), digest), "sha256")


_KeyPair = tuple[MLKEM768PrivateKey, X25519PrivateKey]


def _open_into(pair: _KeyPair, info: bytes, sealed: bytes, target: memoryview) -> None:
    if len(sealed) != SEALED_BYTES:
        raise DecryptionError("the sealed key has the wrong length")
    opened: bytes | None = None
    with contextlib.suppress(InvalidTag, ValueError):
        private = MLKEM768X25519PrivateKey(*pair)
        opened = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM).decrypt(sealed, private, info=info)
    if opened is None:  # raised here: an error that is raised in an `except` keeps the frame of the first one alive
        raise DecryptionError("the sealed key does not open")
    target[:] = opened
    zero_bytes(opened)


def _info(binding: SlotBinding) -> bytes:
    return labels.aad(
        labels.SLOT_SEALED,
        binding.keyring_id.encode(),
        binding.slot_id.encode(),
        binding.commitment,
        labels.number(binding.key_number),
    )


def _auth_info(new: Newcomer) -> bytes:
    named = (new.keyring_id.encode(), new.slot_id.encode(), new.fingerprint.encode())
    return labels.aad(labels.REPLICA_AUTH, *named, new.commitment, new.public_key)


def _private_key(root: memoryview, keyring_id: str, slot_id: str) -> _KeyPair:
    """ML-KEM takes its seed as one piece, longer than a slot of the arena, so it is derived outside and zeroed."""
    seeds = memoryview(bytearray(MLKEM_SEED_BYTES + X25519_KEY_BYTES))
    try:
        _expand_into(root, labels.aad(labels.SLOT_KEM, keyring_id.encode(), slot_id.encode()), seeds)
        return (
            MLKEM768PrivateKey.from_seed_bytes(seeds[:MLKEM_SEED_BYTES]),
            X25519PrivateKey.from_private_bytes(seeds[MLKEM_SEED_BYTES:]),
        )
    except UnsupportedAlgorithm:
        raise StartError(
            "this build of the package `cryptography` has no ML-KEM: install its wheel from PyPI, or build it with "
            "OpenSSL 3.5 or newer"
        ) from None
    finally:
        zero(seeds)


def _expand_into(root: memoryview, info: bytes, target: memoryview) -> None:
    """HKDF-Expand (RFC 5869, section 2.3) with SHA-256. `target` holds whole blocks.

    A uniformly random key needs no extract step (section 3.3). The library's own HKDF leaves the last block in freed
    memory.
    """
    text = memoryview(bytearray(_HASH_BYTES + len(info) + 1))  # T(n-1) | info | n
    text[_HASH_BYTES:-1] = info
    try:
        for number, start in enumerate(range(0, len(target), _HASH_BYTES), 1):
            text[-1] = number
            block = hmac.digest(root, text if number > 1 else text[_HASH_BYTES:], "sha256")
            target[start : start + _HASH_BYTES] = text[:_HASH_BYTES] = block
            zero_bytes(block)
    finally:
        zero(text)
