"""JSON bodies have one reading: what msgspec alone would let through or let out is a 400."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType

from minikms import api
from minikms.api.errors import InvalidRequestError
from minikms_daemon.server import strictjson

ITEM = msgspec.json.Decoder(api.EncryptItemRequest)
BATCH = msgspec.json.Decoder(api.EncryptBatchRequest)
CREATE = msgspec.json.Decoder(api.CreateDekRequest)


class Mixed(api.Request):
    """A struct that is not flat."""

    name: str
    count: int | UnsetType = UNSET
    flag: bool | UnsetType | None = UNSET
    items: list[api.EncryptItemRequest] | UnsetType = UNSET
    words: list[str] | UnsetType = UNSET
    inner: api.DecryptItemRequest | UnsetType = UNSET


MIXED = msgspec.json.Decoder(Mixed)
ANYTHING: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Any)

_text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8) | st.text('"\\a', max_size=6)


@st.composite
def _objects(draw: st.DrawFn, required: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    return draw(st.fixed_dictionaries(required, optional=optional))


_items = _objects({"key_id": _text, "plaintext": _text}, {"aad": _text, "thread_id": _text, "request_id": _text})
_mixed = _objects(
    {"name": _text},
    {
        "count": st.integers(-(2**60), 2**60),
        "flag": st.booleans() | st.none(),
        "items": st.lists(_items, max_size=4),
        "words": st.lists(_text, max_size=4),
        "inner": _objects({"key_id": _text, "ciphertext": _text}, {"aad": _text}),
    },
)


def _as_plain(value: Any) -> Any:
    return json.loads(msgspec.json.encode(value))


@given(_mixed, st.booleans())
def test_every_valid_body_is_accepted_as_it_is(value: dict[str, Any], ascii_only: bool) -> None:
    """Escapes, quotes and backslashes in the text never look like a repeated key."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert _as_plain(strictjson.decode(MIXED, memoryview(body))) == value


@given(st.lists(_items, max_size=5))
def test_a_batch_is_accepted_as_it_is(items: list[dict[str, Any]]) -> None:
    body = json.dumps({"items": items}).encode()
    assert _as_plain(strictjson.decode(BATCH, memoryview(body))) == {"items": items}


@given(_mixed, st.data())
def test_a_repeated_key_anywhere_is_refused(value: dict[str, Any], data: st.DataObject) -> None:
    """Also when it is spelled differently: `"\\u006eame"` is `"name"`."""
    objects = [value, *value.get("items", [])] + ([value["inner"]] if "inner" in value else [])
    chosen = data.draw(st.sampled_from(range(len(objects))))
    key = data.draw(st.sampled_from(sorted(objects[chosen])))
    spelled = data.draw(st.sampled_from([key, f"\\u{ord(key[0]):04x}{key[1:]}"]))
    marker = "marker-of-the-object"
    repeated = json.dumps(objects[chosen][key])
    marked = json.loads(json.dumps(value))
    [marked, *marked.get("items", []), marked.get("inner", {})][chosen][marker] = 0
    body = json.dumps(marked).replace(f'"{marker}": 0', f'"{spelled}": {repeated}').encode()
    with pytest.raises(InvalidRequestError, match="same key twice"):
        strictjson.decode(MIXED, memoryview(body))


@given(_items, st.booleans(), st.booleans(), st.data())
def test_a_repeated_key_of_one_item_is_refused(
    value: dict[str, Any], empty: bool, compact: bool, data: st.DataObject
) -> None:
    """Also where it adds as few bytes as it can."""
    key = data.draw(st.sampled_from(sorted(value)))
    separators = (",", ":") if compact else (", ", ": ")
    body = json.dumps(value, separators=separators, ensure_ascii=False)
    repeated = json.dumps({key: "" if empty else value[key]}, separators=separators, ensure_ascii=False)
    assert _as_plain(strictjson.decode(ITEM, memoryview(body.encode()))) == value
    for twice in (repeated[:-1] + separators[0] + body[1:], body[:-1] + separators[0] + repeated[1:]):
        with pytest.raises(InvalidRequestError, match="same key twice"):
            strictjson.decode(ITEM, memoryview(twice.encode()))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"null", "expected form"),
        (b"[]", "expected form"),
        (b'{"key_id":"k","plaintext":"p"}x', "not valid JSON"),
        (b'{"key_id":"k","plaintext":"p"}{}', "not valid JSON"),
        (b'{"key_id":"k"}', "missing required field `plaintext`"),
        (b'{"key_id":1,"plaintext":"p"}', "Expected `str`"),
        (b'{"key_id":null,"plaintext":"p"}', "Expected `str`"),
        (b'{"key_id":"k","plaintext":"p","aad":null}', "Expected `str`"),
        (b'{"key_id":"k","plaintext":"p","add":"x"}', "unknown field `add`"),
        (b'{"key_id":"k","plaintext":"\xff"}', "UTF-8"),
        (b'{"key_id":"k","plaintext":"\xed\xa0\x80"}', "UTF-8"),
        (b'{"key_id":"k","plaintext":"\\ud800"}', "not valid JSON"),
        (b'{"key_id":"k","plaintext":"\x00"}', "not valid JSON"),
        (b'{"key_id":"k","plaintext":"p",}', "not valid JSON"),
        (b"{'key_id':'k'}", "not valid JSON"),
        (b'\xef\xbb\xbf{"key_id":"k","plaintext":"p"}', "not valid JSON"),
        (b'{"key_id":"k","plaintext":"p"}'.decode().encode("utf-16"), "not valid JSON"),
        (b'{"key_id":NaN,"plaintext":"p"}', "not valid JSON"),
    ],
)
def test_another_object_is_refused_with_a_reason(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        strictjson.decode(ITEM, memoryview(body))


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"items":' + b"[" * 100_000, b'{"items":[' + b'{"key_id":' * 50_000]
)
def test_deep_nesting_is_refused(body: bytes) -> None:
    decoders: list[msgspec.json.Decoder[Any]] = [ITEM, BATCH, ANYTHING]
    for decoder in decoders:
        with pytest.raises(InvalidRequestError):
            strictjson.decode(decoder, body)


def test_an_error_shows_no_value_and_stays_short() -> None:
    secret = "A" * 1000
    for body in (
        {"key_id": [secret], "plaintext": "p"},
        {"key_id": "k", "plaintext": "p", secret: "x"},
        {"thread_id": "t", "purpose": secret},
    ):
        decoder: msgspec.json.Decoder[Any] = CREATE if "purpose" in body else ITEM
        with pytest.raises(InvalidRequestError) as raised:
            strictjson.decode(decoder, json.dumps(body).encode())
        assert len(str(raised.value)) < 250
        assert "p" * 1000 not in str(raised.value)
    with pytest.raises(InvalidRequestError) as raised:
        strictjson.decode(ITEM, b'{"key_id":"k","plaintext":"p","a\\n\\u0007":1}')
    assert str(raised.value).isprintable()


@given(st.binary(max_size=40))
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    for data in (body, b'{"key_id":"' + body + b'","plaintext":"p"}'):
        try:
            strictjson.decode(ITEM, data)
        except InvalidRequestError:
            continue


def test_a_struct_with_another_default_than_unset_is_a_defect() -> None:
    """With another default, a repeated key could hide behind an absent field."""

    class Defaulted(msgspec.Struct):
        name: str = ""

    with pytest.raises(TypeError, match=r"Defaulted\.name"):
        strictjson.decode(msgspec.json.Decoder(Defaulted), b'{"name":"a"}')


def test_a_struct_that_ignores_unknown_keys_is_a_defect() -> None:
    """A short body is accepted without counting, so msgspec has to refuse the keys that the struct does not have."""

    class Ignoring(msgspec.Struct):
        one: str
        other: str
        third: str | UnsetType = UNSET
        fourth: str | UnsetType = UNSET

    with pytest.raises(TypeError, match="Ignoring"):
        strictjson.decode(msgspec.json.Decoder(Ignoring), b'{"one":"a","other":"b"}')


def test_a_key_is_repeated_under_the_name_that_it_has_in_json() -> None:
    """Names in JSON may be shorter than those of the fields."""

    class Renamed(api.Request, rename={"first": "a", "second": "b", "third": "c", "fourth": "d"}):
        first: str
        second: str
        third: str | UnsetType = UNSET
        fourth: str | UnsetType = UNSET

    decoder = msgspec.json.Decoder(Renamed)
    for _ in range(2):  # the first body of a type is counted
        assert strictjson.decode(decoder, b'{"a":"x","b":"y"}') == Renamed("x", "y")
        with pytest.raises(InvalidRequestError, match="same key twice"):
            strictjson.decode(decoder, b'{"a":"","a":"x","b":"y"}')


def test_no_request_of_the_contract_has_another_default_than_unset() -> None:
    for name, struct in vars(api).items():
        if isinstance(struct, type) and issubclass(struct, api.Request):
            for field in msgspec.structs.fields(struct):
                assert field.default in (msgspec.NODEFAULT, msgspec.UNSET), (name, field.name)
                assert field.default_factory is msgspec.NODEFAULT, (name, field.name)
