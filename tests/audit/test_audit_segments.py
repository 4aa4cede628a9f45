"""A log is one chain across its files: closed, renamed, compressed, removed, or taken away."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from logmaker import KEY1, KEY2, LOG, SECOND, Clock, encrypt_event, make_log, open_log, trust, verify, write_events

from minikms.audit import AuditLog, reading, record
from minikms.audit.check import AuditLogMissingError, verify_directory
from minikms.audit.compress import CompressionError, compress_closed
from minikms.audit.log import CHORES_NS, Limits
from minikms.audit.retention import Retention
from minikms.audit.segments import list_segments
from minikms.errors import AuditUnavailableError, StartError

SMALL_SEGMENTS = Limits(segment_bytes=3000, reserve_bytes=0)
DAY_NS = 24 * 3600 * SECOND
LATER = 1_700_000_000 * SECOND + DAY_NS
"""After all that the logs here tell."""


def make_segments(directory: Path, count: int = 60) -> None:
    """A closed log in several files: the clock makes every commit a round of chores."""
    make_log(directory, count, clock=Clock(step=CHORES_NS), limits=SMALL_SEGMENTS)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("segments") / "log"
    make_segments(directory)
    assert len(list_segments(str(directory))) >= 4
    return directory


@pytest.fixture
def altered(original: Path, tmp_path: Path) -> Path:
    """A copy to alter."""
    return Path(shutil.copytree(original, tmp_path / "altered"))


def events_of(path: Path) -> list[record.Event]:
    return [record.parse_line(line)[0] for line in path.read_bytes().split(b"\n")[:-1]]


def kinds(directory: Path) -> list[str]:
    return [finding.kind for finding in verify(directory).findings]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_full_is_closed_and_the_chain_goes_on_in_the_next(original: Path) -> None:
    report = verify(original)
    assert report.intact
    assert report.segments == len(list_segments(str(original))) + 1
    assert verify(original, public_only=True).intact
    first, second = events_of(original / f"{LOG}.1"), events_of(original / f"{LOG}.2")
    assert (first[-1].type, first[-1].facts["next_segment"]) == ("segment_close", 2)
    assert (second[0].type, second[0].facts["segment"]) == ("segment_open", 2)
    assert second[0].facts["previous_seq"] == first[-1].seq == second[0].seq - 1
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in original.iterdir())


def test_a_file_that_is_old_is_closed(tmp_path: Path) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock, limits=Limits(segment_age_s=3600, reserve_bytes=0))
    log.add(encrypt_event())
    log.commit()
    clock.now += 3600 * SECOND
    log.tick()
    assert list(list_segments(str(tmp_path))) == [1]
    clock.now += 3600 * SECOND
    log.tick()
    assert list(list_segments(str(tmp_path))) == [1], "a file with nothing in it is not replaced"
    log.close()
    assert verify(tmp_path).intact


def test_a_log_goes_on_after_a_restart_in_any_segment(tmp_path: Path) -> None:
    for _ in range(4):
        make_segments(tmp_path, 15)
    assert verify(tmp_path).intact
    assert len(list_segments(str(tmp_path))) >= 3


def test_the_key_can_change_in_a_later_segment(tmp_path: Path) -> None:
    log = open_log(tmp_path, clock=Clock(step=CHORES_NS), limits=SMALL_SEGMENTS)
    write_events(log, 20)
    log.change_key(KEY2.audit_key())
    write_events(log, 20)
    log.close()
    assert verify(tmp_path, KEY1, KEY2).intact
    assert verify(tmp_path, KEY1, public_only=True).intact


# --- a rotation that is interrupted ----------------------------------------------------------------------------------

CALLS = ("open", "write", "fdatasync", "rename", "fsync")


class Killed(BaseException):
    """The process ended here."""


def at_call(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None], *, after: bool) -> list[str]:
    """Run `act` before or after the `number`-th state-changing call from now on; the names of the calls made."""
    calls: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            if len(calls) == number and not after:
                act()
            result = real(*arguments)
            if len(calls) == number and after:
                if name == "open":
                    os.close(result)
                act()
            return result

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name))
    return calls


def filled_log(directory: Path) -> AuditLog:
    """A log whose next tick closes its file."""
    log = open_log(directory, clock=Clock(step=CHORES_NS), limits=Limits(segment_bytes=1000, reserve_bytes=0))
    for number in range(5):
        log.add(encrypt_event(number))
    log._writer.write(log._queue, 1)  # without the chores that a commit does after it
    log._queue = []
    return log


def raise_killed() -> None:
    raise Killed


def raise_error() -> None:
    raise OSError(errno.EIO, "injected")


def test_the_points_of_a_rotation_are_all_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled_log(tmp_path)
    with monkeypatch.context() as patch:
        calls = at_call(patch, 0, raise_killed, after=False)
        log.tick()
    assert calls == ["open", "write", "fdatasync", "write", "fdatasync", "rename", "rename", "open", "fsync"]
    log.close()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, 10))
def test_a_kill_at_any_point_of_a_rotation_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: bool
) -> None:
    log = filled_log(tmp_path)
    with monkeypatch.context() as patch:
        at_call(patch, number, raise_killed, after=after)
        with pytest.raises(Killed):
            log.tick()
    make_log(tmp_path, 2)
    report = verify(tmp_path)
    assert report.intact
    encrypted = [
        event
        for path in [*(tmp_path / names[0] for names in list_segments(str(tmp_path)).values()), tmp_path / LOG]
        for event in events_of(path)
        if event.type == "encrypt"
    ]
    assert len(encrypted) == 7


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, 10))
def test_an_error_at_any_point_of_a_rotation_is_mended_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: bool
) -> None:
    log = filled_log(tmp_path)
    with monkeypatch.context() as patch:
        at_call(patch, number, raise_error, after=after)
        log.tick()
    assert log.status()["chore_fault"] != ""
    for attempt in range(5):
        log.add(encrypt_event(attempt))
        try:
            log.commit()
        except AuditUnavailableError:
            log.fdatasync()
    assert log.writable
    log.tick()
    assert log.status()["chore_fault"] == ""
    log.close()
    report = verify(tmp_path)
    assert report.intact and report.segments >= 2


# --- files altered ---------------------------------------------------------------------------------------------------


def test_two_swapped_files_are_seen(altered: Path) -> None:
    os.rename(altered / f"{LOG}.1", altered / "x")
    os.rename(altered / f"{LOG}.2", altered / f"{LOG}.1")
    os.rename(altered / "x", altered / f"{LOG}.2")
    assert kinds(altered) != []


def test_a_file_of_another_log_is_seen(altered: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_segments(other)
    shutil.copy(other / f"{LOG}.2", altered / f"{LOG}.2")
    report = verify(altered)
    assert report.findings[0].file == f"{LOG}.2"
    assert not verify(altered, public_only=True).intact


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_file_taken_away_is_missing(altered: Path, number: int) -> None:
    (altered / f"{LOG}.{number}").unlink()
    assert kinds(altered)[0] == "missing"
    assert not verify(altered, public_only=True).intact


def test_the_file_being_written_taken_away_is_missing(altered: Path) -> None:
    (altered / LOG).unlink()
    assert "missing" in kinds(altered)


def test_the_newest_file_taken_away_and_the_one_before_put_in_its_place_is_missing(altered: Path) -> None:
    newest = max(list_segments(str(altered)))
    os.rename(altered / f"{LOG}.{newest}", altered / LOG)
    assert kinds(altered) == ["missing"]


def test_a_file_under_another_number_is_seen(altered: Path) -> None:
    newest = max(list_segments(str(altered)))
    os.rename(altered / f"{LOG}.{newest}", altered / f"{LOG}.{newest + 5}")
    assert "segment" in kinds(altered)


def test_a_start_without_the_newest_file_is_refused(altered: Path) -> None:
    (altered / LOG).unlink()
    compress_closed(str(altered))
    with pytest.raises(StartError, match=r"the audit log minikms-audit\.log is missing"):
        open_log(altered)


# --- compressed ------------------------------------------------------------------------------------------------------


def test_closed_files_are_compressed_and_read_all_the_same(altered: Path) -> None:
    names = compress_closed(str(altered))
    assert names == [f"{LOG}.{number}.zst" for number in list_segments(str(altered))]
    assert not (altered / f"{LOG}.1").exists()
    assert verify(altered).intact
    assert compress_closed(str(altered)) == []
    log = open_log(altered)
    log.add(encrypt_event())
    log.close()
    assert verify(altered).intact


def test_a_compression_that_was_interrupted_is_completed(altered: Path) -> None:
    (altered / f"{LOG}.1.zst.tmp").write_bytes(b"half")
    shutil.copy(altered / f"{LOG}.2", altered / "copy")
    compress_closed(str(altered))
    os.rename(altered / "copy", altered / f"{LOG}.2")
    assert verify(altered).intact, "both forms of one segment are there"
    compress_closed(str(altered))
    assert sorted(altered.glob("*.log.[0-9]")) == []
    assert verify(altered).intact


def test_a_plain_file_goes_only_when_the_compressed_one_holds_the_same(
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


def test_a_damaged_compressed_file_is_seen(altered: Path) -> None:
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


# --- removed on purpose ----------------------------------------------------------------------------------------------


def test_what_is_removed_on_purpose_is_told_before_and_the_rest_is_intact(altered: Path) -> None:
    compress_closed(str(altered))
    log = open_log(altered, clock=Clock(now=LATER, step=CHORES_NS))
    assert log.remove_segments(Retention(bytes_max=1, days_min=90)) == [], "the floor wins"
    removed = log.remove_segments(Retention(bytes_max=1, days_min=0))
    assert removed == [f"{LOG}.{number}.zst" for number in range(1, len(removed) + 1)]
    assert list_segments(str(altered)) == {}
    log.close()
    report = verify(altered)
    assert report.intact and report.first_seq > 1
    assert verify(altered, public_only=True).intact


def test_retention_stops_when_little_enough_is_left(altered: Path) -> None:
    sizes = [(altered / names[0]).stat().st_size for names in list_segments(str(altered)).values()]
    log = open_log(altered, clock=Clock(now=LATER))
    removed = log.remove_segments(Retention(bytes_max=sum(sizes[2:]), days_min=0))
    assert removed == [f"{LOG}.1", f"{LOG}.2"]
    assert log.remove_segments(Retention(days_min=0)) == [], "without a bound everything is kept"
    log.close()
    assert verify(altered).intact


def test_the_floor_counts_from_when_a_file_was_closed(altered: Path) -> None:
    closed_at = [events_of(altered / f"{LOG}.{number}")[0].ts for number in (2, 3)]
    log = open_log(altered, clock=Clock(now=closed_at[0] + DAY_NS, step=0))
    assert log.remove_segments(Retention(bytes_max=1, days_min=1)) == [f"{LOG}.1"]
    log.close()


def test_a_file_whose_removal_was_told_but_not_done_does_no_harm(altered: Path) -> None:
    """Killed between the line and the deletion."""
    kept = (altered / f"{LOG}.1").read_bytes()
    sizes = sum((altered / names[0]).stat().st_size for names in list_segments(str(altered)).values())
    log = open_log(altered, clock=Clock(now=LATER))
    assert log.remove_segments(Retention(bytes_max=sizes - 1, days_min=0)) == [f"{LOG}.1"]
    log.close()
    (altered / f"{LOG}.1").write_bytes(kept)
    assert verify(altered).intact


def test_more_taken_away_than_was_told_is_missing(altered: Path) -> None:
    log = open_log(altered, clock=Clock(now=LATER))
    sizes = sum((altered / names[0]).stat().st_size for names in list_segments(str(altered)).values())
    log.remove_segments(Retention(bytes_max=sizes - 1, days_min=0))
    log.close()
    assert verify(altered).intact
    (altered / f"{LOG}.2").unlink()
    assert kinds(altered) == ["missing"]


# --- where a check begins, and beside a writer -----------------------------------------------------------------------


def test_a_check_can_begin_at_any_signed_line(original: Path) -> None:
    whole = verify(original)
    for number in (1, 2, 3):
        signed = [event.seq for event in events_of(original / f"{LOG}.{number}") if event.type in record.SIGNED_TYPES]
        report = verify_directory(str(original), trust(), from_checkpoint=signed[-1])
        assert report.intact and report.first_seq == signed[-1] and report.head == whole.head
        public = verify_directory(str(original), trust(public_only=True), from_checkpoint=signed[-1])
        assert public.intact


def test_what_lies_before_the_beginning_of_a_check_is_not_read(altered: Path) -> None:
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


def test_no_log_is_missing_and_not_intact(tmp_path: Path) -> None:
    with pytest.raises(AuditLogMissingError):
        verify_directory(str(tmp_path), trust())


def test_progress_goes_from_nothing_to_all(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms.audit.check._PROGRESS_LINES", 5)
    told: list[tuple[int, int]] = []
    verify_directory(str(original), trust(), progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    total = sum(path.stat().st_size for path in original.iterdir() if path.name.startswith(LOG))
    assert told[-1] == (total, total)


def test_a_file_that_is_closed_while_it_is_read_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation, and a compression, in the middle of each file's reading."""
    log = open_log(tmp_path, clock=Clock(step=CHORES_NS), limits=Limits(segment_bytes=2000, reserve_bytes=0))
    write_events(log, 10)
    rounds = 0
    real_lines = reading.SegmentFile.lines

    def lines(self: reading.SegmentFile) -> Any:
        nonlocal rounds
        for line in real_lines(self):
            yield line
            rounds += 1
            if rounds < 40 and rounds % 3 == 0:
                write_events(log, 4)
                compress_closed(str(tmp_path))

    monkeypatch.setattr(reading.SegmentFile, "lines", lines)
    report = verify_directory(str(tmp_path), trust())
    assert report.intact, report.findings
    log.close()


def test_a_last_line_that_is_completed_meanwhile_is_no_alteration(
    altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (altered / LOG).read_bytes()
    (altered / LOG).write_bytes(content[:-100])

    def complete(_: float) -> None:
        (altered / LOG).write_bytes(content)

    monkeypatch.setattr(reading.time, "sleep", complete)
    assert verify_directory(str(altered), trust()).intact


def test_memory_is_bounded_by_a_chunk_and_a_line(tmp_path: Path) -> None:
    """A file without any newline, larger than what may be held."""
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
