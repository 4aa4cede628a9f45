"""Sealing and opening: the only place where records meet the key service.

Owns: which key a thread has (a bounded cache of the stored map), the writing of sealed records under that key, the
making of a new thread's key, the opening of stored records, and which error of the store a failure of the key service
is. Invariants:
- Nothing is put on the disk but what the provider answered, and only if it has the length of a sealed record; when it
  does not answer, the write fails.
- A record is written only while the key that sealed it is still its thread's and the thread is not deleted: both are
  conditions of the write. If the key was switched meanwhile, the record is sealed again under the new one.
- The map is written once per thread, in the batch of the thread's metadata; whoever loses a race retires its key. No
  key is made for a write that the writer refuses.
- Opening uses the record's own key id, in one batch, whatever the number of keys.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

from minikms import api
from minikms.client import DecryptItem, EncryptItem, KmsError, KmsRefusedError
from progressdb_server.kms.provider import Fault, Provider, fault
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.drafts import Draft
from progressdb_server.store.engine import Engine
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import (
    ConditionFailedError,
    NotWrittenError,
    RecordUnreadableError,
    StoreError,
    StoreUnavailableError,
    ThreadDeletedError,
)
from progressdb_server.store.writer import Writer

THREADS_CACHED_MAX: Final = 16_384
WRITERS_CACHED_MAX: Final = 256
"""Authors known to have written, per cached thread."""
KEY_SWITCH_S_MAX: Final = 2.0
"""How long a write waits for a thread whose old key is retired but whose map does not name the new one yet."""
KEY_SWITCH_POLL_S: Final = 0.02
SEAL_BYTES: Final = 28
"""Nonce (12) and tag (16): by how much a sealed record is longer. An answer of another length, such as the plaintext
itself, is never stored."""

RETRY_AFTER_S: Final = 2
"""How long a client should wait before a retry while the key service is away."""


def store_error(error: KmsError, record_key: bytes | None = None) -> StoreError:
    """What a failure of the key service is to the caller of the store. `record_key`: the storage key of the record that
    it refused to open."""
    if not isinstance(error, KmsRefusedError) or fault(error) is Fault.SERVICE:
        return StoreUnavailableError("the key service is not available now", RETRY_AFTER_S)
    if record_key is not None and fault(error) is Fault.REQUEST:
        return RecordUnreadableError(f"the record {record_key.decode()} does not open ({error.code})")
    return StoreUnavailableError(f"the key service refused ({error.code})")


class ThreadState:
    """What a write needs to know of its thread. `deleted` may be out of date and only saves work; the condition of the
    write decides."""

    __slots__ = ("closed_key", "deleted", "key_id", "key_raw", "map_key", "stands", "thread", "writers")

    def __init__(self, thread: str, key_raw: bytes, deleted: bool) -> None:
        self.thread = thread
        self.key_raw = key_raw
        self.key_id = key_raw.decode()
        self.deleted = deleted
        self.map_key = keyspace.key_map(thread)
        self.closed_key = keyspace.closed(thread)
        self.stands = ((self.map_key, key_raw), (self.closed_key, None))
        """The conditions of every write of the thread."""
        self.writers: set[str] = set()

    def remember_writer(self, author: str) -> None:
        if len(self.writers) >= WRITERS_CACHED_MAX:
            self.writers.clear()
        self.writers.add(author)


class Sealer:
    def __init__(self, engine: Engine, writer: Writer, provider: Provider, clock: Clock, metrics: StoreMetrics) -> None:
        self._engine = engine
        self._writer = writer
        self._provider = provider
        self._clock = clock
        self._metrics = metrics
        self._threads: dict[str, ThreadState] = {}
        self.halted: str | None = None
        """Why nothing may be sealed, None if it may (see store/epoch.py)."""

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
        """Read the thread's map (None: every thread's) again at its next use."""
        if thread is None:
            self._threads.clear()
        else:
            self._threads.pop(thread, None)

    # --- writing --------------------------------------------------------------------------------------------------
    async def append(self, state: ThreadState, draft: Callable[[Stamp], Draft], request_id: str | None) -> None:
        """Seal and commit under the thread's current key, at a new stamp. Raises ThreadDeletedError,
        StoreUnavailableError; ConditionFailedError for a condition of the draft's own."""
        deadline: float | None = None
        while True:
            if state.deleted:
                raise ThreadDeletedError("thread deleted")
            try:
                slot = self._writer.reserve(state.map_key)
                try:
                    made = draft(self._clock.next())
                    sealed = await self._seal(state.thread, state.key_id, made.secrets, request_id)
                    done = self._writer.submit(slot, made.finish(state.key_id, sealed), state.stands)
                finally:
                    self._writer.leave(slot)
                await done
                return
            except ConditionFailedError as error:
                if error.key not in (state.map_key, state.closed_key):
                    raise
            except KmsError as error:
                if not isinstance(error, KmsRefusedError) or error.code != api.CODE_KEY_RETIRED:
                    raise store_error(error) from error
            # The key was switched, or is being switched: the stored map decides.
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

    async def found(self, thread: str, draft: Draft, request_id: str | None) -> None:
        """Make the key of a new thread, then seal and commit under it. Raises StoreUnavailableError;
        ConditionFailedError when somebody else made the thread first.

        No key is made while the writer refuses writes. If the key turns out to be unused, it is retired; if that fails,
        the key service lists it as one that no record uses. The key stays active after a commit that failed halfway,
        because its records may be stored."""
        self._check_halted()
        await self._writer.check_writable()
        try:
            key_id = (await self._provider.create_dek_for_thread(thread, request_id=request_id)).key_id
        except KmsError as error:
            raise store_error(error) from error
        committing = False
        try:
            sealed = await self._seal(thread, key_id, draft.secrets, request_id)
            write = draft.finish(key_id, sealed)
            committing = True
            await self._writer.commit(write)
        except (KmsError, ConditionFailedError, StoreUnavailableError) as error:
            if not committing or isinstance(error, (ConditionFailedError, NotWrittenError)):
                with contextlib.suppress(KmsError):
                    await self._provider.retire_key(key_id, request_id=request_id)
            if isinstance(error, KmsError):
                raise store_error(error) from error
            raise

    async def _seal(
        self, thread: str, key_id: str, secrets: Sequence[tuple[bytes, bytes]], request_id: str | None
    ) -> list[bytes]:
        """Raises KmsError, StoreUnavailableError."""
        self._check_halted()
        if len(secrets) == 1:
            ((key, plaintext),) = secrets
            alone = await self._provider.encrypt(key_id, plaintext, aad=key, thread_id=thread, request_id=request_id)
            if len(alone) != len(plaintext) + SEAL_BYTES:
                raise StoreUnavailableError("the key service answered wrongly")
            return [alone]
        answers = await self._provider.encrypt_batch(
            [
                EncryptItem(key_id=key_id, plaintext=plaintext, aad=key, thread_id=thread, request_id=request_id)
                for key, plaintext in secrets
            ]
        )
        if len(answers) != len(secrets):
            raise StoreUnavailableError("the key service answered wrongly")
        sealed: list[bytes] = []
        for (_, plaintext), answer in zip(secrets, answers, strict=True):
            if isinstance(answer, KmsRefusedError):
                raise answer
            if len(answer) != len(plaintext) + SEAL_BYTES:
                raise StoreUnavailableError("the key service answered wrongly")
            sealed.append(answer)
        return sealed

    def _check_halted(self) -> None:
        if self.halted is not None:
            raise StoreUnavailableError(self.halted)

    # --- reading --------------------------------------------------------------------------------------------------
    async def open(self, records: Sequence[DecryptItem]) -> list[bytes]:
        """The plaintexts, in order; the `aad` of each is its storage key. Raises StoreUnavailableError,
        RecordUnreadableError."""
        opened: list[bytes] = []
        for item, answer in zip(records, await self.open_each(records), strict=True):
            if isinstance(answer, KmsRefusedError):
                raise store_error(answer, item.aad) from answer
            opened.append(answer)
        return opened

    async def open_each(self, records: Sequence[DecryptItem]) -> list[bytes | KmsRefusedError]:
        """As `open`, but a record that does not open gives its refusal. Raises StoreUnavailableError, also if the key
        service can't open one of them now."""
        if not records:
            return []
        self._metrics.opened(len(records))
        try:
            answers = await self._provider.decrypt_batch(records)
        except KmsError as error:
            raise store_error(error) from error
        if len(answers) != len(records):
            raise StoreUnavailableError("the key service answered wrongly")
        for answer in answers:
            if isinstance(answer, KmsRefusedError) and fault(answer) is Fault.SERVICE:
                raise store_error(answer) from answer
        return answers
