"""The tables of a key service on several hosts in PostgreSQL, and all statements (docs/spec/replica.md).

Owns: the tables, their number, the rights of the replicators' role, and the one connection of a replicator.
Invariants: a change is one statement, and so one transaction, whose condition on term, member and number decides; no
row says that a commit counts before `Database.confirm` does; what is read has bounds of its own; no statement waits
without a deadline. It must never interpret a content.
"""

# ruff: noqa: S608  every statement is a constant, with numbers of this module

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from minikms.api.base64 import decode_canonical, encode_text
from minikms.api.errors import StartError, StartLaterError
from minikms.api.replica_verbs import (
    LEASE_SECONDS,
    MEMBERS_MAX,
    REPLICA_BYTES_MAX,
    MemberReport,
    ReplicaCommit,
    ReplicaFile,
    ReplicaPosition,
)
from minikms.platform.clock import boot_ns
from minikms.processes.postgresql import FAILURES, NO_STANDBYS, Database, NodeConnection, bounded, warn

T = TypeVar("T")

SCHEMA: Final = 1
STATEMENT_S_MAX: Final = 10.0
"""The time of one statement, with the wait for the standby. After it, the outcome is unknown."""
COMMAND_S_MAX: Final = 600.0
LEASE_NS: Final = LEASE_SECONDS * 1_000_000_000
REPORT_NS: Final = 2 * 1_000_000_000
"""Between two reports."""
REPORT_BYTES_MAX: Final = 4096
CONTENT_BYTES_MAX: Final = 1024
"""The size of a key file (docs/spec/formats.md)."""
RECORD_BYTES: Final = 40
"""The size of a tombstone (docs/spec/tombstones.md)."""
PART_FILES: Final = 2048
PART_RECORDS: Final = 65_536
"""Rows of one request to the daemon: less than REPLICA_BYTES_MAX, beside a keyring."""
TEXT_CHARS_MAX: Final = 128
STATE_BYTES_MAX: Final = 256

TABLES: Final = f"""
CREATE TABLE kms_schema (id integer PRIMARY KEY CHECK (id = 0), number integer NOT NULL);
CREATE TABLE kms_head (id integer PRIMARY KEY CHECK (id = 0), keyring_id text NOT NULL, term bigint NOT NULL,
    member text NOT NULL, renewals bigint NOT NULL, number bigint NOT NULL, seals bigint NOT NULL, wanted text NOT NULL,
    keyring bytea NOT NULL, state bytea NOT NULL);
CREATE TABLE kms_file (key_id text PRIMARY KEY, number bigint NOT NULL,
    content bytea NOT NULL CHECK (octet_length(content) <= {CONTENT_BYTES_MAX}));
CREATE INDEX kms_file_changes ON kms_file (number, key_id);
CREATE TABLE kms_tombstone (position bigint PRIMARY KEY, record bytea NOT NULL
    CHECK (octet_length(record) = {RECORD_BYTES}));
CREATE TABLE kms_member (member_id text PRIMARY KEY, at timestamptz NOT NULL,
    report bytea NOT NULL CHECK (octet_length(report) <= {REPORT_BYTES_MAX}));
INSERT INTO kms_schema VALUES (0, {SCHEMA});
INSERT INTO kms_head VALUES (0, '', 0, '', 0, 0, 0, '', '', '');
"""
GRANTS: Final = """
GRANT SELECT ON kms_schema, kms_head, kms_file, kms_tombstone, kms_member TO {role};
GRANT UPDATE ON kms_head TO {role};
GRANT INSERT, UPDATE, DELETE ON kms_file TO {role};
GRANT INSERT, DELETE ON kms_tombstone TO {role};
GRANT INSERT, UPDATE ON kms_member TO {role};
REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC, {role};
"""
RESET: Final = f"""
TRUNCATE kms_file, kms_tombstone, kms_member;
INSERT INTO kms_schema VALUES (0, {SCHEMA}) ON CONFLICT DO NOTHING;
INSERT INTO kms_head AS head VALUES (0, '', 1, 'm0', 1, 0, 0, '', '', '') ON CONFLICT (id) DO UPDATE SET
    keyring_id = '', term = head.term + 1, renewals = head.renewals + 1, number = 0, wanted = '', keyring = '',
    state = '';
"""
"""The member stays: until its lease is over, no other one takes over; where the row is missing, nobody knows it, and
`m0` is no member. The seals stay too."""

_HEAD: Final = (
    f"SELECT left(keyring_id, {TEXT_CHARS_MAX}), term, left(member, {TEXT_CHARS_MAX}), renewals, number, seals,"
    f" left(wanted, {TEXT_CHARS_MAX}), substring(state FOR {STATE_BYTES_MAX}), octet_length(keyring) = 0 FROM kms_head"
)
_KEYRING: Final = f"SELECT substring(keyring FOR {REPLICA_BYTES_MAX + 1}) FROM kms_head"
_FILES: Final = (
    f"SELECT left(key_id, {TEXT_CHARS_MAX}) AS key_id, substring(content FOR {CONTENT_BYTES_MAX + 1}) AS content,"
    " number FROM kms_file WHERE (number, key_id) > ($1, $2) ORDER BY number, key_id"
    f" LIMIT {PART_FILES}"
)
_TOMBSTONES: Final = (
    f"SELECT position, substring(record FOR {RECORD_BYTES + 1}) AS record FROM kms_tombstone WHERE position > $1"
    f" ORDER BY position LIMIT {PART_RECORDS}"
)
_RETURNING: Final = "RETURNING term, renewals, number, seals, wanted"
_RENEW: Final = (
    "UPDATE kms_head SET renewals = renewals + 1, seals = greatest(seals, $4)"
    f" WHERE term = $1 AND member = $2 AND number = ANY($3::bigint[]) {_RETURNING}"
)
_CHANGE: Final = f"""
WITH head AS (UPDATE kms_head SET renewals = renewals + 1, seals = greatest(seals, $4), number = $5, state = $6,
    keyring = CASE WHEN octet_length($7::bytea) = 0 THEN keyring ELSE $7 END
    WHERE term = $1 AND member = $2 AND number = $3 {_RETURNING}),
gone AS (DELETE FROM kms_file WHERE key_id = ANY($8::text[]) AND EXISTS (SELECT 1 FROM head)),
files AS (INSERT INTO kms_file (key_id, content, number)
    SELECT new.key_id, new.content, $5 FROM unnest($9::text[], $10::bytea[]) AS new (key_id, content)
    WHERE new.key_id <> ALL($8) AND EXISTS (SELECT 1 FROM head)
    ON CONFLICT (key_id) DO UPDATE SET content = excluded.content, number = excluded.number),
stones AS (INSERT INTO kms_tombstone (position, record)
    SELECT $11 + new.place, new.record FROM unnest($12::bytea[]) WITH ORDINALITY AS new (record, place)
    WHERE EXISTS (SELECT 1 FROM head))
SELECT term, renewals, number, seals, wanted FROM head
"""
_TAKE: Final = f"""
WITH head AS (UPDATE kms_head SET term = greatest(term, $5) + 1, member = $3, renewals = renewals + 1, wanted = '',
    keyring_id = $4 WHERE term = $1 AND renewals = $2 AND keyring_id IN ('', $4)
    {_RETURNING}, octet_length(keyring) = 0 AS empty),
files AS (DELETE FROM kms_file WHERE (SELECT empty FROM head)),
stones AS (DELETE FROM kms_tombstone WHERE (SELECT empty FROM head))
SELECT term, renewals, number, seals, wanted FROM head
"""
_RELEASE: Final = (
    "UPDATE kms_head SET renewals = renewals + 1, member = '', seals = greatest(seals, $4)"
    f" WHERE term = $1 AND member = $2 AND renewals = $3 {_RETURNING}"
)
_WANT: Final = f"UPDATE kms_head SET wanted = $1 WHERE wanted <> $1 {_RETURNING}"
_SEAL: Final = f"UPDATE kms_head SET seals = $1 WHERE seals < $1 {_RETURNING}"
_REPORT: Final = (
    "INSERT INTO kms_member (member_id, at, report) VALUES ($1, clock_timestamp(), $2)"
    " ON CONFLICT (member_id) DO UPDATE SET at = excluded.at, report = excluded.report"
)
_MEMBERS: Final = (
    f"SELECT substring(report FOR {REPORT_BYTES_MAX + 1}), extract(epoch FROM clock_timestamp() - at)::float8"
    f" FROM kms_member ORDER BY at DESC LIMIT {MEMBERS_MAX}"
)
_EXAMINE: Final = """
SELECT current_setting('synchronous_standby_names'), current_setting('fsync') || current_setting('full_page_writes'),
    has_table_privilege('kms_head', 'UPDATE') AND has_table_privilege('kms_file', 'INSERT')
    AND has_table_privilege('kms_file', 'DELETE') AND has_table_privilege('kms_tombstone', 'INSERT')
    AND has_table_privilege('kms_member', 'UPDATE'),
    has_table_privilege('kms_head', 'DELETE') OR has_table_privilege('kms_tombstone', 'UPDATE')
"""


class TablesError(Exception):
    """The tables can't be used. The text is for the operator."""


class Head(NamedTuple):
    """`empty`: no member has filled the tables yet."""

    keyring_id: str
    term: int
    member: str
    renewals: int
    number: int
    seals: int
    wanted: str
    state: bytes
    empty: bool


class RenewedLease(NamedTuple):
    """The head after a confirmed commit of its member, which began at `asked_ns`."""

    term: int
    renewals: int
    number: int
    seals: int
    wanted: str
    asked_ns: int


class ReplicaPart(NamedTuple):
    """`tombstones`: the records after the first `tombstones_after`."""

    files: list[ReplicaFile]
    tombstones_after: int
    tombstones: bytes
    complete: bool


class Reports(NamedTuple):
    """The newest report of each member, as they were read at `read_ns`."""

    members: list[MemberReport]
    read_ns: int


class Tables:
    """The tables over one connection, which is opened again when it is lost. Each method raises one of FAILURES, or
    TablesError."""

    def __init__(self, url: str, *, single_node: bool) -> None:
        settings = {"application_name": "minikms-replicator", "idle_in_transaction_session_timeout": "60000"}
        self._database = Database(url, replicated=not single_node, settings=settings)
        self._connection: NodeConnection | None = None
        self._within = False
        """Whether a snapshot has the connection, which is not opened again then."""
        self._since_ns = 0
        self._until_ns = 0
        """When the present run of confirmed commits on this node began, and when it ends without another commit: one
        lease after its last commit began."""
        self.reports = Reports([], 0)
        self.connected_ns = 0
        self.commits = 0
        self.commit_ns = 0
        self.confirmed_ns = 0

    def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()

    @property
    def node(self) -> str:
        """The node that answered the last statement."""
        return self._connection.node if self._connection is not None else ""

    @property
    def settled_ns(self) -> int | None:
        """How long the node has confirmed the commits of this process without a gap; None for a single node. No other
        node has confirmed a commit in that time: each needs a majority of the nodes."""
        now_ns = boot_ns()
        return (now_ns - self._since_ns if now_ns <= self._until_ns else 0) if self._database.replicated else None

    # --- reading ------------------------------------------------------------------------------------------------------

    async def head(self) -> Head:
        """A row that is missing is that of empty tables."""
        rows = await self._fetch(_HEAD)
        return Head(*rows[0]) if rows else Head("", 0, "", 0, 0, 0, "", b"", True)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[None]:
        """All reads of the block see the same tables."""
        connection = await self._open()
        transaction = connection.transaction(isolation="repeatable_read", readonly=True)
        await self._run(lambda _: transaction.start())
        self._within = True
        try:
            yield
        finally:
            self._within = False
            if not connection.is_closed():
                await self._run(lambda _: transaction.rollback())

    async def keyring(self) -> bytes:
        content: bytes = (await self._fetch(_KEYRING))[0][0]
        if len(content) > REPLICA_BYTES_MAX:
            raise TablesError(f"the keyring in the database is larger than {REPLICA_BYTES_MAX} bytes")
        return content

    async def parts(self, number: int, tombstones: int) -> AsyncIterator[ReplicaPart]:
        """What came after this change and this number of tombstones; the last part is complete. In snapshots."""
        after: tuple[int, str] = (number + 1, "")
        while True:
            files = await self._fetch(_FILES, *after)
            records = await self._fetch(_TOMBSTONES, tombstones)
            if any(len(row["content"]) > CONTENT_BYTES_MAX for row in files):
                raise TablesError(f"a key file in the database is larger than {CONTENT_BYTES_MAX} bytes")
            for place, row in enumerate(records, tombstones + 1):
                if row["position"] != place or len(row["record"]) != RECORD_BYTES:
                    raise TablesError(f"the tombstones in the database are damaged at record {place}")
            complete = len(files) < PART_FILES and len(records) < PART_RECORDS
            rows = [ReplicaFile(row["key_id"], encode_text(row["content"])) for row in files]
            yield ReplicaPart(rows, tombstones, b"".join(row["record"] for row in records), complete)
            if complete:
                return
            tombstones += len(records)
            after = (files[-1]["number"], files[-1]["key_id"]) if files else after

    async def examine(self) -> list[str]:
        """What is wrong with the database and the rights of the role."""
        standbys, safe, may, may_more = (await self._fetch(_EXAMINE))[0]
        checks = (
            (self._database.replicated and not standbys, NO_STANDBYS),
            (safe != "onon", "fsync or full_page_writes is off: a power failure loses what was acknowledged"),
            (not may, "the role lacks rights on the tables: minikms-replicator init grants them"),
            (may_more, "the role may do more than a replicator needs: use another one"),
        )
        return [text for wrong, text in checks if wrong]

    # --- the head -----------------------------------------------------------------------------------------------------

    async def renew(self, term: int, member: str, numbers: Sequence[int], seals: int) -> RenewedLease | None:
        """One renewal more, if the head is still the member's with one of these numbers; None if it is not."""
        return await self._commit(_RENEW, term, member, numbers, seals)

    async def change(self, term: int, member: str, commit: ReplicaCommit, seals: int) -> RenewedLease | None:
        """None if the head is not the member's any more, or has another number."""
        stones = commit.tombstones
        records = [stones[at : at + RECORD_BYTES] for at in range(0, len(stones), RECORD_BYTES)]
        contents = [decode_canonical(one.content, CONTENT_BYTES_MAX, "a key file") for one in commit.files]
        return await self._commit(
            _CHANGE, term, member, commit.previous, seals, commit.number, commit.state, commit.keyring,
            commit.destroyed, [one.key_id for one in commit.files], contents,
            commit.tombstones_after, records,
        )  # fmt: skip

    async def take_over(self, head: Head, position: ReplicaPosition) -> RenewedLease | None:
        """None if the head has changed. Tables that were not filled as a whole are emptied."""
        return await self._commit(
            _TAKE, head.term, head.renewals, position.member_id, position.keyring_id, position.term
        )

    async def release(self, lease: RenewedLease, member: str, seals: int) -> None:
        """With the seals: whoever takes over has to know of them. Nothing if it was renewed since: another process
        beside this daemon goes on with it.
        """
        await self._commit(_RELEASE, lease.term, member, lease.renewals, seals)

    async def want(self, member: str) -> None:
        """The member is to take over."""
        await self._commit(_WANT, member)

    async def seal(self, seals: int) -> None:
        await self._commit(_SEAL, seals)

    # --- reports ------------------------------------------------------------------------------------------------------

    async def exchange(self, report: MemberReport) -> list[MemberReport] | UnsetType:
        """Write the report, and read those of all members; nothing if that was done a moment ago."""
        if self.reports.read_ns and boot_ns() < self.reports.read_ns + REPORT_NS:
            return UNSET
        await self._report(report)
        read_ns = boot_ns()
        self.reports = Reports(await self.members(), read_ns)
        return self.reports.members

    async def confirm(self, report: MemberReport) -> None:
        """Returns once the standbys have what was read on this connection. Raises TablesError on another one."""
        before = self._connection
        await self._report(report)
        if self._connection is not before:
            raise TablesError("the connection was lost before the standbys had confirmed what was read")

    async def _report(self, report: MemberReport) -> None:
        await self._commit(_REPORT, report.member_id, msgspec.json.encode(report)[:REPORT_BYTES_MAX])

    async def members(self) -> list[MemberReport]:
        """The newest reports, without those that can't be read."""
        reports: list[MemberReport] = []
        for content, age_s in await self._fetch(_MEMBERS):
            with suppress(msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError):
                report = msgspec.json.decode(content, type=MemberReport)
                reports.append(msgspec.structs.replace(report, seen_seconds=max(0.0, age_s)))
        return reports

    # --- statements ---------------------------------------------------------------------------------------------------

    async def _open(self) -> NodeConnection:
        connection = self._connection
        if connection is None or connection.is_closed():
            if self._within:
                raise ConnectionResetError("the connection of a snapshot was lost")
            connection = self._connection = await self._database.find(lock_timeout="8000")
            self.connected_ns = boot_ns()
            connection.add_log_listener(warn)
            try:
                await bounded(connection, self._check(connection), STATEMENT_S_MAX)
            except BaseException:
                connection.terminate()
                raise
        return connection

    async def _check(self, connection: NodeConnection) -> None:
        if not self._database.waits_for_standbys(connection):
            raise TablesError(NO_STANDBYS)
        await check_schema(connection)

    async def _fetch(self, statement: str, *values: object) -> Any:
        return await self._run(lambda connection: connection.fetch(statement, *values))

    async def _run(self, work: Callable[[NodeConnection], Coroutine[Any, Any, T]]) -> T:
        connection = await self._open()
        try:
            return await bounded(connection, work(connection), STATEMENT_S_MAX)
        except BaseException:
            connection.terminate()
            raise

    async def _commit(self, statement: str, *values: object) -> RenewedLease | None:
        """The first row of the statement; None if it has none."""
        connection = await self._open()
        asked_ns = boot_ns()
        connection.warned = ""

        async def work() -> Any:
            row = await connection.fetchrow(statement, *values)
            await self._database.confirm(connection)
            return row

        row = await self._run(lambda _: work())
        now_ns = boot_ns()
        if connection.node != self._database.node or now_ns > self._until_ns:
            self._since_ns, self._until_ns = now_ns, 0
        self._database.node = connection.node
        self._until_ns = max(self._until_ns, asked_ns + LEASE_NS)
        self.commits, self.commit_ns, self.confirmed_ns = self.commits + 1, self.commit_ns + now_ns - asked_ns, now_ns
        return RenewedLease._make((*row, asked_ns)) if row is not None else None


async def check_schema(connection: NodeConnection, *, resets: bool = False) -> None:
    """`resets`: the row of the number may be missing."""
    if await connection.fetchval("SELECT to_regclass('kms_schema')") is None:
        raise TablesError("the database has no tables of a key service: run minikms-replicator init")
    number = await connection.fetchval("SELECT number FROM kms_schema")
    if number is None and not resets:
        raise TablesError("the table kms_schema is empty: run minikms-replicator reset")
    if number not in (SCHEMA, None):
        raise TablesError(f"the tables have number {number}, this version has {SCHEMA}: run the version that made them")


# --- commands ---------------------------------------------------------------------------------------------------------


async def init(url: str, role: str) -> None:
    """Make the tables, as their owner, for replicators of this role. Raises StartError."""

    async def work(connection: NodeConnection) -> None:
        if await connection.fetchval("SELECT to_regclass('kms_schema')") is not None:
            raise StartError("the database has the tables of a key service already")
        quoted = await connection.fetchval("SELECT quote_ident($1)", role)
        database = await connection.fetchval("SELECT quote_ident(current_database())")
        async with connection.transaction():
            await connection.execute(TABLES)
            await connection.execute(GRANTS.format(role=quoted, database=database))

    await _as_owner(url, work)


async def reset(url: str) -> None:
    """Empty the tables. Raises StartError."""

    async def work(connection: NodeConnection) -> None:
        await check_schema(connection, resets=True)
        async with connection.transaction():
            await connection.execute(RESET)

    await _as_owner(url, work)


async def _as_owner(url: str, work: Callable[[NodeConnection], Coroutine[Any, Any, None]]) -> None:
    with start_errors():
        connection = await Database(url, replicated=False, settings={}).find()
        try:
            await bounded(connection, work(connection), COMMAND_S_MAX)
        finally:
            connection.terminate()


@contextmanager
def start_errors() -> Iterator[None]:
    """Turns TablesError and FAILURES into a StartError."""
    try:
        yield
    except TablesError as error:
        raise StartError(str(error)) from None
    except FAILURES as error:
        raise StartLaterError(f"the database: {str(error) or type(error).__name__}") from None
