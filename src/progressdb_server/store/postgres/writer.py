"""Group commit to PostgreSQL: one statement for a usual group, a transaction for any other.

Owns: the locks, the conditions and the commit of a group, and the outcome of a failure. Invariants:
- Whoever changes an entry of a thread locks the thread's head and counts the change there. Heads are locked in the
  order of their `tkey`, before any entry. An entry of no thread is locked itself, or only ever inserted.
- A lock of somebody else on one thread holds up no other thread: what needs it waits in a group of its own (`Aside`).
- `USUAL` reads entries as they were when the statement began. That is what the locks protect only if no head has
  changed in between, which the statement checks; else it writes nothing and is sent again.
- A head has the last stamp of its thread. A version whose stamp is not above it is not written (`LateStampError`).
  The clock of the server follows it only if the thread has that version: a damaged head concerns its thread alone.
- The number of the schema is read FOR SHARE in each transaction: a server whose schema was changed writes nothing.
- A commit that may not be replicated is never reported as one: not after a lost connection, a deadline, or a warning,
  and not if the node waits for no standby any more, which is asked after each commit. Its connection is terminated,
  because a cancelled wait for the standby would report success. The task that commits is never cancelled.
- Each commit changes a counter, so that one without puts waits for the standby too.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import asyncpg

from minikms.platform.logs import Log
from minikms.processes.postgresql import CONNECT_S_MAX, FAILURES, NO_STANDBYS, NodeConnection, bounded, warn
from progressdb_server.config import PURGE_S_MIN
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Conditions, PendingWrite, Write
from progressdb_server.store.engine import Counters, EngineBusyError, EngineUnavailableError
from progressdb_server.store.keyspace import Clock
from progressdb_server.store.model import NotWrittenError, StoreUnavailableError
from progressdb_server.store.postgres.nodes import BEAT_S, IDLE_S_MAX, LOCK_S_MAX, UNAVAILABLE, Nodes, now_s
from progressdb_server.store.postgres.tables import SCHEMA, is_thread, tkey
from progressdb_server.store.postgres.transaction import (
    LOCKED_HEADS,
    WAITED_HEADS,
    AgainError,
    LockedError,
    expectations,
    new_versions,
    write_group,
)
from progressdb_server.store.writer import StoreWriter

COMMIT_S_MAX: Final = 15.0
"""The time for one group, with the wait for the standby. After it, the outcome is unknown."""
TRIES_MAX: Final = 8
"""The tries of a group that met a deadlock, a serialization failure, an entry that somebody else has inserted, or a
node that takes no writes any more.
"""
USUAL_TRIES_MAX: Final = 3
"""The tries of one statement whose threads another server is changing."""
COUNTERS_COUNT: Final = 1024
"""Rows of counters. Each writer of a server takes one of them, so that no two wait for each other's, mostly."""
WRITERS_COUNT: Final = 2
"""Groups of one server that are committed at a time. A thread is always in the same one."""
WAITING_COUNT: Final = 2
"""Writers of a server for what waits for a lock of somebody else. Each takes a connection when it is needed first."""
LOCKED_S: Final = 1.0
"""How long a group of several threads waits for a lock that is not of a head."""
UNKNOWN: Final = "the store's database did not confirm the write, which may be stored"
BUSY: Final = "the store's database is too busy"
REFUSED: Final[Mapping[str, str]] = {
    "42": "the store's database refused the write: a table is missing, or a right of the servers' role",
    "53": "the store's database has no room for the write, on its disk or in its memory",
}
"""The reasons, by the class of an error that another try would meet again; but not of TOO_MANY, which end by
themselves.
"""
TOO_MANY: Final = "53300"
"""Connections."""

USUAL: Final = f"""
WITH fence AS MATERIALIZED (SELECT 1 FROM store_schema WHERE number = {SCHEMA} FOR SHARE),
head AS MATERIALIZED (
    SELECT tkey, last, changes FROM store_head WHERE tkey = ANY($1::bytea[]) ORDER BY tkey FOR UPDATE SKIP LOCKED),
lone AS MATERIALIZED (
    SELECT 1 FROM unnest($2::bytea[], $3::bytea[], $4::bytea[]) AS wanted (tkey, key, value) JOIN store_entry AS entry
    ON entry.tkey = wanted.tkey AND entry.key = wanted.key AND entry.value = wanted.value
    ORDER BY entry.tkey, entry.key FOR UPDATE OF entry),
still AS MATERIALIZED (
    SELECT count(*) = cardinality($1::bytea[]) AS yes FROM head JOIN store_head AS seen USING (tkey, changes)),
ok AS MATERIALIZED (SELECT (SELECT yes FROM still)
    AND (SELECT count(*) FROM fence) = 1
    AND (SELECT count(*) FROM lone) = cardinality($2::bytea[])
    AND (SELECT count(*) FROM unnest($5::bytea[], $6::bytea[], $7::bytea[]) AS wanted (tkey, key, value)
        JOIN store_entry AS entry ON entry.tkey = wanted.tkey AND entry.key = wanted.key
        WHERE entry.value = wanted.value) = cardinality($5::bytea[])
    AND NOT EXISTS (SELECT 1 FROM unnest($8::bytea[], $9::bytea[]) AS wanted (tkey, key)
        JOIN store_entry AS entry ON entry.tkey = wanted.tkey AND entry.key = wanted.key)
    AND NOT EXISTS (SELECT 1 FROM unnest($10::bytea[], $11::bytea[]) AS new (tkey, first)
        JOIN head ON head.tkey = new.tkey WHERE head.last >= new.first)
    AS yes),
advanced AS (UPDATE store_head AS head SET last = greatest(head.last, new.last), changes = head.changes + 1
    FROM unnest($10::bytea[], $12::bytea[]) AS new (tkey, last) WHERE head.tkey = new.tkey AND (SELECT yes FROM ok)),
made AS (INSERT INTO store_head (tkey, last)
    SELECT new.tkey, new.last FROM unnest($13::bytea[], $14::bytea[]) AS new (tkey, last) WHERE (SELECT yes FROM ok)),
fresh AS (INSERT INTO store_entry SELECT new.* FROM unnest($15::bytea[], $16::bytea[], $17::bytea[])
    AS new (tkey, key, value) WHERE (SELECT yes FROM ok)),
put AS (INSERT INTO store_entry SELECT new.* FROM unnest($18::bytea[], $19::bytea[], $20::bytea[])
    AS new (tkey, key, value) WHERE (SELECT yes FROM ok)
    ON CONFLICT (tkey, key) DO UPDATE SET value = excluded.value),
gone AS (DELETE FROM store_entry AS entry USING unnest($21::bytea[], $22::bytea[]) AS old (tkey, key)
    WHERE entry.tkey = old.tkey AND entry.key = old.key AND (SELECT yes FROM ok)),
counted AS (INSERT INTO store_counter SELECT $23::integer, $24::bigint, $25::bigint WHERE (SELECT yes FROM ok)
    ON CONFLICT (id) DO UPDATE SET threads = store_counter.threads + excluded.threads,
    messages = store_counter.messages + excluded.messages)
SELECT ok.yes, still.yes, CASE WHEN NOT ok.yes THEN ARRAY(SELECT tkey FROM store_head WHERE tkey = ANY($1::bytea[])
    AND tkey NOT IN (SELECT tkey FROM head)) END FROM ok, still
"""  # noqa: S608  a constant
USUAL_WAITING: Final = USUAL.replace(" SKIP LOCKED", "")
COUNT: Final = (
    "INSERT INTO store_counter VALUES ($1, $2, $3) ON CONFLICT (id) DO UPDATE SET"
    " threads = store_counter.threads + excluded.threads, messages = store_counter.messages + excluded.messages"
)
_BEGIN: Final = f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT 1 FROM store_schema WHERE number = {SCHEMA} FOR SHARE"  # noqa: S608  a constant
_IS_THERE: Final = "SELECT EXISTS (SELECT 1 FROM store_entry WHERE tkey = $1 AND key = $2)"
WENT_BACK: Final = (
    "the database went back: a write that this server had confirmed is no longer there. If an older backup was not "
    "restored on purpose, stop the servers and look for the node that has it; else restart them"
)
_NEVER: Final = b"\xff"
"""Above every stamp."""
_IN_DOUBT: Final = ("08", "57P", "40003", "58", "XX")
"""How the codes of errors begin after which a commit may be stored (PostgreSQL, appendix A): a lost connection, a
database that stops, an unknown completion, the system, an internal error."""

_log = Log()


_AGAIN: Final = (AgainError, asyncpg.SerializationError, asyncpg.DeadlockDetectedError, asyncpg.UniqueViolationError)


# --- a group ----------------------------------------------------------------------------------------------------------
class _Assumed:
    """The stored values if every write of a group is right about them."""

    def __init__(self, group: Iterable[PendingWrite]) -> None:
        self._values: dict[bytes, bytes | None] = {}
        for pending in group:
            for key, value in expectations(pending):
                self._values.setdefault(key, value)
        self.relied: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes | None:
        value = self.relied[key] = self._values[key]
        return value


class _Usual(NamedTuple):
    """A group for `USUAL`: its arguments but the counter, and what it adds to that."""

    arguments: tuple[Sequence[bytes], ...]
    threads: int
    messages: int

    @classmethod
    def of(cls, group: Sequence[PendingWrite]) -> _Usual | None:
        """None if one of the writes contradicts an earlier one, relies on the absence of an entry of no thread that it
        does not put, or ends a thread."""
        assumed = _Assumed(group)
        staged, failed, threads, messages = Conditions(assumed).stage(group)
        if failed or any(value is None and key.startswith(keyspace.MAP) for key, value in staged.items()):
            return None
        relied = assumed.relied
        stamps: dict[bytes, list[bytes]] = {}
        fresh = {key for key, value in relied.items() if value is None}
        for pending in group:
            for key, (thread, stamp) in new_versions(pending).items():
                stamps.setdefault(thread, []).append(stamp)
                fresh.add(key)
        places = {key: tkey(key) for key in (*relied, *staged)}
        changed = {places[key] for key in staged if is_thread(places[key])}
        new_threads = {places[key] for key in staged if key.startswith(keyspace.MAP) and relied.get(key, b"") is None}
        locked = sorted({place for place in places.values() if is_thread(place)} - new_threads)
        lone: list[tuple[bytes, bytes, bytes]] = []
        present: list[tuple[bytes, bytes, bytes]] = []
        absent: list[tuple[bytes, bytes]] = []
        for key, value in relied.items():
            of_thread = is_thread(places[key])
            if value is not None:
                (present if of_thread else lone).append((places[key], key, value))
            elif of_thread:
                absent.append((places[key], key))
            elif staged.get(key) is None:
                return None
        old = sorted(changed - new_threads)
        puts = sorted((places[key], key, value) for key, value in staged.items() if value is not None)
        arguments = (
            locked,
            *_columns(3, sorted(lone)),
            *_columns(3, present),
            *_columns(2, absent),
            old,
            [min(stamps.get(thread, (_NEVER,))) for thread in old],
            [max(stamps.get(thread, (b"",))) for thread in old],
            sorted(new_threads),
            [max(stamps.get(thread, (b"",))) for thread in sorted(new_threads)],
            *_columns(3, [put for put in puts if put[1] in fresh]),
            *_columns(3, [put for put in puts if put[1] not in fresh]),
            *_columns(2, sorted((places[key], key) for key, value in staged.items() if value is None)),
        )
        return cls(arguments, threads, messages)


def _columns(count: int, rows: Sequence[tuple[bytes, ...]]) -> Sequence[Sequence[bytes]]:
    return list(zip(*rows, strict=True)) or [()] * count


# --- the commit -------------------------------------------------------------------------------------------------------
def _may_be_stored(error: BaseException) -> bool:
    """After an error of a commit."""
    code = error.sqlstate if isinstance(error, asyncpg.PostgresError) else None
    return code is None or code.startswith(_IN_DOUBT)


def _refusal(error: BaseException) -> str | None:
    """The reason for which no other try is made; None if one is."""
    code = error.sqlstate if isinstance(error, asyncpg.PostgresError) else None
    return None if code is None or code == TOO_MANY else REFUSED.get(code[:2])


async def find(nodes: Nodes, lock_s: float = LOCK_S_MAX) -> NodeConnection:
    """A connection to the node that takes writes. Raises EngineUnavailableError."""
    connection = await nodes.find(
        lock_timeout=str(int(lock_s * 1000)), idle_in_transaction_session_timeout=str(IDLE_S_MAX * 1000)
    )
    connection.add_log_listener(warn)
    if not nodes.waits_for_standbys(connection):
        connection.terminate()
        _log.error("store_node_without_standbys", reason=NO_STANDBYS)
        raise EngineUnavailableError(UNAVAILABLE)
    try:
        await _look_back(nodes, connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _look_back(nodes: Nodes, connection: NodeConnection) -> None:
    """Checks on a new connection that the database has what was confirmed: it may be another one, or restored. The
    caller ends the connection after an error. Raises EngineUnavailableError.
    """
    key = nodes.last_confirmed
    if not key or nodes.went_back or now_s() - nodes.last_confirmed_s > PURGE_S_MIN:  # it may be purged
        return
    try:
        there = await connection.fetchval(_IS_THERE, tkey(key), key, timeout=CONNECT_S_MAX)
    except FAILURES as error:
        raise EngineUnavailableError(UNAVAILABLE) from error
    if not there:
        nodes.went_back = WENT_BACK
        _log.error("database_went_back", missing=key.decode(errors="replace"), reason=WENT_BACK)


async def keep_lease(nodes: Nodes) -> None:
    """Empty commits on a connection of its own, while there are no others."""
    counter = secrets.randbelow(COUNTERS_COUNT)
    connection: NodeConnection | None = None
    try:
        while True:
            if nodes.is_due:
                try:
                    if connection is None or connection.is_closed() or connection.node != nodes.node:
                        if connection is not None:
                            connection.terminate()
                            connection = None
                        connection = await find(nodes)
                    began_s = now_s()
                    await bounded(connection, _beat(nodes, connection, counter), COMMIT_S_MAX)
                    nodes.confirmed(connection.node, began_s)
                except (*FAILURES, StoreUnavailableError) as error:
                    reason = type(error).__name__
                    if connection is not None:
                        connection.terminate()
                        reason = connection.warned or reason
                    _log.warning("store_lease_not_renewed", reason=reason)
            await asyncio.sleep(BEAT_S / 2)
    finally:
        if connection is not None:
            connection.terminate()


async def _beat(nodes: Nodes, connection: NodeConnection, counter: int) -> None:
    await connection.execute(COUNT, counter, 0, 0)
    await nodes.confirm(connection)


class PostgresWriter(StoreWriter):
    """One of those of a server. It waits for no head that somebody else has locked, and for other locks only a moment:
    `aside` gets the writes that need them, so that the others do not wait with them."""

    usual = USUAL
    heads = LOCKED_HEADS
    lock_s = LOCKED_S

    unconfirmed = UNKNOWN
    away = UNAVAILABLE
    busy = BUSY

    def __init__(
        self, nodes: Nodes, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None], aside: Aside | None
    ) -> None:
        super().__init__(clock, metrics, on_reopen)
        self._nodes = nodes
        self._aside = aside
        self._connection: NodeConnection | None = None
        self._counter = secrets.randbelow(COUNTERS_COUNT)
        self._committing = False
        """From when on the transaction may be stored."""

    @property
    def group(self) -> int:
        """Before every group: what was read is always compared again."""
        return -1

    async def close(self) -> None:
        await super().close()
        self._disconnect()

    async def _reopen(self) -> None:
        self._disconnect()
        await self._connected()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _connected(self) -> NodeConnection:
        connection = self._connection
        if connection is None or connection.is_closed() or connection.node != self._nodes.node:
            self._disconnect()
            try:
                connection = self._connection = await find(self._nodes, self.lock_s)
            except StoreUnavailableError as error:
                raise NotWrittenError(str(error)) from error
        return connection

    async def _commit(self, group: list[PendingWrite]) -> Mapping[PendingWrite, Exception]:
        until_s = now_s() + COMMIT_S_MAX
        if self._aside is not None and self._aside.in_use:
            self._aside.take(group, ())
        usual = _Usual.of(group)
        for number in range(TRIES_MAX):
            if not group:
                return {}
            connection = await self._connected()
            began_s = now_s()
            connection.warned, self._committing = "", False
            try:
                failed = await bounded(connection, self._attempt(connection, group, usual), until_s - began_s)
            except _AGAIN:
                usual = None
            except LockedError as error:
                if self._aside is None:
                    break
                self._aside.take(group, error.heads)
                usual = _Usual.of(group)
                continue
            except asyncpg.LockNotAvailableError:
                if self._aside is None:
                    break
                return await self._each(group, self._aside)
            except FAILURES as error:  # also of a node that takes no writes any more
                connection.terminate()
                if self._committing and _may_be_stored(error):
                    _log.error("store_commit_in_doubt", reason=connection.warned or type(error).__name__)
                    raise EngineUnavailableError(UNKNOWN) from error
                reason = _refusal(error)
                _log.warning(
                    "store_commit_refused", error=type(error).__name__, sqlstate=getattr(error, "sqlstate", None)
                )
                if reason is not None:
                    raise NotWrittenError(reason) from error
            else:
                self._nodes.confirmed(connection.node, began_s)
                if await self._nodes.settled(connection.node):
                    if lasting := _lasting(group, failed):
                        self._nodes.last_confirmed, self._nodes.last_confirmed_s = lasting, began_s
                    return failed
                connection.terminate()
                raise EngineUnavailableError(UNKNOWN)
            if now_s() > until_s:
                break
            await asyncio.sleep(0.001 * secrets.randbelow(2 ** (number + 2)))
        raise EngineBusyError(BUSY)

    async def _each(self, group: list[PendingWrite], aside: Aside) -> Mapping[PendingWrite, Exception]:
        """Each write by itself: one of them needs what somebody else has locked."""
        if len(group) == 1:
            aside.take(group, _touched(group[0]))
            if group:
                raise EngineBusyError(BUSY)
            return {}
        failed: dict[PendingWrite, Exception] = {}
        left = list(group)
        while left:
            alone = left[:1]
            try:
                failed |= await self._commit(alone)
            except (EngineBusyError, NotWrittenError) as error:  # the ones before are stored
                return failed | {pending: NotWrittenError(str(error)) for pending in left}
            if not alone:
                group.remove(left[0])
            del left[0]
        return failed

    async def _attempt(
        self, connection: NodeConnection, group: Sequence[PendingWrite], usual: _Usual | None
    ) -> Mapping[PendingWrite, Exception]:
        if usual is not None:
            self._committing = True
            for _ in range(USUAL_TRIES_MAX):
                row = await connection.fetchrow(
                    self.usual, *usual.arguments, self._counter, usual.threads, usual.messages
                )
                done, still, locked = row or (False, False, ())
                if done:
                    await self._confirm(connection, usual.threads, usual.messages)
                    return {}
                if locked:
                    raise LockedError(locked)
                if still:
                    break
            self._committing = False
        return await self._transaction(connection, group)

    async def _confirm(self, connection: NodeConnection, threads: int, messages: int) -> None:
        await self._nodes.confirm(connection)
        self.state = Counters(self.state.threads + threads, self.state.messages + messages)

    async def _transaction(
        self, connection: NodeConnection, group: Sequence[PendingWrite]
    ) -> Mapping[PendingWrite, Exception]:
        try:
            if await connection.execute(_BEGIN) != "SELECT 1":
                raise NotWrittenError("the database was upgraded: start the version of the server that did it")  # noqa: TRY301  it has to end the transaction
            failed, threads, messages = await write_group(connection, group, self.heads, self._clock)
            await connection.execute(COUNT, self._counter, threads, messages)
        except BaseException:
            if not connection.is_closed():
                await connection.execute("ROLLBACK")
            raise
        self._committing = True
        if await connection.execute("COMMIT") != "COMMIT":
            raise asyncpg.InterfaceError(UNKNOWN)
        await self._confirm(connection, threads, messages)
        return failed


def _lasting(group: Sequence[PendingWrite], failed: Collection[PendingWrite]) -> bytes:
    """The key of a version entry that the group has put, empty if there is none."""
    for pending in reversed(group):
        if pending not in failed and (versions := new_versions(pending)):
            return next(iter(versions))
    return b""


# --- what waits -------------------------------------------------------------------------------------------------------
class _WaitingWriter(PostgresWriter):
    """Waits for locks. `touched`: what its writes change or expect, from the first one until it has done all."""

    usual = USUAL_WAITING
    heads = WAITED_HEADS
    lock_s = LOCK_S_MAX

    def __init__(self, nodes: Nodes, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]) -> None:
        super().__init__(nodes, clock, metrics, on_reopen, None)
        self.touched: set[bytes] = set()
        self.began_s = 0.0

    async def _run(self) -> None:
        try:
            await super()._run()
        finally:
            self.touched.clear()

    async def _commit(self, group: list[PendingWrite]) -> Mapping[PendingWrite, Exception]:
        self.began_s = now_s()
        return await super()._commit(group)


class Aside:
    """The writes of a server that wait for a lock of somebody else, and later ones that touch the same: a write never
    overtakes one whose result it expects, nor one of its thread."""

    def __init__(self, writers: Sequence[_WaitingWriter]) -> None:
        self._writers = writers

    @property
    def in_use(self) -> bool:
        return any(writer.touched for writer in self._writers)

    def take(self, group: list[PendingWrite], locked: Collection[bytes]) -> None:
        """Remove from the group what needs one of `locked`, or touches what waits already."""
        keys = set(locked)
        for pending in tuple(group):
            touched = _touched(pending)
            writer = next((one for one in self._writers if not touched.isdisjoint(one.touched)), None)
            if writer is not None or not touched.isdisjoint(keys):
                writer = writer or min(self._writers, key=lambda one: (bool(one.touched), -one.began_s))
                keys |= touched
                group.remove(pending)
                writer.touched |= touched
                writer.take_over(pending)


def _touched(pending: PendingWrite) -> set[bytes]:
    """The `tkey` of each thread, and each key of no thread, that a write changes or expects."""
    keys = {key for key, _ in expectations(pending)} | {key for key, _ in (pending.write.puts if pending.write else ())}
    return {place if is_thread(place := tkey(key)) else key for key in keys}


# --- several writers --------------------------------------------------------------------------------------------------
class Writers:
    """The writer of a server (`store.engine.Commits`): each of several has a group in flight."""

    def __init__(
        self, nodes: Nodes, counted: Counters, clock: Clock, metrics: StoreMetrics, on_reopen: Callable[[], None]
    ) -> None:
        self._counted = counted
        waiting = [_WaitingWriter(nodes, clock, metrics, on_reopen) for _ in range(WAITING_COUNT)]
        aside = Aside(waiting)
        self._writers = [PostgresWriter(nodes, clock, metrics, on_reopen, aside) for _ in range(WRITERS_COUNT)]
        self._all: Sequence[PostgresWriter] = (*self._writers, *waiting)

    def _of(self, key: bytes | None) -> PostgresWriter:
        return self._writers[0 if key is None else tkey(key)[0] % WRITERS_COUNT]

    @property
    def available(self) -> bool:
        return all(writer.available for writer in self._writers)

    @property
    def queued(self) -> int:
        return sum(writer.queued for writer in self._all)

    @property
    def group(self) -> int:
        return self._writers[0].group

    @property
    def state(self) -> Counters:
        counted = [self._counted, *(writer.state for writer in self._all)]
        return Counters(sum(one.threads for one in counted), sum(one.messages for one in counted))

    def reserve(self, order_key: bytes) -> PendingWrite:
        return self._of(order_key).reserve(order_key)

    def submit(
        self, pending: PendingWrite, write: Write, expect: Sequence[tuple[bytes, bytes | None]] = ()
    ) -> asyncio.Future[None]:
        return self._of(pending.order_key).submit(pending, write, expect)

    def leave(self, pending: PendingWrite) -> None:
        self._of(pending.order_key).leave(pending)

    def commit(self, write: Write) -> asyncio.Future[None]:
        return self._of(write.puts[0][0] if write.puts else None).commit(write)

    async def barrier(self) -> None:
        """One commit waits for all that were made before it."""
        await self._writers[0].barrier()

    async def check_writable(self) -> None:
        for writer in self._writers:
            await writer.check_writable()

    async def settled(self) -> None:
        for writer in self._all:
            await writer.settled()

    async def close(self) -> None:
        await asyncio.gather(*(writer.close() for writer in self._writers))  # which may leave something to the others
        await asyncio.gather(*(writer.close() for writer in self._all))
