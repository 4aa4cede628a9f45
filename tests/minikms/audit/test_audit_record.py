"""An event has one encoding, and a line contains nothing that needs an escape."""

import base64
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.audit import chain, record
from minikms.audit.record import Event, LineRef, MalformedLineError
from tests.minikms.audit.logmaker import KEY1

texts = st.text(max_size=20)
integers = st.integers(0, 2**63 - 1)


def events_of(text: st.SearchStrategy[str]) -> st.SearchStrategy[Event]:
    return st.builds(
        Event,
        type=text,
        actor=text,
        pid=integers,
        key_id=text,
        key_ids=st.lists(text, max_size=4),
        thread_id=text,
        count=integers,
        outcome=text,
        request_id=text,
        request_ids=st.lists(text, max_size=4),
        detail=text,
        facts=st.dictionaries(text, st.one_of(text, integers), max_size=4),
    )


events = events_of(texts)
clean_events = events_of(st.text(alphabet="abz019 ._-:/+={}[],'", max_size=20))


def line_of(event: Event) -> bytes:
    blob, _ = chain.make_lines([event], LineRef(0, record.ZERO_MAC), KEY1.mac_key, 1)
    assert blob.endswith(b"\n")
    return blob[:-1]


@given(events)
def test_whatever_an_event_holds_its_line_is_canonical(event: Event) -> None:
    parsed, event_bytes, sig = record.parse_line(line_of(event))
    assert record.encode_event(parsed) == event_bytes
    assert len(sig) == 32


@given(events)
def test_a_line_is_what_a_plain_json_encoder_writes(event: Event) -> None:
    """The member order of the struct, no spaces, nothing escaped: what docs/spec/audit.md says."""
    line = line_of(event)
    loaded = json.loads(line)
    assert json.dumps(loaded, separators=(",", ":"), ensure_ascii=False).encode() == line
    assert set(line) <= set(range(0x20, 0x7F)) - {0x5C}
    names = list(loaded["event"])
    assert names == [name for name in Event.__struct_fields__ if name in names]


@given(st.lists(clean_events, max_size=5), st.integers(1, 2**62))
def test_many_lines_made_at_once_have_the_bytes_of_lines_made_one_by_one(many: list[Event], ts: int) -> None:
    """The hot path against the plain one: the struct's encoder, `chain.mac`, `record.encode_line`."""
    blob, head = chain.make_lines(many, LineRef(7, bytes([7] * 32)), KEY1.mac_key, ts)
    expected, seq, sig = b"", 7, bytes([7] * 32)
    for event in many:
        seq += 1
        event_bytes = record.encode_event(msgspec.structs.replace(event, seq=seq, ts=ts))
        sig = chain.mac(KEY1.mac_key, sig, event_bytes)
        expected += record.encode_line(event_bytes, sig)
    assert (blob, head) == (expected, LineRef(seq, sig))


@given(st.text(max_size=60), st.text(max_size=60))
def test_escaping_keeps_different_texts_apart(one: str, other: str) -> None:
    escaped = record.escape(one, 10_000)
    assert (escaped == record.escape(other, 10_000)) == (one == other)
    assert record.is_clean(escaped.replace("%", "").encode())


def test_a_text_that_needs_no_escape_is_left_alone() -> None:
    assert record.escape("k_01jd/Az-._~:+= []{}'") == "k_01jd/Az-._~:+= []{}'"


def test_escapes_are_those_of_rfc_3986() -> None:
    assert record.escape('"\\%\n\x7fé') == "%22%5C%25%0A%7F%C3%A9"


def test_a_lone_surrogate_does_no_harm() -> None:
    record.parse_line(line_of(Event(type="x", actor="\ud800")))


def test_an_oversized_event_is_cut_and_not_refused() -> None:
    event = Event(
        type="encrypt_batch",
        actor="a" * 10_000_000,
        key_ids=["k" * 5000] * 5000,
        request_ids=["é" * 5000] * 5000,
        facts={f"{number:05}" + "n" * 5000: "v" * 5000 for number in range(200)},
    )
    line = line_of(event)
    assert len(line) < record.LINE_BYTES_MAX
    parsed, _, _ = record.parse_line(line)
    assert len(parsed.key_ids) == record.LIST_ITEMS_MAX
    assert len(parsed.facts) == record.FACTS_COUNT_MAX


def test_a_full_batch_with_long_ids_is_not_cut() -> None:
    event = Event(type="encrypt_batch", actor="peer_uid:1", key_ids=["k" * 128] * 1024, request_ids=["r" * 128] * 1024)
    parsed, _, _ = record.parse_line(line_of(event))
    assert parsed.request_ids == ["r" * 128] * 1024


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, True, None, ["x"]])
def test_a_fact_that_a_line_can_not_hold_becomes_text(value: object) -> None:
    event = Event(type="config_change", actor="minikms", facts={"bound": value})  # type: ignore[dict-item]  # the point
    record.text_facts(event)
    parsed, _, _ = record.parse_line(line_of(event))
    assert parsed.facts == {"bound": record.escape(str(value))}


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises(MalformedLineError):
        record.parse_line(data)


@given(st.binary(min_size=2, max_size=80))
def test_an_event_of_arbitrary_bytes_is_refused_and_never_crashes(data: bytes) -> None:
    with pytest.raises(MalformedLineError):
        record.parse_line(b'{"event":' + data + b',"sig":"' + base64.b64encode(bytes(32)) + b'"}')


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(MalformedLineError):
        record.parse_line(b'{"event":' + b"[" * 100_000 + b',"sig":"' + base64.b64encode(bytes(32)) + b'"}')


def test_a_seq_is_read_without_judging_the_line() -> None:
    assert record.peek_seq(b'{"event":{"seq":123,"ts":1') == 123
    for line in (b"", b'{"event":{"seq":', b'{"event":{"seq":12', b'{"event":{"seq":x,', b'{"event":{"seq":-1,'):
        assert record.peek_seq(line) == 0


def test_a_thread_id_is_hidden_by_a_keyed_mac() -> None:
    hidden = record.hash_thread_id("t1", KEY1.mac_key)
    assert hidden == record.hash_thread_id("t1", KEY1.mac_key)
    assert hidden.startswith("hmac-sha256:") and len(hidden) == 12 + 32
    assert hidden != record.hash_thread_id("t2", KEY1.mac_key)
    assert hidden != record.hash_thread_id("t1", memoryview(bytes(32)))
