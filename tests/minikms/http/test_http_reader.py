"""The receive side without a socket: bytes in, complete requests out, and nothing left in memory."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.http.limits import LIMITS, OVERLOADED, RefusedError
from minikms.http.reader import Phase, RequestReader, Shared
from tests.minikms.http.http_harness import Outcome, chunked, get, post, read_requests, request
from tests.minikms.http.http_inputs import ACCEPTED, REFUSED

SMALL = dataclasses.replace(LIMITS, receive_buffer_bytes=64)
"""A shared buffer of 64 bytes, so that nearly every request is carried over."""

TABLE = {**ACCEPTED, **{name: data for name, (data, _) in REFUSED.items() if len(data) < 1000}}


@pytest.mark.parametrize("name", TABLE)
def test_every_split_means_the_same(name: str) -> None:
    """Accepted or refused, in two parts split anywhere, or byte by byte: the requests before the end are the same."""
    data = get("/first") + TABLE[name]
    shared = Shared(SMALL)
    whole = read_requests(Shared(LIMITS), data)
    for offset in range(len(data)):
        assert read_requests(shared, data[:offset], data[offset:]) == whole
    assert read_requests(shared, *(bytes([byte]) for byte in data)) == whole


@given(
    bodies=st.lists(st.tuples(st.binary(max_size=300), st.booleans()), max_size=6),
    cuts=st.lists(st.integers(min_value=1, max_value=200), max_size=40),
)
def test_any_sequence_of_requests_survives_any_cuts(bodies: list[tuple[bytes, bool]], cuts: list[int]) -> None:
    data = b"".join(
        chunked("/c", *(body[i : i + 7] for i in range(0, len(body), 7))) if is_chunked else post("/p", body)
        for body, is_chunked in bodies
    )
    parts = []
    rest = data
    for cut in cuts:
        parts.append(rest[:cut])
        rest = rest[cut:]
    expected: Outcome = [("POST", "/c" if is_chunked else "/p", body) for body, is_chunked in bodies]
    assert read_requests(Shared(SMALL), *parts, rest) == [*expected, "done"]


def test_a_body_is_a_view_of_the_buffer_it_was_received_into() -> None:
    """No copy: writing into the buffer changes the body."""
    shared = Shared(LIMITS)
    reader = RequestReader(shared)
    data = post("/", b"secret")
    reader.room()[: len(data)] = data
    reader.received(len(data))
    parsed = reader.next()
    assert parsed is not None
    assert parsed[1].obj is shared.data
    shared.data[len(data) - 6] = ord("S")
    assert bytes(parsed[1]) == b"Secret"
    reader.discard()


def test_a_carried_buffer_is_zeroed_when_it_grows_and_after_use() -> None:
    """Every block that ever held a part of the body is zero at the end."""
    shared = Shared(SMALL)
    reader = RequestReader(shared)
    blocks: list[bytearray] = []
    data = memoryview(post("/", b"s" * 300_000))
    while data:
        room = reader.room()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        data = data[count:]
        reader.received(count)
        if isinstance(room.obj, bytearray) and not any(room.obj is block for block in blocks):
            blocks.append(room.obj)
        if (parsed := reader.next()) is not None:
            assert bytes(parsed[1]) == b"s" * 300_000
        reader.zero_used()
        assert shared.budget.bytes_held <= 300_000
    assert len(blocks) > 3
    assert not any(any(block) for block in blocks)
    assert not reader.holds_input


def test_an_announced_length_alone_takes_no_memory() -> None:
    """A peer that announces 16 MiB and sends ten bytes makes the engine hold 4 KiB, not 16 MiB."""
    shared = Shared(LIMITS)
    reader = RequestReader(shared)
    data = request("POST", "/", f"Content-Length: {LIMITS.body_bytes_max}") + b"x" * 10
    reader.room()[: len(data)] = data
    reader.received(len(data))
    assert reader.next() is None
    reader.zero_used()
    assert reader.phase is Phase.BODY
    assert shared.budget.bytes_held <= 4096
    reader.discard()


def test_the_phase_says_what_the_connection_waits_for() -> None:
    shared = Shared(LIMITS)
    reader = RequestReader(shared)
    phases = []
    for part in (b"GET", b" / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n", b"x", b"x"):
        reader.room()[: len(part)] = part
        reader.received(len(part))
        reader.next()
        reader.zero_used()
        phases.append(reader.phase)
    assert phases == [Phase.HEAD, Phase.BODY, Phase.BODY, Phase.IDLE]


def test_an_exhausted_budget_refuses_and_zeroes_everything() -> None:
    shared = Shared(dataclasses.replace(LIMITS, buffered_bytes_max=10_000))
    reader = RequestReader(shared)
    data = request("POST", "/", "Content-Length: 50000") + b"x" * 20_000
    reader.room()[: len(data)] = data
    reader.received(len(data))
    assert reader.next() is None
    with pytest.raises(RefusedError) as raised:
        reader.zero_used()
    assert raised.value.refusal is OVERLOADED
    reader.discard()
    assert not any(shared.view)
    assert shared.budget.bytes_held == 0


def test_waiting_input_is_kept_unchanged() -> None:
    """The caller may stop between two requests and get the rest later, unchanged and in order."""
    shared = Shared(LIMITS)
    reader = RequestReader(shared)
    data = post("/1", b"a") + post("/2", b"b") + post("/3", b"c" * 100)[:-1]
    reader.room()[: len(data)] = data
    reader.received(len(data))
    paths = []
    for _ in range(2):
        parsed = reader.next()
        assert parsed is not None
        paths.append(parsed[0].path)
        reader.zero_used()
    assert paths == ["/1", "/2"]
    assert reader.next() is None
    reader.zero_used()
    reader.room()[:1] = b"c"
    reader.received(1)
    parsed = reader.next()
    assert parsed is not None
    assert (parsed[0].path, bytes(parsed[1])) == ("/3", b"c" * 100)
    reader.discard()


def shortcut(reader: RequestReader, data: bytes) -> tuple[str, str, bytes] | None:
    """The result of `only_request` for `data`."""
    room = reader.room()
    room[: len(data)] = data
    only = reader.only_request(len(data))
    if only is None:
        return None
    head, body = only
    found = (head.method, head.path, bytes(body))
    body.release()
    return found


def the_long_way(reader: RequestReader, data: bytes) -> None:
    """One complete request from `next`, after which its head is cached."""
    reader.room()[: len(data)] = data
    reader.received(len(data))
    assert reader.next() is not None
    reader.zero_used()


ALIKE = (
    post("/aa", b"12345"),
    post("/aa", b"\r\n\r\n5"),
    post("/ab", b"12345"),  # another head as long
    post("/aa", b"1234567890"),  # another length
    post("/aa", b"123456789"),
    get("/aa"),
    get("/ab"),
)


@given(order=st.lists(st.sampled_from(ALIKE), max_size=12))
def test_the_shortcut_for_cached_heads_gives_the_same_requests(order: list[bytes]) -> None:
    shared = Shared(LIMITS)
    reader = RequestReader(shared)
    for data in ALIKE:
        the_long_way(reader, data)
    for data in order:
        assert [shortcut(reader, data)] == read_requests(Shared(LIMITS), data)[:-1]
    shared.wipe()
    assert not any(shared.data)


@pytest.mark.parametrize(
    "data", [ALIKE[0] + b"x", ALIKE[0] + ALIKE[0], ALIKE[0][:-1], ALIKE[0][:-5], b"POST", b"\r\n\r\n"]
)
def test_the_shortcut_returns_none_unless_one_cached_request_came(data: bytes) -> None:
    reader = RequestReader(Shared(LIMITS))
    the_long_way(reader, ALIKE[0])
    assert shortcut(reader, ALIKE[0]) is not None
    assert shortcut(reader, data) is None


def test_the_end_of_a_turn_zeroes_its_requests_up_to_the_longest() -> None:
    shared = Shared(LIMITS)
    reader = RequestReader(shared)
    long, short = ALIKE[3], ALIKE[0]
    for data in (long, short):
        the_long_way(reader, data)
        assert shortcut(reader, data) is not None
    assert any(shared.data)
    shared.wipe()
    assert not any(shared.data)
