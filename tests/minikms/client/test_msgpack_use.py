"""Batches are sent in MessagePack, single calls in JSON."""

import asyncio
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api import errors
from minikms.client import AsyncClient, DecryptItem, EncryptItem, ReencryptItem, calls
from minikms.client.calls import make_call
from minikms.client.items import Batch, CheckBatch, ReencryptBatch, Sent
from minikms.client.wire import Answer
from minikms_daemon.server import strictmsgpack
from tests.minikms.client.hostile import answer, array_answer, hostile
from tests.minikms.client.using import KEY, WAIT_S, Use

IN_JSON = answer(b'{"items":[{"ciphertext":"eA=="}]}')
BATCH_CALL: tuple[str, dict[str, Any]] = ("encrypt_batch", {"items": [EncryptItem(key_id=KEY, plaintext=b"p")]})


def kinds(requests: list[bytes]) -> list[bytes]:
    """The content type of each request."""
    return [request.partition(b"Content-Type: ")[2].partition(b"\r\n")[0] for request in requests]


MSGPACK, JSON = b"application/msgpack", b"application/json"


@pytest.mark.parametrize(
    "refused",
    [
        answer(b'{"error":"e","code":"invalid_request"}', 400),
        answer(b'{"error":"e","code":"too_many"}', 413),
        answer(b'{"error":"e","code":"forbidden"}', 403),
        answer(b'{"error":"e","code":"key_not_found"}', 404),
        answer(b'{"error":"e","code":"interrupted_by_something_new"}', 503),
        IN_JSON,
    ],
)
def test_after_a_refusal_nothing_is_sent_again(use: Use, refused: bytes) -> None:
    """Also after an answer in JSON that says it was carried out: then it was, and must not be a second time."""
    with hostile([refused]) as server:
        [result] = use(server.path, BATCH_CALL, wait_s=WAIT_S)
        assert isinstance(result, errors.KmsRefusedError | errors.KmsProtocolError)
        assert kinds(server.requests) == [MSGPACK]


def test_calls_of_one_item_are_json() -> None:
    single = answer(b'{"ciphertext":"eA=="}')
    with hostile([single, array_answer([[b"a", b"b"]])]) as server:

        async def main() -> None:
            async with AsyncClient(server.path) as kms:
                assert await kms.encrypt(KEY, b"1") == b"x"
                both = await asyncio.gather(kms.encrypt(KEY, b"1"), kms.encrypt(KEY, b"2"))
                assert [*both] == [b"a", b"b"]

        asyncio.run(main())
    assert kinds(server.requests) == [JSON, MSGPACK]


@pytest.mark.parametrize(
    ("verb", "batch", "array"),
    [
        (
            api.ENCRYPT_BATCH,
            Batch([EncryptItem(key_id=KEY, plaintext=b"\xff", thread_id=""), EncryptItem(key_id=KEY, plaintext=b"")]),
            [[[KEY, b"\xff", b"", "", None], [KEY, b"", b"", None, None]]],
        ),
        (
            api.DECRYPT_BATCH,
            Batch([DecryptItem(key_id=KEY, ciphertext=b"c", aad=b"a", request_id="r")]),
            [[[KEY, b"c", b"a", None, "r"]]],
        ),
        (api.REENCRYPT_BATCH, ReencryptBatch(KEY, "k", [ReencryptItem(ciphertext=b"c")]), [KEY, "k", [[b"c", b""]]]),
        (api.CHECK_BATCH, CheckBatch(KEY, [ReencryptItem(ciphertext=b"c")], "t"), [KEY, [[b"c", b""]], "t"]),
        (api.CHECK_BATCH, CheckBatch(KEY, []), [KEY, [], None]),
    ],
)
def test_the_daemon_reads_a_batch_as_it_was_given(verb: Any, batch: Sent, array: Any) -> None:
    body = make_call(verb, batch, msgpack=True).body
    assert body is not None
    assert msgspec.msgpack.decode(body) == array
    request = strictmsgpack.Decoder(verb.request).decode(bytes(body))
    for name in batch.__struct_fields__:
        if name != "items":
            assert getattr(request, name) == getattr(batch, name)
    for got, given in zip(request.items, batch.items, strict=True):  # type: ignore[attr-defined]  # of every batch
        assert all(getattr(got, name) == getattr(given, name) for name in given.__struct_fields__)


ENCRYPTED: Any = EncryptItem(key_id=KEY, plaintext=b"p")
DECRYPTED: Any = DecryptItem(key_id=KEY, ciphertext=b"c")
CHECKED: Any = ReencryptItem(ciphertext=b"c")


@pytest.mark.parametrize(
    ("verb", "batch"),
    [
        (api.ENCRYPT_BATCH, Batch([DECRYPTED])),
        (api.ENCRYPT_BATCH, Batch([ENCRYPTED, DECRYPTED])),
        (api.DECRYPT_BATCH, Batch([ENCRYPTED])),
        (api.DECRYPT_BATCH, Batch([CHECKED])),
        (api.REENCRYPT_BATCH, ReencryptBatch(KEY, KEY, [DECRYPTED])),
        (api.CHECK_BATCH, CheckBatch(KEY, [CHECKED, DECRYPTED])),
    ],
)
def test_an_item_of_another_verb_is_refused_before_it_is_sent(verb: Any, batch: Sent) -> None:
    """An array does not name its members, so that the daemon would take a ciphertext for a plaintext."""
    with pytest.raises(errors.InvalidRequestError, match="an item of"):
        make_call(verb, batch, msgpack=True)


def test_an_answer_of_more_items_than_a_batch_holds_is_not_decoded() -> None:
    """In 32 MiB there is room for eleven million refusals."""
    many = api.BATCH_ITEMS_MAX + 1
    cases: list[tuple[Any, Sent, Any]] = [
        (api.ENCRYPT_BATCH, Batch([]), [[["", ""]] * many]),
        (api.CHECK_BATCH, CheckBatch(KEY, []), [0, [[0, "", ""]] * many]),
    ]
    for verb, batch, wire in cases:
        call = make_call(verb, batch, msgpack=True)
        with pytest.raises(errors.KmsProtocolError, match="expected form"):
            call.read(Answer(200, msgspec.msgpack.encode(wire), True))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\x91", b"\x90", b"\x91\xc0", b"\x91\xdd\xff\xff\xff\xff", b"\x91\x91\xa1x", b"\x91\x91\x91\xa1e",
        b"\x91\x91\x92\xa1e\x01", b"\x91\x91\xc4\x05x", b"\x91\x91\xc4\x01xx", b"\x91\x91\x92\xa1\xff\xa1c", b"{}",
        b"\x91" * 100_000, b"\x91\x92\xc4\x01x\xc4\x01x", b"\x91\x90", b"\x91\x91\xc0",
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_a_protocol_error(body: bytes) -> None:
    call = make_call(api.ENCRYPT_BATCH, Batch([EncryptItem(key_id=KEY, plaintext=b"")]), msgpack=True)
    with pytest.raises(errors.KmsProtocolError):
        calls.outcomes(call.read(Answer(200, body, True)), 1)


def test_an_answer_may_have_further_members() -> None:
    """Of a newer daemon, as with JSON."""
    call = make_call(api.CHECK_BATCH, CheckBatch(KEY, []), msgpack=True)
    wire = msgspec.msgpack.encode([1, [[1, "e", "decryption_failed", "more"]], "more"])
    [fine, refused] = calls.check_outcomes(call.read(Answer(200, wire, True)), 2)
    assert fine is None and isinstance(refused, errors.DecryptionError)
    many = make_call(api.ENCRYPT_BATCH, Batch([]), msgpack=True)
    wire = msgspec.msgpack.encode([[b"x", ["e\n", "key_retired", 1]], 5])
    [value, retired] = calls.outcomes(many.read(Answer(200, wire, True)), 2)
    assert value == b"x" and isinstance(retired, errors.KeyRetiredError) and str(retired) == "e?"


def test_neither_a_call_nor_an_answer_shows_what_it_carries() -> None:
    call = make_call(api.ENCRYPT_BATCH, Batch([EncryptItem(key_id=KEY, plaintext=b"SECRET")]), msgpack=True)
    assert "SECRET" not in repr(call)
    assert "SECRET" not in repr(call.read(Answer(200, msgspec.msgpack.encode([[b"SECRET"]]), True)))


def test_an_array_answer_on_the_wire_is_read(use: Use) -> None:
    with hostile([array_answer([[b"x"]])]) as server:
        assert use(server.path, BATCH_CALL) == [[b"x"]]
    assert kinds(server.requests) == [MSGPACK]
