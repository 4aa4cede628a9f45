"""The vectors of RFC 9180, and of draft-ietf-hpke-pq for X-Wing: the key schedule, and the combiner."""

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from minikms.crypto import hpke
from tests.vectors import mlkem, others

VECTORS: list[dict[str, Any]] = others.load("hpke")
XWING_KEM = 0x647A


def name_of(vector: dict[str, Any]) -> str:
    return f"{vector['kem_id']:#x}-{vector['aead_id']}"


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_the_key_schedule(vector: dict[str, Any]) -> None:
    """The suites that have the KDF of the project and a key as long as its own."""
    suite_id = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (vector["kem_id"], 1, vector["aead_id"]))
    shared, info = bytes.fromhex(vector["shared_secret"]), bytes.fromhex(vector["info"])
    key, nonce = hpke.key_schedule(suite_id, shared, info)
    assert (key.hex(), nonce.hex()) == (vector["key"], vector["base_nonce"])
    for other in (
        hpke.key_schedule(suite_id, shared[:-1] + b"\0", info),
        hpke.key_schedule(suite_id, shared, info + b"\0"),
        hpke.key_schedule(hpke.SUITE_ID, shared, info),
    ):
        assert key != other[0]
        assert nonce != other[1]


def test_x_wing() -> None:
    """Its encapsulation with the chosen randomness, and the secret from the project's combiner."""
    (vector,) = (vector for vector in VECTORS if vector["kem_id"] == XWING_KEM)
    expanded = hashlib.shake_256(bytes.fromhex(vector["skRm"])).digest(96)
    message, ephemeral = bytes.fromhex(vector["ikmE"])[:32], bytes.fromhex(vector["ikmE"])[32:]
    sender = X25519PrivateKey.from_private_bytes(ephemeral)
    receiver = X25519PrivateKey.from_private_bytes(expanded[64:]).public_key()
    shared_m, sent_m = mlkem.encapsulate(mlkem.public_key(expanded[:64]), message)
    sent_x = sender.public_key().public_bytes_raw()
    assert (sent_m + sent_x).hex() == vector["enc"]
    shared = hpke.combined(shared_m, sender.exchange(receiver), sent_x, receiver.public_bytes_raw())
    assert shared.hex() == vector["shared_secret"]
