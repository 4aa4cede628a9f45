"""Sealing and opening: the only place where records meet the key service.

Owns: which key a thread has (the stored map `kms:map:thread:<id>` and a bounded cache of it), the writing of sealed
records under that key, and the opening of stored ones. Invariants:
- Nothing is put on the disk but what the provider answered, and only if it has the length of a sealed record; when it
  does not answer, the write fails.
- A record is written only while the key that sealed it is still its thread's and the thread is not deleted: both are
  conditions of the write. A key that was switched meanwhile means sealing again under the new one.
- The map is written once per thread, in the batch of the thread's metadata; the loser of a race retires its key.
- Opening goes by the record's own key id, in one batch, whatever the number of keys.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from minikms import api
from progressdb_server.kms.provider import (
    Open,
    Provider,
    ProviderError,
    ProviderRefusedError,
    ProviderUnavailableError,
    Seal,
)
from progressdb_server.store import keyspace
from progressdb_server.store.clock import Clock, Stamp
from progressdb_server.store.engine import Engine
from progressdb_server.store.metrics import StoreMetrics
from progressdb_server.store.model import RecordUnreadableError, StoreUnavailableError, ThreadDeletedError
from progressdb_server.store.writer import ConditionFailedError, Write, Writer

THREADS_CACHED_MAX: Final = 16_384
WRITERS_CACHED_MAX: Final = 256
"""Authors known to have written, per cached thread."""
KEY_SWITCH_S_MAX: Final = 2.0
"""How long a write waits for a thread whose old key is retired but whose map does not name the new one yet."""
KEY_SWITCH_POLL_S: Final = 0.02
SEAL_BYTES: Final = 28
"""Nonce (12) and tag (16): by how much a sealed record is longer. An answer of another length, such as the plaintext
itself, is never stored."""

_REFUSED_FOR_NOW: Final = frozenset(
    {
        api.CODE_KEY_UNREADABLE,
        api.CODE_AUDIT_UNAVAILABLE,
        api.CODE_STORAGE_UNAVAILABLE,
        api.CODE_SHUTTING_DOWN,
        api.CODE_INTERRUPTED,
        api.CODE_TIMEOUT,
    }
)
"""Answers that say nothing about the record: the same call may succeed later."""


class ThreadState:
    """What a write needs to know of its thread. `deleted` is a hint that saves work; the write's condition
    decides."""

    __slots__ = ("closed_key", "deleted", "key_id", "key_raw", "map_key", "stands", "thread", "writers")

    def __init__(self, thread: str, key_raw: bytes, deleted: bool) -> None:
        self.thread = thread
        self.key_raw = key_raw
        self.key_id = key_raw.decode()
        self.deleted = deleted
        self.map_key = keyspace.key_map(thread)
        self.closed_key = keyspace.closed(thread)
        self.stands = ((self.map_key, key_raw), (self.closed_key, None))
        """What every write of the thread expects."""
        self.writers: set[str] = set()

    def remember_writer(self, author: str) -> None:
        if len(self.writers) >= WRITERS_CACHED_MAX:
            self.writers.clear()
        self.writers.add(author)


class Draft(NamedTuple):
    """A write of one thread before it is sealed. `secrets`: storage key and plaintext of each record; `finish` turns
    key id and sealed parts into the puts."""

    secrets: Sequence[tuple[bytes, bytes]]
    finish: Callable[[str, Sequence[bytes]], Write]


class Sealer:
    def __init__(self, engine: Engine, writer: Writer, provider: Provider, clock: Clock, metrics: StoreMetrics) -> None:
        self._engine = engine
        self._writer = writer
        self._provider = provider
        self._clock = clock
        self._metrics = metrics
        self._threads: dict[str, ThreadState] = {}
        self.halted: str | None = None
        """When set, nothing is sealed: the key service must not be written under (see store/epoch.py)."""

    # --- threads and their keys -----------------------------------------------------------------------------------
    def thread(self, thread: str) -> ThreadState | None:
        """None for an unknown thread."""
        state = self._threads.get(thread)
        if state is not None:
            self._metrics.cache_hits += 1
            return state
        self._metrics.cache_misses += 1
        key_raw = self._engine.get(keyspace.key_map(thread))
        if key_raw is None:
            return None
        state = ThreadState(thread, key_raw, self._engine.get(keyspace.closed(thread)) is not None)
        if len(self._threads) >= THREADS_CACHED_MAX:
            del self._threads[next(iter(self._threads))]
        self._threads[thread] = state
        return state

    def forget(self, thread: str | None = None) -> None:
        """Read the thread's map (None: every thread's) anew at the next use."""
        if thread is None:
            self._threads.clear()
        else:
            self._threads.pop(thread, None)

    async def new_key(self, thread: str, request_id: str) -> str:
        if self.halted is not None:
            raise StoreUnavailableError(self.halted)
        try:
            return (await self._provider.create_dek_for_thread(thread, request_id=request_id)).key_id
        except ProviderError as error:
            raise unavailable(error) from error

    async def retire(self, key_id: str, request_id: str) -> None:
        """Of a key that nothing was stored under. A failure leaves an orphan that the key service lists."""
        with contextlib.suppress(ProviderError):
            await self._provider.retire(key_id, request_id=request_id)

    # --- writing --------------------------------------------------------------------------------------------------
    async def append(self, state: ThreadState, draft: Callable[[Stamp], Draft], request_id: str) -> None:
        """Seal and commit under the thread's current key, at a new stamp. Raises ThreadDeletedError;
        ConditionFailedError for a condition of the draft's own."""
        deadline: float | None = None
        while True:
            if state.deleted:
                raise ThreadDeletedError("thread deleted")
            try:
                slot = self._writer.reserve(state.map_key)
                try:
                    made = draft(self._clock.next())
                    sealed = await self.seal(state.thread, state.key_id, made.secrets, request_id)
                    done = self._writer.submit(slot, made.finish(state.key_id, sealed), state.stands)
                finally:
                    self._writer.leave(slot)
                await done
                return
            except ConditionFailedError as error:
                if error.key not in (state.map_key, state.closed_key):
                    raise
            except ProviderRefusedError as error:
                if error.code != api.CODE_KEY_RETIRED:
                    raise unavailable(error) from error
            except ProviderError as error:
                raise unavailable(error) from error
            # The key was switched, or is just being switched: go by the stored map.
            self.forget(state.thread)
            renewed = self.thread(state.thread)
            if renewed is None:
                raise StoreUnavailableError("the thread is being changed")
            if renewed.key_raw == state.key_raw and not renewed.deleted:
                now = asyncio.get_running_loop().time()
                deadline = deadline or now + KEY_SWITCH_S_MAX
                if now > deadline:
                    raise StoreUnavailableError("the thread's key is retired and no other is in its place yet")
                self._metrics.key_waits += 1
                await asyncio.sleep(KEY_SWITCH_POLL_S)
            state = renewed

    async def seal(
        self, thread: str, key_id: str, secrets: Sequence[tuple[bytes, bytes]], request_id: str
    ) -> list[bytes]:
        """Raises ProviderError."""
        if self.halted is not None:
            raise StoreUnavailableError(self.halted)
        if len(secrets) == 1:
            ((key, plaintext),) = secrets
            alone = await self._provider.encrypt_with_key(
                key_id, plaintext, aad=key, thread_id=thread, request_id=request_id
            )
            if len(alone) != len(plaintext) + SEAL_BYTES:
                raise StoreUnavailableError("the key service answered wrongly")
            return [alone]
        answers = await self._provider.encrypt_many(
            [Seal(key_id, plaintext, key, thread, request_id) for key, plaintext in secrets]
        )
        if len(answers) != len(secrets):
            raise StoreUnavailableError("the key service answered wrongly")
        sealed: list[bytes] = []
        for (_, plaintext), answer in zip(secrets, answers, strict=True):
            if isinstance(answer, ProviderRefusedError):
                raise answer
            if len(answer) != len(plaintext) + SEAL_BYTES:
                raise StoreUnavailableError("the key service answered wrongly")
            sealed.append(answer)
        return sealed

    # --- reading --------------------------------------------------------------------------------------------------
    async def open(self, records: Sequence[Open]) -> list[bytes]:
        """The plaintexts, in order. Raises StoreUnavailableError, RecordUnreadableError."""
        if not records:
            return []
        self._metrics.opened(len(records))
        try:
            answers = await self._provider.decrypt_many(records)
        except ProviderError as error:
            raise unavailable(error) from error
        if len(answers) != len(records):
            raise StoreUnavailableError("the key service answered wrongly")
        opened: list[bytes] = []
        for item, answer in zip(records, answers, strict=True):
            if isinstance(answer, ProviderRefusedError):
                if answer.code in _REFUSED_FOR_NOW:
                    raise unavailable(answer) from answer
                raise RecordUnreadableError(f"the record {item.aad.decode()} does not open ({answer.code})")
            opened.append(answer)
        return opened


def unavailable(error: ProviderError) -> StoreUnavailableError:
    if isinstance(error, ProviderUnavailableError):
        return StoreUnavailableError("the key service is not available now", error.retry_after_s)
    code = error.code if isinstance(error, ProviderRefusedError) else api.CODE_INTERNAL
    return StoreUnavailableError(f"the key service refused ({code})")
