"""Heads and chunked bodies without a socket; what is accepted, another parser reads the same way."""

import contextlib
import random
import tracemalloc

import httptools
import pytest

from progressdb_server.http import framing, limits
from progressdb_server.http.framing import CHUNKED, Chunks, Fields, HttpError, RequestHead

HEAD = b"POST /v1/m?a=b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nX-Key:  a\tb \r\nConnection: keep-alive\r\n\r\n"
CHUNKED_HEAD = b"PUT http://x/a?b HTTP/1.1\r\nhost: x\r\nTransfer-Encoding: Chunked\r\nExpect: 100-continue\r\n\r\n"
PIECES = (
    b"\r",
    b"\n",
    b"\r\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"\x80",
    b"Host: y\r\n",
    b"Content-Length: 5\r\n",
)
"""What the mutations below insert."""


def parse_head(raw: bytes, last: Fields | None = None) -> RequestHead:
    head = framing.parse_head(b"before" + raw + b"after\r\n", 6, last)
    assert head is not None
    assert head.end == 6 + len(raw)
    return head


class Other:
    """What httptools reads."""

    def __init__(self, raw: bytes) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(httptools.HttpParserUpgrade):
            self.parser.feed_data(raw)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))


def test_a_head_is_read_as_it_is_written() -> None:
    head = parse_head(HEAD)
    assert (head.method, head.path, head.query, head.fields.length) == ("POST", b"/v1/m", b"a=b", 5)
    assert head.fields.headers[2] == (b"x-key", b"a\tb")
    assert (head.fields.keep_alive, head.fields.expects_continue) == (True, False)
    chunked = parse_head(CHUNKED_HEAD)
    assert (chunked.path, chunked.query) == (b"/a", b"b")
    assert (chunked.fields.length, chunked.fields.expects_continue) == (CHUNKED, True)


@pytest.mark.parametrize("tokens", [b"close", b"keep-alive, Close", b"upgrade\r\nConnection: close"])
def test_a_head_that_says_close_ends_the_connection(tokens: bytes) -> None:
    assert not parse_head(HEAD.replace(b"keep-alive", tokens)).fields.keep_alive


def test_an_upgrade_changes_neither_length_nor_connection() -> None:
    fields = parse_head(HEAD.replace(b"keep-alive", b"Upgrade\r\nUpgrade: websocket")).fields
    assert (fields.length, fields.keep_alive) == (5, True)


@pytest.mark.parametrize("raw", [HEAD, CHUNKED_HEAD])
def test_a_mutated_head_is_refused_or_read_like_another_parser_reads_it(raw: bytes) -> None:
    rng = random.Random(30)
    accepted = 0
    for _ in range(4000):
        mutated = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(raw))
            mutated[at : at + rng.choice((0, 1))] = rng.choice((*PIECES, bytes([rng.randrange(256)])))
        given = bytes(mutated)
        given = given[: given.find(b"\r\n\r\n") + 4]
        try:
            fields = parse_head(given).fields
        except HttpError:
            continue
        try:
            other = Other(given)
        except httptools.HttpParserInvalidMethodError:
            continue  # any word is a method: the routes answer 405
        assert fields.headers == other.headers, given
        assert fields.keep_alive == other.parser.should_keep_alive() or fields.version == "1.0", given
        accepted += 1
    assert accepted > 400


def test_long_names_of_headers_are_not_kept() -> None:
    tracemalloc.start()
    try:
        for number in range(300):
            parse_head(HEAD.replace(b"X-Key", b"X-%d-" % number + b"x" * 20_000))
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


BODY = b"5;name=value\r\nhello\r\n00003\r\n\r\n!\r\n0\r\nX-Trailer: dropped\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_chunked_body_in_parts_of_any_size_is_the_same_body(size: int) -> None:
    sent = BODY + b"GET / HTTP/1.1"
    chunks, found, rest = Chunks(), b"", b""
    for at in range(0, len(sent), size):
        data = rest + sent[at : at + size]
        part, used = chunks.feed(data, 0)
        found, rest = found + part, data[used:]
    assert (found, chunks.complete, rest) == (b"hello\r\n!", True, b"GET / HTTP/1.1")


@pytest.mark.parametrize(
    "body",
    [
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"5\r\nhello\rX",
        b"5\nhello\r\n",
        b"-5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b"123456789\r\n",
        b"\r\nhello",
        b"5;\x00\r\nhello\r\n",
        b"0\r\nno field\r\n\r\n",
        b"5;" + b"x" * limits.CHUNK_LINE_BYTES_MAX,
    ],
)
def test_a_malformed_chunk_is_refused(body: bytes) -> None:
    with pytest.raises(HttpError):
        Chunks().feed(body, 0)


def decoded(body: bytes) -> tuple[bytes, int]:
    """As far as the body goes, and in how many turns."""
    chunks, found, at, turns = Chunks(), b"", 0, 0
    while turns == 0 or not (chunks.complete or chunks.starved):
        part, at = chunks.feed(body, at)
        found += part
        turns += 1
    return found, turns


def test_a_body_has_a_bounded_number_of_chunks_and_bytes_of_trailers() -> None:
    assert decoded(b"1\r\nx\r\n" * limits.CHUNKS_COUNT_MAX)[0] == b"x" * limits.CHUNKS_COUNT_MAX
    with pytest.raises(HttpError) as refused:
        decoded(b"1\r\nx\r\n" * (limits.CHUNKS_COUNT_MAX + 1))
    assert refused.value.status == 413
    with pytest.raises(HttpError) as refused:
        decoded(b"0\r\n" + b"A: b\r\n" * limits.HEAD_BYTES_MAX)
    assert refused.value.status == 431


def test_an_empty_line_before_a_head_may_be_split() -> None:
    assert framing.parse_head(b"\r", 0) is None
    with pytest.raises(HttpError):
        framing.parse_head(b"\rG", 0)


def test_fields_recur_only_byte_for_byte() -> None:
    fields = parse_head(HEAD).fields
    other = parse_head(HEAD.replace(b"/v1/m", b"/"), fields)
    assert (other.path, other.fields is fields) == (b"/", True)
    for changed in (HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"), HEAD.replace(b"5", b"6"), HEAD[:-2] + b"A: b\r\n\r\n"):
        assert parse_head(changed, fields).fields == parse_head(changed).fields != fields
    with pytest.raises(HttpError):
        parse_head(HEAD.replace(b"/v1/m", b"/" * limits.HEAD_BYTES_MAX), fields)


def test_many_short_chunks_are_decoded_in_many_turns() -> None:
    found, turns = decoded(b"1\r\nx\r\n" * 2000 + b"0\r\n\r\n")
    assert found == b"x" * 2000
    assert turns > 2000 // limits.CHUNKS_PER_TURN_COUNT_MAX
