"""Makes the known answers of docs/spec/formats.md from that page alone: it imports nothing of the program.

`make_formats.py` writes formats.json beside itself; `make_formats.py --check` exits 1 if the file there differs. Before
it writes, it reads its own answers back as a reader of that page would, and fails if they do not open.
"""

import base64
import hashlib
import hmac
import json
import struct
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.vectors import mlkem

FILE = Path(__file__).with_name("formats.json")

KEYRING_ID = "kr_00112233445566ff"
MADE, ROTATED = "2026-11-24T15:00:00Z", "2026-11-25T16:30:00Z"
KEY_ID, THREAD_ID, OLDER_KEY_ID = "k_01jdfm0z4841040g20820g4104", "thread-1", "k_01jdfm0z4841040g20820g4100"


def secret(name: str) -> bytes:
    """A fixed key: SHA-256 of its name."""
    return hashlib.sha256(f"minikms format vector: {name}".encode()).digest()


def nonce(name: str) -> bytes:
    """A fixed nonce, which no two sealings share."""
    return hashlib.sha256(f"minikms format vector nonce: {name}".encode()).digest()[:24]


ROOT, NEW_ROOT, SHARED_ROOT = secret("root key"), secret("new root key"), secret("root key with shares")
KEYRING_KEYS = {number: secret(f"keyring key {number}") for number in (1, 3)}
KEKS = {1: secret("KEK 1"), 2: secret("KEK 2")}
AUDIT_KEY, AUDIT_SEED = secret("audit key 1"), secret("checkpoint seed 1")
TOMBSTONE_KEY = secret("tombstone key")
DEK = secret("DEK")


def aad(label: str, *fields: bytes) -> bytes:
    return label.encode() + b"\0" + b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def derived(key: bytes, prefix: bytes) -> bytes:
    """The key of AES-256-GCM for the nonces that begin with `prefix`: CMAC over AES-256 of two blocks."""

    def aes(block: int) -> bytes:
        return Cipher(AES(key), ECB()).encryptor().update(block.to_bytes(16, "big"))

    k1 = int.from_bytes(aes(0), "big") << 1
    if k1 >> 128:
        k1 ^= 1 << 128 | 0x87
    first, second = (int.from_bytes(b"\0" + counter + b"X\0" + prefix, "big") for counter in (b"\1", b"\2"))
    return aes(first ^ k1) + aes(second ^ k1)


def seal(key: bytes, name: str, plaintext: bytes, data: bytes) -> bytes:
    prefix, rest = nonce(name)[:12], nonce(name)[12:]
    return prefix + rest + AESGCM(derived(key, prefix)).encrypt(rest, plaintext, data)


def opened(key: bytes, sealed: bytes, data: bytes) -> bytes:
    return AESGCM(derived(key, sealed[:12])).decrypt(sealed[12:24], sealed[24:], data)


def b64(value: bytes) -> str:
    return base64.b64encode(value).decode()


# --- root keys ----------------------------------------------------------------------------------------------------


def fingerprint(root: bytes) -> str:
    return hmac.new(root, b"minikms/root-fingerprint/v1\0", hashlib.sha256).digest()[:8].hex()


def commitment(root: bytes, slot_id: str) -> bytes:
    return hmac.new(root, aad("minikms/root-commitment/v1", slot_id.encode()) + b"\x01", hashlib.sha256).digest()


# --- sealed slots: HPKE base mode (RFC 9180) with X-Wing --------------------------------------------------------------

SUITE = b"HPKE" + bytes.fromhex("647a 0001 0002")
"""The KEM, HKDF-SHA256, AES-256-GCM."""


def hmac256(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).digest()


def expand(key: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand (RFC 5869)."""
    made = block = b""
    while len(made) < length:
        block = hmac256(key, block + info + bytes([len(made) // 32 + 1]))
        made += block
    return made[:length]


def labeled_extract(salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac256(salt or bytes(32), b"HPKE-v1" + SUITE + label + ikm)


def labeled_expand(key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return expand(key, length.to_bytes(2, "big") + b"HPKE-v1" + SUITE + label + info, length)


def key_and_nonce(shared: bytes, info: bytes) -> tuple[bytes, bytes]:
    """KeySchedule in base mode: section 5.1."""
    context = b"\0" + labeled_extract(b"", b"psk_id_hash", b"") + labeled_extract(b"", b"info_hash", info)
    key = labeled_extract(shared, b"secret", b"")
    return labeled_expand(key, b"key", context, 32), labeled_expand(key, b"base_nonce", context, 12)


def combined(shared_m: bytes, shared_x: bytes, sent_x: bytes, public_x: bytes) -> bytes:
    """The combiner of X-Wing."""
    return hashlib.sha3_256(shared_m + shared_x + sent_x + public_x + b"\\.//^\\").digest()


def seeds(root: bytes, slot_id: str) -> bytes:
    """96 bytes: d and z of ML-KEM, and the private key of X25519."""
    return expand(root, aad("minikms/slot-kem/v2", KEYRING_ID.encode(), slot_id.encode()), 96)


def auth_key(root: bytes, slot_id: str) -> bytes:
    return expand(root, aad("minikms/slot-auth/v2", KEYRING_ID.encode(), slot_id.encode()), 32)


def x25519_public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def x25519(private: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def slot_public_key(root: bytes, slot_id: str) -> bytes:
    made = seeds(root, slot_id)
    return mlkem.public_key(made[:64]) + x25519_public(made[64:])


def slot_info(root: bytes, slot_id: str, key_number: int) -> bytes:
    fields = KEYRING_ID.encode(), slot_id.encode(), commitment(root, slot_id), number(key_number)
    return aad("minikms/slot-sealed/v2", *fields)


def hpke_seal(public: bytes, name: str, plaintext: bytes, info: bytes) -> bytes:
    ephemeral = secret(f"X25519 key of {name}")
    shared_m, sent_m = mlkem.encapsulate(public[:1184], secret(f"ML-KEM message of {name}"))
    sent_x, public_x = x25519_public(ephemeral), public[1184:]
    key, first_nonce = key_and_nonce(combined(shared_m, x25519(ephemeral, public_x), sent_x, public_x), info)
    return sent_m + sent_x + AESGCM(key).encrypt(first_nonce, plaintext, b"")


def hpke_open(seed: bytes, sealed: bytes, info: bytes) -> bytes:
    sent_m, sent_x, text = sealed[:1088], sealed[1088:1120], sealed[1120:]
    shared_m = MLKEM768PrivateKey.from_seed_bytes(seed[:64]).decapsulate(sent_m)
    shared = combined(shared_m, x25519(seed[64:], sent_x), sent_x, x25519_public(seed[64:]))
    key, first_nonce = key_and_nonce(shared, info)
    return AESGCM(key).decrypt(first_nonce, text, b"")


def slot_mac(root: bytes, slot_id: str, key_number: int, sealed: bytes) -> bytes:
    fields = KEYRING_ID.encode(), slot_id.encode(), number(key_number), hashlib.sha256(sealed).digest()
    return hmac256(auth_key(root, slot_id), aad("minikms/slot-mac/v2", *fields))


def auth_aad(slot_id: str) -> bytes:
    return aad("minikms/slot-auth-key/v2", KEYRING_ID.encode(), slot_id.encode())


def sealed_slot(
    root: bytes, slot_id: str, provider: str, created_at: str, key_number: int, **others: object
) -> dict[str, object]:
    name = f"slot {slot_id} of keyring key {key_number}"
    key = KEYRING_KEYS[key_number]
    sealed = hpke_seal(slot_public_key(root, slot_id), name, key, slot_info(root, slot_id, key_number))
    return {
        "slot_id": slot_id,
        "fingerprint": fingerprint(root),
        "provider": provider,
        "created_at": created_at,
        "commitment": b64(commitment(root, slot_id)),
        "tested_at": ROTATED,
        "public_key": b64(slot_public_key(root, slot_id)),
        "sealed": b64(sealed),
        "mac": b64(slot_mac(root, slot_id, key_number, sealed)),
        "wrapped_auth": b64(seal(key, f"authentication key of {name}", auth_key(root, slot_id), auth_aad(slot_id))),
    } | others


# --- the keyring --------------------------------------------------------------------------------------------------


def numbered_aad(label: str, version: int) -> bytes:
    return aad(label, KEYRING_ID.encode(), number(version))


def kek(version: int, state: str, key_version: int, created_at: str, **others: str) -> dict[str, object]:
    sealed = seal(
        KEYRING_KEYS[key_version],
        f"KEK {version} under {key_version}",
        KEKS[version],
        numbered_aad("minikms/kek/v1", version),
    )
    return {
        "version": version,
        "state": state,
        "created_at": created_at,
        "wrapped": b64(sealed),
    } | others


def audit_key(key_version: int) -> dict[str, object]:
    under = KEYRING_KEYS[key_version]
    key = seal(under, f"audit key under {key_version}", AUDIT_KEY, numbered_aad("minikms/audit-key/v1", 1))
    seed = seal(under, f"audit seed under {key_version}", AUDIT_SEED, numbered_aad("minikms/audit-seed/v1", 1))
    public = Ed25519PrivateKey.from_private_bytes(AUDIT_SEED).public_key().public_bytes_raw()
    return {
        "version": 1,
        "created_at": MADE,
        "public_key": b64(public),
        "wrapped_key": b64(key),
        "wrapped_seed": b64(seed),
    }


def first_body() -> dict[str, object]:
    """As a first start makes it."""
    return {
        "format": "minikms-keyring",
        "version": 5,
        "keyring_id": KEYRING_ID,
        "epoch": 1,
        "created_at": MADE,
        "updated_at": MADE,
        "key_version": 1,
        "slots": [sealed_slot(ROOT, "s1", "file", MADE, 1)],
        "keks": [kek(1, "active", 1, MADE)],
        "audit_keys": [audit_key(1)],
        "tombstone_log": tombstone_log(1, 0),
    }


def tombstone_file() -> bytes:
    """docs/spec/tombstones.md: a header and three records."""
    content = b"minikms-stones\0t" + (1).to_bytes(4, "big") + bytes(12)
    for count in range(1, 4):
        body = secret(f"destroyed key {count}")[:16] + (1_790_000_000 + count).to_bytes(8, "big")
        data = aad("minikms/tombstone/v1", KEYRING_ID.encode(), number(count), hashlib.sha256(content).digest(), body)
        content += body + hmac.new(TOMBSTONE_KEY, data, hashlib.sha256).digest()[:16]
    return content


def tombstone_log(key_version: int, count: int) -> dict[str, object]:
    """Of a file of which the body counts the first `count` records."""
    sealed = seal(
        KEYRING_KEYS[key_version],
        f"tombstone key under {key_version}",
        TOMBSTONE_KEY,
        numbered_aad("minikms/tombstone-key/v1", 1),
    )
    head = hashlib.sha256(tombstone_file()[: 32 + 40 * count]).digest()
    return {"count": count, "head": b64(head), "wrapped_key": b64(sealed)}


def three_roots_body() -> dict[str, object]:
    """The root key of slot s4 was removed, another one has shares, and one is to replace that of the first slot."""
    shares = {
        "set_id": secret("share set")[:8].hex(),
        "threshold": 2,
        "count": 3,
        "digests": [b64(secret(f"digest of share {number}")) for number in (1, 2, 3)],
    }
    return first_body() | {
        "epoch": 9,
        "updated_at": ROTATED,
        "key_version": 3,
        "slots": [
            sealed_slot(ROOT, "s1", "file", MADE, 3),
            sealed_slot(SHARED_ROOT, "s5", "shares", ROTATED, 3, shares=shares),
            sealed_slot(NEW_ROOT, "s7", "request", ROTATED, 3, replaces="s1"),
        ],
        "keks": [kek(1, "active", 3, MADE), kek(2, "pending", 3, ROTATED)],
        "audit_keys": [audit_key(3)],
        "tombstone_log": tombstone_log(3, 2),
        "rotation": {
            "from_version": 1,
            "to_version": 2,
            "started_at": ROTATED,
            "stamp": "20261125T163000",
            "slot_id": "s7",
        },
        "retired_roots": [{"fingerprint": fingerprint(secret("first root key")), "rotated_at": MADE}],
        "revoking": [
            {
                "slot_id": "s4",
                "fingerprint": fingerprint(secret("removed root key")),
                "provider": "file",
                "removed_at": ROTATED,
                "kek_version": 2,
            }
        ],
    }


def keyring_file(name: str, body: dict[str, object]) -> str:
    body_bytes = json.dumps(body, separators=(",", ":")).encode()
    key = KEYRING_KEYS[int(str(body["key_version"]))]
    tag = seal(key, f"tag of {name}", b"", aad("minikms/keyring/v1", body_bytes))
    return '{"body":' + body_bytes.decode() + ',"tag":"' + b64(tag) + '"}\n'


# --- keys and records ---------------------------------------------------------------------------------------------


def key_index() -> bytes:
    """Of two keys in two threads, after a stop of the first keyring."""
    ids = sorted(secret(f"indexed key {count}")[:16] for count in (1, 2))
    threads, states, hash_key = ("thread-a", "thread-b"), ("active", "retired"), secret("hash key")[:16]
    tags = [
        hashlib.blake2b(f"{thread} data {state}".encode(), digest_size=8, key=hash_key).digest()
        for thread, state in zip(threads, states, strict=True)
    ]
    eights = [key[:8] for key in ids] + [key[8:] for key in ids] + tags
    columns = struct.pack("<6Q2I2B", *(int.from_bytes(eight, "big") for eight in eights), 1, 2, 0, 1)
    columns += b"".join(sorted(tag + key for tag, key in zip(tags, ids, strict=True))) + "\n".join(threads).encode()
    header = b"minikms-index 1 little\0\0" + b"".join(map(number, (7, 1_790_000_000_000_000_000, 2, 17)))
    header += hash_key + hashlib.sha256(columns).digest()
    tag = seal(KEYRING_KEYS[1], "tag of the index", b"", aad("minikms/key-index/v1", KEYRING_ID.encode(), header))
    return header + tag + columns


def dek_aad(kek_version: int) -> bytes:
    return aad("minikms/dek/v1", KEY_ID.encode(), THREAD_ID.encode(), b"thread", b"XAES-256-GCM", number(kek_version))


DEK_FILE_BYTES = 1024


def dek_record(kek_version: int) -> dict[str, object]:
    return {
        "id": KEY_ID,
        "created_at": MADE,
        "wrapped": b64(seal(KEKS[kek_version], f"DEK under {kek_version}", DEK, dek_aad(kek_version))),
        "thread_id": THREAD_ID,
        "format": 1,
        "version": kek_version,
        "kek_version": kek_version,
        "purpose": "thread",
        "algorithm": "XAES-256-GCM",
        "state": "active",
        "replaces": OLDER_KEY_ID,
    }


def numbered_dek_file() -> str:
    """A key with the number 3 in its thread, under KEK 1."""
    fields = (KEY_ID.encode(), THREAD_ID.encode(), b"derived", b"XAES-256-GCM", number(3), number(1))
    wrapped = b64(seal(KEKS[1], "numbered DEK", DEK, aad("minikms/dek/v2", *fields)))
    return padded(dek_record(1) | {"wrapped": wrapped, "purpose": "derived", "number": 3})


def dek_file(kek_version: int) -> str:
    return padded(dek_record(kek_version))


def retired_dek_file() -> str:
    """The file under KEK 2, after the key was retired."""
    last = {"version": 3, "state": "retired", "retired_at": ROTATED}
    record = dek_record(2) | last
    record["replaces"] = record.pop("replaces")
    return padded(record)


def journal() -> bytes:
    """The create of a key under KEK 1, behind the record of a destroyed key, and the rewrap of the key."""
    magic = b"minikms-journal\x01"
    first, second = dek_file(1).encode(), dek_file(2).encode()
    bodies = [key_id_bytes() + old + new for old, new in ((b"\xff" * DEK_FILE_BYTES, first), (first, second))]
    blank = bytes(16 + 2 * DEK_FILE_BYTES + 32)
    return magic + blank + b"".join(body + hashlib.sha256(magic + body).digest() for body in bodies)


def key_id_bytes() -> bytes:
    digits = "0123456789abcdefghjkmnpqrstvwxyz"
    value = 0
    for character in KEY_ID[2:]:
        value = value * 32 + digits.index(character)
    return value.to_bytes(16, "big")


def padded(record: dict[str, object]) -> str:
    return json.dumps(record, separators=(",", ":")).ljust(DEK_FILE_BYTES - 1) + "\n"


def record_aad(caller_aad: bytes) -> bytes:
    return aad("minikms/record/v1", number(1), KEY_ID.encode(), THREAD_ID.encode(), caller_aad)


def record(name: str, plaintext: bytes, caller_aad: bytes) -> dict[str, object]:
    return {
        "plaintext": plaintext.hex(),
        "aad": caller_aad.hex(),
        "associated_data": record_aad(caller_aad).hex(),
        "sealed": seal(DEK, f"record {name}", plaintext, record_aad(caller_aad)).hex(),
    }


# --- the unlock service: docs/spec/unlock.md --------------------------------------------------------------------------

UNLOCK_SOURCE = "aws-kms:arn:aws:kms:eu-central-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"


def unlock() -> dict[str, object]:
    wrapped = bytes(range(100))
    root_json = {"format": "minikms-unlock", "version": 1, "source": UNLOCK_SOURCE, "keyring_id": KEYRING_ID}
    return {
        "source": UNLOCK_SOURCE,
        "keyring_id": KEYRING_ID,
        "wrapped": wrapped.hex(),
        "root_json": json.dumps({**root_json, "wrapped": b64(wrapped)}, separators=(",", ":")) + "\n",
        "configuration": f'version = 1\nsource = "{UNLOCK_SOURCE}"\nuser = "minikms"\n'
        'pin = "/etc/progressdb/minikms.pin"\ndirectory = "/var/lib/progressdb/unlock"\n',
        "questions": {purpose: f"minikms-unlock/1 {purpose} {KEYRING_ID}\n" for purpose in ("start", "renew")},
        "answers": {"key": (b"K" + ROOT).hex(), "refused": b"Rdenied".hex(), "away": b"Aaway".hex()},
    }


# --- all of it ----------------------------------------------------------------------------------------------------


def vectors() -> str:
    made: dict[str, Any] = {
        "about": "docs/spec/formats.md; keys and nonces are SHA-256 of a sentence, see make_formats.py",
        "roots": [
            {
                "key": root.hex(),
                "fingerprint": fingerprint(root),
                "slot_id": slot_id,
                "commitment": commitment(root, slot_id).hex(),
            }
            for root, slot_id in ((ROOT, "s1"), (NEW_ROOT, "s7"))
        ],
        "slot_keys": [
            {
                "root": root.hex(),
                "slot_id": slot_id,
                "kem_seed": seeds(root, slot_id).hex(),
                "public_key": slot_public_key(root, slot_id).hex(),
                "auth_key": auth_key(root, slot_id).hex(),
            }
            for root, slot_id in ((ROOT, "s1"), (NEW_ROOT, "s7"))
        ],
        "keks": {str(version): key.hex() for version, key in KEKS.items()},
        "audit_key": AUDIT_KEY.hex(),
        "audit_seed": AUDIT_SEED.hex(),
        "keyrings": [
            {"name": name, "opens_under": [root.hex() for root in roots], "file": keyring_file(name, body)}
            for name, body, roots in (
                ("first", first_body(), (ROOT,)),
                ("three root keys", three_roots_body(), (ROOT, SHARED_ROOT, NEW_ROOT)),
            )
        ],
        "tombstones": {"key": TOMBSTONE_KEY.hex(), "counted": 2, "file": tombstone_file().hex()},
        "key_index": {"epoch": 7, "changed_ns": 1_790_000_000_000_000_000, "file": key_index().hex()},
        "dek": {
            "key_id": KEY_ID,
            "key": DEK.hex(),
            "associated_data": [dek_aad(version).hex() for version in (1, 2)],
            "files": [dek_file(version) for version in (1, 2)],
            "numbered_file": numbered_dek_file(),
            "retired_at": ROTATED,
            "retired_file": retired_dek_file(),
            "journal": journal().hex(),
        },
        "records": [
            record("empty", b"", b""),
            record("short", b"hello", b""),
            record("bound", b"hello", b"message-1"),
            record("long", bytes(range(256)) * 4, bytes(range(256))),
        ],
        "unlock": unlock(),
    }
    check(made)
    return json.dumps(made, indent=1) + "\n"


def check(made: dict[str, Any]) -> None:
    """Reads the answers back. Raises if one does not open, which is a defect of the script."""
    for keyring in made["keyrings"]:
        file = json.loads(keyring["file"])
        body, tag = file["body"], base64.b64decode(file["tag"])
        body_bytes = keyring["file"][len('{"body":') : keyring["file"].rindex(',"tag":"')].encode()
        for text in keyring["opens_under"]:
            root = bytes.fromhex(text)
            [found] = [one for one in body["slots"] if one["fingerprint"] == fingerprint(root)]
            if base64.b64decode(found["commitment"]) != commitment(root, found["slot_id"]):
                raise ValueError("a commitment")
            key = check_sealed_slot(root, found, body["key_version"])
            opened(key, tag, aad("minikms/keyring/v1", body_bytes))
            for one in body["keks"]:
                data = numbered_aad("minikms/kek/v1", one["version"])
                if opened(key, base64.b64decode(one["wrapped"]), data) != KEKS[one["version"]]:
                    raise ValueError("a KEK")
    for version, text in zip((1, 2), made["dek"]["files"], strict=True):
        if opened(KEKS[version], base64.b64decode(json.loads(text)["wrapped"]), dek_aad(version)) != DEK:
            raise ValueError("a DEK")
    for one in made["records"]:
        data = bytes.fromhex(one["associated_data"])
        if opened(DEK, bytes.fromhex(one["sealed"]), data) != bytes.fromhex(one["plaintext"]):
            raise ValueError("a record")


def check_sealed_slot(root: bytes, found: dict[str, Any], key_number: int) -> bytes:
    """The keyring key in a slot."""
    slot_id, sealed = found["slot_id"], base64.b64decode(found["sealed"])
    if base64.b64decode(found["mac"]) != slot_mac(root, slot_id, key_number, sealed):
        raise ValueError("the MAC of a slot")
    key = hpke_open(seeds(root, slot_id), sealed, slot_info(root, slot_id, key_number))
    if opened(key, base64.b64decode(found["wrapped_auth"]), auth_aad(slot_id)) != auth_key(root, slot_id):
        raise ValueError("an authentication key")
    return key


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(FILE.read_text(encoding="ascii") != vectors())
    FILE.write_text(vectors(), encoding="ascii")
