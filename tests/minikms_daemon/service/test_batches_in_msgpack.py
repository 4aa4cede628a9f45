"""A batch in MessagePack is answered, charged and audited as the same batch in JSON."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api import Verb
from minikms.api.errors import LimitExceededError
from minikms_daemon.server import strictmsgpack
from tests.harness.limited import limited
from tests.harness.live_daemon import LiveDaemon
from tests.harness.unix_http import UnixConnection
from tests.minikms_daemon.service.asking import NO_KEY, b64, encrypted, new_key, post
from tests.minikms_daemon.service.limiting import grant

MANY = api.BATCH_ITEMS_MAX + 1


def exchanged(daemon: LiveDaemon, target: str, body: bytes, content_type: str) -> tuple[int, str, bytes]:
    """Status, content type and body of the answer."""
    connection = UnixConnection(daemon.socket)
    try:
        connection.request("POST", target, body, {"Content-Type": content_type})
        response = connection.getresponse()
        return response.status, response.headers["content-type"], response.read()
    finally:
        connection.close()


def in_both(daemon: LiveDaemon, target: str, in_json: Any, array: Any) -> tuple[int, Any, Any]:
    """The status, which is that of both, and the two answers, decoded."""
    first = exchanged(daemon, target, json.dumps(in_json).encode(), "application/json")
    second = exchanged(daemon, target, msgspec.msgpack.encode(array), "Application/MsgPack")
    assert first[0] == second[0]
    assert first[1] == "application/json"
    if first[0] != 200:
        assert second[1] == "application/json"
        return first[0], json.loads(first[2]), json.loads(second[2])
    assert second[1] == api.MSGPACK
    return 200, json.loads(first[2]), msgspec.msgpack.decode(second[2])


def as_array(outcomes: list[dict[str, str]], member: str) -> list[Any]:
    return [base64.b64decode(one[member]) if member in one else [one["error"], one["code"]] for one in outcomes]


def assert_audited_alike(daemon: LiveDaemon, verb: Verb[Any, Any]) -> None:
    """The last two requests of the verb."""
    first, second = ({**event, "seq": 0, "ts": 0} for event in daemon.events(verb.name)[-2:])
    assert first == second


def test_items_are_answered_and_audited_alike(daemon: LiveDaemon) -> None:
    key, other, retired = new_key(daemon), new_key(daemon, "u"), new_key(daemon)
    assert post(daemon, f"/keys/{retired}/retire", {}).status == 200
    status, in_json, array = in_both(
        daemon,
        "/encrypt_batch",
        {
            "items": [
                {"key_id": key, "plaintext": b64(b"one"), "request_id": "r-1"},
                {"key_id": key, "plaintext": b64(b"two"), "aad": b64(b"a"), "thread_id": "t", "request_id": "r-2"},
                {"key_id": other, "plaintext": "", "thread_id": "t"},
                {"key_id": key, "plaintext": "", "thread_id": ""},
                {"key_id": retired, "plaintext": ""},
                {"key_id": NO_KEY, "plaintext": ""},
                {"key_id": "other", "plaintext": ""},
                {"key_id": key, "plaintext": "", "aad": b64(bytes(api.AAD_BYTES_MAX + 1))},
                {"key_id": key, "plaintext": b64(bytes(api.PLAINTEXT_BYTES_MAX + 1))},
            ]
        },
        [
            [
                [key, b"one", None, None, "r-1"],
                [key, b"two", b"a", "t", "r-2"],
                [other, b"", b"", "t"],
                [key, b"", b"", ""],
                [retired, b""],
                [NO_KEY, b""],
                ["other", b""],
                [key, b"", bytes(api.AAD_BYTES_MAX + 1)],
                [key, bytes(api.PLAINTEXT_BYTES_MAX + 1)],
            ]
        ],
    )
    assert status == 200
    first, second = as_array(in_json["items"], "ciphertext"), array[0]
    assert first[2:] == second[2:]
    assert [code for _, code in second[2:]] == [
        "wrong_thread", "wrong_thread", "key_retired", "key_not_found", "invalid_request", "too_large", "too_large",
    ]  # fmt: skip
    assert [len(one) for one in first[:2]] == [len(one) for one in second[:2]] == [43, 43]
    assert_audited_alike(daemon, api.ENCRYPT_BATCH)

    status, in_json, array = in_both(
        daemon,
        "/decrypt_batch",
        {
            "items": [
                {"key_id": key, "ciphertext": b64(second[0])},
                {"key_id": key, "ciphertext": b64(second[1]), "aad": b64(b"a")},
                {"key_id": key, "ciphertext": b64(second[1])},
                {"key_id": key, "ciphertext": b64(bytes(27))},
            ]
        },
        [[[key, second[0]], [key, second[1], b"a"], [key, second[1]], [key, bytes(27)]]],
    )
    assert as_array(in_json["items"], "plaintext") == array[0]
    assert array[0][:2] == [b"one", b"two"]
    assert [code for _, code in array[0][2:]] == ["decryption_failed"] * 2
    assert_audited_alike(daemon, api.DECRYPT_BATCH)


def test_records_are_moved_and_checked_alike(daemon: LiveDaemon) -> None:
    old, new = new_key(daemon), new_key(daemon)
    sealed = base64.b64decode(encrypted(daemon, old, b"text", aad=b64(b"a")))
    items = {"items": [{"ciphertext": b64(sealed), "aad": b64(b"a")}, {"ciphertext": b64(sealed)}]}
    arrays = [[sealed, b"a"], [sealed]]
    _, in_json, array = in_both(
        daemon, "/reencrypt_batch", {"from_key_id": old, "to_key_id": new, **items}, [old, new, arrays]
    )
    first, second = as_array(in_json["items"], "ciphertext"), array[0]
    assert first[1] == second[1] and second[1][1] == "decryption_failed"
    assert_audited_alike(daemon, api.REENCRYPT_BATCH)

    both = [{"ciphertext": b64(first[0]), "aad": b64(b"a")}, {"ciphertext": b64(second[0]), "aad": b64(b"a")}]
    _, in_json, array = in_both(
        daemon,
        "/check_batch",
        {"key_id": new, "items": [*both, {"ciphertext": ""}], "thread_id": "t"},
        [new, [[first[0], b"a"], [second[0], b"a"], [b""]], "t"],
    )
    assert array == [in_json["opened"], [[one["item"], one["error"], one["code"]] for one in in_json["refused"]]]
    assert array[0] == 2
    assert_audited_alike(daemon, api.CHECK_BATCH)


def test_a_whole_batch_is_refused_and_audited_alike(daemon: LiveDaemon) -> None:
    key, other = new_key(daemon), new_key(daemon, "u")
    cases: list[tuple[int, str, Any, Any]] = [
        (413, "/encrypt_batch", {"items": [{"key_id": key, "plaintext": ""}] * MANY}, [[[key, b""]] * MANY]),
        (413, "/decrypt_batch", {"items": [{"key_id": key, "ciphertext": ""}] * MANY}, [[[key, b""]] * MANY]),
        (
            413,
            "/check_batch",
            {"key_id": key, "items": [{"ciphertext": ""}] * MANY, "thread_id": "t"},
            [key, [[b""]] * MANY, "t"],
        ),
        (413, "/check_batch", {"key_id": key, "items": [{"ciphertext": ""}] * MANY}, [key, [[b""]] * MANY]),
        (
            413,
            "/reencrypt_batch",
            {"from_key_id": key, "to_key_id": key, "items": [{"ciphertext": ""}] * MANY},
            [key, key, [[b""]] * MANY],
        ),
        (403, "/reencrypt_batch", {"from_key_id": key, "to_key_id": other, "items": []}, [key, other, []]),
        (403, "/check_batch", {"key_id": key, "items": [], "thread_id": "u"}, [key, [], "u"]),
        (404, "/check_batch", {"key_id": NO_KEY, "items": []}, [NO_KEY, []]),
        (400, "/check_batch", {"key_id": "", "items": []}, ["", []]),
        (400, "/encrypt_batch", {"items": 1}, [1]),
        (400, "/encrypt_batch", {"item": []}, [[], []]),
        (400, "/encrypt_batch", {"items": [{"key_id": key}]}, [[[key]]]),
        (400, "/encrypt_batch", {"items": [{"key_id": key, "plaintext": 1}]}, [[[key, "dGV4dA=="]]]),
    ]
    for expected, target, in_json, array in cases:
        status, first, second = in_both(daemon, target, in_json, array)
        assert status == expected, (target, first)
        assert first["code"] == second["code"]
        if status != 400 or target == "/check_batch":
            assert first == second
        [verb] = [verb for verb in api.VERBS if verb.path == target]
        assert_audited_alike(daemon, verb)


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/msgpack; x=1", "msgpack"])
def test_a_body_of_any_other_content_type_is_read_as_json(daemon: LiveDaemon, content_type: str) -> None:
    status, answered_type, body = exchanged(daemon, "/encrypt_batch", b'{"items":[]}', content_type)
    assert (status, answered_type, body) == (200, "application/json", b'{"items":[]}')
    status, _, body = exchanged(daemon, "/encrypt_batch", b"\x91\x90", content_type)
    assert (status, json.loads(body)["code"]) == (400, "invalid_request")


def test_a_verb_without_a_batch_takes_json_only(daemon: LiveDaemon) -> None:
    body = msgspec.msgpack.encode([new_key(daemon), b"text"])
    assert exchanged(daemon, "/encrypt", body, api.MSGPACK)[0] == 400


def test_hostile_bodies_leave_the_daemon_whole(daemon: LiveDaemon) -> None:
    """Each gets a 4xx, and the next batch on the same daemon is answered."""
    key = new_key(daemon)
    bodies = (
        b"", b"\x91", b"\xc1", b"\x91\xdd\xff\xff\xff\xff", b"\x91\x91\x92\xdb\xff\xff\xff\xff", b"\x91" * 1_000_000,
        b"\x91\x91\x92\xa1k\xc6\xff\xff\xff\xff", b"\x91\xdd\x00\xf0\x00\x00" + b"\xc0" * 0xF00000,
        b"\x91\x91\xdf\xff\xff\xff\xff", b"\x91\xdc\xff\xff" + b"\x81" * 100_000, b"\x91\x90\x00",
    )  # fmt: skip
    for body in bodies:
        status, content_type, answer = exchanged(daemon, "/encrypt_batch", body, api.MSGPACK)
        assert status in (400, 413), body[:20]
        assert content_type == "application/json"
        assert json.loads(answer)["code"] in ("invalid_request", "too_many")
        good = exchanged(daemon, "/encrypt_batch", msgspec.msgpack.encode([[[key, b"x"]]]), api.MSGPACK)
        assert good[0] == 200 and len(msgspec.msgpack.decode(good[2])[0][0]) == 41


def test_a_policy_charges_both_alike(tmp_path: Path) -> None:
    """Item by item: of nine decryptions two batches of four are made, of nine re-encryptions likewise."""
    limits = "limits = { decrypts_per_hour = 9, reencrypts_per_hour = 9 }"
    sealed = bytes(40)

    def request_of(verb: Verb[Any, Any], key: str, *, msgpack: bool) -> Any:
        if msgpack:
            array = [[[key, sealed]] * 4] if verb is api.DECRYPT_BATCH else [key, [[sealed]] * 4]
            return strictmsgpack.Decoder(verb.request).decode(msgspec.msgpack.encode(array))
        if verb is api.DECRYPT_BATCH:
            return api.DecryptBatchRequest([api.DecryptItemRequest(key, b64(sealed))] * 4)
        return api.CheckBatchRequest(key, [api.ReencryptItemRequest(b64(sealed))] * 4)

    async def made_until_refused(directory: Path, verb: Verb[Any, Any], *, msgpack: bool) -> tuple[int, list[Any]]:
        async with limited(directory, grant(1, '["*"]', more=limits)) as made:
            who = made.who(1)
            key = (await made.ask(who, api.CREATE_DEK, api.CreateDekRequest("mine")))["key_id"]
            made.audit.events.clear()
            request = request_of(verb, key, msgpack=msgpack)
            done = 0
            with pytest.raises(LimitExceededError):
                while True:
                    answer = made.begin(who, verb, request)
                    if not isinstance(answer, bytes):
                        await answer
                    done += 1
            events = [(event.count, event.outcome, len(event.key_ids)) for event in made.audit.events]
            return done, events

    for verb in (api.DECRYPT_BATCH, api.CHECK_BATCH):
        first = asyncio.run(made_until_refused(tmp_path / f"{verb.name}-json", verb, msgpack=False))
        second = asyncio.run(made_until_refused(tmp_path / f"{verb.name}-msgpack", verb, msgpack=True))
        assert first == second
        assert first[0] == 2


async def test_a_caller_without_the_role_gets_forbidden_for_each_item(tmp_path: Path) -> None:
    async with limited(tmp_path / "d", grant(1, '["*"]', '["monitor"]')) as made:
        decode = strictmsgpack.Decoder(api.ENCRYPT_BATCH.request).decode
        request = decode(msgspec.msgpack.encode([[[NO_KEY, b"x", None, None, "r" * 128]] * 3]))
        answer = made.begin(made.who(1), api.ENCRYPT_BATCH, request)
        assert isinstance(answer, bytes)
        assert [code for _, code in msgspec.msgpack.decode(answer)[0]] == ["forbidden"] * 3
        [event] = made.audit.events
        assert (event.count, event.key_ids, event.request_ids) == (3, [], [])
