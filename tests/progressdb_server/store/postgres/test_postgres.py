"""Several servers on one PostgreSQL: one truth, and nothing is acknowledged that may be lost."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from minikms.processes.postgresql import places_of
from progressdb_server.conversations import members as changing_members
from progressdb_server.conversations import membership
from progressdb_server.conversations import messages as changing_messages
from progressdb_server.conversations import threads as changing_threads
from progressdb_server.conversations import whole as conversations
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import idempotency
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import (
    AuthorNotInThreadError,
    FormatError,
    Idempotency,
    Message,
    MessageRange,
    NewMessage,
    NotAMemberError,
    NotWrittenError,
    OutcomeUnknownError,
    StoreUnavailableError,
    ThreadDeletedError,
    TooManyMembersError,
)
from progressdb_server.store.postgres import nodes, reads, tables
from progressdb_server.store.postgres import opening as postgres
from tests.harness import postgres as harness
from tests.progressdb_server.store.opened_store import (
    NOW_NS,
    becomes,
    bodies,
    emptied,
    fill,
    keys_of,
    messages_of,
    servers,
    versions_of,
)
from tests.progressdb_server.store.postgres.failing_database import (
    end_the_wait,
    hidden_warnings,
    no_standby,
    with_setting,
)
from tests.progressdb_server.store.sealing_provider import SealingProvider

HOUR_NS = 3600 * 10**9


@asynccontextmanager
async def two_servers(url: str, ahead_ns: int = 0) -> AsyncIterator[list[Conversations]]:
    async with servers(url, SealingProvider(), 0, ahead_ns) as both:
        yield both


def of(author: str, body: object, *, member: bool = False) -> NewMessage:
    return NewMessage(author=author, thread="t", body=body, as_member=member)


# --- one truth --------------------------------------------------------------------------------------------------------
async def test_a_member_removed_by_one_server_is_refused_by_the_other(database: str) -> None:
    async with two_servers(database) as (one, two):
        await one.messages.create(of("ann", 0))
        await one.members.add("t", ["bob"])
        await two.messages.create(of("bob", 1, member=True))  # the other server knows bob as a member now
        await two.members.check_reader("t", "bob")
        await one.members.remove("t", "bob")
        with pytest.raises(NotAMemberError):
            await two.messages.create(of("bob", 2, member=True))
        with pytest.raises(NotAMemberError):
            await two.members.check_reader("t", "bob")
        assert await two.members.of_thread("t") == ["ann"]
        with pytest.raises(AuthorNotInThreadError):
            await two.members.check_reader("t", "eve")


async def test_two_servers_together_keep_the_bound_on_members(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MEMBERS_COUNT_MAX", 6)
    async with two_servers(database) as (one, two):
        one.members.rule = two.members.rule = "open"
        await fill(one, 1)
        outcomes = await asyncio.gather(
            *[store.members.add("t", [f"{n}-{number}"]) for n, store in enumerate((one, two)) for number in range(3)],
            *[store.messages.create(of(f"{n}", 1, member=True)) for n, store in enumerate((one, two))],
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes if isinstance(outcome, Exception)] == [TooManyMembersError] * 3
        assert len(await two.members.of_thread("t")) == 6


async def test_what_one_server_has_deleted_the_other_does_not_serve(database: str) -> None:
    async with two_servers(database) as (one, two):
        first, second = await fill(one, 2)
        assert len(await messages_of(two, "t")) == 2
        given = await two.reading.list_tag("t", MessageRange())
        async for _ in two.reading.messages("t", tag=given):
            pass
        await one.messages.delete(first.id, author="ann")
        assert not await two.reading.list_unchanged("t", given)
        assert [m.id for m in await messages_of(two, "t")] == [second.id]
        await one.threads.delete("t", author="ann", by="ann")
        assert await two.threads.is_deleted("t")
        with pytest.raises(ThreadDeletedError):
            await two.messages.create(of("ann", 2))


async def test_appends_of_two_clocks_keep_one_order_and_all_are_there(database: str) -> None:
    """The clock of one server is an hour ahead of the other's."""
    async with two_servers(database, HOUR_NS) as (one, two):
        await fill(one, 1)
        made: list[Message] = []
        for number in range(5):
            made += await asyncio.gather(
                *[store.messages.create(of("ann", n)) for store in (one, two) for n in range(number, number + 4)]
            )
            await two.messages.create(of("ann", "last"))
            after = await one.messages.create(of("ann", "after"))
            stored = await messages_of(one, "t")
            assert stored[-1].id == after.id, "an append that begins later is later in the list"
        stored = await messages_of(two, "t")
        ids = [message.id for message in stored]
        assert ids == sorted(set(ids))
        assert {message.id for message in made} <= set(ids)
        assert len(ids) == 1 + len(made) + 10
        assert (await one.stats())["messages"] == (await two.stats())["messages"] == len(ids)


async def test_changes_of_one_message_by_two_servers_build_on_each_other(database: str) -> None:
    async with two_servers(database) as (one, two):
        (message,) = await fill(one, 1)
        await asyncio.gather(
            *[
                store.messages.set_reaction(message.id, f"{n}{at}", "ok")
                for n, store in enumerate((one, two))
                for at in range(8)
            ]
        )
        assert len((await one.reading.message(message.id)).reactions) == 16
        assert [len(version.reactions) for version in await versions_of(two, message.id)] == list(range(17))


async def test_a_change_that_other_servers_always_precede_is_refused(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is stored."""
    for room in (changing_messages, changing_threads, changing_members):
        monkeypatch.setattr(room, "CHANGE_TRIES_MAX", 1)
    provider = SealingProvider()

    async with servers(database, provider, 0, 0) as (one, two):
        (message,) = await fill(one, 1)

        async def preceded(change: Awaitable[object], by: Awaitable[object]) -> None:
            provider.holds, provider.held, provider.go_on = {"encrypt"}, 0, asyncio.Event()
            late = asyncio.ensure_future(change)
            await becomes(lambda: provider.held == 1)
            provider.holds = set()
            await by
            provider.go_on.set()
            with pytest.raises(NotWrittenError, match="at the same time"):
                await late

        await preceded(*(on.messages.set_reaction(message.id, by, "ok") for on, by in ((one, "late"), (two, "early"))))
        assert list((await one.reading.message(message.id)).reactions) == ["early"]
        await preceded(
            one.threads.update("t", author="ann", title="late"), two.threads.update("t", author="ann", title="early")
        )
        assert (await one.threads.get("t")).title == "early"


async def test_an_append_whose_stamp_is_always_late_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is stored."""
    async with two_servers(database, HOUR_NS) as (one, two):
        (first,) = await fill(two, 1)
        monkeypatch.setattr(one.clock, "recover", lambda last: None)  # a stamp of the other server precedes each try
        async with asyncio.timeout(60):
            with pytest.raises(NotWrittenError, match="at the same time"):
                await one.messages.create(of("ann", "late"))
        assert [message.id for message in await messages_of(one, "t")] == [first.id]


async def test_a_slow_server_writes_into_a_thread_beside_a_busy_one(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The busy one writes while the other encrypts, at each of its tries."""
    provider = SealingProvider()

    async with servers(database, provider, 0, 0) as (slow, busy):
        await fill(busy, 1)
        real = provider.encrypt

        async def preceded(*args: Any, **kwargs: Any) -> bytes:
            with monkeypatch.context() as alone:
                alone.setattr(provider, "encrypt", real)
                await busy.messages.create(of("ann", "busy"))
            return await real(*args, **kwargs)

        monkeypatch.setattr(provider, "encrypt", preceded)
        for store in (slow, busy):
            monkeypatch.setattr(store.clock, "now_ns", lambda: NOW_NS + time.monotonic_ns())
        async with asyncio.timeout(60):
            await slow.messages.create(of("ann", "slow"))
        assert bodies(await messages_of(busy, "t"))[-1] == "slow"


async def test_members_that_other_servers_always_change_first_are_not_changed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_servers(database) as (one, two):
        await fill(one, 1)
        real = one.members.check_room

        async def preceded(thread: str, more: int) -> changing_members.Room:
            room = await real(thread, more)
            await two.members.add(thread, [f"of two {secrets.token_hex(8)}"])
            return room

        monkeypatch.setattr(one.members, "check_room", preceded)
        monkeypatch.setattr(changing_members, "CHANGE_TRIES_MAX", 3)
        monkeypatch.setattr(changing_messages, "CHANGE_TRIES_MAX", 3)
        one.members.rule = "open"
        async with asyncio.timeout(60):
            for change in (
                one.members.add("t", ["bob"]),
                one.members.remove("t", "bob"),
                one.messages.create(of("bob", 1)),
            ):
                with pytest.raises(NotWrittenError, match="at the same time"):
                    await change
        assert "bob" not in await one.members.of_thread("t")


async def test_a_retry_at_another_server_makes_nothing_twice(database: str) -> None:
    async with two_servers(database) as (one, two):
        for thread in ("", "t"):
            retries = [Idempotency("scope", f"{thread}{n}") for n in range(4)]
            new = NewMessage(author="ann", thread=thread, body="x")
            made = await asyncio.gather(
                *[store.messages.create(new, idempotency=key) for key in retries for store in (one, two)]
            )
            assert len({message.id for message in made}) == len(retries)
        assert bodies(await messages_of(two, "t")) == ["x"] * 4
        threads = await asyncio.gather(
            *[
                store.threads.create(author="ann", title="a", idempotency=Idempotency("scope", "thread"))
                for store in (one, two)
            ]
        )
        assert threads[0].id == threads[1].id


async def test_a_thread_that_two_servers_make_at_once_has_one_key(database: str) -> None:
    async with two_servers(database) as (one, two):
        await asyncio.gather(*[store.messages.create(of("ann", n)) for n in range(3) for store in (one, two)])
        assert len(await messages_of(one, "t")) == 6
        assert await one.rekeying.key_of_thread("t") == await two.rekeying.key_of_thread("t")


async def test_a_thread_made_meanwhile_by_a_server_ahead_costs_one_key(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = SealingProvider()
    make = provider.create_dek_for_thread
    made: list[str] = []

    async with servers(database, provider, 0, HOUR_NS) as (one, two):

        async def meanwhile(thread: str, **more: Any) -> Any:
            made.append(thread)
            if len(made) == 1:
                await two.messages.create(of("ann", "first"))
            return await make(thread, **more)

        monkeypatch.setattr(provider, "create_dek_for_thread", meanwhile)
        async with asyncio.timeout(60):
            await one.messages.create(of("ann", "second"))
        assert bodies(await messages_of(two, "t")) == ["first", "second"]
        assert made == ["t", "t"]
        assert len(provider.retired) == 1


async def test_two_first_messages_of_an_author_at_two_servers_are_both_posted(database: str) -> None:
    async with two_servers(database) as (one, two):
        one.members.rule = two.members.rule = "open"
        await fill(one, 1)
        await fill(two, 1)
        for number in range(8):
            author, member = f"author-{number}", bool(number % 2)
            retry = Idempotency("scope", f"{number}") if number < 4 else None
            made = await asyncio.gather(
                *[store.messages.create(of(author, number, member=member), idempotency=retry) for store in (one, two)]
            )
            assert len({message.id for message in made}) == (1 if retry else 2)


async def test_the_clock_of_a_server_may_be_wrong_by_days(database: str) -> None:
    async with two_servers(database, 25 * HOUR_NS) as (one, two):
        await one.start()
        await two.start()
        now_ns = await one.engine.now_ns()
        retry = Idempotency("scope", "key")
        message = await one.messages.create(of("ann", 0), idempotency=retry)
        assert await idempotency.sweep(two.reads, two.writer, two.clock.now_ns()) == 0
        assert (await two.messages.create(of("ann", 0), idempotency=retry)).id == message.id
        for number in range(1, 15):
            message = await (one, two)[number % 2].messages.create(of("ann", number))
            assert abs(message.ts - now_ns) < HOUR_NS
        assert (one.clock.last.era, two.clock.last.era) == (0, 0)


async def test_each_server_tells_the_time_of_the_newest_registered_backup(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "CLOCK_S", 0.02)
    async with two_servers(database) as (one, two):
        await one.start()
        _, began_s = one.metrics.gauges["progressdb_store_backup_timestamp_seconds"]
        assert began_s() == 0
        await two.backups.register("new")
        await two.backups.register("old", 1)
        await becomes(lambda: time.time() - began_s() < 3600)


async def test_an_admin_sees_every_key_under_any_prefix(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "SCAN_ENTRIES_MAX", 7)
    async with two_servers(database) as (one, two):
        await fill(one, 5)
        await fill(one, 5, "u")
        await one.messages.create(of("bob", 1), idempotency=Idempotency("scope", "key"))
        await one.threads.delete("u", author="ann", by="ann")
        await one.backups.register("monday")
        assert await one.claims.claim("t0", "job-1", "")
        connection = await asyncpg.connect(database)
        stored = {key.decode() for (key,) in await connection.fetch("SELECT key FROM store_entry")}
        await connection.close()
        for prefix in {key[:length] for key in stored for length in range(20)} | stored:
            found = await keys_of(two, prefix)
            assert (len(found), set(found)) == (len(set(found)), {key for key in stored if key.startswith(prefix)})


# --- nothing acknowledged is lost -------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
async def test_a_write_whose_wait_for_the_standby_ends_is_not_acknowledged(database: str, how: str) -> None:
    """A cancelled wait ends with success and a warning, which no default of the role or the database hides. What was
    written is visible, and may be lost."""

    async def run(one: Conversations, two: Conversations) -> None:
        await fill(one, 1)
        async with no_standby(database) as connection:
            pending = asyncio.ensure_future(one.messages.create(of("ann", "doubtful")))
            await end_the_wait(connection, how)
            with pytest.raises(OutcomeUnknownError, match="may be stored"):
                await pending
        assert bodies(await messages_of(two, "t")) == [0, "doubtful"]
        async with asyncio.timeout(60):
            while not one.writer.available:
                await asyncio.sleep(0.01)
        await one.messages.create(of("ann", "later"))

    async with hidden_warnings(database), servers(database, SealingProvider(), 0, 0) as (one, two):
        await run(one, two)


async def test_a_session_without_what_commits_rest_on_is_not_used(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a connection pooler, which drops what the server sets."""
    real = asyncpg.connect

    async def dropping(*args: Any, server_settings: object = None, **more: Any) -> Any:
        return await real(*args, **more)

    async with hidden_warnings(database):
        monkeypatch.setattr(asyncpg, "connect", dropping)
        with pytest.raises(EngineUnavailableError, match="has client_min_messages = error, not warning"):
            await postgres.open_engine(database, single_node=True)
        monkeypatch.undo()


async def test_a_retry_after_an_unknown_outcome_waits_until_it_is_replicated(database: str) -> None:
    """It finds what it has made, and must not acknowledge it by reading alone."""
    async with two_servers(database) as (one, two):
        await fill(one, 1)
        retry = Idempotency("scope", "key")
        async with no_standby(database) as connection:
            first = asyncio.ensure_future(one.messages.create(of("ann", 1), idempotency=retry))
            await end_the_wait(connection, "pg_terminate_backend")
            again = asyncio.ensure_future(two.messages.create(of("ann", 1), idempotency=retry))
            await asyncio.wait({first, again}, timeout=0.3)
            assert not (first.done() or again.done()), "a retry that only reads would acknowledge what no standby has"
        assert (await again).id == (await first).id
        assert bodies(await messages_of(one, "t")) == [0, 1]


async def test_a_retry_on_a_node_without_the_first_write_makes_it_again(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read what was made, and the node that takes writes has changed since."""
    async with two_servers(database) as (one, two):
        await fill(one, 1)
        retry = Idempotency("scope", "key")
        first = await one.messages.create(of("ann", 1), idempotency=retry)
        connection = await asyncpg.connect(database)
        real = two.reads.get

        async def then_lost(key: bytes) -> bytes | None:
            found = await real(key)
            if key.startswith(b"idem:"):
                await connection.execute(
                    "DELETE FROM store_entry WHERE key LIKE 'idem:%' OR key LIKE $1", f"%{first.id[4:]}".encode()
                )
                await connection.execute("UPDATE store_head SET last = ''")
            return found

        monkeypatch.setattr(two.reads, "get", then_lost)
        again = await two.messages.create(of("ann", 1), idempotency=retry)
        assert again.id != first.id
        assert again.id in [message.id for message in await messages_of(one, "t")]
        await connection.close()


async def test_what_was_done_before_is_acknowledged_once_it_is_replicated(database: str) -> None:
    async with two_servers(database) as (one, two):
        first, _ = await fill(one, 2)
        await one.members.add("t", ["bob"])
        await one.messages.delete(first.id, author="ann")
        async with no_standby(database):
            again = [
                asyncio.ensure_future(two.messages.delete(first.id, author="ann")),
                asyncio.ensure_future(two.members.add("t", ["bob"])),
            ]
            done, _ = await asyncio.wait(again, timeout=0.5)
            assert not done
        await asyncio.gather(*again)


def test_only_a_standby_that_confirms_commits_is_counted(database: str) -> None:
    """Others are connected too: `doctor` says that no write is confirmed, and how to mend it."""
    settings = f"host={places_of(database)[0].host} user=test dbname=postgres"

    async def found(connection: asyncpg.Connection[Any], names: str, wanted: int) -> list[str]:
        await with_setting(connection, "synchronous_standby_names", names)
        async with asyncio.timeout(60):
            while (page := await tables.examine(database, single_node=False)).connected != wanted:
                await asyncio.sleep(0.02)
        return [problem for problem in page.problems if "synchronous_standby_names" in problem]

    async def run() -> None:
        await (await emptied(database)).end()
        connection = await asyncpg.connect(database, server_settings={"synchronous_commit": "local"})
        try:
            assert await found(connection, "one", 1) == []
            for names, connected, wanted in (("ANY 2 (one, two)", 1, 2), ("two", 0, 1)):
                (problem,) = await found(connection, names, connected)
                assert f"{connected} of those in synchronous_standby_names ({names}), and {wanted} must" in problem
            await connection.execute("CREATE ROLE plain LOGIN; GRANT SELECT ON store_schema TO plain")
            page = await tables.examine(database.replace("test@", "plain@"), single_node=False)
            assert page.connected is None
            await connection.execute("DROP OWNED BY plain; DROP ROLE plain")
        finally:
            await with_setting(connection, "synchronous_standby_names", "")
            await connection.close()

    with harness.receiver(settings, "one"):
        asyncio.run(run())


async def test_a_lost_connection_before_the_commit_costs_no_write(database: str) -> None:
    async with two_servers(database) as (one, two):
        await fill(one, 1)
        connection = await asyncpg.connect(database)
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND application_name"
            " = 'progressdb' AND query LIKE '%COMMIT'"
        )
        await connection.close()
        await one.messages.create(of("ann", 1))
        assert bodies(await messages_of(two, "t")) == [0, 1]


async def test_a_server_of_another_schema_writes_nothing_and_does_not_start(database: str) -> None:
    async with two_servers(database) as (one, _):
        await fill(one, 1)
        connection = await asyncpg.connect(database)
        await connection.execute("UPDATE store_schema SET number = number + 1")
        try:
            with pytest.raises(StoreUnavailableError):
                await one.messages.create(of("ann", 1))
            with pytest.raises(FormatError, match="has schema 2, this version has 1: start the version"):
                await postgres.open_engine(database, single_node=True)
            with pytest.raises(FormatError, match="has schema 2"):
                await tables.upgrade(database)
        finally:
            await connection.execute("UPDATE store_schema SET number = number - 1")
            await connection.close()
        assert bodies(await messages_of(one, "t")) == [0]


async def test_a_group_keeps_the_writes_whose_conditions_hold(database: str) -> None:
    async with two_servers(database) as (one, _):
        writes = [
            Write([(b"job:a", b"1")], [(b"job:a", None)]),
            Write([(b"job:a", b"2")], [(b"job:a", b"1")]),
            Write([(b"job:a", b"3")], [(b"job:a", b"1")]),
            Write([(b"job:a", None), (b"job:b", b"x")], [(b"job:a", b"2")]),
        ]
        outcomes = await asyncio.gather(*[one.writer.commit(write) for write in writes], return_exceptions=True)
        assert [type(outcome).__name__ for outcome in outcomes] == [
            "NoneType", "NoneType", "ConditionFailedError", "NoneType",
        ]  # fmt: skip
        assert await one.reads.scan(b"job:", b"job;", limit=9) == [(b"job:b", b"x")]


# --- opening ----------------------------------------------------------------------------------------------------------
async def test_one_disk_is_enough_only_where_that_is_said(database: str) -> None:
    await (await emptied(database)).end()
    with pytest.raises(StoreUnavailableError, match="set synchronous_standby_names there, or"):
        await postgres.open_engine(database, single_node=False)
    with pytest.raises(FormatError, match="holds a store already"):
        await tables.init(database)
    assert await tables.upgrade(database) == (1, 1)


async def test_the_role_of_the_servers_may_not_change_the_tables(database: str) -> None:
    own, of_server = database.replace("/postgres?", "/own?"), database.replace("test@/postgres?", "server@/own?")

    connection = await asyncpg.connect(database)
    await connection.execute("CREATE ROLE server LOGIN")
    await connection.execute("CREATE DATABASE own")
    await connection.close()
    with pytest.raises(FormatError, match="run progressdb store init"):
        await postgres.open_engine(own, single_node=True)
    await tables.init(own, "server")
    store = Conversations(await postgres.open_engine(of_server, single_node=True), SealingProvider())
    try:
        await fill(store, 2)
        assert len(await messages_of(store, "t")) == 2
    finally:
        await store.close()
    connection = await asyncpg.connect(of_server)
    for refused in (
        "UPDATE store_schema SET number = 2",
        "ALTER TABLE store_entry ADD x int",
        "DROP TABLE store_head",
        "CREATE TEMPORARY TABLE x (y int)",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(refused)
    await connection.close()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("mysql://db", "begin with postgresql://"),
        ("postgresql://db/x", "sslmode=verify-full"),
        ("postgresql://db/x?sslmode=require", "sslmode=verify-full"),
        ("postgresql:///x", "sslmode=verify-full"),
        ("postgresql:///x?host=/run/postgresql&host=db", "sslmode=verify-full"),
        ("postgresql:///x?host=/run/postgresql,db", "sslmode=verify-full"),
        ("postgresql://%2Frun,db/x", "sslmode=verify-full"),
        ("postgresql://" + ",".join("abcdefghijklmnopq") + "/x?sslmode=verify-full", "more than 16 hosts"),
        ("postgresql:///x?host=/run&client_min_messages=error", "must not hold client_min_messages"),
        ("postgresql:///x?host=/run&Synchronous_Commit=off", "must not hold Synchronous_Commit"),
        ("postgresql:///x?host=/run&options=-c%20client_min_messages%3Derror", "must not hold options"),
        ("postgresql://db:many/x?sslmode=verify-full", "no URL"),
        ("postgresql://user:secret@db/x?sslmode=verify-full", "password file"),
        ("postgresql://db/x?sslmode=verify-full&password=secret", "password file"),
        ("postgresql://db/x?sslmode=verify-full&sslpassword=secret", "must not hold a password"),
    ],
)
def test_a_url_that_does_not_check_the_server_or_holds_a_secret_is_refused(url: str, why: str) -> None:
    with pytest.raises(FormatError, match=why) as refused:
        nodes.check_url(url)
    assert "secret" not in str(refused.value)


def test_a_url_with_checked_names_or_a_socket_is_taken() -> None:
    nodes.check_url("postgresql://user@a:5432,b:5432/x?sslmode=verify-full&sslrootcert=/etc/ca.pem")
    nodes.check_url("postgresql:///x?host=/run/postgresql")
