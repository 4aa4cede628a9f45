"""Verifying a directory: where a check begins, what is missing, and reading while a writer writes."""

import time
from pathlib import Path
from typing import Any

import pytest

from minikms.audit import reader, record
from minikms.audit.log import CHORES_NS, LogLimits
from minikms.audit.queries import AuditLogMissingError, verify_directory
from minikms_daemon.audit.maintenance import compress_closed
from tests.minikms.audit.logmaker import LOG, Clock, events_of, open_log, trust, verify, write_events

# --- where a check begins, and beside a writer -----------------------------------------------------------------------


def test_a_check_can_begin_at_any_signed_line(original: Path) -> None:
    whole = verify(original)
    for number in (1, 2, 3):
        signed = [event.seq for event in events_of(original / f"{LOG}.{number}") if event.type in record.SIGNED_TYPES]
        report = verify_directory(str(original), trust(), from_checkpoint=signed[-1])
        assert report.intact and report.first_seq == signed[-1] and report.head == whole.head
        public = verify_directory(str(original), trust(public_only=True), from_checkpoint=signed[-1])
        assert public.intact


def test_lines_before_the_start_of_a_check_are_not_read(altered: Path) -> None:
    signed = [event.seq for event in events_of(altered / f"{LOG}.3") if event.type in record.SIGNED_TYPES]
    (altered / f"{LOG}.1").write_bytes(b"nonsense\n")
    assert verify_directory(str(altered), trust(), from_checkpoint=signed[0]).intact


def test_a_check_does_not_begin_at_an_ordinary_or_a_forged_line(altered: Path) -> None:
    report = verify_directory(str(altered), trust(), from_checkpoint=3)
    assert report.findings[0].kind == "anchor"
    path = altered / f"{LOG}.1"
    signed = [event.seq for event in events_of(path) if event.type in record.SIGNED_TYPES][-1]
    path.write_bytes(path.read_bytes().replace(b'"next_segment":2', b'"next_segment":3'))
    assert not verify_directory(str(altered), trust(), from_checkpoint=signed).intact
    with pytest.raises(AuditLogMissingError):
        verify_directory(str(altered), trust(), from_checkpoint=10**9)


def test_a_directory_without_a_log_raises_audit_log_missing(tmp_path: Path) -> None:
    with pytest.raises(AuditLogMissingError):
        verify_directory(str(tmp_path), trust())


def test_progress_ends_with_the_total(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms.audit.queries._PROGRESS_LINES", 5)
    told: list[tuple[int, int]] = []
    verify_directory(str(original), trust(), progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    lines = (path for path in original.iterdir() if path.name.startswith(LOG) and path.suffix != ".confirmed")
    total = sum(path.stat().st_size for path in lines)
    assert told[-1] == (total, total)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_that_is_closed_while_it_is_read_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    """Each file gets more lines, is rotated and perhaps compressed while it is read."""
    log = open_log(tmp_path, clock=Clock(step=CHORES_NS), limits=LogLimits(segment_bytes=2000, reserve_bytes=0))
    write_events(log, 10)
    rounds = 0
    real_lines = reader.SegmentFile.lines

    def lines(self: reader.SegmentFile) -> Any:
        nonlocal rounds
        for line in real_lines(self):
            yield line
            rounds += 1
            if rounds < 40 and rounds % 3 == 0:
                write_events(log, 4)
                if compressed:
                    compress_closed(str(tmp_path))

    monkeypatch.setattr(reader.SegmentFile, "lines", lines)
    report = verify_directory(str(tmp_path), trust())
    assert report.intact, report.findings
    assert report.segments > 3
    log.close()


def test_a_last_line_that_is_completed_while_reading_is_no_finding(
    altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (altered / LOG).read_bytes()
    (altered / LOG).write_bytes(content[:-100])

    def complete(_: float) -> None:
        (altered / LOG).write_bytes(content)

    monkeypatch.setattr(time, "sleep", complete)
    assert verify_directory(str(altered), trust()).intact


def test_memory_is_bounded_by_a_chunk_and_a_line(tmp_path: Path) -> None:
    """A file without a newline that is larger than the memory bound."""
    import tracemalloc

    with open(tmp_path / LOG, "wb") as file:
        for _ in range(40):
            file.write(b"x" * 1024 * 1024)
    tracemalloc.start()
    try:
        report = verify_directory(str(tmp_path), trust())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not report.intact
    assert peak < 12 * 1024 * 1024
