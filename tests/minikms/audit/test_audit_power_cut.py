"""Power cuts under an auditor: no line that it has taken is lost or replaced, wherever the power fails."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minikms.audit import AuditLog, ExpectedLog, record
from minikms.audit.log import LogLimits
from minikms.audit.reader import each_segment
from tests.minikms.audit.logmaker import SECOND, Clock, open_log, verify, write_events
from tests.minikms.custody.power_loss import Disk

IMAGES = 1
"""Of each power cut."""
LIMITS = LogLimits(segment_bytes=2000, reserve_bytes=0)


class LogDisk(Disk):
    """The model for the directory of a log, whose files are opened by their paths."""

    def begin(self, patch: pytest.MonkeyPatch) -> None:
        super().begin(patch)
        patch.setattr(os, "dup", self._recorded(os.dup, self._dup))

    def _dup(self, copy: int, fd: int) -> None:
        self._files[copy] = self._files[fd]

    def _open(self, fd: int, name: str, flags: int, *_: Any, dir_fd: int | None = None) -> None:
        if flags & os.O_DIRECTORY:
            return
        super()._open(fd, os.path.basename(name), flags, dir_fd=self._directory)
        if flags & os.O_TRUNC:
            self._files[fd].content.clear()

    def _rename(self, _: None, old: str, new: str, **_fds: int) -> None:
        super()._rename(_, os.path.basename(old), os.path.basename(new))

    def _unlink(self, _: None, name: str, **_fds: int) -> None:
        super()._unlink(_, os.path.basename(name))


@contextmanager
def watched(directory: Path, check: Any) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY)
    with pytest.MonkeyPatch.context() as patch:
        LogDisk(fd, check).begin(patch)
        yield
    os.close(fd)


def lines_in(directory: Path) -> list[bytes]:
    return [line for file in each_segment(str(directory)) for line in file.lines()]


def takes(log: AuditLog) -> list[bytes]:
    """What an auditor takes now: the lines that are durable and covered by a signed line."""
    durable = lines_in(Path(log.directory))[: log.sync.durable_line().seq]
    while durable and record.parse_line(durable[-1])[0].type not in record.SIGNED_TYPES:
        durable.pop()
    return durable


@pytest.mark.parametrize("seed", [7, pytest.param(None, marks=pytest.mark.torture)])
def test_after_a_power_cut_the_log_continues_what_an_auditor_has_taken(tmp_path: Path, seed: int | None) -> None:
    """At each system call, through syncs, checkpoint lines, rotations and a seal. The end that was not taken may go."""
    rng, clock, taken, cuts = random.Random(seed), Clock(), list[bytes](), 0
    directory, after = tmp_path / "log", tmp_path / "after"
    directory.mkdir()

    def cut_power(disk: Disk) -> None:
        nonlocal cuts
        for image in disk.images(rng, IMAGES):
            shutil.rmtree(after, ignore_errors=True)
            after.mkdir()
            for name, content in image.items():
                (after / name).write_bytes(content)
            again = open_log(after, clock=clock, limits=LIMITS, expected=ExpectedLog(exists=bool(taken)))
            write_events(again, 1)
            again.close()
            assert lines_in(after)[: len(taken)] == taken
            cuts += 1

    with watched(directory, cut_power):
        log = open_log(directory, clock=clock, limits=LIMITS)
        for step in range(20):
            write_events(log, rng.randint(0, 2), first=step)
            clock.now += SECOND
            log.tick()
            if rng.random() < 0.5:
                log.sync.fdatasync()
                taken = takes(log)
            if step in (7, 14):
                log.abandon()
                log = open_log(directory, clock=clock, limits=LIMITS, expected=ExpectedLog(exists=True))
            log.attended = lambda: True
        log.close()
    assert cuts > 50 and len(taken) > 10 and log.writer.segment > 2
    assert verify(directory).intact and verify(after).intact
