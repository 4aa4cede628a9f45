"""Makes the known answers of docs/spec/shares.md from that page alone: it imports nothing of the program.

`make_shares.py` writes shares.json beside itself; `make_shares.py --check` exits 1 if the file there differs.
"""

import hashlib
import hmac
import json
import sys
from pathlib import Path

FILE = Path(__file__).with_name("shares.json")
ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
SETS = ((2, 2), (2, 3), (3, 5), (5, 5), (16, 16))


def random_bytes(name: str) -> bytes:
    return hashlib.sha256(f"share vector {name}".encode()).digest()


def times_x(value: int) -> int:
    doubled = value << 1
    return doubled ^ 0x11B if doubled > 255 else doubled


EXP = [1]
while len(EXP) < 255:
    EXP.append(EXP[-1] ^ times_x(EXP[-1]))  # powers of 3, which generates the field
LOG = {value: power for power, value in enumerate(EXP)}


def times(one: int, other: int) -> int:
    return EXP[(LOG[one] + LOG[other]) % 255] if one and other else 0


def share(secret: bytes, coefficients: list[bytes], x: int) -> bytes:
    values = []
    for index, byte in enumerate(secret):
        value, power = byte, 1
        for coefficient in coefficients:
            power = times(power, x)
            value ^= times(coefficient[index], power)
        values.append(value)
    return bytes(values)


def mac(one: bytes, label: str, head: bytes) -> bytes:
    message = label.encode() + b"\0" + len(head).to_bytes(4, "big") + head
    return hmac.new(one, message, hashlib.sha256).digest()


def text(payload: bytes) -> str:
    bits = "".join(f"{byte:08b}" for byte in payload) + "000"
    symbols = "".join(ALPHABET[int(bits[start : start + 5], 2)] for start in range(0, len(bits), 5))
    return "-".join(["mks1", *(symbols[start : start + 5] for start in range(0, len(symbols), 5))])


def vector(threshold: int, count: int) -> dict[str, object]:
    name = f"{threshold}/{count}"
    secret = random_bytes(f"{name} root")
    coefficients = [random_bytes(f"{name} coefficient {power}") for power in range(1, threshold)]
    keyring, set_id = random_bytes(f"{name} keyring")[:8], random_bytes(f"{name} set")[:8]
    made = []
    for number in range(1, count + 1):
        one = share(secret, coefficients, number)
        head = bytes([1]) + keyring + set_id + bytes([number, threshold])
        checksum = mac(one, "minikms/share-checksum/v1", head)[:8]
        made.append(
            {
                "number": number,
                "share": one.hex(),
                "digest": mac(one, "minikms/share-digest/v1", head).hex(),
                "text": text(head + one + checksum),
            }
        )
    return {
        "root": secret.hex(),
        "coefficients": [coefficient.hex() for coefficient in coefficients],
        "keyring_id": "kr_" + keyring.hex(),
        "set_id": set_id.hex(),
        "threshold": threshold,
        "shares": made,
    }


def vectors() -> str:
    made = {
        "about": "docs/spec/shares.md; coefficient n belongs to x^n",
        "products": [[0x57, 0x83, 0xC1], [0x57, 0x13, 0xFE], [0x53, 0xCA, 0x01]],
        "sets": [vector(threshold, count) for threshold, count in SETS],
    }
    return json.dumps(made, indent=1) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(FILE.read_text(encoding="ascii") != vectors())
    FILE.write_text(vectors(), encoding="ascii")
