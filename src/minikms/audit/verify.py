"""The checker: every rule of an audit log, over lines, without I/O.

Owns: what "intact" means. The rules, in the order in which each line meets them (docs/spec/audit.md gives the same):

 1. The line has the exact frame, at most `LINE_BYTES_MAX` bytes, printable ASCII only, and ends in one newline.
 2. The event is valid, in its one canonical form, with a `seq` and a `ts`.
 3. The first line is `genesis` with seq 1, or `segment_open` (rule 10), or the checkpoint that the caller starts from;
    it names the format, the log's id, a known audit key version and a trusted public key.
 4. `seq` is one more than that of the line before: nothing missing, repeated or moved.
 5. With the audit key: the MAC is that of the previous MAC and this event, under the key version in force.
 6. `genesis` stands first only. After `segment_close` comes `segment_open`, and nowhere else; it names the next
    segment, the same log, and the head before it.
 7. A signed line names this log, the key version in force, the MAC before it, and the number and SHA-256 of the lines
    since the last signed line of its file.
 8. Its Ed25519 signature is valid under the public key in force.
 9. `audit_key` names the next key version and public key, which are in force from the next line on.
10. A log whose first line is `segment_open` holds a later `retention` line that names the head before it.
11. The expected head, where one is given, is a line of this log.

Invariants: a line is judged only by those before it, in constant memory; after a fault the checker picks up the chain
again where it can, so that one altered line is one finding. It must never read a file, or call a log intact that it
could not judge to the end.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from minikms.audit import chain, record
from minikms.audit.chain import Coverage, base64_bytes, base64_text
from minikms.audit.record import Event, Facts, Head, MalformedLineError
from minikms.audit.signer import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, signature_is_valid

FINDINGS_COUNT_MAX: Final = 100
"""Findings kept with their text; the rest is counted."""

_SEGMENT_OPEN_FACTS: Final = frozenset(
    ("format", "key", "log_id", "previous_seq", "previous_sig", "public_key", "segment")
)
_SIGNED_FACTS: Final = frozenset(("key", "lines", "lines_sha256", "log_id", "previous_sig", "signature"))
_EXTRA_FACTS: Final = {
    record.TYPE_CHECKPOINT: frozenset[str](),
    record.TYPE_SEGMENT_CLOSE: frozenset(("next_segment",)),
    record.TYPE_AUDIT_KEY: frozenset(("next_key", "next_public_key")),
}


class Trust(msgspec.Struct, frozen=True):
    """What the verifier believes in: raw public keys from outside the log, and the audit keys where it has them.

    With `mac_keys` (by version; views, never copied) every line is judged by itself; without, by the signed line
    after it.
    """

    public_keys: frozenset[bytes]
    mac_keys: Mapping[int, memoryview] = {}


class Finding(msgspec.Struct):
    """One fault. line: number of the line in its file, from 1. seq: as far as it is known, else 0."""

    file: str
    line: int
    seq: int
    kind: str
    text: str


class Report(msgspec.Struct):
    """What the verifier found. Counts are of lines; `head` is the last line's, None for an empty log."""

    findings: list[Finding]
    findings_count: int
    lines: int
    first_seq: int
    head: Head | None
    log_id: str
    segments: int
    checkpoints: int
    last_checkpoint_seq: int
    lines_after_checkpoint: int
    lines_after_expected_head: int | None

    @property
    def intact(self) -> bool:
        return self.findings_count == 0 and self.lines > 0


class _Odd(msgspec.Struct):
    """A line that could not take its place in the chain; the next line decides what had happened to it."""

    finding: Finding
    seq: int
    sig: bytes | None


class Verifier:
    """Feed it the lines of a log in order, then ask for the report."""

    def __init__(
        self, trust: Trust, *, expect_head: Head | None = None, from_checkpoint: bool = False, file: str = ""
    ) -> None:
        self._trust = trust
        self._expect_head = expect_head
        self._expected_seen = False
        self._from_checkpoint = from_checkpoint
        self._file = file
        self._line = 0
        self._lines = 0
        self._findings: list[Finding] = []
        self._findings_count = 0
        self._first_seq = 0
        self._first_previous: Head | None = None
        self._head: Head | None = None
        self._before: bytes | None = None
        self._sig_known = True
        self._recomputed: tuple[Finding, bytes] | None = None
        self._odd: _Odd | None = None
        self._log_id = ""
        self._key_version = 0
        self._public_key: bytes | None = None
        self._segment = 0
        self._segments = 0
        self._closed_for = 0
        self._coverage = Coverage()
        self._coverage_sound = True
        self._checkpoints = 0
        self._last_checkpoint_seq = 0
        self._retained: Head | None = None

    # --- feeding -----------------------------------------------------------------------------------------------------

    @property
    def head(self) -> Head | None:
        return self._head

    @property
    def coverage(self) -> Coverage:
        """Of the lines since the last signed line: where a writer goes on."""
        return self._coverage

    @property
    def ends_closed(self) -> bool:
        """Whether the last line was `segment_close`."""
        return self._closed_for > 0

    @property
    def segment(self) -> int:
        """Number of the segment that the last line is in; 0 before the first line."""
        return self._segment

    @property
    def next_segment(self) -> int:
        """Number that the next file must have, after `segment_close`; 0 elsewhere."""
        return self._closed_for

    @property
    def findings(self) -> list[Finding]:
        """So far, at most `FINDINGS_COUNT_MAX`."""
        return self._findings

    @property
    def key_version(self) -> int:
        """The audit key version in force after the last line."""
        return self._key_version

    @property
    def log_id(self) -> str:
        """The log's id in hex; empty before the first line."""
        return self._log_id

    def _last_seq(self) -> int:
        return 0 if self._head is None else self._head.seq

    def begin_file(self, name: str) -> None:
        """The next line is the first of the file `name`; findings name it from here on."""
        self._file = name
        self._line = 0

    def feed(self, line: bytes) -> None:
        """Judge the next line, given without its newline."""
        self._line += 1
        self._lines += 1
        try:
            event, event_bytes, sig = record.parse_line(line)
        except MalformedLineError as error:
            self._malformed(str(error))
        else:
            if self._head is None:
                self._begin(event, event_bytes, sig)
                self._settle(event, line)
            elif self._take_place(event, event_bytes, sig):
                self._judge(event)
                self._settle(event, line)

    def feed_incomplete(self, rest: bytes) -> None:
        """The last bytes of a file that does not end in a newline."""
        self._line += 1
        expected = self._last_seq() + 1
        self._found("incomplete", expected, f"the file ends in {len(rest)} bytes of an incomplete line")

    def fault(self, kind: str, text: str) -> None:
        """A fault that lies in a file as a whole, for the workflow that reads files."""
        self._found(kind, 0, text)

    def report(self) -> Report:
        """Judge what only the end can show, and sum up. Call it once."""
        head = self._head
        if self._odd is not None and self._odd.seq and head is not None and self._odd.seq > head.seq:
            head = Head(self._odd.seq, self._odd.sig or record.ZERO_MAC)
        if head is None and not self._findings_count:
            self._found("empty", 0, "the log holds no line")
        if self._first_previous is not None and self._retained != self._first_previous:
            self._found(
                "missing",
                self._first_previous.seq,
                f"the log begins after line {self._first_previous.seq}, and no retention line says that the "
                "lines up to it were removed",
            )
        after_expected = self._check_expected_head(head)
        return Report(
            findings=self._findings,
            findings_count=self._findings_count,
            lines=self._lines,
            first_seq=self._first_seq,
            head=head,
            log_id=self._log_id,
            segments=self._segments,
            checkpoints=self._checkpoints,
            last_checkpoint_seq=self._last_checkpoint_seq,
            lines_after_checkpoint=head.seq - max(self._last_checkpoint_seq, self._first_seq - 1) if head else 0,
            lines_after_expected_head=after_expected,
        )

    # --- the first line ----------------------------------------------------------------------------------------------

    def _begin(self, event: Event, event_bytes: bytes, sig: bytes) -> None:
        self._first_seq = event.seq
        previous: bytes | None = None
        if self._from_checkpoint:
            previous = self._begin_at_checkpoint(event)
        elif event.type == record.TYPE_GENESIS:
            previous = record.ZERO_MAC
            if event.seq != 1:
                self._found("sequence", event.seq, f"the genesis line has seq {event.seq}, not 1")
            self._enter_segment(event, 1)
        elif event.type == record.TYPE_SEGMENT_OPEN:
            self._first_previous = before = self._previous_head(event)
            previous = before.sig
            self._enter_segment(event, None)
        else:
            self._found("missing", event.seq, f"the log begins with line {event.seq}: the lines before it are missing")
        if previous is not None and self._check_key_version(event) and not self._mac_fits(previous, event_bytes, sig):
            self._found("altered", event.seq, f"line {event.seq} was altered: its MAC does not fit its event")
        self._head = Head(event.seq, sig)

    def _begin_at_checkpoint(self, event: Event) -> bytes | None:
        if event.type not in record.SIGNED_TYPES:
            self._found("anchor", event.seq, f"line {event.seq} is not a checkpoint, so the check can't start there")
            return None
        self._key_version = _int_fact(event.facts, "key")
        self._log_id = _text_fact(event.facts, "log_id")
        self._coverage_sound = False  # the lines that it covers lie before the start
        self._segments = 1
        self._signed_line(event)
        return base64_bytes(event.facts.get("previous_sig"), record.MAC_BYTES)

    def _previous_head(self, event: Event) -> Head:
        sig = base64_bytes(event.facts.get("previous_sig"), record.MAC_BYTES)
        seq = _int_fact(event.facts, "previous_seq")
        if sig is None or seq != event.seq - 1:
            self._found("altered", event.seq, f"line {event.seq} does not name the head before its segment")
        return Head(seq, sig or record.ZERO_MAC)

    def _enter_segment(self, event: Event, number: int | None) -> None:
        """Rules 3 and 6 for a `genesis` or `segment_open` line: takes over its log, key and segment number."""
        facts = event.facts
        self._segment = _int_fact(facts, "segment")
        self._segments += 1
        self._closed_for = 0
        self._coverage = Coverage()
        self._coverage_sound = True
        public_key = base64_bytes(facts.get("public_key"), PUBLIC_KEY_BYTES)
        log_id, key_version = _text_fact(facts, "log_id"), _int_fact(facts, "key")
        if _int_fact(facts, "format") != record.FORMAT_VERSION:
            self._found("format", event.seq, f"line {event.seq} names a format that this verifier does not know")
        if number is not None and self._segment != number:
            self._found("segment", event.seq, f"line {event.seq} opens segment {self._segment}, not {number}")
        if self._head is None:
            self._log_id, self._key_version = log_id, key_version
            if public_key is None or public_key not in self._trust.public_keys:
                self._found("foreign", event.seq, "the log names a public key that is not the trusted one")
            else:
                self._public_key = public_key
        elif (log_id, key_version) != (self._log_id, self._key_version):
            self._found("foreign", event.seq, f"line {event.seq} opens a segment of another log or audit key")
        elif self._public_key is not None and public_key != self._public_key:
            self._found("foreign", event.seq, f"line {event.seq} names a public key that is not the one in force")

    # --- every line --------------------------------------------------------------------------------------------------

    def _take_place(self, event: Event, event_bytes: bytes, sig: bytes) -> bool:
        """Rules 4 and 5. True when the line is the next of the chain, as far as can be told."""
        expected = self._last_seq() + 1
        odd, self._odd = self._odd, None
        if odd is not None and event.seq != expected:
            if event.seq == expected + 1 and (odd.sig is None or self._mac_fits(odd.sig, event_bytes, sig)):
                if odd.sig is not None:
                    odd.finding.kind = "altered"
                    odd.finding.seq = expected
                    odd.finding.text = f"line {expected} was altered: its seq reads {odd.seq}"
                self._move_to(expected, odd.sig)
                expected += 1
            elif odd.seq and event.seq == odd.seq + 1 > expected:
                self._move_to(odd.seq, odd.sig)
                expected = odd.seq + 1
        if event.seq != expected:
            self._out_of_place(event, sig, expected)
            return False
        self._check_mac(event, event_bytes, sig)
        self._head = Head(event.seq, sig)
        self._sig_known = True
        return True

    def _move_to(self, seq: int, sig: bytes | None) -> None:
        self._head = Head(seq, sig or record.ZERO_MAC)
        self._before = sig
        self._sig_known = sig is not None
        self._recomputed = None

    def _out_of_place(self, event: Event, sig: bytes, expected: int) -> None:
        if event.seq > expected:
            last = event.seq - 1
            span = f"line {expected} is" if last == expected else f"lines {expected} to {last} are"
            finding = self._found("missing", expected, f"{span} missing: line {event.seq} stands there")
        else:
            finding = self._found(
                "repeated",
                event.seq,
                f"line {event.seq} stands a second time, or out of order, after line {expected - 1}",
            )
        self._odd = _Odd(finding, event.seq, sig)

    def _malformed(self, reason: str) -> None:
        expected = self._last_seq() + 1
        finding = self._found("malformed", expected, f"where line {expected} belongs: {reason}")
        if self._odd is None:
            self._odd = _Odd(finding, 0, None)

    def _check_mac(self, event: Event, event_bytes: bytes, sig: bytes) -> None:
        suspect, self._recomputed = self._recomputed, None
        head = self._head
        if head is None or not self._sig_known or not self._trust.mac_keys:
            return
        key = self._trust.mac_keys.get(self._key_version)
        if key is None:
            return
        expected = chain.mac(key, head.sig, event_bytes)
        if hmac.compare_digest(expected, sig):
            return
        if suspect is not None and hmac.compare_digest(chain.mac(key, suspect[1], event_bytes), sig):
            suspect[0].text = f"the sig of line {event.seq - 1} was altered; its event is genuine"
            return
        finding = self._found(
            "altered", event.seq, f"line {event.seq} was altered: its MAC does not fit its event and the line before"
        )
        self._recomputed = (finding, expected)

    def _mac_fits(self, previous: bytes, event_bytes: bytes, sig: bytes) -> bool:
        key = self._trust.mac_keys.get(self._key_version)
        return key is None or hmac.compare_digest(chain.mac(key, previous, event_bytes), sig)

    def _check_key_version(self, event: Event) -> bool:
        if self._trust.mac_keys and self._key_version not in self._trust.mac_keys:
            self._found(
                "foreign",
                event.seq,
                f"line {event.seq} names audit key version {self._key_version}, which is not known",
            )
            return False
        return True

    def _judge(self, event: Event) -> None:
        """Rules 6 to 9, for a line in its place."""
        if self._closed_for and event.type != record.TYPE_SEGMENT_OPEN:
            self._found("segment", event.seq, f"line {event.seq} stands after the end of its segment")
            self._closed_for = 0
        if event.type in record.SIGNED_TYPES:
            self._signed_line(event)
        elif event.type == record.TYPE_SEGMENT_OPEN:
            self._next_segment(event)
        elif event.type == record.TYPE_GENESIS:
            self._found("segment", event.seq, f"line {event.seq} is a genesis line, which stands first only")
        elif event.type == record.TYPE_RETENTION:
            self._retention(event)

    def _next_segment(self, event: Event) -> None:
        if not self._closed_for:
            self._found("segment", event.seq, f"line {event.seq} opens a segment inside another")
        before = self._previous_head(event)
        if self._sig_known and self._before is not None and before.sig != self._before:
            self._found("segment", event.seq, f"line {event.seq} does not name the head of the segment before")
        self._enter_segment(event, self._closed_for or None)

    def _retention(self, event: Event) -> None:
        sig = base64_bytes(event.facts.get("last_sig"), record.MAC_BYTES)
        removed = Head(_int_fact(event.facts, "last_seq"), sig or record.ZERO_MAC)
        if removed == self._first_previous:
            self._retained = removed

    def _signed_line(self, event: Event) -> None:
        facts = event.facts
        names = _SIGNED_FACTS | _EXTRA_FACTS[event.type]
        if facts.keys() != names:
            self._found("altered", event.seq, f"line {event.seq} does not have the facts of a {event.type} line")
            return
        if (facts["log_id"], facts["key"]) != (self._log_id, self._key_version):
            self._found("foreign", event.seq, f"line {event.seq} was signed for another log or audit key")
        if self._before is not None and self._sig_known and facts["previous_sig"] != base64_text(self._before):
            self._found("altered", event.seq, f"line {event.seq} was signed after another line than the one before it")
        covered = (facts["lines"], facts["lines_sha256"])
        if self._coverage_sound and covered != (self._coverage.lines_count, self._coverage.hex()):
            first = event.seq - self._coverage.lines_count
            self._found(
                "altered",
                event.seq,
                f"lines {first} to {event.seq - 1} are not those that line {event.seq} was signed for",
            )
        self._check_signature(event)
        self._checkpoints += 1
        self._last_checkpoint_seq = event.seq
        if event.type == record.TYPE_SEGMENT_CLOSE:
            self._closed_for = _int_fact(facts, "next_segment")
            if self._segment and self._closed_for != self._segment + 1:
                self._found("segment", event.seq, f"line {event.seq} names segment {self._closed_for} as the next")
            self._segment = self._closed_for - 1
        elif event.type == record.TYPE_AUDIT_KEY:
            self._next_key(event)

    def _check_signature(self, event: Event) -> None:
        signature = base64_bytes(event.facts["signature"], SIGNATURE_BYTES) or b""
        message = chain.signed_message(event)
        keys = self._trust.public_keys if self._public_key is None else (self._public_key,)
        for key in keys:
            if signature_is_valid(key, signature, message):
                self._public_key = key
                return
        self._found("signature", event.seq, f"line {event.seq} has a signature that the public key does not confirm")

    def _next_key(self, event: Event) -> None:
        version = _int_fact(event.facts, "next_key")
        public_key = base64_bytes(event.facts["next_public_key"], PUBLIC_KEY_BYTES)
        if version <= self._key_version or public_key is None:
            self._found("altered", event.seq, f"line {event.seq} does not name a next audit key")
            return
        self._key_version, self._public_key = version, public_key
        self._check_key_version(event)

    def _settle(self, event: Event, line: bytes) -> None:
        """Take the line into the coverage of the next signed line, and compare it with the expected head."""
        if event.type in record.SIGNED_TYPES:
            self._coverage = Coverage()
            self._coverage_sound = True
        self._coverage.add(line + b"\n", 1)
        head = self._head
        if head is not None:
            self._before = head.sig
            if self._expect_head is not None and head.seq == self._expect_head.seq:
                self._expected_seen = head.sig == self._expect_head.sig

    def _check_expected_head(self, head: Head | None) -> int | None:
        expected = self._expect_head
        if expected is None:
            return None
        last = 0 if head is None else head.seq
        if last < expected.seq:
            self._found(
                "truncated", expected.seq, f"the log ends at line {last}; line {expected.seq} is known to exist"
            )
            return None
        if not self._expected_seen:
            self._found("anchor", expected.seq, f"line {expected.seq} is not the one that is known")
            return None
        return last - expected.seq

    def _found(self, kind: str, seq: int, text: str) -> Finding:
        finding = Finding(file=self._file, line=self._line, seq=seq, kind=kind, text=text)
        self._findings_count += 1
        self._coverage_sound = False
        if len(self._findings) < FINDINGS_COUNT_MAX:
            self._findings.append(finding)
        return finding


def check(lines: Iterable[bytes], trust: Trust, *, expect_head: Head | None = None) -> Report:
    """The report on a whole log, given as lines without their newlines."""
    verifier = Verifier(trust, expect_head=expect_head)
    for line in lines:
        verifier.feed(line)
    return verifier.report()


def _int_fact(facts: Facts, name: str) -> int:
    value = facts.get(name)
    return value if isinstance(value, int) else 0


def _text_fact(facts: Facts, name: str) -> str:
    value = facts.get(name)
    return value if isinstance(value, str) else ""
