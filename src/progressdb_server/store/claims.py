"""Claims: of several servers on one database, one works on the keys of a thread at a time.

Owns: the entries `keyspace.claim` and `keyspace.server`. Invariants:
- A claim names a server and is void once that server has not renewed its own entry for CLAIM_S, by the clock of the
  database, or has removed it because it stops. Clocks of servers decide nothing.
- A server has an entry only while it claims something. Of a killed one, whoever takes a claim over removes it, or the
  next sweep.
- The entry of a claim names the thread's job until that has ended, whoever works on it, or nobody does while it is
  paused.
- Taking a claim over changes its entry. Each step of a job expects the entry that its server wrote, so that a server
  which has lost a claim changes nothing, however late it notices.
- A store of one process claims everything and writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import Final

from minikms.platform.logs import Log
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Commits, Engine
from progressdb_server.store.model import ConditionFailedError, StoreUnavailableError

CLAIM_S: Final = 30
UNTIL_DIGITS: Final = 19
"""The digits of the time in an entry of a server."""
RENEW_S: Final = 5.0
STOP_S: Final = 5.0

_log = Log()


class Claims:
    def __init__(self, engine: Engine, writer: Commits) -> None:
        self.contested = not engine.sole
        """Whether other servers claim threads too."""
        self._engine = engine
        self._reads = engine.reads
        self._writer = writer
        self._server = secrets.token_hex(8)
        self._held: dict[str, bytes] = {}
        self._claiming: set[str] = set()
        self._releasing: dict[str, asyncio.Future[None]] = {}
        """Thread → the end of its release: until then the store still has the claim."""
        self._unreleased: dict[str, tuple[bytes, bytes | None]] = {}
        """Thread → its entry when a release failed, and the entry that replaces it; None for no entry."""
        self._renewed = False

    async def job_of(self, thread: str) -> str:
        """The id of the thread's job, empty for none. Raises StoreUnavailableError."""
        raw = await self._reads.get(keyspace.claim(thread)) if self.contested else None
        return "" if raw is None else raw.split(b"-", 2)[2].decode()

    async def claim(self, thread: str, job_id: str, last: str) -> bool:
        """Whether this server has the thread now, for a job; `last` is the thread's job as the caller knows it. A
        thread without an entry is free: the caller reads the job's row again. Raises StoreUnavailableError."""
        if (releasing := self._releasing.get(thread)) is not None:
            await asyncio.wait([releasing])
        if not self.contested or await self.holds(thread):
            return True
        if thread in self._claiming:
            return False
        self._claiming.add(thread)
        try:
            return await self._claim(thread, job_id, last)
        finally:
            self._claiming.discard(thread)

    async def _claim(self, thread: str, job_id: str, last: str) -> bool:
        key = keyspace.claim(thread)
        entry = await self._reads.get(key)
        expect = [(key, entry)]
        owner, _, claimed_job = (entry or b"--").split(b"-", 2)
        if entry is not None and claimed_job.decode() != last:
            return False
        if owner and owner.decode() != self._server:  # its own is left of a release that failed
            server_key = keyspace.server(owner.decode())
            until = await self._reads.get(server_key)
            if until is not None and _holds(until, await self._engine.now_ns()):
                return False
            expect.append((server_key, until))
        await self.renew()
        mine = f"{self._server}-{secrets.token_hex(8)}-{job_id}".encode()
        ended = [(server_key, None) for server_key, until in expect[1:] if until is not None]
        try:
            await self._writer.commit(Write(((key, mine), *ended), expect))
        except ConditionFailedError:
            return False
        self._held[thread] = mine
        return True

    async def holds(self, thread: str) -> bool:
        """Whether the thread is still this server's. Raises StoreUnavailableError."""
        if not self.contested:
            return True
        mine = self._held.get(thread)
        if mine is None:
            return False
        if await self._reads.get(keyspace.claim(thread)) == mine:
            return True
        if self._held.get(thread) == mine:
            del self._held[thread]
        return False

    async def release(self, thread: str, job_id: str = "") -> None:
        """`job_id`: of the thread's job that has not ended."""
        mine = self._held.pop(thread, None)
        if mine is not None:
            ended = self._releasing[thread] = asyncio.get_running_loop().create_future()
            try:
                await self._leave(thread, mine, f"--{job_id}".encode() if job_id else None)
            finally:
                del self._releasing[thread]
                ended.set_result(None)

    async def _leave(self, thread: str, mine: bytes, left: bytes | None) -> None:
        key = keyspace.claim(thread)
        try:
            await self._writer.commit(Write(((key, left),), ((key, mine),)))
        except ConditionFailedError:
            pass
        except StoreUnavailableError:  # other work of this server may renew the claims for long
            self._unreleased[thread] = mine, left

    async def stop(self) -> None:
        """Nothing works for this server any more: all its claims are void at once."""
        self._held.clear()
        with contextlib.suppress(StoreUnavailableError, TimeoutError):  # else they end by themselves
            async with asyncio.timeout(STOP_S):
                await self._end_claims()

    async def _end_claims(self) -> None:
        if self._renewed:
            await self._writer.commit(Write(((keyspace.server(self._server), None),)))
            self._renewed = bool(self._held or self._claiming)  # since then

    async def sweep(self) -> None:
        """Remove the entries of servers whose claims have ended. Raises StoreUnavailableError."""
        if self.contested:
            entries = await self._reads.scan(keyspace.SERVERS, keyspace.after(keyspace.SERVERS), limit=SCAN_ENTRIES_MAX)
            now_ns = await self._engine.now_ns()
            for key, until in entries:
                if not _holds(until, now_ns):
                    with contextlib.suppress(ConditionFailedError):  # it was renewed
                        await self._writer.commit(Write(((key, None),), ((key, until),)))

    def condition(self, thread: str) -> tuple[tuple[bytes, bytes | None], ...]:
        """The condition of what is written for work on the thread."""
        mine = self._held.get(thread)
        return () if mine is None else ((keyspace.claim(thread), mine),)

    async def renew(self) -> None:
        if self.contested:
            until = await self._engine.now_ns() + CLAIM_S * 1_000_000_000
            if self._held or self._claiming:  # else it has stopped meanwhile
                self._renewed = True
                await self._writer.commit(Write(((keyspace.server(self._server), b"%d" % until),)))

    async def keep(self) -> None:
        """Renew the entry, again and again, while something is claimed; then remove it. Repeat releases that failed."""
        while self.contested:
            await asyncio.sleep(RENEW_S)
            for thread in list(self._unreleased):
                await self._leave(thread, *self._unreleased.pop(thread))
            try:
                if self._held:
                    await self.renew()
                elif not self._claiming:
                    await self._end_claims()
            except StoreUnavailableError as error:
                _log.warning("claims_not_renewed", reason=str(error))


def _holds(until: bytes, now_ns: int) -> bool:
    """Whether the claims of a server still hold. More than 2 * CLAIM_S is left only if the clock was set back since:
    they count as ended, as do those with a damaged entry. A server that still runs soon renews its entry."""
    return until.isdigit() and len(until) <= UNTIL_DIGITS and 0 < int(until) - now_ns <= 2 * CLAIM_S * 1_000_000_000
