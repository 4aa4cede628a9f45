"""A file to which whole lines are appended."""

import errno
import os
from pathlib import Path

import pytest

from minikms_auditor.line_file import LineFile
from tests.harness.disk_faults import failing

LINE_BYTES_MAX = 1000


def line_file(path: Path) -> LineFile:
    return LineFile(str(path), line_bytes_max=LINE_BYTES_MAX)


def test_a_file_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    file = line_file(tmp_path / "copy")
    assert file.last_line() is None
    file.append([b"one", b"two"])
    with open(tmp_path / "copy", "ab") as damaged:
        damaged.write(b"thr")
    assert line_file(tmp_path / "copy").last_line() == b"two"
    line_file(tmp_path / "copy").append([b"three"])
    assert (tmp_path / "copy").read_bytes() == b"one\ntwo\nthree\n", "the incomplete line was cut off"
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = line_file(tmp_path / "copy")
    real_write, full = os.write, failing(os.write, at=1, number=errno.ENOSPC)
    begun = False

    def short(fd: int, data: bytes) -> object:
        nonlocal begun
        begun, before = True, begun
        return full(fd, data) if before else real_write(fd, data[:3])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        with pytest.raises(OSError, match="No space"):
            file.append([b"one", b"two"])
    assert (tmp_path / "copy").read_bytes() == b""
    file.append([b"one", b"two"])
    assert (tmp_path / "copy").read_bytes() == b"one\ntwo\n"


def test_a_line_whose_sync_failed_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor while the disk refuses to remove it."""
    file = line_file(tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(os.fdatasync, at=1))
        patch.setattr(os, "ftruncate", failing(os.ftruncate, at=1))
        for call in (lambda: file.append([b"one"]), file.last_line):
            with pytest.raises(OSError, match="error"):
                call()
    assert (tmp_path / "copy").read_bytes()
    assert file.last_line() is None
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_smaller_file_in_its_place_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of a failed step are removed from the file that has them only."""
    file = line_file(tmp_path / "copy")
    file.append([b"x" * LINE_BYTES_MAX] * 4)
    with monkeypatch.context() as faults:
        faults.setattr(os, "fdatasync", failing(os.fdatasync, at=1))
        faults.setattr(os, "ftruncate", failing(os.ftruncate, at=1))
        with pytest.raises(OSError, match="error"):
            file.append([b"a line that may be lost"])
    (tmp_path / "copy").rename(tmp_path / "rotated")
    file.append([b"the first line"])
    assert (tmp_path / "copy").read_bytes() == b"the first line\n"
