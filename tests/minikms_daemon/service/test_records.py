"""Records through a real daemon: what a ciphertext is bound to, and batches whose items stand each for itself."""

import asyncio
import base64
import itertools
import json
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api import ROLES, Verb
from minikms.api.errors import KmsRefusedError
from minikms.audit import Event
from minikms.policy.principal import Principal
from minikms_daemon.service import records
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.encoding import Reply
from minikms_daemon.service.records import RecordVerbs
from tests.harness.limited import KeptAudit
from tests.harness.live_daemon import LiveDaemon
from tests.harness.vaults import OpenedVault, SilentAudit, opened_vault
from tests.minikms_daemon.service.asking import NO_KEY, ask, b64, encrypted, new_key, post

TEXT = b64(b"text")


def decrypts(daemon: LiveDaemon, key_id: str, sealed: str, **others: str) -> bool:
    answer = post(daemon, "/decrypt", {"key_id": key_id, "ciphertext": sealed, **others})
    assert answer.status == 200 or answer.code == "decryption_failed", answer
    return answer.status == 200


def test_a_ciphertext_is_nonce_ciphertext_and_tag_and_never_the_same_twice(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon)
    sealed = {encrypted(daemon, key_id, b"hello") for _ in range(50)}
    assert len(sealed) == 50
    assert {len(base64.b64decode(one)) for one in sealed} == {24 + 5 + 16}
    assert len({base64.b64decode(one)[:24] for one in sealed}) == 50


def test_it_opens_under_the_aad_that_it_was_sealed_with_and_no_other(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon)
    for aad in ("", b64(b"message-1"), b64(bytes(api.AAD_BYTES_MAX))):
        sealed = encrypted(daemon, key_id, aad=aad)
        assert decrypts(daemon, key_id, sealed, aad=aad)
        assert not decrypts(daemon, key_id, sealed, aad=b64(b"message-2"))
    sealed = encrypted(daemon, key_id)
    assert decrypts(daemon, key_id, sealed, aad="")
    assert not decrypts(daemon, key_id, encrypted(daemon, key_id, aad=b64(b"x")))


def test_it_opens_under_its_own_key_only_also_of_the_same_thread(daemon: LiveDaemon) -> None:
    one, other = new_key(daemon, "thread-1"), new_key(daemon, "thread-1")
    sealed = encrypted(daemon, one, thread_id="thread-1")
    assert decrypts(daemon, one, sealed, thread_id="thread-1")
    assert not decrypts(daemon, other, sealed, thread_id="thread-1")


def test_a_retired_key_still_decrypts(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon)
    sealed = encrypted(daemon, key_id)
    assert post(daemon, f"/keys/{key_id}/retire", {}).status == 200
    assert decrypts(daemon, key_id, sealed)


def test_a_batch_answers_each_item_in_order_whatever_becomes_of_the_others(daemon: LiveDaemon) -> None:
    key_id, retired = new_key(daemon), new_key(daemon, "u")
    sealed_before = encrypted(daemon, retired)
    post(daemon, f"/keys/{retired}/retire", {})
    items = [
        {"key_id": key_id, "plaintext": TEXT},
        {"key_id": key_id, "plaintext": "dGV4dA"},
        {"key_id": NO_KEY, "plaintext": TEXT},
        {"key_id": "no key", "plaintext": TEXT},
        {"key_id": retired, "plaintext": TEXT},
        {"key_id": key_id, "plaintext": TEXT, "thread_id": "other"},
        {"key_id": key_id, "plaintext": b64(bytes(api.PLAINTEXT_BYTES_MAX + 1))},
        {"key_id": key_id, "plaintext": TEXT, "aad": b64(b"a"), "thread_id": "t"},
    ]
    answer = post(daemon, "/encrypt_batch", {"items": items})
    assert answer.status == 200
    codes = [item.get("code", "") for item in answer.body["items"]]
    expected = [
        "",
        "invalid_request",
        "key_not_found",
        "invalid_request",
        "key_retired",
        "wrong_thread",
        "too_large",
        "",
    ]
    assert codes == expected
    first, last = answer.body["items"][0]["ciphertext"], answer.body["items"][-1]["ciphertext"]
    opened = post(
        daemon,
        "/decrypt_batch",
        {
            "items": [
                {"key_id": key_id, "ciphertext": first},
                {"key_id": key_id, "ciphertext": last},
                {"key_id": key_id, "ciphertext": last, "aad": b64(b"a")},
                {"key_id": retired, "ciphertext": sealed_before},
                {"key_id": retired, "ciphertext": first},
                {"key_id": key_id, "ciphertext": ""},
            ]
        },
    )
    assert [item.get("plaintext", item.get("code")) for item in opened.body["items"]] == [
        TEXT,
        "decryption_failed",
        TEXT,
        TEXT,
        "decryption_failed",
        "decryption_failed",
    ]


def test_an_item_of_a_batch_is_answered_as_decrypt_answers_it_alone(daemon: LiveDaemon) -> None:
    """Also beside items of its own key that open. The batch verb has checks of its own."""
    key_id, other, destroyed = new_key(daemon), new_key(daemon, "u"), new_key(daemon)
    sealed, bound = encrypted(daemon, key_id), encrypted(daemon, key_id, aad=b64(b"a"))
    last = encrypted(daemon, destroyed)
    assert post(daemon, f"/keys/{destroyed}/retire", {}).status == 200
    assert post(daemon, f"/keys/{destroyed}/destroy", {"key_id": destroyed}).status == 200
    good = {"key_id": key_id, "ciphertext": sealed, "thread_id": "t"}
    others = [
        {**good, "ciphertext": bound, "aad": b64(b"a")},
        {**good, "ciphertext": bound, "aad": b64(b"b")},
        {**good, "ciphertext": bound},
        {**good, "aad": ""},
        {**good, "thread_id": "u"},
        {**good, "thread_id": ""},
        {**good, "key_id": other, "thread_id": "u"},
        {**good, "key_id": other},
        {**good, "key_id": NO_KEY},
        {**good, "key_id": ""},
        {**good, "key_id": destroyed, "ciphertext": last},
        {**good, "ciphertext": ""},
        {**good, "ciphertext": b64(bytes(39))},
        {**good, "ciphertext": b64(bytes(40))},
        {**good, "ciphertext": "AB=="},
        {**good, "ciphertext": b64(bytes(api.PLAINTEXT_BYTES_MAX + 41))},
        {**good, "aad": "AB=="},
        {**good, "aad": b64(bytes(api.AAD_BYTES_MAX + 1))},
    ]
    alone = [post(daemon, "/decrypt", item).body for item in others]
    opened = {"plaintext": b64(b"text")}
    batch = [item for each in others for item in (good, each)]
    answers = [answer for each in alone for answer in (opened, each)]
    assert post(daemon, "/decrypt_batch", {"items": batch}).body["items"] == answers
    assert post(daemon, "/decrypt_batch", {"items": batch[::-1]}).body["items"] == answers[::-1]
    assert [answer.get("code", "") for answer in alone].count("") == 2


def test_an_empty_batch_is_an_empty_answer(daemon: LiveDaemon) -> None:
    for target in ("/encrypt_batch", "/decrypt_batch"):
        assert post(daemon, target, {"items": []}) == (200, {"items": []})


def test_a_batch_of_the_largest_size_is_one_audit_line(daemon: LiveDaemon) -> None:
    """The line has its keys, the count and the request ids."""
    keys = [new_key(daemon) for _ in range(3)]
    items = [{"key_id": keys[n % 3], "plaintext": TEXT, "request_id": f"r{n % 2}"} for n in range(api.BATCH_ITEMS_MAX)]
    answer = post(daemon, "/encrypt_batch", {"items": [*items[:-1], {"key_id": NO_KEY, "plaintext": TEXT}]})
    assert sum("ciphertext" in item for item in answer.body["items"]) == api.BATCH_ITEMS_MAX - 1
    line = daemon.events("encrypt_batch")[-1]
    assert (line["count"], line["key_ids"], line["request_ids"]) == (1024, [*keys, NO_KEY], ["r0", "r1"])
    assert (line["outcome"], line["detail"]) == ("partly_refused", "1 refused")


def test_reencryption_moves_records_between_a_threads_keys_and_keeps_aad(daemon: LiveDaemon) -> None:
    old = new_key(daemon, "thread-2")
    sealed = [encrypted(daemon, old, b"%d" % n, aad=b64(b"place %d" % n)) for n in range(10)]
    new = new_key(daemon, "thread-2", replaces=old)
    items = [{"ciphertext": one, "aad": b64(b"place %d" % n)} for n, one in enumerate(sealed)]
    items[3]["aad"] = b64(b"another place")
    answer = post(daemon, "/reencrypt_batch", {"from_key_id": old, "to_key_id": new, "items": items})
    assert answer.status == 200
    for number, item in enumerate(answer.body["items"]):
        if number == 3:
            assert item["code"] == "decryption_failed"
        else:
            again = post(
                daemon, "/decrypt", {"key_id": new, "ciphertext": item["ciphertext"], "aad": b64(b"place %d" % number)}
            )
            assert again.body == {"plaintext": b64(b"%d" % number)}
    assert decrypts(daemon, old, sealed[0], aad=b64(b"place 0"))
    line = daemon.events("reencrypt_batch")[-1]
    assert (line["key_ids"], line["count"], line["outcome"]) == ([old, new], 10, "partly_refused")


@pytest.mark.parametrize("cache", [1, 2, 3])
async def test_reencryption_and_batches_work_however_few_keys_stay_open(tmp_path: Path, cache: int) -> None:
    """Opening one key may put another out of the cache and zero it: nobody may then still be using it."""
    async with opened_vault(tmp_path / "d", cache_keys_max=cache) as one:
        table = record_verbs(one)
        old, new, *others = await one.make(6)

        async def encrypted_batch(*key_ids: str) -> list[dict[str, str]]:
            items = [api.EncryptItemRequest(key_id=key_id, plaintext=TEXT) for key_id in key_ids]
            return await items_of(table[api.ENCRYPT_BATCH](ANYONE, api.EncryptBatchRequest(items), ""))

        [sealed] = await encrypted_batch(old)
        for _ in range(3):
            await encrypted_batch(*others[:cache])
            request = api.ReencryptBatchRequest(old, new, [api.ReencryptItemRequest(sealed["ciphertext"])])
            [moved] = await items_of(table[api.REENCRYPT_BATCH](ANYONE, request, ""))
            item = api.DecryptItemRequest(new, moved["ciphertext"])
            [opened] = await items_of(table[api.DECRYPT_BATCH](ANYONE, api.DecryptBatchRequest([item]), ""))
            assert opened == {"plaintext": TEXT}
        key_ids = (old, new, *others) * 20
        back = [
            api.DecryptItemRequest(key_id, item["ciphertext"])
            for key_id, item in zip(key_ids, await encrypted_batch(*key_ids), strict=True)
        ]
        opened_items = await items_of(table[api.DECRYPT_BATCH](ANYONE, api.DecryptBatchRequest(back), ""))
        assert opened_items == [{"plaintext": TEXT}] * len(back)


@pytest.mark.parametrize("verb", [api.ENCRYPT_BATCH, api.DECRYPT_BATCH], ids=lambda verb: verb.name)
async def test_a_batch_that_opens_keys_gives_way_and_then_opens_them_anew(
    tmp_path: Path, verb: Verb[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slice in a turn of the event loop; one answer and one line. Keys that are open are used at once."""
    monkeypatch.setattr(records, "SLICE_SECONDS_MAX", 0.0)
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(6)
        audit = KeptAudit()
        table = VerbTable(audit)
        RecordVerbs(one.vault, table)
        plain = [api.EncryptItemRequest(key_id=key_id, plaintext=TEXT) for key_id in key_ids]
        sealed = await items_of(table[api.ENCRYPT_BATCH](ANYONE, api.EncryptBatchRequest(plain), ""))
        request: Any = api.EncryptBatchRequest(plain)
        if verb is api.DECRYPT_BATCH:
            items = zip(key_ids, sealed, strict=True)
            request = api.DecryptBatchRequest(
                [api.DecryptItemRequest(key_id, one["ciphertext"]) for key_id, one in items]
            )
        assert not isinstance(table[verb](ANYONE, request, ""), Awaitable)
        one.vault.cache.clear()
        audit.events = []
        begun = [table[verb](ANYONE, request, "") for _ in range(2)]
        await one.vault.retire(key_ids[4])
        await one.vault.retire(key_ids[5])
        await one.vault.destroy(key_ids[5])
        both = [asyncio.ensure_future(items_of(each)) for each in begun]
        opened = [one.vault.cache.misses]
        while not all(each.done() for each in both):
            opened.append(one.vault.cache.misses)
            await asyncio.sleep(0)
        for each in both:
            codes = [item.get("code") for item in each.result()]
            retired = "key_retired" if verb is api.ENCRYPT_BATCH else None
            assert codes == [None, None, None, None, retired, "key_destroyed"]
        assert max(later - now for now, later in itertools.pairwise(opened)) <= 2
        assert [(event.type, event.count, event.outcome) for event in audit.events] == [
            (verb.name, 6, "partly_refused")
        ] * 2


async def test_a_batch_that_is_cancelled_between_two_slices_has_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a seal and a shutdown do."""
    monkeypatch.setattr(records, "SLICE_SECONDS_MAX", 0.0)
    async with opened_vault(tmp_path / "d") as one:
        audit = KeptAudit()
        table = VerbTable(audit)
        RecordVerbs(one.vault, table)
        items = [api.EncryptItemRequest(key_id=key_id, plaintext=TEXT) for key_id in await one.make(3)]
        one.vault.cache.clear()
        going = asyncio.ensure_future(items_of(table[api.ENCRYPT_BATCH](ANYONE, api.EncryptBatchRequest(items), "")))
        await asyncio.sleep(0)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        assert [event.outcome for event in audit.events] == ["interrupted"]


async def test_a_batch_without_the_role_is_refused_by_item(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        table = record_verbs(one)
        roleless = msgspec.structs.replace(ANYONE, roles=frozenset[api.Role]())
        request = api.EncryptBatchRequest([api.EncryptItemRequest(key_id=key_id, plaintext=TEXT)] * 2)
        answer = await items_of(table[api.ENCRYPT_BATCH](roleless, request, ""))
        assert [item["code"] for item in answer] == ["forbidden"] * 2


class _Lines(SilentAudit):
    """Keeps of each event what its line says of the caller and the request."""

    def __init__(self) -> None:
        self.of: list[tuple[str, int, str, str, str]] = []

    def add(self, event: Event) -> None:
        self.of.append((event.actor, event.pid, event.key_id, event.request_id, event.outcome))


async def test_each_encryption_has_a_line_about_its_own_caller_and_request(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        [key_id, other] = await one.make(2)
        lines = _Lines()
        table = VerbTable(lines)
        RecordVerbs(one.vault, table)
        last = Principal(5, 7, "peer_uid:5", ROLES)
        wrong_thread = {"thread_id": "another"}
        for who, item, request_id, outcome in (
            (ANYONE, {}, "", "ok"),
            (ANYONE, {}, "", "ok"),
            (ANYONE, {}, "of-the-head", "ok"),
            (ANYONE, {"request_id": "of-the-body"}, "of-the-head", "ok"),
            (ANYONE, wrong_thread, "", "wrong_thread"),
            (ANYONE, {"plaintext": "?"}, "", "invalid_request"),
            (msgspec.structs.replace(ANYONE, pid=7), {}, "", "ok"),
            (last, {}, "", "ok"),
            (last, {"key_id": other}, "", "ok"),
            (last, wrong_thread, "refused", "wrong_thread"),
            (last, {}, "", "ok"),
            (ANYONE, {}, "", "ok"),
        ):
            asked = api.EncryptItemRequest(**{"key_id": key_id, "plaintext": TEXT} | item)
            try:
                answer = table[api.ENCRYPT](who, asked, request_id)
            except KmsRefusedError as error:
                assert error.code == outcome
            else:
                assert isinstance(answer, bytes)
            asked_id = request_id if asked.request_id is msgspec.UNSET else asked.request_id
            assert lines.of.pop() == (who.actor, who.pid, asked.key_id, asked_id, outcome)
            assert lines.of == []


ANYONE = Principal(0, 0, "peer_uid:0", ROLES)


def record_verbs(one: OpenedVault) -> VerbTable:
    table = VerbTable(SilentAudit())
    RecordVerbs(one.vault, table)
    return table


async def items_of(answer: Reply | Awaitable[Reply]) -> list[dict[str, str]]:
    body = await answer if isinstance(answer, Awaitable) else answer
    assert isinstance(body, bytes)
    items: list[dict[str, str]] = json.loads(body)["items"]
    return items


def test_many_connections_at_once_each_get_their_own_answer(daemon: LiveDaemon) -> None:
    key_ids = [new_key(daemon) for _ in range(8)]

    def round_trip(number: int) -> bool:
        key_id, plaintext = key_ids[number % 8], b"%d" % number
        sealed = encrypted(daemon, key_id, plaintext)
        answer = post(daemon, "/decrypt", {"key_id": key_id, "ciphertext": sealed})
        return bool(answer.body == {"plaintext": b64(plaintext)})

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(round_trip, range(200)))


def test_the_wrapped_key_is_answered_as_it_is_on_disk(daemon: LiveDaemon) -> None:
    created = post(daemon, "/create_dek_for_thread", {"thread_id": "t"}).body
    wrapped = ask(daemon, "GET", f"/get_wrapped?key_id={created['key_id']}").body
    assert wrapped == {"wrapped": created["wrapped"]}
    assert len(base64.b64decode(wrapped["wrapped"])) == 24 + 32 + 16
