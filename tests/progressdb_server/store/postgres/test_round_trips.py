"""What each operation asks of PostgreSQL, in round trips (docs/benchmarks.md)."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import check
from progressdb_server.store.model import Idempotency, Message, NewMessage
from progressdb_server.store.postgres import opening as postgres
from progressdb_server.store.postgres import writer as postgres_writer
from tests.harness.round_trips import RoundTrips, counted
from tests.progressdb_server.store.opened_store import emptied, fill, messages_of, threads_of, versions_of
from tests.progressdb_server.store.sealing_provider import SealingProvider

ROUND_TRIPS = {
    "append": 1,
    "append with an idempotency key": 2,
    "edit": 4,
    "reaction": 4,
    "get": 4,
    "list of 100": 3,
    "list of 100 after 50 edits": 3,
    "versions of a message": 5,
    "list of threads": 4,
    "add members": 5,
    "remove a member": 5,
    "check of a member": 1,
    "delete a message": 5,
    "create a thread": 1,
    "delete a thread": 3,
}
COUNT = 100


async def measured(trips: RoundTrips, operation: Callable[[int], Awaitable[object]]) -> int:
    """Of the second time: the first one prepares statements."""
    await operation(0)
    before = trips.count
    await operation(1)
    return trips.count - before


def test_each_operation_takes_its_known_number_of_round_trips(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_writer, "WRITERS_COUNT", 1)  # so that statements are prepared after the first time

    async def run(directory: Path) -> None:
        await (await emptied(database)).end()
        (real,) = parse_qs(urlsplit(database).query)["host"]
        async with counted(Path(real), directory) as trips:
            url = f"postgresql://test@/postgres?host={directory}"
            engine = await postgres.open_engine(url, single_node=True)
            store = Conversations(engine, SealingProvider())
            try:
                assert await _all(store, trips) == ROUND_TRIPS
            finally:
                await store.close()
            before = trips.count
            report = await check.check(url, None, None)
            assert (report.findings, report.counts["messages"] > COUNT) == ([], True)
            assert trips.count - before < COUNT, "a few for each chunk of entries, not for each entry"

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(Path(directory)))


async def _all(store: Conversations, trips: RoundTrips) -> dict[str, int]:
    await fill(store, 1, "u")
    made: list[Message] = await fill(store, COUNT)

    async def of_all(number: int) -> object:
        return await messages_of(store, "t")

    async def edit(number: int) -> object:
        return await store.messages.update(made[number].id, author="ann", body=1, role=None, reply_to=None)

    listed = await measured(trips, of_all)
    for message in made[COUNT // 2 :]:
        await store.messages.update(message.id, author="ann", body="edited", role=None, reply_to=None)
        await store.messages.set_reaction(message.id, "ann", "ok")
    operations: dict[str, Callable[[int], Awaitable[object]]] = {
        "append": lambda n: store.messages.create(NewMessage(author="ann", thread="t", body=n)),
        "append with an idempotency key": lambda n: store.messages.create(
            NewMessage(author="ann", thread="t", body=n), idempotency=Idempotency("scope", f"{n}")
        ),
        "edit": edit,
        "reaction": lambda n: store.messages.set_reaction(made[n].id, "ann", f"{n}"),
        "get": lambda n: store.reading.message(made[n].id),
        "list of 100 after 50 edits": of_all,
        "versions of a message": lambda _: versions_of(store, made[-1].id),
        "list of threads": lambda _: threads_of(store, None),
        "add members": lambda n: store.members.add("t", [f"bob{n}", f"eve{n}"]),
        "remove a member": lambda n: store.members.remove("t", f"bob{n}"),
        "check of a member": lambda _: store.members.check_reader("t", "ann"),
        "delete a message": lambda n: store.messages.delete(made[n].id, author="ann"),
        "create a thread": lambda n: store.threads.create(author="ann", title="a"),
        "delete a thread": lambda n: store.threads.delete("ut"[n], author="ann", by="ann"),
    }
    found = {name: await measured(trips, operation) for name, operation in operations.items()}
    return {"list of 100": listed} | found
