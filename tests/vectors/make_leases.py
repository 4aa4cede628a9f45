"""Makes the known answers of docs/spec/leases.md from that page alone: it imports nothing of the program.

`make_leases.py` writes leases.json beside itself; `make_leases.py --check` exits 1 if the file there differs.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path

LEASE = 1 << 16
FILE = Path(__file__).with_name("leases.json")


def key(number: int) -> bytes:
    return hashlib.sha256(b"lease vector key %d" % number).digest()[:16]


def checked(label: bytes, body: bytes, size: int) -> bytes:
    return body + hashlib.sha256(label + b"\0" + body).digest()[:size]


def header(version: int = 2) -> bytes:
    return checked(b"minikms lease journal v1", b"minikms-leases\0j" + struct.pack(">II", version, 0), 8)


def record(one: bytes, count: int) -> bytes:
    return checked(b"minikms lease record v1", one + struct.pack(">Q", count), 8)


def snapshot(
    counts: dict[bytes, int],
    steps: list[tuple[bytes, int]],
    spent: list[tuple[bytes, bytes]],
    exhausted: bytes = bytes(16),
    version: int = 2,
) -> bytes:
    entries = [one + struct.pack(">Q", counts[one]) for one in sorted(counts)]
    blocks = []
    index = b""
    for number, start in enumerate(range(0, len(entries), 170)):
        data = b"".join(entries[start : start + 170])
        index += data[:16]
        data += bytes(4080 - len(data))
        digest = hashlib.sha256(b"minikms lease block v1\0" + struct.pack(">I", number) + data).digest()
        blocks.append(data + digest[:16])
    footer = b"minikms-leases\0s" + struct.pack(">IIQII", version, len(blocks), len(entries), len(steps), len(spent))
    footer += hashlib.sha256(index).digest()
    if version == 2:
        footer += exhausted
    footer += b"".join(one + struct.pack(">Q", uses) for one, uses in steps)
    footer += b"".join(first + last for first, last in spent)
    footer = checked(b"minikms lease footer v1", footer + bytes(4080 - len(footer)), 16)
    return b"".join(blocks) + index + footer


def journal_vector(name: str, content: bytes, counts: dict[bytes, int], lost: int) -> dict[str, object]:
    return {
        "name": name,
        "content": content.hex(),
        "counts": {one.hex(): count for one, count in counts.items()},
        "lost_leases": lost,
    }


def journals() -> list[dict[str, object]]:
    a, b = key(1), key(2)
    records = [record(a, 2 * LEASE), record(b, 2 * LEASE), record(a, 3 * LEASE)]
    whole = header() + b"".join(records)
    damaged = header() + records[0] + records[1][:20] + b"\xff" + records[1][21:] + records[2]
    return [
        journal_vector("empty", header(), {}, 0),
        journal_vector("three records", whole, {a: 3 * LEASE, b: 2 * LEASE}, 0),
        journal_vector("torn", whole[:-5], {a: 2 * LEASE, b: 2 * LEASE}, 1),
        journal_vector("zeros at the end", whole + bytes(64), {a: 3 * LEASE, b: 2 * LEASE}, 1),
        journal_vector("a damaged record", damaged, {a: 3 * LEASE}, 1),
        journal_vector("small leases", header() + record(a, LEASE + 64) + record(a, LEASE + 320), {a: LEASE + 320}, 0),
        journal_vector("version 1", header(1) + b"".join(records), {a: 3 * LEASE, b: 2 * LEASE}, 0),
    ]


def snapshots() -> list[dict[str, object]]:
    counts = {key(number): (number + 2) * LEASE for number in range(400)}
    middle = sorted(counts)[200]
    steps = [(middle, 3 << 30), (b"\xff" * 16, 1 << 30)]
    spent = [(bytes(16), key(1000))]
    used = {
        "steps": [[one.hex(), uses] for one, uses in steps],
        "spent": [[first.hex(), last.hex()] for first, last in spent],
    }
    none: dict[str, object] = {"steps": [], "spent": [], "exhausted": ""}
    exhausted = key(2000)
    return [
        snapshot_vector("empty", snapshot({}, [], []), 0, none),
        snapshot_vector(
            "400 keys, steps, a spent range and exhausted keys",
            snapshot(counts, steps, spent, exhausted),
            400,
            {**used, "exhausted": exhausted.hex()},
        ),
        snapshot_vector("version 1", snapshot(counts, steps, spent, version=1), 400, {**used, "exhausted": ""}),
    ]


def snapshot_vector(name: str, content: bytes, keys: int, floors: dict[str, object]) -> dict[str, object]:
    return {
        "name": name,
        "keys": keys,
        **floors,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "footer": content[-4096:].rstrip(b"\0").hex() if keys == 0 else content[-4096:][:200].hex(),
        "tail": content[-4096 - 3 * 16 :].hex() if keys else content.hex(),
    }


def vectors() -> str:
    return (
        json.dumps(
            {
                "about": "docs/spec/leases.md; key n is the first 16 bytes of SHA-256('lease vector key n'), and its "
                "count in a snapshot (n + 2) leases",
                "journals": journals(),
                "snapshots": snapshots(),
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(FILE.read_text(encoding="ascii") != vectors())
    FILE.write_text(vectors(), encoding="ascii")
