"""Makes docs/spec/audit-vectors.json, the known answers for the audit log's format; or checks the file.

    make_vectors.py           writes it
    make_vectors.py --check   exit status 1 when it is not what would be written

Everything in it depends only on the constants here: keys, log id, times. The independent verifier checks the result
before it is written, so that a mistake of the product does not become a known answer. The keys are for tests
only.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minikms.api.base64 import encode_text
from minikms.audit import chain, record
from minikms.audit.chain import AuditKey, Coverage, KeyState
from minikms.audit.record import Event, Facts, LineRef
from tests.minikms.audit import independent_verifier
from tests.minikms.audit.logmaker import KEY1, KEY2, LOG, encrypt_event

VECTORS = Path(__file__).resolve().parents[3] / "docs" / "spec" / "audit-vectors.json"
LOG_ID = bytes(range(16))
STATE = KeyState(epoch=1, tombstones=2)
TS = 1_700_000_000_000_000_000

ESCAPED = ("k_01jd", "a b", "50%", '"', "\\", "line\nbreak", "\x7f", "é", "€", "😀")

REFUSED = (
    (1, "a blank line", lambda line: b""),
    (1, "a space after the colon", lambda line: line.replace(b'{"event":', b'{"event": ')),
    (1, "a carriage return", lambda line: line + b"\r"),
    (1, "base64 with unused bits set", lambda line: line[:-4] + bytes([line[-4] + 1]) + line[-3:]),
    (1, "an escape", lambda line: line.replace(b'"ok"', b'"\\u006fk"')),
    (1, "a byte that is not ASCII", lambda line: line.replace(b'"ok"', '"ök"'.encode())),
    (2, "a member that is empty", lambda line: line.replace(b'"pid":77', b'"pid":0')),
    (2, "a member twice", lambda line: line.replace(b'"pid":77', b'"pid":77,"pid":77')),
    (2, "a fraction", lambda line: line.replace(b'"pid":77', b'"pid":77.0')),
    (2, "an unknown member", lambda line: line.replace(b'"pid":77', b'"pid":77,"uid":0')),
    (2, "no outcome", lambda line: line.replace(b',"outcome":"ok"', b"")),
    (2, "members in another order", lambda line: line.replace(b'"seq":3,', b"").replace(b'"type"', b'"seq":3,"type"')),
)  # fmt: skip
"""Rule of the page, what it is, and how it is made of a good line."""


REFUSED_RECEIPTS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("another key", lambda text: text.replace("k_01jd", "k_01je")),
    ("another tag", lambda text: text.replace("00112233", "00112234")),
    ("another tombstone", lambda text: text.replace('tombstone\\":7', 'tombstone\\":8')),
    ("another line of the log", lambda text: text.replace('seq\\":9', 'seq\\":8')),
    ("version 2", lambda text: text.replace('"version":1', '"version":2')),
    ("an unknown member", lambda text: text.replace('"version"', '"key":1,"version"')),
    ("half of it", lambda text: text[: len(text) // 2]),
)


def make_receipt(key_id: str = f"k_01jd{5:022}", **changed: str | int) -> bytes:
    """The line of a log that says that a key was destroyed, signed by KEY1, without its newline."""
    facts: Facts = {
        "archives": "/backups/monday",
        "backups_removed": 2,
        "destroyed_at": TS // 10**9,
        "epoch": 4,
        "tombstone": 7,
        "tombstone_tag": "00112233445566778899aabbccddeeff",
        **changed,
    }
    event = Event(type="destroy_key", actor="peer_uid:1000", key_id=key_id, facts=facts)
    signer = KEY1.audit_key().signer
    line, _ = chain.make_lines([event], LineRef(8, bytes([8] * 32)), KEY1.mac_key, TS, signer=signer)
    return line[:-1]


class Maker:
    """A log written line by line with the parts of the product that have no clock and no disk."""

    def __init__(self) -> None:
        self.key: AuditKey = KEY1.audit_key()
        self.head = LineRef(0, record.ZERO_MAC)
        self.coverage = Coverage()
        self.files: dict[str, list[str]] = {}
        self.file = ""
        self.ts = TS

    def take(self, line: bytes, head: LineRef) -> None:
        self.files[self.file].append(line[:-1].decode("ascii"))
        self.coverage.add(line, 1)
        self.head = head

    def begin(self, file: str, event: Event) -> None:
        self.file = file
        self.files[file] = []
        self.coverage = Coverage()
        self.add(event)

    def opening(self) -> Event:
        """The first line of segment 2, right after the close of the first."""
        return chain.segment_open_event(
            LOG_ID, 1, KEY1.public_key, segment=2, previous=self.head, closed=self.coverage, state=STATE
        )

    def add(self, event: Event) -> None:
        self.ts += 1
        self.take(*chain.make_lines([event], self.head, self.key.mac_key, self.ts))

    def sign(self, event_type: str, extra: Facts | None = None) -> None:
        self.ts += 1
        line, head = chain.signed_line(
            event_type,
            head=self.head,
            ts=self.ts,
            coverage=self.coverage,
            log_id=LOG_ID,
            key=self.key,
            state=STATE,
            extra=extra,
        )
        self.coverage = Coverage()
        self.take(line, head)


def make_log() -> dict[str, list[str]]:
    maker = Maker()
    maker.begin(f"{LOG}.1", chain.genesis_event(LOG_ID, 1, KEY1.public_key, {}))
    maker.add(Event(type="start", actor="minikms", pid=4711, facts={"epoch": 1, "version": "0.1.0"}))
    maker.add(encrypt_event(1, thread_id="t-1"))
    maker.add(
        Event(type="decrypt_batch", actor="peer_uid:1000", count=2, key_ids=["k_a", "k_b"], request_ids=["r1", "r2"])
    )
    maker.sign("checkpoint")
    maker.add(encrypt_event(2, thread_id='not "valid"\n', outcome="invalid_request"))
    maker.add(encrypt_event(3, thread_id=record.hash_thread_id("t-1", KEY1.mac_key)))
    maker.sign("segment_close", {"next_segment": 2})
    maker.begin(LOG, maker.opening())
    maker.add(Event(type="refused", actor="peer_uid:99", count=17, outcome="unauthorized"))
    maker.sign("audit_key", {"next_key": 2, "next_public_key": encode_text(KEY2.public_key)})
    maker.key = KEY2.audit_key()
    maker.add(Event(type="stop", actor="minikms", detail="SIGTERM"))
    maker.sign("checkpoint")
    return maker.files


def put(files: dict[str, list[str]], directory: Path) -> None:
    for name, lines in files.items():
        (directory / name).write_text("".join(line + "\n" for line in lines), "ascii")


def make() -> dict[str, Any]:
    files = make_log()
    good = files[f"{LOG}.1"][2].encode()
    receipt = json.dumps({"version": 1, "line": make_receipt().decode("ascii")}, separators=(",", ":"))
    independent_verifier.receipt(receipt, KEY1.public_key)
    vectors = {
        "what": "known answers for docs/spec/audit.md; the keys are for tests only",
        "format": record.FORMAT_VERSION,
        "keys": [
            {
                "version": key.version,
                "audit_key": key.mac_key.hex(),
                "seed": key.seed.hex(),
                "public_key": encode_text(key.public_key),
            }
            for key in (KEY1, KEY2)
        ],
        "files": files,
        "hidden_thread_id": {"thread_id": "t-1", "key": 1, "recorded": record.hash_thread_id("t-1", KEY1.mac_key)},
        "escapes": [{"text": text, "written": record.escape(text)} for text in ESCAPED],
        "refused_lines": [
            {"rule": rule, "what": what, "line_hex": change(good).hex()} for rule, what, change in REFUSED
        ],
        "receipt": receipt,
        "refused_receipts": [{"what": what, "receipt": change(receipt)} for what, change in REFUSED_RECEIPTS],
    }
    with tempfile.TemporaryDirectory() as temporary:
        put(files, Path(temporary))
        keys = {key.version: bytes(key.mac_key) for key in (KEY1, KEY2)}
        fault = independent_verifier.verify(Path(temporary), KEY1.public_key, keys)
        if fault:
            raise SystemExit(f"the independent verifier refuses what was made: {fault}")
    return vectors


def text_of(vectors: dict[str, Any]) -> str:
    return json.dumps(vectors, indent=1, ensure_ascii=True) + "\n"


def main(arguments: list[str]) -> int:
    text = text_of(make())
    if arguments == ["--check"]:
        same = VECTORS.exists() and VECTORS.read_text("ascii") == text
        print("the known answers are as they should be" if same else f"{VECTORS} is not what would be written")
        return 0 if same else 1
    VECTORS.write_text(text, "ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
