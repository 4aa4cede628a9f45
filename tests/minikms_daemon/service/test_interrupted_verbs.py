"""A request that is cancelled at shutdown leaves its audit line: its effects may already be durable."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from minikms.api import Verb
from minikms.audit import Event
from minikms.policy.policy import Policy
from minikms_daemon.service import lifecycle
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.keys import KeyVerbs
from minikms_daemon.service.lifecycle import LifecycleVerbs
from minikms_daemon.service.records import RecordVerbs
from tests.harness.vaults import OpenedVault, SilentAudit, opened_vault


class QueuedAudit(SilentAudit):
    """Keeps what was queued for the end of the turn."""

    def __init__(self) -> None:
        self.queued: list[Event] = []

    def add(self, event: Event) -> None:
        self.queued.append(event)


async def hang(*_: object, **__: object) -> Any:
    await asyncio.Event().wait()


def served(one: OpenedVault, audit: QueuedAudit) -> VerbTable:
    table = VerbTable(audit)
    RecordVerbs(one.vault, table)
    KeyVerbs(one.vault, table, one.indexing)
    LifecycleVerbs(vault=one.vault, table=table, indexing=one.indexing, reader=one.reader)
    one.kek_verbs(table)
    return table


def requests(active: str, retired: str) -> dict[Verb[Any, Any], api.Request]:
    """One for each verb that awaits something."""
    return {
        api.CREATE_DEK: api.CreateDekRequest("t"),
        api.GET_OR_CREATE_DEK: api.GetOrCreateDekRequest("t2"),
        api.LIST_KEYS: api.ListKeysRequest(),
        api.RETIRE_KEY: api.KeyRequest(active),
        api.DESTROY_KEY: api.DestroyKeyRequest(retired),
        api.ROTATE_KEK: api.RotateKekRequest(),
        api.PRUNE_KEK: api.PruneKekRequest(),
    }


VERBS = tuple(requests("", ""))


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
async def test_a_verb_that_is_cancelled_at_shutdown_is_audited_as_interrupted(
    tmp_path: Path, verb: Verb[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        [active, retired] = await one.make(2)
        await one.vault.retire(retired)
        audit = QueuedAudit()
        who = Policy({1}).principal(1, 1)
        assert who is not None
        for owner, name in (
            (one.vault, "create_in_log"), (one.vault, "retire"), (one.vault, "destroy"),
            (lifecycle, "in_worker"), (one.rotation, "begin"),
            (one.pruning, "prune"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, hang)
        perform = served(one, audit)[verb]
        answer = perform(who, requests(active, retired)[verb], "")
        assert isinstance(answer, Awaitable)
        task = asyncio.ensure_future(answer)
        await asyncio.sleep(0.01)
        assert audit.queued == []
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [(event.type, event.outcome) for event in audit.queued] == [(verb.name, "interrupted")]
