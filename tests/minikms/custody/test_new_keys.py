"""Keys that are made in one group: what becomes of one is no matter of the others."""

import asyncio
import errno
import os
from pathlib import Path
from typing import Final

import pytest

from minikms.api.errors import ForbiddenError, StorageUnavailableError
from minikms.custody import journal
from minikms.custody.journal_format import decode
from minikms.keys.dek import DekRecord
from tests.harness.vaults import create, opened_vault
from tests.minikms.custody import watched_cipher
from tests.minikms.custody.watched_cipher import WatchedCipher

OPEN: Final = os.open


@pytest.fixture(autouse=True)
def has_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a file system whose `syncfs` is not known to report every failure."""
    monkeypatch.setattr(journal, "syncfs_reports", lambda _directory: True)


async def test_a_refused_permit_stops_no_other_key_of_its_group(tmp_path: Path) -> None:
    def refused() -> None:
        raise ForbiddenError("not this thread")

    async with opened_vault(tmp_path / "d") as one:
        with pytest.raises(ForbiddenError):
            await create(one.vault, "t0", permit=refused)
        asked = iter((None, None, "refused"))

        def late() -> None:
            if next(asked) == "refused":
                refused()

        next(asked)
        outcomes = await asyncio.gather(
            create(one.vault, "t1"),
            create(one.vault, "t2", permit=late),
            create(one.vault, "t3"),
            return_exceptions=True,
        )
        made = [each.id for each in outcomes if isinstance(each, DekRecord)]
        assert isinstance(outcomes[1], ForbiddenError)
        assert len(made) == 2
        assert len(set(one.keys(made).values())) == 2
        assert sorted(each.key_id for each in decode((one.directory / journal.NAME).read_bytes()).intact) == sorted(
            made
        )


async def test_a_refusal_in_a_group_that_fails_keeps_no_cipher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback refers to the frame that made the cipher. A seal could not drop it."""
    refusal = ForbiddenError("not this thread")
    asked = iter((None, refusal))

    def refused() -> None:
        if error := next(asked):
            raise error

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # pytest keeps what is logged
    async with opened_vault(tmp_path / "d") as one:
        watched_cipher.watch(monkeypatch)
        monkeypatch.setattr(WatchedCipher, "errors", [RuntimeError("a defect")])
        await asyncio.gather(create(one.vault, "t1", permit=refused), create(one.vault, "t2"), return_exceptions=True)
        assert not WatchedCipher.errors
        assert refusal.__traceback__ is not None
        assert not watched_cipher.alive()


def opened_on_full_disk(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    if flags & os.O_CREAT:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return OPEN(path, flags, mode, dir_fd=dir_fd)


async def test_a_thread_keeps_its_key_if_a_full_disk_refuses_to_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new key has a record in the log by then, but no file."""
    monkeypatch.setattr(journal, "RETRY_SECONDS_MIN", 0.001)

    async with opened_vault(tmp_path / "d") as one:
        await one.indexing.run()
        [old] = await one.make(1)
        with monkeypatch.context() as full:
            full.setattr(os, "open", opened_on_full_disk)
            with pytest.raises(StorageUnavailableError):
                await create(one.vault, "t", replaces=old)
        assert await one.vault.get_or_create("t", purpose="thread") == (old, False)
        assert len(one.vault.index) == 1
