"""Makes the known answers for the batches in MessagePack of docs/spec/api.md from that page alone, without the
program's code.

`make_batches.py` writes batches.json beside itself; `make_batches.py --check` exits 1 if the file there differs.
"""

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("batches.json")

KEY, OTHER = "k_01jdfm0z4841040g20820g4104", "k_01jdfm0z4841040g20820g4105"
REFUSED = ["the ciphertext does not open", "decryption_failed"]


def packed(value: Any) -> bytes:
    """MessagePack of nil, small integers, and short text, bytes and arrays."""
    if value is None:
        return b"\xc0"
    if isinstance(value, int):
        return bytes([value])
    if isinstance(value, bytes):
        return b"\xc4" + bytes([len(value)]) + value if len(value) < 256 else b"\xc5" + len(value).to_bytes(2) + value
    if isinstance(value, str):
        raw = value.encode()
        return (bytes([0xA0 | len(raw)]) if len(raw) < 32 else b"\xd9" + bytes([len(raw)])) + raw
    if len(value) < 16:
        return bytes([0x90 | len(value)]) + b"".join(map(packed, value))
    return b"\xdc" + len(value).to_bytes(2) + b"".join(map(packed, value))


def request(verb: str, name: str, array: list[Any], in_json: dict[str, Any]) -> dict[str, Any]:
    """`in_json`: the same request; each value of bytes is hexadecimal text."""
    return {"verb": verb, "name": name, "msgpack": packed(array).hex(), "json": in_json}


def answer(verb: str, array: list[Any], in_json: dict[str, Any]) -> dict[str, Any]:
    return {"verb": verb, "msgpack": packed(array).hex(), "json": in_json}


def vectors() -> str:
    item = {"key_id": KEY, "plaintext": "00ff"}
    made = {
        "about": "docs/spec/api.md, MessagePack; in `json` the values of bytes are hexadecimal instead of base64",
        "requests": [
            request("encrypt_batch", "no item", [[]], {"items": []}),
            request("encrypt_batch", "required members only", [[[KEY, b"\x00\xff"]]], {"items": [item]}),
            request(
                "encrypt_batch",
                "all members, and absent ones in the middle",
                [
                    [
                        [KEY, b"\x00\xff", b"a", "t", "r"],
                        [KEY, b"\x00\xff", None, None, "r"],
                        [KEY, b"\x00\xff", b"", ""],
                    ]
                ],
                {
                    "items": [
                        {**item, "aad": "61", "thread_id": "t", "request_id": "r"},
                        {**item, "request_id": "r"},
                        {**item, "aad": "", "thread_id": ""},
                    ]
                },
            ),
            request("encrypt_batch", "many items", [[[KEY, b"\x00\xff"]] * 17], {"items": [item] * 17}),
            request(
                "decrypt_batch",
                "a long value",
                [[[KEY, bytes(300), b"a"]]],
                {"items": [{"key_id": KEY, "ciphertext": bytes(300).hex(), "aad": "61"}]},
            ),
            request(
                "reencrypt_batch",
                "two items",
                [KEY, OTHER, [[b"c"], [b"d", b"a"]]],
                {
                    "from_key_id": KEY,
                    "to_key_id": OTHER,
                    "items": [{"ciphertext": "63"}, {"ciphertext": "64", "aad": "61"}],
                },
            ),
            request(
                "check_batch", "without a thread", [KEY, [[b"c"]]], {"key_id": KEY, "items": [{"ciphertext": "63"}]}
            ),
            request("check_batch", "with a thread", [KEY, [], "t"], {"key_id": KEY, "items": [], "thread_id": "t"}),
        ],
        "answers": [
            answer(
                "encrypt_batch",
                [[b"c", REFUSED, bytes(300)]],
                {
                    "items": [
                        {"ciphertext": "63"},
                        {"error": REFUSED[0], "code": REFUSED[1]},
                        {"ciphertext": bytes(300).hex()},
                    ]
                },
            ),
            answer("decrypt_batch", [[b"", b"p"]], {"items": [{"plaintext": ""}, {"plaintext": "70"}]}),
            answer("reencrypt_batch", [[]], {"items": []}),
            answer(
                "check_batch",
                [2, [[1, *REFUSED]]],
                {"opened": 2, "refused": [{"item": 1, "error": REFUSED[0], "code": REFUSED[1]}]},
            ),
            answer("check_batch", [0, []], {"opened": 0, "refused": []}),
        ],
    }
    return json.dumps(made, indent=1) + "\n"


def main() -> None:
    if "--check" in sys.argv[1:]:
        if FILE.read_text(encoding="utf-8") != vectors():
            raise SystemExit(f"{FILE} is not what make_batches.py makes")
        return
    FILE.write_text(vectors(), encoding="utf-8")


if __name__ == "__main__":
    main()
