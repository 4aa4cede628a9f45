"""A request that the end of a stop cuts off leaves its audit line: what it had begun may be on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from minikms.audit import Event
from minikms.policy import Policy, Principal
from minikms.service.keks import KekVerbs
from minikms.service.keys import KeyIssuing
from minikms.service.lifecycle import KeyLifecycle
from minikms.service.records import KeyService
from vaults import OpenedVault, SilentAudit, opened_vault


class QueuedAudit(SilentAudit):
    """Keeps what was queued for the end of the turn."""

    def __init__(self) -> None:
        self.queued: list[Event] = []

    def add(self, event: Event) -> None:
        self.queued.append(event)


async def hang(*_: object, **__: object) -> Any:
    await asyncio.Event().wait()


def requests(one: OpenedVault, audit: QueuedAudit, who: Principal, keys: dict[str, str]) -> dict[str, Any]:
    """Each verb that waits for something, begun."""
    vault = one.vault
    records = KeyService(vault, audit)
    issuing = KeyIssuing(vault, audit, dict)
    life = KeyLifecycle(vault=vault, audit=audit, indexing=one.indexing, reader=one.reader)
    keks = KekVerbs(vault=vault, audit=audit, rotation=one.rotation, pruning=one.pruning, opened_slot_id="")
    item = api.EncryptItem(keys["active"], "")
    retired = keys["retired"]
    return {
        "create_dek": lambda: issuing.create_dek_for_thread(who, api.CreateDekRequest("t"), ""),
        "encrypt": lambda: records.encrypt(who, item, ""),
        "encrypt_batch": lambda: records.encrypt_batch(who, api.EncryptBatchRequest([item]), ""),
        "reencrypt_batch": lambda: records.reencrypt_batch(
            who, api.ReencryptBatchRequest(retired, keys["active"], [api.ReencryptItem("")]), ""
        ),
        "generate_data_key": lambda: issuing.generate_data_key(who, api.GenerateDataKeyRequest(keys["data"]), ""),
        "list_keys": lambda: life.list_keys(who, thread_id=None, state=None, cursor="", limit=1, request_id=""),
        "retire_key": lambda: life.retire(who, keys["active"], ""),
        "destroy_key": lambda: life.destroy(who, retired, api.DestroyKeyRequest(retired), ""),
        "rotate_kek": lambda: keks.rotate_kek(who, api.RotateKekRequest(), None, ""),
        "prune_kek": lambda: keks.prune_keks(who, api.PruneKekRequest(), ""),
    }


VERBS = (
    "create_dek", "encrypt", "encrypt_batch", "reencrypt_batch", "generate_data_key", "list_keys", "retire_key",
    "destroy_key", "rotate_kek", "prune_kek",
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_is_cut_off_is_audited_as_interrupted(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            [active, retired] = await one.make(2)
            data = (await one.vault.create("t", purpose="data")).id
            await one.vault.retire(retired)
            for key_id in (active, data):
                one.vault.opened(key_id).lease.uses_left = 0
            audit = QueuedAudit()
            who = Policy({1}).principal(1, 1)
            assert who is not None
            for owner, name in (
                (one.vault, "create"), (one.vault, "retire"), (one.vault, "destroy"), (one.vault.leases, "extend"),
                (KeyLifecycle, "_in_reader"), (one.rotation, "begin"), (one.pruning, "prune"),
            ):  # fmt: skip
                monkeypatch.setattr(owner, name, hang)
            begin: Callable[[], Awaitable[Any]] = requests(
                one, audit, who, {"active": active, "retired": retired, "data": data}
            )[verb]
            task = asyncio.ensure_future(begin())
            await asyncio.sleep(0.01)
            assert audit.queued == []
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [(event.type, event.outcome) for event in audit.queued] == [(verb, "interrupted")]

    asyncio.run(main())
