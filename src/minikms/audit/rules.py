"""What a verifier is given to believe in, and what it answers.

Owns: the shapes `Trust`, `Finding` and `Report`. Invariants: a report is intact only when lines were judged, by a MAC
or by a signature that covers them, and no finding was made, kept or only counted. It must never hold key bytes.

Where a line stands in the chain, and what happened when it doesn't.

Owns: the verifier's rules on `seq` and MAC, and picking the chain up again after a fault. Invariants: a line takes its
place only when its `seq` is the next; every departure is one finding, told once more exactly when a later line shows
what it was (a line moved, a `seq` altered, only a `sig` altered). Memory is bounded by `REMEMBERED_COUNT_MAX`. It
must never accept a line silently because an earlier one was at fault: where a MAC can't be judged, there is a finding
already.

Which audit key is in force, as the lines of a log tell it.

Owns: the verifier's rules 8 and 9: signatures, changes of the key, and where a known version must have taken over.
Invariant: whatever a line claims, a key becomes one in force only with a finding, or because a key that was in force
signed for it, or because the verifier was given it. It must never judge a MAC: that is for `sequence`.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec

from minikms.audit import chain, record
from minikms.audit.chain import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, base64_bytes, base64_text, signature_is_valid
from minikms.audit.record import Event, Facts, Head

FINDINGS_COUNT_MAX: Final = 100
"""Findings kept with their text; the rest is counted."""
FINDINGS_COUNTED_MAX: Final = 10_000
"""After so many a check ends: more would say nothing new, and a file may unpack to any number of false lines."""

Kind = Literal[
    "altered",  # a line, its MAC or what a signed line covers is not what was written
    "anchor",  # a line that the caller knows is another one
    "foreign",  # a line of another log, or under a key that is not trusted
    "incomplete",  # the log ends within a line
    "malformed",  # not a line of an audit log
    "missing",  # lines or files are not there
    "moved",  # a line stands in another place
    "repeated",  # a line stands a second time
    "segment",  # a file is not the one that belongs there
    "signature",  # a signature that the public key does not confirm
    "truncated",  # the log ends before a line that the caller knows
]


class Trust(msgspec.Struct, frozen=True):
    """What the verifier believes in: raw public keys from outside the log, and the audit keys where it has them.

    With `mac_keys` (by version; views, never copied) every line is judged by itself; without, by the signed line after
    it. `since` says after which line a version took over from the one before, where that is remembered: so that who has
    got an earlier key can't write another log with it.
    """

    public_keys: frozenset[bytes]
    mac_keys: Mapping[int, memoryview] = {}
    since: Mapping[int, Head] = {}


class Finding(msgspec.Struct):
    """One fault. line: number of the line in its file, from 1. seq: of the line that it is about, 0 if of none."""

    file: str
    line: int
    seq: int
    kind: Kind
    text: str


Found = Callable[[Kind, int, str], Finding]
"""Makes a finding: its kind, the seq of the line, a sentence without its full stop."""


class Report(msgspec.Struct):
    """What the verifier found. Counts are of lines; `head` is the last line's, None for an empty log.

    from_signed_line: what stands before the first line was not looked at. covered_seq: the last line that a valid
    signature answers for. lines_after_expected_head: None without one. key_version, public_key: of the audit key in
    force at the end, the public key None where no line told it. given_up: there were too many findings to go on.
    """

    findings: list[Finding]
    findings_count: int
    lines: int
    first_seq: int
    from_signed_line: bool
    head: Head | None
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
    def judged(self) -> bool:
        """Whether there was anything to judge by: the public key alone says nothing of a log without a signed line."""
        return self.lines > 0 and (self.macs_checked or self.covered_seq >= self.first_seq)

    @property
    def intact(self) -> bool:
        return self.findings_count == 0 and self.judged


REMEMBERED_COUNT_MAX: Final = 1000
"""Missing lines, and lines that stood too early, remembered by number in case they turn up or are asked for."""


class _Odd(msgspec.Struct):
    """A line that could not take its place; the next one may show why. seq is 0 and sig None when it had none."""

    finding: Finding
    seq: int
    sig: bytes | None


class Sequence:
    """The chain as far as it was followed. `key_version` is set by the verifier whenever the key in force changes."""

    def __init__(self, mac_keys: Mapping[int, memoryview], found: Found) -> None:
        self._mac_keys = mac_keys
        self._found = found
        self.key_version = 0
        self.head: Head | None = None
        self.before: bytes | None = None
        """MAC of the line before the last one, None where it is not known."""
        self._sig: bytes | None = None
        self._odd: _Odd | None = None
        self._recomputed: tuple[Finding, bytes] | None = None
        self._early: dict[int, bytes] = {}
        self._missing: dict[int, Finding] = {}

    @property
    def expected(self) -> int:
        return 1 if self.head is None else self.head.seq + 1

    @property
    def last(self) -> Head | None:
        """The end of the log, also when the last line had no place in the chain."""
        odd = self._odd
        if odd is not None and odd.sig is not None and odd.seq >= self.expected:
            return Head(odd.seq, odd.sig)
        return self.head

    def begin(self, seq: int, event_bytes: bytes, sig: bytes, previous: bytes | None) -> None:
        """Take the first line; `previous` is the MAC that it follows, None where that is not known."""
        self.before = previous
        if previous is not None and not self._fits(previous, event_bytes, sig):
            self._found("altered", seq, f"line {seq} was altered: its MAC does not fit its event")
        self._enter(seq, sig)

    def take(self, event: Event, event_bytes: bytes, sig: bytes) -> bool:
        """Whether the line takes its place as the next of the chain. If not, that is a finding."""
        odd, self._odd = self._odd, None
        if odd is not None:
            self._explain(odd, event, event_bytes, sig)
        if event.seq > self.expected and (early := self._early.pop(self.expected, None)) is not None:
            self._enter(self.expected, early)
        if event.seq != self.expected:
            self._out_of_place(event, sig)
            return False
        self._check_mac(event, event_bytes, sig)
        self._enter(event.seq, sig)
        return True

    def malformed(self, reason: str) -> None:
        """A line that could not be read stands where the next one belongs."""
        finding = self._found("malformed", self.expected, f"where line {self.expected} belongs: {reason}")
        if self._odd is None:
            self._odd = _Odd(finding, 0, None)

    def _enter(self, seq: int, sig: bytes | None) -> None:
        if self.head is not None:
            self.before = self._sig
        self.head = Head(seq, record.ZERO_MAC if sig is None else sig)
        self._sig = sig

    def _explain(self, odd: _Odd, event: Event, event_bytes: bytes, sig: bytes) -> None:
        """With the next line known: was the odd one the next in truth, did it stand too early, or was there a gap?"""
        expected = self.expected
        if event.seq == expected:
            if odd.seq > expected:
                odd.finding.kind, odd.finding.seq = "moved", odd.seq
                odd.finding.text = f"line {odd.seq} is out of order: it stands before line {expected}"
        elif event.seq == expected + 1 and (odd.sig is None or self._fits(odd.sig, event_bytes, sig)):
            if odd.sig is not None:
                odd.finding.kind, odd.finding.seq = "altered", expected
                odd.finding.text = f"line {expected} was altered: its seq reads {odd.seq}"
                self._early.pop(odd.seq, None)
                self._missing = {seq: lost for seq, lost in self._missing.items() if lost is not odd.finding}
            self._enter(expected, odd.sig)
        elif odd.seq > expected and event.seq == odd.seq + 1:
            self._early.pop(odd.seq, None)
            self._enter(odd.seq, odd.sig)

    def _out_of_place(self, event: Event, sig: bytes) -> None:
        expected, seq = self.expected, event.seq
        if seq > expected:
            span = f"line {expected} is" if seq == expected + 1 else f"lines {expected} to {seq - 1} are"
            finding = self._found("missing", expected, f"{span} missing: line {seq} stands there")
            for lost in range(expected, min(seq, expected + REMEMBERED_COUNT_MAX - len(self._missing))):
                self._missing[lost] = finding
            if len(self._early) < REMEMBERED_COUNT_MAX:
                self._early[seq] = sig
        elif (missed := self._missing.pop(seq, None)) is not None:
            finding = missed
            finding.kind, finding.seq = "moved", seq
            finding.text = f"line {seq} is out of order: it stands after line {expected - 1}"
        else:
            finding = self._found("repeated", seq, f"line {seq} stands a second time, after line {expected - 1}")
        self._odd = _Odd(finding, seq, sig)

    def _check_mac(self, event: Event, event_bytes: bytes, sig: bytes) -> None:
        suspect, self._recomputed = self._recomputed, None
        key = self._mac_keys.get(self.key_version)
        if key is None or self._sig is None:
            return
        expected = chain.mac(key, self._sig, event_bytes)
        if hmac.compare_digest(expected, sig):
            return
        if suspect is not None and hmac.compare_digest(chain.mac(key, suspect[1], event_bytes), sig):
            suspect[0].text = f"the sig of line {event.seq - 1} was altered; its event is genuine"
            return
        text = f"line {event.seq} was altered: its MAC does not fit its event and the line before"
        self._recomputed = (self._found("altered", event.seq, text), expected)

    def _fits(self, previous: bytes, event_bytes: bytes, sig: bytes) -> bool:
        """Whether the line follows that MAC; taken to be so where there is no key to judge it."""
        key = self._mac_keys.get(self.key_version)
        return key is None or hmac.compare_digest(chain.mac(key, previous, event_bytes), sig)


class KeyInForce:
    """version: 0 where no line has told it. public_key: None where that is not known."""

    def __init__(self, trust: Trust, found: Found) -> None:
        self._trust = trust
        self._found = found
        self.version = 0
        self.public_key: bytes | None = None

    def begin(self, event: Event) -> None:
        """Take over what the log's first line names."""
        public_key = base64_bytes(event.facts.get("public_key"), PUBLIC_KEY_BYTES)
        if public_key is None or public_key not in self._trust.public_keys:
            self._found("foreign", event.seq, "the log names a public key that is not the trusted one")
            public_key = None
        self._use(event, whole_number(event.facts, "key"), public_key)

    def begin_within(self, event: Event) -> None:
        """The same from a signed line: it names a version, and its signature will tell the public key."""
        self._use(event, whole_number(event.facts, "key"), None)

    def signed(self, event: Event) -> bool:
        """Rule 8. Where no line has named the public key yet, any trusted one will do, and is in force from here on."""
        signature = base64_bytes(event.facts["signature"], SIGNATURE_BYTES) or b""
        message = chain.signed_message(event)
        keys = self._trust.public_keys if self.public_key is None else (self.public_key,)
        for key in keys:
            if signature_is_valid(key, signature, message):
                self.public_key = key
                return True
        self._found("signature", event.seq, f"line {event.seq} has a signature that the public key does not confirm")
        return False

    def change(self, event: Event) -> None:
        """Rule 9, for an `audit_key` line that has its facts."""
        version = whole_number(event.facts, "next_key")
        public_key = base64_bytes(event.facts["next_public_key"], PUBLIC_KEY_BYTES)
        if version <= self.version or public_key is None:
            self._found("altered", event.seq, f"line {event.seq} does not name a next audit key")
            return
        if version in self._trust.mac_keys and public_key not in self._trust.public_keys:
            text = f"line {event.seq} names a public key that is not the one of audit key version {version}"
            self._found("foreign", event.seq, text)
        since = self._trust.since.get(version)
        if since is not None and (event.seq - 1, event.facts["previous_sig"]) != (since.seq, base64_text(since.sig)):
            text = f"line {event.seq} changes the audit key where version {version} did not take over"
            self._found("foreign", event.seq, text)
        self._use(event, version, public_key)

    def end(self, last_seq: int) -> None:
        """Where the log ends under an earlier key, it is not the one that the newest took over."""
        newest = max(self._trust.since, default=0)
        if self.version < newest:
            text = (
                f"the log ends under audit key version {self.version}, though version {newest} took over after line "
                f"{self._trust.since[newest].seq}: lines are missing, or a start has to complete the change"
            )
            self._found("truncated", last_seq, text)

    def _use(self, event: Event, version: int, public_key: bytes | None) -> None:
        self.version, self.public_key = version, public_key
        if version < 1:
            self._found("foreign", event.seq, f"line {event.seq} names no audit key version")
        elif self._trust.mac_keys and version not in self._trust.mac_keys:
            self._found("foreign", event.seq, f"line {event.seq} names audit key version {version}, which is not known")


def whole_number(facts: Facts, name: str) -> int:
    """A fact that must be an integer; 0 where it is none."""
    value = facts.get(name)
    return value if isinstance(value, int) else 0
