"""The audit of a turn: whoever loses a turn's lines, and however soon the log recovers, its answers do not leave."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minikms.audit import AuditLog, Event
from minikms.audit.recovery import write_whole
from minikms.audit.turns import TurnAudit
from minikms.errors import AuditUnavailableError
from minikms.memory.arena import SecretArena, fill_random


class Disk:
    """Refuses the next `refusals` writes, then takes them again."""

    def __init__(self) -> None:
        self.refusals = 0

    def write(self, fd: int, blob: bytes) -> None:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write_whole(fd, blob)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    failing = Disk()
    monkeypatch.setattr("minikms.audit.writer.write_whole", failing.write)
    return failing


@pytest.fixture
def audit(tmp_path: Path, disk: Disk) -> Iterator[TurnAudit]:
    ticks = iter(range(1_800_000_000_000_000_000, 1_900_000_000_000_000_000, 1000))
    with SecretArena(2) as arena, ThreadPoolExecutor(1) as executor:
        key, seed = arena.allocate(), arena.allocate()
        fill_random(key.view)
        fill_random(seed.view)
        log = AuditLog.open(tmp_path, audit_key=key.view, seed=seed.view, now_ns=lambda: next(ticks), fsync="never")
        yield TurnAudit(log, executor)
        log.close()


def _answered(audit: TurnAudit) -> None:
    audit.add(Event(type="encrypt", actor="peer_uid:1"))


def _written_between_turns(audit: TurnAudit) -> None:
    audit.write_queued()


def _written_by_a_later_answer(audit: TurnAudit) -> None:
    with pytest.raises(AuditUnavailableError):
        asyncio.run(audit.add_written(Event(type="create_dek", actor="peer_uid:1"), durable=False))


@pytest.mark.parametrize("between", [_written_between_turns, _written_by_a_later_answer])
def test_a_turn_whose_lines_were_lost_is_refused_after_recovery_too(
    audit: TurnAudit, disk: Disk, between: Callable[[TurnAudit], None]
) -> None:
    """Another write lost its lines. That the log has recovered meanwhile does not bring them back."""
    _answered(audit)
    disk.refusals = 1
    between(audit)
    assert not audit.commit_turn(), "the line of this turn's answer is in no log"
    _answered(audit)
    assert audit.commit_turn(), "the next turn is another one"


def test_a_successful_write_between_turns_does_not_hide_an_earlier_loss(audit: TurnAudit, disk: Disk) -> None:
    _answered(audit)
    disk.refusals = 1
    _written_by_a_later_answer(audit)
    audit.write_queued()
    assert not audit.commit_turn()


def test_a_turn_whose_lines_were_written_between_is_answered(audit: TurnAudit) -> None:
    _answered(audit)
    audit.write_queued()
    assert audit.commit_turn()
