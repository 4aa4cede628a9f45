"""A batch in MessagePack has one reading, which is that of the same batch in JSON; anything else is a 400."""

import base64
import json
import tracemalloc
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from minikms import api
from minikms.api import Verb
from minikms.api.errors import InvalidRequestError
from minikms_daemon.server import strictjson, strictmsgpack
from minikms_daemon.service.encoding import encoding_of

BATCHES: dict[str, Verb[Any, Any]] = {verb.name: verb for verb in api.VERBS if verb.is_batch}
DECODE: dict[str, Callable[[bytes], Any]] = {
    name: strictmsgpack.Decoder(verb.request).decode for name, verb in BATCHES.items()
}
IN_JSON = {name: msgspec.json.Decoder(verb.request) for name, verb in BATCHES.items()}
KEY = "k_" + "0" * 26

_text = st.text(st.characters(codec="utf-8"), max_size=8)
_bytes = st.binary(max_size=40)
_ids = st.fixed_dictionaries({}, optional={"aad": _bytes, "thread_id": _text, "request_id": _text})


def _items(value: str, others: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[list[dict[str, Any]]]:
    required = st.fixed_dictionaries({"key_id": _text, value: _bytes} if others is _ids else {value: _bytes})
    return st.lists(st.builds(lambda one, more: {**one, **more}, required, others), max_size=4)


_of_one_key = _items("ciphertext", st.fixed_dictionaries({}, optional={"aad": _bytes}))
REQUESTS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "encrypt_batch": st.fixed_dictionaries({"items": _items("plaintext", _ids)}),
    "decrypt_batch": st.fixed_dictionaries({"items": _items("ciphertext", _ids)}),
    "reencrypt_batch": st.fixed_dictionaries({"from_key_id": _text, "to_key_id": _text, "items": _of_one_key}),
    "mac": st.fixed_dictionaries(
        {
            "key_id": _text,
            "items": _items("plaintext", st.fixed_dictionaries({}, optional={"aad": _bytes})),
        },
        optional={"thread_id": _text},
    ),
    "check_batch": st.fixed_dictionaries({"key_id": _text, "items": _of_one_key}, optional={"thread_id": _text}),
}


def _as_json(value: Any) -> Any:
    """Bytes as base64 text."""
    if isinstance(value, dict):
        return {name: _as_json(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_as_json(member) for member in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _as_array(kind: type[msgspec.Struct], value: dict[str, Any], cut: bool) -> list[Any]:
    """The rule of docs/spec/api.md. `cut`: absent members at the end are left out, not nil."""
    item: dict[str, type[msgspec.Struct]] = {
        "EncryptBatchRequest": api.EncryptItemRequest,
        "DecryptBatchRequest": api.DecryptItemRequest,
        "MacRequest": api.MacItemRequest,
    }
    members: list[Any] = []
    for name in kind.__struct_fields__:
        member = value.get(name)
        if name == "items":
            inner = item.get(kind.__name__, api.ReencryptItemRequest)
            member = [_as_array(inner, one, cut) for one in value[name]]
        members.append(member)
    while cut and members and members[-1] is None:
        members.pop()
    return members


def _meaning(request: Any) -> Any:
    """What the verbs read of a request, whichever form it has."""
    if isinstance(request, list):
        return [_meaning(item) for item in request]
    if not isinstance(request, msgspec.Struct):
        return request
    read = encoding_of(cast(api.Request, request)).read
    found: dict[str, Any] = {}
    for name in request.__struct_fields__:
        value = getattr(request, name)
        if value is UNSET or value is None:
            found[name] = None
        elif name in ("plaintext", "ciphertext", "aad"):
            found[name] = read(value, 10_000, name)  # more than a body here has
        else:
            found[name] = _meaning(value)
    return found


def test_there_is_a_strategy_for_each_batch_verb() -> None:
    assert BATCHES.keys() == REQUESTS.keys()


@pytest.mark.parametrize("name", REQUESTS)
@given(st.data(), st.booleans())
def test_json_and_msgpack_of_one_value_are_one_request(name: str, data: st.DataObject, cut: bool) -> None:
    value = data.draw(REQUESTS[name])
    array = DECODE[name](msgspec.msgpack.encode(_as_array(BATCHES[name].request, value, cut)))
    in_json = strictjson.decode(IN_JSON[name], json.dumps(_as_json(value)).encode())
    assert _meaning(array) == _meaning(in_json)
    assert isinstance(array, BATCHES[name].request)


def _bin(data: bytes) -> bytes:
    return b"\xc4" + bytes([len(data)]) + data


ITEM = b"\xa1k" + _bin(b"p")
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not valid MessagePack"),
    "an object": (b"\x81\xa5items\x90", "expected form"),
    "JSON": (b'{"items":[]}', "expected form"),
    "nil": (b"\xc0", "expected form"),
    "no member": (b"\x90", "expected form"),
    "a member more": (b"\x92\x90\xc0", "expected form"),
    "a byte more": (b"\x91\x90\xc0", "not valid MessagePack"),
    "an item that is an object": (b"\x91\x91\x82\xa1a\xa1b\xa1c\xa1d", "expected form"),
    "an item with a member less": (b"\x91\x91\x91\xa1k", "expected form"),
    "an item with a member more": (b"\x91\x91\x96" + ITEM + b"\xc0\xc0\xc0\xc0", "expected form"),
    "text for bytes": (b"\x91\x91\x92\xa1k\xa1p", "expected form"),
    "bytes for text": (b"\x91\x91\x92" + _bin(b"k") + _bin(b"p"), "expected form"),
    "nil for bytes": (b"\x91\x91\x92\xa1k\xc0", "expected form"),
    "a number for bytes": (b"\x91\x91\x92\xa1k\x01", "expected form"),
    "a list of numbers for bytes": (b"\x91\x91\x92\xa1k\x91\x01", "expected form"),
    "an extension for bytes": (b"\x91\x91\x92\xa1k\xc7\x01\x05p", "expected form"),
    "a time for text": (b"\x91\x91\x92\xd6\xff\x00\x00\x00\x00" + _bin(b"p"), "expected form"),
    "a number for an id": (b"\x91\x91\x94" + ITEM + b"\xc4\x00\x05", "expected form"),
    "text that is not UTF-8": (b"\x91\x91\x92\xa1\xff" + _bin(b"p"), "UTF-8"),
    "a surrogate": (b"\x91\x91\x92\xa3\xed\xa0\x80" + _bin(b"p"), "UTF-8"),
    "the unused byte": (b"\x91\xc1", "not valid MessagePack"),
    "a cut array": (b"\x91\x92\x92" + ITEM, "not valid MessagePack"),
    "a cut value": (b"\x91\x91\x92\xa1k\xc4\x05p", "not valid MessagePack"),
    "2^32 items": (b"\x91\xdd\xff\xff\xff\xff", "not valid MessagePack"),
    "2^32 members": (b"\xdd\xff\xff\xff\xff\x90", "expected form"),
    "2^32 bytes": (b"\x91\x91\x92\xa1k\xc6\xff\xff\xff\xff", "not valid MessagePack"),
    "2^32 characters": (b"\x91\x91\x92\xdb\xff\xff\xff\xff", "not valid MessagePack"),
    "2^32 pairs": (b"\x91\xdf\xff\xff\xff\xff", "not valid MessagePack"),
    "arrays in arrays": (b"\x91" * 100_000, "nested too deeply|expected form"),
    "too many items, and arrays in arrays": (b"\x91\xdc\xff\xff" + b"\x91" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_body_is_refused_with_a_reason_and_not_allocated(name: str) -> None:
    body, reason = REFUSED[name]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError, match=reason) as raised:
            DECODE["encrypt_batch"](body)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert len(str(raised.value)) < 250


def test_an_error_shows_no_value() -> None:
    for array in ([[["k", "SECRET"]]], [[["k", b"p", "SECRET"]]], [["SECRET"]], "SECRET"):
        with pytest.raises(InvalidRequestError) as raised:
            DECODE["encrypt_batch"](msgspec.msgpack.encode(array))
        assert "SECRET" not in str(raised.value)


def test_a_request_does_not_show_its_plaintext() -> None:
    assert "SECRET" not in repr(DECODE["encrypt_batch"](b"\x91\x91\x92\xa1k" + _bin(b"SECRET")))


@pytest.mark.parametrize("name", REQUESTS)
def test_more_items_than_a_batch_takes_are_counted_and_not_decoded(name: str) -> None:
    """`VerbTable` refuses the request by their number, as it does in JSON. The decoder takes no memory for them."""
    count = 1_000_000
    before = {"reencrypt_batch": b"\x93\xa1k\xa1l", "check_batch": b"\x93\xa1k", "mac": b"\x93\xa1k"}.get(name, b"\x91")
    after = b"\xc0" if name in ("check_batch", "mac") else b""
    body = before + b"\xdd" + count.to_bytes(4) + b"\x90" * count + after
    tracemalloc.start()
    try:
        request = DECODE[name](body)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert request.items == range(count)
    assert encoding_of(request) is not encoding_of(BATCHES["encrypt_batch"].request([])), "answered in MessagePack"
    assert DECODE["encrypt_batch"](b"\x91\xdc\x04\x01" + b"\xc0" * 1025).items == range(1025)
    with pytest.raises(InvalidRequestError, match="expected form"):
        DECODE["encrypt_batch"](b"\x91\xdc\x04\x00" + b"\xc0" * 1024)


@given(st.binary(max_size=60), st.sampled_from(sorted(REQUESTS)))
def test_any_bytes_are_decoded_or_refused(body: bytes, name: str) -> None:
    for data in (body, b"\x91\x91" + body, b"\x91\x91\x92\xa1k" + body):
        try:
            DECODE[name](data)
        except InvalidRequestError as error:
            assert len(str(error)) < 250


@given(st.data(), st.sampled_from(sorted(REQUESTS)))
def test_a_changed_byte_is_decoded_or_refused(data: st.DataObject, name: str) -> None:
    array = _as_array(BATCHES[name].request, data.draw(REQUESTS[name]), data.draw(st.booleans()))
    body = bytearray(msgspec.msgpack.encode(array))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        _meaning(DECODE[name](bytes(body)))
    except InvalidRequestError as error:
        assert str(error).isprintable()
