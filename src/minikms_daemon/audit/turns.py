"""The audit log for the event loop: one write per turn, and shared waits for the disk.

Owns: when queued events are written and synced. Invariants: the events of a turn are written with one call before any
answer of the turn is sent; if that fails, no answer of the turn is sent. For an answer that is sent in a later turn,
`add_written` writes the event before the answer exists; the durable ones of a step of the event loop are written with
one call, at its end. While the audit key changes, the log is held: lines and answers wait, for HELD_SECONDS_MAX at
most, and the event loop goes on. At most one `fdatasync` runs at a time, in a worker thread; a caller of `sync` gets
one that begins after its event was written. It must never drop an event silently.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial
from typing import Final

from minikms.api.errors import AuditUnavailableError, SealedError, StorageUncertainError, copy_of
from minikms.audit.chain import AuditKey
from minikms.audit.log import AuditLog
from minikms.audit.record import Event, LineRef
from minikms.platform.workers import in_worker

HELD_SECONDS_MAX: Final = 5.0
"""Seconds for which the answers of a turn wait for a change of the audit key; then they are refused."""


class TurnAudit:
    """Implements `minikms_daemon.service.base.Audit` with an `AuditLog`, in the event loop's thread.

    add: queues an event of this turn.
    """

    def __init__(self, log: AuditLog, executor: Executor) -> None:
        self._log = log
        self._executor = executor
        self._dropped_before = log.events_dropped
        """The count of dropped events at the end of the last turn. Later ones belong to answers of this turn."""
        self._syncing: asyncio.Task[None] | None = None
        self._next_sync: asyncio.Task[None] | None = None
        self.add = log.add
        self._durable: list[tuple[Event, asyncio.Future[None]]] = []
        """The events of this step whose callers wait for the disk."""
        self._sealed = False
        self._changing: asyncio.Future[None] | None = None
        """Resolved when the change of the audit key that runs has ended."""
        self._waits_until = 0.0

    def seal(self) -> None:
        """The audit keys are zeroed: no further event is written, and the callers of durable ones that wait for the end
        of their step get a SealedError. Written lines are still synced.
        """
        self._sealed = True

    def require_writable(self) -> None:
        """Checks that the last write succeeded and the disk confirmed it. Raises AuditUnavailableError."""
        self._require_keys()
        if not self._log.writable:
            raise AuditUnavailableError("the audit log can't be written, so no key is changed")

    async def add_written(self, event: Event, *, durable: bool) -> None:
        """Writes the event now, together with the events that the turn has queued; during a change of the audit key,
        after it. With `durable` it is written at the end of this step, even if the caller is cancelled, and synced.
        Raises AuditUnavailableError, SealedError.
        """
        while self._changing is not None:
            await asyncio.shield(self._changing)
        self._require_keys()
        if not durable:
            self._log.add(event)
            self._log.commit()
            return
        loop = asyncio.get_running_loop()
        synced: asyncio.Future[None] = loop.create_future()
        if not self._durable:
            loop.call_soon(self._write_durable)  # after all callers of this step
        self._durable.append((event, synced))
        try:
            await synced
        finally:
            del synced  # the traceback of its error leads to this frame

    def _write_durable(self) -> None:
        """Writes the events whose callers wait for the disk, with one call."""
        if not self._durable:  # `change_key` wrote them
            return
        events, waiting = [event for event, _ in self._durable], [synced for _, synced in self._durable]
        self._durable = []
        try:
            self._require_keys()
            for event in events:
                self._log.add(event)
            self._log.commit()
        except (AuditUnavailableError, SealedError) as error:
            _fail(waiting, error)
            del waiting  # the traceback of the errors' cause leads to this frame
        except BaseException:  # a defect: no caller may wait for ever
            for synced in waiting:
                synced.cancel()
            raise
        else:
            self._sync_begun().add_done_callback(partial(_synced, waiting))

    def _require_keys(self) -> None:
        if self._sealed:
            raise SealedError("the key service was sealed during the request")

    def write_queued(self) -> None:
        """Writes the queued events before the turn ends. If that fails, `commit_turn` returns False. During a change of
        the audit key they stay queued.
        """
        if self._changing is not None:
            return
        with contextlib.suppress(AuditUnavailableError):
            self._log.commit()

    def commit_turn(self) -> bool | None:
        """Writes the turn's queued events. False: no answer of the turn may be sent. None: not yet, since the audit key
        changes; call it again soon.

        Also False if an earlier commit of this turn dropped events and the log has recovered since.
        """
        if self._changing is not None and asyncio.get_running_loop().time() < self._waits_until:
            return None
        before = self._dropped_before
        try:
            self._log.commit(durable=self._log.sync.each_turn)
        except AuditUnavailableError:
            return False
        finally:
            self._dropped_before = self._log.events_dropped
        return self._dropped_before == before

    @property
    def key_version(self) -> int:
        """The version of the audit key that the lines are under."""
        return self._log.writer.key.version

    async def change_key(self, store: Callable[[LineRef], Awaitable[AuditKey]]) -> None:
        """Changes the audit key. No line comes between its steps; other tasks run. Do not cancel it.

        `store` gets the last line, makes the keyring that names it durable, and returns the key of all further lines.
        If it raises StorageUncertainError, lines are refused until `release`, which the caller owes once it is known
        which keyring is on disk. Raises the errors of `store`, SealedError, and AuditUnavailableError: before `store`,
        or after it; then the next line that can be written is the one that announces the key.
        """
        self._require_keys()
        self._write_durable()  # no event from before the change waits for the end of the change
        head = self._log.hold()
        loop = asyncio.get_running_loop()
        self._changing, self._waits_until = loop.create_future(), loop.time() + HELD_SECONDS_MAX
        try:
            await self.sync()
            key = await store(head)
            self._require_keys()
            self._log.change_key(key)
        except StorageUncertainError:
            self._log.fail_held("the keyring could not be written")
            raise
        except BaseException:
            self._log.release()
            raise
        finally:
            self._changing.set_result(None)
            self._changing = None
        await self.sync()

    def release(self) -> None:
        """Accepts lines again: the keyring on disk is the one before the change."""
        self._log.release()

    async def sync(self) -> None:
        """Returns when everything written so far is on disk. Raises AuditUnavailableError."""
        await asyncio.shield(self._sync_begun())

    def _sync_begun(self) -> asyncio.Task[None]:
        """The sync of everything written so far."""
        if self._next_sync is None:
            self._next_sync = asyncio.ensure_future(self._sync_after(self._syncing))
        return self._next_sync

    async def _sync_after(self, running: asyncio.Task[None] | None) -> None:
        """One `fdatasync` that begins after the running one has ended; later callers wait for the next one."""
        if running is not None:
            await asyncio.wait([running])
        self._syncing, self._next_sync = self._next_sync, None
        try:
            await in_worker(self._executor, self._log.sync.fdatasync)
        finally:
            if self._syncing is asyncio.current_task():
                self._syncing = None

    async def sync_every(self, seconds: float) -> None:
        """Syncs what has been written, every `seconds`, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            if self._log.sync.needed:
                try:
                    await self.sync()
                except AuditUnavailableError:
                    continue  # the log refuses the next commit and reports the failure in its status


def _synced(waiting: list[asyncio.Future[None]], syncing: asyncio.Future[None]) -> None:
    """Answers the callers of durable lines."""
    error = asyncio.CancelledError() if syncing.cancelled() else syncing.exception()
    if error is None:
        for synced in waiting:
            if not synced.done():
                synced.set_result(None)
    elif isinstance(error, AuditUnavailableError):
        _fail(waiting, error)
    else:  # a defect, or the loop is closing: nobody may believe that the line is durable
        for synced in waiting:
            synced.cancel()
        if not syncing.cancelled():
            raise error


def _fail(waiting: list[asyncio.Future[None]], error: AuditUnavailableError | SealedError) -> None:
    """An error object of its own for each caller."""
    for synced in waiting:
        if not synced.done():
            synced.set_exception(copy_of(error))
