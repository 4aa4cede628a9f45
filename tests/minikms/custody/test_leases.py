"""Use leases in the event loop: a use is taken only if its reservation is on disk."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.custody import lease_store
from minikms.custody.files import open_directory
from minikms.custody.lease_format import LEASE_USES_MAX, LEASE_USES_MIN, USES_MAX, encode_record
from minikms.custody.lease_store import LeaseStore
from minikms.custody.leases import GROWTH, REFILL_SHARE, ClosedLeases, KeyUses, Leases, UseLease
from minikms.errors import KeyExhaustedError, StorageUnavailableError
from tests.minikms.custody.disk_faults import failing_os, journal, key, quick_directory


class RecordingStore(LeaseStore):
    """The real store. It records what is reserved and in which thread, and can be blocked."""

    groups: list[list[tuple[bytes, int]]]
    threads: set[int]
    go: threading.Event
    directory: int

    def reserve(self, wanted: Sequence[tuple[bytes, int]]) -> list[int]:
        self.groups.append(list(wanted))
        self.threads.add(threading.get_ident())
        assert self.go.wait(60)
        return super().reserve(wanted)


Scenario = Callable[[Leases, RecordingStore], Awaitable[None]]


def run(path: Path, scenario: Scenario) -> RecordingStore:
    """One run of a daemon over the lease files in `path`."""
    directory = open_directory(path)
    store = RecordingStore.open(directory, create=True)
    assert isinstance(store, RecordingStore)
    store.groups, store.threads, store.go = [], set(), threading.Event()
    store.go.set()
    store.directory = directory

    async def main() -> None:
        with ThreadPoolExecutor(max_workers=1) as executor:
            leases = Leases(store, executor)
            await scenario(leases, store)
            await leases.drain()

    try:
        asyncio.run(main())
    finally:
        store.close()
        os.close(directory)
    return store


async def begun(store: RecordingStore, count: int = 1) -> None:
    while len(store.groups) < count:
        await asyncio.sleep(0.001)


def created(leases: Leases, number: int) -> UseLease:
    """The lease of a key that this run has made."""
    leases.granted_at_creation(key(number))
    return leases.get(key(number))


FIRST = LEASE_USES_MIN


def test_only_the_first_use_of_a_key_in_a_run_waits_for_a_lease(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = leases.get(key(1))
        assert not lease.covers(1)
        assert not lease.take()
        await leases.extend([(lease, 1)])
        assert lease.covers(FIRST)
        assert all(lease.take() for _ in range(50))
        assert lease.uses_left == FIRST - 50
        assert leases.uses(key(1)) == KeyUses(50, LEASE_USES_MAX + FIRST, exhausted=False)
        assert leases.get(key(1)) is lease

    store = run(tmp_path, scenario)
    assert store.groups == [[(key(1), FIRST)]]
    assert threading.get_ident() not in store.threads


def test_the_leases_of_an_open_key_grow_with_its_use(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = leases.get(key(1))
        for _ in range(8):
            await leases.extend([(lease, lease.uses_left + 1)])
            assert lease.take(lease.uses_left)

    sizes = [uses for [(_, uses)] in run(tmp_path, scenario).groups]
    assert sizes[:8] == [min(LEASE_USES_MAX, FIRST * GROWTH**step) for step in range(8)]
    assert sizes[7] == LEASE_USES_MAX


def test_a_key_created_in_this_run_has_its_first_lease_from_its_file(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = created(leases, 1)
        assert leases.get(key(1)) is lease
        assert lease.take(LEASE_USES_MAX // 2)
        assert leases.uses(lease.key) == KeyUses(LEASE_USES_MAX // 2, LEASE_USES_MAX, exhausted=False)

    async def next_run(leases: Leases, store: RecordingStore) -> None:
        lease = leases.get(key(1))
        assert not lease.take()
        await leases.extend([(lease, 1)])
        assert leases.uses(lease.key) == KeyUses(0, LEASE_USES_MAX + FIRST, exhausted=False)

    assert run(tmp_path, scenario).groups == []
    run(tmp_path, next_run)


def test_all_requests_of_a_turn_are_one_append(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        await asyncio.gather(*(leases.extend([(leases.get(key(number)), 1)]) for number in range(20)))
        await asyncio.gather(*(leases.extend([(leases.get(key(7)), 1)]) for _ in range(20)))

    store = run(tmp_path, scenario)
    assert store.groups == [[(key(number), FIRST) for number in range(20)]]


def test_requests_during_an_append_form_the_next_append_if_still_needed(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        store.go.clear()
        tasks = [asyncio.create_task(leases.extend([(leases.get(key(1)), 1)]))]
        await begun(store)
        for number in (1, 2, 3):
            tasks.append(asyncio.create_task(leases.extend([(leases.get(key(number)), 1)])))
            await asyncio.sleep(0)
        store.go.set()
        await asyncio.gather(*tasks)
        assert all(leases.get(key(number)).take() for number in (1, 2, 3))

    assert run(tmp_path, scenario).groups == [[(key(1), FIRST)], [(key(2), FIRST), (key(3), FIRST)]]


def test_every_waiter_of_a_turn_finds_its_uses_covered(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = leases.get(key(1))

        async def batch(uses: int) -> None:
            assert not lease.take(uses)
            await leases.extend([(lease, uses)])
            assert lease.take(uses)

        await asyncio.gather(*(batch(1024) for _ in range(300)))
        assert lease.uses_left >= LEASE_USES_MAX // 2

    store = run(tmp_path, scenario)
    [group] = store.groups
    assert sum(uses for _, uses in group) == 300 * 1024 + LEASE_USES_MAX, "and some for others"
    assert max(uses for _, uses in group) == LEASE_USES_MAX


def test_a_waiter_finds_its_uses_though_its_key_was_closed_meanwhile(tmp_path: Path) -> None:
    """The cache may have zeroed the key and opened it again: what was granted is with the key, not with the object."""

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        store.go.clear()
        lease = leases.get(key(1))
        waiting = asyncio.create_task(leases.extend([(lease, 40)]))
        await begun(store)
        lease.close()
        store.go.set()
        await waiting
        assert leases.get(key(1)) is not lease
        assert leases.get(key(1)).take(40)
        assert not lease.take()

    run(tmp_path, scenario)


def test_an_append_is_bounded_and_the_rest_is_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms.custody.leases.GROUP_RECORDS_MAX", 8)

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        await asyncio.gather(*(leases.extend([(leases.get(key(number)), 1)]) for number in range(10)))
        with pytest.raises(ValueError, match="append"):
            await leases.extend([(leases.get(key(number)), 1) for number in range(5)])

    assert [len(group) for group in run(tmp_path, scenario).groups] == [4, 4, 2]


def test_a_lease_is_extended_before_it_is_used_up(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = created(leases, 1)
        assert lease.take(LEASE_USES_MAX - LEASE_USES_MAX // REFILL_SHARE)
        await asyncio.sleep(0)
        await leases.drain()
        assert store.groups == []
        assert lease.take()
        assert lease.take(), "taking goes on while the extension is written"
        await leases.drain()
        assert store.groups == [[(key(1), LEASE_USES_MAX)]]
        assert lease.uses_left == LEASE_USES_MAX + LEASE_USES_MAX // REFILL_SHARE - 2

    run(tmp_path, scenario)


def test_a_failed_background_extension_is_requested_again_at_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = LEASE_USES_MAX // REFILL_SHARE

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = created(leases, 1)
        with failing_os(monkeypatch, "fsync"):
            lease.take(LEASE_USES_MAX - low + 1)
            await leases.drain()
            assert len(store.groups) == 1
            lease.take(low // 4)
            await leases.drain()
            assert len(store.groups) == 1
            lease.take(low // 2)
            await leases.drain()
            assert len(store.groups) == 2
        assert leases.uses(lease.key).reserved == LEASE_USES_MAX
        lease.take(lease.uses_left * 3 // 4)
        await leases.drain()
        assert lease.uses_left > LEASE_USES_MAX

    run(tmp_path, scenario)


@pytest.mark.parametrize("call", ["fsync", "pwrite", "fdatasync"])
def test_a_failing_disk_grants_nothing_and_all_waiters_get_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = leases.get(key(1))
        with failing_os(monkeypatch, call):
            results = await asyncio.gather(*(leases.extend([(lease, 1)]) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [StorageUnavailableError] * 3
        assert not lease.take()
        assert leases.uses(lease.key).reserved == LEASE_USES_MAX
        await leases.extend([(lease, 1)])
        assert lease.take()
        assert leases.status().write_failures == 1

    run(tmp_path, scenario)


def test_a_key_near_its_limit_encrypts_and_then_refuses(tmp_path: Path) -> None:
    journal(tmp_path, encode_record(key(2), USES_MAX - 10), encode_record(key(3), USES_MAX))

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        two, three, four = (leases.get(key(number)) for number in (2, 3, 4))
        await leases.extend([(two, 1), (three, 1), (four, 1)])
        assert three.covers(5), "waiting would not help"
        for _ in range(2):
            with pytest.raises(KeyExhaustedError):
                three.take()
        assert leases.uses(three.key) == KeyUses(0, USES_MAX, exhausted=True)
        assert two.take(9)
        await leases.drain()
        assert two.take(), "its last reserved use"
        with pytest.raises(KeyExhaustedError):
            two.take()
        assert four.take()

    run(tmp_path, scenario)


def test_a_key_of_before_a_restore_refuses_without_a_wait(tmp_path: Path, directory: int) -> None:
    store = LeaseStore.open(directory, create=True)
    store.exhaust(key(5))
    store.close()

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        with pytest.raises(KeyExhaustedError, match="restored"):
            leases.get(key(5)).take()
        assert leases.uses(key(5)).exhausted
        assert leases.get(key(5)).covers(10**9)
        assert not leases.get(key(6)).covers(1)

    assert run(tmp_path, scenario).groups == []


# --- keys that are not open -------------------------------------------------------------------------------------------


def test_a_key_that_is_opened_again_has_what_was_left_of_its_lease(tmp_path: Path) -> None:
    """No use is in two places: what one lease covers the other does not."""

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        old = leases.get(key(1))
        await leases.extend([(old, 1)])
        assert old.take(20)
        for _ in range(3):
            old.close()
            assert (old.uses_left, old.covers(1), old.take()) == (0, False, False)
            new = leases.get(key(1))
            assert new is not old
            assert new.take(1)
            old = new
        assert old.uses_left == FIRST - 23
        assert leases.uses(key(1)) == KeyUses(23, LEASE_USES_MAX + FIRST, exhausted=False)

    assert len(run(tmp_path, scenario).groups) == 1


def test_a_lease_that_is_closed_twice_gives_back_nothing_more(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        old = created(leases, 1)
        old.close()
        new = leases.get(key(1))
        old.close()
        assert new.uses_left == LEASE_USES_MAX
        assert leases.get(key(1)) is new

    run(tmp_path, scenario)


def test_keys_in_turn_beyond_the_kept_leases_waste_small_leases_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minikms.custody.leases.CLOSED_LEASES_KEPT", 10)
    rounds = 5

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        for _ in range(rounds):
            for number in range(100):
                lease = leases.get(key(number))
                if not lease.take():
                    await leases.extend([(lease, 1)])
                    assert lease.take()
                lease.close()
        assert max(leases.uses(key(number)).reserved for number in range(100)) == LEASE_USES_MAX + rounds * FIRST

    run(tmp_path, scenario)


def test_the_table_of_closed_leases_keeps_the_ones_that_were_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms.custody.leases.CLOSED_LEASES_KEPT", 100)
    table = ClosedLeases()
    for number in range(1000):
        table.put(key(number), number + 1, number)
        assert len(table) <= 200
    assert all(table.get(key(number)) == (number + 1, number) for number in range(900, 1000))
    assert table.pop(key(999)) == (1000, 999)
    assert table.pop(key(999)) == table.pop(key(1)) == (0, 0)


class ManyKeys:
    """Uses of many keys in turn, on real files, as the vault takes them."""

    def __init__(self, count: int, rounds: int) -> None:
        self.keys = [key(number + 1) for number in range(count)]
        self.rounds = rounds
        self.counts: list[int] = []

    async def __call__(self, leases: Leases, store: RecordingStore) -> None:
        for _ in range(self.rounds):
            for start in range(0, len(self.keys), 1000):
                chunk = [leases.get(one) for one in self.keys[start : start + 1000]]
                low = [(lease, 1) for lease in chunk if not lease.covers(1)]
                if low:
                    await leases.extend(low)
                for lease in chunk:
                    assert lease.take()
                    lease.close()
        self.counts = [leases.uses(one).reserved for one in self.keys]


def test_a_key_that_is_used_in_each_of_many_rounds_takes_few_small_leases(tmp_path: Path) -> None:
    """100 uses: one lease of 64, and then one of four times what was left of it when the key was opened."""
    many = ManyKeys(2000, 100)
    run(tmp_path, many)
    assert max(many.counts) <= LEASE_USES_MAX + 100 + 2 * FIRST
    assert min(many.counts) >= LEASE_USES_MAX + 100
    again = ManyKeys(2000, 1)
    run(tmp_path, again)
    assert max(again.counts) <= max(many.counts) + FIRST


@pytest.mark.torture
@pytest.mark.timeout(3000)
def test_a_million_keys_in_turn_take_few_small_leases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = ManyKeys(1_000_000, 100)
    run(tmp_path, many)
    with capsys.disabled():
        print(f"\n1,000,000 keys, 100 rounds: the count of a key is {min(many.counts):,} to {max(many.counts):,}")
    assert max(many.counts) <= LEASE_USES_MAX + 100 + 2 * FIRST


# --- merges, failures -------------------------------------------------------------------------------------------------


def test_a_long_journal_is_merged_after_its_callers_were_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_store, "JOURNAL_RECORDS_MERGE", 10)
    merging, go = threading.Event(), threading.Event()
    real = LeaseStore.merge

    def merge(store: LeaseStore) -> None:
        merging.set()
        assert go.wait(60)
        real(store)

    monkeypatch.setattr(LeaseStore, "merge", merge)

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        await leases.extend([(leases.get(key(number)), 1) for number in range(10)])
        while not merging.is_set():
            await asyncio.sleep(0.001)
        go.set()
        await leases.extend([(leases.get(key(10)), 1)])
        await leases.drain()
        assert (leases.status().snapshot_entries, leases.status().journal_records) == (10, 1)

    run(tmp_path, scenario)


def test_a_failed_merge_is_no_error_of_a_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_store, "JOURNAL_RECORDS_MERGE", 3)

    def merge(store: LeaseStore) -> None:
        raise StorageUnavailableError("no space")

    monkeypatch.setattr(LeaseStore, "merge", merge)

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        for number in range(5):
            await leases.extend([(leases.get(key(number)), 1)])
            assert leases.get(key(number)).take()

    run(tmp_path, scenario)


def test_a_defect_cancels_its_waiters_and_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[object] = []

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context["exception"]))
        with monkeypatch.context() as patch:
            patch.setattr(store, "reserve", lambda _wanted: 1 // 0)
            with pytest.raises(asyncio.CancelledError):
                await leases.extend([(leases.get(key(1)), 1)])
        await leases.extend([(leases.get(key(1)), 1)])

    run(tmp_path, scenario)
    assert [type(problem) for problem in problems] == [ZeroDivisionError], "and it is reported"


def test_a_cancelled_waiter_does_not_affect_others(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        store.go.clear()
        first = asyncio.create_task(leases.extend([(leases.get(key(1)), 1)]))
        second = asyncio.create_task(leases.extend([(leases.get(key(1)), 1)]))
        await begun(store)
        first.cancel()
        store.go.set()
        await second
        assert leases.get(key(1)).take()

    run(tmp_path, scenario)


def test_the_content_of_a_lease_is_not_a_key(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        assert repr(leases.get(key(1))) == "<UseLease 0 left>"

    run(tmp_path, scenario)


steps = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(1, 40_000),
        st.sampled_from(["take", "take", "extend", "fail", "close", "restart"]),
    ),
    max_size=30,
)


@given(steps)
@settings(max_examples=25)
def test_the_uses_taken_are_never_more_than_a_restart_would_count(moves: list[tuple[int, int, str]]) -> None:
    """Random uses, extensions, failing disks and restarts: at every moment, used <= counted on disk."""
    used = dict.fromkeys(range(4), 0)

    async def go(leases: Leases, store: RecordingStore) -> None:
        for number, _, _ in moves[:2]:
            if not used[number] and not leases.uses(key(number)).known:
                leases.granted_at_creation(key(number))
        while moves:
            number, uses, move = moves.pop(0)
            lease: UseLease = leases.get(key(number))
            if move == "restart":
                return
            if move == "close":
                lease.close()
            elif move == "take" and lease.take(uses):
                used[number] += uses
            elif move == "extend":
                await leases.extend([(lease, uses)])
                assert lease.take(uses)
                used[number] += uses
            elif move == "fail":
                with pytest.MonkeyPatch.context() as patch, failing_os(patch, "fdatasync"):
                    await leases.drain()
                    if not lease.covers(uses):
                        with pytest.raises(StorageUnavailableError):
                            await leases.extend([(lease, uses)])
            counted = LeaseStore.open(store.directory, create=False)
            for one, count in used.items():
                assert count <= counted.total(key(one))
            counted.close()

    moves = list(moves)
    with tempfile.TemporaryDirectory(dir=quick_directory()) as place:
        while moves:
            run(Path(place), go)
