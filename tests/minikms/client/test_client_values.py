"""Items, their bounds, and the cutting of many into requests that the daemon takes."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms import api
from minikms.api import errors
from minikms.client import DecryptItem, EncryptItem, ReencryptItem, calls
from minikms.client.calls import make_call
from minikms.client.items import BATCH_BYTES_MAX, Batch, CheckBatch, checked_cost_bytes, chunks
from minikms.client.wire import Answer

KEY = "k_" + "0" * 26


@given(
    key_id=st.text(max_size=128),
    plaintext=st.binary(max_size=300),
    aad=st.binary(max_size=50),
    thread_id=st.none() | st.text(max_size=128),
    request_id=st.none() | st.text(max_size=128),
)
def test_an_item_that_passes_the_check_can_be_encoded_within_its_cost(
    key_id: str, plaintext: bytes, aad: bytes, thread_id: str | None, request_id: str | None
) -> None:
    item = EncryptItem(key_id=key_id, plaintext=plaintext, aad=aad, thread_id=thread_id, request_id=request_id)
    try:
        cost = checked_cost_bytes(item)
    except errors.InvalidRequestError:
        return
    assert len(msgspec.json.encode(item)) <= cost


def test_the_daemon_reads_an_item_as_it_was_given() -> None:
    """Absent fields are absent."""
    asked = EncryptItem(key_id=KEY, plaintext=b"\xff\xfe", aad=b"a", thread_id="t")
    body = make_call(api.ENCRYPT_BATCH, Batch([asked])).body
    assert body is not None
    [item] = msgspec.json.decode(body, type=api.EncryptBatchRequest).items
    assert item == api.EncryptItemRequest(key_id=KEY, plaintext="//4=", aad="YQ==", thread_id="t")
    assert msgspec.json.encode(EncryptItem(key_id="k", plaintext=b"")) == b'{"key_id":"k","plaintext":""}'


def test_an_empty_thread_id_is_sent_not_dropped() -> None:
    assert b'"thread_id":""' in msgspec.json.encode(EncryptItem(key_id="k", plaintext=b"", thread_id=""))


def test_base64_of_a_request_may_be_longer_than_an_id() -> None:
    ids = {"keyring_id": "k", "member_id": "m2", "name": "b", "slot_id": "s2", "fingerprint": "f", "provider": "file"}
    long = {"commitment": "A" * 44, "public_key": "A" * 1624, "sealed_auth": "A" * 1600}
    make_call(api.ADD_REPLICA, api.AddReplicaRequest(**ids, **long))
    with pytest.raises(errors.InvalidRequestError, match="name has at most 128"):
        make_call(api.ADD_REPLICA, api.AddReplicaRequest(**ids | {"name": "b" * 129}, **long))


@pytest.mark.parametrize(
    "item",
    [
        EncryptItem(key_id="k" * 129, plaintext=b""),
        EncryptItem(key_id="k\ud800", plaintext=b""),
        EncryptItem(key_id=KEY, plaintext=b"", thread_id="é"),
        EncryptItem(key_id=KEY, plaintext=b"", request_id="r" * 129),
        EncryptItem(key_id=KEY, plaintext=b"x" * (api.PLAINTEXT_BYTES_MAX + 1)),
        EncryptItem(key_id=KEY, plaintext=b"", aad=b"x" * (api.AAD_BYTES_MAX + 1)),
        DecryptItem(key_id=KEY, ciphertext=b"x" * (api.PLAINTEXT_BYTES_MAX + 41)),
    ],
)
def test_an_item_that_could_spoil_a_batch_is_refused_before_it_is_sent(item: EncryptItem | DecryptItem) -> None:
    with pytest.raises(errors.KmsRefusedError) as refused:
        checked_cost_bytes(item)
    assert refused.value.status in (400, 413)


def test_texts_and_bytes_are_not_taken_for_each_other() -> None:
    with pytest.raises(TypeError):
        checked_cost_bytes(EncryptItem(key_id=KEY, plaintext="text"))  # type: ignore[arg-type]  # what is tested
    with pytest.raises(TypeError):
        checked_cost_bytes(EncryptItem(key_id=b"k", plaintext=b""))  # type: ignore[arg-type]  # what is tested


@given(st.lists(st.sampled_from([0, 1, 1000, api.PLAINTEXT_BYTES_MAX // 3, api.PLAINTEXT_BYTES_MAX]), max_size=30))
def test_chunks_keep_order_and_lose_nothing_and_fit_a_body(sizes: list[int]) -> None:
    payloads = {size: bytes(size) for size in sizes}
    items = [ReencryptItem(ciphertext=payloads[size], aad=b"%d" % index) for index, size in enumerate(sizes)]
    cut = list(chunks(items))
    assert [item.aad for chunk in cut for item in chunk] == [item.aad for item in items]
    assert all(chunk and sum(map(checked_cost_bytes, chunk)) <= BATCH_BYTES_MAX for chunk in cut)


def test_a_chunk_has_at_most_as_many_items_as_a_batch() -> None:
    cut = list(chunks([ReencryptItem(ciphertext=b"")] * (2 * api.BATCH_ITEMS_MAX + 1)))
    assert [len(chunk) for chunk in cut] == [api.BATCH_ITEMS_MAX, api.BATCH_ITEMS_MAX, 1]


def test_a_bad_item_is_refused_before_the_first_chunk() -> None:
    items = [ReencryptItem(ciphertext=b"")] * api.BATCH_ITEMS_MAX * 2
    with pytest.raises(errors.TooLargeError, match=r"^a value has at most"):
        next(chunks([*items, ReencryptItem(ciphertext=b"", aad=bytes(5000))]))


@pytest.mark.parametrize("at", [0, 1, 2, 500])
@pytest.mark.parametrize("name", ["key_id", "thread_id", "request_id"])
def test_ids_of_a_batch_are_checked_wherever_they_differ(name: str, at: int) -> None:
    good = DecryptItem(key_id=KEY, ciphertext=b"", thread_id="t", request_id="r")
    for bad, error in (("é", errors.InvalidRequestError), (1, TypeError), (True, TypeError), (["t"], TypeError)):
        items = [good] * 501
        items[at] = msgspec.structs.replace(good, **{name: bad})
        with pytest.raises(error):
            next(chunks(items))


def test_the_first_of_several_bad_ids_is_named() -> None:
    keys: list[Any] = [KEY, "é", *range(20)]
    with pytest.raises(errors.InvalidRequestError):
        next(chunks([DecryptItem(key_id=key_id, ciphertext=b"") for key_id in keys]))


def test_no_repr_shows_a_content() -> None:
    for value in (
        EncryptItem(key_id=KEY, plaintext=b"PLANTED"),
        DecryptItem(key_id=KEY, ciphertext=b"PLANTED"),
        ReencryptItem(ciphertext=b"PLANTED"),
        api.DataKeyAnswer(key_id=KEY, ciphertext=b"x", plaintext=b"PLANTED"),
    ):
        assert "PLANTED" not in repr(value)


# --- answers ---


def read_items(body: bytes, count: int) -> list[bytes | errors.KmsRefusedError]:
    call = make_call(api.ENCRYPT_BATCH, Batch([EncryptItem(key_id=KEY, plaintext=b"")] * count))
    return calls.outcomes(call.read(Answer(200, body, True)), count)


def test_an_item_is_a_value_or_the_error_of_its_code() -> None:
    body = b'{"items":[{"ciphertext":"eA=="},{"error":"no","code":"key_retired"},{"error":"hm","code":"new_one"}]}'
    first, second, third = read_items(body, 3)
    assert first == b"x"
    assert isinstance(second, errors.KeyRetiredError)
    assert (second.status, second.code, second.message) == (409, "key_retired", "no")
    assert type(third) is errors.KmsRefusedError
    assert third.code == "new_one"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"items":[]}',
        b'{"items":[{}]}',
        b'{"items":[{"ciphertext":"eA==","code":"x","error":"y"}]}',
        b'{"items":[{"ciphertext":"eA=="},{"ciphertext":"eA=="}]}',
        b'{"items":[{"error":"y"}]}',
        b'{"items":[{"ciphertext":5}]}',
        b'{"items":[{"ciphertext":"\xff"}]}',
        b'{"items":' + b"[" * 5000,
    ],
)
def test_an_answer_of_another_shape_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(errors.KmsProtocolError):
        read_items(body, 1)


def read_check(body: bytes, count: int) -> list[errors.KmsRefusedError | None]:
    call = make_call(api.CHECK_BATCH, CheckBatch(KEY, [ReencryptItem(ciphertext=b"")] * count))
    return calls.check_outcomes(call.read(Answer(200, body, True)), count)


def test_the_daemon_reads_a_check_as_it_was_asked() -> None:
    """An absent thread is absent."""
    items = [ReencryptItem(ciphertext=b"\xff\xfe", aad=b"a"), ReencryptItem(ciphertext=b"")]
    asked = [api.ReencryptItemRequest("//4=", "YQ=="), api.ReencryptItemRequest("")]
    for thread_id in ("t", ""):
        body = make_call(api.CHECK_BATCH, CheckBatch(KEY, items, thread_id)).body
        assert body is not None
        assert msgspec.json.decode(body, type=api.CheckBatchRequest) == api.CheckBatchRequest(KEY, asked, thread_id)
    body = make_call(api.CHECK_BATCH, CheckBatch(KEY, items)).body
    assert body is not None and b"thread_id" not in body


def test_a_check_returns_none_or_the_error_of_each_item() -> None:
    """None for an item that opened, and the error of its code for one that did not."""
    body = b'{"opened":1,"refused":[{"item":1,"error":"no","code":"decryption_failed"},'
    body += b'{"item":2,"error":"hm","code":"new_one"}]}'
    first, second, third = read_check(body, 3)
    assert first is None
    assert isinstance(second, errors.DecryptionError)
    assert (second.status, second.code, second.message) == (400, "decryption_failed", "no")
    assert type(third) is errors.KmsRefusedError


@given(
    count=st.integers(0, 6),
    opened=st.integers(-1, 7),
    indices=st.lists(st.integers(-2, 7) | st.sampled_from([2**63, -(2**63), 2**70]), max_size=7),
)
def test_a_check_is_read_only_if_every_item_occurs_once_and_in_order(
    count: int, opened: int, indices: list[int]
) -> None:
    refused = [{"item": index, "error": "no", "code": "decryption_failed"} for index in indices]
    body = msgspec.json.encode({"opened": opened, "refused": refused})
    sound = indices == sorted(set(indices) & set(range(count))) and opened + len(indices) == count
    if sound:
        found = read_check(body, count)
        assert [index for index, outcome in enumerate(found) if outcome is not None] == indices
        assert len(found) == count
    else:
        with pytest.raises(errors.KmsProtocolError):
            read_check(body, count)


@given(count=st.integers(0, 8), picked=st.sets(st.integers(0, 7)))
def test_every_check_that_a_daemon_may_answer_is_read(count: int, picked: set[int]) -> None:
    indices = sorted(index for index in picked if index < count)
    refused = [api.RefusedItemAnswer(index, "no", "too_large") for index in indices]
    body = msgspec.json.encode(api.CheckBatchAnswer(count - len(indices), refused))
    found = read_check(body, count)
    assert [isinstance(outcome, errors.TooLargeError) for outcome in found] == [n in indices for n in range(count)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"opened":1}',
        b'{"refused":[]}',
        b'{"opened":"1","refused":[]}',
        b'{"opened":true,"refused":[]}',
        b'{"opened":1.5,"refused":[]}',
        b'{"opened":null,"refused":[]}',
        b'{"opened":1,"refused":null}',
        b'{"opened":0,"refused":[{}]}',
        b'{"opened":0,"refused":[{"item":0,"code":"x"}]}',
        b'{"opened":0,"refused":[{"item":0,"error":"y"}]}',
        b'{"opened":0,"refused":[{"item":"0","error":"y","code":"x"}]}',
        b'{"opened":0,"refused":[{"item":0,"error":"y","code":null}]}',
        b'{"items":[{"plaintext":"eA=="}]}',
        b'{"opened":1,"refused":' + b"[" * 5000,
    ],
)
def test_an_answer_that_is_no_check_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(errors.KmsProtocolError):
        read_check(body, 1)


def test_what_a_daemon_says_is_cut_short_and_cleaned() -> None:
    error = errors.refusal("Not a code\n", "line\n\x1b[31m" + "x" * 10000, 400)
    assert error.code == "internal"
    assert len(error.message) <= errors.MESSAGE_CHARS_MAX
    assert error.message.isprintable()


def test_a_new_root_key_is_joined_only_as_64_hex_characters() -> None:
    digits = b"aB" * 32
    assert calls.rotation(bytearray(digits), True, ()) == b'{"wait":true,"new_kek_hex":"%b"}' % digits
    assert calls.rotation(None, False, ()) == b'{"wait":false}'
    assert calls.rotation(None, True, (), "low") == b'{"wait":true,"priority":"low"}'
    for bad in ("", "ab" * 31, "zz" * 32, "ab" * 32 + "\n", '"' + "a" * 63, "é" * 64):
        with pytest.raises(errors.InvalidRequestError):
            calls.rotation(bad, True, ())


def test_an_unseal_and_a_new_root_say_what_they_were_given() -> None:
    key = "ab" * 32
    added = msgspec.json.decode(calls.new_root(key, "shares", api.GivenShares("s", 2, ["d"])))
    shares = {"set_id": "s", "threshold": 2, "digests": ["d"]}
    assert added == {"provider": "shares", "shares": shares, "root_hex": key}
    assert calls.unsealing(key, None) == b'{"root_hex":"%b"}' % key.encode()
    assert calls.unsealing(None, "mks1-00") == b'{"share":"mks1-00"}'
    assert calls.unsealing(None, None) == b'{"from_source":true}'
    with pytest.raises(errors.InvalidRequestError, match="not both"):
        calls.unsealing(key, "mks1-00")


def test_a_request_id_that_could_break_the_head_is_refused() -> None:
    for bad in ("", "a b", "a\r\nX: y", "é", "x" * 129):
        with pytest.raises(errors.InvalidRequestError):
            make_call(api.STATUS, api.Request(), bad)


def test_a_key_id_never_leaves_its_place_in_a_path() -> None:
    assert make_call(api.GET_KEY, api.KeyRequest("../x?y#z")).target == b"/keys/..%2Fx%3Fy%23z"
    assert (
        make_call(api.TEST_ROOT, calls.root_test("ab" * 32), named="../x?y#z").target == b"/roots/..%2Fx%3Fy%23z/test"
    )
    assert make_call(api.GET_WRAPPED, api.KeyRequest("a&b=c")).target == b"/get_wrapped?key_id=a%26b%3Dc"


def test_verbs_that_make_or_change_something_are_never_repeated_blindly() -> None:
    once = {verb.name for verb in api.VERBS if not verb.repeatable}
    assert once == {
        "create_dek", "generate_data_key", "rotate_kek", "destroy_key", "prune_kek", "add_root", "remove_root",
        "unseal", "add_replica", "remove_replica",
    }  # fmt: skip


SECRET = b"sixteen secret b"


def test_nothing_that_carries_a_secret_shows_it() -> None:
    hexadecimal, base64_text = "ab" * 32, "c2l4dGVlbiBzZWNyZXQgYg=="
    item = api.EncryptItemRequest(key_id=KEY, plaintext=base64_text)
    sample = DecryptItem(key_id=KEY, ciphertext=SECRET)
    shown = repr(
        [
            EncryptItem(key_id=KEY, plaintext=SECRET),
            item,
            api.EncryptBatchRequest([item]),
            api.DecryptAnswer(SECRET),
            api.DecryptBatchAnswer([api.DecryptBatchItemAnswer(plaintext=SECRET)]),
            api.DataKeyAnswer(KEY, b"", SECRET),
            api.RandomAnswer(SECRET),
            api.RotateKekRequest(new_kek_hex=hexadecimal),
            api.AddRootRequest("file", hexadecimal),
            api.RootTestRequest(hexadecimal),
            make_call(api.ADD_ROOT, calls.new_root(hexadecimal, "file", None)),
            make_call(api.TEST_ROOT, calls.root_test(hexadecimal), named="s1"),
            make_call(api.ENCRYPT, EncryptItem(key_id=KEY, plaintext=SECRET)),
            make_call(api.ROTATE_KEK, calls.rotation(hexadecimal, True, [sample])),
            Answer(200, b'{"plaintext":"%b"}' % base64_text.encode(), True),
        ]
    )
    for secret in (SECRET.decode(), base64_text, hexadecimal):
        assert secret not in shown


@pytest.mark.parametrize(
    ("slot", "request_id"), [("s1", "not a request id"), ("s1", 1), ("s\udcff", None), ("s" * 129, None), (None, None)]
)
def test_a_key_in_a_request_that_is_refused_before_it_is_sent_is_wiped(slot: Any, request_id: Any) -> None:
    """A slot in a path may be an argument of a command, which need not be Unicode."""
    body = calls.root_test("ab" * 32)
    with pytest.raises((errors.InvalidRequestError, TypeError)):
        make_call(api.TEST_ROOT, body, request_id, slot)
    assert body == bytes(len(body))


def test_the_key_comes_last_in_a_body_of_its_final_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that grows is moved, and what lay there before is not wiped."""
    sizes: list[int] = []

    class Watched(bytearray):
        def __setitem__(self, place: object, value: object) -> None:
            super().__setitem__(place, value)  # type: ignore[call-overload]  # handed through
            sizes.append(len(self))

    monkeypatch.setattr(calls, "bytearray", Watched, raising=False)
    sample = DecryptItem(key_id=KEY, ciphertext=SECRET)
    body = calls.rotation("ab" * 32, False, [sample])
    assert set(sizes) == {len(body)}
    assert body.endswith(b'"new_kek_hex":"' + b"ab" * 32 + b'"}')
