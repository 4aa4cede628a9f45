"""Makes the known answers of docs/spec/formats.md from that page alone: it imports nothing of the program.

`make_formats.py` writes formats.json beside itself; `make_formats.py --check` exits 1 if the file there differs. Before
it writes, it reads its own answers back as a reader of that page would, and fails if they do not open.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FILE = Path(__file__).with_name("formats.json")

KEYRING_ID = "kr_00112233445566ff"
MADE, ROTATED = "2026-11-24T15:00:00Z", "2026-11-25T16:30:00Z"
KEY_ID, THREAD_ID, OLDER_KEY_ID = "k_01jdfm0z4841040g20820g4104", "thread-1", "k_01jdfm0z4841040g20820g4100"


def secret(name: str) -> bytes:
    """A fixed key: SHA-256 of its name."""
    return hashlib.sha256(f"minikms format vector: {name}".encode()).digest()


def nonce(name: str) -> bytes:
    """A fixed nonce, which no two sealings share."""
    return hashlib.sha256(f"minikms format vector nonce: {name}".encode()).digest()[:12]


ROOT, NEW_ROOT = secret("root key"), secret("new root key")
KEYRING_KEYS = {1: secret("keyring key 1"), 2: secret("keyring key 2")}
KEKS = {1: secret("KEK 1"), 2: secret("KEK 2")}
AUDIT_KEY, AUDIT_SEED = secret("audit key 1"), secret("checkpoint seed 1")
DEK = secret("DEK")


def aad(label: str, *fields: bytes) -> bytes:
    return label.encode() + b"\0" + b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def seal(key: bytes, name: str, plaintext: bytes, data: bytes) -> bytes:
    return nonce(name) + AESGCM(key).encrypt(nonce(name), plaintext, data)


def opened(key: bytes, sealed: bytes, data: bytes) -> bytes:
    return AESGCM(key).decrypt(sealed[:12], sealed[12:], data)


def b64(value: bytes) -> str:
    return base64.b64encode(value).decode()


# --- root keys ----------------------------------------------------------------------------------------------------


def fingerprint(root: bytes) -> str:
    return hmac.new(root, b"minikms/root-fingerprint/v1\0", hashlib.sha256).digest()[:8].hex()


def commitment(root: bytes, slot_id: str) -> bytes:
    return hmac.new(root, aad("minikms/root-commitment/v1", slot_id.encode()) + b"\x01", hashlib.sha256).digest()


def slot_aad(root: bytes, slot_id: str, opens: int) -> bytes:
    return aad("minikms/slot/v1", KEYRING_ID.encode(), slot_id.encode(), fingerprint(root).encode(), number(opens))


def slot(root: bytes, slot_id: str, provider: str, created_at: str, opens: int) -> dict[str, object]:
    return {
        "slot_id": slot_id,
        "fingerprint": fingerprint(root),
        "provider": provider,
        "created_at": created_at,
        "commitment": b64(commitment(root, slot_id)),
        "opens": opens,
        "wrapped": b64(seal(root, f"slot {slot_id}", KEYRING_KEYS[opens], slot_aad(root, slot_id, opens))),
    }


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
        "wraps_reserved": 65536,
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
        "version": 1,
        "keyring_id": KEYRING_ID,
        "epoch": 1,
        "created_at": MADE,
        "updated_at": MADE,
        "key_version": 1,
        "slots": [slot(ROOT, "s1", "file", MADE, 1)],
        "keks": [kek(1, "active", 1, MADE)],
        "audit_keys": [audit_key(1)],
    }


def rotating_body() -> dict[str, object]:
    """In the middle of a rotation to a new root key: both open it, and it knows both KEKs."""
    link = seal(KEYRING_KEYS[1], "link 2", KEYRING_KEYS[2], numbered_aad("minikms/keyring-key/v1", 2))
    return first_body() | {
        "epoch": 7,
        "updated_at": ROTATED,
        "key_version": 2,
        "slots": [slot(ROOT, "s1", "file", MADE, 1), slot(NEW_ROOT, "s7", "request", ROTATED, 2)],
        "keks": [kek(1, "active", 2, MADE), kek(2, "pending", 2, ROTATED)],
        "audit_keys": [audit_key(2)],
        "links": [{"version": 2, "wrapped": b64(link)}],
        "rotation": {
            "from_version": 1,
            "to_version": 2,
            "started_at": ROTATED,
            "stamp": "20261125T163000",
            "slot_id": "s7",
        },
        "tombstones": [{"key_id": OLDER_KEY_ID, "destroyed_at": ROTATED}],
    }


def keyring_file(name: str, body: dict[str, object]) -> str:
    body_bytes = json.dumps(body, separators=(",", ":")).encode()
    key = KEYRING_KEYS[int(str(body["key_version"]))]
    tag = seal(key, f"tag of {name}", b"", aad("minikms/keyring/v1", body_bytes))
    return '{"body":' + body_bytes.decode() + ',"tag":"' + b64(tag) + '"}\n'


# --- keys and records ---------------------------------------------------------------------------------------------


def dek_aad(kek_version: int) -> bytes:
    return aad("minikms/dek/v1", KEY_ID.encode(), THREAD_ID.encode(), b"thread", b"AES-256-GCM", number(kek_version))


def dek_file(kek_version: int) -> str:
    record = {
        "id": KEY_ID,
        "created_at": MADE,
        "wrapped": b64(seal(KEKS[kek_version], f"DEK under {kek_version}", DEK, dek_aad(kek_version))),
        "thread_id": THREAD_ID,
        "format": 1,
        "version": kek_version,
        "kek_version": kek_version,
        "purpose": "thread",
        "algorithm": "AES-256-GCM",
        "state": "active",
        "replaces": OLDER_KEY_ID,
    }
    return json.dumps(record, separators=(",", ":")) + "\n"


def record_aad(caller_aad: bytes) -> bytes:
    return aad("minikms/record/v1", number(1), KEY_ID.encode(), THREAD_ID.encode(), caller_aad)


def record(name: str, plaintext: bytes, caller_aad: bytes) -> dict[str, object]:
    return {
        "plaintext": plaintext.hex(),
        "aad": caller_aad.hex(),
        "associated_data": record_aad(caller_aad).hex(),
        "sealed": seal(DEK, f"record {name}", plaintext, record_aad(caller_aad)).hex(),
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
        "keks": {str(version): key.hex() for version, key in KEKS.items()},
        "audit_key": AUDIT_KEY.hex(),
        "audit_seed": AUDIT_SEED.hex(),
        "keyrings": [
            {"name": name, "opens_under": [root.hex() for root in roots], "file": keyring_file(name, body)}
            for name, body, roots in (
                ("first", first_body(), (ROOT,)),
                ("rotating", rotating_body(), (ROOT, NEW_ROOT)),
            )
        ],
        "dek": {
            "key_id": KEY_ID,
            "key": DEK.hex(),
            "associated_data": [dek_aad(version).hex() for version in (1, 2)],
            "files": [dek_file(version) for version in (1, 2)],
        },
        "records": [
            record("empty", b"", b""),
            record("short", b"hello", b""),
            record("bound", b"hello", b"message-1"),
            record("long", bytes(range(256)) * 4, bytes(range(256))),
        ],
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
            data = slot_aad(root, found["slot_id"], found["opens"])
            key = opened(root, base64.b64decode(found["wrapped"]), data)
            for link in body.get("links", []):
                if link["version"] > found["opens"]:
                    data = numbered_aad("minikms/keyring-key/v1", link["version"])
                    key = opened(key, base64.b64decode(link["wrapped"]), data)
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


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(FILE.read_text(encoding="ascii") != vectors())
    FILE.write_text(vectors(), encoding="ascii")
