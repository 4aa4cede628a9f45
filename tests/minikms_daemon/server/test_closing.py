"""No descriptor is closed and no key zeroed while a worker thread still uses them."""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from minikms import datadir
from minikms.api.errors import SealedError
from minikms.audit import Event
from minikms.memory.arena import SecretArena
from minikms.policy.file_policy import FilePolicy
from minikms.policy.policy import Policy
from minikms.policy.principal import Principal
from minikms.policy.rules import parse_policy
from minikms.roots.providers import KeyFile
from minikms_daemon.server.admission import Admission
from minikms_daemon.server.no_member import NoMember
from minikms_daemon.server.parts import Parts
from minikms_daemon.server.policy_in_force import PolicyInForce
from minikms_daemon.server.run_context import RunContext, Workers
from minikms_daemon.server.settings import Settings
from minikms_daemon.service.no_auditor import NoAuditor
from tests.harness.flags import flags_of
from tests.harness.vaults import key_file


async def _no_seal(who: Principal) -> bytes:
    raise AssertionError("nobody seals")


@contextlib.contextmanager
def opened(base: Path, workers: Workers, *, policy: Policy | None = None) -> Iterator[tuple[Parts, SecretArena]]:
    settings = Settings(
        flags=flags_of(base / "d"),
        root=KeyFile(key_file(base / "d")),
        allowed_uids=frozenset({os.geteuid()}),
    )
    policy = policy or Policy(settings.allowed_uids or ())
    with datadir.lock_data_dir(settings.flags.data_dir) as lock, SecretArena(64, force_fallback=True) as arena:
        in_force = PolicyInForce(policy)
        process = SimpleNamespace(settings=settings, workers=workers, arena=arena, measures=(), policy=in_force)
        yield (
            Parts(
                cast("RunContext", process),
                admission=Admission(policy, connections_max=16, report=lambda event: None),
                data=datadir.open_for_service(lock, settings.root, arena=arena, disk=workers.disk),
                proved_slot_id="",
                auditor=NoAuditor(),
                started_ns=0,
                leased=lambda app: app,
                lease=lambda: None,
                replica=NoMember(),
                seal=_no_seal,
            ),
            arena,
        )


@pytest.mark.parametrize("worker", ["disk", "reader"])
async def test_a_job_of_a_worker_ends_before_its_directory_is_closed(tmp_path: Path, worker: str) -> None:
    """A request that is cancelled at shutdown leaves its job behind."""
    found: list[int] = []

    workers = Workers.start()
    with opened(tmp_path, workers) as (parts, arena):
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
    directories = [(tmp_path / "d" / name).stat().st_ino for name in ("kms-deks", "kms-deks-backup")]
    assert found == [*directories, 32]


async def test_after_a_seal_files_are_closed_although_a_step_before_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails() -> None:
        raise OSError("no space")

    workers = Workers.start()
    with opened(tmp_path, workers) as (parts, _):
        directory = parts.vault.store.directory_fd
        monkeypatch.setattr(parts.vault, "drain", fails)
        parts.seal()
        try:
            with pytest.raises(OSError, match="no space"):
                await parts.abandon()
        finally:
            workers.shutdown()
        with pytest.raises(OSError):
            os.fstat(directory)


async def test_a_seal_ends_although_a_durable_line_was_just_added(tmp_path: Path) -> None:
    """The arena is zeroed before, so the line can't be written any more."""
    workers = Workers.start()
    try:
        with opened(tmp_path, workers) as (parts, arena):
            event = Event(type="create_dek", actor="peer_uid:1")
            line = asyncio.ensure_future(parts.audit.add_written(event, durable=True))
            await asyncio.sleep(0)
            arena.zero_all()
            parts.seal()
            with pytest.raises(SealedError):
                await line
            await parts.abandon()
        with opened(tmp_path, workers) as (parts, _):  # its log is whole
            await parts.close()
    finally:
        workers.shutdown()


@pytest.mark.parametrize("changes", [True, False])
async def test_answers_that_were_held_leave_under_the_same_policy_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, changes: bool
) -> None:
    """A turn is held while the audit key changes. Its answers may hold plaintext."""
    workers = Workers.start()
    rules = parse_policy(b"version = 1\n")
    policy = FilePolicy(rules)
    try:
        with opened(tmp_path, workers, policy=policy) as (parts, _):
            commits = [None, None, True, True]
            monkeypatch.setattr(parts.audit, "commit_turn", lambda: commits.pop(0))
            assert parts.app.commit() is None
            if changes:
                policy.replace(rules)
            assert parts.app.commit() is None
            assert parts.app.commit() is not changes
            assert parts.app.commit() is True, "the next turn"
            await parts.close()
    finally:
        workers.shutdown()
