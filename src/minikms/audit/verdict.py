"""What a verifier is given to believe in, and what it answers.

Owns: the shapes `Trust`, `Finding` and `Report`. Invariants: a report is intact only when lines were judged, by a MAC
or by a signature that covers them, and no finding was made, kept or only counted. It must never hold key bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec

from minikms.audit.record import Head

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
