"""The store writer: group commit, conditions, ordering keys, bounds, failure and recovery."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import conditions
from progressdb_server.store import writer as writing
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import ConditionFailedError, NotWrittenError, StoreUnavailableError
from progressdb_server.store.writer import Writer
from tests.harness.logged import capture_logs
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import becomes

FOREVER_S = 600.0
"""A bound that no test reaches."""


async def turns_of_the_loop() -> None:
    """As many as a writer needs that waits for nothing but its engine."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def opened_writer(
    engine: MemoryEngine | None = None, clock: Clock | None = None
) -> AsyncIterator[tuple[Writer, MemoryEngine]]:
    store = engine or MemoryEngine()
    writer = Writer(store, clock or Clock(lambda: 7), StoreMetrics(), lambda: None)
    try:
        yield writer, store
    finally:
        store.gate.set()
        await writer.close()


async def test_writes_of_one_turn_are_one_group_and_one_sync() -> None:
    async with opened_writer() as (writer, engine):
        await asyncio.gather(*[writer.commit(Write([(b"%d" % n, b"x")])) for n in range(100)])
        assert (engine.writes, engine.syncs) == (1, 1)


async def test_writes_during_a_sync_form_the_next_group() -> None:
    async with opened_writer() as (writer, engine):
        engine.gate.clear()
        first = writer.commit(Write([(b"a", b"1")]))
        await becomes(lambda: engine.writes == 1)
        rest = [writer.commit(Write([(b"%d" % n, b"x")])) for n in range(50)]
        await asyncio.sleep(0.02)
        assert not first.done()
        engine.gate.set()
        await asyncio.gather(first, *rest)
        assert (engine.writes, engine.syncs) == (2, 2)


async def test_no_write_is_answered_before_its_sync() -> None:
    async with opened_writer() as (writer, engine):
        engine.gate.clear()
        done = writer.commit(Write([(b"a", b"1")]))
        await becomes(lambda: engine.get(b"a") == b"1")
        await asyncio.sleep(0.05)
        assert not done.done()
        engine.gate.set()
        await done


async def test_a_write_with_a_failed_condition_changes_nothing_and_names_the_key() -> None:
    async with opened_writer() as (writer, engine):
        await writer.commit(Write([(b"a", b"1")]))
        with pytest.raises(ConditionFailedError) as failed:
            await writer.commit(Write([(b"a", b"2"), (b"b", b"2")], [(b"a", b"other")], threads=1, messages=1))
        assert failed.value.key == b"a"
        assert (engine.get(b"a"), engine.get(b"b")) == (b"1", None)
        assert (writer.state.threads, writer.state.messages) == (0, 0)


async def test_a_condition_sees_the_earlier_writes_of_its_group() -> None:
    async with opened_writer() as (writer, engine):
        outcomes = await asyncio.gather(
            writer.commit(Write([(b"a", b"1")], [(b"a", None)])),
            writer.commit(Write([(b"a", b"2")], [(b"a", None)])),
            writer.commit(Write([(b"a", b"3")], [(b"a", b"1")])),
            writer.commit(Write([(b"a", None)], [(b"a", b"3")])),
            writer.commit(Write([(b"a", b"4")], [(b"a", None)])),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [
            type(None), ConditionFailedError, type(None), type(None), type(None)
        ]  # fmt: skip
        assert engine.get(b"a") == b"4"
        assert engine.writes == 1


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.sampled_from([None, b"1", b"2"])), max_size=2),
            st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.sampled_from([None, b"1", b"2"])), max_size=2),
        ),
        max_size=8,
    )
)
def test_a_group_has_the_same_effect_as_its_writes_one_by_one(
    writes: list[tuple[list[tuple[bytes, bytes | None]], list[tuple[bytes, bytes | None]]]],
) -> None:
    model: dict[bytes, bytes] = {}
    expected: list[bool] = []
    for puts, expect in writes:
        holds = all(model.get(key) == value for key, value in expect)
        expected.append(holds)
        if holds:
            for key, value in puts:
                model.pop(key, None)
                if value is not None:
                    model[key] = value

    async def body() -> None:
        async with opened_writer() as (writer, engine):
            outcomes = await asyncio.gather(
                *[writer.commit(Write(puts, conditions)) for puts, conditions in writes], return_exceptions=True
            )
            assert [outcome is None for outcome in outcomes] == expected
            assert {key: engine.get(key) for key in (b"a", b"b") if engine.get(key) is not None} == model

    asyncio.run(body())


async def test_writes_of_one_ordering_key_commit_in_the_order_of_their_slots() -> None:
    async with opened_writer() as (writer, engine):
        one, two, three = (writer.reserve(b"thread") for _ in range(3))
        other = writer.reserve(b"other")
        later = [writer.submit(three, Write([(b"x", b"3")])), writer.submit(two, Write([(b"x", b"2")]))]
        await writer.submit(other, Write([(b"y", b"1")]))
        assert engine.get(b"x") is None
        first = writer.submit(one, Write([(b"x", b"1")], [(b"x", None)]))
        await asyncio.gather(first, *later)
        assert engine.get(b"x") == b"3"


async def test_an_abandoned_slot_does_not_block_later_slots_of_its_key() -> None:
    async with opened_writer() as (writer, engine):
        one, two, three = (writer.reserve(b"thread") for _ in range(3))
        second = writer.submit(two, Write([(b"x", b"2")]))
        writer.leave(one)
        writer.leave(one)
        await second
        writer.leave(two)
        writer.leave(three)
        await writer.submit(writer.reserve(b"thread"), Write([(b"x", b"4")]))
        assert engine.get(b"x") == b"4"


async def test_a_group_waits_for_the_writes_that_are_being_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GATHER_S_MAX", FOREVER_S)
    async with opened_writer() as (writer, engine):
        slots = [writer.reserve(b"%d" % n) for n in range(3)]
        done = [writer.submit(slots[0], Write([(b"a", b"1")])), writer.commit(Write([(b"b", b"1")]))]
        await turns_of_the_loop()
        assert engine.writes == 0
        done.append(writer.submit(slots[1], Write([(b"c", b"1")])))
        await turns_of_the_loop()
        assert engine.writes == 0
        writer.leave(slots[2])
        await asyncio.gather(*done)
        assert (engine.writes, engine.syncs) == (1, 1)


async def test_a_group_does_not_wait_for_writes_that_begin_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GATHER_S_MAX", FOREVER_S)
    async with opened_writer() as (writer, _):
        sealing = writer.reserve(b"a")
        done = writer.commit(Write([(b"a", b"1")]))
        await turns_of_the_loop()
        later = writer.reserve(b"b")
        writer.leave(sealing)
        await done
        writer.leave(later)


async def test_a_group_is_written_although_a_write_is_never_sealed() -> None:
    async with opened_writer() as (writer, engine):
        writer.reserve(b"a")
        await writer.commit(Write([(b"b", b"1")]))
        assert engine.get(b"b") == b"1"


async def test_a_write_that_seals_slowly_delays_only_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened_writer() as (writer, engine):
        slow = writer.reserve(b"a")
        await writer.commit(Write([(b"b", b"1")]))  # waits in vain
        monkeypatch.setattr(writing, "GATHER_S_MAX", FOREVER_S)
        await writer.commit(Write([(b"c", b"1")]))
        sealing = writer.reserve(b"d")
        done = writer.commit(Write([(b"e", b"1")]))
        await turns_of_the_loop()
        writer.leave(slow)  # counts for no other write
        await turns_of_the_loop()
        assert engine.get(b"e") is None
        await asyncio.gather(writer.submit(sealing, Write([(b"d", b"1")])), done)
        assert engine.writes == 3


@pytest.mark.parametrize(("bound", "value"), [("GROUP_WRITES_MAX", 2), ("GROUP_BYTES_MAX", 4)])
async def test_a_group_that_becomes_full_waits_no_longer(
    monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(writing, "GATHER_S_MAX", FOREVER_S)
    monkeypatch.setattr(writing, bound, value)
    async with opened_writer() as (writer, engine):
        slot = writer.reserve(b"a")
        first = writer.commit(Write([(b"b", b"1")]))
        await turns_of_the_loop()
        assert engine.writes == 0
        await asyncio.gather(first, writer.commit(Write([(b"c", b"1")])))
        writer.leave(slot)


async def test_a_full_group_waits_for_no_other_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GATHER_S_MAX", FOREVER_S)
    monkeypatch.setattr(writing, "GROUP_WRITES_MAX", 2)
    async with opened_writer() as (writer, _):
        slot = writer.reserve(b"a")
        await asyncio.gather(*[writer.commit(Write([(b"%d" % n, b"x")])) for n in range(2)])
        writer.leave(slot)


async def test_counters_and_the_last_stamp_are_stored_with_each_group() -> None:
    engine = MemoryEngine()
    clock, clock_again = Clock(lambda: 7), Clock(lambda: 7)
    async with opened_writer(engine, clock) as (writer, _):
        clock.recover(Stamp(90, 5))
        await asyncio.gather(writer.commit(Write([], threads=2)), writer.commit(Write([], messages=3)))
    async with opened_writer(engine, clock_again) as (writer, _):
        assert (writer.state.threads, writer.state.messages) == (2, 3)
        assert clock_again.next() == Stamp(90, 6)


async def test_a_write_that_exceeds_the_queue_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "QUEUE_WRITES_MAX", 3)
    monkeypatch.setattr(writing, "QUEUE_BYTES_MAX", 100)
    async with opened_writer() as (writer, _):
        big = writer.commit(Write([(b"a", b"x" * 200)]))
        with pytest.raises(StoreUnavailableError):
            await big
        queued = [writer.commit(Write([(b"%d" % n, b"x")])) for n in range(4)]
        outcomes = await asyncio.gather(*queued, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [type(None)] * 3 + [NotWrittenError]
        await writer.commit(Write([(b"later", b"x")]))


async def test_a_group_is_bounded_in_writes_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GROUP_WRITES_MAX", 10)
    monkeypatch.setattr(writing, "GROUP_BYTES_MAX", 50)
    async with opened_writer() as (writer, engine):
        await asyncio.gather(*[writer.commit(Write([(b"%03d" % n, b"")])) for n in range(25)])
        assert engine.writes == 3
        await asyncio.gather(*[writer.commit(Write([(b"%03d" % n, b"x" * 60)])) for n in range(3)])
        assert engine.writes == 6


@pytest.mark.parametrize("fault", ["fail_write", "fail_sync"])
@pytest.mark.parametrize("survives", [False, True])
async def test_after_a_failed_group_every_waiter_fails_and_the_writer_recovers(fault: str, survives: bool) -> None:
    async with opened_writer() as (writer, engine):
        await writer.commit(Write([(b"before", b"1")], messages=1))
        engine.survives = survives
        setattr(engine, fault, True)
        engine.fail_reopen = 1
        outcomes = await asyncio.gather(
            *[writer.commit(Write([(b"%d" % n, b"x")], messages=1)) for n in range(5)], return_exceptions=True
        )
        assert all(isinstance(outcome, StoreUnavailableError) for outcome in outcomes)
        assert [writer.available] == [False]
        with pytest.raises(StoreUnavailableError):
            await writer.commit(Write([(b"refused", b"x")]))
        while not writer.available:
            await asyncio.sleep(0.01)
        await writer.commit(Write([(b"after", b"1")], messages=1))
        assert engine.get(b"before") == engine.get(b"after") == b"1"
        assert engine.get(b"refused") is None
        stored = sum(engine.get(b"%d" % n) is not None for n in range(5))
        assert stored in (0, 5)
        assert writer.state.messages == 2 + stored


async def test_an_expected_value_is_read_once_until_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values longer than KNOWN_BYTES_MAX are read each time, and at most KNOWN_MAX values are remembered."""
    monkeypatch.setattr(conditions, "KNOWN_MAX", 3)
    async with opened_writer() as (writer, engine):
        long = b"x" * (conditions.KNOWN_BYTES_MAX + 1)
        await writer.commit(Write([(b"a", b"1"), (b"long", long)]))
        with mock.patch.object(engine, "get", wraps=engine.get) as get:
            for _ in range(5):
                await writer.commit(Write([], [(b"a", b"1"), (b"none", None), (b"long", long)]))
            asked = [call.args[0] for call in get.call_args_list]
        assert {key: asked.count(key) for key in asked} == {b"a": 1, b"none": 1, b"long": 5}
        await writer.commit(Write([(b"a", b"2"), (b"none", b"")], [(b"a", b"1")]))
        for key, stale, value in ((b"a", b"1", b"2"), (b"none", None, b"")):
            with pytest.raises(ConditionFailedError):
                await writer.commit(Write([], [(key, stale)]))
            await writer.commit(Write([], [(key, value)]))
        for number in range(20):
            await writer.commit(Write([], [(b"%d" % number, None), (b"a", b"2")]))
        with mock.patch.object(engine, "get", wraps=engine.get) as get:
            for number in range(20):
                await writer.commit(Write([], [(b"%d" % number, None)]))
        assert get.call_count >= 15, "most of them are forgotten"


async def test_expected_values_are_read_again_after_a_failed_write() -> None:
    async with opened_writer() as (writer, engine):
        await writer.commit(Write([], [(b"a", None)]))
        engine.fail_write = True
        with pytest.raises(StoreUnavailableError):
            await writer.commit(Write([(b"a", b"1")]))
        engine.put(b"a", b"1")  # the engine wrote it although it reported an error
        engine.survives = True
        while not writer.available:
            await asyncio.sleep(0.01)
        with pytest.raises(ConditionFailedError):
            await writer.commit(Write([], [(b"a", None)]))


async def test_a_stalled_engine_delays_writes_but_does_not_fail_them() -> None:
    async with opened_writer() as (writer, engine):
        engine.busy = 3
        await writer.commit(Write([(b"a", b"1")]))
        assert engine.get(b"a") == b"1"
        assert writer.available


async def test_a_group_is_refused_if_the_engine_stays_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "BUSY_S_MAX", 0.02)
    async with opened_writer() as (writer, engine):
        engine.busy = 10**6
        with pytest.raises(StoreUnavailableError):
            await writer.commit(Write([(b"a", b"1")]))
        engine.busy = 0
        await writer.commit(Write([(b"a", b"2")]))


async def test_cancelling_a_caller_does_not_undo_its_write() -> None:
    async with opened_writer() as (writer, engine):
        cancelled = writer.commit(Write([(b"a", b"1")]))
        cancelled.cancel()
        await writer.commit(Write([(b"b", b"1")]))
        assert engine.get(b"a") == b"1"


async def test_close_commits_queued_writes_and_refuses_later_ones() -> None:
    async with opened_writer() as (writer, engine):
        queued = writer.commit(Write([(b"a", b"1")]))
        await writer.close()
        await queued
        assert engine.get(b"a") == b"1"
        with pytest.raises(StoreUnavailableError):
            await writer.commit(Write([(b"b", b"1")]))


SMALL_KEYS = st.sampled_from([b"a", b"b", b"ba", b"c", b"d"])
SMALL_PRESENT = st.sampled_from([b"", b"1", b"2"])
SMALL_VALUES = st.none() | SMALL_PRESENT


@given(
    stored=st.dictionaries(SMALL_KEYS, SMALL_PRESENT, min_size=1),
    lost=st.none() | st.dictionaries(SMALL_KEYS, SMALL_PRESENT, min_size=1),
    later=st.lists(st.dictionaries(SMALL_KEYS, SMALL_VALUES, max_size=2), max_size=3),
    same_group=st.dictionaries(SMALL_KEYS, SMALL_VALUES, max_size=2),
    remembered=st.sampled_from([0, 3, 100]),
)
def test_a_write_commits_only_if_the_values_it_read_are_unchanged(
    stored: dict[bytes, bytes],
    lost: dict[bytes, bytes] | None,
    later: list[dict[bytes, bytes | None]],
    same_group: dict[bytes, bytes | None],
    remembered: int,
) -> None:
    """Later groups and an earlier write of the same group may change the values that were read. The test varies how
    many recently written keys are remembered, and includes values that were read and then lost in a failed sync."""

    async def body() -> None:
        async with opened_writer() as (writer, engine):
            await writer.commit(Write(list(stored.items())))
            losing = None
            if lost is not None:
                engine.gate.clear()
                engine.fail_sync = True
                losing = writer.commit(Write(list(lost.items())))
                await turns_of_the_loop()
            read_at, read = writer.group, engine.scan(b"a", b"e", limit=10)
            assert read == sorted({**stored, **(lost or {})}.items())
            if losing is not None:
                engine.gate.set()
                with pytest.raises(StoreUnavailableError):
                    await losing
                while not writer.available:
                    await asyncio.sleep(0.001)
            for puts in later:
                await writer.commit(Write(list(puts.items())))
            first = writer.commit(Write(list(same_group.items())))
            second = writer.commit(Write([(b"written", b"yes")], read=read, read_at=read_at))
            outcomes = await asyncio.gather(first, second, return_exceptions=True)
            different = [key for key, value in read if engine.get(key) != value]
            assert engine.get(b"written") == (None if different else b"yes")
            if different:
                assert isinstance(outcomes[1], ConditionFailedError)
                assert outcomes[1].key == different[0]

    with mock.patch("progressdb_server.store.conditions.KEYS_REMEMBERED_MAX", remembered):
        asyncio.run(body())


async def test_values_not_written_since_they_were_read_are_not_read_again() -> None:
    async with opened_writer() as (writer, engine):
        await writer.commit(Write([(b"a", b"1"), (b"b", b"2")]))
        read_at = writer.group
        await writer.commit(Write([(b"c", b"3")]))
        with mock.patch.object(engine, "get", side_effect=AssertionError):
            await writer.commit(Write([(b"d", b"4")], read=[(b"a", b"1"), (b"b", b"2")], read_at=read_at))
        assert engine.get(b"d") == b"4"


async def test_the_log_has_the_engine_error_text_but_no_text_of_other_errors() -> None:
    """The text of an unexpected exception could contain a key or a user's text."""

    class DefectiveEngine(MemoryEngine):
        def write(self, puts: object) -> None:
            raise ValueError("private text")

    class FullEngine(MemoryEngine):
        def write(self, puts: object) -> None:
            raise EngineUnavailableError from OSError("No space left on device: 000012.log" + "x" * 1000)

    logged = []
    for engine in (DefectiveEngine(), FullEngine()):
        with capture_logs() as logs:
            async with opened_writer(engine) as (writer, _):
                with pytest.raises(StoreUnavailableError):
                    await writer.commit(Write([(b"a", b"1")]))
        logged.append(next(line for line in logs if line["event"] == "store_write_failed"))
    assert logged[0]["error"] == "ValueError"
    assert "private" not in str(logged[0])
    assert logged[1]["error"].startswith("OSError: No space left on device: 000012.log")
    assert len(logged[1]["error"]) == writing.REASON_CHARS_MAX
