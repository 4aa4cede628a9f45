"""Lines are written before answers are sent, or no answer is sent; and the log recovers by itself.

The tests inject faults into the calls of the real log (`os.write`, `os.ftruncate`, `os.fdatasync`);
test_audit_faults.py has the kernel make them.
"""

import errno
import itertools
import os
import threading
from pathlib import Path

import pytest

from minikms.api.errors import AuditUnavailableError
from minikms.audit import AuditLog, Event, record, writer
from minikms.audit.log import CHECKPOINT_AGE_NS, CHORES_NS, FSYNC_INTERVAL_MS, LogLimits
from minikms.audit.reader import LOG_NAME
from minikms.audit.record import LineRef
from tests.minikms.audit.logmaker import (
    KEY1,
    KEY2,
    LOG,
    Clock,
    encrypt_event,
    events_of,
    lines_of,
    make_log,
    open_log,
    types_of,
    verify,
    write_events,
)


class Faults:
    """Makes system calls of this process fail: how often, and with which error. `short` writes that many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.write: list[int] = []
        self.short: list[int] = []
        self.ftruncate: list[int] = []
        self.fdatasync: list[int] = []
        real_write, real_ftruncate, real_fdatasync = os.write, os.ftruncate, os.fdatasync

        def write(fd: int, data: bytes) -> int:
            if self.short:
                return real_write(fd, data[: self.short.pop(0)])
            if self.write:
                raise _error(self.write.pop(0))
            return real_write(fd, data)

        def ftruncate(fd: int, length: int) -> None:
            if self.ftruncate:
                raise _error(self.ftruncate.pop(0))
            real_ftruncate(fd, length)

        def fdatasync(fd: int) -> None:
            if self.fdatasync:
                raise _error(self.fdatasync.pop(0))
            real_fdatasync(fd)

        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(os, "ftruncate", ftruncate)
        monkeypatch.setattr(os, "fdatasync", fdatasync)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def commit_one(log: AuditLog) -> None:
    log.add(encrypt_event())
    log.commit()


def test_a_commit_writes_all_lines_of_a_turn_with_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path)
    writes = []
    real_write = os.write

    def write(fd: int, data: bytes) -> int:
        writes.append(len(data))
        return real_write(fd, data)

    monkeypatch.setattr(os, "write", write)
    for number in range(100):
        log.add(encrypt_event(number))
    assert writes == []
    log.commit()
    assert len(writes) == 1
    log.commit()
    assert len(writes) == 1, "nothing to write, nothing written"
    assert types_of(tmp_path) == ["genesis"] + ["encrypt"] * 100
    log.close()


@pytest.mark.parametrize("detail", ["", "no ASCII: é"])
def test_an_event_that_is_added_again_has_a_line_of_its_own(tmp_path: Path, detail: str) -> None:
    """Also beside an event whose text has to be escaped, and where `seq` gets another digit."""
    log = open_log(tmp_path)
    again, other = encrypt_event(1), encrypt_event(2, detail=detail)
    for turn in ([again] * 12, [again, other, again, again], [again]):
        for event in turn:
            log.add(event)
        log.commit()
    log.close()
    events = events_of(tmp_path / LOG_NAME)[1:-1]
    assert [event.seq for event in events] == list(range(2, 19))
    assert [event.request_id for event in events] == ["r1"] * 13 + ["r2"] + ["r1"] * 3
    assert {event.key_id for event in events if event.request_id == "r1"} == {again.key_id}
    assert verify(tmp_path).intact


def test_the_head_is_the_last_line(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    commit_one(log)
    assert log.head["seq"] == 2
    assert f'"sig":"{log.head["sig"]}"'.encode() in lines_of(tmp_path)[-1]
    log.close()


def test_a_closed_log_ends_in_a_checkpoint_and_can_continue(tmp_path: Path) -> None:
    make_log(tmp_path, 3)
    make_log(tmp_path, 3)
    assert types_of(tmp_path) == ["genesis"] + ["encrypt"] * 3 + ["checkpoint"] + ["encrypt"] * 3 + ["checkpoint"]
    assert verify(tmp_path).intact


def test_opening_and_closing_without_events_does_not_grow_the_log(tmp_path: Path) -> None:
    make_log(tmp_path, 1)
    before = lines_of(tmp_path)
    for _ in range(3):
        open_log(tmp_path).close()
    assert lines_of(tmp_path) == before


def test_a_checkpoint_comes_after_checkpoint_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHECKPOINT_LINES", 10)
    log = open_log(tmp_path)
    write_events(log, 100, per_commit=7)
    log.close()
    report = verify(tmp_path)
    assert report.intact
    gaps = [0, *(index for index, kind in enumerate(types_of(tmp_path)) if kind == "checkpoint")]
    assert len(gaps) == report.checkpoints + 1
    assert all(later - earlier <= 10 + 7 for earlier, later in itertools.pairwise(gaps))


def test_a_turn_of_giant_lines_has_checkpoints_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads back to the last signed line, so the bytes between two signed lines must be bounded."""
    monkeypatch.setattr(writer, "CHECKPOINT_BYTES", 50_000)
    log = open_log(tmp_path)
    for number in range(64):
        log.add(encrypt_event(number, request_ids=["r" * 100] * 100))
    log.commit()
    assert types_of(tmp_path).count("checkpoint") >= 8
    assert verify(tmp_path).intact
    log.close()


def test_lines_are_signed_within_a_minute(tmp_path: Path) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    commit_one(log)
    log.tick()
    assert types_of(tmp_path)[-1] == "encrypt"
    clock.now += CHECKPOINT_AGE_NS
    log.tick()
    assert types_of(tmp_path)[-1] == "checkpoint"
    clock.now += CHECKPOINT_AGE_NS
    log.tick()
    assert types_of(tmp_path).count("checkpoint") == 1, "nothing new to sign"
    log.close()


def test_the_log_is_signed_and_its_reserve_kept_while_the_clock_is_behind(tmp_path: Path, faults: Faults) -> None:
    """The wall clock is set back by a day; only the monotonic clock says that time passes."""
    wall, monotonic = Clock(), Clock(now=0, step=0)
    log = open_log(tmp_path, clock=wall, monotonic_ns=monotonic, limits=LogLimits(reserve_bytes=256 * 1024))
    faults.write = [errno.ENOSPC]
    commit_one(log)
    assert log.status()["reserve_bytes"] != 256 * 1024
    wall.now -= 1440 * CHECKPOINT_AGE_NS
    monotonic.now += CHECKPOINT_AGE_NS
    log.tick()
    assert types_of(tmp_path)[-1] == "checkpoint"
    assert log.status()["reserve_bytes"] == 256 * 1024
    commit_one(log)
    monotonic.now += CHORES_NS
    log.tick()
    assert types_of(tmp_path)[-1] == "encrypt", "a line is signed when it is a minute old, not earlier"
    monotonic.now += CHECKPOINT_AGE_NS
    log.tick()
    assert types_of(tmp_path)[-1] == "checkpoint"
    log.close()
    assert verify(tmp_path).intact


# --- when it can't be written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_failed_write_changes_nothing_and_the_next_commit_tries_again(
    tmp_path: Path, faults: Faults, number: int
) -> None:
    log = open_log(tmp_path)
    commit_one(log)
    before, head = lines_of(tmp_path), log.head
    faults.write = [number]
    log.add(encrypt_event(1))
    log.add(encrypt_event(2))
    with pytest.raises(AuditUnavailableError):
        log.commit()
    assert (lines_of(tmp_path), log.head, log.writable) == (before, head, False)
    assert log.status()["unavailable_reason"] == os.strerror(number)
    assert log.service_status() == {
        "status": "audit_unavailable",
        "reason": f"the audit log can't be written: {os.strerror(number)}",
    }
    commit_one(log)
    assert log.writable
    assert log.service_status() == {"status": "ok", "reason": ""}
    resumed, after = (record.parse_line(line)[0] for line in lines_of(tmp_path)[-2:])
    assert (resumed.type, resumed.facts["dropped"], resumed.facts["reason"]) == ("resumed", 2, os.strerror(number))
    assert after.type == "encrypt"
    log.close()
    assert verify(tmp_path).intact


@pytest.mark.parametrize("length", [0, 1, 150, 400])
def test_a_short_write_that_the_disk_refuses_to_end_is_truncated(tmp_path: Path, faults: Faults, length: int) -> None:
    log = open_log(tmp_path)
    commit_one(log)
    before = (tmp_path / LOG).read_bytes()
    faults.short, faults.write = [length], [errno.ENOSPC]
    log.add(encrypt_event(1))
    log.add(encrypt_event(2))
    log.add(encrypt_event(3))
    with pytest.raises(AuditUnavailableError):
        log.commit()
    assert (tmp_path / LOG).read_bytes() == before
    commit_one(log)
    log.close()
    assert verify(tmp_path).intact


def test_a_short_write_goes_on(tmp_path: Path, faults: Faults) -> None:
    """It is no full disk: a network file system may write short at a signal."""
    log = open_log(tmp_path)
    faults.short = [1, 100]
    commit_one(log)
    log.close()
    assert types_of(tmp_path) == ["genesis", "encrypt", "checkpoint"]
    assert verify(tmp_path).intact


def test_a_failed_truncation_is_repeated_before_the_next_write(tmp_path: Path, faults: Faults) -> None:
    log = open_log(tmp_path)
    faults.short, faults.write, faults.ftruncate = [100], [errno.ENOSPC], [errno.EIO, errno.EIO]
    with pytest.raises(AuditUnavailableError):
        commit_one(log)
    assert (tmp_path / LOG).read_bytes()[-1:] != b"\n"
    with pytest.raises(AuditUnavailableError):
        commit_one(log)
    commit_one(log)
    log.close()
    assert verify(tmp_path).intact
    assert types_of(tmp_path) == ["genesis", "resumed", "encrypt", "checkpoint"]


def test_the_log_recovers_without_a_request(tmp_path: Path, faults: Faults) -> None:
    log = open_log(tmp_path)
    faults.write = [errno.EIO, errno.EIO]
    with pytest.raises(AuditUnavailableError):
        commit_one(log)
    writable = []
    for _ in range(2):
        log.tick()
        writable.append(log.writable)
    assert writable == [False, True]
    assert types_of(tmp_path)[-1] == "resumed"
    log.close()


def test_all_dropped_events_are_counted(tmp_path: Path, faults: Faults) -> None:
    log = open_log(tmp_path)
    faults.write = [errno.EIO] * 5
    for _ in range(5):
        with pytest.raises(AuditUnavailableError):
            commit_one(log)
    commit_one(log)
    assert record.parse_line(lines_of(tmp_path)[-2])[0].facts["dropped"] == 5
    assert log.status()["events_dropped"] == 5
    log.close()


def test_a_failing_close_raises_and_closes(tmp_path: Path, faults: Faults) -> None:
    log = open_log(tmp_path)
    log.add(encrypt_event())
    faults.write = [errno.EIO]
    with pytest.raises(AuditUnavailableError):
        log.close()
    log.close()
    make_log(tmp_path, 1)
    assert verify(tmp_path).intact


# --- a full disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_recorded_in_the_reserve(tmp_path: Path, faults: Faults) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock, limits=LogLimits(reserve_bytes=256 * 1024))
    faults.write = [errno.ENOSPC, errno.ENOSPC]
    commit_one(log)
    assert types_of(tmp_path) == ["genesis", "disk_full", "encrypt"]
    assert log.status()["disk_full"] is True
    assert log.status()["reserve_bytes"] == 128 * 1024, "two steps were given back for one line"
    clock.now += CHORES_NS
    commit_one(log)
    commit_one(log)
    assert types_of(tmp_path)[3:] == ["encrypt", "disk_ok", "encrypt"]
    assert log.status()["disk_full"] is False
    assert log.status()["reserve_bytes"] == 256 * 1024
    log.close()
    assert verify(tmp_path).intact


def test_refused_peers_get_no_reserved_space(tmp_path: Path, faults: Faults) -> None:
    log = open_log(tmp_path, limits=LogLimits(reserve_bytes=256 * 1024))
    faults.write = [errno.ENOSPC]
    log.add(Event(type="refused", actor="peer_uid:99", outcome="unauthorized"))
    with pytest.raises(AuditUnavailableError):
        log.commit()
    assert log.status()["reserve_bytes"] == 256 * 1024
    log.close()


def test_no_request_is_answered_when_the_reserve_is_used_up(tmp_path: Path, faults: Faults) -> None:
    log = open_log(tmp_path, limits=LogLimits(reserve_bytes=128 * 1024))
    faults.write = [errno.ENOSPC] * 3
    with pytest.raises(AuditUnavailableError):
        commit_one(log)
    assert log.status()["reserve_bytes"] == 0
    log.close()
    assert verify(tmp_path).intact


def test_text_escaped_before_a_failed_write_is_not_escaped_twice(tmp_path: Path, faults: Faults) -> None:
    log = open_log(tmp_path, limits=LogLimits(reserve_bytes=128 * 1024))
    faults.write = [errno.ENOSPC]
    log.add(encrypt_event(thread_id="é%"))
    log.commit()
    assert record.parse_line(lines_of(tmp_path)[-1])[0].thread_id == "%C3%A9%25"
    log.close()


# --- on the disk -----------------------------------------------------------------------------------------------------


def test_committed_lines_are_dirty_until_they_are_synced(tmp_path: Path) -> None:
    log = open_log(tmp_path, fsync="interval")
    assert (log.sync.dirty, log.sync.needed) == (False, False)
    commit_one(log)
    assert (log.sync.dirty, log.sync.needed) == (True, True)
    log.sync.fdatasync()
    assert (log.sync.dirty, log.sync.needed) == (False, False)
    log.add(encrypt_event())
    log.commit(durable=True)
    assert not log.sync.dirty
    log.close()


def test_the_policies_differ_in_when_to_sync(tmp_path: Path) -> None:
    log = open_log(tmp_path, fsync="never")
    commit_one(log)
    assert (log.sync.needed, log.sync.each_turn) == (False, False)
    log.close()
    log = open_log(tmp_path, fsync="turn")
    assert log.sync.each_turn
    log.close()


def test_after_a_failed_fdatasync_no_line_is_accepted_until_one_succeeds(tmp_path: Path, faults: Faults) -> None:
    log = open_log(tmp_path)
    commit_one(log)
    faults.fdatasync = [errno.EIO, errno.EIO]
    with pytest.raises(AuditUnavailableError):
        log.sync.fdatasync()
    assert (log.writable, log.sync.needed) == (False, True)
    with pytest.raises(AuditUnavailableError):
        commit_one(log)
    with pytest.raises(AuditUnavailableError):
        log.sync.fdatasync()
    log.sync.fdatasync()
    commit_one(log)
    assert log.writable
    log.close()
    assert verify(tmp_path).intact


def test_fdatasync_in_another_thread_works_during_commits_and_rotations(tmp_path: Path) -> None:
    log = open_log(tmp_path, clock=Clock(step=CHORES_NS), limits=LogLimits(segment_bytes=20_000, reserve_bytes=0))
    stop = threading.Event()
    errors: list[BaseException] = []

    def sync() -> None:
        while not stop.is_set():
            try:
                log.sync.fdatasync()
            except BaseException as error:  # noqa: BLE001 - reported by the test, whatever it is
                errors.append(error)
                return

    thread = threading.Thread(target=sync)
    thread.start()
    write_events(log, 2000, per_commit=5)
    stop.set()
    thread.join()
    log.close()
    assert errors == []
    report = verify(tmp_path)
    assert report.intact and report.segments > 5


# --- the key ---------------------------------------------------------------------------------------------------------


def test_a_new_key_is_active_from_the_next_line_on(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    commit_one(log)
    log.change_key(KEY2.audit_key())
    commit_one(log)
    log.close()
    assert types_of(tmp_path) == ["genesis", "encrypt", "audit_key", "encrypt", "checkpoint"]
    assert verify(tmp_path, KEY1, KEY2).intact
    assert not verify(tmp_path, KEY1).intact


def test_a_change_of_key_that_fails_is_completed_before_any_other_line(tmp_path: Path, faults: Faults) -> None:
    """The keyring names the line before it, after which the former key may write nothing."""
    log = open_log(tmp_path)
    commit_one(log)
    head = log.sign_and_sync()
    faults.write = [errno.EIO, errno.EIO]
    with pytest.raises(AuditUnavailableError):
        log.change_key(KEY2.audit_key())
    with pytest.raises(AuditUnavailableError):
        commit_one(log)
    commit_one(log)
    log.close()
    assert types_of(tmp_path)[head.seq :] == ["audit_key", "resumed", "encrypt", "checkpoint"]
    assert verify(tmp_path, KEY1, KEY2).intact


def test_a_change_of_key_on_a_full_disk_uses_the_reserve(tmp_path: Path, faults: Faults) -> None:
    """No line could be written before it, so the reserve would be of no use."""
    log = open_log(tmp_path, limits=LogLimits(reserve_bytes=256 * 1024))
    commit_one(log)
    log.sign_and_sync()
    faults.write = [errno.ENOSPC]
    log.change_key(KEY2.audit_key())
    commit_one(log)
    assert log.writable
    assert log.status()["reserve_bytes"] == 192 * 1024
    log.close()
    assert types_of(tmp_path)[-3:] == ["audit_key", "encrypt", "checkpoint"]
    assert verify(tmp_path, KEY1, KEY2).intact


def test_a_log_that_is_held_takes_no_line_until_it_is_released(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    commit_one(log)
    head = log.hold()
    before = lines_of(tmp_path)
    assert len(before) == head.seq
    assert log.status()["writable"] is True
    log.fail_held("the keyring could not be written")
    assert log.status()["writable"] is False
    log.tick()
    for _ in range(2):
        with pytest.raises(AuditUnavailableError):
            commit_one(log)
    assert lines_of(tmp_path) == before
    log.release()
    log.tick()
    assert log.writable
    log.close()
    assert types_of(tmp_path)[-2:] == ["resumed", "checkpoint"]


def test_no_key_shows_in_a_repr_or_an_error(tmp_path: Path, faults: Faults) -> None:
    log = open_log(tmp_path)
    faults.write = [errno.EIO]
    with pytest.raises(AuditUnavailableError) as raised:
        commit_one(log)
    shown = repr(log) + repr(vars(log)) + repr(KEY1.audit_key()) + str(raised.value)
    for secret in (bytes(KEY1.mac_key), bytes(KEY1.seed)):
        assert secret.hex() not in shown and repr(secret)[2:-1] not in shown
    assert str(tmp_path) not in str(raised.value)
    log.close()


def test_the_verifier_accepts_the_head_of_status(tmp_path: Path) -> None:
    log = make_log(tmp_path, 3)
    seq, sig = log.head["seq"], log.head["sig"]
    assert isinstance(seq, int) and isinstance(sig, str)
    head = record.parse_line(lines_of(tmp_path)[-1])[2]
    assert verify(tmp_path, expect_head=LineRef(seq, head)).lines_after_expected_head == 0


def test_the_interval_of_syncing_is_the_documented_one() -> None:
    assert FSYNC_INTERVAL_MS == 100
