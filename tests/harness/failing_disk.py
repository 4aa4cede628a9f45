"""A real file system on a disk whose writes can be made to fail: a disk in memory (zram) at its memory limit."""

import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.harness.waiting import wait_until

_CONTROL = Path("/sys/class/zram-control")
_DISK_BYTES = 256 * 1024 * 1024
"""btrfs takes no less than 109 MiB. Memory is used for what is written only."""
_LIMIT_BYTES = 4096
"""Below what every file system has written: then each block of data is refused, except one with a repeated word."""
_RUN_S_MAX = 60.0


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_RUN_S_MAX)


def _is_reset(system: Path) -> bool:
    """Frees the disk. False while it is busy: a program that began meanwhile, in mounts of its own, still has it."""
    try:
        (system / "reset").write_text("1")
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


class FailingDisk:
    """`directory` is where the file system is mounted."""

    def __init__(self, device: Path, system: Path, directory: Path) -> None:
        self._device = device
        self._system = system
        self.directory = directory

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Inside the block every write to the disk fails. Reads succeed."""
        self._limit(_LIMIT_BYTES)
        try:
            yield
        finally:
            self._limit(0)

    def _limit(self, size: int) -> None:
        (self._system / "mem_limit").write_text(str(size))

    def mount(self) -> None:
        # Nothing is written at a time of the kernel's own choice, which may be while the disk fails.
        _run("mount", "-o", "commit=600", str(self._device), str(self.directory))

    def remount(self) -> None:
        """Unmounts and mounts: only what is on the disk stays."""
        _run("umount", str(self.directory))
        self.mount()


@contextlib.contextmanager
def failing_disk(directory: Path, kind: str) -> Iterator[FailingDisk]:
    """A new file system of this kind (`ext4`, `btrfs`), mounted at a new directory."""
    needs.root()
    make = needs.program(f"mkfs.{kind}")
    needs.program("umount")
    needs.memory_disks()
    directory.mkdir()
    number = (_CONTROL / "hot_add").read_text().strip()
    device, system = Path(f"/dev/zram{number}"), Path(f"/sys/block/zram{number}")
    disk = FailingDisk(device, system, directory)
    try:
        (system / "disksize").write_text(str(_DISK_BYTES))
        _run(make, "-q", str(device))
        try:
            disk.mount()
        except subprocess.CalledProcessError:
            pytest.skip(f"needs a kernel that mounts {kind}")
        try:
            yield disk
        finally:
            _run("umount", str(directory))
    finally:
        wait_until(lambda: _is_reset(system))
        (_CONTROL / "hot_remove").write_text(number)
