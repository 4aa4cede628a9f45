"""Claims: of several servers on one database, one works on the keys of a thread at a time.

Owns: the entries `keyspace.claim` and `keyspace.server`. Invariants:
- A claim names a server and is void once that server has not renewed its own entry for LEASE_S, by the clock of the
  database. Clocks of servers decide nothing.
- The entry names the thread's job until that has ended, whoever works on it, or nobody does while it is paused.
- Taking a claim over changes its entry. Each step of a job expects the entry that its server wrote, so that a server
  which has lost a claim changes nothing, however late it notices.
- A store of one process claims everything and writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import Final

from minikms.logs import structlog
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Write
from progressdb_server.store.model import ConditionFailedError, StoreUnavailableError
from progressdb_server.store.writer import Commits, SharedEngine

LEASE_S: Final = 30
RENEW_S: Final = 5.0

_log = structlog.get_logger("progressdb.store")


class Claims:
    def __init__(self, engine: SharedEngine | None, writer: Commits) -> None:
        self._engine = engine
        self._writer = writer
        self._server = secrets.token_hex(8)
        self._held: dict[str, bytes] = {}

    async def job_of(self, thread: str) -> str:
        """The id of the thread's job, empty for none. Raises StoreUnavailableError."""
        raw = None if self._engine is None else await self._engine.reads.get(keyspace.claim(thread))
        return "" if raw is None else raw.split(b"-", 2)[2].decode()

    async def claim(self, thread: str, job_id: str, last: str) -> bool:
        """Whether this server has the thread now, for a job; `last` is `job_of` the thread. Raises
        StoreUnavailableError."""
        if self._engine is None or await self.holds(thread):
            return True
        key, reads = keyspace.claim(thread), self._engine.reads
        entry = await reads.get(key)
        expect = [(key, entry)]
        owner, _, found = (entry or b"--").split(b"-", 2)
        if found.decode() != last:
            return False
        if owner:
            lease_key = keyspace.server(owner.decode())
            lease = await reads.get(lease_key)
            if lease is not None and int(lease) > await self._engine.now_ns():
                return False
            expect.append((lease_key, lease))
        await self.renew()
        mine = f"{self._server}-{secrets.token_hex(8)}-{job_id}".encode()
        try:
            await self._writer.commit(Write(((key, mine),), expect))
        except ConditionFailedError:
            return False
        self._held[thread] = mine
        return True

    async def holds(self, thread: str) -> bool:
        """Whether the thread is still this server's. Raises StoreUnavailableError."""
        if self._engine is None:
            return True
        mine = self._held.get(thread)
        if mine is None:
            return False
        if await self._engine.reads.get(keyspace.claim(thread)) == mine:
            return True
        self._held.pop(thread, None)
        return False

    async def release(self, thread: str, job_id: str = "") -> None:
        """`job_id`: of the thread's job that has not ended."""
        mine = self._held.pop(thread, None)
        if mine is not None:
            key = keyspace.claim(thread)
            left = f"--{job_id}".encode() if job_id else None
            with contextlib.suppress(ConditionFailedError, StoreUnavailableError):  # else it ends with the lease
                await self._writer.commit(Write(((key, left),), ((key, mine),)))

    def condition(self, thread: str) -> tuple[tuple[bytes, bytes | None], ...]:
        """Of what is written for work on the thread."""
        mine = self._held.get(thread)
        return () if mine is None else ((keyspace.claim(thread), mine),)

    async def renew(self) -> None:
        """Raises StoreUnavailableError."""
        if self._engine is not None:
            until = await self._engine.now_ns() + LEASE_S * 1_000_000_000
            await self._writer.commit(Write(((keyspace.server(self._server), b"%d" % until),)))

    async def keep(self) -> None:
        """Renew the lease, again and again, while something is claimed."""
        while self._engine is not None:
            await asyncio.sleep(RENEW_S)
            if self._held:
                try:
                    await self.renew()
                except StoreUnavailableError as error:
                    _log.warning("claims_not_renewed", reason=str(error))
