"""The verdict on a whole audit log, which a daemon never makes: it stops at the first fault.

Owns: the rules of `minikms.audit.verify` about files and the end of a log, finding the next line that continues the
chain after a fault, and `VerificationReport`. Invariants:

- A report is intact only if there is no finding, and a MAC or a signature covers the lines that were verified to the
  end.
- Each fault is one finding. A line whose `seq` is not the next one enters the chain only if a later line shows its
  position. A later line may make the finding more precise: the line was moved, or only its `seq` or its `sig` was
  altered.
- Memory is bounded by `FINDINGS_COUNT_MAX` and `REMEMBERED_COUNT_MAX`. The verifier gives up after
  `FINDINGS_COUNTED_MAX` findings.

It must never do I/O or copy a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from minikms.api.base64 import encode_text
from minikms.audit import chain, record
from minikms.audit.record import Event, LineRef
from minikms.audit.rules import AddFinding, ChainTracker, Finding, Kind, Trust, whole_number
from minikms.audit.verify import Verifier

FINDINGS_COUNTED_MAX: Final = 10_000
"""A verification ends after this number of findings, to bound its time: a small compressed file may contain any number
of lines, and further findings would add no information."""
_OPENING_TYPES: Final = frozenset((record.TYPE_GENESIS, record.TYPE_SEGMENT_OPEN))


class VerificationReport(msgspec.Struct):
    """The result of a verification.

    lines, lines_not_covered, lines_after_expected_head: numbers of lines; the last is None if no head was expected.
    head: the head after the last line, None for an empty log. from_signed_line: the verification began at a signed line
    and read nothing before it. covered_seq: the `seq` of the last line that a valid signature covers. key_version,
    public_key: the audit key that is active at the end; public_key is None if no line names it. given_up: the
    verification stopped early because of too many findings.
    """

    findings: list[Finding]
    findings_count: int
    lines: int
    first_seq: int
    from_signed_line: bool
    head: LineRef | None
    log_id: str
    segments: int
    checkpoints: int
    covered_seq: int
    lines_not_covered: int
    lines_after_expected_head: int | None
    key_version: int
    public_key: bytes | None
    macs_checked: bool
    given_up: bool

    @property
    def conclusive(self) -> bool:
        """Whether the MACs were checked or a valid signature covers a line. Otherwise the result is unknown."""
        return self.lines > 0 and (self.macs_checked or self.covered_seq >= self.first_seq)

    @property
    def intact(self) -> bool:
        return self.findings_count == 0 and self.conclusive


REMEMBERED_COUNT_MAX: Final = 1000
"""Missing lines, and lines that occur before their position, that are remembered by `seq` to explain later lines."""


class _Misplaced(msgspec.Struct):
    """A line that did not continue the chain; the next line may show why. A malformed line has seq 0 and sig None."""

    finding: Finding
    seq: int
    sig: bytes | None


class ResumingChain(ChainTracker):
    """Goes on after a fault, with the line that later lines show to be in its place."""

    def __init__(self, mac_keys: Mapping[int, memoryview], add_finding: AddFinding) -> None:
        super().__init__(mac_keys, add_finding)
        self._misplaced: _Misplaced | None = None
        self._recomputed: tuple[Finding, bytes] | None = None
        """Finding about the MAC of the previous line, and the MAC that would be correct."""
        self._early: dict[int, bytes] = {}
        """`seq` → MAC of lines that occurred before their position."""
        self._missing: dict[int, Finding] = {}
        """`seq` → finding of missing lines."""

    @property
    def last(self) -> LineRef | None:
        """The last line of the log, even if it did not continue the chain."""
        misplaced = self._misplaced
        if misplaced is not None and misplaced.sig is not None and misplaced.seq >= self.expected:
            return LineRef(misplaced.seq, misplaced.sig)
        return self.head

    def take(self, event: Event, event_bytes: bytes, sig: bytes) -> bool:
        misplaced, self._misplaced = self._misplaced, None
        if misplaced is not None:
            self._explain(misplaced, event, event_bytes, sig)
        if event.seq > self.expected and (early := self._early.pop(self.expected, None)) is not None:
            self._enter(self.expected, early)
        return super().take(event, event_bytes, sig)

    def add_malformed(self, reason: str) -> Finding:
        finding = super().add_malformed(reason)
        if self._misplaced is None:
            self._misplaced = _Misplaced(finding, 0, None)
        return finding

    def _explain(self, misplaced: _Misplaced, event: Event, event_bytes: bytes, sig: bytes) -> None:
        """Use the next line to decide whether a misplaced line was moved, has an altered `seq`, or follows a gap."""
        expected = self.expected
        if event.seq == expected:
            if misplaced.seq > expected:
                misplaced.finding.kind, misplaced.finding.seq = "moved", misplaced.seq
                misplaced.finding.text = f"line {misplaced.seq} is out of order: it comes before line {expected}"
        elif event.seq == expected + 1 and (misplaced.sig is None or self._fits(misplaced.sig, event_bytes, sig)):
            if misplaced.sig is not None:
                misplaced.finding.kind, misplaced.finding.seq = "altered", expected
                misplaced.finding.text = f"line {expected} was altered: its seq reads {misplaced.seq}"
                self._early.pop(misplaced.seq, None)
                self._missing = {seq: lost for seq, lost in self._missing.items() if lost is not misplaced.finding}
            self._enter(expected, misplaced.sig)
        elif misplaced.seq > expected and event.seq == misplaced.seq + 1:
            self._early.pop(misplaced.seq, None)
            self._enter(misplaced.seq, misplaced.sig)

    def _add_out_of_order(self, event: Event, sig: bytes) -> Finding:
        expected, seq = self.expected, event.seq
        finding = None if seq > expected else self._missing.pop(seq, None)
        if finding is None:
            finding = super()._add_out_of_order(event, sig)
            for lost in range(expected, min(seq, expected + REMEMBERED_COUNT_MAX - len(self._missing))):
                self._missing[lost] = finding
            if seq > expected and len(self._early) < REMEMBERED_COUNT_MAX:
                self._early[seq] = sig
        else:
            finding.kind, finding.seq = "moved", seq
            finding.text = f"line {seq} is out of order: it comes after line {expected - 1}"
        self._misplaced = _Misplaced(finding, seq, sig)
        return finding

    def _check_mac(self, event: Event, event_bytes: bytes, sig: bytes) -> None:
        suspect, self._recomputed = self._recomputed, None
        key = self._mac_keys.get(self.key_version)
        if key is None or self._sig is None or self._fits(self._sig, event_bytes, sig):
            return
        if suspect is not None and self._fits(suspect[1], event_bytes, sig):
            suspect[0].text = f"the sig of line {event.seq - 1} was altered; its event is genuine"
            return
        self._recomputed = (self._add_altered(event), chain.mac(key, self._sig, event_bytes))


class LogVerifier(Verifier):
    """Verifies the lines of the files of a log in order: `begin_file` and `end_file` around each file, `feed` for each
    line, then `report`.

    expect_head: a line that the log must have.
    """

    def __init__(self, trust: Trust, *, expect_head: LineRef | None = None, from_signed_line: bool = False) -> None:
        super().__init__(trust, from_signed_line=from_signed_line)
        self.chain = self._resuming = ResumingChain(trust.mac_keys, self._add_finding)
        self._trust = trust
        self._expect_head = expect_head
        self._expected_seen = False
        self._file = ""
        self._file_number = 0
        self._file_has_finding = False
        self._line = 0
        self._lines = 0
        self._findings_count = 0
        self._retained_seq = 0

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
        self._line += 1
        self._lines += 1
        super().feed(line)

    def feed_incomplete(self, rest: bytes) -> None:
        """The last bytes of a file that does not end in a newline."""
        self._line += 1
        self._add_finding("incomplete", self.chain.expected, f"the file ends with {len(rest)} bytes of a line")

    def fault(self, kind: Kind, text: str) -> None:
        """Add a finding about a whole file."""
        self._add_finding(kind, 0, text)

    def report(self) -> VerificationReport:
        """Apply the rules about the end of the log, and make the report. Call it once."""
        head = self._resuming.last
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

    # --- each line ---------------------------------------------------------------------------------------------------

    def _finish_line(self, event: Event, line: bytes, sig: bytes) -> None:
        self._check_place(event)
        super()._finish_line(event, line, sig)
        if self._expect_head is not None and event.seq == self._expect_head.seq:
            self._expected_seen = sig == self._expect_head.sig
        before = self._first_previous
        if event.type == record.TYPE_RETENTION and before is not None:
            named = event.facts.get("last_seq"), event.facts.get("last_sig")
            if named == (before.seq, encode_text(before.sig)):
                self._retained_seq = event.seq

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

    def _add_finding(self, kind: Kind, seq: int, text: str) -> Finding:
        finding = super()._add_finding(kind, seq, text)
        finding.file, finding.line = self._file, self._line
        self._findings_count += 1
        return finding

    # --- the end -----------------------------------------------------------------------------------------------------

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
        newest = max(self._trust.since, default=0)
        if head is not None and self.key.version < newest:
            text = (
                f"the log ends under audit key version {self.key.version}, but version {newest} was introduced after "
                f"line {self._trust.since[newest].seq}: lines are missing, or the next start has to complete the change"
            )
            self._add_finding("truncated", last_seq, text)
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
