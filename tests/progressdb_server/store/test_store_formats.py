"""Keys, stamps and records: what is on the disk, byte by byte."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from progressdb_server.store import keyspace, local, record
from progressdb_server.store.keyspace import SEQUENCE_MAX, Clock, Stamp
from progressdb_server.store.model import FormatError, Message, json_text
from tests.progressdb_server.store.memory_engine import MemoryEngine

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
KEY_IDS = st.text(st.characters(codec="ascii"), max_size=40)
STAMPS = st.builds(Stamp, st.integers(1, 10**20 - 1), st.integers(0, SEQUENCE_MAX))


def test_keys_are_those_of_the_specification() -> None:
    stamp = Stamp(1_700_000_000_000_000_123, 7)
    assert keyspace.message_of(b"t1", stamp.raw) == b"thread:t1:msg:01700000000000000123-000007"
    assert keyspace.meta("t1") == b"thread:t1:meta"
    assert keyspace.key_map("t1") == b"kms:map:thread:t1"
    message = keyspace.message_id(stamp)
    assert message == "msg-1700000000000000123-000007"
    assert keyspace.versions(message) + stamp.text.encode() == (
        b"version:msg:msg-1700000000000000123-000007:01700000000000000123-000007"
    )


def test_a_record_is_the_bytes_of_the_specification() -> None:
    header = record.MessageHeader("k_0", "", "ann", False)
    assert (
        record.pack(header, b"SEALED")
        == bytes.fromhex("01000b" + "94" + "a36b5f30" + "a0" + "a3616e6e" + "c2") + b"SEALED"
    )
    thread = record.ThreadHeader("k_0", "ann", "s", 1, 0)
    assert record.pack(thread, b"") == bytes.fromhex("01000d" + "95" + "a36b5f30" + "a3616e6e" + "a173" + "01" + "00")
    later = record.LaterHeader("k_0", "s", "ann", True, "c")
    assert record.pack(later, b"") == bytes.fromhex("02000e" + "95" + "a36b5f30" + "a173" + "a3616e6e" + "c3" + "a163")


@given(TEXT, TEXT)
def test_no_character_of_an_id_reaches_another_key(one: str, two: str) -> None:
    assert keyspace.unpart(keyspace.part(one)) == one
    assert b":" not in keyspace.part(one)
    assert keyspace.part(one).isascii()
    if one != two:
        assert keyspace.part(one) != keyspace.part(two)
        assert not keyspace.messages(one).startswith(keyspace.messages(two))
        assert keyspace.writer(one, "a") != keyspace.writer(two, "a")


@given(TEXT)
def test_the_range_of_a_prefix_holds_its_keys_and_no_other_ids(thread: str) -> None:
    prefix = keyspace.order(thread)
    upper = keyspace.after(prefix)
    assert prefix <= prefix + b"\x7f" * 30 < upper
    for other in (thread + "0", thread + "~", thread + "\0", thread + ":", thread[:-1]):
        if other != thread:
            assert not prefix <= keyspace.order(other) < upper


@given(STAMPS, STAMPS)
def test_stamps_sort_as_their_text_does(one: Stamp, two: Stamp) -> None:
    assert (one < two) == (one.text < two.text)
    assert Stamp.parse(one.text) == one


@pytest.mark.parametrize(
    "text", ["", "1-1", "0" * 27, "0" * 20 + "-00000", "0" * 20 + "-00000٣", "+" + "0" * 19 + "-000000"]
)
def test_what_is_no_stamp_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a stamp"):
        Stamp.parse(text)


@given(st.one_of(TEXT, STAMPS.map(keyspace.message_id)))
def test_a_message_id_is_parsed_only_in_its_one_spelling(text: str) -> None:
    stamp = keyspace.parse_message_id(text)
    assert stamp is None or keyspace.message_id(stamp) == text


@given(st.lists(st.integers(0, 50), max_size=60))
def test_stamps_strictly_increase_whatever_the_system_clock_does(readings: list[int]) -> None:
    left = iter(readings)
    clock = Clock(lambda: next(left))
    clock.recover(Stamp(20, SEQUENCE_MAX - 1))
    stamps = [clock.next() for _ in readings]
    assert all(one < two for one, two in zip([Stamp(20, SEQUENCE_MAX - 1), *stamps], stamps, strict=False))
    assert all(stamp.seq <= SEQUENCE_MAX for stamp in stamps)


@given(KEY_IDS, TEXT, TEXT, st.booleans(), st.binary(max_size=60), KEY_IDS)
def test_records_read_back_and_rekeying_changes_the_key_alone(
    key_id: str, first: str, author: str, deleted: bool, sealed: bytes, new_key: str
) -> None:
    header = record.MessageHeader(key_id, first, author, deleted)
    raw = record.pack(header, sealed)
    assert record.unpack_message(raw) == (header, sealed)
    assert record.unpack_sealed(raw) == (key_id, sealed)
    head, rest = record.split(raw)
    assert (record.key_of(head), rest) == (key_id, sealed)
    again = record.rekey(raw[0], head, new_key) + b"other"
    assert record.unpack_message(again) == (record.MessageHeader(new_key, first, author, deleted), b"other")
    thread = record.ThreadHeader(key_id, author, first, 5, 6)
    assert record.unpack_thread(record.pack(thread, sealed)) == (thread, sealed)
    again = record.rekey(1, record.split(record.pack(thread, sealed))[0], new_key) + b"other"
    assert record.unpack_thread(again) == (record.ThreadHeader(new_key, author, first, 5, 6), b"other")
    later = record.LaterHeader(key_id, first, author, deleted, "c")
    raw = record.pack(later, sealed)
    assert record.unpack_message(raw) == (later, sealed)
    again = record.rekey(raw[0], record.split(raw)[0], new_key) + b"other"
    assert record.unpack_message(again) == (record.LaterHeader(new_key, first, author, deleted, "c"), b"other")
    with pytest.raises(record.RecordFormatError):
        record.unpack_thread(raw)


@given(st.binary(max_size=60))
@example(b"\x00\x06\x94\xa1\xff\xa0\xa0\xc2")  # a string that is no UTF-8
@example(b"\x07\xd0" + b"\x91" * 2000)  # nested too deeply
def test_other_bytes_are_refused_and_never_crash(raw: bytes) -> None:
    for read in (record.unpack_message, record.unpack_thread, record.unpack_sealed):
        length = max(0, len(raw) - 2).to_bytes(2, "big")
        for candidate in (raw, b"\x01" + raw, b"\x01" + length + raw, b"\x02" + raw, b"\x02" + length + raw):
            try:
                read(candidate)
            except record.RecordFormatError:
                continue
    with pytest.raises(record.RecordFormatError):
        record.unpack_message(b"\x03" + raw)


def test_a_header_that_is_not_the_one_that_was_sealed_is_refused() -> None:
    first = Stamp(20, 1)
    key = keyspace.messages("t") + first.raw
    message = Message(keyspace.message_id(first), "t", "ann", "user", 20, json_text("hi"), "", False, {})
    plaintext = record.message_secret(message, first.text)
    opened = record.open_message(record.MessageHeader("k", "", "ann", False), key, "t", first.text, plaintext)
    assert opened == (message, "", (0, 0))
    for header, stamp in [
        (record.MessageHeader("k", "", "bob", False), first),
        (record.MessageHeader("k", "", "ann", True), first),
        (record.MessageHeader("k", "", "ann", False), Stamp(20, 2)),
    ]:
        with pytest.raises(record.RecordFormatError):
            record.open_message(header, key, "t", stamp.text, plaintext)


def test_a_store_of_a_newer_format_is_refused_with_the_way_out() -> None:
    engine = MemoryEngine()
    local.claim(engine)
    local.claim(engine)
    engine.write([(keyspace.FORMAT, b'{"format":4}')])
    with pytest.raises(FormatError, match="format 4, this version reads format 3"):
        local.claim(engine)


def test_a_store_of_before_0_2_0_is_refused() -> None:
    for number in (1, 2):
        engine = MemoryEngine()
        engine.write([(keyspace.FORMAT, b'{"format":%d}' % number)])
        with pytest.raises(FormatError, match=r"^the store was made before version 0\.2\.0"):
            local.claim(engine)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format":3,"source":"\xff"}', b'{"x":' + b"[" * 20_000])
def test_a_damaged_format_record_is_refused_with_the_way_out(content: bytes) -> None:
    engine = MemoryEngine()
    engine.write([(keyspace.FORMAT, content)])
    with pytest.raises(FormatError, match="damaged: restore a backup"):
        local.check(engine)


def test_a_directory_that_holds_something_else_is_not_claimed() -> None:
    engine = MemoryEngine()
    engine.write([(b"foreign", b"1")])
    with pytest.raises(FormatError, match="something other"):
        local.claim(engine)
    with pytest.raises(FormatError, match="no ProgressDB store"):
        local.check(engine)
