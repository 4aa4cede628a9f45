"""Opening a log at start: continue it, begin one, repair its end, or refuse.

Owns: verifying the end of a log file, the decision table below, and the events that a start writes before all others.

- No log, and none is expected: begin a new log with `genesis`.
- No log, but one is expected: refuse.
- The end follows from the last signed line: continue.
- The same, then damage of any kind behind what a sync has confirmed (`minikms.platform.append_only`), as a power cut
  leaves it: move everything from there on aside; a `recovery` event names and counts it.
- A closed last segment, and no file or an empty one after it: a rotation was interrupted; begin the next file.
- An end under an earlier audit key, at the line where the change of key began: the change was interrupted;
  `OpenedLog.key` is that earlier key. At another line: refuse, because the holder of an earlier key can write a log
  that ends anywhere. Only a key that is not confirmed yet is left out then: the change never came here.
- An end that does not follow, or a log without the expected line: refuse. If the caller accepts the loss, move all
  files aside and begin a new log whose `genesis` says so.

Invariants: the next start completes every step that a crash interrupted; nothing of an old log is deleted; verifying
the end begins at the last signed line that is confirmed, and changes nothing. It must run under the lock of the data
directory, and must never continue from an end that `minikms.audit.verify` would reject.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import stat
import time
from typing import Final, NamedTuple

import msgspec

from minikms.api.base64 import encode_text
from minikms.api.errors import StartError
from minikms.audit import chain, reader, record
from minikms.audit.chain import AuditKey, Coverage, KeyState
from minikms.audit.reader import (
    DIRECTORY_MODE,
    LOG_NAME,
    NEXT_NAME,
    DamagedSegmentError,
    line_of,
    list_segments,
    segment_name,
)
from minikms.audit.record import ACTOR_SELF, Event, Facts, LineRef, MalformedLineError
from minikms.audit.rules import Trust
from minikms.audit.verify import Verifier
from minikms.platform import append_only
from minikms.platform.append_only import write_whole
from minikms.platform.files import closed_after
from minikms.platform.sync import sync_data, sync_directory, sync_file

READ_BYTES: Final = 64 * 1024
_FIRST_LINE_BYTES: Final = 4096
LOG_END_BYTES_MAX: Final = 32 * 1024 * 1024
"""No writer leaves more after the last signed line that is confirmed: it signs after 8 MiB, and syncs before more than
16 MiB are unconfirmed. The lines of a turn are far fewer bytes.
"""

_READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_TEMP_SUFFIX: Final = ".tmp"
_SIGNATURE_MARK: Final = b'"signature":"'
_TORN_PREFIX: Final = LOG_NAME + ".torn-"
_ASIDE_PREFIX: Final = "minikms-audit.aside-"
_ADVICE: Final = (
    "To continue without it, start once with --accept-audit-loss: the old files are moved aside and a new log begins "
    "(the runbook says how)"
)
IF_RESTORED: Final = "If you restored a copy on purpose, start once without --expect-audit-head (the runbook says how)"


class LogEnd(msgspec.Struct):
    """The end of a log file. whole_bytes: size up to the end of the last good line; the rest was never confirmed.

    fault: empty, or why the end can't be trusted; then the later fields have no meaning.
    """

    whole_bytes: int
    fault: str = ""
    first_ts: int = 0
    first_seq: int = 0
    head: LineRef = LineRef(0, record.ZERO_MAC)
    coverage: Coverage = msgspec.field(default_factory=Coverage)
    log_id: str = ""
    key_version: int = 0
    segment: int = 0
    state: KeyState = KeyState()
    next_segment: int = 0
    """Number of the next segment, if the last line is a `segment_close`; 0 if the file is not closed."""


def read_log_end(fd: int, trust: Trust, confirmed_bytes: int) -> LogEnd:
    """Verify the end of the file `fd`, whose first `confirmed_bytes` a sync has confirmed. Raises OSError when it can't
    be read.
    """
    size = os.fstat(fd).st_size
    start, data = _from_signed_line(fd, size, min(size, confirmed_bytes))
    if data is None:
        return LogEnd(size, fault=f"there is no checkpoint in its last {LOG_END_BYTES_MAX} bytes")
    verifier, good = _verified(data, trust, from_signed_line=start > 0)
    fault = ""
    if verifier.findings:
        fault = verifier.findings[0].text
        verifier, good = _verified(data[:good], trust, from_signed_line=start > 0)
    if start + good < confirmed_bytes:
        fault = fault or f"it ends after {start + good} bytes, and {confirmed_bytes} were on the disk"
        return LogEnd(size, fault=fault)
    if start + good == 0:
        return LogEnd(0, fault=fault)
    try:
        first = record.parse_line(os.pread(fd, _FIRST_LINE_BYTES, 0).partition(b"\n")[0])[0]
    except MalformedLineError as error:
        return LogEnd(size, fault=f"its first line is {error}")
    head = verifier.chain.head
    if head is None or first.facts.get("log_id") != verifier.log_id:
        return LogEnd(size, fault=fault or "its first line belongs to another log")
    segment = first.facts.get("segment")
    return LogEnd(
        start + good,
        first_ts=first.ts,
        first_seq=first.seq,
        head=head,
        coverage=verifier.coverage,
        log_id=verifier.log_id,
        key_version=verifier.key.version,
        segment=segment if isinstance(segment, int) else 0,
        state=verifier.state,
        next_segment=verifier.next_segment,
    )


def _verified(data: bytes, trust: Trust, *, from_signed_line: bool) -> tuple[Verifier, int]:
    """A verifier that was fed up to the first faulty line of `data`, and the bytes of the lines before that."""
    verifier, good = Verifier(trust, from_signed_line=from_signed_line), 0
    for line in data.split(b"\n")[:-1]:
        verifier.feed(line)
        if verifier.findings:
            break
        good += len(line) + 1
    return verifier, good


def _from_signed_line(fd: int, size: int, confirmed_bytes: int) -> tuple[int, bytes | None]:
    """(offset, the bytes from there to the end): from the last signed line that is confirmed, or from the beginning if
    there is none.

    If the last `LOG_END_BYTES_MAX` have none, from their first signed line; the bytes are None without one.
    """
    span = READ_BYTES
    while True:
        begin = max(0, size - span)
        data = _read_exactly(fd, begin, size)
        signed = _signed_lines(data, whole=begin == 0)
        confirmed = [at for at, end in signed if begin + end <= confirmed_bytes]
        if confirmed:
            return begin + confirmed[-1], data[confirmed[-1] :]
        if begin == 0:
            return 0, data
        if span >= LOG_END_BYTES_MAX:
            at = signed[0][0] if signed else 0
            return begin + at, data[at:] if signed else None
        span *= 4


def _signed_lines(data: bytes, *, whole: bool) -> list[tuple[int, int]]:
    """The begin and end of each signed line in `data`. Its first line counts only when `data` begins the file. The
    verifier checks them later.
    """
    spans: list[tuple[int, int]] = []
    at = 0 if whole else data.find(b"\n") + 1
    while (mark := data.find(_SIGNATURE_MARK, at)) >= 0:
        begin, end = data.rfind(b"\n", 0, mark) + 1, data.find(b"\n", mark)
        at = mark + 1
        if end >= 0 and (begin or whole) and _is_signed(data[begin:end]):
            spans.append((begin, end + 1))
    return spans


def _is_signed(line: bytes) -> bool:
    try:
        return record.parse_line(line)[0].type in record.SIGNED_TYPES
    except MalformedLineError:
        return False


def _read_exactly(fd: int, begin: int, end: int) -> bytes:
    parts = []
    while begin < end and (part := os.pread(fd, end - begin, begin)):
        parts.append(part)
        begin += len(part)
    return b"".join(parts)


class ExpectedLog(msgspec.Struct, frozen=True):
    """What other files say about the log. exists: there was one. head: a line of it that was on disk. if_restored: what
    to do if the line is missing, as a sentence without a full stop.
    """

    exists: bool = False
    head: LineRef | None = None
    if_restored: str = IF_RESTORED


class AuditKeys(NamedTuple):
    """The audit key, and the earlier versions that the end of the log may still be under. `unconfirmed`: the keyring
    does not know yet that the log uses the current one.
    """

    current: AuditKey
    former: tuple[AuditKey, ...] = ()
    unconfirmed: bool = False

    def trust(self) -> Trust:
        keys = (self.current, *self.former)
        return Trust(
            public_keys=frozenset(key.signer.public_key() for key in keys),
            mac_keys={key.version: key.mac_key for key in keys},
            since={key.version: key.since for key in keys if key.since is not None},
        )

    def of(self, version: int) -> AuditKey:
        """The key of the version `version`, which is the one at the end of the log."""
        return next((key for key in self.former if key.version == version), self.current)


class OpenedLog(msgspec.Struct):
    """A log ready for its next line. pending: events of the start, to be written first. key: the version that is active
    at the end of the log; `current`: the one of all further lines, which is a later one if a change of key was
    interrupted. state: of the key files, by the last line that names it.
    """

    fd: int
    size: int
    head: LineRef
    coverage: Coverage
    log_id: bytes
    segment: int
    segment_ts: int
    segment_seq: int
    pending: list[Event]
    key: AuditKey
    current: AuditKey
    state: KeyState


def open_log(directory: str, keys: AuditKeys, expected: ExpectedLog, ts: int, *, accept_loss: bool) -> OpenedLog:
    """Open the log of `directory` for appending, or begin one. `ts`: the time, Unix ns.

    Raises StartError if the log is missing, altered or shorter than expected; the text says what to do. Raises OSError.
    """
    try:
        return _open(directory, keys, expected, ts)
    except _LossError as error:
        if not accept_loss:
            restored = isinstance(error, _LineLostError)
            raise StartError(f"{error}. {expected.if_restored if restored else _ADVICE}") from None
        aside = _set_aside(directory, ts)
        reason: Facts = {"previous": str(error)}
        if aside:
            reason["previous_files"] = aside
        if expected.head is not None:
            reason["previous_seq"] = expected.head.seq
            reason["previous_sig"] = encode_text(expected.head.sig)
        return _begin(directory, keys.current, ts, reason)


class _LossError(Exception):
    """A part of the log is missing or altered. The text is a sentence without a full stop."""


class _LineLostError(_LossError):
    """The log can be continued, but does not have the expected line: an older copy of it, or lines were removed."""


def _open(directory: str, keys: AuditKeys, expected: ExpectedLog, ts: int) -> OpenedLog:
    closed = list_segments(directory)
    path = os.path.join(directory, LOG_NAME)
    fd = _open_file(path)
    append_only.recover(path)
    if fd is None:
        if closed:
            return _begin_after(directory, max(closed), keys, expected, ts=ts)
        if expected.exists:
            raise _LossError(f"the audit log {LOG_NAME} is missing, but there was one")
        return _begin(directory, keys.current, ts, {})
    with closed_after(fd):
        end = read_log_end(fd, keys.trust(), append_only.confirmed_bytes(path, fd))
        if end.fault:
            raise _LossError(f"the end of the audit log can't be trusted: {end.fault}")
        if end.whole_bytes and not end.next_segment:
            return _continue(directory, fd, end, keys, expected)
        if end.whole_bytes:
            if os.fstat(fd).st_size > end.whole_bytes:
                _move_torn_aside(directory, fd, end.whole_bytes, seq=end.head.seq + 2)
            os.rename(os.path.join(directory, LOG_NAME), os.path.join(directory, segment_name(end.segment)))
            sync_directory(directory)
            return _begin_after(directory, end.segment, keys, expected, ts=ts)
        if closed:
            return _begin_after(directory, max(closed), keys, expected, ts=ts, torn_fd=fd)
        if expected.exists:
            raise _LossError(f"the audit log {LOG_NAME} is empty, but there was one")
        _move_torn_aside(directory, fd, 0, seq=2)
        return _begin(directory, keys.current, ts, {})


def _continue(directory: str, fd: int, end: LogEnd, keys: AuditKeys, expected: ExpectedLog) -> OpenedLog:
    _check_expected_line(directory, end, expected)
    keys = _usable(end, keys)
    # If an interrupted change of key has to be completed, its line comes first.
    next_seq = end.head.seq + (1 if end.key_version == keys.current.version else 2)
    if os.fstat(fd).st_size > end.whole_bytes:
        _move_torn_aside(directory, fd, end.whole_bytes, seq=next_seq)
    return OpenedLog(
        fd=os.dup(fd),
        size=end.whole_bytes,
        head=end.head,
        coverage=end.coverage,
        log_id=bytes.fromhex(end.log_id),
        segment=end.segment,
        segment_ts=end.first_ts,
        segment_seq=end.first_seq,
        pending=_recovery(directory, next_seq),
        key=keys.of(end.key_version),
        current=keys.current,
        state=end.state,
    )


def _begin(directory: str, key: AuditKey, ts: int, previous: Facts) -> OpenedLog:
    log_id = os.urandom(chain.LOG_ID_BYTES)
    event = chain.genesis_event(log_id, key.version, key.signer.public_key(), previous)
    return _create(directory, event, LogEnd(0, log_id=log_id.hex(), next_segment=1), AuditKeys(key), ts=ts)


def _begin_after(
    directory: str, number: int, keys: AuditKeys, expected: ExpectedLog, *, ts: int, torn_fd: int | None = None
) -> OpenedLog:
    """Begin the file after segment `number`, which must be closed and not compressed."""
    name = segment_name(number)
    fd = _open_file(os.path.join(directory, name))
    if fd is None:
        raise _LossError(f"the audit log {LOG_NAME} is missing, but {list_segments(directory)[number][0]} exists")
    with closed_after(fd):
        end = read_log_end(fd, keys.trust(), os.fstat(fd).st_size)  # a rotation syncs it before it gets this name
    if end.fault or end.next_segment != number + 1:
        raise _LossError(f"the audit log {LOG_NAME} is missing: {end.fault or name + ' is not the last of its files'}")
    _check_expected_line(directory, end, expected)
    keys = _usable(end, keys)
    if torn_fd is not None:
        _move_torn_aside(directory, torn_fd, 0, seq=end.head.seq + 2)
    key = keys.of(end.key_version)
    event = chain.segment_open_event(
        bytes.fromhex(end.log_id),
        key.version,
        key.signer.public_key(),
        segment=number + 1,
        previous=end.head,
        closed=end.coverage,
        state=end.state,
    )
    return _create(directory, event, end, keys, ts=ts)


def _create(directory: str, event: Event, before: LogEnd, keys: AuditKeys, *, ts: int) -> OpenedLog:
    """Make the file that follows `before`, with `event` as its first line."""
    key = keys.of(before.key_version)
    blob, head = chain.make_lines([event], before.head, key.mac_key, ts)
    fd = create_file(directory, blob)
    os.rename(os.path.join(directory, NEXT_NAME), os.path.join(directory, LOG_NAME))
    sync_directory(directory)
    return OpenedLog(
        fd=fd,
        size=len(blob),
        head=head,
        coverage=Coverage.of_line(blob),
        log_id=bytes.fromhex(before.log_id),
        segment=before.next_segment,
        segment_ts=ts,
        segment_seq=head.seq,
        pending=_recovery(directory, head.seq + 1),
        key=key,
        current=keys.current,
        state=before.state,
    )


def create_file(directory: str, blob: bytes) -> int:
    """Create the file `NEXT_NAME` durably with `blob` in it, open for appending. After an OSError there is no file."""
    path = os.path.join(directory, NEXT_NAME)
    fd = reader.make_log_file(path, os.O_RDWR | os.O_APPEND | os.O_TRUNC)
    try:
        write_whole(fd, blob)
        sync_data(fd)
    except OSError:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return fd


def _check_expected_line(directory: str, end: LogEnd, expected: ExpectedLog) -> None:
    """Raise _LossError unless the log has the expected line. `minikms audit verify` checks the lines after it."""
    head = expected.head
    if head is None:
        return
    if end.head.seq < head.seq:
        raise _LineLostError(f"the audit log ends at line {end.head.seq}, but line {head.seq} was written")
    try:
        line = line_of(directory, head.seq)
        sig = None if line is None else record.split_line(line)[1]
    except (DamagedSegmentError, MalformedLineError) as error:
        raise _LossError(f"line {head.seq} of the audit log can't be read: {error}") from None
    if sig is None:
        raise _LineLostError(f"line {head.seq} of the audit log was written, but none of the files has it")
    if sig != head.sig:
        raise _LineLostError(f"line {head.seq} of the audit log is not the one that was written")


def _usable(end: LogEnd, keys: AuditKeys) -> AuditKeys:
    """The keys, without an unconfirmed one that the log went on without. Raise _LossError if it ends under an earlier
    key at another line than the change of key began after.
    """
    current = keys.current
    if end.key_version != current.version and current.since is not None and end.head != current.since:
        if keys.unconfirmed and keys.former:
            return _usable(end, AuditKeys(keys.former[-1], keys.former[:-1]))
        raise _LossError(
            f"the audit log ends at line {end.head.seq} under audit key version {end.key_version}, but version "
            f"{current.version} was introduced after line {current.since.seq}"
        )
    return keys


def _open_file(path: str) -> int | None:
    """Open a log file for reading and appending; None if there is none. Does not follow a symbolic link."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StartError(f"the audit log can't be opened: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StartError(f"{os.path.basename(path)} is not a regular file; move it to another directory")
    return fd


# --- an end that was never confirmed ---------------------------------------------------------------------------------


def _move_torn_aside(directory: str, fd: int, whole_bytes: int, *, seq: int) -> None:
    """Move the bytes after `whole_bytes` into a file named after `seq`, the line that will report them.

    After a crash between copying and truncating, the next start finds the same bytes there and does not add them again.
    """
    name = os.path.join(directory, f"{_TORN_PREFIX}{seq}")
    torn = _read_exactly(fd, whole_bytes, os.fstat(fd).st_size)
    held = b""
    with contextlib.suppress(FileNotFoundError), open(os.open(name, _READ_FLAGS), "rb") as file:
        held = file.read()
    # A fresh file: `held` may be in the page cache only.
    aside = reader.make_log_file(name + _TEMP_SUFFIX, os.O_WRONLY | os.O_TRUNC)
    with open(aside, "wb") as file:
        file.write(held if held.endswith(torn) else held + torn)
        file.flush()
        sync_file(file.fileno())
    os.rename(name + _TEMP_SUFFIX, name)
    sync_directory(directory)
    os.ftruncate(fd, whole_bytes)
    sync_data(fd)


def _recovery(directory: str, seq: int) -> list[Event]:
    """The `recovery` event for line `seq`, if bytes were moved aside for it."""
    name = f"{_TORN_PREFIX}{seq}"
    try:
        with open(os.open(os.path.join(directory, name), _READ_FLAGS), "rb") as file:
            torn = file.read()
    except FileNotFoundError:
        return []
    facts: Facts = {
        "bytes": len(torn),
        "file": name,
        "lines": torn.count(b"\n") + (not torn.endswith(b"\n")),
        "sha256": hashlib.sha256(torn).hexdigest(),
    }
    detail = "the end of the log, which the disk had never confirmed, was damaged and moved aside"
    return [Event(type=record.TYPE_RECOVERY, actor=ACTOR_SELF, detail=detail, facts=facts)]


def _set_aside(directory: str, ts: int) -> str:
    """Move every file of the log into a new directory. Returns its name, empty if there is no file to move."""
    names = [name for name in sorted(os.listdir(directory)) if name == LOG_NAME or name.startswith(LOG_NAME + ".")]
    if not names:
        return ""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(ts // 1_000_000_000))
    for attempt in itertools.count(1):
        aside = f"{_ASIDE_PREFIX}{stamp}" + (f"-{attempt}" if attempt > 1 else "")
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.join(directory, aside), DIRECTORY_MODE)
            break
    if reader.group_reads(directory):
        os.chmod(os.path.join(directory, aside), reader.GROUP_DIRECTORY_MODE)
    for name in names:
        os.rename(os.path.join(directory, name), os.path.join(directory, aside, name))
    sync_directory(os.path.join(directory, aside))
    sync_directory(directory)
    return aside
