"""Key ids have one spelling and sort by time of creation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms import api
from minikms.api.errors import InvalidRequestError
from minikms.keys.dek import bytes_to_key_id, check_key_id, key_id_to_bytes, key_id_unix_ms, make_key_id

times = st.integers(0, 2**48 - 1)
randoms = st.binary(min_size=10, max_size=10)
raws = st.binary(min_size=16, max_size=16)


@pytest.mark.parametrize(
    ("unix_ms", "random", "key_id"),
    [
        (0, bytes(10), "k_00000000000000000000000000"),
        (2**48 - 1, b"\xff" * 10, "k_7zzzzzzzzzzzzzzzzzzzzzzzzz"),
        # The time of the example in the ULID specification, 01ARYZ6S41…
        (1469918176385, bytes(range(10)), "k_01aryz6s41000g40r40m30e209"),
    ],
)
def test_known_ids(unix_ms: int, random: bytes, key_id: str) -> None:
    assert make_key_id(unix_ms, random) == key_id
    assert key_id_to_bytes(key_id) == unix_ms.to_bytes(6, "big") + random


@given(times, randoms)
def test_an_id_matches_the_pattern_of_the_wire_and_tells_its_time(unix_ms: int, random: bytes) -> None:
    key_id = make_key_id(unix_ms, random)
    assert api.KEY_ID_PATTERN.fullmatch(key_id)
    assert check_key_id(key_id) is key_id
    assert key_id_unix_ms(key_id) == unix_ms


@given(raws)
def test_bytes_and_text_map_one_to_one(raw: bytes) -> None:
    assert key_id_to_bytes(bytes_to_key_id(raw)) == raw


@given(st.from_regex(api.KEY_ID_PATTERN, fullmatch=True))
def test_every_text_that_matches_the_pattern_is_one_id(text: str) -> None:
    assert bytes_to_key_id(key_id_to_bytes(text)) == text


@given(raws, raws)
def test_ids_sort_as_their_bytes_do(one: bytes, other: bytes) -> None:
    assert (one < other) == (bytes_to_key_id(one) < bytes_to_key_id(other))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "k_",
        "k_0000000000000000000000000",
        "k_000000000000000000000000000",
        "k_80000000000000000000000000",
        "K_00000000000000000000000000",
        "k_0000000000000000000000000A",
        "k_0000000000000000000000000i",
        "k_0000000000000000000000000l",
        "k_0000000000000000000000000o",
        "k_0000000000000000000000000u",
        "k_00000000000000000000000000\n",
        "k_0000000000000000000000000\u0660",
        "k_../../../../../etc/passwd0",
        "k_000000000000000000000000_0",
    ],
)
def test_invalid_text_is_refused_without_being_repeated(text: str) -> None:
    for refuse in (check_key_id, key_id_to_bytes, key_id_unix_ms):
        with pytest.raises(InvalidRequestError) as refused:
            refuse(text)
        assert not text or text not in str(refused.value) or text == "k_"


@given(st.text(max_size=40))
def test_arbitrary_text_is_an_id_or_refused(text: str) -> None:
    try:
        assert check_key_id(text) == text
    except InvalidRequestError:
        assert not api.KEY_ID_PATTERN.fullmatch(text)


def test_a_time_or_randomness_out_of_range_is_the_caller_s_defect() -> None:
    for unix_ms, random in ((-1, bytes(10)), (2**48, bytes(10)), (0, bytes(9)), (0, bytes(11))):
        with pytest.raises(ValueError, match="key id"):
            make_key_id(unix_ms, random)
    for length in (0, 15, 17):
        with pytest.raises(ValueError, match="sixteen"):
            bytes_to_key_id(bytes(length))
