"""PostgreSQL as the store's engine: several message servers on one database (docs/spec/store.md, "On PostgreSQL").

Owns: the tables, where a key lies in them, reads, and the transaction that commits a group of writes. Invariants:
- All entries of a thread have the same `tkey`. A transaction locks the heads of the threads that it touches, in order
  of their `tkey`, then reads what its writes expect in a later statement, which sees all that the lock has waited for.
  An entry of no thread is locked itself, or only ever inserted; an insert that meets one begins the transaction again.
- A head has the last stamp of its thread. A version whose stamp is not above it is not written (`LateStampError`).
- The number of the schema is read FOR SHARE in each transaction: a server whose schema was changed writes nothing.
- A commit that may not be replicated is never reported as one: not after a lost connection, a deadline, or a warning.
  Its connection is terminated, because a cancelled wait for the standby would report success. The task that commits is
  never cancelled.
- Reads are of the node that takes writes. Nothing is answered from memory.

It must never interpret a value. No statement needs a sequence, an advisory lock, NOTIFY or a foreign key.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from minikms.logs import structlog
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Conditions, LateStampError, PendingWrite, Puts
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, EngineBusyError, EngineUnavailableError, Reads
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import ConditionFailedError, FormatError
from progressdb_server.store.writer import Counters, GroupCommit, SharedEngine

SCHEMA: Final = 1
"""The number of the tables below. `upgrade` adds what a later number needs."""
READ_CONNECTIONS_MAX: Final = 8
READ_S_MAX: Final = 30
"""Of one statement that reads."""
CONNECT_S_MAX: Final = 10.0
COMMIT_S_MAX: Final = 15.0
"""Of one transaction, with the wait for the standby. Then its outcome is unknown."""
TRIES_MAX: Final = 8
"""Of a transaction that met a deadlock, a serialization failure, or an entry that somebody else has inserted."""
COUNTERS_COUNT: Final = 64
"""Rows of counters. A server takes one of them, so that no two servers wait for each other's counters, mostly."""
UNAVAILABLE: Final = "the store's database is not available now"
UNKNOWN: Final = "the store's database did not confirm the write, which may be stored"
TABLES: Final = """
CREATE TABLE store_schema (id integer PRIMARY KEY CHECK (id = 0), number integer NOT NULL);
CREATE TABLE store_entry (tkey bytea, key bytea, value bytea NOT NULL, PRIMARY KEY (tkey, key));
CREATE TABLE store_head (tkey bytea PRIMARY KEY, last bytea NOT NULL);
CREATE TABLE store_counter (id integer PRIMARY KEY, threads bigint NOT NULL, messages bigint NOT NULL);
CREATE INDEX store_entry_maps ON store_entry (key)
    WHERE key >= 'kms:map:thread:'::bytea AND key < 'kms:map:thread;'::bytea;
CREATE INDEX store_entry_retries ON store_entry (key) WHERE key >= 'idem:'::bytea AND key < 'idem;'::bytea;
"""
MIGRATIONS: Final[Mapping[int, str]] = {}
"""The statements that lead to each number after the first."""

_UP_TO: Final = (
    "SELECT key, value FROM (SELECT key, value, sum(octet_length(value)) OVER (ORDER BY key) - octet_length(value)"
    " AS before FROM ({}) AS few) AS summed WHERE before < ${} ORDER BY key"
)
_VALUES: Final = (
    "SELECT entry.key, entry.value FROM unnest($1::bytea[], $2::bytea[]) AS wanted (tkey, key)"
    " JOIN store_entry AS entry ON entry.tkey = wanted.tkey AND entry.key = wanted.key ORDER BY entry.tkey, entry.key"
)
_BEGIN: Final = f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT 1 FROM store_schema WHERE number = {SCHEMA} FOR SHARE"  # noqa: S608
_AGAIN: Final = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
_FAILURES: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)

_log = structlog.get_logger("progressdb.store")


class _AgainError(Exception):
    """Somebody else has inserted one of the entries: nothing was written."""


# --- where a key lies -------------------------------------------------------------------------------------------------
def _owner(key: bytes) -> tuple[bytes, bytes]:
    """What a key belongs to, and how all keys begin that are beside it under the same `tkey`."""
    parts = key.split(b":")
    match parts[0], parts[1:]:
        case b"thread", [thread, *_]:
            return b"thread:" + thread, b"thread:%b:" % thread
        case b"index", [b"order" | b"writer" as kind, thread, *_]:
            return b"thread:" + thread, b"index:%b:%b:" % (kind, thread)
        case b"index", [b"closed", thread]:
            return b"thread:" + thread, key
        case b"kms", [b"map", b"thread", thread]:
            return b"thread:" + thread, key
        case b"claim", [thread]:
            return b"thread:" + thread, key
        case b"index", [b"author", author, *_]:
            return b"author:" + author, b"index:author:%b:" % author
        case b"index", [b"created", *_]:
            return b"created", keyspace.CREATED
        case b"version", [_, message, *_]:
            return b"version:" + message, b"version:msg:%b:" % message
        case b"backup", [_, job, *_]:
            return b"kept:" + job, b"backup:migrate:%b:" % job
        case b"job", _:
            return b"job", keyspace.JOBS
        case _:
            return key, key


def tkey(key: bytes) -> bytes:
    """The first part of the primary key: two bytes of a hash, then what the key belongs to."""
    owner, _ = _owner(key)
    return hashlib.sha256(owner).digest()[:2] + owner


def _is_thread(tkey: bytes) -> bool:
    return tkey.startswith(b"thread:", 2)


def _within(lower: bytes, upper: bytes) -> bytes | None:
    """The `tkey` of all keys of the range, None if there is no single one."""
    _, beside = _owner(lower)
    one = upper <= lower + b"\0" if beside == lower and not lower.endswith(b":") else upper <= keyspace.after(beside)
    return tkey(lower) if one and lower.startswith(beside) and not lower.startswith((keyspace.MAP, b"idem:")) else None


# --- connections ------------------------------------------------------------------------------------------------------
def check_url(url: str) -> None:
    """Raises FormatError for a URL that has a password, or that does not check the server's name over TCP."""
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        hosts = [host for host in (parts.netloc.rpartition("@")[2], *query.get("host", ())) if host]
    except ValueError:
        raise FormatError("store.url is no URL of PostgreSQL") from None
    if parts.scheme not in ("postgresql", "postgres"):
        raise FormatError("store.url must begin with postgresql://")
    if parts.password is not None or "password" in query:
        raise FormatError("store.url must not hold a password: use a client certificate or a password file (passfile=)")
    local = all(host.startswith("/") for host in hosts) and hosts
    if not local and query.get("sslmode") != ["verify-full"]:
        raise FormatError("store.url must have sslmode=verify-full, or the directory of a Unix socket as host=")


async def _connect(url: str, **settings: str) -> asyncpg.Connection[Any]:
    """To a node that takes writes. Raises EngineUnavailableError."""
    try:
        return await asyncpg.connect(
            url,
            timeout=CONNECT_S_MAX,
            target_session_attrs=SessionAttribute.read_write,
            server_settings={"application_name": "progressdb", "synchronous_commit": "on", **settings},
        )
    except _FAILURES as error:
        raise EngineUnavailableError(UNAVAILABLE) from error


@asynccontextmanager
async def _one(url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await _connect(url)
    try:
        yield connection
    except _FAILURES as error:
        raise EngineUnavailableError(f"the database refused: {str(error).splitlines()[0]}") from error
    finally:
        await connection.close(timeout=CONNECT_S_MAX)


async def init(url: str, role: str = "") -> None:
    """Make the tables; `role` is the one of the message servers, which may not change them. Raises FormatError,
    StoreUnavailableError."""
    check_url(url)
    async with _one(url) as connection:
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


async def upgrade(url: str) -> tuple[int, int]:
    """Bring the tables to this version's number; the numbers before and after. Two upgrades wait for each other.
    Raises FormatError, StoreUnavailableError."""
    check_url(url)
    async with _one(url) as connection, connection.transaction():
        before = await _number(connection, "FOR UPDATE")
        if before > SCHEMA:
            raise FormatError(_other_schema(before))
        for number in range(before + 1, SCHEMA + 1):
            await connection.execute(MIGRATIONS[number])
        await connection.execute("UPDATE store_schema SET number = $1", SCHEMA)
        return before, SCHEMA


async def _number(connection: asyncpg.Connection[Any], lock: str = "") -> int:
    """Raises FormatError."""
    if await connection.fetchval("SELECT to_regclass('store_schema')") is None:
        raise FormatError("the database holds no store: run progressdb store init")
    number: int = await connection.fetchval(f"SELECT number FROM store_schema {lock}")  # noqa: S608  a constant
    return number


def _other_schema(found: int) -> str:
    way_out = "run progressdb store upgrade" if found < SCHEMA else "start the version that upgraded it, or a newer one"
    return f"the database has schema {found}, this version has {SCHEMA}: {way_out}"


# --- the engine -------------------------------------------------------------------------------------------------------
class PostgresReads:
    """See `store.engine.Reads`. Each call is a statement of its own."""

    def __init__(self, pool: asyncpg.Pool[Any]) -> None:
        self._pool = pool

    async def _fetch(self, statement: str, *values: object) -> list[Any]:
        try:
            return await self._pool.fetch(statement, *values)
        except _FAILURES as error:
            raise EngineUnavailableError(UNAVAILABLE) from error

    async def get(self, key: bytes) -> bytes | None:
        found = await self._fetch("SELECT value FROM store_entry WHERE tkey = $1 AND key = $2", tkey(key), key)
        return found[0][0] if found else None

    async def scan(
        self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        range_ = self._range("key, value", lower, upper, limit, reverse=reverse)
        if range_ is None:
            return []
        statement, values = range_
        if bytes_max is not None:  # the last entry is the one that reaches the bound
            statement = _UP_TO.format(statement, len(values) + 1)
            values = [*values, bytes_max]
        return [(key, value) for key, value in await self._fetch(statement, *values)]

    async def keys(self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False) -> list[bytes]:
        range_ = self._range("key", lower, upper, limit, reverse=reverse)
        if range_ is None:
            return []
        statement, values = range_
        return [key for (key,) in await self._fetch(statement, *values)]

    def _range(
        self, columns: str, lower: bytes, upper: bytes, limit: int, *, reverse: bool
    ) -> tuple[str, list[object]] | None:
        if lower >= upper or limit <= 0:
            return None
        values: list[object] = [lower, upper, min(limit, SCAN_ENTRIES_MAX)]
        where = "key >= $1 AND key < $2"
        shard = _within(lower, upper)
        if shard is not None:
            values.append(shard)
            where += " AND tkey = $4"
        for first in (keyspace.MAP, keyspace.IDEMPOTENCY):
            if lower.startswith(first):  # literally, so that the partial index is used
                last = keyspace.after(first)
                where += f" AND key >= '{first.decode()}'::bytea AND key < '{last.decode()}'::bytea"
        order = "DESC" if reverse else "ASC"
        return f"SELECT {columns} FROM store_entry WHERE {where} ORDER BY key {order} LIMIT $3", values  # noqa: S608  constants


class PostgresEngine(SharedEngine):
    """Made by `open_engine`."""

    def __init__(self, url: str, pool: asyncpg.Pool[Any], counted: Counters) -> None:
        self._url = url
        self._pool = pool
        self._counted = counted
        self._reads = PostgresReads(pool)

    @property
    def reads(self) -> Reads:
        return self._reads

    def writer(self, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]) -> GroupCommit:
        return PostgresWriter(self._url, self._counted, clock, metrics, on_reopen)

    async def counted(self) -> Counters:
        try:
            row = await self._pool.fetchrow(
                "SELECT coalesce(sum(threads), 0), coalesce(sum(messages), 0) FROM store_counter"
            )
        except _FAILURES as error:
            raise EngineUnavailableError(UNAVAILABLE) from error
        return Counters(int(row[0]), int(row[1])) if row else Counters()

    async def now_ns(self) -> int:
        try:
            return int(await self._pool.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000000000)::bigint"))
        except _FAILURES as error:
            raise EngineUnavailableError(UNAVAILABLE) from error

    async def probe(self) -> None:
        connection = await _connect(self._url)
        await connection.close(timeout=CONNECT_S_MAX)

    async def close(self) -> None:
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(CONNECT_S_MAX):
                await self._pool.close()
        self._pool.terminate()


async def open_engine(url: str, *, single_node: bool) -> PostgresEngine:
    """Raises FormatError for tables of another version, and for a database that would acknowledge what one disk alone
    has, unless `single_node` says that this is enough; StoreUnavailableError."""
    check_url(url)
    async with _one(url) as connection:
        number = await _number(connection)
        if number != SCHEMA:
            raise FormatError(_other_schema(number))
        if not single_node and not await connection.fetchval("SHOW synchronous_standby_names"):
            raise FormatError(
                "the database acknowledges what one disk alone has: set synchronous_standby_names there, or "
                "store.single_node = true if one disk is enough"
            )
        row = await connection.fetchrow(
            "SELECT coalesce(sum(threads), 0), coalesce(sum(messages), 0) FROM store_counter"
        )
    try:
        pool = await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=READ_CONNECTIONS_MAX,
            timeout=CONNECT_S_MAX,
            command_timeout=READ_S_MAX,
            target_session_attrs=SessionAttribute.read_write,
            server_settings={"application_name": "progressdb", "statement_timeout": str(READ_S_MAX * 1000)},
        )
    except _FAILURES as error:
        raise EngineUnavailableError(UNAVAILABLE) from error
    counted = Counters(int(row[0]), int(row[1])) if row else Counters()
    return PostgresEngine(url, pool, counted)


# --- writing ----------------------------------------------------------------------------------------------------------
class PostgresWriter(GroupCommit):
    unconfirmed = UNKNOWN

    def __init__(
        self, url: str, counted: Counters, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]
    ) -> None:
        super().__init__(clock, metrics, on_reopen)
        self.state = counted
        self._url = url
        self._connection: asyncpg.Connection[Any] | None = None
        self._counter = secrets.randbelow(COUNTERS_COUNT)
        self._warned = ""
        self._committing = False
        """From when on the transaction may be stored."""

    @property
    def group(self) -> int:
        """Before every group: what was read is always compared again."""
        return -1

    async def close(self) -> None:
        await super().close()
        await self._disconnect()

    async def _reopen(self) -> None:
        await self._disconnect()
        await self._connected()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _connected(self) -> asyncpg.Connection[Any]:
        if self._connection is None or self._connection.is_closed():
            connection = await _connect(self._url)
            connection.add_log_listener(self._notice)
            try:
                await connection.execute(
                    "INSERT INTO store_counter VALUES ($1, 0, 0) ON CONFLICT (id) DO NOTHING", self._counter
                )
            except _FAILURES as error:
                connection.terminate()
                raise EngineUnavailableError(UNAVAILABLE) from error
            self._connection = connection
        return self._connection

    def _notice(self, _: object, message: Any) -> None:
        """A wait for the standby that was cancelled ends with success and a warning."""
        if getattr(message, "severity_en", None) == "WARNING":
            self._warned = str(message)

    async def _commit(self, group: list[PendingWrite]) -> Mapping[PendingWrite, ConditionFailedError]:
        for number in range(TRIES_MAX):
            connection = await self._connected()
            work = asyncio.get_running_loop().create_task(self._transaction(connection, group))
            done, _ = await asyncio.wait({work}, timeout=COMMIT_S_MAX)
            if not done:
                connection.terminate()
                await asyncio.wait({work})
            try:
                return work.result()
            except (*_AGAIN, _AgainError):
                await asyncio.sleep(0.001 * secrets.randbelow(2**number))
            except _FAILURES as error:  # also of a node that takes no writes any more
                connection.terminate()
                if self._committing:
                    raise EngineUnavailableError(UNKNOWN) from error
                if not done:
                    break
            finally:
                del work  # the traceback of its error leads to this frame
        raise EngineBusyError("the store's database is too busy")

    async def _transaction(
        self, connection: asyncpg.Connection[Any], group: Sequence[PendingWrite]
    ) -> Mapping[PendingWrite, ConditionFailedError]:
        self._warned, self._committing = "", False
        try:
            if await connection.execute(_BEGIN) != "SELECT 1":
                raise EngineUnavailableError("the database was upgraded: start the version of the server that did it")  # noqa: TRY301  it has to end the transaction
            failed, counters = await self._write(connection, group)
        except BaseException:
            if not connection.is_closed():
                await connection.execute("ROLLBACK")
            raise
        self._committing = True
        await self._end(connection, counters)
        self.state = Counters(self.state.threads + counters[0], self.state.messages + counters[1])
        return failed

    async def _end(self, connection: asyncpg.Connection[Any], counters: tuple[int, int]) -> None:
        """The counters change with every group, so that a group without puts waits for the standby too."""
        threads, messages = counters
        count = (  # a statement without parameters can be sent together with the next one
            f"UPDATE store_counter SET threads = threads + {threads:d}, messages = messages + {messages:d}"  # noqa: S608
            f" WHERE id = {self._counter:d}"
        )
        if await connection.execute(f"{count}; COMMIT") != "COMMIT" or self._warned:
            _log.error("store_commit_in_doubt", reason=self._warned)
            raise asyncpg.InterfaceError(UNKNOWN)

    async def _write(
        self, connection: asyncpg.Connection[Any], group: Sequence[PendingWrite]
    ) -> tuple[dict[PendingWrite, ConditionFailedError], tuple[int, int]]:
        stamps = {pending: _new_versions(pending) for pending in group}
        heads = await _lock_heads(connection, group)
        fresh = {key for versions in stamps.values() for key in versions}
        found = await _read(connection, {*_expected(group), *fresh})
        failed: dict[PendingWrite, ConditionFailedError] = {}
        for pending, versions in stamps.items():
            for version, (thread, stamp) in versions.items():
                last = heads.get(thread, b"")
                if stamp <= last or version in found:
                    failed[pending] = LateStampError(version, Stamp.parse(last.decode()) if last else None)
        rest = [pending for pending in group if pending not in failed]
        staged, refused, threads, messages = Conditions(found).stage(rest)
        failed |= {pending: ConditionFailedError(key) for pending, key in refused.items()}
        fresh |= {key for key in _expected(group) if key not in found}
        await _put(connection, staged, fresh)
        # A new thread has a head, although nothing may be in it yet.
        advanced = {tkey(key): b"" for key in staged if key.startswith(keyspace.MAP) and tkey(key) not in heads}
        for pending in rest:
            if pending not in refused:
                advanced |= dict(stamps[pending].values())
        await _advance(connection, heads, advanced)
        return failed, (threads, messages)


def _new_versions(pending: PendingWrite) -> dict[bytes, tuple[bytes, bytes]]:
    """The version entries of new versions, each with the `tkey` of its thread and its stamp."""
    write = pending.write
    if write is None or not write.messages:
        return {}
    found: dict[bytes, tuple[bytes, bytes]] = {}
    for key, value in write.puts:
        if key.startswith(keyspace.VERSION) and value is not None:
            found[key] = tkey(b"thread:%b:" % value), key[-keyspace.STAMP_BYTES :]
    return found


def _expected(group: Iterable[PendingWrite]) -> Iterable[bytes]:
    for pending in group:
        write = pending.write
        if write is not None:
            yield from (key for key, _ in pending.expect)
            yield from (key for key, _ in write.expect)
            yield from (key for key, _ in write.read)


async def _lock_heads(connection: asyncpg.Connection[Any], group: Sequence[PendingWrite]) -> dict[bytes, bytes]:
    """Locks the heads of all threads that the group reads or changes. The last stamps, by `tkey`."""
    touched = {tkey(key) for pending in group if pending.write for key, _ in pending.write.puts}
    touched |= {tkey(key) for key in _expected(group)}
    threads = sorted(filter(_is_thread, touched))
    if not threads:
        return {}
    rows = await connection.fetch(
        "SELECT tkey, last FROM store_head WHERE tkey = ANY($1::bytea[]) ORDER BY tkey FOR UPDATE", threads
    )
    return {row[0]: row[1] for row in rows}


async def _read(connection: asyncpg.Connection[Any], keys: Iterable[bytes]) -> dict[bytes, bytes]:
    """The values of those that are stored. An entry of no thread stays locked."""
    places = sorted((tkey(key), key) for key in keys)
    found: dict[bytes, bytes] = {}
    for of_threads, lock in ((True, ""), (False, " FOR UPDATE OF entry")):
        some = [place for place in places if _is_thread(place[0]) is of_threads]
        if some:
            rows = await connection.fetch(_VALUES + lock, *zip(*some, strict=True))
            found |= {row[0]: row[1] for row in rows}
    return found


async def _put(connection: asyncpg.Connection[Any], staged: Puts, fresh: set[bytes]) -> None:
    """Entries that nobody has are inserted, the others are replaced. Raises _AgainError for one of `fresh` that
    somebody else has inserted, or one that somebody else has deleted."""
    values = sorted((tkey(key), key, value) for key, value in staged.items() if value is not None)
    gone = sorted((tkey(key), key) for key, value in staged.items() if value is None)
    if values:
        inserted = await connection.fetch(
            "INSERT INTO store_entry SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::bytea[])"
            " ON CONFLICT (tkey, key) DO NOTHING RETURNING key",
            *zip(*values, strict=True),
        )
        if len(inserted) < len(values):
            new = {row[0] for row in inserted}
            there = [entry for entry in values if entry[1] not in new]
            if any(key in fresh for _, key, _ in there):
                raise _AgainError
            replaced = await connection.fetch(
                "UPDATE store_entry AS entry SET value = new.value"
                " FROM unnest($1::bytea[], $2::bytea[], $3::bytea[]) AS new (tkey, key, value)"
                " WHERE entry.tkey = new.tkey AND entry.key = new.key RETURNING entry.key",
                *zip(*there, strict=True),
            )
            if len(replaced) < len(there):
                raise _AgainError
    if gone:
        await connection.execute(
            "DELETE FROM store_entry AS entry USING unnest($1::bytea[], $2::bytea[]) AS old (tkey, key)"
            " WHERE entry.tkey = old.tkey AND entry.key = old.key",
            *zip(*gone, strict=True),
        )


async def _advance(
    connection: asyncpg.Connection[Any], heads: Mapping[bytes, bytes], advanced: Mapping[bytes, bytes]
) -> None:
    """Raises _AgainError when somebody else has made one of the threads."""
    old = sorted((thread, last) for thread, last in advanced.items() if thread in heads)
    new = sorted((thread, last) for thread, last in advanced.items() if thread not in heads)
    if old:
        changed = await connection.fetch(
            "UPDATE store_head AS head SET last = new.last FROM unnest($1::bytea[], $2::bytea[]) AS new (tkey, last)"
            " WHERE head.tkey = new.tkey AND head.last < new.last RETURNING head.tkey",
            *zip(*old, strict=True),
        )
        if len(changed) < len(old):
            raise _AgainError
    if new:
        made = await connection.fetch(
            "INSERT INTO store_head SELECT * FROM unnest($1::bytea[], $2::bytea[]) ON CONFLICT (tkey) DO NOTHING"
            " RETURNING tkey",
            *zip(*new, strict=True),
        )
        if len(made) < len(new):
            raise _AgainError
