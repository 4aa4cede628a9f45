"""The checker: every rule of an audit log, over lines, without I/O.

Owns: what "intact" means. The rules, in the order in which each line meets them (docs/spec/audit.md gives the same):

 1. The line has the exact frame, at most `LINE_BYTES_MAX` bytes, printable ASCII only, and ends in one newline.
 2. The event is valid, in its one canonical form, with a `seq` and a `ts`.
 3. The first line is `genesis` with seq 1, or `segment_open` (rule 10), or the signed line that the caller starts from;
    it names the format, the log's id, a known audit key version and a trusted public key. It is also the first of
    its file, as is every `segment_open`; nothing else is; and its segment is that of the file's name.
 4. `seq` is one more than that of the line before: nothing missing, repeated or moved.
 5. With the audit key: the MAC is that of the previous MAC and this event, under the key version in force.
 6. `genesis` stands first only. After `segment_close` comes `segment_open`, and nowhere else; it names the next
    segment, the same log, key version and public key, the head before it, and the SHA-256 of that line.
 7. A signed line has exactly its facts: this log, the key version in force, the MAC before it, and the number and
    SHA-256 of the lines since the last signed line of its file (inclusive), or since the file's first line.
 8. Its Ed25519 signature is valid under the public key in force.
 9. `audit_key` names a higher key version and its public key, which are in force from the next line on. With the
    audit keys: that public key is a trusted one; a version that is known to have taken over after a certain line does
    so there, and the log does not end under an earlier one.
10. A log whose first line is `segment_open` holds a later `retention` line that names the head before it. With the
    public key alone, one that a signature covers.
11. The last line is not a `segment_close`: the file that it names is there.
12. The expected head, where one is given, is a line of this log.

Invariants: a line is judged only by those before it, in bounded memory; after a fault the checker picks up the chain
again where it can, so that one altered line is one finding; after `FINDINGS_COUNTED_MAX` of them it gives up. It must
never read a file, nor call a log intact that it could not judge to the end.
"""

from __future__ import annotations

import re
from typing import Final

from minikms.audit import record
from minikms.audit.chain import Coverage, base64_bytes, base64_text
from minikms.audit.record import Event, Facts, Head, MalformedLineError
from minikms.audit.rules import (
    FINDINGS_COUNT_MAX,
    FINDINGS_COUNTED_MAX,
    Finding,
    KeyInForce,
    Kind,
    Report,
    Sequence,
    Trust,
    whole_number,
)

_SEGMENT_OPEN_FACTS: Final = frozenset(
    ("format", "key", "log_id", "previous_seq", "previous_sha256", "previous_sig", "public_key", "segment")
)
_OPENING_TYPES: Final = frozenset((record.TYPE_GENESIS, record.TYPE_SEGMENT_OPEN))
_SIGNED_FACTS: Final = frozenset(("key", "lines", "lines_sha256", "log_id", "previous_sig", "signature"))
_LOG_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_EXTRA_FACTS: Final[dict[str, frozenset[str]]] = {
    record.TYPE_CHECKPOINT: frozenset(),
    record.TYPE_SEGMENT_CLOSE: frozenset(("next_segment",)),
    record.TYPE_AUDIT_KEY: frozenset(("next_key", "next_public_key")),
}


class Verifier:
    """Feed it the lines of a log in order, then ask for the report.

    from_signed_line: the first line is one of `record.SIGNED_TYPES`, and what stands before it is taken as it says.
    """

    def __init__(self, trust: Trust, *, expect_head: Head | None = None, from_signed_line: bool = False) -> None:
        self._trust = trust
        self._expect_head = expect_head
        self._expected_seen = False
        self._from_signed_line = from_signed_line
        self._sequence = Sequence(trust.mac_keys, self._found)
        self._file = ""
        self._file_number = 0
        self._file_told = False
        self._line = 0
        self._lines = 0
        self._findings: list[Finding] = []
        self._findings_count = 0
        self._first_seq = 0
        self._first_previous: Head | None = None
        self._retained_seq = 0
        self._log_id = ""
        self._key = KeyInForce(trust, self._found)
        self._segment = 0
        self._segments = 0
        self._next_segment = 0
        self._coverage = Coverage()
        self._coverage_sound = True
        self._checkpoints = 0
        self._covered_seq = 0

    # --- feeding and asking ------------------------------------------------------------------------------------------

    def begin_file(self, name: str, number: int = 0) -> None:
        """The next line is the first of the file `name`; findings name it from here on. number: of the segment that
        the name stands for; 0 where it says none."""
        self._file, self._file_number, self._file_told = name, number, False
        self._line = 0

    def end_file(self) -> None:
        """The file has no more lines."""
        if self._line == 0:
            self._found("missing", 0, f"{self._file} holds no line")
        if self._file_number and self._segment not in (0, self._file_number) and not self._file_told:
            self._found("segment", 0, f"{self._file} holds segment {self._segment}")

    def skip(self) -> None:
        """A line stands here that is not to be judged, since it comes before the one to begin with."""
        self._line += 1

    def feed(self, line: bytes) -> None:
        """Judge the next line, given without its newline."""
        self._line += 1
        self._lines += 1
        try:
            event, event_bytes, sig = record.parse_line(line)
        except MalformedLineError as error:
            self._sequence.malformed(str(error))
            return
        if self._sequence.head is None:
            self._first_line(event, event_bytes, sig)
        elif self._sequence.take(event, event_bytes, sig):
            self._judge(event)
        else:
            return
        self._check_place(event)
        self._settle(event, line, sig)

    def feed_incomplete(self, rest: bytes) -> None:
        """The last bytes of a file that does not end in a newline."""
        self._line += 1
        self._found("incomplete", self._sequence.expected, f"the file ends in {len(rest)} bytes of an incomplete line")

    def fault(self, kind: Kind, text: str) -> None:
        """A fault of a file as a whole, found by who reads it."""
        self._found(kind, 0, text)

    def report(self) -> Report:
        """Judge what only the end can show, and sum up. Call it once."""
        head = self._sequence.last
        last_seq = 0 if head is None else head.seq
        after_expected = None if self.exhausted else self._judge_end(head, last_seq)
        return Report(
            findings=self._findings,
            findings_count=self._findings_count,
            lines=self._lines,
            first_seq=self._first_seq,
            from_signed_line=self._from_signed_line,
            head=head,
            log_id=self._log_id,
            segments=self._segments,
            checkpoints=self._checkpoints,
            covered_seq=self._covered_seq,
            lines_not_covered=min(self._lines, last_seq - self._covered_seq),
            lines_after_expected_head=after_expected,
            key_version=self._key.version,
            public_key=self._key.public_key,
            macs_checked=bool(self._trust.mac_keys),
            given_up=self.exhausted,
        )

    @property
    def exhausted(self) -> bool:
        """Whether there were so many findings that no further line needs to be fed."""
        return self._findings_count >= FINDINGS_COUNTED_MAX

    @property
    def findings(self) -> list[Finding]:
        """So far, at most `FINDINGS_COUNT_MAX`."""
        return self._findings

    @property
    def head(self) -> Head | None:
        return self._sequence.head

    @property
    def coverage(self) -> Coverage:
        """Of the lines since the last signed line, inclusive: where a writer goes on."""
        return self._coverage

    @property
    def segment(self) -> int:
        """Number of the segment that the last line is in; 0 where no line has named it."""
        return self._segment

    @property
    def next_segment(self) -> int:
        """Number of the segment that must come next, when the last line was a `segment_close`; else 0."""
        return self._next_segment

    @property
    def key_version(self) -> int:
        """The audit key version in force after the last line."""
        return self._key.version

    @property
    def log_id(self) -> str:
        """The log's id in hex; empty before the first line."""
        return self._log_id

    # --- the first line ----------------------------------------------------------------------------------------------

    def _first_line(self, event: Event, event_bytes: bytes, sig: bytes) -> None:
        # A genesis line is line 1, whatever its seq reads after an alteration.
        self._first_seq = 1 if event.type == record.TYPE_GENESIS else event.seq
        self._covered_seq = self._first_seq - 1
        previous: bytes | None = None
        if self._from_signed_line and event.type not in record.SIGNED_TYPES:
            self._found("anchor", event.seq, f"line {event.seq} is not a signed line: a check can't begin with it")
        elif self._from_signed_line:
            previous = base64_bytes(event.facts.get("previous_sig"), record.MAC_BYTES)
            self._log_id = _text(event.facts, "log_id")
            self._key.begin_within(event)
            self._segments = 1
            self._coverage_sound = False  # what it covers was not fed
        elif event.type == record.TYPE_GENESIS:
            previous = record.ZERO_MAC
            self._segments = 1
            self._first_segment(event)
            if (event.seq, self._segment) != (1, 1):
                self._found("altered", 1, "the genesis line does not say that it is line 1 of segment 1")
        elif event.type == record.TYPE_SEGMENT_OPEN:
            self._first_previous = self._previous_head(event)
            previous = self._first_previous.sig
            self._segments = 1
            self._first_segment(event)
        else:
            self._found("missing", event.seq, f"the log begins with line {event.seq}: what stood before it is missing")
        self._sequence.key_version = self._key.version
        self._sequence.begin(self._first_seq, event_bytes, sig, previous)
        if self._from_signed_line and event.type in record.SIGNED_TYPES:
            self._signed_line(event)

    def _first_segment(self, event: Event) -> None:
        """Take over the log, the key and the segment that the first line names."""
        self._log_id = _text(event.facts, "log_id")
        self._segment = whole_number(event.facts, "segment")
        self._key.begin(event)
        if not _LOG_ID.fullmatch(self._log_id):
            self._found("altered", event.seq, f"line {event.seq} does not name the log's id")
        self._check_format(event)

    def _previous_head(self, event: Event) -> Head:
        """The head that a `segment_open` line names as the one before it."""
        sig = base64_bytes(event.facts.get("previous_sig"), record.MAC_BYTES)
        seq = whole_number(event.facts, "previous_seq")
        if event.facts.keys() != _SEGMENT_OPEN_FACTS or sig is None or seq != event.seq - 1:
            self._found("altered", event.seq, f"line {event.seq} does not have the facts of a segment_open line")
        return Head(seq, sig or record.ZERO_MAC)

    # --- a line in its place -----------------------------------------------------------------------------------------

    def _judge(self, event: Event) -> None:
        """Rules 6 to 10."""
        if self._next_segment and event.type != record.TYPE_SEGMENT_OPEN:
            self._found("segment", event.seq, f"line {event.seq} stands after the end of its segment")
            self._next_segment = 0
        if event.type in record.SIGNED_TYPES:
            self._signed_line(event)
        elif event.type == record.TYPE_SEGMENT_OPEN:
            self._open_segment(event)
        elif event.type == record.TYPE_GENESIS:
            self._found("segment", event.seq, f"line {event.seq} is a genesis line, which stands first only")
        elif event.type == record.TYPE_RETENTION:
            named = event.facts.get("last_seq"), event.facts.get("last_sig")
            before = self._first_previous
            if before is not None and named == (before.seq, base64_text(before.sig)):
                self._retained_seq = event.seq

    def _open_segment(self, event: Event) -> None:
        facts = event.facts
        named = whole_number(facts, "segment")
        if named != self._next_segment:
            self._found("segment", event.seq, f"line {event.seq} opens segment {named} where none or another was due")
        before = self._previous_head(event)
        if self._sequence.before is not None and before.sig != self._sequence.before:
            self._found("segment", event.seq, f"line {event.seq} does not name the head of the segment before")
        # What is covered by now is the line before, the segment_close: its SIG is in no signature but by this.
        if self._coverage_sound and facts.get("previous_sha256") != self._coverage.hex():
            self._found("altered", event.seq - 1, f"line {event.seq - 1} is not the one that line {event.seq} follows")
        if (facts.get("log_id"), facts.get("key")) != (self._log_id, self._key.version):
            self._found("foreign", event.seq, f"line {event.seq} opens a segment of another log or audit key")
        in_force = self._key.public_key
        if in_force is not None and facts.get("public_key") != base64_text(in_force):
            self._found("foreign", event.seq, f"line {event.seq} names a public key that is not the one in force")
        self._check_format(event)
        self._segment = named
        self._segments += 1
        self._next_segment = 0
        self._begin_coverage()

    def _check_format(self, event: Event) -> None:
        if whole_number(event.facts, "format") != record.FORMAT_VERSION:
            self._found("foreign", event.seq, f"line {event.seq} names a format other than {record.FORMAT_VERSION}")

    def _signed_line(self, event: Event) -> None:
        facts = event.facts
        if facts.keys() != _SIGNED_FACTS | _EXTRA_FACTS[event.type]:
            self._found("altered", event.seq, f"line {event.seq} does not have the facts of a {event.type} line")
            return
        if (facts["log_id"], facts["key"]) != (self._log_id, self._key.version):
            self._found("foreign", event.seq, f"line {event.seq} was signed for another log or audit key")
        before = self._sequence.before
        if before is not None and facts["previous_sig"] != base64_text(before):
            self._found("altered", event.seq, f"line {event.seq} was signed after another line than the one before it")
        covered = (facts["lines"], facts["lines_sha256"])
        if self._coverage_sound and covered != (self._coverage.lines_count, self._coverage.hex()):
            first = event.seq - self._coverage.lines_count
            text = f"lines {first} to {event.seq - 1} are not those that line {event.seq} was signed for"
            self._found("altered", event.seq - 1, text)
        if self._key.signed(event):
            self._covered_seq = event.seq
        self._checkpoints += 1
        if event.type == record.TYPE_SEGMENT_CLOSE:
            self._next_segment = whole_number(facts, "next_segment")
            if self._next_segment < 2 or (self._segment and self._next_segment != self._segment + 1):
                self._found("segment", event.seq, f"line {event.seq} does not name the next segment")
        elif event.type == record.TYPE_AUDIT_KEY:
            self._key.change(event)
            self._sequence.key_version = self._key.version

    def _check_place(self, event: Event) -> None:
        """Rule 3: the first line of each file, and only that, opens the segment that the file is named for."""
        if not self._file or (self._line == 1) == (event.type in _OPENING_TYPES):
            wrong = self._line == 1 and self._file_number not in (0, whole_number(event.facts, "segment"))
            text = f"{self._file} holds segment {whole_number(event.facts, 'segment')}"
        else:
            wrong = True
            text = (
                f"{self._file} does not begin with the first line of a segment"
                if self._line == 1
                else f"line {event.seq} opens a segment within a file"
            )
        if wrong:
            self._file_told = True
            self._found("segment", event.seq, text)

    # --- after each line ---------------------------------------------------------------------------------------------

    def _settle(self, event: Event, line: bytes, sig: bytes) -> None:
        """Take the line into the coverage of the next signed line, and compare it with the expected head."""
        if event.type in record.SIGNED_TYPES:
            self._begin_coverage()
        self._coverage.add(line + b"\n", 1)
        if self._expect_head is not None and event.seq == self._expect_head.seq:
            self._expected_seen = sig == self._expect_head.sig

    def _begin_coverage(self) -> None:
        self._coverage = Coverage()
        self._coverage_sound = True

    def _judge_end(self, head: Head | None, last_seq: int) -> int | None:
        """Rules 9 to 12 at the end. Returns how many lines are newer than the expected head."""
        if head is None and not self._findings_count:
            self._found("missing", 1, "the log holds no line")
        if self._next_segment:
            self._found(
                "missing", last_seq + 1, f"segment {self._next_segment}, which line {last_seq} names, is missing"
            )
        before = self._first_previous
        judged_seq = last_seq if self._trust.mac_keys else self._covered_seq
        if before is not None and not 0 < self._retained_seq <= judged_seq:
            judged = "" if self._trust.mac_keys else " that is signed"
            text = (
                f"the log begins after line {before.seq}, and no retention line{judged} says that what came before was "
                "removed"
            )
            self._found("missing", before.seq, text)
        if head is not None:
            self._key.end(last_seq)
        return self._check_expected_head(last_seq)

    def _check_expected_head(self, last_seq: int) -> int | None:
        expected = self._expect_head
        if expected is None:
            return None
        if last_seq < expected.seq:
            text = f"the log ends at line {last_seq}; line {expected.seq} is known to have been written"
            self._found("truncated", last_seq, text)
            return None
        if not self._expected_seen:
            if expected.seq < self._first_seq:
                text = f"line {expected.seq} is known; the log begins after it, so the two can't be compared"
            else:
                text = f"line {expected.seq} is not the one that is known, or not there"
            self._found("anchor", expected.seq, text)
            return None
        return last_seq - expected.seq

    def _found(self, kind: Kind, seq: int, text: str) -> Finding:
        finding = Finding(file=self._file, line=self._line, seq=seq, kind=kind, text=text)
        self._findings_count += 1
        self._coverage_sound = False
        if len(self._findings) < FINDINGS_COUNT_MAX:
            self._findings.append(finding)
        return finding


def _text(facts: Facts, name: str) -> str:
    value = facts.get(name)
    return value if isinstance(value, str) else ""
