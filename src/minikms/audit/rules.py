"""Trust anchors and findings of a verification, and its rules about the chain and the audit key.

Owns: `Trust` and `Finding`; rules 4 and 5 of `minikms.audit.verify` (`ChainTracker`: `seq` and MAC) and rules 8 and 9
(`KeyTracker`: signatures and changes of the audit key). Invariants:

- A line whose `seq` is not the next one is a finding, and does not enter the chain.
- If an earlier fault prevents the check of a MAC, that fault has a finding.
- If a key becomes active that the verifier doesn't trust and the active key didn't sign, there is a finding.

It must never do I/O or copy a key.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec

from minikms.api.base64 import decode_exact, encode_text
from minikms.audit import chain, record
from minikms.audit.chain import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, signature_is_valid
from minikms.audit.record import Event, Facts, LineRef

FINDINGS_COUNT_MAX: Final = 100
"""Findings that are kept with their text. Further findings are only counted."""

Kind = Literal[
    "altered",  # a line, its MAC or the lines that a signed line covers were changed
    "anchor",  # a line differs from the one that the caller expects
    "foreign",  # a line belongs to another log, or to a key that is not trusted
    "incomplete",  # the log ends within a line
    "malformed",  # not a line of an audit log
    "missing",  # lines or files are missing
    "moved",  # a line is in another place
    "repeated",  # a line occurs a second time
    "segment",  # a file holds another segment than expected
    "signature",  # a signature is not valid under the public key
    "truncated",  # the log ends before a line that the caller expects, or before the newest audit key
]


class Trust(msgspec.Struct, frozen=True):
    """The trust anchors of a verification: raw public keys from outside the log and, if available, the audit keys.

    mac_keys: the MAC keys by version, as views that are never copied. With them the verifier checks the MAC of every
    line. Without them it checks only the signatures, each of which covers the lines before it. since: by version, the
    last line under the previous version, if it is recorded. So a holder of an earlier key can't forge a continuation
    after that line.
    """

    public_keys: frozenset[bytes]
    mac_keys: Mapping[int, memoryview] = {}
    since: Mapping[int, LineRef] = {}


class Finding(msgspec.Struct):
    """One fault. line: its line number in the file, from 1. seq: the `seq` of the faulty line, 0 if there is none."""

    file: str
    line: int
    seq: int
    kind: Kind
    text: str


AddFinding = Callable[[Kind, int, str], Finding]
"""Makes a finding from its kind, the seq of the line, and a sentence without a full stop."""


class ChainTracker:
    """Follows `seq` and MAC from line to line, up to the first fault.

    key_version: version of the active audit key, which the verifier sets. head: the last line of the chain.
    """

    def __init__(self, mac_keys: Mapping[int, memoryview], add_finding: AddFinding) -> None:
        self._mac_keys = mac_keys
        self._add_finding = add_finding
        self.key_version = 0
        self.head: LineRef | None = None
        self.previous_sig: bytes | None = None
        """MAC of the line before `head`, None if it is not known."""
        self._sig: bytes | None = None

    @property
    def expected(self) -> int:
        return 1 if self.head is None else self.head.seq + 1

    def begin(self, seq: int, event_bytes: bytes, sig: bytes, previous: bytes | None) -> None:
        """Start the chain with the first line. `previous`: the MAC before it, None if it is not known."""
        self.previous_sig = previous
        if previous is not None and not self._fits(previous, event_bytes, sig):
            self._add_finding("altered", seq, f"line {seq} was altered: its MAC does not fit its event")
        self._enter(seq, sig)

    def take(self, event: Event, event_bytes: bytes, sig: bytes) -> bool:
        """Add the next line to the chain. False, with a finding, if its `seq` is not the next one."""
        if event.seq != self.expected:
            self._add_out_of_order(event, sig)
            return False
        self._check_mac(event, event_bytes, sig)
        self._enter(event.seq, sig)
        return True

    def add_malformed(self, reason: str) -> Finding:
        """Add a finding for a line that could not be parsed."""
        return self._add_finding("malformed", self.expected, f"where line {self.expected} was expected: {reason}")

    def _enter(self, seq: int, sig: bytes | None) -> None:
        if self.head is not None:
            self.previous_sig = self._sig
        self.head = LineRef(seq, record.ZERO_MAC if sig is None else sig)
        self._sig = sig

    def _add_out_of_order(self, event: Event, sig: bytes) -> Finding:
        expected, seq = self.expected, event.seq
        if seq > expected:
            span = f"line {expected} is" if seq == expected + 1 else f"lines {expected} to {seq - 1} are"
            return self._add_finding("missing", expected, f"{span} missing: line {seq} is in that position")
        return self._add_finding("repeated", seq, f"line {seq} occurs a second time, after line {expected - 1}")

    def _check_mac(self, event: Event, event_bytes: bytes, sig: bytes) -> None:
        if self._sig is not None and not self._fits(self._sig, event_bytes, sig):
            self._add_altered(event)

    def _add_altered(self, event: Event) -> Finding:
        text = f"line {event.seq} was altered: its MAC does not fit its event and the line before"
        return self._add_finding("altered", event.seq, text)

    def _fits(self, previous: bytes, event_bytes: bytes, sig: bytes) -> bool:
        """Whether the line follows the MAC `previous`. True if there is no key to check it with."""
        key = self._mac_keys.get(self.key_version)
        return key is None or hmac.compare_digest(chain.mac(key, previous, event_bytes), sig)


class KeyTracker:
    """Tracks the active audit key. version is 0 and public_key is None until a line names them."""

    def __init__(self, trust: Trust, add_finding: AddFinding) -> None:
        self._trust = trust
        self._add_finding = add_finding
        self.version = 0
        self.public_key: bytes | None = None

    def begin(self, event: Event) -> None:
        """Take version and public key from the log's first line."""
        public_key = decode_exact(event.facts.get("public_key"), PUBLIC_KEY_BYTES)
        if public_key is None or public_key not in self._trust.public_keys:
            self._add_finding("foreign", event.seq, "the log names a public key that is not trusted")
            public_key = None
        self._use(event, whole_number(event.facts, "key"), public_key)

    def begin_at_signed_line(self, event: Event) -> None:
        """Take the version from a signed line; `check_signature` then finds the public key."""
        self._use(event, whole_number(event.facts, "key"), None)

    def check_signature(self, event: Event) -> bool:
        """Apply rule 8. If no line has named the public key yet, any trusted key is accepted and becomes active."""
        signature = decode_exact(event.facts["signature"], SIGNATURE_BYTES) or b""
        message = chain.signed_message(event)
        keys = self._trust.public_keys if self.public_key is None else (self.public_key,)
        for key in keys:
            if signature_is_valid(key, signature, message):
                self.public_key = key
                return True
        self._add_finding("signature", event.seq, f"the signature of line {event.seq} does not fit the public key")
        return False

    def change(self, event: Event) -> None:
        """Apply rule 9 to an `audit_key` line. The caller has checked the names of its facts (rule 7)."""
        version = whole_number(event.facts, "next_key")
        public_key = decode_exact(event.facts["next_public_key"], PUBLIC_KEY_BYTES)
        if version <= self.version or public_key is None:
            self._add_finding("altered", event.seq, f"line {event.seq} does not name the next audit key")
            return
        if version in self._trust.mac_keys and public_key not in self._trust.public_keys:
            text = f"line {event.seq} names a public key that does not belong to audit key version {version}"
            self._add_finding("foreign", event.seq, text)
        since = self._trust.since.get(version)
        if since is not None and (event.seq - 1, event.facts["previous_sig"]) != (since.seq, encode_text(since.sig)):
            text = f"line {event.seq} changes the audit key, but version {version} was introduced after another line"
            self._add_finding("foreign", event.seq, text)
        self._use(event, version, public_key)

    def _use(self, event: Event, version: int, public_key: bytes | None) -> None:
        self.version, self.public_key = version, public_key
        if version < 1:
            self._add_finding("foreign", event.seq, f"line {event.seq} names no audit key version")
        elif self._trust.mac_keys and version not in self._trust.mac_keys:
            self._add_finding(
                "foreign", event.seq, f"line {event.seq} names audit key version {version}, which is not known"
            )


def whole_number(facts: Facts, name: str) -> int:
    """The integer fact `name`; 0 if there is none."""
    value = facts.get(name)
    return value if isinstance(value, int) else 0
