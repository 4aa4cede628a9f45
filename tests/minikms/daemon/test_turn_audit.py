"""If any of a turn's audit lines is lost, the turn's answers are not sent, even if the log has recovered since."""

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
    """Fails the next `refusals` writes with EIO. Other writes succeed."""

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


def _add_answer(audit: TurnAudit) -> None:
    audit.add(Event(type="encrypt", actor="peer_uid:1"))


def _write_between_turns(audit: TurnAudit) -> None:
    audit.write_queued()


def _write_for_a_later_answer(audit: TurnAudit) -> None:
    with pytest.raises(AuditUnavailableError):
        asyncio.run(audit.add_written(Event(type="create_dek", actor="peer_uid:1"), durable=False))


@pytest.mark.parametrize("write", [_write_between_turns, _write_for_a_later_answer])
def test_a_turn_fails_if_another_write_lost_its_lines(
    audit: TurnAudit, disk: Disk, write: Callable[[TurnAudit], None]
) -> None:
    _add_answer(audit)
    disk.refusals = 1
    write(audit)
    assert not audit.commit_turn(), "the audit line of this turn's answer was lost"
    _add_answer(audit)
    assert audit.commit_turn(), "the loss does not affect the next turn"


def test_a_turn_with_a_loss_fails_even_if_a_later_write_succeeds(audit: TurnAudit, disk: Disk) -> None:
    _add_answer(audit)
    disk.refusals = 1
    _write_for_a_later_answer(audit)
    audit.write_queued()
    assert not audit.commit_turn()


def test_a_turn_whose_lines_were_written_early_succeeds(audit: TurnAudit) -> None:
    _add_answer(audit)
    audit.write_queued()
    assert audit.commit_turn()
