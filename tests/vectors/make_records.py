"""Makes the known answers for the records of docs/spec/store.md from that page alone, without the program's code.

`make_records.py` writes records.json beside itself; `make_records.py --check` exits 1 if the file there differs.
"""

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("records.json")

KEY_ID = "k_01jdfm0z4841040g20820g4104"
FIRST, EDITED, REACTED, DELETED = (f"0170000000000000000{digit}-000000" for digit in range(4))
SEALED = bytes(range(28))


def packed(value: Any) -> bytes:
    """MessagePack of what headers hold: short arrays and text, booleans, integers below 2^64."""
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if value < 128 else b"\xcf" + value.to_bytes(8, "big")
    if isinstance(value, str):
        raw = value.encode()
        return (bytes([0xA0 | len(raw)]) if len(raw) < 32 else b"\xd9" + bytes([len(raw)])) + raw
    return bytes([0x90 | len(value)]) + b"".join(packed(one) for one in value)


def vector(name: str, form: int, place: str, header: list[Any], sealed: list[Any]) -> dict[str, Any]:
    """`place`: the last part of the storage key, a stamp or `meta`. `sealed`: the plaintext of the sealed part."""
    head = packed(header)
    return {
        "name": name,
        "key": f"thread:t:{place}",
        "header": header,
        "plaintext": json.dumps(sealed, separators=(",", ":"), ensure_ascii=False),
        "record": (bytes([form]) + len(head).to_bytes(2, "big") + head + SEALED).hex(),
    }


def vectors() -> str:
    one, two = {"bob": "+1"}, {"bob": "+1", "cid": "ü"}
    made = {
        "about": "docs/spec/store.md; 28 bytes stand for the sealed part, whose plaintext is beside it",
        "sealed": SEALED.hex(),
        "thread": "t",
        "first": FIRST,
        "records": [
            vector("metadata", 1, "meta", [KEY_ID, "ann", FIRST, 5, 0], ["ann", False, "Title", "title-t"]),
            vector(
                "first version",
                1,
                f"msg:{FIRST}",
                [KEY_ID, "", "ann", False],
                [FIRST, "ann", False, "user", {"text": "hello"}, "", {}],
            ),
            vector(
                "edit",
                2,
                f"msg:{EDITED}",
                [KEY_ID, FIRST, "ann", False, ""],
                [FIRST, "ann", False, "", 1, 98, one, ["user", [1, None, "new"], "msg-1-000000"]],
            ),
            vector(
                "change of reactions",
                2,
                f"msg:{REACTED}",
                [KEY_ID, FIRST, "ann", False, EDITED],
                [FIRST, "ann", False, EDITED, 2, 209, two, None],
            ),
            vector(
                "tombstone",
                2,
                f"msg:{DELETED}",
                [KEY_ID, FIRST, "ann", True, EDITED],
                [FIRST, "ann", True, EDITED, 3, 337, two, None],
            ),
        ],
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(FILE.read_text(encoding="utf-8") != vectors())
    FILE.write_text(vectors(), encoding="utf-8")
