"""The disk lies: files of RocksDB that are damaged while lists, rotations, copies, backups and the search for orphaned
keys read them, and are whole again afterwards. Nothing that the disk still has is lost by what the program did."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from progressdb_server.config import RotationSection
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs import runner
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import JobError
from progressdb_server.store import backup, copying
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import BackupError, FormatError, Message, NewMessage, StoreError
from progressdb_server.store.rocks.engine import RocksEngine
from tests.progressdb_server.jobs.rotating import UNBOUNDED, chunks_of
from tests.progressdb_server.store.opened_store import NOW_NS, TickingClock, messages_of, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

THREADS = ("t", "u", "v")
MESSAGES = 90
DAY_NS = 86_400 * 10**9
ENDS_S = 1.0
"""A job on a disk that fails may wait for ever."""
AUTOMATIC = RotationSection(records_per_second=0, max_age="1s", destroy_old_after="1s")

Expected = dict[str, list[Message]]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_S_MIN", "READ_RETRY_S", "WATCH_S"):
        monkeypatch.setattr(runner, name, 0.001)


class Place:
    """A store with files of its own, and what its threads hold."""

    def __init__(self, directory: Path, numbers: random.Random) -> None:
        self.path = directory / "store"
        self.numbers = numbers
        self.provider = SealingProvider()
        self.clock = TickingClock(NOW_NS)
        self.expected: Expected = {}
        self.directory = directory

    async def fill(self) -> None:
        engine = RocksEngine(str(self.path))
        async with opened(engine, self.provider, self.clock) as store:
            for number in range(MESSAGES):
                for thread in THREADS:
                    text = self.numbers.randbytes(300).hex()
                    made = await store.messages.create(NewMessage(author="ann", thread=thread, body=text))
                    if number % 7 == 0:
                        await store.messages.set_reaction(made.id, "bob", "+1")
                if number == MESSAGES // 2:
                    engine.compact()
            self.expected = {thread: await messages_of(store, thread) for thread in THREADS}
            engine.compact()

    async def use(
        self, body: Callable[[Conversations, Jobs], Awaitable[None]], settings: RotationSection = UNBOUNDED
    ) -> None:
        """Raises what the opening raises."""
        async with opened(RocksEngine(str(self.path)), self.provider, self.clock) as store:
            jobs = Jobs(store, self.provider, settings, exclusive=True, now_ns=self.clock)
            await jobs.start()
            try:
                await body(store, jobs)
            finally:
                await jobs.close()

    async def check(self, path: Path) -> None:
        """A store at `path` has everything, and its threads take writes."""
        async with opened(RocksEngine(str(path)), self.provider, self.clock) as store:
            for thread, messages in self.expected.items():
                assert await messages_of(store, thread) == messages

    def damage(self) -> Callable[[], None]:
        """Of one file; returns what puts it right."""
        file = self.numbers.choice(sorted(self.path.glob("*.sst")))
        good = file.read_bytes()
        at = self.numbers.randrange(len(good))
        match self.numbers.choice(["bit", "zeros", "cut"]):
            case "bit":
                bad = good[:at] + bytes([good[at] ^ 1 << self.numbers.randrange(8)]) + good[at + 1 :]
            case "zeros":
                bad = (good[:at] + bytes(4096) + good[at + 4096 :])[: len(good)]
            case _:
                bad = good[:at]

        def put(content: bytes) -> None:
            if file.exists():  # RocksDB may have merged and deleted it
                with file.open("r+b") as there:  # the file that RocksDB has open
                    there.write(content)
                    there.truncate()

        put(bad)
        return lambda: put(good)


async def lists(place: Place) -> None:
    async def body(store: Conversations, jobs: Jobs) -> None:
        for thread, messages in place.expected.items():
            with contextlib.suppress(StoreError):
                assert await messages_of(store, thread) == messages

    await place.use(body)


async def _destroyed_when_due(place: Place, jobs: Jobs) -> None:
    place.clock.now += DAY_NS
    for _ in range(3):
        with contextlib.suppress(StoreError):
            await jobs.destruction.begin()


async def rotations(place: Place) -> None:
    async def body(store: Conversations, jobs: Jobs) -> None:
        for thread in THREADS:
            with contextlib.suppress(StoreError, JobError, TimeoutError):
                async with asyncio.timeout(ENDS_S):
                    await jobs.wait((await jobs.rotation.rotate(thread, destroy_after_s=1)).id)
        await _destroyed_when_due(place, jobs)

    await place.use(body)


async def automatic_rotations(place: Place) -> None:
    async def body(store: Conversations, jobs: Jobs) -> None:
        with contextlib.suppress(StoreError, JobError, TimeoutError):
            async with asyncio.timeout(ENDS_S):
                await jobs.rotation.begin()
                while any(jobs.has_job(thread) for thread in THREADS):
                    await asyncio.sleep(0.01)
        await _destroyed_when_due(place, jobs)

    await place.use(body, AUTOMATIC)


async def copies(place: Place) -> None:
    target = place.directory / f"copy-{place.numbers.random()}"
    await copying.copy(str(place.path), str(target), lambda done, of: None)
    await place.check(target)


async def backups(place: Place) -> None:
    made = place.directory / f"backup-{place.numbers.random()}"

    async def body(store: Conversations, jobs: Jobs) -> None:
        await store.backups.back_up(str(made))

    await place.use(body)
    target = place.directory / f"restored-{place.numbers.random()}"
    backup.restore(str(made), str(target))
    await place.check(target)


async def orphans(place: Place) -> None:
    async def body(store: Conversations, jobs: Jobs) -> None:
        before = set(place.provider.retired)
        with contextlib.suppress(StoreError):
            await jobs.orphans.retire()
        assert place.provider.retired == before

    await place.use(body)


USES = [lists, rotations, automatic_rotations, copies, backups, orphans]


def lie(directory: Path, use: Callable[[Place], Awaitable[None]], seed: int, rounds: int) -> int:
    """Returns how many keys were destroyed."""
    place = Place(directory, random.Random(seed))

    async def run() -> None:
        await place.fill()
        for _ in range(rounds):
            heal = place.damage()
            try:
                await use(place)
            except (StoreError, FormatError, BackupError, copying.CopyError, EngineUnavailableError):
                pass
            finally:
                heal()
            await place.check(place.path)

    with chunks_of(16):
        asyncio.run(run())
    return len(place.provider.destroyed)


@pytest.mark.parametrize("use", USES)
def test_a_use_of_a_disk_that_lies_loses_nothing_that_it_has(tmp_path: Path, use: Any) -> None:
    destroyed = lie(tmp_path, use, 49, 6)
    assert bool(destroyed) == (use in (rotations, automatic_rotations))


@pytest.mark.torture
@pytest.mark.parametrize("use", USES)
def test_many_uses_of_a_disk_that_lies_lose_nothing_that_it_has(tmp_path: Path, use: Any) -> None:
    for number in range(12):
        seed = random.randrange(2**32)
        print(f"{use.__name__}: seed {seed}")
        lie(tmp_path / str(number), use, seed, 30)
