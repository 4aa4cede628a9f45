"""The tables of a store in PostgreSQL, and where a key lies in them (docs/spec/store.md, "On PostgreSQL").

Owns: the tables, their numbers, making and upgrading them, and the first part of the primary key. Invariants: all
entries of a thread have the same `tkey`. No table needs a sequence, an advisory lock, NOTIFY or a foreign key.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg

from minikms.processes.postgresql import FAILURES
from progressdb_server.store import keyspace
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import DatabaseReport, FormatError
from progressdb_server.store.postgres.nodes import Nodes

SCHEMA: Final = 1
"""The number of the tables below. `upgrade` adds what a later number needs."""
ONE_DISK: Final = (
    "the database acknowledges what one disk alone has: set synchronous_standby_names there, or store.single_node = "
    "true if one disk is enough"
)
COMMAND_S_MAX: Final = 600.0
"""The time for one statement of a command, with the command's own work before it."""
COPYING: Final = 0
"""The number until a copy into the tables has ended."""
TABLES: Final = """
CREATE TABLE store_schema (id integer PRIMARY KEY CHECK (id = 0), number integer NOT NULL);
CREATE TABLE store_entry (tkey bytea, key bytea, value bytea NOT NULL, PRIMARY KEY (tkey, key));
CREATE TABLE store_head (tkey bytea PRIMARY KEY, last bytea NOT NULL, changes bigint NOT NULL DEFAULT 0);
CREATE TABLE store_counter (id integer PRIMARY KEY, threads bigint NOT NULL, messages bigint NOT NULL);
CREATE INDEX store_entry_maps ON store_entry (key)
    WHERE key >= 'kms:map:thread:'::bytea AND key < 'kms:map:thread;'::bytea;
CREATE INDEX store_entry_retries ON store_entry (key) WHERE key >= 'idem:'::bytea AND key < 'idem;'::bytea;
"""
COUNTED: Final = "SELECT coalesce(sum(threads), 0), coalesce(sum(messages), 0) FROM store_counter"
DELETE: Final = (
    "DELETE FROM store_entry AS entry USING unnest($1::bytea[], $2::bytea[]) AS old (tkey, key)"
    " WHERE entry.tkey = old.tkey AND entry.key = old.key"
)
MIGRATIONS: Final[Mapping[int, str]] = {}
"""The statements that lead to each number after the first."""


_CONFIRMING: Final = (
    "SELECT count(*) FILTER (WHERE sync_state IN ('sync', 'quorum')), count(*) FILTER (WHERE sync_state IS NULL)"
    " FROM pg_stat_replication"
)
"""The number of standbys that a commit waits for, and of those whose state the role may not see."""


TKEY_HASH_BYTES: Final = 2
"""At the beginning of a `tkey`."""


# --- where a key lies -------------------------------------------------------------------------------------------------
def _owner(key: bytes) -> tuple[bytes, bytes | None]:
    """What a key belongs to, and how all keys begin that are beside it under the same `tkey`; None for no others."""
    parts = key.split(b":")
    match parts[0], parts[1:]:
        case b"thread", [thread, *_]:
            return b"thread:" + thread, b"thread:%b:" % thread
        case b"index", [b"order" | b"writer" as kind, thread, *_]:
            return b"thread:" + thread, b"index:%b:%b:" % (kind, thread)
        case b"index", [b"closed", thread]:
            return b"thread:" + thread, None
        case b"kms", [b"map", b"thread", thread]:
            return b"thread:" + thread, None
        case b"claim", [thread, *_]:
            return b"thread:" + thread, None
        case b"index", [b"author", author, *_]:
            return b"author:" + author, b"index:author:%b:" % author
        case b"index", [b"created", *_]:
            return b"created", keyspace.CREATED
        case b"version", [_, message, *_]:
            return b"version:" + message, b"version:msg:%b:" % message
        case b"backup", [_, job, *_]:
            return b"kept:" + job, b"backup:migrate:%b:" % job
        case b"store", [b"backup", *_]:
            return b"backups", keyspace.BACKUPS
        case b"job", _:
            return b"job", keyspace.JOBS
        case b"server", _:
            return b"server", keyspace.SERVERS
        case _:
            return key, None


def tkey(key: bytes) -> bytes:
    """The first part of the primary key: two bytes of a hash, then what the key belongs to."""
    owner, _ = _owner(key)
    return hashlib.sha256(owner).digest()[:TKEY_HASH_BYTES] + owner


def is_thread(tkey: bytes) -> bool:
    return tkey.startswith(b"thread:", TKEY_HASH_BYTES)


def within(lower: bytes, upper: bytes) -> bytes | None:
    """The `tkey` of all keys of the range, None if there is no single one."""
    _, beside = _owner(lower)
    one = upper <= lower + b"\0" if beside is None else lower.startswith(beside) and upper <= keyspace.after(beside)
    return tkey(lower) if one and not lower.startswith((keyspace.MAP, b"idem:")) else None


# --- making them ------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """For a command. A statement that takes longer than COMMAND_S_MAX loses its connection: the driver's own timeout
    would send a cancel request. Raises FormatError, EngineUnavailableError."""
    nodes = Nodes(url, replicated=False)
    connection = await nodes.find(application_name="progressdb-store")
    loop = asyncio.get_running_loop()
    timer = loop.call_later(COMMAND_S_MAX, connection.terminate)

    def ended(_: object) -> None:
        nonlocal timer
        timer.cancel()
        timer = loop.call_later(COMMAND_S_MAX, connection.terminate)

    connection.add_query_logger(ended)
    try:
        yield connection
    except FAILURES as error:
        raise EngineUnavailableError("the database refused") from error
    finally:
        connection.remove_query_logger(ended)
        timer.cancel()
        connection.terminate()


async def init(url: str, role: str = "") -> None:
    """Make the tables; `role` is the one of the message servers, which may not change them. Raises FormatError,
    StoreUnavailableError."""
    async with connected(url) as connection:
        if await connection.fetchval("SELECT to_regclass('store_schema')") is not None:
            raise FormatError("the database holds a store already")
        async with connection.transaction():
            await connection.execute(TABLES)
            await connection.execute("INSERT INTO store_schema VALUES (0, $1)", SCHEMA)
            if role:
                quoted = await connection.fetchval("SELECT quote_ident($1)", role)
                tables = "store_entry, store_head, store_counter"
                await connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {quoted}")
                # A row is locked FOR SHARE only by a role that may update some column.
                await connection.execute(f"GRANT SELECT, UPDATE (id) ON store_schema TO {quoted}")
                database = await connection.fetchval("SELECT quote_ident(current_database())")
                await connection.execute(f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC, {quoted}")


async def upgrade(url: str) -> tuple[int, int]:
    """Bring the tables to this version's number; the numbers before and after. Two upgrades wait for each other.
    Raises FormatError, StoreUnavailableError."""
    async with connected(url) as connection, connection.transaction():
        # Servers that share the row one after another would keep out whoever waits for the row alone.
        await connection.execute("LOCK TABLE store_schema IN EXCLUSIVE MODE")
        before = await number_of(connection, "FOR UPDATE")
        if before > SCHEMA or before == COPYING:
            raise FormatError(other_schema(before))
        for number in range(before + 1, SCHEMA + 1):
            await connection.execute(MIGRATIONS[number])
        await connection.execute("UPDATE store_schema SET number = $1", SCHEMA)
        return before, SCHEMA


async def examine(url: str, *, single_node: bool) -> DatabaseReport:
    async with connected(url) as connection:
        number = await number_of(connection)
        standbys = await connection.fetchval("SHOW synchronous_standby_names")
        tls = await connection.fetchval("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        problems = [] if number == SCHEMA else [other_schema(number)]
        if not (standbys or single_node):
            problems.append(ONE_DISK)
        ((confirming, hidden),) = await connection.fetch(_CONFIRMING)
        wanted = _wanted(standbys)
        if confirming + hidden < wanted:
            problems.append(
                f"too few standbys are connected: {confirming} of those in synchronous_standby_names ({standbys}), and "
                f"{wanted} must confirm each write. Others do not count: start one that is named there"
            )
        problems += [
            f"the database has {name} = off: a power failure there loses what was acknowledged"
            for name in ("fsync", "full_page_writes")
            if await connection.fetchval(f"SHOW {name}") == "off"
        ]
        return DatabaseReport(number, standbys, None if hidden else confirming, tls or "", problems)


def _wanted(standbys: str) -> int:
    """How many must confirm a commit: `ANY 2 (…)`, `FIRST 2 (…)`, `2 (…)`, or names alone."""
    match = re.match(r"\s*(?:(?:ANY|FIRST)\s+)?(\d+)\s*\(", standbys, re.IGNORECASE)
    return int(match[1]) if match else int(standbys != "")


async def number_of(connection: asyncpg.Connection[Any], lock: str = "") -> int:
    if await connection.fetchval("SELECT to_regclass('store_schema')") is None:
        raise FormatError("the database holds no store: run progressdb store init")
    number: int = await connection.fetchval(f"SELECT number FROM store_schema {lock}")  # noqa: S608  a constant
    return number


def other_schema(version: int) -> str:
    if version == COPYING:
        return "a copy into the database has not ended: run the same progressdb store copy again"
    way_out = (
        "run progressdb store upgrade" if version < SCHEMA else "start the version that upgraded it, or a newer one"
    )
    return f"the database has schema {version}, this version has {SCHEMA}: {way_out}"
