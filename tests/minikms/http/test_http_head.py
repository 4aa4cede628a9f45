"""Heads without a socket: which are accepted, refused early, and cached."""

import dataclasses
from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.http import limits
from minikms.http.head import HeadCache, check_partial_head, parse_head
from minikms.http.limits import CACHED_HEADS_COUNT_MAX, LIMITS, RefusedError
from tests.minikms.http.http_harness import get, request
from tests.minikms.http.http_inputs import ACCEPTED, REFUSED, raw


def check_partial(data: bytes) -> None:
    """Call it as the reader does: the head comes after other bytes."""
    check_partial_head(bytearray(b"\r" + data), 1, len(data) + 1, LIMITS)


def test_a_head_is_parsed_as_sent() -> None:
    head = parse_head(
        raw(
            "POST /a%2Fb?x=1&y=%20?z HTTP/1.1",
            "Host: x",
            "Content-Length: 12",
            "Content-Type: application/json; charset=utf-8",
            "Expect: 100-continue",
            "X-Request-ID: abc:1",
        ),
        LIMITS,
    )
    assert (head.method, head.path, head.query) == ("POST", "/a%2Fb", "x=1&y=%20?z")
    assert (head.content_length, head.chunked, head.expect_continue) == (12, False, True)
    assert (head.content_type, head.request_id) == ("application/json; charset=utf-8", "abc:1")
    assert head.keep_alive


@pytest.mark.parametrize("name", ["spiffe://prod/chat", "", "*", "\xe9", "a, b", "x" * 500])
def test_the_name_of_a_principal_is_passed_on_as_sent_and_never_ignored(name: str) -> None:
    """Whether it is a name is decided elsewhere. A header that is there is not taken for one that is not."""
    head = parse_head(f"GET / HTTP/1.1\r\nHost: x\r\nx-MINIKMS-principal: {name}\r\n\r\n".encode("latin-1"), LIMITS)
    assert head.principal == name
    assert head.plain and not head.cacheable
    assert parse_head(get("/"), LIMITS).principal is None


def test_a_second_name_of_a_principal_is_refused() -> None:
    with pytest.raises(RefusedError) as refused:
        parse_head(get("/", "X-MiniKMS-Principal: dns:a", "X-MiniKMS-Principal: dns:a"), LIMITS)
    assert refused.value.refusal is limits.REPEATED_HEADER


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [
        ("1.1", None, True),
        ("1.1", "keep-alive", True),
        ("1.1", "close", False),
        ("1.1", "x, CLOSE", False),
        ("1.1", "keep-alive, close", False),
        ("1.0", None, False),
        ("1.0", "keep-alive", False),
    ],
)
def test_the_connection_stays_open_as_rfc_9112_says(version: str, connection: str | None, kept: bool) -> None:
    """RFC 9112 section 9.3; a 1.0 connection is always closed."""
    headers = [] if connection is None else [f"Connection: {connection}"]
    assert parse_head(raw(f"GET / HTTP/{version}", "Host: x", *headers), LIMITS).keep_alive is kept


def test_bounds_are_exact() -> None:
    small = dataclasses.replace(LIMITS, head_bytes_max=100, headers_count_max=3, target_bytes_max=20, body_bytes_max=9)

    def refusal(head: bytes) -> limits.Refusal | None:
        try:
            parse_head(head, small)
        except RefusedError as error:
            return error.refusal
        return None

    padding = 100 - len(request("GET", "/", "A: "))
    assert refusal(request("GET", "/", "A: " + "b" * padding)) is None
    assert refusal(request("GET", "/", "A: " + "b" * (padding + 1))) is limits.HEAD_TOO_LARGE
    assert refusal(get("/", "A: 1", "B: 2")) is None
    assert refusal(get("/", "A: 1", "B: 2", "C: 3")) is limits.TOO_MANY_HEADERS
    assert refusal(get("/" + "a" * 19)) is None
    assert refusal(get("/" + "a" * 20)) is limits.TARGET_TOO_LONG
    assert refusal(request("POST", "/", "Content-Length: 9")) is None
    assert refusal(request("POST", "/", "Content-Length: 10")) is limits.BODY_TOO_LARGE


@given(st.data())
def test_no_prefix_of_an_acceptable_head_is_refused(data: st.DataObject) -> None:
    sent = data.draw(st.sampled_from(sorted(ACCEPTED.values())))
    head = sent[: sent.index(b"\r\n\r\n") + 4]
    check_partial(head[: data.draw(st.integers(min_value=1, max_value=len(head) - 1))])


@pytest.mark.parametrize(
    "name", ["HTTP/0.9", "only LF", "TLS on a plain socket", "bare LF after a header", "HTTP/2 preface"]
)
def test_bytes_that_can_not_become_a_head_are_refused_early(name: str) -> None:
    data, status = REFUSED[name]
    with pytest.raises(RefusedError) as raised:
        check_partial(data.partition(b"\r\n\r\n")[0] + b"\r\n" * (b"HTTP/2" in data))
    assert raised.value.refusal.status == status


@pytest.mark.parametrize(
    "data", [b"{", b" ", b"\x16", b"0", b"\xe9", b"\n", b"GET /\0", b"GET / HTTP/2.0\r\n", b"GET /#a HTTP/1.1\r\n"]
)
def test_another_protocol_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(RefusedError):
        check_partial(data)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_any_bytes_are_parsed_or_refused(first: bytes, second: bytes) -> None:
    """No input causes another exception."""
    for data in (first, b"GET / HTTP/1.1\r\n" + first, b"POST / HTTP/1.1\r\nHost: x\r\n" + first + b"\r\n" + second):
        for parse in (check_partial, lambda data: parse_head(data, LIMITS)):
            try:
                parse(data + b"\r\n\r\n")
            except RefusedError as error:
                assert 400 <= error.refusal.status < 500


@given(
    st.lists(st.tuples(st.sampled_from(["A", "Accept", "X-y", "B_c"]), st.text("ab \t:;,=\"'", max_size=8)), max_size=5)
)
def test_our_grammar_accepts_nothing_that_httptools_refuses(fields: list[tuple[str, str]]) -> None:
    """Two parsers agree on every accepted head."""
    head = get("/", *(f"{name}:{value}" for name, value in fields))
    assert parse_head(head, LIMITS).method == "GET"
    httptools.HttpRequestParser(object()).feed_data(head)


def test_a_head_that_httptools_parses_differently_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No input is known for which the two parsers differ; if one is found, it gets 400."""

    class Forgetful:
        def __init__(self, sink: Any) -> None:
            self.sink = sink

        def feed_data(self, data: bytes) -> None:
            self.sink.on_url(b"/")
            self.sink.on_header(b"Host", b"x")

    monkeypatch.setattr(httptools, "HttpRequestParser", Forgetful)
    assert parse_head(get("/"), LIMITS).path == "/"
    for head in (get("/", "A: b"), get("/other")):
        with pytest.raises(RefusedError) as raised:
            parse_head(head, LIMITS)
        assert raised.value.refusal is limits.BAD_HEADER


class TestHeadCache:
    """The cache of parsed heads."""

    def test_an_equal_head_is_not_parsed_again(self) -> None:
        head_cache = HeadCache(LIMITS)
        head = head_cache.parse(get("/echo"))
        assert head_cache.get(get("/echo")) is head
        assert head_cache.get(get("/other")) is None

    @pytest.mark.parametrize(
        "head",
        [
            get("/", "Authorization: Bearer secret"),
            get("/", "Proxy-Authorization: secret"),
            get("/", "Cookie: secret"),
            get("/", "X-Request-ID: 1"),
            get("/?key_id=1"),
            get("/", "A: " + "b" * 1024),
        ],
    )
    def test_a_head_with_a_credential_or_a_query_is_not_cached(self, head: bytes) -> None:
        head_cache = HeadCache(LIMITS)
        head_cache.parse(head)
        assert head_cache.get(head) is None

    def test_a_refused_head_is_not_cached(self) -> None:
        head_cache = HeadCache(LIMITS)
        with pytest.raises(RefusedError):
            head_cache.parse(b"GET / HTTP/2.0\r\n\r\n")
        assert head_cache.get(b"GET / HTTP/2.0\r\n\r\n") is None

    def test_it_is_bounded(self) -> None:
        head_cache = HeadCache(LIMITS)
        for number in range(3 * CACHED_HEADS_COUNT_MAX):
            head_cache.parse(get(f"/{number}"))
        kept = sum(head_cache.get(get(f"/{number}")) is not None for number in range(3 * CACHED_HEADS_COUNT_MAX))
        assert 0 < kept <= CACHED_HEADS_COUNT_MAX
