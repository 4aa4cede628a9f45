"""The store as the routes see it: `ConversationStore` over an engine and a provider.

Owns: the composition (clock, writer, sealer, threads, messages), the format check at opening, and the hourly sweep.
It decides nothing that the rooms below it own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Final

import structlog

from progressdb_server.kms.provider import Provider, ProviderError, ProviderRefusedError, ProviderUnavailableError
from progressdb_server.store import backup, form, idempotency, keyspace
from progressdb_server.store.clock import Clock
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Engine
from progressdb_server.store.epoch import EpochMemory, RestoredError
from progressdb_server.store.messages import MessageReader, Messages, deletion_event
from progressdb_server.store.metrics import StoreMetrics
from progressdb_server.store.model import (
    Idempotency,
    Message,
    NewMessage,
    StoreError,
    StoreUnavailableError,
    Thread,
)
from progressdb_server.store.sealer import Sealer
from progressdb_server.store.threads import Threads
from progressdb_server.store.writer import NamedLocks, Write, Writer

SWEEP_S: Final = 3600
EPOCH_S: Final = 10
"""Between two looks at the key service's epoch and audit head."""

_log = structlog.get_logger("progressdb.store")


class Conversations:
    """See `store.model.ConversationStore`. Open it in the event loop that uses it."""

    def __init__(self, engine: Engine, provider: Provider, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        """Raises FormatError when the directory was written by a newer version, or encrypted where the provider does
        not encrypt, or the other way round; StoreUnavailableError."""
        form.claim(engine, encrypted=provider.encrypts)
        self.engine = engine
        self.metrics = StoreMetrics()
        self._clock = Clock(now_ns)
        self.writer = Writer(engine, self._clock, self.metrics, self._reopened)
        self.sealer = Sealer(engine, self.writer, provider, self._clock, self.metrics)
        self._locks = NamedLocks()
        self._threads = Threads(engine, self.writer, self.sealer, self._clock, self._locks)
        self._reader = MessageReader(engine, self.sealer)
        self._messages = Messages(
            engine, self.writer, self.sealer, self._clock, locks=self._locks, threads=self._threads, reader=self._reader
        )
        self._provider = provider
        self.epoch = EpochMemory(engine, self.writer)
        self._background: list[asyncio.Task[None]] = []
        self._backing_up = False
        self.metrics.gauges["progressdb_store_queued_writes"] = (
            "Writes that wait for the next group.",
            lambda: self.writer.queued,
        )
        self.metrics.gauges["progressdb_store_available"] = (
            "1 when the store takes writes.",
            lambda: self.writer.available,
        )

    async def start(self, *, accept_restore: bool = False) -> None:
        """Ask the key service for its epoch, and begin the background work.

        Raises RestoredError when the key service's state is older than what this store has seen, unless
        `accept_restore`; StoreUnavailableError when it does not answer.
        """
        try:
            await self.epoch.observe(await self._provider.status(), accept_restore=accept_restore)
        except ProviderUnavailableError as error:
            raise StoreUnavailableError("the key service is not available now", error.retry_after_s) from error
        except ProviderRefusedError as error:
            _log.warning("kms_status_refused", code=error.code)  # a role without `monitor`: nothing to judge by
        loop = asyncio.get_running_loop()
        self._background = [loop.create_task(self._sweep()), loop.create_task(self._watch_epoch())]

    async def close(self) -> None:
        """Commits what is queued, then closes the engine. The provider is the caller's."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.writer.close()
        self.engine.close()

    def _reopened(self) -> None:
        self.sealer.forget()

    async def _sweep(self) -> None:
        while True:
            with contextlib.suppress(StoreError):
                await idempotency.sweep(self.engine, self.writer, self._clock.now_ns())
            await asyncio.sleep(SWEEP_S)

    async def _watch_epoch(self) -> None:
        """An older key service that takes the place of the right one while we run gets nothing to seal."""
        while True:
            await asyncio.sleep(EPOCH_S)
            try:
                await self.epoch.observe(await self._provider.status())
                self.sealer.halted = None
            except RestoredError as error:
                _log.error("kms_restored", reason=str(error))
                self.sealer.halted = "the key service is in an older state than this store"
            except (ProviderError, StoreError) as error:
                _log.warning("kms_epoch_unknown", reason=type(error).__name__)

    # --- messages -------------------------------------------------------------------------------------------------
    def create_message(
        self, new: NewMessage, *, idempotency: Idempotency | None = None, request_id: str = ""
    ) -> Coroutine[Any, Any, Message]:
        return self._messages.create(new, idempotency=idempotency, request_id=request_id)

    async def get_message(self, message_id: str, *, thread_id: str | None = None) -> Message:
        return await self._reader.get(message_id, thread_id)

    async def update_message(
        self,
        message_id: str,
        *,
        author: str | None,
        body: Any,
        role: str | None,
        reply_to: str | None,
        thread_id: str | None = None,
        request_id: str = "",
    ) -> Message:
        return await self._messages.update(
            message_id,
            author=author,
            body=body,
            role=role,
            reply_to=reply_to,
            thread=thread_id,
            request_id=request_id,
        )

    async def delete_message(
        self, message_id: str, *, author: str | None, thread_id: str | None = None, request_id: str = ""
    ) -> None:
        await self._messages.delete(message_id, author=author, thread=thread_id, request_id=request_id)

    async def message_versions(self, message_id: str, *, thread_id: str | None = None) -> list[Message]:
        return await self._reader.versions(message_id, thread_id)

    async def set_reaction(self, message_id: str, identity: str, reaction: str, *, request_id: str = "") -> Message:
        return await self._messages.react(message_id, identity, reaction, request_id=request_id)

    async def remove_reaction(self, message_id: str, identity: str, *, request_id: str = "") -> None:
        await self._messages.unreact(message_id, identity, request_id=request_id)

    def list_messages(
        self,
        thread_id: str,
        *,
        limit: int | None = None,
        before: str | None = None,
        after: str | None = None,
        include_deleted: bool = False,
    ) -> AsyncIterator[list[Message]]:
        return self._reader.stream(thread_id, limit=limit, before=before, after=after, include_deleted=include_deleted)

    # --- threads --------------------------------------------------------------------------------------------------
    async def may_read_thread(self, thread_id: str, author: str) -> bool:
        return self._threads.written_by(thread_id, author)

    async def create_thread(
        self, *, author: str, title: str, idempotency: Idempotency | None = None, request_id: str = ""
    ) -> Thread:
        return await self._threads.create(author=author, title=title, idempotency=idempotency, request_id=request_id)

    async def get_thread(self, thread_id: str) -> Thread:
        return await self._threads.get(thread_id)

    async def update_thread(self, thread_id: str, *, author: str | None, title: str, request_id: str = "") -> Thread:
        return await self._threads.update(thread_id, author=author, title=title, request_id=request_id)

    async def delete_thread(self, thread_id: str, *, author: str | None, by: str, request_id: str = "") -> None:
        await self._threads.delete(
            thread_id,
            author=author,
            event=lambda stamp: deletion_event(thread_id, by, stamp),
            request_id=request_id,
        )

    def list_threads(
        self, *, author: str | None, title: str | None = None, slug: str | None = None, include_deleted: bool = False
    ) -> AsyncIterator[list[Thread]]:
        return self._threads.list(author=author, title=title, slug=slug, include_deleted=include_deleted)

    # --- the whole ------------------------------------------------------------------------------------------------
    async def stats(self) -> dict[str, int]:
        return {"threads": self.writer.state.threads, "messages": self.writer.state.messages}

    async def back_up(self, path: str, *, previous: str | None = None) -> backup.Manifest:
        """Make a verified backup in the new directory `path`, beside running writes; it shares files with `previous`.

        The key service is backed up after this. Raises BackupError, StoreUnavailableError.
        """
        if self._backing_up:
            raise backup.BackupBusyError("another backup is being made: wait for its end")
        if os.path.lexists(path):  # noqa: ASYNC240  one lookup, as short as the engine's own reads
            raise backup.BackupExistsError("a backup of this name exists")
        self._backing_up = True
        try:
            created_ns = self._clock.now_ns()
            known = backup.Registered(os.path.abspath(path), created_ns)  # noqa: ASYNC240  no lookup
            await self.writer.commit(Write((backup.registered(path, created_ns),)))
            try:
                return await asyncio.to_thread(
                    backup.create, self.engine, path, created_ns=created_ns, previous=previous
                )
            except (backup.BackupError, StoreUnavailableError):
                if known.gone:
                    await self._forget([known])
                raise
        finally:
            self._backing_up = False

    async def backups(self) -> AsyncIterator[list[backup.Registered]]:
        """Those that were begun and not yet forgotten, oldest first."""
        for page in backup.registered_in(self.engine):
            yield page

    async def forget_backup(self, name: str) -> int:
        """Strike the backup from the register: keys that it alone needed may be destroyed. How many entries it had.

        Raises BackupNotFoundError, BackupThereError, StoreUnavailableError.
        """
        found = backup.to_forget(self.engine, name)
        await self._forget(found)
        _log.warning("backup_forgotten", paths=[known.path for known in found])
        return len(found)

    async def _forget(self, found: Sequence[backup.Registered]) -> None:
        await self.writer.commit(Write([(backup.register_key(known.created_ns), None) for known in found]))

    async def stored_keys(self, prefix: str) -> AsyncIterator[list[str]]:
        lower = prefix.encode()
        upper = keyspace.after(lower) if lower else b"\xff"
        while entries := self.engine.scan(lower, upper, limit=SCAN_ENTRIES_MAX):
            lower = entries[-1][0] + b"\0"
            yield [key.decode() for key, _ in entries]

    async def raw_value(self, key: str) -> bytes | None:
        return self.engine.get(key.encode())
