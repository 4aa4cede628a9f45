"""A whole store is copied to PostgreSQL and back, also by a command that is killed at any write."""

import asyncio
import signal
import tempfile
from pathlib import Path

import asyncpg
import pytest

from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import copying, local, offline, places
from progressdb_server.store.check import check, repair_offline
from progressdb_server.store.copying import Copied
from progressdb_server.store.model import FormatError, NewMessage, StoreLockedError
from progressdb_server.store.postgres import offline as postgres_offline
from progressdb_server.store.postgres import opening as postgres
from progressdb_server.store.rocks.engine import RocksEngine
from tests.harness.forked import Forked
from tests.progressdb_server.store import killed_copy
from tests.progressdb_server.store.opened_store import TickingClock, disk, emptied, fill, messages_of, opened, servers
from tests.progressdb_server.store.sealing_provider import SealingProvider

MESSAGES = 12


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (offline, postgres_offline):
        monkeypatch.setattr(module, "SCAN_ENTRIES_MAX", 10)


async def made(path: str, provider: SealingProvider | None = None) -> None:
    async with opened(RocksEngine(path), provider, TickingClock()) as store:
        local.claim(disk(store))
        await fill(store, MESSAGES, "one")
        sent = await fill(store, MESSAGES, "two")
        await store.messages.delete(sent[0].id, author="ann")
        await store.members.add("one", ["ben"])
        await store.messages.create(NewMessage(author="ann", thread="long", body="x" * 100_000))


async def empty(url: str) -> None:
    await (await emptied(url)).end()


async def copied(source: str, target: str) -> Copied:
    return await copying.copy(source, target, lambda done, total: None)


async def all_of(place: str) -> dict[bytes, bytes]:
    async with places.alone(place) as entries:
        return {key: value async for page in entries.walk() for key, value in page}


def killed_at(put: int, source: str, target: str) -> bool:
    """Whether the copy was killed at that put; else it has ended."""
    words = [killed_copy.__name__, str(put), source, target]
    with tempfile.TemporaryFile() as output:
        status = Forked(words, None, output.fileno(), output.fileno()).wait(60)
        output.seek(0)
        assert status in (0, -signal.SIGKILL), output.read().decode()
    return status != 0


async def test_a_copy_to_a_database_and_back_is_the_same_store(tmp_path: Path, database: str) -> None:
    one, two, provider = str(tmp_path / "one"), str(tmp_path / "two"), SealingProvider()
    await made(one, provider)
    await empty(database)
    there = await copied(one, database)
    assert there.counted.messages == 2 * MESSAGES + 2
    assert (await check(database, provider, None)).findings == []
    back = await copied(database, two)
    assert (back.entries, back.digest, back.changed) == (*there[:2], there.entries)
    assert await all_of(two) == await all_of(one)
    store = Conversations(await postgres.open_engine(database, single_node=True), provider)
    last = await store.messages.create(NewMessage(author="ann", thread="one", body="after it"))
    assert (await messages_of(store, "one"))[-1].id == last.id
    await store.close()


@pytest.mark.parametrize("direction", ["to the database", "from it"])
def test_a_copy_that_is_killed_at_any_write_is_continued(tmp_path: Path, database: str, direction: str) -> None:
    source, target = str(tmp_path / "one"), database
    asyncio.run(made(source))
    asyncio.run(empty(database))
    if direction == "from it":
        asyncio.run(copied(source, target))
        source, target = database, str(tmp_path / "two")
    before = asyncio.run(all_of(source))
    put = 1  # the first one of all begins the copy
    while killed_at(put, source, target):
        with pytest.raises(FormatError, match="has not ended"):
            asyncio.run(all_of(target))
        put += 2
        if put == 5:  # an entry that the source has no more
            asyncio.run(remove(source))
            before = asyncio.run(all_of(source))
    assert put > 5
    found = asyncio.run(all_of(target))
    assert {key: value for key, value in found.items() if not key.startswith(b"store:")} == {
        key: value for key, value in before.items() if not key.startswith(b"store:")
    }


async def remove(place: str) -> None:
    async with places.alone(place) as entries:
        await entries.put([(b"index:writer:one:ben", None)])


async def test_a_target_that_holds_something_else_is_refused(tmp_path: Path, database: str) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    await made(one)
    await empty(database)
    await copied(one, database)
    for target in (database, one):
        with pytest.raises(FormatError, match=r"the same|another store"):
            await copied(one, target)
    await made(two)
    with pytest.raises(FormatError, match="another store"):
        await copied(database, two)
    await empty(database)
    assert killed_at(2, one, database)
    with pytest.raises(FormatError, match="another copy"):
        await copied(two, database)


async def test_a_store_that_is_served_is_not_copied(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_offline, "STOPPED_S_MAX", 0.2)

    one = str(tmp_path / "one")
    await made(one)
    await empty(database)
    engine = await places.open_engine(one)
    with pytest.raises(StoreLockedError):
        await copied(one, database)
    await engine.end()
    async with servers(database, SealingProvider(), 0):
        for source, target in ((database, str(tmp_path / "two")), (one, database)):
            with pytest.raises(StoreLockedError, match="is connected"):
                await copied(source, target)


async def test_no_server_commits_while_its_database_is_copied(database: str) -> None:
    """Also one whose connection the command does not see."""
    await empty(database)
    async with postgres_offline.alone(database):
        connection = await asyncpg.connect(database)
        with pytest.raises(asyncpg.LockNotAvailableError):
            await connection.execute("SELECT 1 FROM store_schema FOR SHARE NOWAIT")
        await connection.close()


async def test_a_store_in_a_database_is_checked_and_repaired(tmp_path: Path, database: str) -> None:
    one = str(tmp_path / "one")
    await made(one)
    await empty(database)
    await copied(one, database)
    connection = await asyncpg.connect(database)
    await connection.execute(
        "DELETE FROM store_entry WHERE key = 'index:closed:x' OR key LIKE 'index:order:two:%'::bytea"
    )
    await connection.execute("UPDATE store_counter SET messages = messages + 5")
    await connection.execute("INSERT INTO store_entry VALUES ('x', 'no:such', '')")
    await connection.close()
    found = (await check(database, None, None)).findings
    assert {problem.kind for problem in found} == {"unindexed", "miscounted", "unknown"}
    _, fixed = await repair_offline(database)
    assert {problem.kind for problem in fixed} == {"unindexed", "miscounted"}
    assert [problem.kind for problem in (await check(database, None, None)).findings] == ["unknown"]
