"""HPKE's sender agrees with its specifications and with the library, and its X25519 half comes from the kernel."""

import hashlib
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

from minikms.api.errors import DecryptionError
from minikms.crypto import hpke
from tests.vectors import mlkem

SEED = bytes(range(96))
KEY = memoryview(bytes(range(100, 132)))


def encapsulated(key_seed: str, randomness: str) -> bytes:
    """X-Wing's EncapsulateDerand, with the combiner under test: the shared secret."""
    expanded = hashlib.shake_256(bytes.fromhex(key_seed)).digest(96)
    message, ephemeral = (
        bytes.fromhex(randomness)[:32],
        X25519PrivateKey.from_private_bytes(bytes.fromhex(randomness)[32:]),
    )
    public_x = X25519PrivateKey.from_private_bytes(expanded[64:]).public_key()
    shared_m, _ = mlkem.encapsulate(mlkem.public_key(expanded[:64]), message)
    sent_x = ephemeral.public_key().public_bytes_raw()
    return hpke.combined(shared_m, ephemeral.exchange(public_x), sent_x, public_x.public_bytes_raw())


def test_the_combiner_gives_the_known_answer_of_x_wing() -> None:
    """draft-connolly-cfrg-xwing-kem, appendix C, the first vector."""
    assert (
        encapsulated(
            "7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26",
            "3cb1eea988004b93103cfb0aeefd2a686e01fa4a58e8a3639ca8a1e3f9ae57e2"
            "35b8cc873c23dc62b8d260169afa2f75ab916a58d974918835d25e6a435085b2",
        ).hex()
        == "d2df0522128f09dd8e2c92b1e905c793d8f57a54c3da25861f10bf4ca613e384"
    )


def public_key() -> bytes:
    mlkem_key, x25519_key = (
        MLKEM768PrivateKey.from_seed_bytes(SEED[:64]),
        X25519PrivateKey.from_private_bytes(SEED[64:]),
    )
    return mlkem_key.public_key().public_bytes_raw() + x25519_key.public_key().public_bytes_raw()


def test_the_library_opens_what_was_sealed() -> None:
    private = MLKEM768X25519PrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(SEED[:64]), X25519PrivateKey.from_private_bytes(SEED[64:])
    )
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    assert suite.decrypt(hpke.seal(public_key(), b"info", KEY), private, info=b"info") == KEY


def test_the_ephemeral_x25519_key_comes_from_the_given_generator() -> None:
    """By default the kernel's. Who knows what OpenSSL's generator returns does not know this key."""
    given = os.urandom(32)

    def random(view: memoryview) -> None:
        view[:] = given

    sealed = hpke.seal(public_key(), b"info", KEY, random=random)
    sent_x = sealed[hpke.ENCAPSULATED_BYTES - 32 : hpke.ENCAPSULATED_BYTES]
    assert sent_x == X25519PrivateKey.from_private_bytes(given).public_key().public_bytes_raw()


def test_without_randomness_nothing_is_sealed() -> None:
    def fails(_: memoryview) -> None:
        raise OSError("no device")

    with pytest.raises(OSError, match="no device"):
        hpke.seal(public_key(), b"info", KEY, random=fails)


@pytest.mark.parametrize("public_x", [bytes(32), b"\x01" + bytes(31)])
def test_a_public_key_of_low_order_is_refused(public_x: bytes) -> None:
    """It would make the X25519 secret zero. ML-KEM's half alone must not seal."""
    X25519PublicKey.from_public_bytes(public_x)
    with pytest.raises(DecryptionError):
        hpke.seal(public_key()[:-32] + public_x, b"info", KEY)
