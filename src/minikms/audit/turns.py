"""The audit log as the event loop uses it.

Owns: when lines are written and when they are synced. Invariants: the events of a turn are written with one write
before any answer of the turn leaves; if they can't be, no answer of that turn leaves; an answer that leaves in a
later turn has its line written by `add_written` before the answer exists. At most one `fdatasync` runs at a time, in
a worker thread; whoever waits for durability is served by one that began after its line was written. It must never
drop an event silently.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import Executor

from minikms.audit import AuditLog, Event
from minikms.errors import AuditUnavailableError


class TurnAudit:
    """`service.Audit` over an `AuditLog`. Lives in the loop's thread."""

    def __init__(self, log: AuditLog, executor: Executor) -> None:
        self._log = log
        self._executor = executor
        self._dropped_before = log.events_dropped
        """By the end of the last turn: what was lost since was lost to answers of this one."""
        self._syncing: asyncio.Task[None] | None = None
        self._next_sync: asyncio.Task[None] | None = None
        self.add = log.add

    def require_writable(self) -> None:
        """Raises AuditUnavailableError when the last line could not be written, or is not confirmed by the disk."""
        if not self._log.writable:
            raise AuditUnavailableError("the audit log can't be written, so no key is changed")

    async def add_written(self, event: Event, *, durable: bool) -> None:
        """Writes the event now, with whatever the turn has queued so far. Raises AuditUnavailableError."""
        self._log.add(event)
        self._log.commit()
        if durable:
            await self.sync()

    def write_queued(self) -> None:
        """Writes what is queued before the turn ends. If that fails, the turn's end tells."""
        with contextlib.suppress(AuditUnavailableError):
            self._log.commit()

    def commit_turn(self) -> bool:
        """Writes what the turn has queued. False: none of the turn's answers may leave.

        Also where their lines were lost by another commit of this turn, and the log has recovered since.
        """
        before = self._dropped_before
        try:
            self._log.commit(durable=self._log.sync_each_turn)
        except AuditUnavailableError:
            return False
        finally:
            self._dropped_before = self._log.events_dropped
        return self._dropped_before == before

    async def sync(self) -> None:
        """Returns once everything written so far is on disk. Raises AuditUnavailableError."""
        if self._next_sync is None:
            self._next_sync = asyncio.ensure_future(self._sync_after(self._syncing))
        await asyncio.shield(self._next_sync)

    async def _sync_after(self, running: asyncio.Task[None] | None) -> None:
        """One fdatasync that begins after the running one has ended; later callers wait for the next."""
        if running is not None:
            await asyncio.wait([running])
        self._syncing, self._next_sync = self._next_sync, None
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._log.fdatasync)
        finally:
            if self._syncing is asyncio.current_task():
                self._syncing = None

    async def sync_every(self, seconds: float) -> None:
        """Runs until cancelled: syncs what has been written, when anything has."""
        while True:
            await asyncio.sleep(seconds)
            if self._log.sync_needed:
                try:
                    await self.sync()
                except AuditUnavailableError:
                    continue  # the log refuses the next commit and says so in status
