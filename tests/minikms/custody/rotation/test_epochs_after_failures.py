"""A destruction that failed half-way has changed the keyring: its audit line has the epoch, as after a success."""

import asyncio
import itertools
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from minikms.api import Verb
from minikms.api.errors import AuditUnavailableError, StorageUnavailableError
from minikms.audit import Event
from minikms.custody.keyring_file import KeyringFile
from minikms.policy.policy import Policy
from minikms.policy.principal import Principal
from minikms_daemon.service import lifecycle
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.encoding import Reply
from minikms_daemon.service.lifecycle import LifecycleVerbs
from tests.harness.disk_faults import refuse
from tests.harness.vaults import SilentAudit, opened_vault


class KeptAudit(SilentAudit):
    """Keeps what was written."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def add_written(self, event: Event, *, durable: bool) -> None:
        self.events.append(event)


def anybody() -> Principal:
    who = Policy({1}).principal(1, 1)
    assert who is not None
    return who


async def test_a_new_epoch_shows_a_tombstone_whose_files_were_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        audit = KeptAudit()
        table = VerbTable(audit)
        LifecycleVerbs(vault=one.vault, table=table, indexing=one.indexing, reader=one.reader)
        [key_id] = await one.make(1)
        await one.vault.retire(key_id)
        before = one.vault.keyring.body.epoch
        monkeypatch.setattr(one.vault.store, "remove", refuse)
        with pytest.raises(StorageUnavailableError):
            await performed(table, api.DESTROY_KEY, api.DestroyKeyRequest(key_id))
        last = audit.events[-1]
        assert (last.outcome, last.facts) == ("storage_unavailable", {"epoch": before + 1})


async def test_a_destruction_that_the_disk_refused_halfway_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a further request, also if the disk refuses several times. The line about it has the epoch of the keyring
    that counts the tombstone.
    """
    monkeypatch.setattr(lifecycle, "REMOVAL_RETRY_SECONDS", 0.001)

    async with opened_vault(tmp_path / "d") as one:
        audit = KeptAudit()
        table = VerbTable(audit)
        verbs = LifecycleVerbs(vault=one.vault, table=table, indexing=one.indexing, reader=one.reader)
        [key_id] = await one.make(1)
        await one.vault.retire(key_id)
        before = one.vault.keyring.body.epoch
        refused = 0

        def refuse_again(*_: object) -> None:
            nonlocal refused
            refused += 1
            refuse()

        completing = asyncio.create_task(verbs.complete_destructions())
        with monkeypatch.context() as patch:
            patch.setattr(KeyringFile, "store_now", refuse_again)
            with pytest.raises(StorageUnavailableError, match="the key is destroyed"):
                await performed(table, api.DESTROY_KEY, api.DestroyKeyRequest(key_id))
            assert audit.events[-1].facts == {"epoch": before}
            while refused < 3 and not completing.done():
                await asyncio.sleep(0.001)
            assert one.file(key_id).exists()
        while audit.events[-1].detail != "completed":
            await asyncio.sleep(0.001)
        last = audit.events[-1]
        assert (last.type, last.actor, last.key_id) == ("destroy_key", "minikms", key_id)
        assert {"backups_removed": 0, "epoch": before + 1, "tombstone": 1}.items() <= last.facts.items()
        assert not one.file(key_id).exists()
        assert one.vault.unfinished_destructions == set()
        completing.cancel()


async def test_the_line_of_a_completed_destruction_waits_for_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile a request completes the next key, of which no line is added then."""
    monkeypatch.setattr(lifecycle, "REMOVAL_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(lifecycle, "AUDIT_RETRY_SECONDS", 0.001)

    async with opened_vault(tmp_path / "d") as one:
        key_ids = sorted(await one.make(3))
        refusals = 2

        class FailingAudit(KeptAudit):
            async def add_written(self, event: Event, *, durable: bool) -> None:
                nonlocal refusals
                if refusals:
                    refusals -= 1
                    await one.vault.destroy(key_ids[1])
                    raise AuditUnavailableError("the log can't be written")
                await super().add_written(event, durable=durable)

        audit = FailingAudit()
        verbs = LifecycleVerbs(vault=one.vault, table=VerbTable(audit), indexing=one.indexing, reader=one.reader)
        for key_id in key_ids:
            await one.vault.retire(key_id)
            with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
                patch.setattr(one.vault.store, "remove", refuse)
                await one.vault.destroy(key_id)
        completing = asyncio.create_task(verbs.complete_destructions())
        while len(audit.events) < 2:
            await asyncio.sleep(0.001)
        assert [event.key_id for event in audit.events] == [key_ids[0], key_ids[2]]
        completing.cancel()


async def test_a_new_epoch_shows_keks_that_were_destroyed_before_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        audit = KeptAudit()
        table = VerbTable(audit)
        one.kek_verbs(table)
        await one.rotate()
        await one.rotate()
        before = one.vault.keyring.body.epoch
        change, changes = one.vault.keyring.change, itertools.count()

        async def only_the_first(*given: Any) -> Any:
            return await change(*given) if next(changes) == 0 else refuse()

        monkeypatch.setattr(one.vault.keyring, "change", only_the_first)
        with pytest.raises(StorageUnavailableError):
            await performed(table, api.PRUNE_KEK, api.PruneKekRequest())
        last = audit.events[-1]
        assert (last.outcome, last.facts) == ("storage_unavailable", {"epoch": before + 1})


async def performed(table: VerbTable, verb: Verb[Any, Any], request: api.Request) -> Reply:
    answer = table[verb](anybody(), request, "")
    assert isinstance(answer, Awaitable)
    return await answer
