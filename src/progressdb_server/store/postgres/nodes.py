"""The nodes of a PostgreSQL: which of them a server uses, and until when it may read there.

Owns: the lease on the node in use (docs/decisions/0252-reads-need-a-lease.md). `minikms.processes.postgresql` connects.
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
from typing import Final

from minikms.platform.clock import boot_ns
from minikms.platform.logs import Log
from minikms.processes.postgresql import FAILURES, Database, NodeConnection, UnsafeError, why_refused
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import FormatError

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

PLANS: Final = {
    "jit": "off",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_generic_plan",
}
"""Statements find few rows by their keys. A plan from when a table was small would read all of it later."""

_log = Log()


def check_url(url: str) -> None:
    """Checks that the server may use a URL. Raises FormatError."""
    if reason := why_refused(url):
        raise FormatError(f"store.url {reason}")


def now_s() -> float:
    """The time of a clock that goes on while the machine sleeps, and that nobody sets."""
    return boot_ns() / 1e9


class Nodes(Database):
    """The nodes that a URL names, and the lease on the one in use."""

    def __init__(self, url: str, *, replicated: bool) -> None:
        check_url(url)
        super().__init__(url, replicated=replicated, settings={"application_name": "progressdb", **PLANS})
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
        """Finds a node like `Database.find`, but raises EngineUnavailableError."""
        try:
            return await super().find(**settings)
        except UnsafeError as error:
            _log.error("store_session_unsafe", reason=str(error))
            raise EngineUnavailableError(str(error)) from error
        except FAILURES as error:
            raise EngineUnavailableError(UNAVAILABLE) from error

    async def again(self, **settings: str) -> NodeConnection:
        """Another connection to the node in use. Without replication that is any which takes writes. Raises
        EngineUnavailableError."""
        if not self.replicated:
            return await self.find(**settings)
        try:
            connection = await self._open(self._place, settings)
        except FAILURES as error:
            raise EngineUnavailableError(UNAVAILABLE) from error
        if connection.node != self.node:
            connection.terminate()
            raise EngineUnavailableError(UNAVAILABLE)
        return connection

    # --- the lease ------------------------------------------------------------------------------------------------
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
        if not self.replicated:
            return True
        end_s = now_s() + SETTLE_S_MAX
        while self.node == node and (left_s := self._since_s + WAIT_S - now_s()) > 0:
            if (left_s := min(left_s, end_s - now_s())) <= 0:
                return False
            await asyncio.sleep(left_s)
        return self.node == node and now_s() <= self._until_s

    def check(self, node: str) -> None:
        """Checks that what was read on the node just now may be answered. Raises EngineUnavailableError."""
        if self.node != node or (self.replicated and not self._since_s + WAIT_S <= now_s() <= self._until_s):
            raise EngineUnavailableError(UNAVAILABLE)

    @property
    def is_due(self) -> bool:
        """Whether the lease is to be renewed by an empty commit."""
        return self.replicated and now_s() > self._until_s - LEASE_S + BEAT_S
