"""Makes the known answers of docs/spec/policy.md from that page alone: it imports nothing of the program.

`make_policy.py` writes policy.json beside itself; `make_policy.py --check` exits 1 if the file there differs.
"""

import hashlib
import json
import sys
from pathlib import Path

FILE = Path(__file__).with_name("policy.json")


LITERAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~:/@-"


def subject(issuer: str, raw: bytes) -> str:
    """The name of an OpenID subject."""
    return f"oidc:{issuer}|" + "".join(chr(one) if chr(one) in LITERAL else f"%{one:02X}" for one in raw)


def matches(pattern: str, name: str, separator: str) -> bool:
    if not pattern:
        return not name
    if pattern.startswith("**"):
        return any(matches(pattern[2:], name[at:], separator) for at in range(len(name) + 1))
    if pattern[0] == "*":
        return any(
            matches(pattern[1:], name[at:], separator)
            for at in range(len(name) + 1)
            if not separator or separator not in name[:at]
        )
    return name[:1] == pattern[0] and matches(pattern[1:], name[1:], separator)


def match_vectors() -> list[list[object]]:
    principals = {
        "/": (
            ("spiffe://prod/chat/*", "spiffe://prod/**", "spiffe://prod/*/api", "spiffe://prod/chat-**", "uid:1000"),
            ("spiffe://prod/chat/api", "spiffe://prod/chat/a/api", "spiffe://prod/chat-1/x", "uid:1000", "uid:10000"),
        ),
        ".": (
            ("dns:*.example.com", "dns:**.example.com", "dns:api-*.example.com"),
            ("dns:api.example.com", "dns:a.b.example.com", "dns:api-7.example.com", "dns:example.com"),
        ),
        "": (("thread-*", "*", "a*b*c"), ("thread-1", "thread", "abc", "aXbbYc", "acb")),
    }
    return [
        ["thread" if not separator else "principal", pattern, name, matches(pattern, name, separator)]
        for separator, (patterns, names) in principals.items()
        for pattern in patterns
        for name in names
    ]


def identity(kind: str, name: str | None, principals: list[str], others: list[str]) -> str:
    if name is not None:
        return f"{kind}:{name}"
    text = json.dumps([sorted(set(principals)), sorted(set(others))])
    return f"{kind}#{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def identities() -> list[dict[str, object]]:
    cases: list[tuple[str, str | None, list[str], list[str]]] = [
        ("grant", "chat", ["uid:1"], ["*"]),
        ("grant", None, ["uid:2", "uid:1", "uid:2"], ["b-*", "a"]),
        ("grant", None, ["uid:1"], []),
        ("proxy", None, ["uid:992"], ["spiffe://prod/**"]),
    ]
    return [
        {"kind": kind, "name": name, "principals": one, "others": others, "identity": identity(kind, name, one, others)}
        for kind, name, one, others in cases
    ]


HOUR_NS = 3600 * 10**9
LEVELS = [
    ("grant:chat", "uid:1", "decrypts", 0),
    ("grant:chat", "uid:1", "reencrypts", HOUR_NS // 2 + 1),
    ("grant:chat", "*", "decrypts", HOUR_NS - 1),
    ("grant:chat", "+", "decrypts", HOUR_NS // 20),
]


def bucket_file(reserved_ns: int) -> str:
    """The file where the other buckets are full."""
    others_ns = HOUR_NS - reserved_ns
    left = [(identity, who, kind, max(0, filled_ns - reserved_ns)) for identity, who, kind, filled_ns in LEVELS]
    listed = [one for one in left if one[3] < others_ns]
    return json.dumps({"version": 1, "others_ns": others_ns, "buckets": listed}, separators=(",", ":"))


def vectors() -> str:
    content = {
        "about": "docs/spec/policy.md",
        "names": [
            subject("https://issuer.example", "auth0|12 é".encode()),
            subject("https://issuer.example:8443/t", b"\x00*?["),
            "spiffe://prod/chat/api",
            "dns:api.example.com",
            "uid:0",
        ],
        "no_names": [
            "uid:01",
            "dns:API.example.com",
            "spiffe://prod/a%20b",
            "oidc:https://issuer.example|%41",
            "uid:*",
        ],
        "matches": match_vectors(),
        "identities": identities(),
        "buckets": {"stopped": bucket_file(0), "reserved": bucket_file(HOUR_NS // 10)},
    }
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(FILE.read_text(encoding="ascii") != vectors())
    FILE.write_text(vectors(), encoding="ascii")
