"""The chunked coding is decoded exactly, or refused at the first invalid byte."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.http.limits import BAD_CHUNK, BODY_TOO_LARGE, LIMITS, TOO_MANY_CHUNKS, Refusal, RefusedError
from minikms.http.reader import Budget, ChunkedDecoder

SMALL = dataclasses.replace(LIMITS, body_bytes_max=100, chunks_count_max=5)


def decoder() -> tuple[ChunkedDecoder, Budget]:
    budget = Budget(LIMITS.buffered_bytes_max)
    return ChunkedDecoder(SMALL, budget), budget


def refusal_of(data: bytes) -> tuple[int, Refusal]:
    """Feed `data` byte by byte. Returns the number of accepted bytes and the refusal of the next byte."""
    chunks, budget = decoder()
    try:
        for count, byte in enumerate(data):
            try:
                chunks.feed(memoryview(bytes([byte])))
            except RefusedError as error:
                return count, error.refusal
    finally:
        chunks.wipe()
        assert budget.bytes_held == 0
    pytest.fail("was not refused")


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=8), st.data())
def test_a_chunked_body_is_decoded_exactly(parts: list[bytes], data: st.DataObject) -> None:
    """The body does not depend on the sizes of the chunks and of the fed pieces. Bytes after the body are not read."""
    framed = b"".join(b"%X\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    after = data.draw(st.binary(max_size=20))
    budget = Budget(LIMITS.buffered_bytes_max)
    chunks = ChunkedDecoder(LIMITS, budget)
    rest = framed + after
    used = 0
    while not chunks.complete:
        size = data.draw(st.integers(min_value=1, max_value=len(rest)))
        used += chunks.feed(memoryview(rest)[:size])
        rest = (framed + after)[used:]
    assert rest == after
    view = chunks.body()
    assert bytes(view) == b"".join(parts)
    chunks.wipe()
    assert not any(view)
    assert budget.bytes_held == 0


@pytest.mark.parametrize(
    ("framed", "at"),
    [
        (b"\r", 0),
        (b" 1", 0),
        (b"-", 0),
        (b"1;", 1),
        (b"1 ", 1),
        (b"1\n", 1),
        (b"1\rx", 2),
        (b"000000001", 8),
        (b"1\r\nx\n", 4),
        (b"1\r\nxy", 4),
        (b"1\r\nx\rx", 5),
        (b"0\r\nA", 3),
        (b"0\r\n\n", 3),
        (b"0\r\n\r\r", 4),
        (b"0\r\n0\r\n\r\n", 3),
    ],
)
def test_malformed_framing_is_refused_at_its_first_invalid_byte(framed: bytes, at: int) -> None:
    assert refusal_of(framed) == (at, BAD_CHUNK)


def test_a_body_over_the_bound_is_refused_before_it_is_received() -> None:
    assert refusal_of(b"65\r\n") == (2, BODY_TOO_LARGE)
    assert refusal_of(b"32\r\n" + b"x" * 50 + b"\r\n33\r\n") == (58, BODY_TOO_LARGE)
    assert refusal_of(b"ffffffff\r\n") == (8, BODY_TOO_LARGE)


def test_a_body_of_exactly_the_bound_is_accepted() -> None:
    chunks, _ = decoder()
    framed = b"64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n"
    assert chunks.feed(memoryview(framed)) == len(framed)
    assert bytes(chunks.body()) == b"x" * 100
    chunks.wipe()


def test_too_many_chunks_are_refused_whatever_their_size() -> None:
    """The last chunk, of size 0, is counted too."""
    assert refusal_of(b"1\r\nx\r\n" * 6)[1] is TOO_MANY_CHUNKS
    assert refusal_of(b"1\r\nx\r\n" * 5 + b"0\r\n\r\n")[1] is TOO_MANY_CHUNKS
