"""Where a line stands in the chain, and what happened when it doesn't.

Owns: the verifier's rules on `seq` and MAC, and picking the chain up again after a fault. Invariants: a line takes its
place only when its `seq` is the next; every departure is one finding, told once more exactly when a later line shows
what it was (a line moved, a `seq` altered, only a `sig` altered). Memory is bounded by `REMEMBERED_COUNT_MAX`. It
must never accept a line silently because an earlier one was at fault: where a MAC can't be judged, there is a finding
already.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Final

import msgspec

from minikms.audit import chain, record
from minikms.audit.record import Event, Head
from minikms.audit.verdict import Finding, Found

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
