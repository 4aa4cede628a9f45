"""An attempt to unseal that waits while the policy changes."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from minikms import datadir
from minikms.api.errors import UnauthorizedError
from minikms.memory.arena import SecretArena
from minikms.policy.file_policy import FilePolicy
from minikms.policy.rules import parse_policy
from minikms.roots.providers import KeyFile
from minikms.seal_files import AttemptRecords
from minikms_daemon.seal.seal import SealableServer
from minikms_daemon.server.run_context import RunContext
from tests.harness.vaults import key_file, opened_vault

OPERATOR = parse_policy(b'version = 1\n[[grant]]\nprincipals = ["uid:1"]\nroles = ["unseal"]\n')
NOBODY = parse_policy(b"version = 1\n")


class ChangingWorker(ThreadPoolExecutor):
    """Takes a policy without grants into force when the first work is given to it."""

    def __init__(self, policy: FilePolicy) -> None:
        super().__init__(1)
        self._policy = policy

    def submit(self, *work: Any, **more: Any) -> Future[Any]:
        self._policy.replace(NOBODY)
        return super().submit(*work, **more)


@pytest.mark.parametrize("waits_for", ["another attempt", "its record"])
async def test_an_unseal_that_waits_obeys_the_new_policy(tmp_path: Path, waits_for: str) -> None:
    async with opened_vault(tmp_path / "d"):
        pass
    policy = FilePolicy(OPERATOR)
    with (
        datadir.lock_data_dir(str(tmp_path / "d")) as lock,
        SecretArena(8, force_fallback=True) as arena,
        ChangingWorker(policy) as worker,
    ):
        process = SimpleNamespace(
            settings=SimpleNamespace(
                root=KeyFile(key_file(tmp_path / "d")),
                flags=SimpleNamespace(root_lease=None, sealed=True),
                opening=datadir.DEFAULT_OPTIONS,
            ),
            policy=SimpleNamespace(policy=policy, meters=None),
            lock=lock,
            arena=arena,
            connections_max=8,
            on_internal_error=print,
            workers=SimpleNamespace(seal=worker),
        )
        server = SealableServer(cast(RunContext, process), chores=cast(Any, None))
        await server.start()
        who = policy.principal(1, 1)
        assert who is not None
        waiting = server.unsealing.unseal(who, None)
        if waits_for == "another attempt":
            policy.replace(NOBODY)
        with pytest.raises(UnauthorizedError):
            await waiting
        assert server.is_sealed
        attempts = AttemptRecords.load(lock.directory_fd).events()
        assert [event.outcome for event in attempts] == ["failed"] * (waits_for == "its record")
