"""The audit log for the event loop: one write per turn, and shared waits for the disk.

Owns: when queued events are written and synced. Invariants: the events of a turn are written with one call before any
answer of the turn is sent; if that fails, no answer of the turn is sent. For an answer that is sent in a later turn,
`add_written` writes the event before the answer exists. At most one `fdatasync` runs at a time, in a worker thread; a
caller of `sync` gets one that begins after its event was written. It must never drop an event silently.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import Executor

from minikms.audit.log import AuditLog
from minikms.audit.record import Event
from minikms.errors import AuditUnavailableError


class TurnAudit:
    """Implements `minikms.service.base.Audit` with an `AuditLog`, in the event loop's thread.

    add: queues an event of this turn.
    """

    def __init__(self, log: AuditLog, executor: Executor) -> None:
        self._log = log
        self._executor = executor
        self._dropped_before = log.events_dropped
        """As of the end of the last turn. Events dropped since then belong to answers of this turn."""
        self._syncing: asyncio.Task[None] | None = None
        self._next_sync: asyncio.Task[None] | None = None
        self.add = log.add

    def require_writable(self) -> None:
        """Raises AuditUnavailableError if the last write failed, or the disk did not confirm it."""
        if not self._log.writable:
            raise AuditUnavailableError("the audit log can't be written, so no key is changed")

    async def add_written(self, event: Event, *, durable: bool) -> None:
        """Writes the event now, together with the events that the turn has queued. Raises AuditUnavailableError."""
        self._log.add(event)
        self._log.commit()
        if durable:
            await self.sync()

    def write_queued(self) -> None:
        """Writes the queued events before the turn ends. If that fails, `commit_turn` returns False."""
        with contextlib.suppress(AuditUnavailableError):
            self._log.commit()

    def commit_turn(self) -> bool:
        """Writes the turn's queued events. False: no answer of the turn may be sent.

        Also False if an earlier commit of this turn dropped events and the log has recovered since.
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
        """Returns when everything written so far is on disk. Raises AuditUnavailableError."""
        if self._next_sync is None:
            self._next_sync = asyncio.ensure_future(self._sync_after(self._syncing))
        await asyncio.shield(self._next_sync)

    async def _sync_after(self, running: asyncio.Task[None] | None) -> None:
        """One `fdatasync` that begins after the running one has ended; later callers wait for the next one."""
        if running is not None:
            await asyncio.wait([running])
        self._syncing, self._next_sync = self._next_sync, None
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._log.fdatasync)
        finally:
            if self._syncing is asyncio.current_task():
                self._syncing = None

    async def sync_every(self, seconds: float) -> None:
        """Syncs what has been written, every `seconds`, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            if self._log.sync_needed:
                try:
                    await self.sync()
                except AuditUnavailableError:
                    continue  # the log refuses the next commit and reports the failure in its status
