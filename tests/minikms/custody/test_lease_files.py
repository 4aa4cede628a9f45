"""The lease files: counts only grow, are durable before they are returned, and stay within the limit."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from minikms.custody import lease_format, lease_store
from minikms.custody.lease_format import (
    BLOCK_BYTES,
    BLOCK_ENTRIES,
    DAMAGED_RECORDS_MAX,
    GROUP_RECORDS_MAX,
    LEASE_USES_MAX,
    USES_LIMIT,
    USES_MAX,
    Snapshot,
    encode_record,
    journal_header,
)
from minikms.custody.lease_store import JOURNAL_NAME, SNAPSHOT_NAME, LeaseStore
from minikms.errors import StartError, StorageUnavailableError
from tests.minikms.custody.disk_faults import failing_os, flip, journal, key, reserve_leases

# --- counts -----------------------------------------------------------------------------------------------------------


def test_a_key_without_a_record_counts_as_one_lease(opened: Callable[..., LeaseStore]) -> None:
    assert opened(create=True).total(key(1)) == LEASE_USES_MAX


def test_each_reservation_adds_a_lease_and_is_there_after_a_restart(opened: Callable[..., LeaseStore]) -> None:
    store = opened(create=True)
    assert reserve_leases(store, [key(1), key(2)]) == [2 * LEASE_USES_MAX] * 2
    assert reserve_leases(store, [key(1)]) == [3 * LEASE_USES_MAX]
    store = opened()
    assert [store.total(key(number)) for number in (1, 2, 3)] == [
        3 * LEASE_USES_MAX,
        2 * LEASE_USES_MAX,
        LEASE_USES_MAX,
    ]


def test_a_key_may_occur_twice_in_one_reservation(opened: Callable[..., LeaseStore]) -> None:
    assert reserve_leases(opened(create=True), [key(1), key(1)]) == [2 * LEASE_USES_MAX, 3 * LEASE_USES_MAX]
    assert opened().total(key(1)) == 3 * LEASE_USES_MAX


def test_a_reservation_beyond_the_limit_is_refused_for_its_key_only(
    tmp_path: Path, opened: Callable[..., LeaseStore]
) -> None:
    journal(tmp_path, encode_record(key(1), USES_MAX - LEASE_USES_MAX), encode_record(key(2), USES_MAX))
    store = opened()
    assert reserve_leases(store, [key(2), key(1), key(1), key(3)]) == [None, USES_MAX, None, 2 * LEASE_USES_MAX]
    assert store.total(key(1)) == USES_MAX < USES_LIMIT
    assert reserve_leases(opened(), [key(1)]) == [None]


def test_a_reservation_for_spent_keys_only_writes_nothing(tmp_path: Path, opened: Callable[..., LeaseStore]) -> None:
    journal(tmp_path, encode_record(key(1), USES_MAX))
    store = opened()
    before = (tmp_path / JOURNAL_NAME).stat()
    assert reserve_leases(store, [key(1)] * 3) == [None] * 3
    assert (tmp_path / JOURNAL_NAME).stat().st_mtime_ns == before.st_mtime_ns


def test_a_reservation_is_bounded(opened: Callable[..., LeaseStore]) -> None:
    store = opened(create=True)
    with pytest.raises(ValueError, match="append"):
        reserve_leases(store, [key(1)] * (GROUP_RECORDS_MAX + 1))
    for uses in (0, -1, LEASE_USES_MAX + 1):
        with pytest.raises(ValueError, match="size"):
            store.reserve([(key(1), uses)])


def test_a_merge_changes_no_count_and_empties_the_journal(tmp_path: Path, opened: Callable[..., LeaseStore]) -> None:
    store = opened(create=True)
    keys = [key(number * 7) for number in range(BLOCK_ENTRIES * 3 + 1)]
    random.Random(1).shuffle(keys)
    reserve_leases(store, keys)
    reserve_leases(store, keys[:50])
    expected = {one: store.total(one) for one in keys}
    for _ in range(2):
        store.merge()
        assert store.status().journal_records == 0
        assert store.status().snapshot_entries == len(keys)
        assert {one: store.total(one) for one in keys} == expected
        store = opened()
        assert {one: store.total(one) for one in keys} == expected
    assert (tmp_path / JOURNAL_NAME).read_bytes() == journal_header()
    assert reserve_leases(store, keys[:1]) == [expected[keys[0]] + LEASE_USES_MAX]
    assert [store.total(key(number)) for number in (1, 8, 10**6)] == [LEASE_USES_MAX] * 3


def test_an_old_journal_over_a_new_snapshot_changes_no_count(tmp_path: Path, opened: Callable[..., LeaseStore]) -> None:
    store = opened(create=True)
    reserve_leases(store, [key(1), key(1), key(2)])
    old_journal = (tmp_path / JOURNAL_NAME).read_bytes()
    reserve_leases(store, [key(1)])
    store.merge()
    (tmp_path / JOURNAL_NAME).write_bytes(old_journal)
    store = opened()
    for _ in range(2):
        assert [store.total(key(number)) for number in (1, 2)] == [4 * LEASE_USES_MAX, 2 * LEASE_USES_MAX]
        store.merge()
    assert reserve_leases(store, [key(1)]) == [5 * LEASE_USES_MAX]


def test_of_two_records_of_a_key_the_larger_holds(tmp_path: Path, opened: Callable[..., LeaseStore]) -> None:
    journal(tmp_path, *(encode_record(key(1), count * LEASE_USES_MAX) for count in (5, 3, 4)))
    assert opened().total(key(1)) == 5 * LEASE_USES_MAX


def test_a_long_journal_is_due_for_a_merge(opened: Callable[..., LeaseStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_store, "JOURNAL_RECORDS_MERGE", 10)
    store = opened(create=True)
    reserve_leases(store, [key(number) for number in range(9)])
    due = [store.merge_due]
    reserve_leases(store, [key(9)])
    due.append(store.merge_due)
    store.merge()
    assert [*due, store.merge_due] == [False, True, False]


def test_a_journal_that_cannot_be_merged_is_bounded(
    opened: Callable[..., LeaseStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_store, "JOURNAL_RECORDS_MAX", 10)
    store = opened(create=True)
    reserve_leases(store, [key(number) for number in range(10)])

    def refuse(directory: int, name: str, chunks: Iterable[bytes]) -> None:
        raise StorageUnavailableError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(lease_store, "replace_file_from", refuse)
        with pytest.raises(StorageUnavailableError, match="no space"):
            reserve_leases(store, [key(1)])
    assert store.total(key(1)) == 2 * LEASE_USES_MAX
    assert reserve_leases(store, [key(1)]) == [3 * LEASE_USES_MAX], "merged by itself, once there is space"


# --- first start, loss, foreign files ---------------------------------------------------------------------------------


def test_a_missing_journal_is_created_on_the_first_start_only(
    tmp_path: Path, opened: Callable[..., LeaseStore]
) -> None:
    with pytest.raises(StartError, match="kms-leases in the data directory is missing"):
        opened()
    opened(create=True)
    opened(create=True)
    opened()


def test_a_snapshot_without_its_journal_is_refused_even_on_a_first_start(
    tmp_path: Path, opened: Callable[..., LeaseStore]
) -> None:
    opened(create=True).merge()
    (tmp_path / JOURNAL_NAME).unlink()
    with pytest.raises(StartError, match="missing"):
        opened(create=True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged or is not one"),
        (b"{}", "damaged or is not one"),
        (journal_header()[:-1], "damaged or is not one"),
        (b"x" + journal_header()[1:], "damaged or is not one"),
        (journal_header()[:16] + b"\0\0\0\3" + journal_header()[20:], "another version"),
        (journal_header()[:24] + bytes(8), "damaged or is not one"),
    ],
)
def test_a_foreign_journal_is_refused(
    tmp_path: Path, opened: Callable[..., LeaseStore], content: bytes, reason: str
) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(content)
    with pytest.raises(StartError, match=reason) as refused:
        opened()
    assert str(tmp_path) not in str(refused.value)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == content


def test_a_damaged_footer_or_index_is_refused(tmp_path: Path, opened: Callable[..., LeaseStore]) -> None:
    store = opened(create=True)
    reserve_leases(store, [key(number) for number in range(400)])
    store.merge()
    store.close()
    good = (tmp_path / SNAPSHOT_NAME).read_bytes()
    size = len(good)
    assert size == 3 * BLOCK_BYTES + 3 * 16 + BLOCK_BYTES
    for offset in (
        size - 1,
        size - BLOCK_BYTES,
        size - BLOCK_BYTES + 60,
        size - BLOCK_BYTES - 1,
        size - BLOCK_BYTES - 48,
    ):
        (tmp_path / SNAPSHOT_NAME).write_bytes(good)
        flip(tmp_path / SNAPSHOT_NAME, offset)
        with pytest.raises(StartError, match="snapshot"):
            opened()
    for content in (good[:-1], good[1:], good[BLOCK_BYTES:], good + good[-BLOCK_BYTES:], b"", good[:100]):
        (tmp_path / SNAPSHOT_NAME).write_bytes(content)
        with pytest.raises(StartError, match="snapshot"):
            opened()
    newer = bytearray(good)
    newer[size - BLOCK_BYTES + 19] = 3
    (tmp_path / SNAPSHOT_NAME).write_bytes(newer)
    with pytest.raises(StartError, match="another version"):
        opened()


def test_after_a_rebuild_existing_keys_are_spent_and_newer_ones_are_not(
    tmp_path: Path, directory: int, opened: Callable[..., LeaseStore]
) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(b"garbage")
    (tmp_path / SNAPSHOT_NAME).write_bytes(b"garbage")
    LeaseStore.rebuild(directory, key(100))
    for _ in range(2):
        store = opened()
        assert reserve_leases(store, [key(0), key(100), key(101)])[:2] == [None, None]
        assert store.total(key(100)) == USES_MAX
        assert store.total(key(101)) < USES_MAX
        store.merge()


# --- failing disks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "write", "fsync", "rename", "open"])
def test_a_failed_write_reserves_nothing_and_the_next_one_recovers(
    tmp_path: Path, opened: Callable[..., LeaseStore], monkeypatch: pytest.MonkeyPatch, begun: bool, call: str
) -> None:
    store = opened(create=True)
    expected = LEASE_USES_MAX
    if begun:
        assert reserve_leases(store, [key(1)]) == [2 * LEASE_USES_MAX]
        expected += LEASE_USES_MAX
        if call in {"write", "fsync", "rename", "open"}:
            # Only a fresh journal file makes these calls: a failed append comes first.
            with failing_os(monkeypatch, "fdatasync"), pytest.raises(StorageUnavailableError):
                reserve_leases(store, [key(1)])
    for _ in range(3):
        with failing_os(monkeypatch, call), pytest.raises(StorageUnavailableError):
            reserve_leases(store, [key(1), key(2)])
        assert store.total(key(1)) == expected
        assert store.total(key(2)) == LEASE_USES_MAX
    assert store.status().write_failures >= 3
    assert reserve_leases(store, [key(1)]) == [expected + LEASE_USES_MAX]
    assert opened().total(key(1)) == expected + LEASE_USES_MAX
    assert sorted(path.name for path in tmp_path.iterdir()) == [JOURNAL_NAME]


def test_a_half_written_append_is_not_in_the_next_file(
    opened: Callable[..., LeaseStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(create=True)
    reserve_leases(store, [key(1)])
    real = os.pwrite

    def half(fd: int, data: memoryview, offset: int) -> int:
        real(fd, data[:40], offset)
        raise OSError(errno.ENOSPC, "")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        with pytest.raises(StorageUnavailableError):
            reserve_leases(store, [key(1), key(2), key(3)])
    reserve_leases(store, [key(3)])
    store = opened()
    assert store.status().lost_leases == 0
    assert [store.total(key(number)) for number in (1, 2, 3)] == [
        2 * LEASE_USES_MAX,
        LEASE_USES_MAX,
        2 * LEASE_USES_MAX,
    ]


def test_after_a_failed_sync_the_journal_is_another_file(
    tmp_path: Path, opened: Callable[..., LeaseStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(create=True)
    reserve_leases(store, [key(1)])
    before = (tmp_path / JOURNAL_NAME).stat().st_ino
    reserve_leases(store, [key(1)])
    assert (tmp_path / JOURNAL_NAME).stat().st_ino == before
    with failing_os(monkeypatch, "fdatasync", number=errno.EIO), pytest.raises(StorageUnavailableError):
        reserve_leases(store, [key(1)])
    reserve_leases(store, [key(1)])
    assert (tmp_path / JOURNAL_NAME).stat().st_ino != before


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_merge_loses_nothing_and_is_not_tried_again_at_once(
    tmp_path: Path,
    opened: Callable[..., LeaseStore],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    at: int,
) -> None:
    monkeypatch.setattr(lease_store, "JOURNAL_RECORDS_MERGE", 10)
    monkeypatch.setattr(lease_store, "MERGE_RETRY_RECORDS", 2)
    store = opened(create=True)
    keys = [key(number) for number in range(10)]
    reserve_leases(store, keys)
    due = [store.merge_due]
    with failing_os(monkeypatch, call, at=at), pytest.raises(StorageUnavailableError):
        store.merge()
    assert store.status().merge_failures == 1
    due.append(store.merge_due)
    assert [store.total(one) for one in keys] == [2 * LEASE_USES_MAX] * 10
    reserve_leases(store, keys[:2])
    assert [*due, store.merge_due] == [True, False, True]
    store.merge()
    store = opened()
    assert [store.total(one) for one in keys] == [3 * LEASE_USES_MAX] * 2 + [2 * LEASE_USES_MAX] * 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [JOURNAL_NAME, SNAPSHOT_NAME]


def test_the_constants_hold_together() -> None:
    assert USES_MAX + 16 * LEASE_USES_MAX == USES_LIMIT == 2**32
    assert DAMAGED_RECORDS_MAX * LEASE_USES_MAX <= 2**22
    assert lease_format.GROUP_RECORDS_MAX >= 2 * 1024, "a batch of distinct keys is one append"


# --- two threads ----------------------------------------------------------------------------------------------------


class Disturbed(Snapshot):
    """Each time the last block is read, another thread puts its own block there."""

    kept: tuple[int, bytes] = (-1, b"")
    others: tuple[int, bytes] = (-1, b"")

    @property
    def recent(self) -> tuple[int, bytes]:
        found, self.kept = self.kept, self.others
        return found

    @recent.setter
    def recent(self, value: tuple[int, bytes]) -> None:
        self.kept = value


def test_parallel_lookups_of_counts_do_not_mix_their_blocks(opened: Callable[..., LeaseStore], tmp_path: Path) -> None:
    """A listing and a reservation run in parallel. A count that is not found is too low, and a lease would be
    forgotten.
    """
    store = opened(create=True)
    keys = [key(number) for number in range(2 * BLOCK_ENTRIES)]
    reserve_leases(store, keys)
    store.merge()
    snapshot = Disturbed(os.open(tmp_path / SNAPSHOT_NAME, os.O_RDONLY))
    try:
        assert len(snapshot) == 2
        snapshot.others = (1, snapshot.block(1))
        snapshot.recent = (0, snapshot.block(0))
        assert snapshot.find(keys[0]) == 2 * LEASE_USES_MAX
    finally:
        snapshot.close()
