"""What a policy lets a principal do with keys: decisions, charges, and both again after a wait."""

import asyncio
import inspect
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api import Verb
from minikms.api.errors import (
    ForbiddenError,
    InvalidRequestError,
    KeyNotFoundError,
    KeysNotReadError,
    KmsRefusedError,
    LimitExceededError,
    StorageUnavailableError,
    TooManyError,
    UnauthorizedError,
)
from minikms.custody.journal_format import Change
from minikms.policy.principal import Principal
from tests.harness.limited import Limited, limited
from tests.harness.vaults import create, opened_vault
from tests.minikms_daemon.service.asking import NO_KEY
from tests.minikms_daemon.service.limiting import EVERYBODY, MINE, b64, grant, instructions, outcome, requests


async def sealed(made: Limited, who: Principal, key_id: str) -> str:
    return str((await made.ask(who, api.ENCRYPT, api.EncryptItemRequest(key_id, b64())))["ciphertext"])


# --- the same work for a key out of scope as for an unknown one -------------------------------------------------------


async def test_a_foreign_key_costs_the_same_work_as_an_unknown_one(tmp_path: Path) -> None:
    """Instruction by instruction, for every verb that names a key. Keys of the scope lie on both sides of both ids, and
    no file is read: the files of the foreign keys are gone. A matcher looks at the length of a thread's id first, so
    all have one length; for an unknown key it is that of the thread of a key beside it.
    """
    async with limited(tmp_path / "d", EVERYBODY + grant(3, '["mine-*", "other-*-x"]')) as made:
        ids = []
        for thread in ("mine-1", "them-1", "mine-2", "them-2", "mine-3"):
            ids += await made.one.make(1, thread)
        mine, foreign = ids[0], (ids[1], ids[3])
        unknown = tuple(key_id[:-1] + ("0" if key_id[-1] != "0" else "1") for key_id in (ids[0], ids[1], ids[4]))
        for key_id in foreign:
            made.one.file(key_id).unlink()
        who = made.who(3)
        for verb in requests(mine, mine):
            texts, costs = set(), set()
            for key_id in (*foreign, *unknown, NO_KEY, "k_7" + "z" * 25):
                request = requests(key_id, mine)[verb]
                outcome(made, who, verb, request)  # the first of a verb fills caches of the interpreter
                texts.add(outcome(made, who, verb, request).replace(key_id, "KEY"))
                costs.add(instructions(lambda: outcome(made, who, verb, request)))  # noqa: B023  called at once
            assert len(texts) == 1 and "key not found" in texts.pop(), verb.name
            assert len(costs) == 1, (verb.name, costs)


# --- the thread that decides ------------------------------------------------------------------------------------------


async def test_the_thread_in_the_authenticated_record_decides(tmp_path: Path) -> None:
    """The index repeats what the files say. A record that was exchanged since is decided anew."""
    async with limited(tmp_path / "d", EVERYBODY + grant(3, '["mine-*"]')) as made:
        [mine], [foreign] = await made.one.make(1, "mine-1"), await made.one.make(1, "theirs-1")
        record = made.one.on_disk(foreign)
        made.one.vault.index.put(msgspec.structs.replace(record, thread_id="mine-1"))
        who = made.who(3)
        for verb, request in (
            (api.ENCRYPT, api.EncryptItemRequest(foreign, b64())),
            (api.GET_WRAPPED, api.KeyRequest(foreign)),
            (api.GET_KEY, api.KeyRequest(foreign)),
        ):
            with pytest.raises(KeyNotFoundError):
                await made.ask(who, verb, request)
        listed = await made.ask(who, api.LIST_KEYS, api.ListKeysRequest())
        assert [key["key_id"] for key in listed["keys"]] == [mine]


async def test_limited_principals_wait_while_key_files_are_read(tmp_path: Path) -> None:
    async with limited(tmp_path / "d", MINE + grant(2, '["*"]')) as made:
        [mine] = await made.one.make(1, "mine-1")
        made.one.vault.index.complete = False
        indexing = type(made.one.indexing)(made.one.vault, made.one.reader)
        made.access.indexing = indexing
        for key_id in (mine, NO_KEY):
            with pytest.raises(KeysNotReadError, match="try again") as refused:
                await made.ask(made.who(1), api.ENCRYPT, api.EncryptItemRequest(key_id, b64()))
            assert (refused.value.status, refused.value.retry_after_s) == (503, api.INDEXING_RETRY_SECONDS)
        assert await made.ask(made.who(2), api.ENCRYPT, api.EncryptItemRequest(mine, b64())), "every thread is granted"
        with pytest.raises(KeyNotFoundError):
            await made.ask(made.who(2), api.ENCRYPT, api.EncryptItemRequest(NO_KEY, b64()))
        await indexing.run()
        assert await made.ask(made.who(1), api.ENCRYPT, api.EncryptItemRequest(mine, b64()))


async def test_the_index_takes_no_threads_after_its_first_key(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await one.make(1)
        with pytest.raises(ValueError, match="has keys already"):
            one.vault.index.keep_threads()
        with pytest.raises(ValueError, match="does not keep threads"):
            one.vault.index.thread_near(NO_KEY)


# --- limits -----------------------------------------------------------------------------------------------------------

BUDGETS = grant(1, '["a-*"]', more="limits = { decrypts_per_hour = 10 }\nlimits_total = { reencrypts_per_hour = 6 }")


async def test_a_batch_is_charged_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    policy = BUDGETS + grant(1, '["b-*"]', more="limits = { decrypts_per_hour = 4 }")
    async with limited(tmp_path / "d", policy) as made:
        who = made.who(1)
        [a], [b] = await made.one.make(1, "a-1"), await made.one.make(1, "b-1")
        text = {key_id: await sealed(made, who, key_id) for key_id in (a, b)}
        await made.ask(who, api.DECRYPT, api.DecryptItemRequest(b, text[b]))

        def batch(*key_ids: str) -> api.DecryptBatchRequest:
            return api.DecryptBatchRequest(
                [api.DecryptItemRequest(key_id, text.get(key_id, text[a])) for key_id in key_ids]
            )

        with pytest.raises(TooManyError, match="more items than decrypts_per_hour allows"):
            await made.ask(who, api.DECRYPT_BATCH, batch(*[a] * 5, *[b] * 5))
        with pytest.raises(LimitExceededError) as refused:
            await made.ask(who, api.DECRYPT_BATCH, batch(*[a] * 5, *[b] * 4))
        assert refused.value.limit == "decrypts_per_hour"
        answer = await made.ask(who, api.DECRYPT_BATCH, batch(*[a] * 5, *[b] * 3, NO_KEY))
        assert [item.get("code", "ok") for item in answer["items"]] == ["ok"] * 8 + ["key_not_found"]
        answer = await made.ask(who, api.DECRYPT_BATCH, batch(*[a] * 5))
        assert len(answer["items"]) == 5, "what was refused was not charged, and neither were unknown keys"
        with pytest.raises(LimitExceededError):
            await made.ask(who, api.DECRYPT, api.DecryptItemRequest(a, text[a]))
        assert await sealed(made, who, a), "other verbs go on"


async def test_failed_items_are_charged_and_a_re_encryption_once_for_both_roles(tmp_path: Path) -> None:
    async with limited(tmp_path / "d", BUDGETS) as made:
        who = made.who(1)
        first, second = await made.one.make(2, "a-1")
        text = await sealed(made, who, first)
        items = [api.ReencryptItemRequest(text)] * 3
        answer = await made.ask(who, api.REENCRYPT_BATCH, api.ReencryptBatchRequest(first, second, items))
        assert len(answer["items"]) == 3
        damaged = [api.ReencryptItemRequest(b64(bytes(40)))] * 3
        assert (await made.ask(who, api.CHECK_BATCH, api.CheckBatchRequest(first, damaged)))["opened"] == 0
        for verb, request in (
            (api.CHECK_BATCH, api.CheckBatchRequest(first, damaged[:1])),
            (api.REENCRYPT_BATCH, api.ReencryptBatchRequest(first, second, items[:1])),
        ):
            with pytest.raises(LimitExceededError):
                await made.ask(who, verb, request)
        for _ in range(10):
            with pytest.raises(KmsRefusedError, match="does not open"):
                await made.ask(who, api.DECRYPT, api.DecryptItemRequest(first, b64(bytes(40))))
        with pytest.raises(LimitExceededError):
            await made.ask(who, api.DECRYPT, api.DecryptItemRequest(first, text))
        assert len(made.limited) == 3, "counted instead of a line each"
        assert not any(event.outcome == "limit_exceeded" for event in made.audit.events)
        assert made.refusals["decrypts_per_hour"] == 1 and made.refusals["reencrypts_per_hour"] == 2


async def test_requests_for_unknown_keys_are_counted_as_requests(tmp_path: Path) -> None:
    """A principal that only guesses key ids is slowed down too, and foreign and unknown keys count alike."""
    policy = EVERYBODY + grant(3, '["mine-*"]', more="limits = { requests_per_second = 4 }")
    async with limited(tmp_path / "d", policy) as made:
        [foreign] = await made.one.make(1, "theirs-1")
        who, refused = made.who(3), 0
        for number in range(20):
            try:
                await made.ask(who, api.GET_KEY, api.KeyRequest((foreign, NO_KEY)[number % 2]))
            except LimitExceededError:
                refused += 1
            except KeyNotFoundError:
                continue
        assert refused >= 10


async def test_a_request_in_flight_counts_until_it_has_ended(tmp_path: Path) -> None:
    """However it ends: answered, refused, failed, or cancelled before and after its task began."""
    async with limited(tmp_path / "d", grant(1, '["*"]', more="limits = { concurrent = 1 }")) as made:
        who = made.who(1)
        [key_id] = await made.one.make(1)
        async with made.one.vault.locks.hold((key_id,)):
            retiring = await made.until_waiting(who, api.RETIRE_KEY, api.KeyRequest(key_id))
            with pytest.raises(LimitExceededError) as refused:
                await made.ask(who, api.GET_KEY, api.KeyRequest(key_id))
            assert (refused.value.limit, refused.value.retry_after_s) == ("concurrent", 1)
            retiring.cancel()
            with pytest.raises(asyncio.CancelledError):
                await retiring
            never_begun = asyncio.ensure_future(made.ask(who, api.RETIRE_KEY, api.KeyRequest(key_id)))
            never_begun.cancel()
            with pytest.raises(asyncio.CancelledError):
                await never_begun
            entered = made.table.entered(who, api.RETIRE_KEY)
            answer = made.table[api.RETIRE_KEY](entered, api.KeyRequest(key_id), "")
            assert inspect.isawaitable(answer) and entered.entered is not None
            task = made.meters.later(entered.entered, answer)
            with pytest.raises(LimitExceededError):
                await made.ask(who, api.GET_KEY, api.KeyRequest(key_id))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            made.meters.end_turn()
        for _ in range(3):
            with pytest.raises(KeyNotFoundError):
                await made.ask(who, api.GET_KEY, api.KeyRequest(NO_KEY))
            assert (await made.ask(who, api.RETIRE_KEY, api.KeyRequest(key_id)))["state"] == "retired"
            assert await made.ask(who, api.RANDOM, api.RandomRequest(1))


async def test_a_destruction_can_be_repeated_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a lost answer, and after an error of the disk behind the tombstone. Others see an unknown key."""
    async with limited(tmp_path / "d", MINE + grant(2, '["other-*"]')) as made:
        who, other = made.who(1), made.who(2)
        [key_id] = await made.one.make(1, "mine-1")
        await made.ask(who, api.RETIRE_KEY, api.KeyRequest(key_id))
        request = api.DestroyKeyRequest(key_id)
        with monkeypatch.context() as patched:

            def fail(*key_ids: str) -> None:
                raise StorageUnavailableError("the disk refuses")

            patched.setattr(made.one.vault.store, "remove", fail)
            with pytest.raises(StorageUnavailableError):
                await made.ask(who, api.DESTROY_KEY, request)
        assert made.one.file(key_id).exists()
        for _ in range(2):
            assert (await made.ask(who, api.DESTROY_KEY, request))["state"] == "destroyed"
            assert not made.one.file(key_id).exists()
        with pytest.raises(KeyNotFoundError):
            await made.ask(other, api.DESTROY_KEY, request)
        assert outcome(made, who, api.ENCRYPT, api.EncryptItemRequest(key_id, b64())).startswith("key_destroyed")
        assert outcome(made, other, api.ENCRYPT, api.EncryptItemRequest(key_id, b64())).startswith("key_not_found")


# --- the policy changes while a request waits -------------------------------------------------------------------------

NARROWER = grant(1, '["other-*"]')
WITHOUT_ROLES = grant(1, '["mine-*"]', '["monitor"]')
GONE = grant(2, '["*"]')
CHANGES: dict[str, tuple[str, type[KmsRefusedError], type[KmsRefusedError]]] = {
    "another scope": (NARROWER, KeyNotFoundError, ForbiddenError),
    "fewer roles": (WITHOUT_ROLES, ForbiddenError, ForbiddenError),
    "no grant": (GONE, UnauthorizedError, UnauthorizedError),
}
"""The policy, and what it answers for a key and for a new key of a thread."""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("verb", [api.RETIRE_KEY, api.DESTROY_KEY], ids=lambda verb: verb.name)
async def test_a_change_that_waits_for_the_key_obeys_the_new_policy(
    tmp_path: Path, change: str, verb: Verb[Any, Any]
) -> None:
    policy, of_key, _ = CHANGES[change]

    async with limited(tmp_path / "d", MINE) as made:
        who = made.who(1)
        [key_id] = await made.one.make(1, "mine-1")
        if verb is api.DESTROY_KEY:
            await made.ask(who, api.RETIRE_KEY, api.KeyRequest(key_id))
        before = made.one.file(key_id).read_bytes()
        async with made.one.vault.locks.hold((key_id,)):
            waiting = await made.until_waiting(who, verb, verb.request(key_id=key_id))
            made.change(policy)
        with pytest.raises(of_key):
            await waiting
        assert made.one.file(key_id).read_bytes() == before


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("verb", [api.CREATE_DEK, api.GET_OR_CREATE_DEK], ids=lambda verb: verb.name)
async def test_a_create_that_waits_for_another_obeys_the_new_policy(
    tmp_path: Path, change: str, verb: Verb[Any, Any]
) -> None:
    policy, _, of_thread = CHANGES[change]

    async with limited(tmp_path / "d", MINE) as made:
        who = made.who(1)
        await made.one.make(1, "mine-0")  # so that wraps are reserved
        released = asyncio.Event()
        writing = made.one.vault.journal.create

        async def slow(changes: Sequence[Change], *, confirmed: bool = False) -> None:
            await released.wait()
            await writing(changes)

        made.one.vault.journal.create = slow  # type: ignore[method-assign]  # a slow disk
        first = await made.until_waiting(who, api.CREATE_DEK, api.CreateDekRequest("mine-1"))
        second = await made.until_waiting(who, verb, verb.request(thread_id="mine-1"))
        made.change(policy)
        released.set()
        assert (await first)["key_id"], "what has begun is ended"
        with pytest.raises(of_thread):
            await second
        assert len(made.one.vault.index) == 2


@pytest.mark.parametrize("change", CHANGES)
async def test_a_task_that_has_not_begun_obeys_the_new_policy(tmp_path: Path, change: str) -> None:
    policy, _, of_thread = CHANGES[change]

    async with limited(tmp_path / "d", MINE) as made:
        answer = made.begin(made.who(1), api.CREATE_DEK, api.CreateDekRequest("mine-1"))
        made.change(policy)
        with pytest.raises(of_thread):
            await answer  # type: ignore[misc]  # it awaits
        assert len(made.one.vault.index) == 0


@pytest.mark.parametrize("change", CHANGES)
async def test_plaintext_is_withheld_if_the_policy_changes_at_its_line(tmp_path: Path, change: str) -> None:
    """The log shows the use, and then that the answer was withheld."""
    policy, of_key, _ = CHANGES[change]

    async with limited(tmp_path / "d", MINE) as made:
        key_id = (await create(made.one.vault, "mine-1", purpose="data")).id
        writing = made.audit.add_written

        async def slow(event: Any, *, durable: bool) -> None:
            await writing(event, durable=durable)
            made.change(policy)

        made.audit.add_written = slow  # type: ignore[method-assign]  # the log is held
        with pytest.raises(of_key):
            await made.ask(made.who(1), api.GENERATE_DATA_KEY, api.GenerateDataKeyRequest(key_id))
        used, withheld = (event for event in made.audit.events if event.type == "generate_data_key")
        assert (used.outcome, withheld.outcome) == ("ok", of_key.code)
        assert "withheld" in withheld.detail


async def test_a_change_that_leaves_the_rights_does_not_disturb_what_waits(tmp_path: Path) -> None:
    async with limited(tmp_path / "d", MINE) as made:
        [key_id] = await made.one.make(1, "mine-1")
        async with made.one.vault.locks.hold((key_id,)):
            waiting = await made.until_waiting(made.who(1), api.RETIRE_KEY, api.KeyRequest(key_id))
            made.change(MINE + GONE)
        assert (await waiting)["state"] == "retired"


async def test_a_listing_shows_what_the_policy_allows_when_the_files_are_read(tmp_path: Path) -> None:
    async with limited(tmp_path / "d", grant(1, '["a-*", "b-*"]')) as made:
        [a], [_b] = await made.one.make(1, "a-1"), await made.one.make(1, "b-1")
        go_on = threading.Event()
        made.one.reader.submit(go_on.wait, 60)
        waiting = await made.until_waiting(made.who(1), api.LIST_KEYS, api.ListKeysRequest())
        made.change(grant(1, '["a-*"]'))
        go_on.set()
        listed = await waiting
        assert [key["key_id"] for key in listed["keys"]] == [a]


# --- what an operator may verify --------------------------------------------------------------------------------------


async def test_samples_of_a_rotation_need_the_rights_of_a_check(tmp_path: Path) -> None:
    """Otherwise a caller who may rotate could try ciphertexts of any thread."""
    policy = EVERYBODY + grant(3, '["mine-*"]') + '[[grant]]\nprincipals = ["uid:4"]\nroles = ["rotate"]\n'
    async with limited(tmp_path / "d", policy) as made:
        [mine], [foreign] = await made.one.make(1, "mine-1"), await made.one.make(1, "theirs-1")
        texts = {key_id: await sealed(made, made.who(1), key_id) for key_id in (mine, foreign)}

        def rotate(key_id: str) -> api.RotateKekRequest:
            return api.RotateKekRequest(verify=[api.VerifySample(key_id, texts[key_id])])

        with pytest.raises(KeyNotFoundError):
            await made.ask(made.who(3), api.ROTATE_KEK, rotate(foreign))
        with pytest.raises(ForbiddenError, match="role decrypt"):
            await made.ask(made.who(4), api.ROTATE_KEK, rotate(mine))
        assert (await made.ask(made.who(3), api.ROTATE_KEK, rotate(mine)))["status"] == "ok"


async def test_a_malformed_id_is_malformed_in_any_scope(tmp_path: Path) -> None:
    async with limited(tmp_path / "d", MINE) as made:
        for key_id in ("", "k_", "x" * 1000, NO_KEY.upper(), NO_KEY + "0"):
            with pytest.raises(InvalidRequestError):
                await made.ask(made.who(1), api.GET_KEY, api.KeyRequest(key_id))
