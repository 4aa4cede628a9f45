"""If any of a turn's audit lines is lost, the turn's answers are not sent, even if the log has recovered since."""

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from minikms.api.errors import AuditUnavailableError, SealedError, StorageUnavailableError
from minikms.audit import AuditLog, Event
from minikms.audit.chain import AuditKey, Ed25519Signer
from minikms.audit.reader import LOG_NAME
from minikms.audit.record import LineRef
from minikms.audit.repair import AuditKeys
from minikms.memory.arena import SecretArena, fill_random
from minikms.platform.append_only import write_whole
from minikms_daemon.audit.turns import TurnAudit


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
    monkeypatch.setattr("minikms.platform.append_only.write_whole", failing.write)
    return failing


@pytest.fixture
def audit(tmp_path: Path, disk: Disk) -> Iterator[TurnAudit]:
    ticks = iter(range(1_800_000_000_000_000_000, 1_900_000_000_000_000_000, 1000))
    with SecretArena(2) as arena, ThreadPoolExecutor(1) as executor:
        key, seed = arena.allocate(), arena.allocate()
        fill_random(key.view)
        fill_random(seed.view)
        keys = AuditKeys(AuditKey(1, key.view, Ed25519Signer(seed.view)))
        log = AuditLog(tmp_path, keys, now_ns=lambda: next(ticks), fsync="never")
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


# --- durable lines ----------------------------------------------------------------------------------------------------


def _durable(audit: TurnAudit, count: int) -> list[asyncio.Task[None]]:
    """Adds `count` durable lines in one step of the event loop."""
    event = Event(type="create_dek", actor="peer_uid:1")
    return [
        asyncio.ensure_future(audit.add_written(msgspec.structs.replace(event), durable=True)) for _ in range(count)
    ]


def _lines(directory: Path) -> int:
    return (directory / LOG_NAME).read_bytes().count(b'"type":"create_dek"')


async def test_the_durable_lines_of_a_step_take_one_write_and_one_sync(
    audit: TurnAudit, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    synced = os.fdatasync

    def write(fd: int, blob: bytes) -> None:
        calls.append("write")
        disk.write(fd, blob)

    def sync(fd: int) -> None:
        calls.append("sync")
        synced(fd)

    monkeypatch.setattr("minikms.platform.append_only.write_whole", write)
    monkeypatch.setattr(os, "fdatasync", sync)

    await asyncio.gather(*_durable(audit, 8))
    assert calls == ["write", "sync"]
    assert _lines(tmp_path) == 8


@pytest.mark.parametrize("failing", ["write", "sync"])
async def test_no_caller_takes_a_lost_line_for_a_durable_one(
    audit: TurnAudit, disk: Disk, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets an error of its own, and the next line succeeds once the disk does."""

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        if failing == "write":
            disk.refusals = 1
        else:
            patch.setattr(os, "fdatasync", refuse)
        errors = await asyncio.gather(*_durable(audit, 3), return_exceptions=True)
    assert [type(error) for error in errors] == [AuditUnavailableError] * 3
    assert len({id(error) for error in errors}) == 3
    await audit.sync()
    await asyncio.gather(*_durable(audit, 3))


async def test_the_line_of_a_cancelled_caller_is_written(audit: TurnAudit, tmp_path: Path) -> None:
    """What it did may be durable."""
    tasks = _durable(audit, 2)
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert _lines(tmp_path) == 2


async def test_a_change_of_the_audit_key_holds_up_no_durable_line_of_before(audit: TurnAudit, tmp_path: Path) -> None:
    """A seal during the change would lose it."""
    tasks = _durable(audit, 2)
    await asyncio.sleep(0)

    async def store(_: LineRef) -> AuditKey:
        assert _lines(tmp_path) == 2
        await asyncio.gather(*tasks)
        raise StorageUnavailableError("the keyring can't be written")

    with pytest.raises(StorageUnavailableError):
        await audit.change_key(store)


async def test_a_seal_writes_no_further_line(audit: TurnAudit, tmp_path: Path) -> None:
    """Its keys are zeroed. A durable line waits for the end of the step in which it was added."""
    tasks = _durable(audit, 2)
    await asyncio.sleep(0)
    audit.seal()
    errors = await asyncio.gather(*tasks, *_durable(audit, 1), return_exceptions=True)
    assert [type(error) for error in errors] == [SealedError] * 3
    assert _lines(tmp_path) == 0
