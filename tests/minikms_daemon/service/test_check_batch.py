"""`/check_batch`: which records open, item by item, and nothing of what is in them."""

import json
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms import api
from minikms.api import ROLES
from minikms.api.errors import ForbiddenError
from minikms.crypto import records
from minikms.policy.principal import Principal
from minikms_daemon.service import records as service
from minikms_daemon.service.base import VerbTable
from tests.harness.live_daemon import LiveDaemon
from tests.harness.vaults import SilentAudit, opened_vault
from tests.minikms_daemon.service.asking import NO_KEY, ask, b64, encrypted, new_key, post

ANYONE = Principal(0, 0, "peer_uid:0", ROLES)
DOES_NOT_OPEN = "the ciphertext does not open under this key, thread and aad"


def check(daemon: LiveDaemon, key_id: str, *items: dict[str, str], **others: str) -> Any:
    answer = post(daemon, "/check_batch", {"key_id": key_id, "items": items, **others})
    assert answer.status == 200, answer
    return answer.body


def test_items_that_open_are_counted_and_the_others_named(daemon: LiveDaemon) -> None:
    """A refusal has the index and the code of its item."""
    key_id, other = new_key(daemon), new_key(daemon)
    good = {"ciphertext": encrypted(daemon, key_id, aad=b64(b"place")), "aad": b64(b"place")}
    items = [
        good,
        {"ciphertext": good["ciphertext"], "aad": b64(b"another place")},
        {"ciphertext": encrypted(daemon, key_id, b"")},
        {"ciphertext": good["ciphertext"][:-4]},
        {"ciphertext": "dGV4dA"},
        {"ciphertext": b64(bytes(39))},
        {"ciphertext": ""},
        {"ciphertext": encrypted(daemon, other)},
        {"ciphertext": b64(bytes(api.PLAINTEXT_BYTES_MAX + 41))},
        {**good, "aad": b64(bytes(api.AAD_BYTES_MAX + 1))},
        {**good, "aad": "-_=="},
        {"ciphertext": encrypted(daemon, key_id, aad=""), "aad": ""},
    ]
    body = check(daemon, key_id, *items, thread_id="t")
    assert body["opened"] == 3
    assert [(refused["item"], refused["code"]) for refused in body["refused"]] == [
        (1, "decryption_failed"),
        (3, "decryption_failed"),
        (4, "invalid_request"),
        (5, "decryption_failed"),
        (6, "decryption_failed"),
        (7, "decryption_failed"),
        (8, "too_large"),
        (9, "too_large"),
        (10, "invalid_request"),
    ]
    assert body["refused"][0] == {"item": 1, "error": DOES_NOT_OPEN, "code": "decryption_failed"}


def test_each_item_is_refused_with_the_words_of_decrypt_batch(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon)
    sealed = encrypted(daemon, key_id, aad=b64(b"a"))
    items = [
        {"ciphertext": text, "aad": aad}
        for text in (sealed, sealed[4:], "x", "dGV4dB==", "é", b64(bytes(39)), b64(os.urandom(40)))
        for aad in ("", b64(b"a"), "x", b64(bytes(4097)))
    ]
    each = post(daemon, "/decrypt_batch", {"items": [{"key_id": key_id, **item} for item in items]}).body["items"]
    body = check(daemon, key_id, *items)
    assert body["refused"] == [{"item": index, **item} for index, item in enumerate(each) if "code" in item]
    assert body["opened"] == 1


def test_the_plaintext_is_nowhere_in_the_answer(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon)
    sealed = encrypted(daemon, key_id, b"secret words")
    refused = {"ciphertext": sealed, "aad": b64(b"elsewhere")}
    body = check(daemon, key_id, {"ciphertext": sealed}, refused)
    assert body == {"opened": 1, "refused": [{"item": 1, "error": DOES_NOT_OPEN, "code": "decryption_failed"}]}


def test_no_items_are_none_opened_and_none_refused(daemon: LiveDaemon) -> None:
    assert check(daemon, new_key(daemon)) == {"opened": 0, "refused": []}


def test_records_of_a_retired_key_open_and_of_a_destroyed_key_do_not(daemon: LiveDaemon) -> None:
    """Those of a destroyed key are refused as a whole."""
    key_id = new_key(daemon)
    item = {"ciphertext": encrypted(daemon, key_id)}
    assert post(daemon, f"/keys/{key_id}/retire", {}).status == 200
    assert check(daemon, key_id, item, item) == {"opened": 2, "refused": []}
    assert post(daemon, f"/keys/{key_id}/destroy", {"key_id": key_id}).status == 200
    answer = post(daemon, "/check_batch", {"key_id": key_id, "items": [item]})
    assert (answer.status, answer.code) == (410, "key_destroyed")


def test_a_check_batch_with_a_fault_of_its_own_is_refused_as_a_whole(daemon: LiveDaemon) -> None:
    """The faults: another thread, too many items, an unknown key."""
    key_id = new_key(daemon, "thread-1")
    item = {"ciphertext": encrypted(daemon, key_id)}
    for asked, status, code in (
        ({"key_id": key_id, "items": [item], "thread_id": "thread-2"}, 403, "wrong_thread"),
        ({"key_id": key_id, "items": [item], "thread_id": ""}, 403, "wrong_thread"),
        ({"key_id": NO_KEY, "items": []}, 404, "key_not_found"),
        ({"key_id": "../keyring", "items": []}, 400, "invalid_request"),
        ({"key_id": key_id, "items": [item] * (api.BATCH_ITEMS_MAX + 1)}, 413, "too_many"),
        ({"key_id": key_id, "items": [{**item, "key_id": key_id}]}, 400, "invalid_request"),
        ({"key_id": key_id}, 400, "invalid_request"),
    ):
        answer = post(daemon, "/check_batch", asked)
        assert (answer.status, answer.code) == (status, code)
    assert check(daemon, key_id, *[item] * api.BATCH_ITEMS_MAX, thread_id="thread-1")["opened"] == api.BATCH_ITEMS_MAX


def test_it_is_one_line_of_the_audit_log_with_key_and_count_refused_or_not(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon)
    item = {"ciphertext": encrypted(daemon, key_id)}
    before = len(daemon.events("check_batch"))
    check(daemon, key_id, item, item)
    check(daemon, key_id, item, {"ciphertext": ""}, item)
    post(daemon, "/check_batch", {"key_id": key_id, "items": [item], "thread_id": "another"})
    post(daemon, "/check_batch", b"{")
    all_opened, partly, foreign, none = daemon.events("check_batch")[before:]
    assert (all_opened["key_ids"], all_opened["count"], all_opened["outcome"]) == ([key_id], 2, "ok")
    assert (partly["count"], partly["outcome"], partly["detail"]) == (3, "partly_refused", "1 refused")
    assert (foreign["key_ids"], foreign["count"], foreign["outcome"]) == ([key_id], 1, "wrong_thread")
    assert none["outcome"] == "invalid_request"


def test_its_batches_and_seconds_are_in_the_metrics(daemon: LiveDaemon) -> None:
    key_id = new_key(daemon)

    def items() -> int:
        page = ask(daemon, "GET", "/metrics").body.decode()
        assert 'minikms_request_duration_seconds_count{verb="check_batch"}' in page
        [told] = [line for line in page.splitlines() if line.startswith('minikms_batch_items_sum{verb="check_batch"}')]
        return int(told.split()[1])

    check(daemon, key_id)
    before = items()
    check(daemon, key_id, *[{"ciphertext": ""}] * 5)
    assert items() == before + 5


async def test_without_the_role_the_whole_is_refused(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        request = api.CheckBatchRequest(key_id, [api.ReencryptItemRequest("")])
        table = VerbTable(SilentAudit())
        service.RecordVerbs(one.vault, table)
        with pytest.raises(ForbiddenError):
            table[api.CHECK_BATCH](msgspec.structs.replace(ANYONE, roles=ROLES - {"decrypt"}), request, "")
        alone = msgspec.structs.replace(ANYONE, roles=frozenset[api.Role](["decrypt"]))
        answer = table[api.CHECK_BATCH](alone, request, "")
        assert isinstance(answer, bytes)
        assert json.loads(answer)["opened"] == 0


async def test_no_plaintext_becomes_an_object_and_its_buffer_is_zeroed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers: list[memoryview] = []

    class Watched:
        """A cipher that opens into a buffer, and not otherwise."""

        def __init__(self, key: memoryview) -> None:
            self._cipher = AESGCM(key)

        def decrypt_into(self, nonce: bytes, data: bytes, aad: bytes, buffer: memoryview) -> int:
            length = self._cipher.decrypt_into(nonce, data, aad, buffer)
            assert bytes(buffer) == b"secret words %d" % len(buffers)
            buffers.append(buffer)
            return length

    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        table = VerbTable(SilentAudit())
        service.RecordVerbs(one.vault, table)
        texts = [b64(b"secret words %d" % number) for number in range(12)]
        asked = api.EncryptBatchRequest([api.EncryptItemRequest(key_id, text) for text in texts])
        sealed = table[api.ENCRYPT_BATCH](ANYONE, asked, "")
        body = await sealed if isinstance(sealed, Awaitable) else sealed
        assert isinstance(body, bytes)
        items = [api.ReencryptItemRequest(item["ciphertext"]) for item in json.loads(body)["items"]]
        one.vault.record_keys.end_turn()
        monkeypatch.setattr(records, "AESGCM", Watched)
        answer = table[api.CHECK_BATCH](ANYONE, api.CheckBatchRequest(key_id, items), "")
        assert isinstance(answer, bytes)
        assert json.loads(answer) == {"opened": 12, "refused": []}
    assert len(buffers) == 12
    assert not any(bytes(buffer).strip(b"\0") for buffer in buffers)
