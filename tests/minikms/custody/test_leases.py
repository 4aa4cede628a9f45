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
from minikms.custody.lease_format import LEASE_USES, USES_MAX, USES_WARN, encode_record
from minikms.custody.lease_store import LeaseStore
from minikms.custody.leases import REFILL_USES, Leases, UseLease
from minikms.errors import KeyExhaustedError, StorageUnavailableError
from tests.minikms.custody.disk_faults import failing_os, journal, key, quick_directory


class RecordingStore(LeaseStore):
    """The real store. It records what is reserved and in which thread, and can be blocked."""

    groups: list[list[bytes]]
    threads: set[int]
    go: threading.Event
    directory: int

    def reserve(self, keys: Sequence[bytes]) -> list[int | None]:
        self.groups.append(list(keys))
        self.threads.add(threading.get_ident())
        assert self.go.wait(10)
        return super().reserve(keys)


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


def test_only_the_first_use_of_a_key_in_a_run_waits_for_a_lease(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = leases.get(key(1))
        assert not lease.covers(1)
        assert not lease.take()
        await leases.extend([(lease, 1)])
        assert lease.covers(LEASE_USES)
        assert all(lease.take() for _ in range(1000))
        assert lease.uses_left == LEASE_USES - 1000
        assert leases.uses_max(key(1)) == 2 * LEASE_USES
        assert leases.get(key(1)) is lease

    store = run(tmp_path, scenario)
    assert store.groups == [[key(1)]]
    assert threading.get_ident() not in store.threads


def test_a_key_created_in_this_run_has_its_first_lease_from_its_file(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = leases.granted_at_creation(key(1))
        assert leases.get(key(1)) is lease
        assert lease.take(LEASE_USES // 2)
        assert leases.uses_max(lease.key) == LEASE_USES

    async def next_run(leases: Leases, store: RecordingStore) -> None:
        lease = leases.get(key(1))
        assert not lease.take()
        await leases.extend([(lease, 1)])
        assert leases.uses_max(lease.key) == 2 * LEASE_USES

    assert run(tmp_path, scenario).groups == []
    run(tmp_path, next_run)


def test_all_requests_of_a_turn_are_one_append(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        await asyncio.gather(*(leases.extend([(leases.get(key(number)), 1)]) for number in range(20)))
        await asyncio.gather(*(leases.extend([(leases.get(key(7)), 1)]) for _ in range(20)))

    store = run(tmp_path, scenario)
    assert store.groups == [[key(number) for number in range(20)]]


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

    assert run(tmp_path, scenario).groups == [[key(1)], [key(2), key(3)]]


def test_every_waiter_of_a_turn_finds_its_uses_covered(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = leases.get(key(1))

        async def batch(uses: int) -> None:
            assert not lease.take(uses)
            await leases.extend([(lease, uses)])
            assert lease.take(uses)

        await asyncio.gather(*(batch(1024) for _ in range(300)))
        assert lease.uses_left >= REFILL_USES

    store = run(tmp_path, scenario)
    assert store.groups == [[key(1)] * 5], "300 x 1024 uses, and some for others, are five leases in one append"


def test_an_append_is_bounded_and_the_rest_is_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms.custody.leases.GROUP_RECORDS_MAX", 8)

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        await asyncio.gather(*(leases.extend([(leases.get(key(number)), 1)]) for number in range(10)))
        with pytest.raises(ValueError, match="append"):
            await leases.extend([(leases.get(key(number)), 1) for number in range(5)])

    assert [len(group) for group in run(tmp_path, scenario).groups] == [4, 4, 2]


def test_a_lease_is_extended_before_it_is_used_up(tmp_path: Path) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = leases.granted_at_creation(key(1))
        assert lease.take(LEASE_USES - REFILL_USES)
        await asyncio.sleep(0)
        await leases.drain()
        assert store.groups == []
        assert lease.take()
        assert lease.take(), "taking goes on while the extension is written"
        await leases.drain()
        assert store.groups == [[key(1)]]
        assert lease.uses_left == LEASE_USES + REFILL_USES - 2

    run(tmp_path, scenario)


def test_a_failed_background_extension_is_requested_again_at_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(leases: Leases, store: RecordingStore) -> None:
        lease = leases.granted_at_creation(key(1))
        with failing_os(monkeypatch, "fsync"):
            lease.take(LEASE_USES - REFILL_USES + 1)
            await leases.drain()
            assert len(store.groups) == 1
            lease.take(REFILL_USES // 4)
            await leases.drain()
            assert len(store.groups) == 1
            lease.take(REFILL_USES // 2)
            await leases.drain()
            assert len(store.groups) == 2
        assert leases.uses_max(lease.key) == LEASE_USES
        lease.take(lease.uses_left * 3 // 4)
        await leases.drain()
        assert lease.uses_left > LEASE_USES

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
        assert leases.uses_max(lease.key) == LEASE_USES
        await leases.extend([(lease, 1)])
        assert lease.take()
        assert leases.status().write_failures == 1

    run(tmp_path, scenario)


def test_a_key_near_its_limit_encrypts_and_then_refuses(tmp_path: Path) -> None:
    journal(
        tmp_path,
        encode_record(key(1), USES_WARN - 2 * LEASE_USES),
        encode_record(key(2), USES_MAX - LEASE_USES),
        encode_record(key(3), USES_MAX),
    )

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        one, two, three, four = (leases.get(key(number)) for number in (1, 2, 3, 4))
        await leases.extend([(one, 1), (two, 1), (three, 1), (four, 1)])
        assert leases.uses_max(one.key) < USES_WARN
        assert one.take()
        await leases.extend([(one, LEASE_USES)])
        assert leases.uses_max(one.key) >= USES_WARN
        assert one.take()
        assert three.covers(5), "waiting would not help"
        for _ in range(2):
            with pytest.raises(KeyExhaustedError):
                three.take()
        assert leases.uses_max(three.key) == USES_MAX
        assert two.take(LEASE_USES - 1)
        await leases.drain()
        assert two.take(), "its last reserved use"
        with pytest.raises(KeyExhaustedError):
            two.take()
        assert four.take()

    run(tmp_path, scenario)


def test_dropped_leases_cost_a_lease_and_never_share_a_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms.custody.leases.LEASES_COUNT_MAX", 2)

    async def scenario(leases: Leases, store: RecordingStore) -> None:
        old = leases.get(key(1))
        await leases.extend([(old, 1)])
        leases.get(key(2))
        leases.get(key(3))
        new = leases.get(key(1))
        assert new is not old
        await leases.extend([(new, 1)])
        assert old.uses_left + new.uses_left == 2 * LEASE_USES
        assert leases.uses_max(new.key) == 3 * LEASE_USES

    run(tmp_path, scenario)


def test_a_long_journal_is_merged_after_its_callers_were_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_store, "JOURNAL_RECORDS_MERGE", 10)
    merging, go = threading.Event(), threading.Event()
    real = LeaseStore.merge

    def merge(store: LeaseStore) -> None:
        merging.set()
        assert go.wait(10)
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
            patch.setattr(store, "reserve", lambda _keys: 1 // 0)
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
        st.integers(0, 3), st.integers(1, 40_000), st.sampled_from(["take", "take", "extend", "fail", "restart"])
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
            if not used[number]:
                leases.granted_at_creation(key(number))
        while moves:
            number, uses, move = moves.pop(0)
            lease: UseLease = leases.get(key(number))
            if move == "restart":
                return
            if move == "take" and lease.take(uses):
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
