"""The verifier: every rule of an audit log, applied to lines, without I/O.

Owns: the definition of an intact log. The rules, in the order in which they apply to a line (docs/spec/audit.md has the
same list):

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

Invariants: the verdict on a line depends only on earlier lines; memory is bounded; after a fault the verifier resumes
the chain if it can, so one altered line is one finding; it gives up after `FINDINGS_COUNTED_MAX` findings. It must
never read a file, nor call a log intact that it did not verify to the end.
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
    FINDINGS_COUNTED_MAX,
    ChainTracker,
    Finding,
    KeyTracker,
    Kind,
    Trust,
    VerificationReport,
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
_OPENING_TYPES: Final = frozenset((record.TYPE_GENESIS, record.TYPE_SEGMENT_OPEN))
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
    """Verifies lines: call `feed` for each line of a log in order, then `report`.

    from_signed_line: the first line has a type of `record.SIGNED_TYPES`, and its facts about earlier lines are trusted.

    findings: so far, at most `FINDINGS_COUNT_MAX`. log_id: in hex, empty before the first line. segment: number of the
    last line's segment, 0 until a line names it. next_segment: number of the segment that must come next if the last
    line was a `segment_close`, else 0. coverage: the lines since the last signed line (inclusive), which the next
    signed line has to cover. state: of the key files, according to the last line that names it. chain, key: the last
    line and the active audit key so far. covered_seq: the last line so far with a valid signature, which covers all
    lines before it.
    """

    def __init__(self, trust: Trust, *, expect_head: LineRef | None = None, from_signed_line: bool = False) -> None:
        self._trust = trust
        self._expect_head = expect_head
        self._expected_seen = False
        self._from_signed_line = from_signed_line
        self.chain = ChainTracker(trust.mac_keys, self._add_finding)
        self._file = ""
        self._file_number = 0
        self._file_has_finding = False
        self._line = 0
        self._lines = 0
        self.findings: list[Finding] = []
        self._findings_count = 0
        self._first_seq = 0
        self._first_previous: LineRef | None = None
        self._retained_seq = 0
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

    # --- feeding and asking ------------------------------------------------------------------------------------------

    def begin_file(self, name: str, number: int = 0) -> None:
        """The next line is the first one of the file `name`. number: of its segment, 0 if the name has none."""
        self._file, self._file_number, self._file_has_finding = name, number, False
        self._line = 0

    def end_file(self) -> None:
        """The file has no more lines."""
        if self._line == 0:
            self._add_finding("missing", 0, f"{self._file} holds no line")
        if self._file_number and self.segment not in (0, self._file_number) and not self._file_has_finding:
            self._add_finding("segment", 0, f"{self._file} holds segment {self.segment}")

    def skip(self) -> None:
        """Count a line of the file that comes before the line to begin with."""
        self._line += 1

    def feed(self, line: bytes) -> None:
        """Verify the next line, given without its newline."""
        self._line += 1
        self._lines += 1
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
        self._check_place(event)
        self._finish_line(event, line, sig)

    def feed_incomplete(self, rest: bytes) -> None:
        """The last bytes of a file that does not end in a newline."""
        self._line += 1
        self._add_finding("incomplete", self.chain.expected, f"the file ends with {len(rest)} bytes of a line")

    def fault(self, kind: Kind, text: str) -> None:
        """Add a finding about a whole file."""
        self._add_finding(kind, 0, text)

    def report(self) -> VerificationReport:
        """Apply the rules about the end of the log, and make the report. Call it once."""
        head = self.chain.last
        last_seq = 0 if head is None else head.seq
        after_expected = None if self.exhausted else self._verify_end(head, last_seq)
        return VerificationReport(
            findings=self.findings,
            findings_count=self._findings_count,
            lines=self._lines,
            first_seq=self._first_seq,
            from_signed_line=self._from_signed_line,
            head=head,
            log_id=self.log_id,
            segments=self._segments,
            checkpoints=self._checkpoints,
            covered_seq=self.covered_seq,
            lines_not_covered=min(self._lines, last_seq - self.covered_seq),
            lines_after_expected_head=after_expected,
            key_version=self.key.version,
            public_key=self.key.public_key,
            macs_checked=bool(self._trust.mac_keys),
            given_up=self.exhausted,
        )

    @property
    def exhausted(self) -> bool:
        """Whether the number of findings ends the verification."""
        return self._findings_count >= FINDINGS_COUNTED_MAX

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
        """Rules 6 to 10."""
        if self.next_segment and event.type != record.TYPE_SEGMENT_OPEN:
            self._add_finding("segment", event.seq, f"line {event.seq} comes after the end of its segment")
            self.next_segment = 0
        if event.type in record.SIGNED_TYPES:
            self._signed_line(event)
        elif event.type == record.TYPE_SEGMENT_OPEN:
            self._open_segment(event)
        elif event.type == record.TYPE_GENESIS:
            self._add_finding("segment", event.seq, f"line {event.seq} is a genesis line, but not the first line")
        elif event.type == record.TYPE_RETENTION:
            named = event.facts.get("last_seq"), event.facts.get("last_sig")
            before = self._first_previous
            if before is not None and named == (before.seq, encode_text(before.sig)):
                self._retained_seq = event.seq

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

    def _check_place(self, event: Event) -> None:
        """Rule 3: the first line of each file, and no other line, opens the segment of the file's name."""
        first = self._line == 1
        if self._file and first and event.type not in _OPENING_TYPES:
            text = f"{self._file} does not begin with the first line of a segment"
        elif self._file and not first and event.type in _OPENING_TYPES:
            text = f"line {event.seq} opens a segment within a file"
        elif first and self._file_number not in (0, segment := whole_number(event.facts, "segment")):
            text = f"{self._file} holds segment {segment}"
        else:
            return
        self._file_has_finding = True
        self._add_finding("segment", event.seq, text)

    # --- after each line ---------------------------------------------------------------------------------------------

    def _finish_line(self, event: Event, line: bytes, sig: bytes) -> None:
        """Add the line to the coverage of the next signed line, and compare it with the expected head."""
        signed = event.type in record.SIGNED_TYPES
        if signed:
            self._begin_coverage()
        if signed or event.type == record.TYPE_SEGMENT_OPEN:
            self.state = KeyState(whole_number(event.facts, "epoch"), whole_number(event.facts, "tombstones"))
        self.coverage.add(line + b"\n", 1)
        if self._expect_head is not None and event.seq == self._expect_head.seq:
            self._expected_seen = sig == self._expect_head.sig

    def _begin_coverage(self) -> None:
        self.coverage = Coverage()
        self._coverage_known = True

    def _verify_end(self, head: LineRef | None, last_seq: int) -> int | None:
        """Rules 9 to 12 at the end of the log. Returns the number of lines after the expected head."""
        if head is None and not self._findings_count:
            self._add_finding("missing", 1, "the log holds no line")
        if self.next_segment:
            self._add_finding(
                "missing", last_seq + 1, f"segment {self.next_segment}, which line {last_seq} names, is missing"
            )
        before = self._first_previous
        verified_seq = last_seq if self._trust.mac_keys else self.covered_seq
        if before is not None and not 0 < self._retained_seq <= verified_seq:
            kind = "retention line" if self._trust.mac_keys else "signed retention line"
            text = f"the log begins after line {before.seq}, and no {kind} says that the earlier lines were removed"
            self._add_finding("missing", before.seq, text)
        if head is not None:
            self.key.end(last_seq)
        return self._check_expected_head(last_seq)

    def _check_expected_head(self, last_seq: int) -> int | None:
        expected = self._expect_head
        if expected is None:
            return None
        if last_seq < expected.seq:
            text = f"the log ends at line {last_seq}, but the expected line {expected.seq} was written"
            self._add_finding("truncated", last_seq, text)
            return None
        if not self._expected_seen:
            if expected.seq < self._first_seq:
                text = f"the log begins after the expected line {expected.seq}, so that line can't be compared"
            else:
                text = f"line {expected.seq} is not the expected one, or is missing"
            self._add_finding("anchor", expected.seq, text)
            return None
        return last_seq - expected.seq

    def _add_finding(self, kind: Kind, seq: int, text: str) -> Finding:
        finding = Finding(file=self._file, line=self._line, seq=seq, kind=kind, text=text)
        self._findings_count += 1
        self._coverage_known = False
        if len(self.findings) < FINDINGS_COUNT_MAX:
            self.findings.append(finding)
        return finding


def _text(facts: Facts, name: str) -> str:
    value = facts.get(name)
    return value if isinstance(value, str) else ""
