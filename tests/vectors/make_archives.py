"""Makes the known answers of docs/spec/backup.md from that page alone: it imports nothing of the program.

`make_archives.py` writes archives.json beside itself; `make_archives.py --check` exits 1 if the file there differs.
"""

import hashlib
import hmac
import json
import sys
from pathlib import Path

FILE = Path(__file__).with_name("archives.json")
KEYRING_ID = "kr_00112233445566ff"
SLOTS = (("s1", bytes(range(32))), ("s5", bytes(range(100, 132))))
ENTRIES = (("keyring.json", b"{}"),)


def sized(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def hmac256(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).digest()


def fingerprint(root: bytes) -> bytes:
    return hmac256(root, b"minikms/root-fingerprint/v1\0")[:8]


def authentication_key(root: bytes, slot_id: str) -> bytes:
    info = b"minikms/slot-auth/v2\0" + sized(KEYRING_ID.encode()) + sized(slot_id.encode())
    return hmac256(root, info + b"\x01")


def manifest() -> bytes:
    content = {
        "archive_id": "a_0123456789abcdef",
        "created_at": "2026-11-24T15:00:00Z",
        "keyring_id": KEYRING_ID,
        "epoch": 3,
        "root_fingerprint": fingerprint(SLOTS[0][1]).hex(),
        "keys": 0,
        "newest_key_id": "",
        "audit_head": None,
        "unreadable": [],
    }
    return json.dumps(content, separators=(",", ":")).encode()


def archive() -> bytes:
    data = b"minikms-backup\0\x04"
    for name, content in (*ENTRIES, ("manifest.json", manifest())):
        data += len(name).to_bytes(2, "big") + name.encode() + len(content).to_bytes(8, "big") + content
    data += bytes(2)
    data += bytes([len(KEYRING_ID)]) + KEYRING_ID.encode() + bytes([len(SLOTS)])
    for slot_id, root in SLOTS:
        data += bytes([len(slot_id)]) + slot_id.encode() + fingerprint(root)
    digest = hashlib.sha256(data).digest()
    for slot_id, root in SLOTS:
        message = b"minikms/archive-slot/v1\0" + sized(slot_id.encode()) + sized(digest)
        data += hmac256(authentication_key(root, slot_id), message)
    return data


def vectors() -> str:
    made = {
        "about": "docs/spec/backup.md; the tag only: the keyring in these archives is no keyring",
        "roots": {slot_id: root.hex() for slot_id, root in SLOTS},
        "entries": {name: content.hex() for name, content in ENTRIES},
        "archive": archive().hex(),
    }
    return json.dumps(made, indent=1) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(FILE.read_text(encoding="ascii") != vectors())
    FILE.write_text(vectors(), encoding="ascii")
