"""The answer parser: what it takes, what it refuses, and that it does not care how the bytes come."""

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.errors import KmsProtocolError
from minikms.client.wire import ANSWER_BYTES_MAX, HEAD_BYTES_MAX, HEADERS_COUNT_MAX, Answer, AnswerParser, request_head

GOOD = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n{"ciphertext":""}'


def feed(*pieces: bytes) -> Answer | None:
    parser = AnswerParser()
    answers = [parser.feed(piece) for piece in pieces]
    assert answers[:-1] == [None] * (len(pieces) - 1)
    return answers[-1]


def test_an_answer_split_at_every_offset_is_the_same_answer() -> None:
    whole = feed(GOOD)
    assert whole == Answer(200, b'{"ciphertext":""}', True, content_type=b"application/json")
    for offset in range(1, len(GOOD)):
        assert feed(GOOD[:offset], GOOD[offset:]) == whole


def test_an_answer_may_come_byte_by_byte() -> None:
    assert feed(*(GOOD[index : index + 1] for index in range(len(GOOD)))) == feed(GOOD)


@given(
    status=st.integers(200, 599),
    body=st.binary(max_size=2000),
    cuts=st.lists(st.integers(0, 2200), max_size=6),
    close=st.booleans(),
)
def test_what_another_implementation_writes_is_read_as_it_was_meant(
    status: int, body: bytes, cuts: list[int], close: bool
) -> None:
    if status in (204, 304):
        status = 200
    writer = h11.Connection(h11.SERVER)
    writer.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\n\r\n")
    writer.next_event()
    headers = [("content-length", str(len(body)))] + ([("connection", "close")] if close else [])
    sent = writer.send(h11.Response(status_code=status, headers=headers, reason=b"As you like"))
    assert sent is not None
    wire = sent + (writer.send(h11.Data(data=body)) or b"")
    ends = sorted({cut for cut in cuts if 0 < cut < len(wire)} | {len(wire)})
    pieces = [wire[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert feed(*pieces) == Answer(status, body, not close)


@given(st.binary(max_size=400))
def test_no_bytes_raise_anything_but_a_protocol_error(data: bytes) -> None:
    parser = AnswerParser()
    try:
        parser.feed(data)
        parser.feed(b"\r\n\r\n")
    except KmsProtocolError:
        pass


def head(*lines: bytes) -> bytes:
    return b"\r\n".join([*lines, b"", b""])


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        (head(b"HTTP/1.0 200 OK", b"Content-Length: 0"), "status line"),
        (head(b"HTTP/2.0 200 OK", b"Content-Length: 0"), "status line"),
        (head(b"200 OK", b"Content-Length: 0"), "status line"),
        (head(b"HTTP/1.1 100 Continue"), "status line"),
        (head(b"HTTP/1.1 600 OK", b"Content-Length: 0"), "status line"),
        (head(b"HTTP/1.1 2000 OK", b"Content-Length: 0"), "status line"),
        (head(b"HTTP/1.1 200 O\x00K", b"Content-Length: 0"), "status line"),
        (head(b"HTTP/1.1 200 OK"), "no valid length"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length:"), "no valid length"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: -1"), "no valid length"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: +1"), "no valid length"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 1_0"), "no valid length"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 1, 1"), "no valid length"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 0000000001"), "no valid length"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: %d" % (ANSWER_BYTES_MAX + 1)), "too large"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 0", b"Content-Length: 0"), "two lengths"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 0", b"Transfer-Encoding: chunked"), "transfer encoding"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 0", b"no colon"), "malformed header"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length : 0"), "malformed header"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 0", b" folded"), "malformed header"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 0", b"A: b\nC: d"), "malformed header"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 0", b": nameless"), "malformed header"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 0", *[b"A: b"] * HEADERS_COUNT_MAX), "too many headers"),
        (head(b"HTTP/1.1 200 OK", b"Content-Length: 0") + b"x", "more bytes"),
        (b"x" * HEAD_BYTES_MAX, "too long"),
    ],
)
def test_an_answer_that_breaks_a_rule_is_refused(wire: bytes, complaint: str) -> None:
    with pytest.raises(KmsProtocolError, match=complaint):
        AnswerParser().feed(wire)


def test_bytes_after_the_answer_are_refused() -> None:
    parser = AnswerParser()
    assert parser.feed(GOOD) is not None
    with pytest.raises(KmsProtocolError, match="nothing asked for"):
        parser.feed(b"H")


def test_any_connection_option_but_keep_alive_ends_the_connection() -> None:
    for option, reusable in [(b"Keep-Alive", True), (b"close", False), (b"Close", False), (b"keep-alive, x", False)]:
        answer = feed(b"HTTP/1.1 200 OK\r\nConnection: %b\r\nContent-Length: 0\r\n\r\n" % option)
        assert answer == Answer(200, b"", reusable)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("Retry-After: 17", 17),
        ("retry-after:3600", 3600),
        ("Retry-After: soon", 0),
        ("Retry-After: 9999999", 0),
        ("A: b", 0),
    ],
)
def test_the_time_to_wait_is_read_from_a_number_of_seconds_only(header: str, seconds: int) -> None:
    answer = feed(f"HTTP/1.1 429 No\r\n{header}\r\nContent-Length: 0\r\n\r\n".encode())
    assert answer is not None and answer.retry_after_s == seconds


def test_a_request_head_is_http_1_1_with_a_host() -> None:
    assert request_head(b"/status", None, None) == b"GET /status HTTP/1.1\r\nHost: minikms\r\n\r\n"
    assert request_head(b"/encrypt", 2, "r-1") == (
        b"POST /encrypt HTTP/1.1\r\nHost: minikms\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\nx-request-id: r-1\r\n\r\n"
    )
