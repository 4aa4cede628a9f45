"""How far an auditor has taken the audit log, as it reports.

Owns: the last report of this process, its checks, and whether an auditor is attached. Invariants: a position names a
line of the log by number and MAC; it never decreases in one process, and is kept over a seal; before the first report
since the start nothing counts as taken. What it says is the auditor's word: a compromised auditor can report lines that
it has not kept. It must never write.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from minikms import api
from minikms.api.base64 import decode_canonical
from minikms.api.errors import ConflictError, InvalidRequestError, KmsRefusedError, StorageUnavailableError
from minikms.audit import record
from minikms.audit.reader import LOG_NAME, line_of
from minikms.audit.record import LineRef, MalformedLineError
from minikms.platform import append_only

ATTACHED_NS: Final = 30 * 1_000_000_000
"""An auditor reports every 5 s. For this long after a report it counts as attached."""
_NOTHING: Final = LineRef(0, b"")
_NS: Final = 1_000_000_000
_READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class LogView(NamedTuple):
    """What an auditor gets to know of a log, and what its reports are compared with. log_id: in hexadecimal, empty
    where it is not known. durable: the last line that is on the disk for certain, `seq` 0 where that is not known.
    """

    directory: str
    log_id: str
    durable: LineRef
    public_key: bytes
    origin: str

    def answer(self) -> api.AuditPositionAnswer:
        durable = api.DurableLine(self.durable.seq, self.durable.sig)
        return api.AuditPositionAnswer(self.log_id, durable, self.public_key)


class AuditorPosition:
    """The reports of one process. `monotonic_ns`: the clock of their age."""

    def __init__(self, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._head = _NOTHING
        self._log_id = ""
        self._reported_ns: int | None = None

    def begin(self, log_id: str) -> None:
        """A log was opened. After a seal it is the same one, and nothing changes."""
        if log_id != self._log_id:
            self._log_id, self._head = log_id, _NOTHING

    def check(self, report: api.ReportAuditPositionRequest, view: LogView, mac: bytes) -> None:
        """Compares a report with the log. Reads the disk. Raises ConflictError, InvalidRequestError,
        StorageUnavailableError.
        """
        if report.seq == 0 or (view.log_id, LineRef(report.seq, mac)) == (report.log_id, self._head):
            return
        if report.log_id != view.log_id:
            raise ConflictError(f"the audit log has the id {view.log_id}: another one was begun")
        if report.seq < self._head.seq:
            raise ConflictError(f"line {self._head.seq} was reported before, and a position never decreases")
        if report.seq > view.durable.seq:
            raise ConflictError(f"line {report.seq} is not durable: the last one is {view.durable.seq}")
        try:
            line = line_of(view.directory, report.seq)
            logged = None if line is None else record.split_line(line)[1]
        except (KmsRefusedError, OSError) as error:
            raise StorageUnavailableError("the reported line can't be read") from error
        if logged is None:
            raise ConflictError(f"the audit log has no line {report.seq} any more")
        if logged != mac:
            raise InvalidRequestError(f"line {report.seq} of the audit log has another mac")

    def take(self, report: api.ReportAuditPositionRequest, mac: bytes) -> None:
        """A report that `check` has let pass."""
        self._reported_ns = self._monotonic_ns()
        if report.seq > self._head.seq:
            self._head = LineRef(report.seq, mac)

    def attached(self) -> bool:
        """Whether an auditor has reported lately."""
        return self._reported_ns is not None and self._monotonic_ns() - self._reported_ns < ATTACHED_NS

    @property
    def seq(self) -> int:
        """The last line that the auditor has taken; 0 before its first report since the start."""
        return self._head.seq

    @property
    def age_s(self) -> int | None:
        """The seconds since the last report; None before the first."""
        return None if self._reported_ns is None else (self._monotonic_ns() - self._reported_ns) // _NS


def mac_of(report: api.ReportAuditPositionRequest) -> bytes:
    """The MAC of a report, after the checks that need no log. Raises InvalidRequestError, TooLargeError."""
    mac = decode_canonical(report.mac, record.MAC_BYTES, "mac")
    if api.ORIGIN_PATTERN.fullmatch(report.origin) is None:
        raise InvalidRequestError("origin is 1 to 128 characters of A-Z, a-z, 0-9 and ._/:-")
    if not 0 <= report.seq <= record.INTEGER_MAX:
        raise InvalidRequestError("seq is the number of a line, or 0 for none")
    if len(mac) != (record.MAC_BYTES if report.seq else 0):
        raise InvalidRequestError("mac is that of the line, 32 bytes, and empty for seq 0")
    return mac


def view_on_disk(directory: str, public_key: bytes, origin: str) -> LogView:
    """The view of a log that was not opened since the start, because the daemon is sealed."""
    view = LogView(directory, "", _NOTHING, public_key, origin)
    path = os.path.join(directory, LOG_NAME)
    with contextlib.suppress(OSError, MalformedLineError, KeyError), open(os.open(path, _READ_FLAGS), "rb") as file:
        size = append_only.confirmed_bytes(path, file.fileno())
        first, _, mac = record.parse_line(file.readline(record.LINE_BYTES_MAX).rstrip(b"\n"))
        view = view._replace(log_id=str(first.facts["log_id"]), durable=LineRef(first.seq, mac))
        begin = max(0, size - record.LINE_BYTES_MAX)
        for line in os.pread(file.fileno(), size - begin, begin).split(b"\n")[-2:-1]:
            last, _, mac = record.parse_line(line)
            view = view._replace(durable=LineRef(last.seq, mac))
    return view
