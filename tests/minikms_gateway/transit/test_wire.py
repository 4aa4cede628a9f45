"""Bodies as the clients of Vault send them, and errors as they read them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms import api
from minikms.api.errors import KeyNotFoundError, LimitExceededError, SealedError, UnauthorizedError, WrongThreadError
from minikms_gateway.transit import wire
from minikms_gateway.transit.encryption import RecordResult, Records
from minikms_gateway.transit.generated import DataKey
from minikms_gateway.transit.keys import KeySettings
from minikms_gateway.transit.system import Login
from minikms_gateway.transit.wire import VaultError, bound, decode, decode_base64, encode_base64, error_response

BYTES = st.binary(max_size=40)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"plaintext":null}', b'{"unknown":{"a":[1]},"nonce":"x"}'])
def test_an_empty_body_null_and_unknown_fields_say_nothing(body: bytes) -> None:
    assert decode(body, Records) == Records()


def test_what_holds_a_plaintext_or_a_token_does_not_show_it() -> None:
    body = b'{"plaintext":"s3cret","jwt":"s3cret","batch_input":[{"plaintext":"s3cret"}]}'
    records = decode(body, Records)
    shown = [records, records.batch_input, RecordResult("s3cret"), decode(body, Login), decode(body, DataKey)]
    assert "s3cret" not in repr(shown)


@pytest.mark.parametrize("value", ["3", 3, 3.0])
def test_a_number_may_be_a_text(value: object) -> None:
    assert decode(json.dumps({"key_version": value}).encode(), Records).key_version == 3


@pytest.mark.parametrize("value", ["true", True, 1])
def test_a_truth_may_be_a_text(value: object) -> None:
    assert decode(json.dumps({"derived": value}).encode(), KeySettings).derived is True


@pytest.mark.parametrize(
    "body",
    [b"[]", b"null", b"x", b"plaintext=x", b"[" * 100_000, b'{"a":' * 3000, b'{"plaintext":5}', b'{"batch_input":{}}',
     b'{"batch_input":[1]}', b'{"key_version":"x"}', b'{"key_version":1e400}', b'{"key_version":%d}' % 2**63,
     b'{"batch_input":[{"reference":"%b"}]}' % (b"r" * 1025), b'{"plaintext":"\xff"}', b'{"plaintext":"\\ud800"}'],
)  # fmt: skip
def test_any_other_body_is_refused_without_the_text_of_a_library(body: bytes) -> None:
    with pytest.raises(VaultError, match="the body is no JSON object of the expected form"):
        decode(body, Records)


def test_a_body_of_many_objects_is_refused_before_it_is_decoded() -> None:
    many = b'{"batch_input":[' + b",".join([b"{}"] * (wire.OBJECTS_COUNT_MAX + 1)) + b"]}"
    with pytest.raises(VaultError) as refused:
        decode(many, Records)
    assert refused.value.status == 413


@given(BYTES)
def test_base64_may_have_line_ends_as_in_go(data: bytes) -> None:
    text = encode_base64(data)
    assert decode_base64("\r\n".join([text[:7], text[7:]])) == decode_base64(text) == data


@pytest.mark.parametrize("text", ["@", "YQ", "YQ=", "Y Q=", "-_8=", "é"])
def test_other_base64_is_refused(text: str) -> None:
    with pytest.raises(VaultError, match="illegal base64 data"):
        decode_base64(text)


@given(BYTES, BYTES, BYTES, BYTES)
def test_no_two_pairs_of_context_and_data_bind_alike(one: bytes, data: bytes, other: bytes, other_data: bytes) -> None:
    first, second = (bound(encode_base64(a), encode_base64(b)) for a, b in ((one, data), (other, other_data)))
    assert (first == second) == ((one, data) == (other, other_data))


def test_what_binds_a_record_has_the_specified_bytes() -> None:
    expected = b"minikms/transit/v1\0" + b"\0\0\0\2ab" + b"\0\0\0\1c"
    assert bound("YWI=", "Yw==") == expected
    assert bound(None, "") == bound("", None) == b"minikms/transit/v1\0" + bytes(8)


def test_more_than_the_key_service_binds_is_refused() -> None:
    with pytest.raises(VaultError, match="larger than is accepted"):
        bound(encode_base64(bytes(api.AAD_BYTES_MAX)), None)


def test_refusals_have_the_texts_and_statuses_of_vault() -> None:
    limited = LimitExceededError("a limit is used up", 7)
    for error, status, text in (
        (KeyNotFoundError("key not found: k_1"), 400, "encryption key not found"),
        (WrongThreadError("another thread"), 403, "permission denied"),
        (UnauthorizedError("show a certificate"), 403, "permission denied"),
        (SealedError("sealed"), 503, "Vault is sealed"),
        (limited, 429, "a limit is used up"),
        (VaultError("x", 405, "GET"), 405, "x"),
    ):
        answer = error_response(error)
        assert (answer.status, json.loads(answer.body)) == (status, {"errors": [text]})
        assert answer.content_type == "application/json"
        assert answer.close is isinstance(error, UnauthorizedError)
    assert error_response(limited).headers == (("retry-after", "7"),)
    assert error_response(VaultError("x", 405, "GET")).headers == (("allow", "GET"),)


@pytest.mark.parametrize(
    "given",
    [{"convergent_encryption": True}, {"exportable": True}, {"allow_plaintext_backup": True}, {"type": "rsa-2048"},
     {"auto_rotate_period": "1h"}, {"auto_rotate_period": 3600}, {"deletion_allowed": True}],
)  # fmt: skip
def test_a_setting_that_is_not_offered_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(VaultError):
        decode(json.dumps(given).encode(), KeySettings).check()
    nothing = {"convergent_encryption": False, "exportable": False, "type": "aes256-gcm96", "auto_rotate_period": "0"}
    decode(json.dumps(nothing).encode(), KeySettings).check()
