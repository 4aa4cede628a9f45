"""Makes the known answers of docs/spec/tree.md, and verifies trees, from that page and the texts that it links alone.

It imports nothing of the program.

`make_tree.py` writes tree.json beside itself; `make_tree.py --check` exits 1 if the file there differs.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FILE = Path(__file__).with_name("tree.json")
ORIGIN = "example.org/minikms"
SIZES = (1, 2, 3, 7, 8, 255, 256, 257, 600, 65_537)
PATHS = ((0, 0, 256), (0, 999, 256), (1, 1000, 7), (0, 1_234_067, 256))  # the last is the example of tlog-tiles
TIME = 1_700_000_000
ED25519, ECDSA, COSIGNATURE = 0x01, 0x02, 0x04
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


class Fault(Exception):
    """Why a tree, a note or a line is not believed."""


def need(condition: object, text: str) -> None:
    if not condition:
        raise Fault(text)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def unbase64(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    need(text_of(data) == text, "base64 that is not canonical")
    return data


# Leaves, roots and proofs: RFC 6962, section 2.1


def leaf_of(line: bytes) -> bytes:
    return sha256(b"\0" + sha256(line))


def node_of(left: bytes, right: bytes) -> bytes:
    return sha256(b"\1" + left + right)


def split(size: int) -> int:
    """The largest power of two below `size`, which is 2 or more."""
    return 1 << (size - 1).bit_length() - 1


def root_of(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) < 2:
        return leaves[0] if leaves else sha256(b"")
    left = split(len(leaves))
    return node_of(root_of(leaves[:left]), root_of(leaves[left:]))


def inclusion(leaves: Sequence[bytes], index: int) -> list[bytes]:
    if len(leaves) == 1:
        return []
    left = split(len(leaves))
    if index < left:
        return [*inclusion(leaves[:left], index), root_of(leaves[left:])]
    return [*inclusion(leaves[left:], index - left), root_of(leaves[:left])]


def consistency(leaves: Sequence[bytes], old: int, whole: bool = True) -> list[bytes]:
    if old == len(leaves):
        return [] if whole else [root_of(leaves)]
    left = split(len(leaves))
    if old <= left:
        return [*consistency(leaves[:left], old, whole), root_of(leaves[left:])]
    return [*consistency(leaves[left:], old - left, False), root_of(leaves[:left])]


def root_by_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> bytes:
    need(0 <= index < size, "an index that the tree does not have")
    if size == 1:
        need(not proof, "a proof that is too long")
        return leaf
    need(proof, "a proof that is too short")
    left = split(size)
    if index < left:
        return node_of(root_by_inclusion(leaf, index, left, proof[:-1]), proof[-1])
    return node_of(proof[-1], root_by_inclusion(leaf, index - left, size - left, proof[:-1]))


# Tiles: tlog-tiles


def tile_path(level: int, number: int, width: int) -> str:
    digits = str(number).rjust(-(-len(str(number)) // 3) * 3, "0")
    groups = [digits[start : start + 3] for start in range(0, len(digits), 3)]
    name = "/".join([*("x" + group for group in groups[:-1]), groups[-1]])
    return f"tile/{level}/{name}" + (f".p/{width}" if width < 256 else "")


def tiles_of(leaves: Sequence[bytes]) -> dict[str, bytes]:
    made, level, row = {}, 0, list(leaves)
    while row:
        for number, start in enumerate(range(0, len(row), 256)):
            tile = row[start : start + 256]
            made[tile_path(level, number, len(tile))] = b"".join(tile)
        full = len(row) // 256
        level, row = level + 1, [root_of(row[start * 256 : start * 256 + 256]) for start in range(full)]
    return made


def leaves_of(tree: Path, size: int) -> list[bytes]:
    """The tiles of level 0. A partial tile may have been removed for the full one."""
    leaves: list[bytes] = []
    for number in range(-(-size // 256)):
        width = min(256, size - 256 * number)
        tile = tree / tile_path(0, number, width)
        data = (tile if tile.exists() else tree / tile_path(0, number, 256)).read_bytes()[: 32 * width]
        need(len(data) == 32 * width, "a tile that is too short")
        leaves += (data[start : start + 32] for start in range(0, len(data), 32))
    return leaves


# Notes: signed-note, tlog-checkpoint, tlog-cosignature


@dataclass(frozen=True)
class Verifier:
    name: str
    key_id: bytes
    type: int
    public: bytes

    @classmethod
    def parse(cls, text: str) -> Verifier:
        name, key_id, key = text.split("+", 2)
        data = unbase64(key)
        verifier = cls(name, bytes.fromhex(key_id), data[0], data[1:])
        need(verifier.key_id == key_id_of(name, verifier.type, verifier.public), "a key id of another key")
        return verifier

    def time_of(self, text: bytes, signature: bytes) -> int:
        """The time of a cosignature; 0 of another signature."""
        time = 0
        try:
            if self.type == ECDSA:
                public = serialization.load_der_public_key(self.public)
                assert isinstance(public, ec.EllipticCurvePublicKey)
                public.verify(signature, text, ec.ECDSA(hashes.SHA256()))
                return 0
            if self.type == COSIGNATURE:
                time, signature = int.from_bytes(signature[:8], "big"), signature[8:]
                text = cosigned(time, text)
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text)
        except InvalidSignature:
            raise Fault("a signature that is not valid") from None
        return time


def key_id_of(name: str, kind: int, public: bytes) -> bytes:
    return sha256(public if kind == ECDSA else name.encode() + b"\n" + bytes([kind]) + public)[:4]


def cosigned(time: int, text: bytes) -> bytes:
    return f"cosignature/v1\ntime {time}\n".encode() + text


def vkey_of(name: str, kind: int, public: bytes) -> str:
    return f"{name}+{key_id_of(name, kind, public).hex()}+{text_of(bytes([kind]) + public)}"


def signature_line(vkey: str, signature: bytes) -> bytes:
    key = Verifier.parse(vkey)
    return f"— {key.name} {text_of(key.key_id + signature)}\n".encode()


def opened(note: bytes, keys: Sequence[Verifier]) -> tuple[bytes, dict[Verifier, int]]:
    """The text of a note, and who signed it when."""
    need(len(note) <= 128 * 1024, "a note that is too long")
    text, gap, lines = note.rpartition(b"\n\n")
    need(gap and lines.endswith(b"\n"), "no note")
    text += b"\n"
    rows = lines.decode("utf-8").removesuffix("\n").split("\n")
    need(len(rows) <= 64, "too many signatures")
    signed: dict[Verifier, int] = {}
    for row in rows:
        matched = re.fullmatch(r"— ([^ +]+) ([A-Za-z0-9+/=]+)", row)
        if matched is None:
            raise Fault("a line that is no signature")
        data = unbase64(matched[2])
        for key in keys:
            if (key.name, key.key_id) == (matched[1], data[:4]) and key not in signed:
                signed[key] = key.time_of(text, data[4:])
    return text, signed


@dataclass(frozen=True)
class Tree:
    origin: str
    size: int
    root: bytes
    newest_at: int | None
    """When the tree checkpoint was certainly the newest one; None without witnesses."""


def believed(note: bytes, log_keys: Sequence[str], witnesses: Sequence[str], quorum: int) -> Tree:
    """Points 1 to 3 of the page, without the maximum age."""
    log, others = [Verifier.parse(key) for key in log_keys], [Verifier.parse(key) for key in witnesses]
    need(len({key.public for key in log + others}) == len(log) + len(others), "a public key twice")
    need(log and all(key.type != COSIGNATURE for key in log), "no key of the log")
    need(all(key.type == COSIGNATURE for key in others), "a key that is not of a witness")
    text, signed = opened(note, log + others)
    rows = text.decode("utf-8").removesuffix("\n").split("\n")
    need(3 <= len(rows) <= 19, "not the lines of a tree checkpoint")
    need(re.fullmatch(r"[A-Za-z0-9._/:-]{1,128}", rows[0]), "no origin")
    need(re.fullmatch(r"0|[1-9][0-9]*", rows[1]), "no size")
    root = unbase64(rows[2])
    need(len(root) == 32, "no root")
    need(all(key.name == rows[0] and key in signed for key in log), "not signed by the log")
    times = sorted((signed[key] for key in others if key in signed), reverse=True)
    need(len(times) >= quorum, "no quorum")
    return Tree(rows[0], int(rows[1]), root, times[quorum - 1] if quorum else None)


# Lines: points 4 and 5, and exported lines


def verify_lines(tree: Tree, lines: Sequence[bytes], tiles: Path | None = None) -> None:
    """Points 4 and 5 for the lines of a log, which are all of the tree unless `tiles` are given."""
    begins, leaves, end = 0, [leaf_of(line) for line in lines], tree.size
    if tiles is not None:
        event = json.loads(lines[0])["event"]  # `genesis` or `segment_open`, which names the log
        logs = json.loads((tiles / "logs.json").read_bytes())
        places = [number for number, log in enumerate(logs) if log["log_id"] == event["facts"]["log_id"]]
        need(places, "the log was begun anew")
        log, after = logs[places[0]], logs[places[0] + 1 :]
        begins = log["first_leaf"] + event["seq"] - log["first_seq"]
        end = min([tree.size, *(each["first_leaf"] for each in after)])
        leaves = leaves_of(tiles, tree.size)
        here = [leaf_of(line) for line in lines[: end - begins]]
        need(here == leaves[begins : begins + len(here)], "another line is there")
    need(begins + len(lines) >= end, "lines were removed at the end")
    need(root_of(leaves[: tree.size]) == tree.root, "another root")


def verify_exported(row: str, log_keys: Sequence[str], witnesses: Sequence[str], quorum: int) -> tuple[int, Tree]:
    """The leaf of an exported line, and the tree that has it."""
    members = json.loads(row)
    need(sorted(members) == ["line", "proof"], "other members")
    head, gap, note = members["proof"].partition("\n\n")
    need(gap, "no tree checkpoint")
    rows = head.split("\n")
    need(rows.pop(0) == "c2sp.org/tlog-proof@v1", "no proof")
    if rows and rows[0].startswith("extra "):
        unbase64(rows.pop(0).removeprefix("extra "))
    index = re.fullmatch("index (0|[1-9][0-9]*)", rows.pop(0) if rows else "")
    if index is None:
        raise Fault("no index")
    tree = believed(note.encode("utf-8"), log_keys, witnesses, quorum)
    proof = [unbase64(hash_) for hash_ in rows]
    leaf = leaf_of(members["line"].encode("utf-8") + b"\n")
    need(root_by_inclusion(leaf, int(index[1]), tree.size, proof) == tree.root, "another root")
    return int(index[1]), tree


def exported(line: bytes, index: int, leaves: Sequence[bytes], note: bytes) -> str:
    proof = ["c2sp.org/tlog-proof@v1", f"index {index}", *map(text_of, inclusion(leaves, index)), "", note.decode()]
    return json.dumps({"line": line.removesuffix(b"\n").decode("ascii"), "proof": "\n".join(proof)})


# Keys and lines of the vectors, which depend on their names alone


def key_named(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(sha256(f"tree vector {name}".encode()))


def public_of(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


LOG_KEY = vkey_of(ORIGIN, ED25519, public_of(key_named("log")))
WITNESSES = {name: vkey_of(name, COSIGNATURE, public_of(key_named(name))) for name in ("w1.example", "w2.example")}


def second_key() -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(sha256(b"tree vector second"), "big") % P256_ORDER, ec.SECP256R1())


SECOND_KEY = vkey_of(
    ORIGIN,
    ECDSA,
    second_key().public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
)


def vector_lines(count: int) -> list[bytes]:
    """Lines in the form of audit.md: `encrypt` of one user, each with the MAC of the chain under 32 zero bytes."""
    lines, sig = [], bytes(32)
    for seq in range(1, count + 1):
        event = f'{{"seq":{seq},"ts":{TIME * 10**9 + seq},"type":"encrypt","actor":"peer_uid:1000","outcome":"ok"}}'
        sig = hmac.digest(bytes(32), sig + event.encode(), "sha256")
        lines.append(f'{{"event":{event},"sig":"{text_of(sig)}"}}\n'.encode())
    return lines


def signed_note(leaves: Sequence[bytes], times: Mapping[str, int], *, second: bool = True) -> bytes:
    text = f"{ORIGIN}\n{len(leaves)}\n{text_of(root_of(leaves))}\n".encode()
    note = text + b"\n" + signature_line(LOG_KEY, key_named("log").sign(text))
    if second:
        by_rule = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)  # RFC 6979, so that the vectors stay the same
        note += signature_line(SECOND_KEY, second_key().sign(text, by_rule))
    for name, time in times.items():
        signature = time.to_bytes(8, "big") + key_named(name).sign(cosigned(time, text))
        note += signature_line(WITNESSES[name], signature)
    return note


def vectors() -> str:
    lines = vector_lines(max(SIZES))
    leaves = [leaf_of(line) for line in lines]
    small = leaves[:600]
    note = signed_note(small, {"w1.example": TIME + 5, "w2.example": TIME + 9})
    made: dict[str, Any] = {
        "about": "docs/spec/tree.md; the lines are those of vector_lines in make_tree.py",
        "first_line": lines[0].decode(),
        "first_leaf": leaves[0].hex(),
        "roots": [[size, root_of(leaves[:size]).hex()] for size in SIZES],
        "tile_paths": [[*tile, tile_path(*tile)] for tile in PATHS],
        "tiles": {path: sha256(tile).hex() for path, tile in tiles_of(small).items()},
        "tiles_of_the_largest": sha256(
            "".join(p + sha256(t).hex() for p, t in sorted(tiles_of(leaves).items())).encode()
        ).hex(),
        "log_key": LOG_KEY,
        "second_key": SECOND_KEY,
        "witness_keys": [*WITNESSES.values()],
        "checkpoint": note.decode(),
        "newest_at": [TIME + 9, TIME + 5],
        "inclusion": [[index, 600, [h.hex() for h in inclusion(small, index)]] for index in (0, 255, 256, 599)],
        "consistency": [[old, 600, [h.hex() for h in consistency(small, old)]] for old in (1, 255, 256, 512, 600)],
        "exported": [exported(lines[index], index, small, note) for index in (0, 599)],
    }
    return json.dumps(made, indent=1) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(FILE.read_text(encoding="ascii") != vectors())
    FILE.write_text(vectors(), encoding="ascii")
