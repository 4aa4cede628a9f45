"""The records of the tombstone file: what is read of a file, and where the record of a key is found."""

import pytest

from minikms.keys import tombstones
from minikms.keys.tombstones import (
    APPEND_RECORDS_MAX,
    HEADER,
    RECORD_BYTES,
    NumberedTombstone,
    Tombstone,
    TombstoneChain,
    TombstoneFormatError,
)

KEYRING_ID = "kr_00112233445566ff"
MAC_KEY = memoryview(bytes(range(32)))
STONES = [Tombstone(bytes([n]) * 16, 1000 + n) for n in range(1, 5)]


def records(*stones: Tombstone) -> tuple[TombstoneChain, bytes]:
    chain = TombstoneChain(KEYRING_ID)
    return chain, chain.append(MAC_KEY, stones)


def read(content: bytes, *, count: int, mac_key: memoryview | None = MAC_KEY) -> tombstones.ReadTombstones:
    chain, _ = records(*STONES[:count])
    return tombstones.read(content, keyring_id=KEYRING_ID, count=count, head=chain.head, mac_key=mac_key)


def test_the_record_of_each_key_is_found_and_of_no_other() -> None:
    _, content = records(*STONES)
    for number, stone in enumerate(STONES, 1):
        tag = content[number * RECORD_BYTES - 16 : number * RECORD_BYTES]
        assert tombstones.find(content, stone.key, 4) == NumberedTombstone(number, stone.unix_s, tag)
        assert tombstones.find(content[RECORD_BYTES:], stone.key, 4) == (
            None if number == 1 else NumberedTombstone(number, stone.unix_s, tag)
        )
    assert tombstones.find(content, bytes(16), 4) is None


def test_a_key_within_another_record_is_not_taken_for_its_own() -> None:
    """A time and a tag may have any bytes, also those of a key; here they also go on with it."""
    own = STONES[0].key + STONES[0].key[:8] + b"t" * 16
    other = b"other key".ljust(16) + STONES[0].key + STONES[0].key[:8]
    assert tombstones.find(own + other + other, STONES[0].key, 3) == NumberedTombstone(1, 0x0101010101010101, b"t" * 16)
    assert tombstones.find(other + other, STONES[0].key, 2) is None


def test_records_beyond_the_keyrings_count_are_adopted_under_the_key_alone() -> None:
    _, content = records(*STONES)
    file = HEADER + content
    assert read(file, count=1)[2:] == (3, 0)
    assert read(file, count=1, mac_key=None)[::2] == (file[: len(HEADER) + RECORD_BYTES], 0)
    assert read(file[:-1], count=1)[2:] == (2, RECORD_BYTES - 1)
    assert read(file, count=4).stones() == STONES


def test_what_one_append_can_leave_is_torn_and_more_is_refused() -> None:
    torn = RECORD_BYTES * APPEND_RECORDS_MAX
    assert read(HEADER + bytes(torn), count=0)[2:] == (0, torn)
    with pytest.raises(TombstoneFormatError, match="more bytes"):
        read(HEADER + bytes(torn + 1), count=0)
    assert read(HEADER[:-1], count=0)[2:] == (0, len(HEADER) - 1)
    with pytest.raises(TombstoneFormatError, match="not one of this program's files"):
        read(bytes(len(HEADER)), count=0)
    with pytest.raises(TombstoneFormatError, match="it has 1 records, and the keyring counts 2"):
        read(HEADER + records(*STONES)[1][: RECORD_BYTES + 1], count=2)
