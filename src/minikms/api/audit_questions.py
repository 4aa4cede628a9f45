"""What the auditor is asked about the audit log, and what it answers.

Owns: both messages (docs/spec/tree.md#questions) and their bounds. Invariant: an answer has no line whole, so that its
size is bounded. It must never be part of the key service's own contract: the key process answers no question.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from minikms.api.verb import Request

PATH: Final = "/audit/lines"
QUESTION_BYTES_MAX: Final = 64 * 1024
LINES_MAX: Final = 50
"""The lines in one answer."""
SECONDS_MAX: Final = 5.0
"""The time of one search; the answer says how far it came."""
ANSWER_SECONDS_MAX: Final = 30.0
"""How long a client waits for an answer: other questions may come first."""
NAMED_COUNT_MAX: Final = 8
"""The keys and request ids that are named for a line. A line of a batch has up to 1,024."""
THREAD_KEYS_MAX: Final = 100
READS: Final = "reads"
"""The name that stands for every verb whose answer may hold plaintext."""

Text = Annotated[str, msgspec.Meta(max_length=1024)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class AuditQuestion(Request):
    """Lines that have all of these. asker: the user for whom a program asks. thread_keys: keys of the thread that are
    known already. since_ns, until_ns: Unix time, without the end; 0 for no bound. before: only lines with a smaller
    number; 0 for no bound.
    """

    asker: Annotated[str, msgspec.Meta(max_length=64)] = ""
    thread: Text = ""
    thread_keys: Annotated[tuple[Text, ...], msgspec.Meta(max_length=THREAD_KEYS_MAX)] = ()
    key: Text = ""
    actor: Text = ""
    verb: Text = ""
    outcome: Text = ""
    since_ns: Number = 0
    until_ns: Number = 0
    before: Number = 0


class AuditLine(msgspec.Struct, frozen=True):
    """A line, as `minikms.audit.record.Event`. keys, requests: some of its ids; `*_count`: how many there are."""

    seq: int
    ts: int
    type: str
    actor: str
    outcome: str
    thread_id: str
    keys: list[str]
    keys_count: int
    requests: list[str]
    requests_count: int


class AuditAnswer(msgspec.Struct, frozen=True):
    """lines: newest first. before: what to ask next for older lines; 0 if there are none. stopped: why that is so
    although `lines` is not full: the time was over, or the index does not have those lines yet.

    thread_keys: those that the log gives to the thread. begins_late: earlier lines of the log were removed, or were in
    another one, so keys of the thread may be missing. signed_seq: the last line under the published tree checkpoint.
    indexed_seq, durable_seq: the last line of the index and of the log. alarm: why the auditor signs nothing; empty if
    it does. problems: what else is wrong with it; empty also from an earlier version.
    """

    lines: list[AuditLine]
    before: int
    stopped: Literal["", "time", "index"]
    thread_keys: list[str]
    begins_late: bool
    signed_seq: int
    indexed_seq: int
    durable_seq: int
    alarm: str
    problems: list[str] = []
