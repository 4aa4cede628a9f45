"""What a start finds at the end of a log: where the last whole line ends, and whether the end can be trusted.

Owns: reading a file backwards to its last signed line and judging the lines from there. Invariants: it reads at most
the span between two checkpoints and changes nothing. It must never accept an end that `verify` would not.
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

from minikms.audit import record
from minikms.audit.chain import Coverage
from minikms.audit.record import Head, MalformedLineError
from minikms.audit.verdict import Trust
from minikms.audit.verify import Verifier

_READ_BYTES: Final = 64 * 1024
_FIRST_LINE_BYTES: Final = 4096
TAIL_BYTES_MAX: Final = 32 * 1024 * 1024
"""A writer signs every 8 MiB and a turn's lines are far fewer than that: more without a signed line is not our file."""


class Tail(msgspec.Struct):
    """The end of a log file. whole_bytes: up to the end of the last whole line; what follows was never completed.

    fault: empty, or why the end can't be trusted; then the other fields hold nothing.
    """

    whole_bytes: int
    fault: str = ""
    first_ts: int = 0
    first_seq: int = 0
    head: Head = Head(0, record.ZERO_MAC)
    coverage: Coverage = msgspec.field(default_factory=Coverage)
    log_id: str = ""
    key_version: int = 0
    segment: int = 0
    next_segment: int = 0
    """The number that the last line, a `segment_close`, names as the next; 0 when the file is still open."""


def read_tail(fd: int, trust: Trust) -> Tail:
    """Judge the end of the file `fd`. Raises OSError when it can't be read."""
    size = os.fstat(fd).st_size
    whole_bytes = _whole_bytes(fd, size)
    if whole_bytes == 0:
        return Tail(0)
    start, data = _from_last_signed_line(fd, whole_bytes)
    if data is None:
        return Tail(whole_bytes, fault=f"there is no checkpoint in its last {TAIL_BYTES_MAX} bytes")
    verifier = Verifier(trust, from_signed_line=start > 0)
    for line in data.split(b"\n")[:-1]:
        verifier.feed(line)
    if verifier.findings:
        return Tail(whole_bytes, fault=verifier.findings[0].text)
    try:
        first = record.parse_line(_first_line(fd))[0]
    except MalformedLineError as error:
        return Tail(whole_bytes, fault=f"its first line is {error}")
    head = verifier.head
    if head is None or first.facts.get("log_id") != verifier.log_id:
        return Tail(whole_bytes, fault="its first line belongs to another log")
    segment = first.facts.get("segment")
    return Tail(
        whole_bytes,
        first_ts=first.ts,
        first_seq=first.seq,
        head=head,
        coverage=verifier.coverage,
        log_id=verifier.log_id,
        key_version=verifier.key_version,
        segment=segment if isinstance(segment, int) else 0,
        next_segment=verifier.next_segment,
    )


def _whole_bytes(fd: int, size: int) -> int:
    end = size
    while end > 0:
        begin = max(0, end - _READ_BYTES)
        newline = os.pread(fd, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def _from_last_signed_line(fd: int, end: int) -> tuple[int, bytes | None]:
    """(offset, the bytes from there to `end`): from the last signed line, or from the beginning where there is none."""
    span = _READ_BYTES
    while True:
        begin = max(0, end - span)
        data = _read_exactly(fd, begin, end)
        at = _last_signed_line(data, whole=begin == 0)
        if at >= 0:
            return begin + at, data[at:]
        if begin == 0:
            return 0, data
        if span >= TAIL_BYTES_MAX:
            return begin, None
        span *= 4


def _last_signed_line(data: bytes, *, whole: bool) -> int:
    """Offset of the last signed line in `data`, or -1. Its first line counts only when `data` begins the file."""
    end = len(data) - 1
    while end > 0:
        begin = data.rfind(b"\n", 0, end) + 1
        if begin == 0 and not whole:
            return -1
        if _looks_signed(data[begin:end]):
            return begin
        end = begin - 1
    return -1


def _looks_signed(line: bytes) -> bool:
    """A cheap look before the line is parsed; the verifier judges it afterwards."""
    if b'"signature":"' not in line:
        return False
    try:
        return record.parse_line(line)[0].type in record.SIGNED_TYPES
    except MalformedLineError:
        return False


def _first_line(fd: int) -> bytes:
    return os.pread(fd, _FIRST_LINE_BYTES, 0).partition(b"\n")[0]


def _read_exactly(fd: int, begin: int, end: int) -> bytes:
    parts = []
    while begin < end and (part := os.pread(fd, end - begin, begin)):
        parts.append(part)
        begin += len(part)
    return b"".join(parts)
