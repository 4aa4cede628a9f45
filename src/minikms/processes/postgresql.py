"""Connections to a PostgreSQL of other hosts, whose acknowledged commits a process relies on.

Owns: the rules for its URL, connecting to the node that takes writes, and whether a commit is on more than one disk.
Invariants: a session has what an acknowledged commit rests on (SAFE); a commit that may not be on the standbys is never
taken for one that is; nothing waits without a deadline. It must never send a cancel request for a commit, and it knows
no table. Only processes beside the key service import it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Coroutine
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

T = TypeVar("T")

CONNECT_S_MAX: Final = 5.0
"""The time for one connection to one host."""
LATER_NODE_S: Final = 0.5
"""How long a connection that was made waits for one to a node of a later timeline."""
HOSTS_COUNT_MAX: Final = 16
NO_STANDBYS: Final = "synchronous_standby_names is empty there"

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

_NODE: Final = (
    "SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8) || ' ' || extract(epoch FROM pg_postmaster_start_time()),"
    " current_setting('synchronous_standby_names')"
)
"""The timeline, then when its PostgreSQL was started (Unix seconds, to the microsecond). A node that is promoted begins
a new timeline, but two standbys that are promoted apart from each other begin the same."""
_SAFE: Final = "SELECT " + ", ".join(f"current_setting('{name}')" for name in SAFE)
_STANDBYS: Final = "SELECT current_setting('synchronous_standby_names')"


class NodeConnection(asyncpg.Connection):
    """One to `node`, the empty string if one disk is enough."""

    __slots__ = ("node", "standbys", "warned")
    node: str
    standbys: str
    """Which ones the node waited for when it was last asked; empty for none, or where nobody asks."""
    warned: str
    """The last warning: a wait for the standby that was cancelled ends with one, and with success."""

    def get_reset_query(self) -> str:
        """None: nothing that a read leaves in a session lasts longer than its statement."""
        return ""


class UnsafeError(asyncpg.InterfaceError):
    """A session without what SAFE says, such as one of a connection pooler; the text says which."""


REFUSALS: Final = (asyncpg.PostgresError, UnsafeError, ssl.SSLError)
"""Why a node that was reached is not used. A node that is away, or takes no writes, must not hide it."""


class HostPort(NamedTuple):
    """A host and port of the URL, None for the driver's own choice."""

    host: str | None = None
    port: int | None = None


def why_refused(url: str) -> str:
    """What is wrong with a URL that has a password, that sets what the process sets (SAFE), or that does not check the
    server's name over TCP: the rest of a sentence that begins with the URL's name. Empty for a good one."""
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        places = places_of(url)
    except ValueError:
        return "is no URL of PostgreSQL"
    if parts.scheme not in ("postgresql", "postgres"):
        return "must begin with postgresql://"
    if parts.password is not None or "password" in query or "sslpassword" in query:
        return "must not hold a password: use a client certificate or a password file (passfile=)"
    for name in query:
        if name.lower() in SAFE or name == "options":
            return f"must not hold {name}: the server sets what acknowledged writes rest on"
    local = all((place.host or "").startswith("/") for place in places)
    if not local and query.get("sslmode") != ["verify-full"]:
        return "must have sslmode=verify-full, or the directory of a Unix socket as host="
    return f"must not name more than {HOSTS_COUNT_MAX} hosts" if len(places) > HOSTS_COUNT_MAX else ""


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


class Database:
    """The nodes that a URL names, which `why_refused` has nothing against. `replicated`: more than one may believe that
    it takes the writes. `settings`: of each session."""

    def __init__(self, url: str, *, replicated: bool, settings: dict[str, str]) -> None:
        self.replicated = replicated
        self.node: str | None = None if replicated else ""
        """The one in use, None before the first."""
        self._url = url
        self._settings = settings
        self._places = places_of(url)
        self._place = self._places[0]

    async def find(self, **settings: str) -> NodeConnection:
        """A connection to the node that takes writes. Raises one of FAILURES."""
        tasks = {asyncio.create_task(self._open(place, settings)): place for place in self._places}
        pending: set[asyncio.Task[NodeConnection]] = set(tasks)
        connections: list[tuple[NodeConnection, HostPort]] = []
        failure: BaseException | None = None
        try:
            while pending:
                timeout = LATER_NODE_S if connections else None
                done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                for task in done:
                    if task.exception() is None:
                        connections.append((task.result(), tasks[task]))
                    elif not isinstance(failure, REFUSALS):
                        failure = task.exception()
            if not connections:
                raise failure if isinstance(failure, FAILURES) else ConnectionError("no host was reached") from failure
            connections.sort(key=lambda one: (int(one[0].node.partition(" ")[0] or "0", 16), one[0].node == self.node))
            connection, self._place = connections.pop()
            return connection
        finally:
            for other, _ in connections:
                other.terminate()
            for task in pending:
                task.add_done_callback(_terminate)
                task.cancel()
            del failure

    async def _open(self, place: HostPort, settings: dict[str, str]) -> NodeConnection:
        """Opens a connection to one node. Raises one of FAILURES, such as UnsafeError."""
        connection: NodeConnection = await asyncpg.connect(
            self._url,
            host=place.host,
            port=place.port,
            timeout=CONNECT_S_MAX,
            target_session_attrs=SessionAttribute.read_write,
            connection_class=NodeConnection,
            server_settings={**self._settings, **settings, **SAFE},
        )
        connection.node = connection.standbys = connection.warned = ""
        try:
            for (name, wanted), value in zip(
                SAFE.items(), await connection.fetchrow(_SAFE, timeout=CONNECT_S_MAX) or (), strict=True
            ):
                if value != wanted:
                    raise UnsafeError(  # noqa: TRY301  it has to end the connection
                        f"a session of the database has {name} = {value}, not {wanted}: connect without a pooler"
                    )
            if self.replicated:
                row = await connection.fetchrow(_NODE, timeout=CONNECT_S_MAX)
                connection.node, connection.standbys = row or ("", "")
        except BaseException:
            connection.terminate()
            raise
        return connection

    def waits_for_standbys(self, connection: NodeConnection) -> bool:
        """Whether a commit is on more than one disk where that is asked for."""
        return not self.replicated or connection.standbys != ""

    async def confirm(self, connection: NodeConnection) -> None:
        """After each commit. A wait for the standby that was cancelled has ended with success and a warning. When the
        setting is emptied, the commits that wait for a standby end with success alone; PostgreSQL signals its sessions
        first, so that the next statement of such a session sees the empty setting. Raises InterfaceError unless the
        commit is known to be on more than one disk: an error of the question says nothing about the commit, which must
        not be made again for it."""
        unconfirmed = "the database did not confirm the commit, which may be stored"
        try:
            if self.replicated and not connection.warned:
                connection.standbys = await connection.fetchval(_STANDBYS)
                if not connection.standbys:
                    connection.warned = NO_STANDBYS
        except FAILURES as error:
            raise asyncpg.InterfaceError(unconfirmed) from error
        if connection.warned:
            raise asyncpg.InterfaceError(unconfirmed)


async def bounded(connection: asyncpg.Connection[Any], work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """The result of the work. At the deadline its connection is terminated, which ends it; nobody cancels it."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # also where nobody waits for it any more
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if not done:
        connection.terminate()
        await asyncio.wait({task})
    try:
        return task.result()
    finally:
        del task  # the traceback of its error leads to this frame


def _terminate(task: asyncio.Task[NodeConnection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()


def warn(connection: Any, message: Any) -> None:
    """A listener of what the database reports: `confirm` needs it."""
    if getattr(message, "severity_en", None) == "WARNING":
        connection.warned = str(message)
