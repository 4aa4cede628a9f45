"""A log is one chain across its files, which may be closed, renamed, compressed, retained, or missing."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import AuditUnavailableError, StartError
from minikms.audit import AuditLog
from minikms.audit.log import CHORES_NS, LogLimits
from minikms.audit.reader import list_segments
from minikms_daemon.audit.maintenance import compress_closed
from tests.minikms.audit.logmaker import (
    LOG,
    SECOND,
    Clock,
    encrypt_event,
    events_of,
    make_log,
    make_segments,
    open_log,
    verify,
)

SMALL_SEGMENTS = LogLimits(segment_bytes=3000, reserve_bytes=0)


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
    log = open_log(tmp_path, clock=clock, limits=LogLimits(segment_age_s=3600, reserve_bytes=0))
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


@pytest.mark.parametrize("restarted", [False, True])
def test_an_old_file_is_closed_while_the_clock_is_behind(tmp_path: Path, restarted: bool) -> None:
    """After a restart with the wall clock set back, the age of the file counts from the restart."""
    wall, monotonic = Clock(), Clock(now=7 * SECOND, step=0)
    limits = LogLimits(segment_age_s=3600, reserve_bytes=0)
    log = open_log(tmp_path, clock=wall, monotonic_ns=monotonic, limits=limits)
    log.add(encrypt_event())
    log.commit()
    wall.now -= 24 * 3600 * SECOND
    if restarted:
        log.close()
        log = open_log(tmp_path, clock=wall, monotonic_ns=monotonic, limits=limits)
    log.tick()
    assert list(list_segments(str(tmp_path))) == []
    for closed in (1, 2):
        monotonic.now += 3600 * SECOND
        log.tick()
        assert len(list_segments(str(tmp_path))) == closed
        log.add(encrypt_event())
        monotonic.now += SECOND
        log.commit()
    log.close()
    assert verify(tmp_path).intact


def test_the_age_of_a_file_counts_over_a_restart(tmp_path: Path) -> None:
    wall, limits = Clock(), LogLimits(segment_age_s=3600, reserve_bytes=0)
    make_log(tmp_path, 1, clock=wall, limits=limits)
    wall.now += 3600 * SECOND
    log = open_log(tmp_path, clock=wall, monotonic_ns=lambda: 0, limits=limits)
    log.tick()
    assert list(list_segments(str(tmp_path))) == [1]
    log.close()


def test_a_log_goes_on_after_a_restart_in_any_segment(tmp_path: Path) -> None:
    for _ in range(4):
        make_segments(tmp_path, 15)
    assert verify(tmp_path).intact
    assert len(list_segments(str(tmp_path))) >= 3


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
    log = open_log(directory, clock=Clock(step=CHORES_NS), limits=LogLimits(segment_bytes=1000, reserve_bytes=0))
    events = [encrypt_event(number) for number in range(5)]
    log.writer.write(events, 1)  # without the chores that a commit does after it
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
    assert calls == [
        "open", "write", "fdatasync", "write", "fdatasync", "rename", "open", "fsync", "rename", "open", "fsync",
    ]  # fmt: skip
    log.close()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, 12))
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
@pytest.mark.parametrize("number", range(1, 12))
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
            log.sync.fdatasync()
    assert log.writable
    log.tick()
    assert log.status()["chore_fault"] == ""
    log.close()
    report = verify(tmp_path)
    assert report.intact and report.segments >= 2


# --- files altered ---------------------------------------------------------------------------------------------------


def closed(directory: Path, number: int = 0) -> Path:
    """A closed file: the one of that number, without one the newest; or the next after it."""
    return directory / f"{LOG}.{number or max(list_segments(str(directory)))}"


def swap(directory: Path) -> None:
    first, second = (closed(directory, number).read_bytes() for number in (1, 2))
    closed(directory, 1).write_bytes(second)
    closed(directory, 2).write_bytes(first)


def merge(directory: Path) -> None:
    closed(directory, 2).write_bytes(closed(directory, 1).read_bytes() + closed(directory, 2).read_bytes())
    closed(directory, 1).unlink()


def split(directory: Path) -> None:
    lines = (directory / LOG).read_bytes().splitlines(keepends=True)
    closed(directory, max(list_segments(str(directory))) + 1).write_bytes(b"".join(lines[:2]))
    (directory / LOG).write_bytes(b"".join(lines[2:]))


def close_unfinished(directory: Path) -> None:
    (directory / LOG).rename(closed(directory, max(list_segments(str(directory))) + 1))
    (directory / LOG).touch()


FILES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "two swapped": (swap, {"segment", "missing", "altered"}),
    "the first gone": (lambda directory: closed(directory, 1).unlink(), {"missing"}),
    "the second gone": (lambda directory: closed(directory, 2).unlink(), {"missing"}),
    "the third gone": (lambda directory: closed(directory, 3).unlink(), {"missing"}),
    "the one being written gone": (lambda directory: (directory / LOG).unlink(), {"missing"}),
    "the newest replaced by the one before": (lambda directory: closed(directory).rename(directory / LOG), {"missing"}),
    "another number": (lambda directory: closed(directory).rename(f"{closed(directory)}5"), {"segment"}),
    "one more": (lambda directory: closed(directory, 10**15).touch(), {"segment", "missing"}),
    "two in one": (merge, {"segment", "missing"}),
    "one in two": (split, {"segment", "missing"}),
    "closed without its last line": (close_unfinished, {"segment", "missing"}),
}
"""Other places, names and divisions of files, each with kinds of findings of which it has at least one."""


@pytest.mark.parametrize("name", FILES)
def test_files_in_another_place_or_division_are_seen(altered: Path, name: str) -> None:
    change, expected = FILES[name]
    change(altered)
    assert set(kinds(altered)) & expected
    assert not verify(altered, public_only=True).intact


def test_a_file_of_another_log_is_seen(altered: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_segments(other)
    shutil.copy(other / f"{LOG}.2", altered / f"{LOG}.2")
    report = verify(altered)
    assert report.findings[0].file == f"{LOG}.2"
    assert not verify(altered, public_only=True).intact


def test_a_start_without_the_newest_file_is_refused(altered: Path) -> None:
    (altered / LOG).unlink()
    compress_closed(str(altered))
    with pytest.raises(StartError, match=r"the audit log minikms-audit\.log is missing"):
        open_log(altered)
