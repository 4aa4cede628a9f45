"""Power cuts under an auditor: no line that it has taken is lost or replaced, wherever the power fails."""

import random
import shutil
from pathlib import Path

import pytest

from minikms.audit import AuditLog, ExpectedLog, record
from minikms.audit.log import LogLimits
from minikms.audit.reader import each_segment
from tests.minikms.audit.logmaker import SECOND, Clock, open_log, verify, write_events
from tests.minikms.custody.power_loss import Disk

IMAGES = 1
"""Of each power cut."""
LIMITS = LogLimits(segment_bytes=2000, reserve_bytes=0)


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

    with pytest.MonkeyPatch.context() as patch:
        Disk(directory, cut_power).begin(patch)
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
