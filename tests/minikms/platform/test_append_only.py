"""Lines whose sync failed: what was written is on the disk once the log says so, also after the next start."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minikms.api.errors import AuditUnavailableError
from minikms.platform import append_only
from minikms.platform.append_only import UNCONFIRMED_SUFFIX, AppendOnlyFile
from minikms.platform.sync import sync_directory
from tests.harness.disk_faults import failing
from tests.harness.failing_disk import failing_disk
from tests.minikms.audit.logmaker import LOG, lines_of, open_log, types_of, verify, write_events

FILE_SYSTEMS = ("ext4", "btrfs")


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_lines_whose_sync_failed_are_on_the_disk_after_a_later_one(tmp_path: Path, kind: str, restarted: bool) -> None:
    """On ext4 it does not suffice to write them again at their place: they read as zeros after unmount and mount."""
    with failing_disk(tmp_path / "disk", kind) as disk:
        log = open_log(disk.directory)
        write_events(log, 20)
        log.sync.fdatasync()
        write_events(log, 2000)
        written = lines_of(disk.directory)
        with disk.failing():
            for _ in range(3):
                with pytest.raises(AuditUnavailableError):
                    log.sync.fdatasync()
        if restarted:
            log.abandon()
            log = open_log(disk.directory)
        log.sync.fdatasync()
        write_events(log, 5)
        log.close()
        disk.remount()
        assert lines_of(disk.directory)[: len(written)] == written
        assert types_of(disk.directory).count("encrypt") == 2025
        assert verify(disk.directory).intact


# --- kills: every call that changes something is the last one of a process --------------------------------------------

CHANGING_CALLS = ("open", "write", "fdatasync", "fsync", "ftruncate", "unlink")
CONFIRMED, UNCONFIRMED = b"confirmed\n", b"a line\nanother line\n"


class Killed(BaseException):
    """Ends the process of a test at a system call."""


def file_with_a_failed_sync(path: Path, patch: pytest.MonkeyPatch) -> AppendOnlyFile:
    path.write_bytes(CONFIRMED)
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    file = AppendOnlyFile(str(path), fd, len(CONFIRMED))
    for line in UNCONFIRMED.splitlines(keepends=True):
        file.append(line)
    with patch.context() as faults:
        faults.setattr(os, "fdatasync", failing(os.fdatasync, at=1))
        with pytest.raises(OSError, match="error"):
            file.sync()
    return file


def killed_at(number: int, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Kills before changing call `number`. Returns a function that says how many calls came."""
    calls = 0

    def wrap(name: str) -> None:
        call = getattr(os, name)

        def counted(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed
            return call(*arguments, **named)

        patch.setattr(os, name, counted)

    for name in CHANGING_CALLS:
        wrap(name)
    return lambda: calls


def test_a_kill_at_any_call_after_a_failed_sync_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, done = 0, False
    while not done:
        number += 1
        path = tmp_path / str(number)
        file = file_with_a_failed_sync(path, monkeypatch)
        with monkeypatch.context() as patch:
            calls = killed_at(number, patch)
            with contextlib.suppress(Killed):
                file.sync()
            done = calls() < number
        file.close()
        # The next start is killed as well, at each of its calls, before one that goes to its end.
        again, recovered = 0, False
        while not recovered:
            again += 1
            with monkeypatch.context() as patch:
                calls = killed_at(again, patch)
                with contextlib.suppress(Killed):
                    append_only.recover(str(path))
                recovered = calls() < again
        assert path.read_bytes() == CONFIRMED + UNCONFIRMED, number
        assert not path.with_name(path.name + UNCONFIRMED_SUFFIX).exists()
    assert number > 8


def test_the_next_process_knows_that_a_sync_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the bytes from the page cache. So it makes them durable elsewhere before it drops their pages."""
    path = tmp_path / "file"
    file_with_a_failed_sync(path, monkeypatch).close()
    other = path.with_name(path.name + UNCONFIRMED_SUFFIX)
    saved: list[bytes] = []
    truncate = os.ftruncate

    def keep(fd: int, size: int) -> None:
        assert size == len(CONFIRMED)
        saved.append(other.read_bytes())
        truncate(fd, size)

    monkeypatch.setattr(os, "ftruncate", keep)
    append_only.recover(str(path))
    assert [content.endswith(UNCONFIRMED) for content in saved] == [True]


def test_no_truncation_comes_before_the_bytes_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file with the saved bytes was removed, and the disk has not confirmed the removal."""
    file = file_with_a_failed_sync(tmp_path / LOG, monkeypatch)
    with monkeypatch.context() as faults:
        # The first one is that of the directory in which the bytes are saved, the second that of their removal.
        faults.setattr("minikms.platform.append_only.sync_directory", failing(sync_directory, at=2))
        with pytest.raises(OSError, match="error"):
            file.sync()
    saved: list[bool] = []
    truncate = os.ftruncate

    def truncated(fd: int, size: int) -> None:
        saved.append((tmp_path / (LOG + UNCONFIRMED_SUFFIX)).exists())
        truncate(fd, size)

    monkeypatch.setattr(os, "ftruncate", truncated)
    file.sync()
    assert saved == [True]
    assert (tmp_path / LOG).read_bytes() == CONFIRMED + UNCONFIRMED
    file.close()


def test_no_append_waits_in_memory_beyond_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append_only, "UNCONFIRMED_BYTES_MAX", 100)
    path = tmp_path / "file"
    file = AppendOnlyFile(str(path), os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), 0)
    synced = 0
    sync = os.fdatasync

    def counted(fd: int) -> None:
        nonlocal synced
        synced += 1
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    for _ in range(50):
        file.append(b"0123456789")
    assert synced == 4
    monkeypatch.setattr(os, "fdatasync", failing(sync, at=1, number=errno.EIO))
    with pytest.raises(OSError, match="error"):
        for _ in range(20):
            file.append(b"0123456789")
    assert path.stat().st_size == file.size
    file.close()


def test_a_damaged_record_of_a_failed_sync_changes_nothing(tmp_path: Path) -> None:
    for content in (b"", b"short", bytes(40), b"\xff" * 100):
        (tmp_path / LOG).write_bytes(b"a line\n")
        other = tmp_path / (LOG + UNCONFIRMED_SUFFIX)
        other.write_bytes(content)
        append_only.recover(str(tmp_path / LOG))
        assert (tmp_path / LOG).read_bytes() == b"a line\n"
        assert not other.exists()
    other.write_bytes(bytes(40))
    os.unlink(tmp_path / LOG)
    append_only.recover(str(tmp_path / LOG))
    assert not os.path.lexists(other)
