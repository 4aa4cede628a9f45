"""XAES-256-GCM against the vectors of its specification, https://c2sp.org/XAES-256-GCM."""

import sys
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.hashes import SHAKE128, XOFHash

from minikms import api
from minikms.crypto import aead
from minikms.crypto.aead import Kdf
from tests.harness import decryptor

NONCE = b"ABCDEFGHIJKLMNOPQRSTUVWX"
PLAINTEXT = b"XAES-256-GCM"


class Vector(NamedTuple):
    key: bytes
    derived: str
    aad: bytes
    sealed: str


VECTORS = (
    Vector(
        bytes([1] * 32),
        "c8612c9ed53fe43e8e005b828a1631a0bbcb6ab2f46514ec4f439fcfd0fa969b",
        b"",
        "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271",
    ),
    Vector(  # the first bit of the encrypted zero block is set, so CMAC reduces K1
        bytes([3] * 32),
        "e9c621d4cdd9b11b00a6427ad7e559aeedd66b3857646677748f8ca796cb3fd8",
        b"c2sp.org/XAES-256-GCM",
        "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d",
    ),
)


@pytest.mark.parametrize("vector", VECTORS)
def test_the_vectors_of_the_specification(vector: Vector) -> None:
    key, sealed = memoryview(vector.key), NONCE + bytes.fromhex(vector.sealed)
    derived = memoryview(bytearray(aead.KEY_BYTES))
    Kdf(key).derive_into(NONCE[: aead.PREFIX_BYTES], derived)
    assert derived.hex() == vector.derived
    assert aead.seal(key, NONCE, PLAINTEXT, vector.aad) == sealed
    assert aead.open_sealed(key, sealed, vector.aad) == PLAINTEXT
    assert decryptor.xaes_open(vector.key, sealed, vector.aad) == PLAINTEXT
    assert len(sealed) - len(PLAINTEXT) == aead.OVERHEAD_BYTES == api.SEAL_BYTES


def accumulated(iterations: int) -> str:
    """SHAKE-128 of the ciphertexts of inputs that another SHAKE-128 gives."""
    source, result = XOFHash(SHAKE128(digest_size=sys.maxsize)), XOFHash(SHAKE128(digest_size=32))
    for _ in range(iterations):
        key, nonce = source.squeeze(32), source.squeeze(24)
        plaintext = source.squeeze(source.squeeze(1)[0])
        aad = source.squeeze(source.squeeze(1)[0])
        sealed = aead.seal(memoryview(key), nonce, plaintext, aad)
        assert aead.open_sealed(memoryview(key), sealed, aad) == plaintext
        result.update(sealed[aead.NONCE_BYTES :])
    return result.squeeze(32).hex()


def test_the_accumulated_test_of_10_000_inputs() -> None:
    assert accumulated(10_000) == "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939"


@pytest.mark.torture
def test_the_accumulated_test_of_1_000_000_inputs() -> None:
    assert accumulated(1_000_000) == "2163ae1445985a30b60585ee67daa55674df06901b890593e824b8a7c885ab15"
