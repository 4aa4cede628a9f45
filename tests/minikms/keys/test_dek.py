"""A DEK's file: which files parse, what binds them to their key, and what damage does."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.api.errors import ConflictError, KeyUnreadableError
from minikms.crypto.aead import XaesCipher
from minikms.keys import dek
from minikms.keys.dek import DekRecord

KEY_ID = "k_01jd0000000000000000000000"
OTHER_ID = "k_01jd0000000000000000000001"
AT = "2026-11-24T15:00:00Z"
KEK = memoryview(bytes(range(32)))
OTHER_KEK = memoryview(bytes(range(1, 33)))
DEK = memoryview(bytes(range(64, 96)))
NONCE = bytes(24)


def made(key_id: str = KEY_ID, thread_id: str = "t1", kek_version: int = 1) -> DekRecord:
    return dek.new(
        key_id=key_id,
        thread_id=thread_id,
        purpose="thread",
        created_at=AT,
        kek=XaesCipher(KEK),
        kek_version=kek_version,
        dek=DEK,
        nonce=NONCE,
    )


def unwrapped(record: DekRecord, kek: memoryview = KEK) -> bytes:
    target = memoryview(bytearray(32))
    dek.unwrap_into(record, XaesCipher(kek), target)
    return bytes(target)


def test_a_key_that_was_wrapped_unwraps_from_its_file() -> None:
    record = dek.parse(dek.encode(made()), KEY_ID)
    assert record == made()
    assert unwrapped(record) == bytes(DEK)


@pytest.mark.parametrize(
    "change",
    [
        {"thread_id": "t2"},
        {"purpose": "data"},
        {"kek_version": 2},
        {"number": 1},
        {"id": OTHER_ID},
        {"wrapped": made().wrapped[:-1] + b"\0"},
        {"wrapped": made().wrapped[:-1]},
        {"wrapped": b""},
    ],
)
def test_a_file_whose_fields_were_changed_or_swapped_does_not_unwrap(change: dict[str, Any]) -> None:
    with pytest.raises(KeyUnreadableError, match="does not unwrap"):
        unwrapped(msgspec.structs.replace(made(), **change))


def test_a_key_of_another_installation_does_not_unwrap() -> None:
    with pytest.raises(KeyUnreadableError, match="another installation"):
        unwrapped(made(), OTHER_KEK)


def rewrapper(*slots: memoryview) -> dek.Rewrapper:
    key, again = slots or (memoryview(bytearray(32)) for _ in range(2))
    return dek.Rewrapper(lambda version: XaesCipher({1: KEK, 2: OTHER_KEK}[version]), 2, key=key, again=again)


@pytest.mark.parametrize("change", [{"thread_id": "t2"}, {"kek_version": 2}, {"wrapped": made().wrapped[:-1]}])
def test_a_file_that_does_not_unwrap_is_not_rewrapped(change: dict[str, Any]) -> None:
    with pytest.raises(KeyUnreadableError, match="does not unwrap"):
        rewrapper().rewrap(msgspec.structs.replace(made(), **change), bytes(24))


def test_a_rewrap_changes_the_version_by_one_the_kek_and_nothing_else() -> None:
    before = dek.retired(made(), at=AT, replaced_by=OTHER_ID)
    key, again = (memoryview(bytearray(32)) for _ in range(2))
    with rewrapper(key, again) as opened:
        after = opened.rewrap(before, bytes(24))
        assert bytes(key) == bytes(again) == bytes(DEK)
    assert not any((*key, *again)), "a slot keeps the key after the block"
    assert unwrapped(after, OTHER_KEK) == bytes(DEK)
    assert (after.version, after.kek_version) == (before.version + 1, 2)
    assert msgspec.structs.replace(after, version=before.version, kek_version=1, wrapped=before.wrapped) == before


def test_a_key_is_retired_once() -> None:
    retired = dek.retired(made(), at=AT, replaced_by=OTHER_ID)
    assert (retired.state, retired.retired_at, retired.replaced_by) == ("retired", AT, OTHER_ID)
    assert retired.version == made().version + 1
    assert unwrapped(retired) == bytes(DEK)
    with pytest.raises(ConflictError):
        dek.retired(retired, at=AT)


def altered(**changes: Any) -> bytes:
    return json.dumps(json.loads(dek.encode(made())) | changes).encode().ljust(dek.FILE_BYTES)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 2}, "format version 2"),
        ({"id": OTHER_ID}, "another key's record"),
        ({"algorithm": "AES-128-CBC"}, "has an invalid"),
        ({"version": 0}, "has an invalid"),
        ({"version": 2**40}, "has an invalid"),
        ({"number": -1}, "has an invalid"),
        ({"number": 2**31}, "has an invalid"),
        ({"kek_version": 0}, "has an invalid"),
        ({"kek_version": -1}, "has an invalid"),
        ({"kek_version": 2**63}, "damaged|has an invalid"),
        ({"state": "destroyed"}, "has an invalid"),
        ({"state": "retired"}, "has an invalid"),
        ({"state": "active", "retired_at": AT}, "has an invalid"),
        ({"state": "retired", "retired_at": "yesterday"}, "has an invalid"),
        ({"created_at": "x" * 100}, "has an invalid"),
        ({"replaces": "../../etc/passwd"}, "invalid key id"),
        ({"replaced_by": "k_"}, "invalid key id"),
        ({"thread_id": ""}, "invalid thread id"),
        ({"thread_id": "a/b"}, "invalid thread id"),
        ({"state": "sleeping"}, "damaged"),
        ({"wrapped": "!"}, "damaged"),
        ({"secret": 1}, "damaged or of an unknown format version"),
    ],
)
def test_an_invalid_record_is_refused_with_the_reason(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(KeyUnreadableError, match=why):
        dek.parse(altered(**changes), KEY_ID)


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"\xff\xfe", b"[" * 20_000, b'{"id":'])
def test_bytes_that_are_not_a_record_are_damaged(data: bytes) -> None:
    with pytest.raises(KeyUnreadableError, match=f"{KEY_ID} is damaged"):
        dek.parse(data, KEY_ID)


def test_a_file_of_another_length_is_damaged() -> None:
    for data in (dek.encode(made()) + b" ", dek.encode(made())[:-1]):
        with pytest.raises(KeyUnreadableError, match="bytes in place of 1,024"):
            dek.parse(data, KEY_ID)


RECORDS = st.builds(
    DekRecord,
    id=st.just(KEY_ID),
    created_at=st.just(AT),
    wrapped=st.binary(max_size=80),
    thread_id=st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True),
    format=st.just(1),
    version=st.integers(1, dek.VERSION_MAX - 1),
    kek_version=st.integers(1, 2**32 - 1),
    purpose=st.sampled_from(["thread", "data"]),
    algorithm=st.just("XAES-256-GCM"),
    state=st.just("active"),
    replaces=st.sampled_from(["", OTHER_ID]),
    replaced_by=st.sampled_from(["", OTHER_ID]),
    number=st.sampled_from([0, 1, dek.NUMBER_MAX - 1]),
)


@given(RECORDS, st.booleans())
def test_every_record_comes_back_from_its_file(record: DekRecord, retire: bool) -> None:
    if retire:
        record = msgspec.structs.replace(record, state="retired", retired_at=AT)
    data = dek.encode(record)
    assert dek.parse(data, KEY_ID) == record
    assert len(data) == dek.FILE_BYTES


def test_the_longest_record_fits_the_length_of_every_file() -> None:
    longest = msgspec.structs.replace(
        made(thread_id="t" * 128, kek_version=2**32 - 1),
        state="retired",
        version=dek.VERSION_MAX - 1,
        retired_at=AT,
        replaces=OTHER_ID,
        replaced_by=OTHER_ID,
        number=dek.NUMBER_MAX - 1,
    )
    assert len(dek.encode(longest)) == dek.FILE_BYTES
    assert dek.parse(dek.encode(longest), KEY_ID) == longest


@given(st.data())
@settings(max_examples=300)
def test_a_damaged_file_never_unwraps_to_another_key(data: st.DataObject) -> None:
    """It is refused, or the damage is outside the key, for example in the time of creation."""
    blob = bytearray(dek.encode(made()))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(blob)))
    for candidate in (bytes(blob), bytes(blob[:cut])):
        try:
            key = unwrapped(dek.parse(candidate, KEY_ID))
        except KeyUnreadableError as refused:
            assert bytes(DEK).hex() not in str(refused)
        else:
            assert key == bytes(DEK)
