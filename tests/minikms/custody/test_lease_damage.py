"""Torn, damaged and restored lease files: no count is ever too low."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.custody.lease_format import (
    BLOCK_BYTES,
    BLOCK_ENTRIES,
    DAMAGED_RECORDS_MAX,
    GROUP_RECORDS_MAX,
    HEADER_BYTES,
    KEY_LAST,
    LEASE_USES_MAX,
    RECORD_BYTES,
    SPENT_COUNT_MAX,
    STEPS_COUNT_MAX,
    USES_LIMIT,
    USES_MAX,
    Floors,
    SpentRange,
    encode_record,
    journal_header,
    parse_journal,
)
from minikms.custody.lease_store import JOURNAL_NAME, SNAPSHOT_NAME, LeaseStore
from minikms.errors import StartError
from tests.minikms.custody.disk_faults import flip, journal, key, reserve_leases

# --- torn and damaged journals ----------------------------------------------------------------------------------------


@given(st.integers(0, 40 * RECORD_BYTES))
@settings(max_examples=40)
def test_a_journal_cut_anywhere_keeps_every_whole_record(cut: int) -> None:
    records = [encode_record(key(number % 7), (number + 2) * LEASE_USES_MAX) for number in range(40)]
    read = parse_journal(journal_header() + b"".join(records)[:cut])
    assert bytes(read.image) == journal_header() + b"".join(records[: cut // RECORD_BYTES])
    assert read.torn_bytes == cut % RECORD_BYTES
    assert read.lost_leases == (1 if cut % RECORD_BYTES else 0)


@given(st.sets(st.integers(0, 39)), st.integers(0, 255))
@settings(max_examples=60)
def test_the_leases_counted_as_lost_cover_what_any_key_lacks(bad: set[int], bit: int) -> None:
    """A key's true count is at most what the good records say, plus a lease for each bad one."""
    rng = random.Random(bit)
    counts: dict[bytes, int] = {}
    content = bytearray(journal_header())
    for _ in range(40):
        one = key(rng.randrange(6))
        counts[one] = counts.get(one, LEASE_USES_MAX) + LEASE_USES_MAX
        content += encode_record(one, counts[one])
    for number in bad:
        content[HEADER_BYTES + number * RECORD_BYTES + bit // 8] ^= 1 << bit % 8
    read = parse_journal(bytes(content))
    last_good = max(set(range(40)) - bad, default=-1)
    assert read.damaged_records == sum(number < last_good for number in bad)
    assert (read.torn_bytes > 0) == (39 in bad)
    torn_records = read.torn_bytes // RECORD_BYTES
    for one, count in counts.items():
        assert count <= read.totals.get(one, LEASE_USES_MAX) + LEASE_USES_MAX * (read.damaged_records + torn_records)


def test_more_torn_bytes_than_one_append_are_damage() -> None:
    garbage = bytes(RECORD_BYTES * (GROUP_RECORDS_MAX + 3))
    assert parse_journal(journal_header() + garbage).lost_leases == 1 + 3


@pytest.mark.parametrize("tail", [b"\0", encode_record(key(1), 5)[:-1], bytes(32), b"\xff" * 100])
def test_after_a_torn_append_every_key_counts_one_lease_more_once(
    tmp_path: Path, opened: Callable[..., LeaseStore], tail: bytes
) -> None:
    journal(tmp_path, encode_record(key(1), 3 * LEASE_USES_MAX), tail)
    for lost in (1, 0):
        store = opened()
        assert store.status().lost_leases == lost
        assert [store.total(key(number)) for number in (1, 2)] == [4 * LEASE_USES_MAX, 2 * LEASE_USES_MAX]
    assert reserve_leases(store, [key(2)]) == [3 * LEASE_USES_MAX]


def test_each_damaged_record_adds_a_lease_to_every_key(tmp_path: Path, opened: Callable[..., LeaseStore]) -> None:
    records = [encode_record(key(number), 2 * LEASE_USES_MAX) for number in range(10)]
    journal(tmp_path, *records)
    for number in (2, 5):
        flip(tmp_path / JOURNAL_NAME, HEADER_BYTES + number * RECORD_BYTES + 20, 3)
    store = opened()
    assert store.status().lost_leases == 2
    assert store.total(key(0)) == 4 * LEASE_USES_MAX
    assert store.total(key(2)) == 3 * LEASE_USES_MAX
    assert opened().total(key(0)) == 4 * LEASE_USES_MAX


def test_a_journal_damaged_in_many_places_is_refused(tmp_path: Path, opened: Callable[..., LeaseStore]) -> None:
    good = encode_record(key(1), 2 * LEASE_USES_MAX)
    journal(tmp_path, *[bytes(RECORD_BYTES), good] * (DAMAGED_RECORDS_MAX + 1))
    with pytest.raises(StartError, match="damaged records"):
        opened()


# --- damaged snapshots ------------------------------------------------------------------------------------------------


def test_a_damaged_block_hides_only_its_own_keys_and_those_are_spent(
    tmp_path: Path, opened: Callable[..., LeaseStore]
) -> None:
    store = opened(create=True)
    keys = [key(number * 2) for number in range(BLOCK_ENTRIES * 3)]
    reserve_leases(store, keys)
    store.merge()
    flip(tmp_path / SNAPSHOT_NAME, BLOCK_BYTES + 1000)
    store = opened()
    damaged = set(keys[BLOCK_ENTRIES : 2 * BLOCK_ENTRIES])

    def check(store: LeaseStore) -> None:
        for one in keys:
            assert store.total(one) == (USES_MAX if one in damaged else 2 * LEASE_USES_MAX)
        between = key(BLOCK_ENTRIES * 2 + 1)
        assert store.total(between) == USES_MAX, "a key without an entry in that range may have lost it"

    check(store)
    assert reserve_leases(store, [keys[BLOCK_ENTRIES], keys[0]]) == [None, 3 * LEASE_USES_MAX]
    store.merge()
    assert store.total(keys[0]) == 3 * LEASE_USES_MAX
    keys.remove(keys[0])
    check(store)
    store = opened()
    check(store)
    store.merge()
    check(store)


def test_a_key_in_the_journal_needs_no_readable_block(tmp_path: Path, opened: Callable[..., LeaseStore]) -> None:
    store = opened(create=True)
    reserve_leases(store, [key(number) for number in range(10)])
    store.merge()
    reserve_leases(store, [key(3)])
    flip(tmp_path / SNAPSHOT_NAME, 30)
    store = opened()
    for _ in range(2):
        assert store.total(key(3)) == 3 * LEASE_USES_MAX
        assert store.total(key(4)) == USES_MAX
        store.merge()


def test_a_block_that_the_disk_cannot_read_counts_as_spent(
    opened: Callable[..., LeaseStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(create=True)
    reserve_leases(store, [key(1)])
    store.merge()

    def pread(*_: object) -> bytes:
        raise OSError(errno.EIO, "")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        assert store.total(key(1)) == USES_MAX
        assert reserve_leases(store, [key(1)]) == [None]
    assert store.total(key(1)) == 2 * LEASE_USES_MAX


# --- floors -----------------------------------------------------------------------------------------------------------

small_keys = st.integers(0, 30).map(key)


@given(st.lists(st.tuples(small_keys, st.integers(0, 100)), max_size=12))
def test_steps_add_up_for_each_key_that_they_cover(penalties: list[tuple[bytes, int]]) -> None:
    floors = Floors()
    for last, uses in penalties:
        floors = floors.with_uses_added(last, uses)
    for number in range(32):
        assert floors.added_uses(key(number)) == sum(uses for last, uses in penalties if key(number) <= last)


@given(st.lists(st.tuples(st.integers(0, 10**6).map(key), st.integers(0, 100)), min_size=60, max_size=90))
@settings(max_examples=20)
def test_too_many_steps_are_never_counted_too_low(penalties: list[tuple[bytes, int]]) -> None:
    floors = Floors()
    for last, uses in penalties:
        floors = floors.with_uses_added(last, uses)
    assert len(floors.steps) <= STEPS_COUNT_MAX
    for probe in {last for last, _ in penalties}:
        assert floors.added_uses(probe) >= sum(uses for last, uses in penalties if probe <= last)


@given(st.lists(st.tuples(small_keys, small_keys).map(lambda pair: SpentRange(*sorted(pair))), max_size=60))
def test_spent_ranges_stay_spent_and_bounded(ranges: list[SpentRange]) -> None:
    floors = Floors().with_spent(ranges[:30]).with_spent(ranges[30:])
    assert len(floors.spent) <= SPENT_COUNT_MAX
    for number in range(31):
        if any(one.first <= key(number) <= one.last for one in ranges):
            assert floors.is_spent(key(number))


def test_after_a_restore_older_keys_only_decrypt_and_newer_encrypt(
    opened: Callable[..., LeaseStore],
) -> None:
    """For good: neither a merge nor a later restore of an older archive ends it."""
    store = opened(create=True)
    reserve_leases(store, [key(5), key(11)])
    store.exhaust(key(10))
    for _ in range(2):
        assert [store.total(key(number)) for number in (0, 5, 10)] == [USES_MAX] * 3
        assert store.is_exhausted(key(10))
        assert not store.is_exhausted(key(11))
        assert reserve_leases(store, [key(5), key(10), key(12)])[:2] == [None, None]
        store.merge()
        store.exhaust(key(3))
        store = opened()
    assert store.exhausted == key(10)
    assert store.total(key(11)) == 2 * LEASE_USES_MAX


def test_many_restores_do_not_use_up_the_keys_that_are_made_between_them(opened: Callable[..., LeaseStore]) -> None:
    store = opened(create=True)
    for number in range(1, 20):
        store.exhaust(key(number))
        assert store.total(key(number + 1)) == LEASE_USES_MAX


def test_uses_added_never_pass_what_the_file_can_hold() -> None:
    floors = Floors()
    for _ in range(10):
        floors = floors.with_uses_added(KEY_LAST, 1 << 30)
    assert floors.added_uses(key(1)) == USES_LIMIT
