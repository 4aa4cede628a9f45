"""Closed files are compressed, retained and removed, and the log stays one chain."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import zstandard

from minikms.audit.log import CHORES_NS, LogLimits
from minikms.audit.queries import verify_directory
from minikms.audit.reader import list_segments
from minikms_daemon.audit.maintenance import (
    RETRY_CALLS,
    CompressionError,
    LogRetention,
    Maintenance,
    compress_closed,
    remove_segments,
)
from tests.harness.disk_faults import failing_os
from tests.minikms.audit.logmaker import (
    LOG,
    SECOND,
    Clock,
    encrypt_event,
    events_of,
    open_log,
    trust,
    types_of,
    verify,
    write_events,
)

DAY_NS = 24 * 3600 * SECOND
LATER = 1_700_000_000 * SECOND + DAY_NS
"""After all that the logs here tell."""


# --- compressed ------------------------------------------------------------------------------------------------------


def test_compressed_files_are_read_like_plain_ones(altered: Path) -> None:
    names = compress_closed(str(altered))
    assert names == [f"{LOG}.{number}.zst" for number in list_segments(str(altered))]
    assert not (altered / f"{LOG}.1").exists()
    assert verify(altered).intact
    assert compress_closed(str(altered)) == []
    log = open_log(altered)
    log.add(encrypt_event())
    log.close()
    assert verify(altered).intact


def test_an_interrupted_compression_is_completed(altered: Path) -> None:
    (altered / f"{LOG}.1.zst.tmp").write_bytes(b"half")
    shutil.copy(altered / f"{LOG}.2", altered / "copy")
    compress_closed(str(altered))
    os.rename(altered / "copy", altered / f"{LOG}.2")
    assert verify(altered).intact, "both forms of one segment are there"
    compress_closed(str(altered))
    assert sorted(altered.glob("*.log.[0-9]")) == []
    assert verify(altered).intact


def test_a_plain_file_is_deleted_only_after_the_compressed_one_is_equal(
    altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = (altered / f"{LOG}.1").read_bytes()
    wrong = zstandard.compress(plain[:-1])

    class Wrong:
        def __init__(self, **_: object) -> None: ...

        def copy_stream(self, source: object, file: Any) -> None:
            file.write(wrong)

    monkeypatch.setattr(zstandard, "ZstdCompressor", Wrong)
    with pytest.raises(CompressionError):
        compress_closed(str(altered))
    assert (altered / f"{LOG}.1").read_bytes() == plain
    assert not list(altered.glob("*.zst*"))


def test_a_damaged_compressed_file_is_found(altered: Path) -> None:
    compress_closed(str(altered))
    path = altered / f"{LOG}.2.zst"
    content = path.read_bytes()
    for at in range(0, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        report = verify_directory(str(altered), trust())
        assert not report.intact
        assert any(finding.file == path.name for finding in report.findings)
    path.write_bytes(content[: len(content) // 2])
    assert not verify_directory(str(altered), trust()).intact


# --- retention -------------------------------------------------------------------------------------------------------


def test_removed_segments_are_named_before_and_the_rest_is_intact(altered: Path) -> None:
    compress_closed(str(altered))
    log = open_log(altered, clock=Clock(now=LATER, step=CHORES_NS))
    assert remove_segments(log, LogRetention(bytes_max=1, days_min=90)) == [], "the floor wins"
    removed = remove_segments(log, LogRetention(bytes_max=1, days_min=0))
    assert removed == [f"{LOG}.{number}.zst" for number in range(1, len(removed) + 1)]
    assert list_segments(str(altered)) == {}
    log.close()
    report = verify(altered)
    assert report.intact and report.first_seq > 1
    assert verify(altered, public_only=True).intact


def test_retention_stops_when_the_rest_is_within_the_bound(altered: Path) -> None:
    sizes = [(altered / names[0]).stat().st_size for names in list_segments(str(altered)).values()]
    log = open_log(altered, clock=Clock(now=LATER))
    removed = remove_segments(log, LogRetention(bytes_max=sum(sizes[2:]), days_min=0))
    assert removed == [f"{LOG}.1", f"{LOG}.2"]
    assert remove_segments(log, LogRetention(days_min=0)) == [], "without a bound everything is kept"
    log.close()
    assert verify(altered).intact


def test_days_min_counts_from_the_closing_of_a_file(altered: Path) -> None:
    closed_at = [events_of(altered / f"{LOG}.{number}")[0].ts for number in (2, 3)]
    log = open_log(altered, clock=Clock(now=closed_at[0] + DAY_NS, step=0))
    assert remove_segments(log, LogRetention(bytes_max=1, days_min=1)) == [f"{LOG}.1"]
    log.close()


def test_a_segment_that_an_auditor_has_not_taken_whole_stays(altered: Path) -> None:
    last = [events_of(altered / f"{LOG}.{number}")[-1].seq for number in (1, 2)]
    log = open_log(altered, clock=Clock(now=LATER))
    upkeep, taken = LogRetention(bytes_max=1, days_min=0), 0
    for taken, removed in ((0, []), (last[0] - 1, []), (last[0], [f"{LOG}.1"]), (last[1] - 1, [])):
        assert remove_segments(log, upkeep, taken) == removed
    maintenance = Maintenance(log, keep=upkeep, taken_seq=lambda: taken)
    maintenance.tick()
    assert next(iter(list_segments(str(altered)))) == 2
    log.close()
    assert verify(altered).intact


def test_a_segment_that_was_named_but_not_deleted_is_no_finding(altered: Path) -> None:
    """Killed between the line and the deletion."""
    kept = (altered / f"{LOG}.1").read_bytes()
    sizes = sum((altered / names[0]).stat().st_size for names in list_segments(str(altered)).values())
    log = open_log(altered, clock=Clock(now=LATER))
    assert remove_segments(log, LogRetention(bytes_max=sizes - 1, days_min=0)) == [f"{LOG}.1"]
    log.close()
    (altered / f"{LOG}.1").write_bytes(kept)
    assert verify(altered).intact


def test_a_deleted_segment_without_a_retention_line_is_missing(altered: Path) -> None:
    log = open_log(altered, clock=Clock(now=LATER))
    sizes = sum((altered / names[0]).stat().st_size for names in list_segments(str(altered)).values())
    remove_segments(log, LogRetention(bytes_max=sizes - 1, days_min=0))
    log.close()
    assert verify(altered).intact
    (altered / f"{LOG}.2").unlink()
    assert [finding.kind for finding in verify(altered).findings] == ["missing"]


# --- maintenance by the daemon ---------------------------------------------------------------------------------------


def test_each_closed_segment_is_compressed_and_retention_follows(tmp_path: Path) -> None:
    clock = Clock(now=LATER, step=CHORES_NS)
    log = open_log(tmp_path, clock=clock, limits=LogLimits(segment_bytes=3000, reserve_bytes=0))
    upkeep = Maintenance(log, keep=LogRetention(bytes_max=2500, days_min=0))
    for _ in range(3):
        begun = log.writer.segment
        write_events(log, 60)
        upkeep.tick()
        upkeep.work()
        upkeep.tick()
        kept = list_segments(str(tmp_path))
        assert 0 < len(kept) < log.writer.segment - begun
        upkeep.work()
        assert {name[-4:] for names in list_segments(str(tmp_path)).values() for name in names} == {".zst"}
    assert upkeep.faults == {}
    log.close()
    assert verify(tmp_path).intact


def test_maintenance_reports_failures_and_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(
        tmp_path, clock=Clock(now=LATER, step=CHORES_NS), limits=LogLimits(segment_bytes=3000, reserve_bytes=0)
    )
    write_events(log, 30)
    upkeep = Maintenance(log, keep=LogRetention(bytes_max=1, days_min=0))
    with failing_os(monkeypatch, "rename"), failing_os(monkeypatch, "unlink"):
        for _ in range(RETRY_CALLS):
            upkeep.work()
            upkeep.tick()
    assert set(upkeep.faults) == {"retention", "compression"}
    assert len(list_segments(str(tmp_path))) == log.writer.segment - 1
    for _ in range(RETRY_CALLS):
        upkeep.work()
        upkeep.tick()
    assert (upkeep.faults, list_segments(str(tmp_path))) == ({}, {})
    log.close()
    assert types_of(tmp_path).count("retention") <= 3 * log.writer.segment, "not a line for each second"
    assert verify(tmp_path).intact


def test_compression_does_not_bring_a_removed_segment_back(altered: Path) -> None:
    class Removing(contextlib.nullcontext[None]):
        def __enter__(self) -> None:
            (altered / f"{LOG}.1").unlink(missing_ok=True)

    assert f"{LOG}.1.zst" not in compress_closed(str(altered), exclusive=Removing())
    assert not list(altered.glob(f"{LOG}.1*.zst*")) and not (altered / f"{LOG}.2").exists()


def test_a_file_that_is_being_closed_is_not_compressed(altered: Path) -> None:
    assert compress_closed(str(altered), below=3) == [f"{LOG}.1.zst", f"{LOG}.2.zst"]
    assert (altered / f"{LOG}.3").exists()
