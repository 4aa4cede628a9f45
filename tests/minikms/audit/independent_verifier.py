"""A second verifier of audit logs, written from docs/spec/audit.md alone: standard library, cryptography, zstandard.

It shares no code with `minikms.audit` and stops at the first fault. Tests compare the two verifiers: if they disagree,
one of them or the page is wrong. Usage:

    independent_verifier.py DIRECTORY PUBLIC_KEY [VERSION:AUDIT_KEY_HEX …] [--expect-head SEQ:SIG]

Exit status: 0 intact, 1 a fault (printed), 2 no log.
"""

import base64
import hashlib
import hmac
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import zstandard
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MEMBERS = {
    "seq": int, "ts": int, "type": str, "actor": str, "pid": int, "key_id": str, "key_ids": list, "thread_id": str,
    "count": int, "outcome": str, "request_id": str, "request_ids": list, "detail": str, "facts": dict,
}  # fmt: skip
ALWAYS = {"seq", "ts", "type", "actor", "outcome"}
SIGNED = {"epoch", "key", "lines", "lines_sha256", "log_id", "previous_sig", "signature", "tombstones"}
FACTS = {
    "checkpoint": SIGNED,
    "segment_close": SIGNED | {"next_segment"},
    "audit_key": SIGNED | {"next_key", "next_public_key"},
    "segment_open": {
        "epoch",
        "tombstones",
        "format",
        "key",
        "log_id",
        "previous_seq",
        "previous_sha256",
        "previous_sig",
        "public_key",
        "segment",
    },
}
RECEIPT = {"archives", "backups_removed", "destroyed_at", "epoch", "signature", "tombstone", "tombstone_tag"}
WINDOW_BYTES_MAX = 8 << 20
LABEL = b"minikms/audit/signed-line/v1\x00"


class Fault(Exception):
    """What is wrong, and where."""


def need(condition: bool, text: str) -> None:
    if not condition:
        raise Fault(text)


# --- a line ----------------------------------------------------------------------------------------------------------


def unbase64(text: Any, size: int) -> bytes:
    need(isinstance(text, str), "not base64")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise Fault("not base64") from None
    need(len(data) == size and base64.b64encode(data).decode() == text, "not canonical base64 of that size")
    return data


def integer(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def written(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def parse(line: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    need(len(line) < 1_048_576, "too long")
    need(re.fullmatch(rb"[\x20-\x5b\x5d-\x7e]+", line) is not None, "a byte that does not belong in a line")
    frame = re.fullmatch(rb'\{"event":(\{.*\}),"sig":"([^"]{44})"\}', line)
    need(frame is not None, "not framed")
    assert frame is not None
    event_bytes, sig = frame[1], unbase64(frame[2].decode(), 32)
    try:
        event = json.loads(event_bytes)
    except (ValueError, RecursionError):
        raise Fault("not JSON") from None
    for name, value in event.items():
        need(type(value) is MEMBERS.get(name), f"{name} does not belong there")
        need(type(value) is not int or integer(value), f"{name} is out of range")
        need(name in ALWAYS or bool(value), f"{name} is empty and yet there")
    need(event.keys() >= ALWAYS and event["seq"] > 0 and event["ts"] > 0, "a member is missing")
    need(all(type(item) is str for name in ("key_ids", "request_ids") for item in event.get(name, [])), "not strings")
    need(all(type(fact) is str or integer(fact) for fact in event.get("facts", {}).values()), "a fact of another type")
    ordered = {name: event[name] for name in MEMBERS if name in event}
    if "facts" in ordered:
        ordered["facts"] = dict(sorted(ordered["facts"].items()))
    need(written(ordered) == event_bytes, "not canonical")
    return ordered, event_bytes, sig


# --- the log ---------------------------------------------------------------------------------------------------------


class Log:
    """The rules of the page, in its order. With empty `audit_keys` only a public key is known."""

    def __init__(
        self,
        public_key: bytes,
        audit_keys: Mapping[int, bytes],
        since: Mapping[int, tuple[int, bytes]],
        public_keys: Collection[bytes],
    ) -> None:
        self.trusted, self.audit_keys, self.since, self.public_keys = public_key, audit_keys, since, public_keys
        self.seq, self.sig = 0, bytes(32)
        self.key, self.public_key, self.log_id, self.segment = 0, public_key, "", 0
        self.due = 1  # segment number that has to be opened now, 0 within a segment
        self.covered, self.covered_count = hashlib.sha256(), 0
        self.needs_retention: tuple[int, str] | None = None
        self.retained = self.signed_to = 0
        self.last = b""
        self.file = 0  # number of the file that begins with the next line, -1 within one
        self.sigs: dict[int, bytes] = {}

    def line(self, line: bytes) -> None:
        event, event_bytes, sig = parse(line)
        seq, kind, facts = event["seq"], event["type"], event.get("facts", {})
        if self.key == 0:
            self.first(event, facts)
        need(seq == self.seq + 1, f"line {seq} after line {self.seq}")
        if self.audit_keys:
            mac = hmac.digest(self.audit_keys[self.key], self.sig + event_bytes, "sha256")
            need(hmac.compare_digest(mac, sig), f"the MAC of line {seq}")
        if kind in FACTS:
            need(set(facts) == FACTS[kind], f"the facts of line {seq}")
        opening = kind in ("genesis", "segment_open")
        need(opening == (self.file >= 0), f"line {seq} at a place of its file not its own")
        need(self.file <= 0 or facts.get("segment") == self.file, f"a file of another number than line {seq} says")
        self.file = -1
        need(opening == (self.due > 0) and (kind == "genesis") <= (seq == 1), f"line {seq} at a place not its own")
        if opening:
            self.open(seq, facts, kind)
        if kind in ("checkpoint", "segment_close", "audit_key"):
            self.signed(event, facts)
        if kind == "retention" and (facts.get("last_seq"), facts.get("last_sig")) == self.needs_retention:
            self.retained = seq
        self.last = line + b"\n"
        self.covered.update(line + b"\n")
        self.covered_count += 1
        self.seq, self.sig = seq, sig
        self.sigs[seq] = sig

    def first(self, event: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        need(event["type"] in ("genesis", "segment_open"), "the log does not begin at its beginning")
        self.key, self.log_id = facts.get("key", 0), facts.get("log_id", "")
        need(integer(self.key) and self.key > 0, "no key version")
        need(re.fullmatch(r"[0-9a-f]{32}", str(self.log_id)) is not None, "no log id")
        need(unbase64(facts.get("public_key"), 32) == self.trusted, "another public key")
        need(not self.audit_keys or self.key in self.audit_keys, "an unknown audit key")
        if event["type"] == "segment_open":
            need(set(facts) == FACTS["segment_open"], "the facts of the first line")
            self.seq, self.sig = facts["previous_seq"], unbase64(facts["previous_sig"], 32)
            self.needs_retention = (facts["previous_seq"], facts["previous_sig"])
            self.due = facts["segment"]
            need(integer(self.due) and self.due >= 2, "the first segment begins with a genesis line")

    def open(self, seq: int, facts: Mapping[str, Any], kind: str) -> None:
        need(facts.get("format") == 1, "another format")
        need((facts["log_id"], facts["key"]) == (self.log_id, self.key), f"line {seq}: another log or key")
        need(unbase64(facts["public_key"], 32) == self.public_key, f"line {seq}: another public key")
        need(facts.get("segment") == self.due and (kind == "segment_open" or self.due == 1), f"line {seq}: segment")
        if kind == "segment_open":
            before = (facts["previous_seq"], unbase64(facts["previous_sig"], 32))
            need(before == (self.seq, self.sig), f"line {seq}: head before")
            digest = hashlib.sha256(self.last).hexdigest()
            need(not self.last or facts["previous_sha256"] == digest, f"line {seq}: line before")
        self.segment, self.due = facts["segment"], 0
        self.covered, self.covered_count = hashlib.sha256(), 0

    def signed(self, event: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        seq = event["seq"]
        need((facts["log_id"], facts["key"]) == (self.log_id, self.key), f"line {seq}: another log or key")
        need(facts["previous_sig"] == base64.b64encode(self.sig).decode(), f"line {seq}: another line before it")
        covered = (self.covered_count, self.covered.hexdigest())
        need(
            (facts["lines"], facts["lines_sha256"]) == covered, f"line {seq}: other lines than those it was signed for"
        )
        unsigned = {**event, "facts": {name: fact for name, fact in facts.items() if name != "signature"}}
        try:
            key = Ed25519PublicKey.from_public_bytes(self.public_key)
            key.verify(unbase64(facts["signature"], 64), LABEL + written(unsigned))
        except InvalidSignature:
            raise Fault(f"line {seq}: the signature") from None
        self.covered, self.covered_count = hashlib.sha256(), 0
        self.signed_to = seq
        if event["type"] == "segment_close":
            need(facts["next_segment"] == self.segment + 1, f"line {seq}: next segment")
            self.due = facts["next_segment"]
        if event["type"] == "audit_key":
            need(integer(facts["next_key"]) and facts["next_key"] > self.key, f"line {seq}: next key")
            self.key, self.public_key = facts["next_key"], unbase64(facts["next_public_key"], 32)
            since = self.since.get(self.key, (self.seq, self.sig))
            need(since == (self.seq, self.sig), f"line {seq}: the key changed after another line")
            need(not self.audit_keys or self.key in self.audit_keys, "an unknown audit key")
            need(not self.public_keys or self.public_key in self.public_keys, f"line {seq}: an unknown public key")

    def end(self) -> None:
        need(self.seq > 0 and self.key > 0, "the log is empty")
        need(self.due == 0, f"segment {self.due} is missing")
        need(bool(self.audit_keys) or self.signed_to > 0, "no line is signed: nothing can be said")
        excused = 0 < self.retained <= (self.seq if self.audit_keys else self.signed_to)
        need(self.needs_retention is None or excused, "what came before the first line is missing")
        need(self.key >= max(self.since, default=0), "the log ends under an earlier key")


def one_frame(data: bytes) -> bool:
    """Whether this is one whole zstd frame with a checksum, as far as its structure tells (RFC 8878, section 3.1.1)."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 6 or not data[4] & 4:
        return False
    single = data[4] >> 5 & 1
    at = 5 + (1 - single) + (0, 1, 2, 4)[data[4] & 3] + (single, 2, 4, 8)[data[4] >> 6]
    while at + 3 <= len(data):
        block = int.from_bytes(data[at : at + 3], "little")
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
        if block & 1:
            return at + 4 == len(data)
    return False


def unpacked(path: Path) -> bytes:
    frame = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX).decompressobj()
    try:
        content = frame.decompress(path.read_bytes())
    except zstandard.ZstdError:
        raise Fault(f"{path.name} does not decompress") from None
    need(frame.eof, f"{path.name} does not decompress")
    return content


def receipt(text: str, public_key: bytes) -> dict[str, Any]:
    """The event of a receipt. Raises Fault."""
    try:
        found = json.loads(text)
    except ValueError:
        raise Fault("not JSON") from None
    need(found.keys() - {"proof"} == {"version", "line"} and found["version"] == 1, "not a receipt")
    event, _, _ = parse(found["line"].encode())
    need((event["type"], event["outcome"]) == ("destroy_key", "ok"), "not the line of a destruction")
    facts = event["facts"]
    need(facts.keys() == RECEIPT, "not the facts of a receipt")
    unsigned = {**event, "facts": {name: value for name, value in facts.items() if name != "signature"}}
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(
            unbase64(facts["signature"], 64), b"minikms/audit/receipt/v1\x00" + written(unsigned)
        )
    except InvalidSignature:
        raise Fault("not signed by that key") from None
    return event


def segments(directory: Path) -> Iterator[tuple[int, bytes]]:
    """(number from the name or 0, content) of each segment, in order."""
    closed: dict[int, Path] = {}
    names = re.compile(r"minikms-audit\.log\.([1-9][0-9]*)(\.zst)?")
    for path in sorted(directory.iterdir(), reverse=True):  # the plain form, which sorts before, wins
        if match := names.fullmatch(path.name):
            closed[int(match[1])] = path
    for number, path in sorted(closed.items()):
        if path.suffix == ".zst":
            need(one_frame(path.read_bytes()), f"{path.name} is not one zstd frame")
            yield number, unpacked(path)
        else:
            yield number, path.read_bytes()
    yield 0, (directory / "minikms-audit.log").read_bytes()


def verify(
    directory: Path,
    public_key: bytes,
    audit_keys: Mapping[int, bytes] | None = None,
    expect_head: tuple[int, bytes] | None = None,
    since: Mapping[int, tuple[int, bytes]] | None = None,
    public_keys: Collection[bytes] = (),
) -> str:
    """What is wrong with the log, or an empty string. With the audit keys: since, of each but the first the last line
    under the one before; public_keys, those that go with them.
    """
    log = Log(public_key, audit_keys or {}, since or {}, public_keys)
    try:
        need((directory / "minikms-audit.log").exists(), "the file being written is missing")
        for number, content in segments(directory):
            *lines, rest = content.split(b"\n")
            log.file = number
            for line in lines:
                log.line(line)
            need(rest == b"", f"an incomplete line after line {log.seq}")
            need(log.file < 0, f"an empty file after line {log.seq}")
            need(number in (0, log.segment), f"segment {log.segment} in the file of segment {number}")
        log.end()
        if expect_head is not None:
            need(log.sigs.get(expect_head[0]) == expect_head[1], f"line {expect_head[0]} is not the known one")
    except Fault as fault:
        return str(fault)
    except (KeyError, TypeError, ValueError) as error:
        return f"malformed: {error!r}"
    return ""


def main(arguments: list[str]) -> int:
    expect_head = None
    if "--expect-head" in arguments:
        at = arguments.index("--expect-head")
        seq, _, sig = arguments[at + 1].partition(":")
        expect_head = (int(seq), base64.b64decode(sig))
        del arguments[at : at + 2]
    directory, public_key, *keys = arguments
    if not (Path(directory) / "minikms-audit.log").exists():
        print("no log")
        return 2
    audit_keys = {int(version): bytes.fromhex(key) for version, _, key in (text.partition(":") for text in keys)}
    fault = verify(Path(directory), base64.b64decode(public_key), audit_keys, expect_head)
    print(fault or "intact")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
