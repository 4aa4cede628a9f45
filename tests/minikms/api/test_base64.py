"""One text for one value: `decode_canonical` takes what `encode` makes, whatever a library would take beyond it."""

import base64
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.base64 import decode_canonical, encode
from minikms.api.errors import InvalidRequestError, TooLargeError

LETTERS = "AQB=\n-é"
"""With unused bits zero, not zero before `==` only, and not zero at all; padding; what belongs to no text."""


def accepted(text: str) -> bytes | None:
    try:
        return decode_canonical(text, 64, "plaintext")
    except InvalidRequestError:
        return None


@pytest.mark.parametrize("length", range(7))
def test_of_all_short_texts_only_those_are_taken_that_the_encoder_makes(length: int) -> None:
    taken = 0
    for letters in itertools.product(LETTERS, repeat=length):
        text = "".join(letters)
        value = accepted(text)
        if value is not None:
            assert base64.b64encode(value).decode() == text
            taken += 1
    # A quad of A, Q and B; or one whose last letter is A or Q before one `=` or two. Nothing else has whole quads.
    assert taken == {0: 1, 4: 3**4 + 3**2 * 2 + 3 * 2}.get(length, 0)


@given(st.binary(max_size=200))
def test_what_the_encoder_makes_is_standard_base64_and_is_taken(value: bytes) -> None:
    text = encode(value)
    assert text == base64.b64encode(value)
    assert decode_canonical(text.decode(), 200, "plaintext") == value


@given(st.binary(min_size=1, max_size=60), st.data())
def test_a_text_that_was_changed_anywhere_never_means_the_same_bytes(value: bytes, data: st.DataObject) -> None:
    text = encode(value).decode()
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.characters(exclude_characters=text[place])) + text[place + 1 :]
    assert accepted(changed) != value


@given(st.text("AQ/", min_size=7, max_size=84), st.integers(0, 3))
def test_a_longer_text_is_taken_only_if_the_encoder_makes_it(letters: str, padding: int) -> None:
    """The library decodes a longer text in vectors, with other code."""
    text = letters + "=" * padding
    value = accepted(text)
    assert value is None or encode(value).decode() == text


def test_a_value_beyond_its_bound_is_refused_by_name() -> None:
    assert decode_canonical(encode(bytes(10)).decode(), 10, "aad") == bytes(10)
    for size in (11, 12, 13, 1000):
        with pytest.raises(TooLargeError, match="aad is larger than 10 bytes"):
            decode_canonical(encode(bytes(size)).decode(), 10, "aad")
