"""What a request of a limited caller is charged, also one that is refused, and what refusals tell of foreign keys."""

from collections import Counter
from pathlib import Path

import pytest

from minikms import api
from minikms.api.errors import KeyNotFoundError, LimitExceededError
from tests.harness.limited import limited
from tests.minikms_daemon.service.asking import NO_KEY
from tests.minikms_daemon.service.limiting import EVERYBODY, b64, grant, instructions, outcome, requests

ONE_A_SECOND = "limits = { requests_per_second = 1, concurrent = 1 }"


async def test_a_batch_without_the_role_is_charged_and_leaves_no_ids(tmp_path: Path) -> None:
    """Otherwise 1,024 ids of 128 characters go into the audit log, as often as somebody likes."""
    policy = grant(1, '["mine-*"]', '["monitor"]', ONE_A_SECOND)
    async with limited(tmp_path / "d", policy) as made:
        batch = api.DecryptBatchRequest([api.DecryptItemRequest(NO_KEY, b64(), request_id="r" * 128)] * 3)
        answer = await made.ask(made.who(1), api.DECRYPT_BATCH, batch)
        assert [item["code"] for item in answer["items"]] == ["forbidden"] * 3
        [event] = made.audit.events
        assert (event.count, event.key_ids, event.request_ids) == (3, [], [])
        with pytest.raises(LimitExceededError):
            await made.ask(made.who(1), api.DECRYPT_BATCH, batch)
        assert len(made.audit.events) == 1


async def test_a_refused_request_costs_the_same_work_for_any_batch(tmp_path: Path) -> None:
    """A limit refuses before an item is looked at, and nothing is counted of items that were not answered."""
    async with limited(tmp_path / "d", grant(1, '["mine-*"]', more=ONE_A_SECOND)) as made:
        who = made.who(1)
        ids = [f"k_{number:026d}" for number in range(200)]

        def batch(count: int) -> api.DecryptBatchRequest:
            return api.DecryptBatchRequest([api.DecryptItemRequest(key_id, b64()) for key_id in ids[:count]])

        assert len((await made.ask(who, api.DECRYPT_BATCH, batch(2)))["items"]) == 2
        assert made.refusals["unknown_key"] == 2
        costs = set()
        for request in (batch(1), batch(1), batch(200)):
            with pytest.raises(LimitExceededError):
                await made.ask(who, api.DECRYPT_BATCH, request)
            costs.add(instructions(lambda: outcome(made, who, api.DECRYPT_BATCH, request)))  # noqa: B023  at once
        assert len(costs) == 1, costs
        assert made.refusals["unknown_key"] == 2


async def test_a_request_counts_in_the_grants_that_decide_and_in_no_other(tmp_path: Path) -> None:
    """It is charged before that is known, and what it took elsewhere is given back."""
    policy = grant(1, '["a-*"]', more="limits = { requests_per_second = 2 }")
    policy += grant(1, '["b-*"]', more="limits = { requests_per_second = 3 }")
    now_ms = [10_000]
    async with limited(tmp_path / "d", policy, boot_ms=lambda: now_ms[0]) as made:
        [a], [b] = await made.one.make(1, "a-1"), await made.one.make(1, "b-1")

        async def passing(key_id: str) -> int:
            passed = 0
            for _ in range(9):
                try:
                    passed += bool(await made.ask(made.who(1), api.GET_KEY, api.KeyRequest(key_id)))
                except LimitExceededError:
                    break
            return passed

        assert (await passing(b), await passing(a)) == (3, 1), "the refused one was charged to the first grant"
        now_ms[0] += 2_000
        assert (await passing(a), await passing(b)) == (2, 2)


async def test_metrics_tell_nothing_of_keys_that_are_out_of_scope(tmp_path: Path) -> None:
    """Who may read metrics would learn from them which of two ids that are answered alike exists."""
    async with limited(tmp_path / "d", EVERYBODY + grant(3, '["mine-*"]')) as made:
        [foreign] = await made.one.make(1, "theirs-1")
        counted = []
        for key_id in (foreign, NO_KEY):
            before = Counter(made.refusals)
            for verb, request in requests(key_id, "k_7" + "z" * 25).items():
                with pytest.raises(KeyNotFoundError):
                    answer = await made.ask(made.who(3), verb, request)
                    raise KeyNotFoundError(answer["items"][0]["error"])
            counted.append(Counter(made.refusals) - before)
        assert counted[0] == counted[1]
        assert counted[0].keys() == {"unknown_key"}


@pytest.mark.parametrize("state", ["active", "retired", None])
async def test_listing_a_foreign_thread_is_as_listing_one_without_keys(tmp_path: Path, state: str | None) -> None:
    """Instruction by instruction, however many keys it has: ids of threads can be guessed."""
    async with limited(tmp_path / "d", EVERYBODY + grant(3, '["mine-*"]')) as made:
        await made.one.make(1, "mine-1")
        await made.one.make(9, "theirs-9")
        await made.one.make(1, "theirs-1")
        keys = made.access.keys(made.table.entered(made.who(3), api.LIST_KEYS), api.LIST_KEYS)
        pages, costs = set(), set()
        for thread_id in ("theirs-9", "theirs-9", "theirs-1", "theirs-0"):
            page = keys.page(after="", limit=100, thread_id=thread_id, state=state)
            pages.add(str(page))
            costs.add(instructions(lambda: keys.page(after="", limit=100, thread_id=thread_id, state=state)))  # noqa: B023  at once
        assert pages == {"KeyPage(key_ids=[], next_after='')"} and len(costs) == 1, (pages, costs)
