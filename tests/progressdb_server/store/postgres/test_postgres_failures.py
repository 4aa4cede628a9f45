"""What a failing PostgreSQL does to a write: it is made again, refused, or its outcome is unknown."""

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from minikms.processes import postgresql
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import NewMessage, NotWrittenError, OutcomeUnknownError, StoreUnavailableError
from progressdb_server.store.postgres import opening as postgres
from progressdb_server.store.postgres import reads, tables
from progressdb_server.store.postgres import writer as postgres_writer
from progressdb_server.store.postgres.nodes import Nodes, now_s
from progressdb_server.store.postgres.writer import PostgresWriter
from tests.harness.logged import capture_logs
from tests.harness.round_trips import PORT_NAME, counted
from tests.progressdb_server.store.opened_store import becomes, bodies, emptied, fill, messages_of, servers
from tests.progressdb_server.store.postgres.failing_database import (
    end_the_wait,
    no_standby,
    raising,
    waiting,
    with_setting,
)
from tests.progressdb_server.store.sealing_provider import SealingProvider


@asynccontextmanager
async def one_server(url: str) -> AsyncIterator[Conversations]:
    async with servers(url, SealingProvider(), 0) as (store,):
        await fill(store, 1)
        yield store


def of(body: object) -> NewMessage:
    return NewMessage(author="ann", thread="t", body=body)


@pytest.mark.parametrize("code", ["40001", "40P01", "25006", "53300"])
async def test_a_group_that_the_database_refuses_is_written_again(database: str, code: str) -> None:
    """Also where its node takes no writes any more: another connection leads to the one that does."""
    async with one_server(database) as store:
        async with raising(database, code, 2):
            await store.messages.create(of(1))
        assert bodies(await messages_of(store, "t")) == [0, 1]


@pytest.mark.parametrize(("code", "why"), [("42501", "right of the servers' role"), ("53100", "no room")])
async def test_a_missing_right_and_a_full_disk_are_said_at_once(database: str, code: str, why: str) -> None:
    async with one_server(database) as store:
        async with raising(database, code, 1000) as connection:
            with capture_logs() as logs, pytest.raises(NotWrittenError, match=why):
                await store.messages.create(of(1))
            assert await connection.fetchval("SELECT last_value FROM raised") == 1
        assert {line.get("sqlstate") for line in logs if line["event"] == "store_commit_refused"} == {code}
        await becomes(lambda: store.writer.available)
        await store.messages.create(of(2))
        assert bodies(await messages_of(store, "t")) == [0, 2]


async def test_a_group_is_tried_a_bounded_number_of_times(database: str) -> None:
    async with one_server(database) as store:
        async with raising(database, "40001", 1000) as connection:
            with pytest.raises(StoreUnavailableError, match="too busy"):
                await store.messages.create(of(1))
            tries = await connection.fetchval("SELECT last_value FROM raised")
            assert tries <= postgres_writer.TRIES_MAX
        assert bodies(await messages_of(store, "t")) == [0]
        await store.messages.create(of(2))


@pytest.mark.parametrize("code", ["57P01", "40003", "08006", "XX000"])
async def test_an_error_may_leave_the_commit_in_doubt(database: str, code: str) -> None:
    async with one_server(database) as store:
        async with raising(database, code, 1):
            with pytest.raises(OutcomeUnknownError, match="may be stored"):
                await store.messages.create(of(1))
        await becomes(lambda: store.writer.available)
        await store.messages.create(of(2))
        assert bodies(await messages_of(store, "t")) == [0, 2]


async def test_a_session_that_is_ended_within_a_group_leaves_it_in_doubt(database: str) -> None:
    async with one_server(database) as store:
        connection = await asyncpg.connect(database)
        async with connection.transaction():
            await connection.execute("SELECT FROM store_head FOR UPDATE")
            writing = asyncio.ensure_future(store.messages.create(of(1)))
            await end_the_wait(connection, "pg_terminate_backend", "transactionid")
            with pytest.raises(OutcomeUnknownError):
                await writing
        await connection.close()
        await store.writer.settled()
        await store.messages.create(of(2))
        assert bodies(await messages_of(store, "t")) == [0, 2]


HEAD_LOCKED = "SELECT FROM store_head WHERE tkey LIKE '%thread:t'::bytea FOR UPDATE"
RECORDS_LOCKED = "SELECT FROM store_entry WHERE tkey LIKE '%thread:t'::bytea FOR UPDATE"


@pytest.mark.parametrize("locked", [HEAD_LOCKED, RECORDS_LOCKED], ids=["last stamp", "records"])
async def test_a_lock_on_one_thread_holds_up_no_other_one(
    database: str, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a session that an administrator has forgotten. The writes of the thread keep their order."""
    monkeypatch.setattr(PostgresWriter, "lock_s", 0.1)
    others = [f"other-{number}" for number in range(8)]
    async with one_server(database) as store:
        (message,) = await messages_of(store, "t")
        for other in others:
            await fill(store, 1, other)
        connection = await asyncpg.connect(database)
        async with connection.transaction():
            await connection.execute(locked)
            waits = asyncio.ensure_future(store.messages.set_reaction(message.id, "ann", "ok"))
            late: list[asyncio.Future[Any]] = []
            for number in range(1, 4):
                await waiting(connection, "transactionid")
                late.append(asyncio.ensure_future(store.messages.create(of(number))))
                await asyncio.gather(
                    *[store.messages.create(NewMessage(author="ann", thread=one, body=number)) for one in others]
                )
                await store.check_writes()
            assert not waits.done()
        await asyncio.gather(waits, *late)
        await connection.close()
        for name in ("t", *others):
            assert bodies(await messages_of(store, name)) == [0, 1, 2, 3]
        assert (await store.reading.message(message.id)).reactions == {"ann": "ok"}


async def test_no_writable_node_refuses_writes_until_there_is_one(database: str) -> None:
    async with one_server(database) as store:
        connection = await asyncpg.connect(database)
        await with_setting(connection, "default_transaction_read_only", "on")
        try:
            with pytest.raises(NotWrittenError, match="not available"):
                await store.messages.create(of(1))
        finally:
            await with_setting(connection, "default_transaction_read_only", "")
            await connection.close()
        await becomes(lambda: store.writer.available)
        await store.messages.create(of(2))
        assert bodies(await messages_of(store, "t")) == [0, 2]


async def test_a_commit_without_a_standby_ends_at_its_deadline(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session is left to wait: had it been cancelled, what was written would be visible."""
    real = postgresql.bounded
    async with one_server(database) as store:
        async with no_standby(database) as connection:

            async def bounded(session: Any, work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
                """Its deadline comes when it waits."""
                assert 0 < timeout_s <= postgres_writer.COMMIT_S_MAX
                committing = asyncio.ensure_future(work)
                await waiting(connection)
                return await real(session, ended(committing), 0)

            async def ended(task: asyncio.Future[Any]) -> Any:
                return await task

            monkeypatch.setattr(postgres_writer, "bounded", bounded)
            with pytest.raises(OutcomeUnknownError, match="may be stored"):
                await store.messages.create(of(1))
            assert await waiting(connection)
            count = await connection.fetchval("SELECT count(*) FROM store_entry WHERE key LIKE 'thread:t:msg:%'")
            assert count == 1
            async with asyncio.timeout(60):
                await store.writer.close()  # a server can stop meanwhile
        async with asyncio.timeout(60):
            while bodies(await messages_of(store, "t")) != [0, 1]:  # the session is released a moment later
                await asyncio.sleep(0.01)


async def test_a_read_that_met_its_deadline_is_not_sent_again(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "READ_S_MAX", 0.5)
    async with one_server(database) as store:
        engine: Any = store.reads
        connection = await asyncpg.connect(database)
        await connection.execute("CREATE SEQUENCE tries")
        try:
            with pytest.raises(EngineUnavailableError):
                await engine.fetch("SELECT nextval('tries'), pg_sleep(60)")
            assert await connection.fetchval("SELECT last_value FROM tries") == 1
        finally:
            await connection.execute(  # otherwise the read that was given up would hold the sequence for a minute
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            )
            await connection.execute("DROP SEQUENCE tries")
            await connection.close()


async def test_a_command_does_not_wait_for_a_database_without_end(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await (await emptied(database)).end()
    connection = await asyncpg.connect(database)
    async with connection.transaction():
        await connection.execute("LOCK TABLE store_schema")
        with monkeypatch.context() as patched:
            patched.setattr(tables, "COMMAND_S_MAX", 0.5)
            async with asyncio.timeout(60):
                with pytest.raises(EngineUnavailableError):
                    await tables.upgrade(database)
    await connection.close()
    assert await tables.upgrade(database) == (1, 1)


async def test_a_request_that_is_given_up_does_not_cancel_its_commit(database: str) -> None:
    async with one_server(database) as store:
        async with no_standby(database) as connection:
            writing = asyncio.ensure_future(store.messages.create(of(1)))
            before = await waiting(connection)
            writing.cancel()
            await asyncio.wait({writing})
            await asyncio.sleep(0.2)
            assert set(before) <= set(await waiting(connection)), "others may wait too"
        await store.messages.create(of(2))
        assert bodies(await messages_of(store, "t")) == [0, 1, 2]


async def test_a_server_that_stops_while_it_looks_back_leaves_no_session(database: str) -> None:
    await (await emptied(database)).end()
    nodes = Nodes(database, replicated=False)
    nodes.last_confirmed, nodes.last_confirmed_s = b"thread:t:msg:1", now_s()
    connection = await asyncpg.connect(database)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE store_entry")
            finding = asyncio.ensure_future(postgres_writer.find(nodes))
            pids = await waiting(connection, "relation")
            finding.cancel()
            await asyncio.wait({finding})
        async with asyncio.timeout(60):
            while await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1)", pids):
                await asyncio.sleep(0.01)
    finally:
        await connection.close()


async def test_a_server_without_replication_reads_whichever_host_takes_writes(database: str, tmp_path: Path) -> None:
    """It reads first, and has no lease whose renewal would look for another host."""
    await (await emptied(database)).end()
    (real,) = parse_qs(urlsplit(database).query)["host"]
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    url = f"postgresql://test@/postgres?host={first},{second}"
    async with counted(Path(real), first):
        store = Conversations(await postgres.open_engine(url, single_node=True), SealingProvider())
        await fill(store, 1)
    (first / PORT_NAME).unlink(missing_ok=True)
    connection = await asyncpg.connect(database)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'progressdb'"
    )
    await connection.close()
    async with counted(Path(real), second):
        assert bodies(await messages_of(store, "t")) == [0]
        await store.close()


async def test_a_host_that_does_not_answer_delays_no_other(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose processes are stopped: the kernel takes the connection, and nobody reads it."""
    await (await emptied(database)).end()
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(str(tmp_path / ".s.PGSQL.5432"))
    silent.listen()
    both = database.replace("host=", f"host={tmp_path},")
    store = Conversations(await postgres.open_engine(both, single_node=True), SealingProvider())
    await fill(store, 1)
    assert bodies(await messages_of(store, "t")) == [0]
    await store.close()
    monkeypatch.setattr(postgresql, "CONNECT_S_MAX", 0.5)
    with pytest.raises(EngineUnavailableError, match="not available now"):
        await postgres.open_engine(f"postgresql://test@/postgres?host={tmp_path}", single_node=True)
    silent.close()


@pytest.mark.parametrize("first", ["db1", "db2"])
async def test_what_a_node_says_is_not_hidden_by_one_that_is_away(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    async def failing(url: str, *, host: str, **_: object) -> None:
        if host != first:
            await asyncio.sleep(0.01)
        raise OSError("no route") if host == "db2" else asyncpg.PostgresError("a certificate is missing")

    monkeypatch.setattr(asyncpg, "connect", failing)
    with pytest.raises(asyncpg.PostgresError, match="certificate"):
        await postgresql.Database("postgresql://a@db1,db2/x", replicated=True, settings={}).find()
