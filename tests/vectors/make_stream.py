"""Makes the known answers of docs/spec/stream.md from that page alone: it imports nothing of the program.

`make_stream.py` writes stream.json beside itself; `make_stream.py --check` exits 1 if the file there differs.
"""

import hashlib
import json
import sys
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FILE = Path(__file__).with_name("stream.json")
KEY = bytes(range(32))
KEY_ID = b"k_01aryz6s41000g40r40m30e209"
WRAPPED = bytes(range(100, 160))
CHUNK = 65536
SIZES = (0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7)


def plaintext(size: int) -> bytes:
    """Byte i is the low byte of i + i / 256, so that no two chunks are equal."""
    return bytes((i + (i >> 8)) & 0xFF for i in range(size))


def stream(text: bytes) -> bytes:
    header = b"minikms-stream\0\1" + KEY_ID + len(WRAPPED).to_bytes(2, "big") + WRAPPED
    aad = b"minikms/stream/v1\0" + len(header).to_bytes(4, "big") + header
    count = max(1, (len(text) + CHUNK - 1) // CHUNK)
    sealed = header
    for number in range(count):
        nonce = number.to_bytes(11, "big") + (b"\1" if number == count - 1 else b"\0")
        sealed += AESGCM(KEY).encrypt(nonce, text[number * CHUNK : (number + 1) * CHUNK], aad)
    return sealed


def vector(size: int) -> dict[str, object]:
    sealed = stream(plaintext(size))
    found: dict[str, object] = {
        "plaintext_bytes": size,
        "bytes": len(sealed),
        "sha256": hashlib.sha256(sealed).hexdigest(),
    }
    if len(sealed) < 1000:
        found["sealed"] = sealed.hex()
    return found


def vectors() -> str:
    about = "docs/spec/stream.md; byte i of a plaintext is the low byte of i + i / 256"
    made = {
        "about": about,
        "key": KEY.hex(),
        "key_id": KEY_ID.decode(),
        "wrapped_key": WRAPPED.hex(),
        "streams": [vector(size) for size in SIZES],
    }
    return json.dumps(made, indent=1) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(FILE.read_text(encoding="ascii") != vectors())
    FILE.write_text(vectors(), encoding="ascii")
