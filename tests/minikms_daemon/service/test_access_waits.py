"""Verbs that wait for a line, a lock or the file of the limits while the policy changes."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from minikms.api import Verb
from minikms.api.errors import ForbiddenError, KmsRefusedError, StorageUnavailableError, UnauthorizedError
from minikms.audit import Event
from minikms_daemon.service import records
from minikms_daemon.service.roots import AddGivenRoot, GivenRootTest
from tests.harness.limited import Limited, limited

OTHERS = '[[grant]]\nprincipals = ["uid:2"]\nroles = ["monitor"]\nthreads = ["*"]\n'
OPERATOR = OTHERS + '[[grant]]\nprincipals = ["uid:1"]\nroles = ["rotate", "destroy"]\nthreads = ["*"]\n'
CHANGES: dict[str, tuple[str, type[KmsRefusedError]]] = {
    "fewer roles": (OPERATOR.replace('"rotate", "destroy"', '"monitor"'), ForbiddenError),
    "no grant": (OTHERS, UnauthorizedError),
}


async def spare_root(made: Limited) -> str:
    """The slot of a second root key."""
    with made.one.slot_of(os.urandom(32)) as root:
        answer = await made.ask(made.who(1), api.ADD_ROOT, AddGivenRoot("file", "", root=root))
    return str(answer["slot_id"])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("verb", [api.PRUNE_KEK, api.ADD_ROOT, api.REMOVE_ROOT], ids=lambda verb: verb.name)
async def test_a_change_that_waits_for_its_first_line_obeys_the_new_policy(
    tmp_path: Path, change: str, verb: Verb[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, refused = CHANGES[change]

    async with limited(tmp_path / "d", OPERATOR) as made:
        await made.one.rotate()
        slot_id = await spare_root(made)
        before = made.one.vault.keyring.body
        written = made.audit.add_written

        async def changed_meanwhile(event: Event, *, durable: bool) -> None:
            await written(event, durable=durable)
            if event.detail == "begun":
                made.change(policy)

        monkeypatch.setattr(made.audit, "add_written", changed_meanwhile)
        with made.one.slot_of(os.urandom(32)) as root, pytest.raises(refused):
            request = {
                api.PRUNE_KEK: api.PruneKekRequest(),
                api.ADD_ROOT: AddGivenRoot("file", "", root=root),
                api.REMOVE_ROOT: api.SlotRequest(slot_id),
            }[verb]
            await made.ask(made.who(1), verb, request)
        assert made.one.vault.keyring.body == before
        assert [event.outcome for event in made.audit.events[-2:]] == ["ok", refused.code]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("verb", [api.ROTATE_KEK, api.TEST_ROOT], ids=lambda verb: verb.name)
async def test_a_change_that_waits_for_the_keyring_obeys_the_new_policy(
    tmp_path: Path, change: str, verb: Verb[Any, Any]
) -> None:
    policy, refused = CHANGES[change]

    async with limited(tmp_path / "d", OPERATOR) as made:
        before = made.one.vault.keyring.body
        root = bytes.fromhex(made.one.key.read_text())
        with made.one.slot_of(root) as given:
            request = {
                api.ROTATE_KEK: api.RotateKekRequest(),
                api.TEST_ROOT: GivenRootTest("", made.one.slot.slot_id, root=given),
            }[verb]
            async with made.one.vault.keyring.held():
                waiting = await made.until_waiting(made.who(1), verb, request)
                made.change(policy)
            with pytest.raises(refused):
                await waiting
        assert made.one.vault.keyring.body == before


READER = '[[grant]]\nprincipals = ["uid:1"]\nroles = ["decrypt", "encrypt", "create"]\nthreads = ["*"]\n'


@pytest.mark.parametrize("meanwhile", ["nothing", "a policy without the role", "a full disk"])
@pytest.mark.parametrize("batch", [False, True])
async def test_no_key_is_used_before_the_file_of_the_limits_is_durable(
    tmp_path: Path, meanwhile: str, batch: bool
) -> None:
    """No other request waits meanwhile, and after the wait the policy in force decides."""
    begun, durable = asyncio.Event(), asyncio.Event()

    async def keep(_content: bytes) -> None:
        begun.set()
        await durable.wait()
        if meanwhile == "a full disk":
            raise StorageUnavailableError("full")

    policy = READER + "limits = { decrypts_per_hour = 100 }\n"
    async with limited(tmp_path / "d", OTHERS + policy, keep=keep) as made:
        [key_id] = await made.one.make(1)
        who = made.who(1)
        sealed = await made.ask(who, api.ENCRYPT, api.EncryptItemRequest(key_id, ""))
        item = api.DecryptItemRequest(key_id, sealed["ciphertext"])
        made.one.vault.cache.clear()
        waiting = asyncio.create_task(
            made.ask(who, api.DECRYPT_BATCH, api.DecryptBatchRequest([item]))
            if batch
            else made.ask(who, api.DECRYPT, api.DecryptItemRequest(key_id, sealed["ciphertext"]))
        )
        await begun.wait()
        assert len(made.one.vault.cache) == 0
        await made.ask(who, api.ENCRYPT, api.EncryptItemRequest(key_id, ""))
        made.one.vault.cache.clear()
        if meanwhile == "a policy without the role":
            made.change(OTHERS)
        durable.set()
        if meanwhile == "nothing":
            assert await waiting
        else:
            with pytest.raises(StorageUnavailableError if meanwhile == "a full disk" else UnauthorizedError):
                await waiting
        assert len(made.one.vault.cache) == (1 if meanwhile == "nothing" else 0)


async def test_a_change_between_two_slices_of_a_batch_withholds_its_plaintext(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "SLICE_SECONDS_MAX", 0.0)
    reader = OTHERS + '[[grant]]\nprincipals = ["uid:1"]\nroles = ["encrypt", "decrypt"]\nthreads = ["*"]\n'
    async with limited(tmp_path / "d", reader) as made:
        who, vault = made.who(1), made.one.vault
        items = [api.EncryptItemRequest(key_id=key_id, plaintext="") for key_id in await made.one.make(3)]
        sealed = (await made.ask(who, api.ENCRYPT_BATCH, api.EncryptBatchRequest(items)))["items"]
        vault.cache.clear()
        again = [api.DecryptItemRequest(a.key_id, b["ciphertext"]) for a, b in zip(items, sealed, strict=True)]
        going = asyncio.ensure_future(made.ask(who, api.DECRYPT_BATCH, api.DecryptBatchRequest(again)))
        await asyncio.sleep(0)
        made.change(OTHERS)
        with pytest.raises(UnauthorizedError):
            await going
        assert made.audit.events[-1].outcome == UnauthorizedError.code
