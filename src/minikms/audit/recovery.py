"""What a start finds at the end of a log: where the last whole line ends, and whether the end can be trusted.

Owns: reading a file backwards to its last signed line and judging the lines from there. Invariants: it reads at most
the span between two checkpoints and changes nothing. It must never accept an end that `verify` would not.

What a start does with the log it finds: go on, begin, mend, or refuse.

Owns: the decision table below, and the lines that a start writes before any other.

- Nothing, and nothing is remembered: a new log begins with `genesis`.
- Nothing, but a log is remembered: refuse.
- A log whose end follows from its last checkpoint: go on.
- The same, then bytes without a newline: they are moved aside, and `recovery` names them with their SHA-256.
- A closed last segment and no file after it, or an empty one: the rotation was interrupted, its successor is begun.
- An end under an earlier audit key, at the line where the change of key was begun: it was interrupted, the log says so
  in `Opened.key`. At another line: refuse, for who has got the earlier key can end a log of his own anywhere.
- An end that does not follow, or a log without the line that is remembered: refuse. When told to accept the loss: all
  files are set aside, and a new log begins whose `genesis` says so.

Invariants: a step that a crash interrupts is found and completed by the next start; nothing of an old log is ever
deleted. It must run under the lock of the data directory, and must never go on from an end that it could not judge.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import stat
import time
from typing import Final, NamedTuple

import msgspec

from minikms.audit import chain, queries, reader, record
from minikms.audit.chain import AuditKey, Coverage
from minikms.audit.reader import DIRECTORY_MODE, FILE_MODE, LOG_NAME, NEXT_NAME, DamagedSegmentError, segment_name
from minikms.audit.record import ACTOR_SELF, Event, Facts, Head, MalformedLineError
from minikms.audit.rules import Trust
from minikms.audit.verify import Verifier
from minikms.errors import StartError

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


_TORN_PREFIX: Final = LOG_NAME + ".torn-"
_ASIDE_PREFIX: Final = "minikms-audit.aside-"
_WAY_OUT: Final = (
    "Run `minikms audit verify` to see what happened to it. To go on without it, start once with "
    "--accept-audit-loss: the old files are kept aside and a new log begins"
)
_RESTORED: Final = (
    "Where a copy was put back on purpose, start without --expect-audit-head; the message server, once with "
    "--accept-restore."
)


class Known(msgspec.Struct, frozen=True):
    """What is remembered of the log outside of it. begun: whether there was one. head: a line that was on disk."""

    begun: bool = False
    head: Head | None = None


class Keys(NamedTuple):
    """The audit key, and the earlier versions that the end of the log may still name."""

    current: AuditKey
    former: tuple[AuditKey, ...] = ()

    def trust(self) -> Trust:
        keys = (self.current, *self.former)
        return Trust(
            public_keys=frozenset(key.signer.public_key() for key in keys),
            mac_keys={key.version: key.mac_key for key in keys},
            since={key.version: key.since for key in keys if key.since is not None},
        )

    def of(self, version: int) -> AuditKey:
        """The key of a version that the tail was judged under."""
        return next((key for key in self.former if key.version == version), self.current)


class Opened(msgspec.Struct):
    """A log ready for its next line. pending: events that the start owes the log, to be written first. key: the version
    in force at its end, which is the former one when a change of key was interrupted.
    """

    fd: int
    size: int
    head: Head
    coverage: Coverage
    log_id: bytes
    segment: int
    segment_ts: int
    segment_seq: int
    pending: list[Event]
    key: AuditKey


def open_log(directory: str, keys: Keys, known: Known, ts: int, *, accept_loss: bool) -> Opened:
    """Open or begin the log of `directory` for appending. `ts` is now, Unix ns.

    Raises StartError when the log is missing, altered or shorter than remembered, naming the way out.
    """
    try:
        return _open(directory, keys, known, ts)
    except _LossError as error:
        if not accept_loss:
            raise StartError(f"{error}. {_WAY_OUT}. {_RESTORED if known.head else ''}".rstrip()) from None
        aside = _set_aside(directory, ts)
        reason: Facts = {"previous": str(error)}
        if aside:
            reason["previous_files"] = aside
        if known.head is not None:
            reason["previous_seq"] = known.head.seq
            reason["previous_sig"] = chain.base64_text(known.head.sig)
        return _begin(directory, keys.current, ts, reason)


class _LossError(Exception):
    """Something of the log is missing or altered; the text is a sentence without its full stop."""


def _open(directory: str, keys: Keys, known: Known, ts: int) -> Opened:
    closed = reader.list_segments(directory)
    fd = _open_file(os.path.join(directory, LOG_NAME))
    if fd is None:
        if closed:
            return _begin_after(directory, max(closed), keys, known, ts=ts)
        if known.begun:
            raise _LossError(f"the audit log {LOG_NAME} is missing, though there was one")
        return _begin(directory, keys.current, ts, {})
    try:
        tail = read_tail(fd, keys.trust())
        if tail.fault:
            raise _LossError(f"the end of the audit log can't be trusted: {tail.fault}")
        if tail.whole_bytes and not tail.next_segment:
            return _go_on(directory, fd, tail, keys, known)
        if tail.whole_bytes:
            os.rename(os.path.join(directory, LOG_NAME), os.path.join(directory, segment_name(tail.segment)))
            reader.fsync_directory(directory)
            return _begin_after(directory, tail.segment, keys, known, ts=ts)
        if closed:
            return _begin_after(directory, max(closed), keys, known, ts=ts, torn_fd=fd)
        if known.begun:
            raise _LossError(f"the audit log {LOG_NAME} is empty, though there was one")
        _move_torn_aside(directory, fd, 0, seq=2)
        return _begin(directory, keys.current, ts, {})
    finally:
        os.close(fd)


def _go_on(directory: str, fd: int, tail: Tail, keys: Keys, known: Known) -> Opened:
    _check_known(directory, tail, known)
    _check_takeover(tail, keys)
    # A change of key that is to be completed comes first.
    next_seq = tail.head.seq + (1 if tail.key_version == keys.current.version else 2)
    if os.fstat(fd).st_size > tail.whole_bytes:
        _move_torn_aside(directory, fd, tail.whole_bytes, seq=next_seq)
    return Opened(
        fd=os.dup(fd),
        size=tail.whole_bytes,
        head=tail.head,
        coverage=tail.coverage,
        log_id=bytes.fromhex(tail.log_id),
        segment=tail.segment,
        segment_ts=tail.first_ts,
        segment_seq=tail.first_seq,
        pending=_recovery(directory, next_seq),
        key=keys.of(tail.key_version),
    )


def _begin(directory: str, key: AuditKey, ts: int, previous: Facts) -> Opened:
    log_id = os.urandom(chain.LOG_ID_BYTES)
    event = chain.genesis_event(log_id, key.version, key.signer.public_key(), previous)
    return _create(directory, event, Head(0, record.ZERO_MAC), key=key, log_id=log_id, segment=1, ts=ts)


def _begin_after(
    directory: str, number: int, keys: Keys, known: Known, *, ts: int, torn_fd: int | None = None
) -> Opened:
    """Begin the file after segment `number`, which must be there, uncompressed and closed."""
    name = segment_name(number)
    fd = _open_file(os.path.join(directory, name))
    if fd is None:
        raise _LossError(
            f"the audit log {LOG_NAME} is missing, though {reader.list_segments(directory)[number][0]} is there"
        )
    try:
        tail = read_tail(fd, keys.trust())
    finally:
        os.close(fd)
    if tail.fault or tail.next_segment != number + 1:
        raise _LossError(f"the audit log {LOG_NAME} is missing: {tail.fault or name + ' is not the last of its files'}")
    _check_known(directory, tail, known)
    _check_takeover(tail, keys)
    if torn_fd is not None:
        _move_torn_aside(directory, torn_fd, 0, seq=tail.head.seq + 2)
    key = keys.of(tail.key_version)
    event = chain.segment_open_event(
        bytes.fromhex(tail.log_id),
        key.version,
        key.signer.public_key(),
        segment=number + 1,
        previous=tail.head,
        closed=tail.coverage,
    )
    log_id = bytes.fromhex(tail.log_id)
    return _create(directory, event, tail.head, key=key, log_id=log_id, segment=number + 1, ts=ts)


def _create(
    directory: str, event: Event, before: Head, *, key: AuditKey, log_id: bytes, segment: int, ts: int
) -> Opened:
    blob, head = chain.seal([event], before, key.mac_key, ts)
    fd = create_file(directory, blob)
    coverage = Coverage()
    coverage.add(blob, 1)
    os.rename(os.path.join(directory, NEXT_NAME), os.path.join(directory, LOG_NAME))
    reader.fsync_directory(directory)
    return Opened(
        fd=fd,
        size=len(blob),
        head=head,
        coverage=coverage,
        log_id=log_id,
        segment=segment,
        segment_ts=ts,
        segment_seq=head.seq,
        pending=_recovery(directory, head.seq + 1),
        key=key,
    )


def create_file(directory: str, blob: bytes) -> int:
    """A durable file `NEXT_NAME` that holds `blob`, open for appending. Raises OSError, and then there is none."""
    path = os.path.join(directory, NEXT_NAME)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, FILE_MODE)
    try:
        write_whole(fd, blob)
        os.fdatasync(fd)
    except OSError:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return fd


def write_whole(fd: int, blob: bytes) -> None:
    """One write of all of `blob`. Raises OSError when it fails or is short; the file may then hold a part of it."""
    if os.write(fd, blob) != len(blob):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _check_known(directory: str, tail: Tail, known: Known) -> None:
    """The line that is remembered is there. What stands between it and the end is for `verify` to judge."""
    head = known.head
    if head is None:
        return
    if tail.head.seq < head.seq:
        raise _LossError(f"the audit log ends at line {tail.head.seq}, though line {head.seq} was written")
    try:
        line = queries.line_of(directory, head.seq)
        sig = None if line is None else record.split_line(line)[1]
    except (DamagedSegmentError, MalformedLineError) as error:
        raise _LossError(f"line {head.seq} of the audit log can't be read: {error}") from None
    if sig is None:
        raise _LossError(f"line {head.seq} of the audit log, which was written, is in none of its files")
    if sig != head.sig:
        raise _LossError(f"line {head.seq} of the audit log is not the one that was written")


def _check_takeover(tail: Tail, keys: Keys) -> None:
    current = keys.current
    if tail.key_version != current.version and current.since is not None and tail.head != current.since:
        raise _LossError(
            f"the audit log ends at line {tail.head.seq} under audit key version {tail.key_version}, though version "
            f"{current.version} took over after line {current.since.seq}"
        )


def _open_file(path: str) -> int | None:
    """The log file for reading and appending, or None when there is none. Never through a symbolic link."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StartError(f"the audit log can't be opened: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StartError(f"{os.path.basename(path)} is not a regular file; move it away")
    return fd


# --- incomplete last lines -------------------------------------------------------------------------------------------


def _move_torn_aside(directory: str, fd: int, whole_bytes: int, *, seq: int) -> None:
    """Move what follows `whole_bytes` into a file named for the line `seq` that will tell of it.

    A crash between the two leaves the bytes in both places: the next start sees that and doesn't add them again.
    """
    torn = os.pread(fd, os.fstat(fd).st_size - whole_bytes, whole_bytes)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    aside = os.open(os.path.join(directory, f"{_TORN_PREFIX}{seq}"), flags, FILE_MODE)
    try:
        if os.pread(aside, len(torn) + 1, 0) != torn:
            os.write(aside, torn)
            os.fsync(aside)
    finally:
        os.close(aside)
    reader.fsync_directory(directory)
    os.ftruncate(fd, whole_bytes)
    os.fdatasync(fd)


def _recovery(directory: str, seq: int) -> list[Event]:
    """The `recovery` event that line `seq` owes to bytes moved aside for it, if there are any."""
    name = f"{_TORN_PREFIX}{seq}"
    try:
        fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            torn_bytes = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return []
    facts: Facts = {"bytes": torn_bytes, "file": name, "sha256": digest}
    return [
        Event(
            type=record.TYPE_RECOVERY, actor=ACTOR_SELF, detail="an incomplete last line was moved aside", facts=facts
        )
    ]


def _set_aside(directory: str, ts: int) -> str:
    """Move every file of the log into a new directory, and return its name; empty when there is none to move."""
    names = [name for name in sorted(os.listdir(directory)) if name == LOG_NAME or name.startswith(LOG_NAME + ".")]
    if not names:
        return ""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(ts // 1_000_000_000))
    for attempt in itertools.count(1):
        aside = f"{_ASIDE_PREFIX}{stamp}" + (f"-{attempt}" if attempt > 1 else "")
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.join(directory, aside), DIRECTORY_MODE)
            break
    for name in names:
        os.rename(os.path.join(directory, name), os.path.join(directory, aside, name))
    reader.fsync_directory(os.path.join(directory, aside))
    reader.fsync_directory(directory)
    return aside
