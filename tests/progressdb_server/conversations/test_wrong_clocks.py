"""A system clock that was wrong: order is kept, and times are true again once the clock is."""

import asyncio
from typing import Any

import msgspec
import pytest

from progressdb_server.conversations import whole as conversations
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import idempotency, keyspace
from progressdb_server.store.check import Checker
from progressdb_server.store.engine import Counters
from progressdb_server.store.keyspace import BACK_NS_MAX, ERA_MAX, ERA_NS, NOW_NS_MIN, Clock, Stamp
from progressdb_server.store.model import Idempotency, NewMessage
from progressdb_server.store.offline import LocalView
from tests.harness.logged import capture_logs
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import TickingClock, becomes, messages_of, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

NOW_NS = 1_790_000_000_000_000_000
YEAR_NS = 365 * 24 * 3600 * 1_000_000_000
DAY_NS = 24 * 3600 * 1_000_000_000
RETRIED = Idempotency(scope="s", key="k")


def test_a_stamp_of_an_era_has_this_text_id_and_time() -> None:
    """The known answers of docs/spec/store.md."""
    stamp = Stamp(ERA_NS + NOW_NS, 7)
    assert stamp.text == "11790000000000000000-000007"
    assert Stamp.parse(stamp.text) == stamp
    assert (stamp.era, stamp.time_ns) == (1, NOW_NS)
    assert keyspace.message_id(stamp) == "msg-11790000000000000000-000007"
    assert keyspace.parse_message_id("msg-11790000000000000000-000007") == stamp
    assert keyspace.message_id_of(stamp.text) == keyspace.message_id(stamp)
    assert keyspace.ns_of(keyspace.messages("t") + stamp.raw) == NOW_NS
    assert msgspec.msgpack.encode(Counters.of(2, 3, stamp)).hex() == "950203cf18d75b8423f300000701"
    last = Stamp(ERA_MAX * ERA_NS + NOW_NS, 0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Counters.of(0, 0, last)), type=Counters).last == last


def test_a_state_without_an_era_is_of_the_first_one() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode([1, 2, NOW_NS, 3]), type=Counters).last == Stamp(NOW_NS, 3)


def test_a_clock_that_comes_back_from_the_future_begins_an_era() -> None:
    times = TickingClock(NOW_NS)
    clock = Clock(times)
    before = clock.next()
    times.now += YEAR_NS
    poisoned = clock.next()
    times.now -= YEAR_NS
    after = [clock.next(), clock.next()]
    assert sorted([*after, before, poisoned]) == [before, poisoned, *after]
    assert [stamp.era for stamp in after] == [1, 1]
    assert all(0 < stamp.time_ns - before.time_ns < DAY_NS for stamp in after)


@pytest.mark.parametrize("back_ns", [1, DAY_NS // 2])
def test_a_clock_that_steps_back_a_little_counts_on(back_ns: int) -> None:
    times = TickingClock(NOW_NS)
    clock = Clock(times)
    before = clock.next()
    times.now -= back_ns + 2 * times.step
    assert clock.next() == Stamp(before.ns, 1)


def test_a_clock_before_any_possible_time_begins_no_era() -> None:
    """A machine without a battery starts in 1970; the network sets its clock a moment later."""
    times = TickingClock(NOW_NS)
    clock = Clock(times)
    before = clock.next()
    times.now = 0
    assert clock.next() == Stamp(before.ns, 1)
    times.now = NOW_NS + DAY_NS
    assert clock.next().era == 0
    assert BACK_NS_MAX < NOW_NS_MIN


def test_when_no_era_is_left_the_sequence_counts_on() -> None:
    clock = Clock(TickingClock(NOW_NS))
    clock.recover(Stamp(ERA_MAX * ERA_NS + NOW_NS + YEAR_NS, 0))
    assert clock.next() == Stamp(ERA_MAX * ERA_NS + NOW_NS + YEAR_NS, 1)


async def test_after_a_future_times_are_true_and_lists_keep_their_order() -> None:
    """Also across a restart, and for threads."""
    engine, provider, times = MemoryEngine(), SealingProvider(), TickingClock(NOW_NS)

    async def add(store: Conversations, text: str) -> Any:
        return await store.messages.create(NewMessage(author="ada", thread="t", body=text))

    async with opened(engine, provider, times) as store:
        made = [await add(store, "before")]
        times.now += 10 * YEAR_NS
        made.append(await add(store, "in the future"))
        future = await store.threads.create(author="ada", title="future")
        times.now -= 10 * YEAR_NS
    with capture_logs() as logs:
        async with opened(engine, provider, times) as store:
            await store.start()
            made += [await add(store, "after"), await add(store, "later")]
            thread = await store.threads.create(author="ada", title="after")
            edited = await store.messages.update(made[1].id, author="ada", body="edited", role=None, reply_to=None)
    assert {"clock_behind_store", "clock_was_in_the_future"} <= {entry["event"] for entry in logs}
    for new in (made[2].ts, made[3].ts, thread.created_ts, edited.ts):
        assert 0 < new - NOW_NS < DAY_NS
    async with opened(engine, provider, times) as store:
        made.append(await add(store, "after another start"))
        assert made[-1].ts - NOW_NS < DAY_NS
        listed = [one async for chunk in store.reading.messages("t") for one in chunk]
        assert [one.id for one in listed] == [one.id for one in made]
        assert [one.value for one in listed] == ["before", "edited", "after", "later", "after another start"]
        assert listed[1].ts == edited.ts
        page = await messages_of(store, "t", after=made[1].id, limit=2)
        assert [one.id for one in page] == [one.id for one in made[3:]]
        threads = [one async for chunk in store.threads.list_threads(author="ada") for one in chunk]
        assert [one.id for one in threads] == ["t", future.id, thread.id]
        assert (await store.threads.get("t")).updated_ts == made[-1].ts
    assert [finding async for finding in Checker(LocalView(engine), provider).run()] == []


async def test_a_retry_record_from_the_future_expires_too() -> None:
    engine, provider, times = MemoryEngine(), SealingProvider(), TickingClock(NOW_NS + YEAR_NS)
    async with opened(engine, provider, times) as store:
        first = await store.threads.create(author="ada", title="x", idempotency=RETRIED)
        assert (await store.threads.create(author="ada", title="x", idempotency=RETRIED)).id == first.id
        times.now = NOW_NS
        assert (await store.threads.create(author="ada", title="x", idempotency=RETRIED)).id != first.id
        times.now = NOW_NS + YEAR_NS
        await store.threads.create(author="ada", title="x", idempotency=Idempotency(scope="s", key="other"))
        times.now = 1000
        assert await idempotency.sweep(store.reads, store.writer, times()) == 0
        times.now = NOW_NS
        assert await idempotency.sweep(store.reads, store.writer, times()) == 1


def test_a_step_of_the_clock_while_the_server_runs_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "CLOCK_S", 0.01)

    def jumps() -> list[Any]:
        return [entry for entry in logs if entry["event"] == "clock_jumped"]

    async def body() -> None:
        times = TickingClock(NOW_NS)
        async with opened(now_ns=times) as store:
            await store.start()
            await asyncio.sleep(0.1)
            times.now += YEAR_NS
            await becomes(lambda: bool(jumps()))
            await asyncio.sleep(0.1)

    with capture_logs() as logs:
        asyncio.run(body())
    (jump,) = jumps()
    assert abs(jump["seconds"] - YEAR_NS // 1_000_000_000) < 10
