"""Opens keyrings and DEK files from docs/spec/formats.md alone: it imports nothing of the program.

Owns: what somebody with a root key, or with keys of an older keyring, can make of files. It returns every key that it
meets on the way, so that a scan of memory can look for them. It asserts nothing.
"""

import base64
import hashlib
import hmac
import json
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from tests.vectors import mlkem

SUITE = b"HPKE" + bytes.fromhex("647a 0001 0002")


class NotOpenedError(Exception):
    """The file does not open under what was given."""


class OpenedSlot(NamedTuple):
    """`secrets`: by a name, everything on the way from the root key to the keyring key."""

    keyring_key: bytes
    secrets: dict[str, bytes]


def aad(label: str, *fields: bytes) -> bytes:
    return label.encode() + b"\0" + b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def hmac256(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).digest()


def expand(key: bytes, info: bytes, blocks: int) -> bytes:
    made = block = b""
    for count in range(1, blocks + 1):
        block = hmac256(key, block + info + bytes([count]))
        made += block
    return made


def cmac_block(key: bytes) -> bytes:
    """The encrypted block of zeroes, from which CMAC (NIST SP 800-38B) makes K1."""
    return _aes(key, bytes(16))


def k1(key: bytes) -> bytes:
    """CMAC's first subkey: twice that block, in GF(2^128)."""
    doubled = int.from_bytes(cmac_block(key), "big") << 1
    return (doubled ^ (1 << 128 | 0x87) if doubled >> 128 else doubled).to_bytes(16, "big")


def derived(key: bytes, prefix: bytes) -> bytes:
    """The key of AES-256-GCM that XAES-256-GCM derives for nonces that begin with `prefix`."""
    mask = int.from_bytes(k1(key), "big")
    blocks = (int.from_bytes(b"\0" + counter + b"X\0" + prefix, "big") ^ mask for counter in (b"\1", b"\2"))
    return b"".join(_aes(key, block.to_bytes(16, "big")) for block in blocks)


def xaes_open(key: bytes, sealed: bytes, data: bytes) -> bytes:
    try:
        return AESGCM(derived(key, sealed[:12])).decrypt(sealed[12:24], sealed[24:], data)
    except InvalidTag:
        raise NotOpenedError from None


def _aes(key: bytes, block: bytes) -> bytes:
    return Cipher(AES(key), ECB()).encryptor().update(block)


def body_of(file: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    """The body, its exact bytes, and the tag."""
    parsed = json.loads(file)
    exact = file[len(b'{"body":') : file.rindex(b',"tag":"')]
    return parsed["body"], exact, base64.b64decode(parsed["tag"])


def open_slot(body: dict[str, Any], slot: dict[str, Any], root: bytes) -> OpenedSlot:
    """Without a look at fingerprint, commitment and MAC: whoever attacks does not check them. Raises NotOpenedError."""
    keyring_id, slot_id = body["keyring_id"].encode(), slot["slot_id"].encode()
    seeds = expand(root, aad("minikms/slot-kem/v2", keyring_id, slot_id), 3)
    auth = expand(root, aad("minikms/slot-auth/v2", keyring_id, slot_id), 1)
    sealed = base64.b64decode(slot["sealed"])
    private = X25519PrivateKey.from_private_bytes(seeds[64:])
    shared_m = MLKEM768PrivateKey.from_seed_bytes(seeds[:64]).decapsulate(sealed[:1088])
    shared_x = private.exchange(X25519PublicKey.from_public_bytes(sealed[1088:1120]))
    public_x = private.public_key().public_bytes_raw()
    shared = hashlib.sha3_256(shared_m + shared_x + sealed[1088:1120] + public_x + b"\\.//^\\").digest()
    info = aad(
        "minikms/slot-sealed/v2",
        keyring_id,
        slot_id,
        base64.b64decode(slot["commitment"]),
        number(body["key_version"]),
    )

    def extract(salt: bytes, label: bytes, given: bytes) -> bytes:
        return hmac256(salt or bytes(32), b"HPKE-v1" + SUITE + label + given)

    def derive(label: bytes, length: int) -> bytes:
        labelled = length.to_bytes(2, "big") + b"HPKE-v1" + SUITE + label + context
        return hmac256(secret, labelled + b"\x01")[:length]

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    key, nonce, exporter = derive(b"key", 32), derive(b"base_nonce", 12), derive(b"exp", 32)
    secrets = {
        "ML-KEM seed d": seeds[:32],
        "ML-KEM seed z": seeds[32:64],
        "X25519 key": seeds[64:],
        "authentication key": auth,
        "ML-KEM message": mlkem.message(seeds[:64], sealed[:1088]),
        "ML-KEM shared secret": shared_m,
        "X25519 shared secret": shared_x,
        "KEM shared secret": shared,
        "HPKE secret": secret,
        "HPKE key": key,
        "HPKE exporter secret": exporter,
    }
    try:
        return OpenedSlot(AESGCM(key).decrypt(nonce, sealed[1120:], b""), secrets)
    except InvalidTag:
        raise NotOpenedError from None


def keks_of(file: bytes, keyring_key: bytes) -> dict[int, bytes]:
    """Every KEK version that opens, in a keyring that need not be authentic."""
    body, _, _ = body_of(file)
    found = {}
    for kek in body["keks"]:
        data = aad("minikms/kek/v1", body["keyring_id"].encode(), number(kek["version"]))
        try:
            found[kek["version"]] = xaes_open(keyring_key, base64.b64decode(kek["wrapped"]), data)
        except NotOpenedError:
            continue
    return found


def is_authentic(file: bytes, keyring_key: bytes) -> bool:
    _, exact, tag = body_of(file)
    try:
        xaes_open(keyring_key, tag, aad("minikms/keyring/v1", exact))
    except NotOpenedError:
        return False
    return True


def open_dek(file: bytes, keks: dict[int, bytes]) -> bytes:
    """The DEK of a file, under any of these KEKs, whichever it names. Raises NotOpenedError."""
    record = json.loads(file)
    names = (record["id"], record["thread_id"], record["purpose"], record["algorithm"])
    data = aad("minikms/dek/v1", *(name.encode() for name in names), number(record["kek_version"]))
    for kek in keks.values():
        try:
            return xaes_open(kek, base64.b64decode(record["wrapped"]), data)
        except NotOpenedError:
            continue
    raise NotOpenedError
