"""A rotation with destruction on a disk that fails reads, or does not find what it has."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence

import pytest

from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs import runner
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import JobError
from progressdb_server.store.model import StoreError
from tests.progressdb_server.jobs.rotating import Place, chunks_of, keys_of_records, mapped, write
from tests.progressdb_server.store.faulty_reads import FaultyReads, faulty
from tests.progressdb_server.store.opened_store import keys_of, messages_of

DAY_NS = 86_400 * 1_000_000_000
TRIES = 20
FAILING_S = 0.3
Fault = Callable[[FaultyReads, Sequence[bytes]], None]
"""Called with the reads and all keys of the store."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_S_MIN", "READ_RETRY_S", "WATCH_S"):
        monkeypatch.setattr(runner, name, 0.001)


class Destroyed(set[str]):
    """The ids of the destroyed keys, and how many reads there were before the last of them."""

    def __init__(self, reads: FaultyReads) -> None:
        super().__init__()
        self._reads = reads
        self.reads_before: int | None = None

    def add(self, element: str) -> None:
        self.reads_before = self._reads.count
        super().add(element)


def lying(fault: Fault) -> tuple[int, int | None]:
    """A rotation whose old key is destroyed when due, with the fault in the reads until then. No record
    is lost. Returns the number of reads, and of those before the old key was destroyed; None if it was not."""
    place = Place()
    reads = faulty(place.engine)
    destroyed = place.keys.destroyed = Destroyed(reads)
    counts: list[int] = []

    async def body(store: Conversations, jobs: Jobs) -> None:
        messages = await write(store, 3)
        await store.messages.set_reaction(messages[1].id, "bob", "+1")
        await store.messages.delete(messages[2].id, author="ann")
        expected = await messages_of(store, "t", include_deleted=True)
        keys = [key.encode() for key in await keys_of(store)]
        reads.heal()
        fault(reads, keys)
        with contextlib.suppress(JobError, TimeoutError):
            async with asyncio.timeout(FAILING_S if reads.fails > 1 else None):  # the job may wait for ever
                await ended(jobs)
            place.clock.now += DAY_NS
            for _ in range(TRIES) if reads.lies_for_good else itertools.count():
                with contextlib.suppress(StoreError):
                    await jobs.destruction.begin()
                if destroyed:
                    break
                await asyncio.sleep(0.001)
        counts.append(reads.count)
        reads.heal()
        assert not destroyed & set((await keys_of_records(store)).values())
        assert await messages_of(store, "t", include_deleted=True) == expected
        assert mapped(store) not in destroyed, "a request that failed was made again: its first key is old too"

    with chunks_of(2):
        place.run(body)
    return counts[0], destroyed.reads_before


async def ended(jobs: Jobs) -> None:
    """As far as the reads allow it."""
    job_id = ""
    for _ in range(TRIES):
        try:
            job_id = job_id or (await jobs.rotation.rotate("t", destroy_after_s=60)).id
            await jobs.wait(job_id)
            return
        except StoreError:
            await asyncio.sleep(0.001)


def sound(reads: FaultyReads, keys: Sequence[bytes]) -> None:
    pass


def failing(at: int, reads_count: int = 1) -> Fault:
    def fault(reads: FaultyReads, keys: Sequence[bytes]) -> None:
        reads.fails_at, reads.fails = at, reads_count

    return fault


def hiding(way: str, number: int) -> Fault:
    def fault(reads: FaultyReads, keys: Sequence[bytes]) -> None:
        getattr(reads, way).add(keys[number])

    return fault


def test_a_read_that_fails_once_delays_the_destruction_and_loses_nothing() -> None:
    """Each read in turn."""
    count, before = lying(sound)
    assert before
    for number in range(1, count + 1):
        assert lying(failing(number))[1], number


@pytest.mark.parametrize("part", range(8))
def test_a_disk_that_fails_for_good_destroys_no_key_that_is_needed(part: int) -> None:
    """From each eighth of the reads before it on. How many they are depends on when a waiting task looks again."""
    _, needed = lying(sound)
    assert needed
    at = 1 + part * needed // 8
    _, before = lying(failing(at, 10**9))
    assert before is None or before < at


@pytest.mark.parametrize("way", ["walked", "single"])
def test_an_entry_that_is_not_found_destroys_no_key_that_is_needed(way: str) -> None:
    """Each entry in turn, by walks or by reads of single entries."""
    entries: list[bytes] = []
    lying(lambda _, keys: entries.extend(keys))
    for number in range(len(entries)):
        lying(hiding(way, number))
