"""The nodes of a PostgreSQL: which of them a server uses, and until when it may read there.

Owns: the rules for the URL, connecting, and the lease on the node in use (docs/decisions/0252-reads-need-a-lease.md).
Invariants:
- A server uses the node that takes writes; if two do, the one of the later timeline.
- Two nodes are never taken for one, even if both were promoted from the same timeline.
- A node is read only within LEASE_S of the beginning of a commit on it that its standbys have confirmed.
- A server neither reads a node nor acknowledges a write there until it has had the lease for WAIT_S without a gap. By
  then no server may read another node.
- Nothing waits for a node without a deadline.

Why no two servers read two nodes: let one node confirm commit a, and another one commit b. Each needed a majority of
the nodes, so one node took part in both, say in a first; and a node follows one other at a time. So a began before b
was confirmed, and its lease ends LEASE_S after that. Whoever got b confirmed then waits WAIT_S, unless its lease there
had no gap. In that case the shared node was away for less than a lease, in which nobody had waited long enough to read
the other node. Three nodes with one synchronous standby are a majority; of five nodes two standbys have to confirm.

It must never send a cancel request for a commit, and it knows no table.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from minikms.platform.clock import boot_ns
from minikms.platform.logs import structlog
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import FormatError

CONNECT_S_MAX: Final = 5.0
"""Of one connection to one host."""
LATER_NODE_S: Final = 0.5
"""How long a connection that was made waits for one to a node of a later timeline."""
HOSTS_COUNT_MAX: Final = 16
LEASE_S: Final = 5.0
WAIT_S: Final = 6.0
"""Longer than a lease by a fifth, more than clocks of two machines differ in their rates."""
SETTLE_S_MAX: Final = 10.0
"""How long a commit that is confirmed waits until it may be acknowledged: a WAIT_S, and some of another."""
BEAT_S: Final = 1.0
"""A server that has begun no commit for so long makes an empty one."""
LOCK_S_MAX: Final = 10
"""A statement waits for the locks of another server at most this long."""
IDLE_S_MAX: Final = 15
"""A server that stops within a transaction keeps its locks at most this long."""
UNAVAILABLE: Final = "the store's database is not available now"

FAILURES: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
    EOFError,
)
"""What the driver raises for a database that refuses, or is away."""
SAFE: Final = {
    "client_min_messages": "warning",
    "default_transaction_isolation": "read committed",
    "synchronous_commit": "on",
}
"""What an acknowledged commit rests on, whatever the defaults of the role and the database are: a wait for the standby
that was cancelled is known by its warning alone."""
PLANS: Final = {
    "jit": "off",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_generic_plan",
}
"""Statements find few rows by their keys. A plan from when a table was small would read all of it later."""

_NODE: Final = (
    "SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8) || ' ' || extract(epoch FROM pg_postmaster_start_time()),"
    " current_setting('synchronous_standby_names')"
)
"""The timeline, then when its PostgreSQL was started (Unix seconds, to the microsecond). A node that is promoted begins
a new timeline, but two standbys that are promoted apart from each other begin the same."""
_SAFE: Final = "SELECT " + ", ".join(f"current_setting('{name}')" for name in SAFE)
_STANDBYS: Final = "SELECT current_setting('synchronous_standby_names')"

_log = structlog.get_logger("progressdb.store")


class NodeConnection(asyncpg.Connection):
    """One to `node`, the empty string if the store has a single one."""

    __slots__ = ("node", "standbys", "warned")
    node: str
    standbys: str
    """Which ones the node waited for when it was last asked; empty for none, or where nobody asks."""
    warned: str
    """The last warning: a wait for the standby that was cancelled ends with one, and with success."""

    def get_reset_query(self) -> str:
        """None: nothing that a read leaves in a session lasts longer than its statement."""
        return ""


class _UnsafeError(asyncpg.InterfaceError):
    """A session without what SAFE says, such as one of a connection pooler; the text says which."""


class HostPort(NamedTuple):
    """A host and port of the URL, None for the driver's own choice."""

    host: str | None = None
    port: int | None = None


def check_url(url: str) -> None:
    """Raises FormatError for a URL that has a password, that sets what the server sets (SAFE), or that does not check
    the server's name over TCP."""
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        places = places_of(url)
    except ValueError:
        raise FormatError("store.url is no URL of PostgreSQL") from None
    if parts.scheme not in ("postgresql", "postgres"):
        raise FormatError("store.url must begin with postgresql://")
    if parts.password is not None or "password" in query or "sslpassword" in query:
        raise FormatError("store.url must not hold a password: use a client certificate or a password file (passfile=)")
    for name in query:
        if name.lower() in SAFE or name == "options":
            raise FormatError(f"store.url must not hold {name}: the server sets what acknowledged writes rest on")
    local = all((place.host or "").startswith("/") for place in places)
    if not local and query.get("sslmode") != ["verify-full"]:
        raise FormatError("store.url must have sslmode=verify-full, or the directory of a Unix socket as host=")
    if len(places) > HOSTS_COUNT_MAX:
        raise FormatError(f"store.url must not name more than {HOSTS_COUNT_MAX} hosts")


def places_of(url: str) -> list[HostPort]:
    """The hosts that a URL names. Raises ValueError."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    named = parts.netloc.rpartition("@")[2] or (query.get("host") or [""])[-1]
    ports = [int(port) for port in ",".join(query.get("port", ())).split(",") if port]
    places: list[HostPort] = []
    for number, one in enumerate(unquote(named).split(",")):
        port = ports[number if number < len(ports) else -1] if ports else None
        if one.startswith("/"):
            places.append(HostPort(one, port))
        else:
            split = urlsplit(f"//{one}")
            places.append(HostPort(split.hostname, split.port or port))
    return places


def now_s() -> float:
    """Of a clock that goes on while the machine sleeps, and that nobody sets."""
    return boot_ns() / 1e9


class Nodes:
    """The nodes that a URL names. `replicated`: more than one may believe that it takes the writes."""

    def __init__(self, url: str, *, replicated: bool) -> None:
        """Raises FormatError."""
        check_url(url)
        self._url = url
        self._replicated = replicated
        self._places = places_of(url)
        self._place = self._places[0]
        self.node: str | None = None if replicated else ""
        """The one in use, None before the first."""
        self.last_confirmed = b""
        self.last_confirmed_s = 0.0
        """The key of an entry that the last confirmed write of this server has put, and nobody deletes for PURGE_S_MIN,
        and when."""
        self.went_back = ""
        """Why what was confirmed is no longer there; empty if it is."""
        self._until_s = 0.0
        """When the lease on it ends."""
        self._since_s = 0.0
        """When the first commit was confirmed of those since when the lease has not ended."""

    # --- connecting -----------------------------------------------------------------------------------------------
    async def find(self, **settings: str) -> NodeConnection:
        """A connection to the node that takes writes. Raises EngineUnavailableError."""
        tasks = {asyncio.create_task(self._open(place, settings)): place for place in self._places}
        pending: set[asyncio.Task[NodeConnection]] = set(tasks)
        made: list[tuple[NodeConnection, HostPort]] = []
        failure: BaseException | None = None
        try:
            while pending:
                timeout = LATER_NODE_S if made else None
                done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                for task in done:
                    failure = task.exception() or failure
                    if task.exception() is None:
                        made.append((task.result(), tasks[task]))
            if not made:
                raise EngineUnavailableError(
                    str(failure) if isinstance(failure, _UnsafeError) else UNAVAILABLE
                ) from failure
            made.sort(key=lambda one: (int(one[0].node.partition(" ")[0] or "0", 16), one[0].node == self.node))
            connection, self._place = made.pop()
            return connection
        finally:
            for other, _ in made:
                other.terminate()
            for task in pending:
                task.add_done_callback(_terminate)
                task.cancel()
            del failure

    async def again(self, **settings: str) -> NodeConnection:
        """Another connection to the node in use. Without replication that is any which takes writes. Raises
        EngineUnavailableError."""
        if not self._replicated:
            return await self.find(**settings)
        try:
            connection = await self._open(self._place, settings)
        except FAILURES as error:
            raise EngineUnavailableError(UNAVAILABLE) from error
        if connection.node != self.node:
            connection.terminate()
            raise EngineUnavailableError(UNAVAILABLE)
        return connection

    async def _open(self, place: HostPort, settings: dict[str, str]) -> NodeConnection:
        """Raises one of FAILURES, of which one is _UnsafeError."""
        connection: NodeConnection = await asyncpg.connect(
            self._url,
            host=place.host,
            port=place.port,
            timeout=CONNECT_S_MAX,
            target_session_attrs=SessionAttribute.read_write,
            connection_class=NodeConnection,
            server_settings={"application_name": "progressdb", **PLANS, **settings, **SAFE},
        )
        connection.node = connection.standbys = connection.warned = ""
        try:
            for (name, wanted), found in zip(
                SAFE.items(), await connection.fetchrow(_SAFE, timeout=CONNECT_S_MAX) or (), strict=True
            ):
                if found != wanted:
                    why = f"a session of the database has {name} = {found}, not {wanted}: connect without a pooler"
                    _log.error("store_session_unsafe", reason=why)
                    raise _UnsafeError(why)  # noqa: TRY301  it has to end the connection
            if self._replicated:
                row = await connection.fetchrow(_NODE, timeout=CONNECT_S_MAX)
                connection.node, connection.standbys = row or ("", "")
        except BaseException:
            connection.terminate()
            raise
        return connection

    # --- the lease ------------------------------------------------------------------------------------------------
    def waits_for_standbys(self, connection: NodeConnection) -> bool:
        """Whether a commit is on more than one disk where that is asked for."""
        return not self._replicated or connection.standbys != ""

    async def still_waits(self, connection: NodeConnection) -> bool:
        """As `waits_for_standbys`, for the commit that has just ended on the connection. When the setting is emptied,
        the commits that wait for a standby end with success. PostgreSQL signals its sessions first, so that the next
        statement of such a session sees the empty setting. Raises one of FAILURES."""
        if self._replicated:
            connection.standbys = await connection.fetchval(_STANDBYS)
        return self.waits_for_standbys(connection)

    def confirmed(self, node: str, began_s: float) -> None:
        """A commit on the node that began then was confirmed: it is the one in use."""
        if self.node != node:
            self.node, self._until_s = node, 0.0
        if now_s() > self._until_s:
            self._since_s = now_s()
        self._until_s = max(self._until_s, began_s + LEASE_S)

    async def settled(self, node: str) -> bool:
        """Returns as soon as a commit that was confirmed on the node may be acknowledged; False if it may not be, and
        after SETTLE_S_MAX."""
        if not self._replicated:
            return True
        end_s = now_s() + SETTLE_S_MAX
        while self.node == node and (left_s := self._since_s + WAIT_S - now_s()) > 0:
            if (left_s := min(left_s, end_s - now_s())) <= 0:
                return False
            await asyncio.sleep(left_s)
        return self.node == node and now_s() <= self._until_s

    def check(self, node: str) -> None:
        """Raises EngineUnavailableError unless what was read on the node just now may be answered."""
        if self.node != node or (self._replicated and not self._since_s + WAIT_S <= now_s() <= self._until_s):
            raise EngineUnavailableError(UNAVAILABLE)

    @property
    def is_due(self) -> bool:
        """Whether the lease is to be renewed by an empty commit."""
        return self._replicated and now_s() > self._until_s - LEASE_S + BEAT_S


def _terminate(task: asyncio.Task[NodeConnection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()


def warn(connection: Any, message: Any) -> None:
    """A listener of what the database reports."""
    if getattr(message, "severity_en", None) == "WARNING":
        connection.warned = str(message)
