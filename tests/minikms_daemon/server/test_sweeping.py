"""Temporary files that a crash or a failing disk left are removed."""

import asyncio
import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import StorageUnavailableError
from minikms.custody.archive_register import DIRECTORY, TEMP_AGE_NS_MIN
from minikms.platform.files import replace_file
from minikms.platform.logs import Log
from minikms_daemon import serve
from tests.harness.live_daemon import LiveDaemon
from tests.harness.vaults import opened_vault
from tests.harness.waiting import wait_until


def test_old_temporary_files_of_the_archive_register_are_swept(public: Path) -> None:
    """A young one may belong to a backup that runs beside the daemon."""
    with LiveDaemon(public, "file") as daemon:
        daemon.kill()
        archives = daemon.data_dir / DIRECTORY
        archives.mkdir(mode=0o700)
        old, young, entry = (
            archives / name for name in (".tmp-0123456789abcdef-1", ".tmp-0123456789abcdef-2", "a_0.json")
        )
        for path in (old, young, entry):
            path.write_text("left")
        past_ns = time.time_ns() - TEMP_AGE_NS_MIN
        os.utime(old, ns=(past_ns, past_ns))
        daemon.start()
        wait_until(lambda: not old.exists())
        assert sorted(archives.iterdir()) == sorted([young, entry])


def test_a_start_removes_the_temporary_files_of_a_killed_daemon(public: Path) -> None:
    """In every directory that has them, and nothing else there."""
    with LiveDaemon(public, "file") as daemon:
        daemon.kill()
        folders = [
            daemon.data_dir / name for name in ("", "kms-deks", "kms-deks-backup", "kms-deks-backup/20260101T000000")
        ]
        folders[-1].mkdir(mode=0o700)
        left = [folder / ".tmp-0123456789abcdef-1" for folder in folders]
        other = [folder / ".tmp-of-somebody" for folder in folders]
        for path in (*left, *other):
            path.write_text("left")
        daemon.start()
        wait_until(lambda: not any(path.exists() for path in left))
        assert all(path.exists() for path in other)


async def test_what_a_sweep_could_not_remove_goes_with_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the register that was too young, and one of this run whose own removal failed."""
    monkeypatch.setattr(serve, "SWEEP_SECONDS", 0.001)
    unlink, refusals = os.unlink, 3

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "refused")

    def unlink_at_last(*given: Any, **named: Any) -> None:
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            refuse()
        unlink(*given, **named)

    async with opened_vault(tmp_path / "d") as one:
        archives = one.directory / DIRECTORY
        archives.mkdir()
        young = archives / ".tmp-0123456789abcdef-1"
        young.write_text("left")
        with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
            patch.setattr(os, "rename", refuse)
            patch.setattr(os, "unlink", refuse)
            replace_file(one.vault.store.directory_fd, "f", b"x")
        [mine] = (one.directory / "kms-deks").iterdir()
        monkeypatch.setattr(os, "unlink", unlink_at_last)
        log = Log()
        sweeping = asyncio.create_task(
            serve.sweep_temps_again(one.vault, str(one.directory), log, reader=one.reader, disk=one.reader)
        )
        while mine.exists() and not sweeping.done():
            await asyncio.sleep(0.001)
        assert young.exists()
        os.utime(young, ns=(0, 0))
        while young.exists() and not sweeping.done():
            await asyncio.sleep(0.001)
        assert sweeping.cancel(), "it had ended"
        await asyncio.wait([sweeping])
