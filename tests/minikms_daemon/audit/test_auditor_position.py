"""What an auditor reports, compared with the log; and which lines of a log are durable."""

import base64
import os
from pathlib import Path

import pytest

from minikms import api
from minikms.api.errors import AuditUnavailableError, ConflictError, InvalidRequestError, TooLargeError
from minikms.audit import AuditLog, record
from minikms.audit.log import ATTENDED_CHECKPOINT_AGE_NS, CHORES_NS, LogLimits
from minikms.audit.reader import each_segment
from minikms.audit.record import LineRef
from minikms_daemon.audit.maintenance import compress_closed
from minikms_daemon.audit.position import ATTACHED_NS, AuditorPosition, LogView, mac_of, view_on_disk
from tests.harness.disk_faults import failing
from tests.minikms.audit.logmaker import LOG, SECOND, Clock, events_of, open_log, types_of, write_events

ORIGIN = "example.org/log"


def head_of(log: AuditLog) -> LineRef:
    return log.writer.head


def view_of(log: AuditLog) -> LogView:
    return LogView(log.directory, log.writer.log_id.hex(), log.sync.durable_line(), b"", ORIGIN)


def report(view: LogView, seq: int, mac: bytes) -> api.ReportAuditPositionRequest:
    return api.ReportAuditPositionRequest(ORIGIN, view.log_id, seq, base64.b64encode(mac).decode())


def tell(position: AuditorPosition, view: LogView, seq: int, mac: bytes) -> None:
    asked = report(view, seq, mac)
    position.check(asked, view, mac_of(asked))
    position.take(asked, mac)


# --- durable lines ---------------------------------------------------------------------------------------------------


def test_a_line_is_durable_once_the_disk_has_confirmed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path)
    first = head_of(log)
    assert log.sync.durable_line() == first, "a start waits for the disk"
    write_events(log, 1)
    assert log.sync.durable_line() == first
    with monkeypatch.context() as faults:
        faults.setattr(os, "fdatasync", failing(os.fdatasync, at=1))
        with pytest.raises(AuditUnavailableError):
            log.sync.fdatasync()
    assert log.sync.durable_line() == first
    log.sync.fdatasync()
    assert log.sync.durable_line() == head_of(log) != first
    log.abandon()


def test_a_line_that_is_written_during_a_sync_is_not_durable_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path)
    write_events(log, 1)
    before = head_of(log)
    sync = os.fdatasync

    def write_meanwhile(fd: int) -> None:
        sync(fd)
        write_events(log, 1)

    monkeypatch.setattr(os, "fdatasync", write_meanwhile)
    log.sync.fdatasync()
    assert log.sync.durable_line() == before
    assert head_of(log).seq == before.seq + 1
    monkeypatch.setattr(os, "fdatasync", sync)
    log.close()


def test_after_a_rotation_all_lines_are_durable(tmp_path: Path) -> None:
    log = open_log(tmp_path, clock=Clock(step=CHORES_NS), limits=LogLimits(segment_bytes=1000, reserve_bytes=0))
    while log.writer.segment < 3:
        write_events(log, 1)
    durable = head_of(log)
    assert log.sync.durable_line() == durable
    write_events(log, 1)
    assert log.sync.durable_line() == durable, "and stay so when another line is written"
    log.close()


# --- checkpoint lines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attached", "seconds"), [(True, 5), (False, 61)])
def test_lines_are_signed_in_five_seconds_where_an_auditor_takes_them(
    tmp_path: Path, attached: bool, seconds: int
) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    log.attended = lambda: attached
    log.tick()
    for _ in range(3):
        write_events(log, 1)
        count = types_of(tmp_path).count("checkpoint")
        for _ in range(seconds):
            clock.now += SECOND
            log.tick()
        assert types_of(tmp_path).count("checkpoint") == count + 1
    lines = len(events_of(tmp_path / LOG))
    for _ in range(10):
        clock.now += ATTENDED_CHECKPOINT_AGE_NS
        log.tick()
    assert len(events_of(tmp_path / LOG)) == lines, "nothing is signed twice"
    log.abandon()


def test_an_auditor_is_attached_for_half_a_minute_after_a_report(tmp_path: Path) -> None:
    now = 0
    position = AuditorPosition(lambda: now)
    log = open_log(tmp_path)
    position.begin(log.writer.log_id.hex())
    assert not position.attached()
    tell(position, view_of(log), 0, b"")
    assert position.attached() and position.seq == 0
    now = ATTACHED_NS
    assert not position.attached()
    log.abandon()


# --- reports ---------------------------------------------------------------------------------------------------------


def test_a_position_is_a_durable_line_of_this_log_and_never_decreases(tmp_path: Path) -> None:
    log = open_log(tmp_path, clock=Clock(step=CHORES_NS), limits=LogLimits(segment_bytes=1500, reserve_bytes=0))
    write_events(log, 20)
    log.sync.fdatasync()
    compress_closed(str(tmp_path))
    while log.sync.durable_line() == log.writer.head:  # a rotation waits for the disk
        write_events(log, 1)
    lines = [line for file in each_segment(str(tmp_path)) for line in file.lines()]
    macs = {number: record.split_line(line)[1] for number, line in enumerate(lines, 1)}
    position, view = AuditorPosition(), view_of(log)
    position.begin(view.log_id)
    durable = view.durable.seq
    assert durable < len(lines)
    for seq, mac, error in (
        (durable, macs[durable - 1], InvalidRequestError),
        (durable, bytes(32), InvalidRequestError),
        (durable + 1, macs[durable + 1], ConflictError),
        (record.INTEGER_MAX, bytes(32), ConflictError),
    ):
        with pytest.raises(error):
            tell(position, view, seq, mac)
    assert position.seq == 0
    for seq in (3, durable - 1, durable, durable):
        tell(position, view, seq, macs[seq])
        assert position.seq == seq
    with pytest.raises(ConflictError, match="never decreases"):
        tell(position, view, durable - 1, macs[durable - 1])
    with pytest.raises(ConflictError, match="has the id"):
        position.check(report(view._replace(log_id="00" * 16), durable, macs[durable]), view, macs[durable])
    tell(position, view, 0, b"")
    assert position.seq == durable, "an attach takes nothing back"
    log.abandon()


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"origin": ""}, InvalidRequestError),
        ({"origin": "with space"}, InvalidRequestError),
        ({"origin": "x" * 129}, InvalidRequestError),
        ({"origin": "a\nb"}, InvalidRequestError),
        ({"seq": -1}, InvalidRequestError),
        ({"seq": 2**63}, InvalidRequestError),
        ({"seq": 0}, InvalidRequestError),
        ({"mac": ""}, InvalidRequestError),
        ({"mac": "AA=="}, InvalidRequestError),
        ({"mac": "*" * 44}, InvalidRequestError),
        ({"mac": "A" * 100_000}, TooLargeError),
    ],
)
def test_a_malformed_report_is_refused(changed: dict[str, object], error: type[Exception]) -> None:
    asked = {"origin": ORIGIN, "log_id": "", "seq": 1, "mac": base64.b64encode(bytes(32)).decode(), **changed}
    with pytest.raises(error):
        mac_of(api.ReportAuditPositionRequest(**asked))  # type: ignore[arg-type]  # tests pass on what it takes


# --- a log that was not opened since the start -----------------------------------------------------------------------


def test_of_a_log_that_is_not_opened_the_confirmed_lines_are_known(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    write_events(log, 5)
    log.sync.fdatasync()
    durable = log.sync.durable_line()
    write_events(log, 5)
    log.abandon()
    view = view_on_disk(str(tmp_path), b"", ORIGIN)
    assert (view.log_id, view.durable) == (log.writer.log_id.hex(), durable)
    (tmp_path / f"{LOG}.confirmed").unlink()
    assert view_on_disk(str(tmp_path), b"", ORIGIN).durable.seq == 1, "the first line was synced with the file"
    for content in (b"", b"\n", b"no line\n" * 3):
        (tmp_path / LOG).write_bytes(content)
        assert view_on_disk(str(tmp_path), b"", ORIGIN).durable.seq == 0
    (tmp_path / LOG).unlink()
    assert view_on_disk(str(tmp_path), b"", ORIGIN).log_id == ""
