"""A PostgreSQL that fails as a test asks it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

_RAISING = """
CREATE SEQUENCE raised;
CREATE FUNCTION raise_some() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF nextval('raised') <= %d THEN RAISE EXCEPTION SQLSTATE '%s'; END IF;
    RETURN new;
END $$;
CREATE TRIGGER raising BEFORE INSERT ON store_counter FOR EACH ROW EXECUTE FUNCTION raise_some();
"""


async def with_setting(connection: asyncpg.Connection[Any], name: str, value: str) -> None:
    """Of the whole server; empty for its default."""
    how = f"SET {name} = '{value}'" if value else f"RESET {name}"
    before = await connection.fetchval(f"SHOW {name}")
    await connection.execute(f"ALTER SYSTEM {how}")
    await connection.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(60):
        while await connection.fetchval(f"SHOW {name}") == before:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def hidden_warnings(url: str) -> AsyncIterator[None]:
    """The defaults of the role and of the database hide what a cancelled wait for the standby says."""
    connection = await asyncpg.connect(url)
    owners = ("ROLE test", "DATABASE postgres", "ROLE test IN DATABASE postgres")
    for owner in owners:
        await connection.execute(f"ALTER {owner} SET client_min_messages = 'error'")
    try:
        yield
    finally:
        for owner in owners:
            await connection.execute(f"ALTER {owner} RESET client_min_messages")
        await connection.close()


@asynccontextmanager
async def no_standby(url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Every commit waits for a standby that does not exist; a connection whose own commits do not wait."""
    connection = await asyncpg.connect(url, server_settings={"synchronous_commit": "local"})
    try:
        await with_setting(connection, "synchronous_standby_names", "nobody")
        await _until_a_commit_waits(url, connection)
        yield connection
    finally:
        await with_setting(connection, "synchronous_standby_names", "")
        await connection.close()


async def _until_a_commit_waits(url: str, connection: asyncpg.Connection[Any]) -> None:
    """The checkpointer reads the setting later than a session does."""
    async with asyncio.timeout(60):
        while True:
            other = await asyncpg.connect(url)
            pid = other.get_server_pid()
            commit = asyncio.ensure_future(other.execute("SELECT pg_logical_emit_message(true, 'test', '')"))
            while not commit.done():
                if await connection.fetchval("SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = $1", pid):
                    other.terminate()
                    await asyncio.gather(commit, return_exceptions=True)
                    return
            await other.close()


async def waiting(connection: asyncpg.Connection[Any], for_what: str = "SyncRep") -> list[int]:
    """The sessions that wait, as soon as there is one."""
    async with asyncio.timeout(60):
        while True:
            await connection.execute("SELECT pg_stat_clear_snapshot()")  # a transaction looks once
            rows = await connection.fetch(
                "SELECT pid FROM pg_stat_activity WHERE wait_event = $1 AND application_name = 'progressdb'", for_what
            )
            if rows:
                return [pid for (pid,) in rows]
            await asyncio.sleep(0.01)


async def end_the_wait(connection: asyncpg.Connection[Any], how: str, for_what: str = "SyncRep") -> None:
    for pid in await waiting(connection, for_what):
        await connection.execute(f"SELECT {how}({pid})")


@asynccontextmanager
async def raising(url: str, code: str, times: int) -> AsyncIterator[asyncpg.Connection[Any]]:
    """The next commits of groups fail with this SQLSTATE, so many times."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(_RAISING % (times, code))
        yield connection
    finally:
        await connection.execute("DROP FUNCTION raise_some CASCADE; DROP SEQUENCE raised")
        await connection.close()
