"""The one writer: groups, conditions, lanes, bounds, failure and recovery."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import writer as writing
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import ConditionFailedError, NotWrittenError, StoreUnavailableError
from progressdb_server.store.writer import Write, Writer
from tests.progressdb_server.store.memory_engine import MemoryEngine


def with_writer(
    body: Callable[[Writer, MemoryEngine], Awaitable[None]],
    engine: MemoryEngine | None = None,
    clock: Clock | None = None,
) -> None:
    async def run() -> None:
        store = engine or MemoryEngine()
        writer = Writer(store, clock or Clock(lambda: 7), StoreMetrics(), lambda: None)
        try:
            await body(writer, store)
        finally:
            store.gate.set()
            await writer.close()

    asyncio.run(run())


def test_writes_of_one_turn_are_one_group_and_one_sync() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        await asyncio.gather(*[writer.commit(Write([(b"%d" % n, b"x")])) for n in range(100)])
        assert (engine.writes, engine.syncs) == (1, 1)

    with_writer(body)


def test_writes_that_come_while_the_disk_is_busy_form_the_next_group() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        engine.gate.clear()
        first = writer.commit(Write([(b"a", b"1")]))
        await asyncio.sleep(0.02)
        rest = [writer.commit(Write([(b"%d" % n, b"x")])) for n in range(50)]
        await asyncio.sleep(0.02)
        assert not first.done()
        engine.gate.set()
        await asyncio.gather(first, *rest)
        assert (engine.writes, engine.syncs) == (2, 2)

    with_writer(body)


def test_no_write_is_answered_before_its_sync() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        engine.gate.clear()
        done = writer.commit(Write([(b"a", b"1")]))
        await asyncio.sleep(0.05)
        assert engine.get(b"a") == b"1"
        assert not done.done()
        engine.gate.set()
        await done

    with_writer(body)


def test_a_write_whose_expectation_fails_changes_nothing_and_names_the_key() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        await writer.commit(Write([(b"a", b"1")]))
        with pytest.raises(ConditionFailedError) as failed:
            await writer.commit(Write([(b"a", b"2"), (b"b", b"2")], [(b"a", b"other")], threads=1, messages=1))
        assert failed.value.key == b"a"
        assert (engine.get(b"a"), engine.get(b"b")) == (b"1", None)
        assert (writer.state.threads, writer.state.messages) == (0, 0)

    with_writer(body)


def test_a_write_sees_what_the_writes_before_it_in_its_group_leave() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
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

    with_writer(body)


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.sampled_from([None, b"1", b"2"])), max_size=2),
            st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.sampled_from([None, b"1", b"2"])), max_size=2),
        ),
        max_size=8,
    )
)
def test_a_group_ends_as_the_same_writes_one_by_one(
    writes: list[tuple[list[tuple[bytes, bytes | None]], list[tuple[bytes, bytes | None]]]],
) -> None:
    model: dict[bytes, bytes] = {}
    expected: list[bool] = []
    for puts, conditions in writes:
        holds = all(model.get(key) == value for key, value in conditions)
        expected.append(holds)
        if holds:
            for key, value in puts:
                model.pop(key, None)
                if value is not None:
                    model[key] = value

    async def body(writer: Writer, engine: MemoryEngine) -> None:
        outcomes = await asyncio.gather(
            *[writer.commit(Write(puts, conditions)) for puts, conditions in writes], return_exceptions=True
        )
        assert [outcome is None for outcome in outcomes] == expected
        assert {key: engine.get(key) for key in (b"a", b"b") if engine.get(key) is not None} == model

    with_writer(body)


def test_a_lane_is_committed_in_the_order_of_its_slots() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        one, two, three = (writer.reserve(b"lane") for _ in range(3))
        other = writer.reserve(b"other")
        later = [writer.submit(three, Write([(b"x", b"3")])), writer.submit(two, Write([(b"x", b"2")]))]
        await writer.submit(other, Write([(b"y", b"1")]))
        assert engine.get(b"x") is None
        first = writer.submit(one, Write([(b"x", b"1")], [(b"x", None)]))
        await asyncio.gather(first, *later)
        assert engine.get(b"x") == b"3"

    with_writer(body)


def test_a_slot_that_is_given_up_lets_the_lane_go_on() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        one, two, three = (writer.reserve(b"lane") for _ in range(3))
        second = writer.submit(two, Write([(b"x", b"2")]))
        writer.leave(one)
        writer.leave(one)
        await second
        writer.leave(two)
        writer.leave(three)
        await writer.submit(writer.reserve(b"lane"), Write([(b"x", b"4")]))
        assert engine.get(b"x") == b"4"

    with_writer(body)


def test_counters_and_the_last_stamp_are_stored_with_each_group() -> None:
    engine = MemoryEngine()
    clock, clock_again = Clock(lambda: 7), Clock(lambda: 7)

    async def body(writer: Writer, _: MemoryEngine) -> None:
        clock.recover(Stamp(90, 5))
        await asyncio.gather(writer.commit(Write([], threads=2)), writer.commit(Write([], messages=3)))

    async def again(writer: Writer, _: MemoryEngine) -> None:
        assert (writer.state.threads, writer.state.messages) == (2, 3)
        assert clock_again.next() == Stamp(90, 6)

    with_writer(body, engine, clock)
    with_writer(again, engine, clock_again)


def test_what_does_not_fit_the_queue_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "QUEUE_WRITES_MAX", 3)
    monkeypatch.setattr(writing, "QUEUE_BYTES_MAX", 100)

    async def body(writer: Writer, engine: MemoryEngine) -> None:
        big = writer.commit(Write([(b"a", b"x" * 200)]))
        with pytest.raises(StoreUnavailableError):
            await big
        queued = [writer.commit(Write([(b"%d" % n, b"x")])) for n in range(4)]
        outcomes = await asyncio.gather(*queued, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [type(None)] * 3 + [NotWrittenError]
        await writer.commit(Write([(b"later", b"x")]))

    with_writer(body)


def test_a_group_is_bounded_in_writes_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GROUP_WRITES_MAX", 10)
    monkeypatch.setattr(writing, "GROUP_BYTES_MAX", 50)

    async def body(writer: Writer, engine: MemoryEngine) -> None:
        await asyncio.gather(*[writer.commit(Write([(b"%03d" % n, b"")])) for n in range(25)])
        assert engine.writes == 3
        await asyncio.gather(*[writer.commit(Write([(b"%03d" % n, b"x" * 60)])) for n in range(3)])
        assert engine.writes == 6

    with_writer(body)


@pytest.mark.parametrize("fault", ["fail_write", "fail_sync"])
@pytest.mark.parametrize("survives", [False, True])
def test_after_a_failed_group_every_waiter_fails_and_the_writer_recovers(fault: str, survives: bool) -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
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

    with_writer(body)


def test_a_value_that_many_writes_expect_is_read_once_after_each_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "KNOWN_MAX", 3)

    async def body(writer: Writer, engine: MemoryEngine) -> None:
        long = b"x" * (writing.KNOWN_BYTES_MAX + 1)
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

    with_writer(body)


def test_after_a_failed_write_values_are_read_anew() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        await writer.commit(Write([], [(b"a", None)]))
        engine.fail_write = True
        with pytest.raises(StoreUnavailableError):
            await writer.commit(Write([(b"a", b"1")]))
        engine.put(b"a", b"1")  # it was written in spite of the error
        engine.survives = True
        while not writer.available:
            await asyncio.sleep(0.01)
        with pytest.raises(ConditionFailedError):
            await writer.commit(Write([], [(b"a", None)]))

    with_writer(body)


def test_a_stalled_engine_delays_writes_but_does_not_fail_them() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        engine.busy = 3
        await writer.commit(Write([(b"a", b"1")]))
        assert engine.get(b"a") == b"1"
        assert writer.available

    with_writer(body)


def test_an_engine_that_stays_stalled_refuses_the_group_without_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "BUSY_S_MAX", 0.02)

    async def body(writer: Writer, engine: MemoryEngine) -> None:
        engine.busy = 10**6
        with pytest.raises(StoreUnavailableError):
            await writer.commit(Write([(b"a", b"1")]))
        engine.busy = 0
        await writer.commit(Write([(b"a", b"2")]))

    with_writer(body)


def test_a_caller_that_goes_away_does_not_undo_its_write() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        gone = writer.commit(Write([(b"a", b"1")]))
        gone.cancel()
        await writer.commit(Write([(b"b", b"1")]))
        assert engine.get(b"a") == b"1"

    with_writer(body)


def test_closing_commits_what_is_queued_and_refuses_what_comes_after() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        queued = writer.commit(Write([(b"a", b"1")]))
        await writer.close()
        await queued
        assert engine.get(b"a") == b"1"
        with pytest.raises(StoreUnavailableError):
            await writer.commit(Write([(b"b", b"1")]))

    with_writer(body)


SMALL_KEYS = st.sampled_from([b"a", b"b", b"ba", b"c", b"d"])
SMALL_PRESENT = st.sampled_from([b"", b"1", b"2"])
SMALL_VALUES = st.none() | SMALL_PRESENT


@given(
    stored=st.dictionaries(SMALL_KEYS, SMALL_PRESENT, min_size=1),
    lost=st.none() | st.dictionaries(SMALL_KEYS, SMALL_PRESENT, min_size=1),
    later=st.lists(st.dictionaries(SMALL_KEYS, SMALL_VALUES, max_size=2), max_size=3),
    beside=st.dictionaries(SMALL_KEYS, SMALL_VALUES, max_size=2),
    remembered=st.sampled_from([0, 3, 100]),
)
def test_a_write_holds_exactly_when_what_it_has_read_still_stands(
    stored: dict[bytes, bytes],
    lost: dict[bytes, bytes] | None,
    later: list[dict[bytes, bytes | None]],
    beside: dict[bytes, bytes | None],
    remembered: int,
) -> None:
    """Whether later groups, or an earlier write of its own group, have named its keys, and are remembered or not; and
    where what it has read was lost with a failed sync."""

    async def body(writer: Writer, engine: MemoryEngine) -> None:
        await writer.commit(Write(list(stored.items())))
        losing = None
        if lost is not None:
            engine.gate.clear()
            engine.fail_sync = True
            losing = writer.commit(Write(list(lost.items())))
            await asyncio.sleep(0.001)
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
        first = writer.commit(Write(list(beside.items())))
        second = writer.commit(Write([(b"written", b"yes")], read=read, read_at=read_at))
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
        different = [key for key, value in read if engine.get(key) != value]
        assert engine.get(b"written") == (None if different else b"yes")
        if different:
            assert isinstance(outcomes[1], ConditionFailedError)
            assert outcomes[1].key == different[0]

    with mock.patch("progressdb_server.store.writer.KEYS_REMEMBERED_MAX", remembered):
        with_writer(body)


def test_what_was_not_written_since_it_was_read_is_not_read_again() -> None:
    async def body(writer: Writer, engine: MemoryEngine) -> None:
        await writer.commit(Write([(b"a", b"1"), (b"b", b"2")]))
        read_at = writer.group
        await writer.commit(Write([(b"c", b"3")]))
        with mock.patch.object(engine, "get", side_effect=AssertionError):
            await writer.commit(Write([(b"d", b"4")], read=[(b"a", b"1"), (b"b", b"2")], read_at=read_at))
        assert engine.get(b"d") == b"4"

    with_writer(body)


def test_the_log_tells_what_the_engine_said_and_of_a_defect_no_text() -> None:
    """The text of an error that nobody has foreseen could hold a key or what a user typed."""

    class Odd(MemoryEngine):
        def write(self, puts: object) -> None:
            raise ValueError("private text")

    class Full(MemoryEngine):
        def write(self, puts: object) -> None:
            raise EngineUnavailableError from OSError("No space left on device: 000012.log" + "x" * 1000)

    async def body(writer: Writer, engine: MemoryEngine) -> None:
        with pytest.raises(StoreUnavailableError):
            await writer.commit(Write([(b"a", b"1")]))

    told = []
    for engine in (Odd(), Full()):
        with capture_logs() as logs:
            with_writer(body, engine)
        told.append(next(line for line in logs if line["event"] == "store_write_failed"))
    assert told[0]["error"] == "ValueError"
    assert "private" not in str(told[0])
    assert told[1]["error"].startswith("OSError: No space left on device: 000012.log")
    assert len(told[1]["error"]) == writing.REASON_CHARS_MAX
