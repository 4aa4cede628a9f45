"""The verifier: every rule of an audit log, applied to lines, without I/O.

Owns: the definition of an intact log. The rules, in the order in which they apply to a line (docs/spec/audit.md has the
same list). `Verifier` has those about a line that follows other lines; `minikms.audit.verdict` adds those about files
and about the end of a log (10 to 12, and the last parts of 3 and 9).

 1. The line has the exact frame, at most `LINE_BYTES_MAX` bytes, printable ASCII only, and ends in one newline.
 2. The event is valid and canonical, with a `seq` and a `ts`.
 3. The first line is `genesis` with seq 1, or `segment_open` of segment 2 or higher (rule 10), or the signed line that
    the caller starts from. It names the format, the log's id, a known audit key version and a trusted public key. The
    first line of each file is `genesis` or `segment_open`, and no other line is. Its segment is that of the
    file's name.
 4. `seq` is one more than that of the previous line: no line is missing, repeated or moved.
 5. With the audit key: the MAC is that of the previous MAC and this event, under the active key version.
 6. `genesis` is only the first line. `segment_open` follows each `segment_close`, and no other line; it names the next
    segment, the same log, key version and public key, the head before it, and the SHA-256 of that line.
 7. A signed line has exactly its facts: this log, the active key version, the previous MAC, and the number and
    SHA-256 of the lines since the last signed line of its file (inclusive), or since the file's first line.
 8. Its Ed25519 signature is valid under the active public key.
 9. `audit_key` names a higher key version and its public key, which are active from the next line on. With the
    audit keys: that public key is a trusted one; a version that is recorded to begin after a certain line begins there;
    and the log does not end under an earlier version.
10. A log whose first line is `segment_open` contains a later `retention` line that names the head before it. With the
    public key alone, a signature must cover that line.
11. The last line is not a `segment_close`: the file that it names exists.
12. The expected head, if one is given, is a line of this log.

Invariants: the result for a line depends only on earlier lines; memory is bounded. It must never read a file.
"""

from __future__ import annotations

import re
from typing import Final

from minikms.api.base64 import decode_exact, encode_text
from minikms.audit import record
from minikms.audit.chain import Coverage, KeyState
from minikms.audit.record import Event, Facts, LineRef, MalformedLineError
from minikms.audit.rules import (
    FINDINGS_COUNT_MAX,
    ChainTracker,
    Finding,
    KeyTracker,
    Kind,
    Trust,
    whole_number,
)

_SEGMENT_OPEN_FACTS: Final = frozenset(
    (
        "epoch",
        "format",
        "key",
        "log_id",
        "previous_seq",
        "previous_sha256",
        "previous_sig",
        "public_key",
        "segment",
        "tombstones",
    )
)
_SIGNED_FACTS: Final = frozenset(
    ("epoch", "key", "lines", "lines_sha256", "log_id", "previous_sig", "signature", "tombstones")
)
_LOG_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_EXTRA_FACTS: Final[dict[str, frozenset[str]]] = {
    record.TYPE_CHECKPOINT: frozenset(),
    record.TYPE_SEGMENT_CLOSE: frozenset(("next_segment",)),
    record.TYPE_AUDIT_KEY: frozenset(("next_key", "next_public_key")),
}


class Verifier:
    """Verifies lines: call `feed` for each line in order, until there is a finding.

    from_signed_line: the first line has a type of `record.SIGNED_TYPES`, and its facts about earlier lines are trusted.

    findings: so far, at most `FINDINGS_COUNT_MAX`. log_id: in hex, empty before the first line. segment: number of the
    last line's segment, 0 until a line names it. next_segment: number of the segment that must come next if the last
    line was a `segment_close`, else 0. coverage: the lines since the last signed line (inclusive), which the next
    signed line has to cover. state: of the key files, according to the last line that names it. chain, key: the last
    line and the active audit key so far. covered_seq: the last line so far with a valid signature, which covers all
    lines before it.
    """

    def __init__(self, trust: Trust, *, from_signed_line: bool = False) -> None:
        self._from_signed_line = from_signed_line
        self.chain = ChainTracker(trust.mac_keys, self._add_finding)
        self.findings: list[Finding] = []
        self._first_seq = 0
        self._first_previous: LineRef | None = None
        self.log_id = ""
        self.key = KeyTracker(trust, self._add_finding)
        self.segment = 0
        self._segments = 0
        self.next_segment = 0
        self.coverage = Coverage()
        self.state = KeyState()
        self._coverage_known = True
        self._checkpoints = 0
        self.covered_seq = 0

    def feed(self, line: bytes) -> None:
        """Verify the next line, given without its newline."""
        try:
            event, event_bytes, sig = record.parse_line(line)
        except MalformedLineError as error:
            self.chain.add_malformed(str(error))
            return
        if self.chain.head is None:
            self._first_line(event, event_bytes, sig)
        elif self.chain.take(event, event_bytes, sig):
            self._verify_in_order(event)
        else:
            return
        self._finish_line(event, line, sig)

    # --- the first line ----------------------------------------------------------------------------------------------

    def _first_line(self, event: Event, event_bytes: bytes, sig: bytes) -> None:
        # A genesis line is line 1, whatever its seq reads after an alteration.
        self._first_seq = 1 if event.type == record.TYPE_GENESIS else event.seq
        self.covered_seq = self._first_seq - 1
        previous: bytes | None = None
        if self._from_signed_line and event.type not in record.SIGNED_TYPES:
            self._add_finding("anchor", event.seq, f"line {event.seq} is not signed, so a check can't begin there")
        elif self._from_signed_line:
            previous = decode_exact(event.facts.get("previous_sig"), record.MAC_BYTES)
            self.log_id = _text(event.facts, "log_id")
            self.key.begin_at_signed_line(event)
            self._segments = 1
            self._coverage_known = False  # the lines that it covers were not fed
        elif event.type == record.TYPE_GENESIS:
            previous = record.ZERO_MAC
            self._segments = 1
            self._first_segment(event)
            if (event.seq, self.segment) != (1, 1):
                self._add_finding("altered", 1, "the genesis line does not say that it is line 1 of segment 1")
        elif event.type == record.TYPE_SEGMENT_OPEN:
            self._first_previous = self._previous_head(event)
            previous = self._first_previous.sig
            self._segments = 1
            self._first_segment(event)
            if self.segment < 2:
                text = f"line {event.seq} opens segment {self.segment}; the first segment begins with a genesis line"
                self._add_finding("segment", event.seq, text)
        else:
            self._add_finding("missing", event.seq, f"the log begins with line {event.seq}: earlier lines are missing")
        self.chain.key_version = self.key.version
        self.chain.begin(self._first_seq, event_bytes, sig, previous)
        if self._from_signed_line and event.type in record.SIGNED_TYPES:
            self._signed_line(event)

    def _first_segment(self, event: Event) -> None:
        """Take log id, audit key and segment from the first line."""
        self.log_id = _text(event.facts, "log_id")
        self.segment = whole_number(event.facts, "segment")
        self.key.begin(event)
        if not _LOG_ID.fullmatch(self.log_id):
            self._add_finding("altered", event.seq, f"line {event.seq} does not name the log's id")
        self._check_format(event)

    def _previous_head(self, event: Event) -> LineRef:
        """The head of the previous file, as a `segment_open` line names it."""
        sig = decode_exact(event.facts.get("previous_sig"), record.MAC_BYTES)
        seq = whole_number(event.facts, "previous_seq")
        if event.facts.keys() != _SEGMENT_OPEN_FACTS or sig is None or seq != event.seq - 1:
            self._add_finding("altered", event.seq, f"line {event.seq} does not have the facts of a segment_open line")
        return LineRef(seq, sig or record.ZERO_MAC)

    # --- lines in order ----------------------------------------------------------------------------------------------

    def _verify_in_order(self, event: Event) -> None:
        """Rules 6 to 9."""
        if self.next_segment and event.type != record.TYPE_SEGMENT_OPEN:
            self._add_finding("segment", event.seq, f"line {event.seq} comes after the end of its segment")
            self.next_segment = 0
        if event.type in record.SIGNED_TYPES:
            self._signed_line(event)
        elif event.type == record.TYPE_SEGMENT_OPEN:
            self._open_segment(event)
        elif event.type == record.TYPE_GENESIS:
            self._add_finding("segment", event.seq, f"line {event.seq} is a genesis line, but not the first line")

    def _open_segment(self, event: Event) -> None:
        facts = event.facts
        named = whole_number(facts, "segment")
        if named != self.next_segment:
            self._add_finding("segment", event.seq, f"line {event.seq} opens segment {named}, not the next one")
        before = self._previous_head(event)
        if self.chain.previous_sig is not None and before.sig != self.chain.previous_sig:
            self._add_finding("segment", event.seq, f"line {event.seq} does not name the head of the segment before")
        # The coverage is now the segment_close line alone. Only `previous_sha256` brings its SIG under a signature.
        if self._coverage_known and facts.get("previous_sha256") != self.coverage.hex():
            self._add_finding(
                "altered", event.seq - 1, f"line {event.seq} was written after another line {event.seq - 1}"
            )
        if (facts.get("log_id"), facts.get("key")) != (self.log_id, self.key.version):
            self._add_finding("foreign", event.seq, f"line {event.seq} opens a segment of another log or audit key")
        active = self.key.public_key
        if active is not None and facts.get("public_key") != encode_text(active):
            self._add_finding("foreign", event.seq, f"line {event.seq} names a public key that is not the active one")
        self._check_format(event)
        self.segment = named
        self._segments += 1
        self.next_segment = 0
        self._begin_coverage()

    def _check_format(self, event: Event) -> None:
        if whole_number(event.facts, "format") != record.FORMAT_VERSION:
            self._add_finding("foreign", event.seq, f"line {event.seq} does not name format {record.FORMAT_VERSION}")

    def _signed_line(self, event: Event) -> None:
        facts = event.facts
        if facts.keys() != _SIGNED_FACTS | _EXTRA_FACTS[event.type]:
            self._add_finding("altered", event.seq, f"line {event.seq} does not have the facts of a {event.type} line")
            return
        if (facts["log_id"], facts["key"]) != (self.log_id, self.key.version):
            self._add_finding("foreign", event.seq, f"line {event.seq} was signed for another log or audit key")
        before = self.chain.previous_sig
        if before is not None and facts["previous_sig"] != encode_text(before):
            self._add_finding("altered", event.seq, f"line {event.seq} was signed after another line {event.seq - 1}")
        covered = (facts["lines"], facts["lines_sha256"])
        if self._coverage_known and covered != (self.coverage.lines_count, self.coverage.hex()):
            first = event.seq - self.coverage.lines_count
            text = f"lines {first} to {event.seq - 1} are not those that the signature of line {event.seq} covers"
            self._add_finding("altered", event.seq - 1, text)
        if self.key.check_signature(event):
            self.covered_seq = event.seq
        self._checkpoints += 1
        if event.type == record.TYPE_SEGMENT_CLOSE:
            self.next_segment = whole_number(facts, "next_segment")
            if self.next_segment < 2 or (self.segment and self.next_segment != self.segment + 1):
                self._add_finding("segment", event.seq, f"line {event.seq} does not name the next segment")
        elif event.type == record.TYPE_AUDIT_KEY:
            self.key.change(event)
            self.chain.key_version = self.key.version

    # --- after each line ---------------------------------------------------------------------------------------------

    def _finish_line(self, event: Event, line: bytes, sig: bytes) -> None:
        """Add the line to the coverage of the next signed line."""
        signed = event.type in record.SIGNED_TYPES
        if signed:
            self._begin_coverage()
        if signed or event.type == record.TYPE_SEGMENT_OPEN:
            self.state = KeyState(whole_number(event.facts, "epoch"), whole_number(event.facts, "tombstones"))
        self.coverage.add(line + b"\n", 1)

    def _begin_coverage(self) -> None:
        self.coverage = Coverage()
        self._coverage_known = True

    def _add_finding(self, kind: Kind, seq: int, text: str) -> Finding:
        finding = Finding(file="", line=0, seq=seq, kind=kind, text=text)
        self._coverage_known = False
        if len(self.findings) < FINDINGS_COUNT_MAX:
            self.findings.append(finding)
        return finding


def _text(facts: Facts, name: str) -> str:
    value = facts.get(name)
    return value if isinstance(value, str) else ""
