"""The whole store of a running server: the parts of a store with a key service, and the work that it does by itself.

Owns: the composition, the format check at opening, the hourly sweep of retries, and the watch over the key service's
epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

import structlog

from minikms.client import KmsError, KmsRefusedError
from progressdb_server.kms.provider import EncryptsNothing, Fault, Provider, fault
from progressdb_server.store import directory, idempotency, keyspace
from progressdb_server.store.backup import Backups
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Engine
from progressdb_server.store.epoch import EpochMemory, RestoredError
from progressdb_server.store.messages import Messages
from progressdb_server.store.model import StoreError
from progressdb_server.store.rekeying import Rekeying
from progressdb_server.store.sealer import Sealer, store_error

SWEEP_S: Final = 3600
EPOCH_S: Final = 10
"""Between two looks at the key service's epoch and audit head."""

_log = structlog.get_logger("progressdb.store")


class Conversations(Messages, Rekeying, Backups):
    """See `store.model.Store`. Open it in the event loop that uses it."""

    def __init__(self, engine: Engine, provider: Provider, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        """Raises FormatError when the directory was written by a newer version, or encrypted where the provider does
        not encrypt, or the other way round; StoreUnavailableError."""
        directory.claim(engine, encrypted=not isinstance(provider, EncryptsNothing))
        super().__init__(engine, now_ns=now_ns)
        self.sealer = Sealer(engine, self.writer, provider, self.clock, self.metrics)
        self.epoch = EpochMemory(engine, self.writer)
        self._provider = provider
        self._background: list[asyncio.Task[None]] = []
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
        except KmsError as error:
            if not isinstance(error, KmsRefusedError) or fault(error) is Fault.SERVICE:
                raise store_error(error) from error
            _log.warning(
                "kms_status_refused", code=error.code
            )  # without the role `monitor` there is nothing to judge by
        loop = asyncio.get_running_loop()
        self._background = [loop.create_task(self._sweep()), loop.create_task(self._watch_epoch())]

    async def close(self) -> None:
        """Commits what is queued, then closes the engine. The provider is the caller's."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await super().close()

    def reopened(self) -> None:
        self.sealer.forget()

    async def _sweep(self) -> None:
        while True:
            with contextlib.suppress(StoreError):
                await idempotency.sweep(self.engine, self.writer, self.clock.now_ns())
            await asyncio.sleep(SWEEP_S)

    async def _watch_epoch(self) -> None:
        """An older key service that replaces the right one while the server runs must not encrypt anything."""
        while True:
            await asyncio.sleep(EPOCH_S)
            try:
                await self.epoch.observe(await self._provider.status())
                self.sealer.halted = None
            except RestoredError as error:
                _log.error("kms_restored", reason=str(error))
                self.sealer.halted = "the key service is in an older state than this store"
            except (KmsError, StoreError) as error:
                _log.warning("kms_epoch_unknown", reason=type(error).__name__)

    # --- for operators --------------------------------------------------------------------------------------------
    async def stats(self) -> dict[str, int]:
        return {"threads": self.writer.state.threads, "messages": self.writer.state.messages}

    async def stored_keys(self, prefix: str) -> AsyncIterator[list[str]]:
        lower = prefix.encode()
        upper = keyspace.after(lower) if lower else keyspace.END
        while entries := self.engine.scan(lower, upper, limit=SCAN_ENTRIES_MAX):
            lower = keyspace.next_key(entries[-1][0])
            yield [key.decode() for key, _ in entries]

    async def raw_value(self, key: str) -> bytes | None:
        return self.engine.get(key.encode())
