"""The vectors of Project Wycheproof, RFC 8032 and FIPS 203, through the project's own functions."""

from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms.api.errors import DecryptionError
from minikms.audit import chain
from minikms.crypto import hpke
from minikms.crypto.aead import PREFIX_BYTES, XaesCipher
from minikms.crypto.records import RecordKey, RecordKeys
from minikms.memory.arena import SecretArena
from tests.vectors import mlkem, others

WYCHEPROOF: dict[str, list[dict[str, Any]]] = others.load("wycheproof")
PREFIX = bytes(PREFIX_BYTES)
KEY = memoryview(bytes(range(32)))
MLKEM_KEYS: list[dict[str, str]] = others.load("mlkem")


def of(vector: dict[str, Any], *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


def name_of(value: Any) -> str:
    return str(value["tcId"])


@pytest.fixture(scope="module")
def arena() -> Iterator[SecretArena]:
    with SecretArena(1024, force_fallback=True) as made:
        yield made


def test_a_file_with_one_other_byte_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(others.PINS, "mlkem", others.PINS["hpke"])
    with pytest.raises(ValueError, match="mlkem are not those"):
        others.load("mlkem")


@pytest.mark.parametrize("vector", WYCHEPROOF["aes_gcm"], ids=name_of)
def test_aes_gcm(vector: dict[str, Any], arena: SecretArena) -> None:
    """Under a key that stands where the key that XAES derives would be."""
    raw, iv, aad, text, ciphertext = of(vector, "key", "iv", "aad", "msg", "ct")
    slot, unused = arena.allocate(), arena.allocate()
    slot.view[:] = raw
    record = RecordKey(unused, RecordKeys(arena))
    record.derived[PREFIX] = slot
    nonce, target = PREFIX + iv, memoryview(bytearray(len(text)))
    sealed = nonce + ciphertext + bytes.fromhex(vector["tag"])
    with XaesCipher(unused.view, {PREFIX: slot}) as cipher:
        if vector["result"] == "valid":
            assert cipher.seal(nonce, text, aad) == sealed
            assert cipher.open_sealed(sealed, aad) == record.open(sealed, aad) == text
            cipher.open_into(sealed, aad, target)
            assert target == text
            record.check(sealed, aad, target)
        else:
            assert cipher.seal(nonce, text, aad) != sealed
            with pytest.raises(InvalidTag):
                cipher.open_sealed(sealed, aad)
            with pytest.raises(DecryptionError):
                cipher.open_into(sealed, aad, target)
            assert target == bytes(len(text))
            with pytest.raises(DecryptionError):
                record.open(sealed, aad)
            with pytest.raises(DecryptionError):
                record.check(sealed, aad, target)


@pytest.mark.parametrize("vector", WYCHEPROOF["x25519"], ids=name_of)
def test_x25519_within_a_sealed_key(vector: dict[str, Any]) -> None:
    """The vector's private key is the ephemeral one. A key that would make the secret zero is refused."""
    public_x, private_x, shared_x = of(vector, "public", "private", "shared")
    seed = b"".join(of(MLKEM_KEYS[0], "d", "z"))
    public = bytes.fromhex(MLKEM_KEYS[0]["pk"]) + public_x

    def random(view: memoryview) -> None:
        view[:] = private_x

    if "ZeroSharedSecret" in vector["flags"]:
        with pytest.raises(DecryptionError):
            hpke.seal(public, b"info", KEY, random=random)
        return
    sealed = hpke.seal(public, b"info", KEY, random=random)
    sent_m, sent_x = sealed[: -32 - len(KEY) - 16], sealed[-32 - len(KEY) - 16 : -len(KEY) - 16]
    assert sent_x == X25519PrivateKey.from_private_bytes(private_x).public_key().public_bytes_raw()
    shared_m = MLKEM768PrivateKey.from_seed_bytes(seed).decapsulate(sent_m)
    key, nonce = hpke.key_schedule(hpke.SUITE_ID, hpke.combined(shared_m, shared_x, sent_x, public_x), b"info")
    assert AESGCM(key).decrypt(nonce, sealed[-len(KEY) - 16 :], None) == KEY


@pytest.mark.parametrize("vector", WYCHEPROOF["ed25519"], ids=name_of)
def test_ed25519_signatures(vector: dict[str, Any]) -> None:
    public, signature, message = of(vector, "public", "sig", "msg")
    assert chain.signature_is_valid(public, signature, message) == (vector["result"] == "valid")


@pytest.mark.parametrize("vector", others.load("ed25519"), ids=lambda vector: vector["seed"][:8])
def test_rfc_8032(vector: dict[str, str]) -> None:
    seed, public, message, signature = of(vector, "seed", "public", "message", "signature")
    signer = chain.Ed25519Signer(memoryview(seed))
    assert (signer.public_key(), signer.sign(message)) == (public, signature)
    assert chain.signature_is_valid(public, signature, message)
    assert not chain.signature_is_valid(public, signature, message + b"\0")
    assert not chain.signature_is_valid(public, signature[:-1] + bytes([signature[-1] ^ 1]), message)


@pytest.mark.parametrize("vector", WYCHEPROOF["hmac_sha256"], ids=name_of)
def test_hmac_sha256_of_an_audit_line(vector: dict[str, Any]) -> None:
    """A vector's tag may be the beginning of the whole one."""
    key, message, tag = of(vector, "key", "msg", "tag")
    for place in (0, len(message) // 2, len(message)):
        whole = chain.mac(memoryview(key), message[:place], message[place:])
        assert (whole[: len(tag)] == tag) == (vector["result"] == "valid")


@pytest.mark.parametrize("vector", MLKEM_KEYS, ids=lambda vector: vector["d"][:8])
def test_ml_kem_768(vector: dict[str, str]) -> None:
    """The second implementation of the tests makes the known answers; and what is sealed to a known key opens."""
    seed, public, message = b"".join(of(vector, "d", "z")), *of(vector, "pk", "msg")
    assert mlkem.public_key(seed) == public
    assert mlkem.encapsulate(public, message) == (bytes.fromhex(vector["ss"]), bytes.fromhex(vector["ct"]))
    assert MLKEM768PrivateKey.from_seed_bytes(seed).decapsulate(bytes.fromhex(vector["ct"])).hex() == vector["ss"]
    private_x = X25519PrivateKey.from_private_bytes(KEY)
    public_x = private_x.public_key().public_bytes_raw()
    sealed = hpke.seal(public + public_x, b"", KEY)
    sent_x = sealed[1088:1120]
    shared_m = mlkem.encapsulate(public, mlkem.message(seed, sealed[:1088]))[0]
    shared_x = private_x.exchange(X25519PublicKey.from_public_bytes(sent_x))
    key, nonce = hpke.key_schedule(hpke.SUITE_ID, hpke.combined(shared_m, shared_x, sent_x, public_x), b"")
    assert AESGCM(key).decrypt(nonce, sealed[1120:], None) == KEY


@pytest.mark.parametrize("place", range(0, 3 * 256, 85))
def test_an_ml_kem_key_with_a_coefficient_above_the_modulus_is_refused(place: int) -> None:
    """The check of FIPS 203, section 7.2."""
    public = bytearray.fromhex(MLKEM_KEYS[0]["pk"])
    polys, at = [mlkem.decode(bytes(public[384 * i : 384 * (i + 1)]), 12) for i in range(3)], divmod(place, 256)
    polys[at[0]][at[1]] = mlkem.Q
    public[: 384 * 3] = b"".join(mlkem.encode(poly, 12) for poly in polys)
    public_x = X25519PrivateKey.from_private_bytes(KEY).public_key().public_bytes_raw()
    with pytest.raises(DecryptionError):
        hpke.seal(bytes(public) + public_x, b"", KEY)
