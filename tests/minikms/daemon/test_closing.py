"""No descriptor is closed and no key zeroed while a worker thread still uses them."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from minikms import datadir
from minikms.daemon.parts import Parts, Workers
from minikms.daemon.settings import Settings
from minikms.memory.arena import SecretArena
from minikms.policy import Policy
from minikms.roots.providers import KeyFile
from tests.harness.vaults import key_file


@pytest.mark.parametrize("worker", ["disk", "reader"])
def test_a_job_of_a_worker_ends_before_its_directory_is_closed(tmp_path: Path, worker: str) -> None:
    """A request that is cancelled at shutdown leaves its job behind."""
    found: list[int] = []

    async def main() -> None:
        settings = Settings(
            socket="unused",
            data_dir=str(tmp_path / "d"),
            root=KeyFile(key_file(tmp_path / "d")),
            allowed_uids=frozenset({os.geteuid()}),
        )
        workers = Workers.start()
        with datadir.lock_data_dir(settings.data_dir) as lock, SecretArena(64, force_fallback=True) as arena:
            parts = Parts(
                settings=settings,
                policy=Policy(settings.allowed_uids),
                data=datadir.open_for_service(
                    lock, settings.root, arena=arena, disk=workers.disk, journal=workers.journal
                ),
                workers=workers,
                arena=arena,
                measures=(),
                connections_max=16,
                on_internal_error=pytest.fail,
            )
            vault = parts.vault
            used = vault.store.directory_fd, vault.rotation_backups.directory_fd

            def job() -> None:
                time.sleep(0.1)
                found.extend(os.fstat(descriptor).st_ino for descriptor in used)
                found.append(vault.unlocked.kek(1).nbytes)

            getattr(workers, worker).submit(job)
            try:
                await parts.close()
            finally:
                workers.shutdown()
            assert arena.in_use == 0

    asyncio.run(main())
    directories = [(tmp_path / "d" / name).stat().st_ino for name in ("kms-deks", "kms-deks-backup")]
    assert found == [*directories, 32]
