"""Each kind of system waits for the disk with the strongest call that it has."""

import errno
import fcntl
import os
import re
from pathlib import Path

import pytest

import minikms
from minikms.audit.log import LogLimits
from minikms.platform import sync
from minikms.platform.sync import sync_data, sync_file
from tests.minikms.audit.logmaker import make_log, verify

FULL = 51
"""The number of F_FULLFSYNC in sys/fcntl.h of macOS."""


class MacOs:
    """Stands in for fcntl(2) and os of macOS: it has F_FULLFSYNC, and neither fdatasync nor posix_fallocate."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.synced: list[int] = []
        self.fails = False
        patch.setattr(fcntl, "F_FULLFSYNC", FULL, raising=False)
        patch.delattr(os, "fdatasync")
        patch.delattr(os, "posix_fallocate")
        patch.setattr(fcntl, "fcntl", self._fcntl)

    def _fcntl(self, descriptor: int, command: int) -> int:
        assert command == FULL
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fsync(descriptor)
        self.synced.append(descriptor)
        return 0


@pytest.mark.parametrize("wait", [sync_data, sync_file])
def test_macos_empties_the_cache_of_the_drive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wait: object) -> None:
    macos = MacOs(monkeypatch)
    with (tmp_path / "file").open("wb") as file:
        wait(file.fileno())  # type: ignore[operator]  # one of the two functions
        assert macos.synced == [file.fileno()]
        macos.fails = True
        with pytest.raises(OSError, match="Input/output"):
            wait(file.fileno())  # type: ignore[operator]  # as above


def test_a_system_without_fdatasync_uses_fsync(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synced: list[int] = []
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(os, "fsync", synced.append)
    with (tmp_path / "file").open("wb") as file:
        sync_data(file.fileno())
        assert synced == [file.fileno()]


def test_the_audit_log_is_written_as_on_macos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its reserve is written, because the system can't allocate it."""
    macos = MacOs(monkeypatch)
    make_log(tmp_path / "log", limits=LogLimits(reserve_bytes=200_000))
    assert macos.synced
    assert verify(tmp_path / "log").intact


def test_no_other_module_calls_the_syncs_of_the_system() -> None:
    """On macOS they leave the data in the cache of the drive."""
    source = Path(minikms.__file__).parents[1]
    callers = {path.name for path in source.rglob("*.py") if re.search(r"os\.f(data)?sync\b", path.read_text())}
    assert callers == {"sync.py"}


def test_syncfs_is_not_trusted_on_old_kernels_or_foreign_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.uname()
    for release, trusted in (("5.4.0-generic", False), ("5.16.20", False), ("5.17.0", True), ("6.1.0-13", True)):
        fake = os.uname_result((real[0], real[1], release, real[3], real[4]))
        monkeypatch.setattr(os, "uname", lambda fake=fake: fake)
        sync.syncfs_is_strict.cache_clear()
        assert sync.syncfs_is_strict() is trusted
    monkeypatch.undo()
    sync.syncfs_is_strict.cache_clear()
    proc = os.open("/proc", os.O_RDONLY)
    assert sync.syncfs_reports(proc) is False
    os.close(proc)


def test_a_failing_syncfs_says_why() -> None:
    with pytest.raises(OSError) as refused:
        sync.syncfs(-1)
    assert refused.value.errno == errno.EBADF
