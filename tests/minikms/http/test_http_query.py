"""Query strings have one reading."""

from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.errors import InvalidRequestError
from minikms.http import parse_query


@given(st.dictionaries(st.text(min_size=1, max_size=10), st.text(max_size=20), max_size=8))
def test_an_encoded_query_is_decoded(parameters: dict[str, str]) -> None:
    assert parse_query(urlencode(parameters)) == parameters
    assert (
        parse_query("&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in parameters.items())) == parameters
    )


def test_no_query_is_no_parameter() -> None:
    assert parse_query("") == {}
    assert parse_query("a=") == {"a": ""}


@pytest.mark.parametrize(
    "query",
    [
        *["a=1&a=1", "a=1&%61=2", "a", "=1", "&", "a=1&", "a=%", "a=%2", "a=%zz", "a=%ff", "%c3=1", "a=%u0041"],
        "&".join(f"k{n}=1" for n in range(33)),
    ],
)
def test_an_ambiguous_query_is_refused(query: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_query(query)


@given(st.text("%a0=&+é;", max_size=12))
def test_any_query_is_decoded_or_refused(query: str) -> None:
    """No input causes another exception."""
    try:
        parse_query(query)
    except InvalidRequestError as error:
        assert str(error).startswith(("The query", "A query"))
