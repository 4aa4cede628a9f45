"""Sealing and opening: the only place where records meet the key service.

Owns: which key a thread has (a bounded cache of the stored map), the writing of sealed records under that key, the
making of a new thread's key, and of another one for a thread whose key was retired, the opening of stored records,
and which error of the store a failure of the key service is. Invariants:
- Nothing is put on the disk but what the provider answered, and only if it has the length of a sealed record; when it
  does not answer, the write fails.
- A record is written only while the key that sealed it is still its thread's and the thread is not deleted: both are
  conditions of the write. If the key was switched meanwhile, the record is sealed again under the new one.
- The map is first written in the batch of the thread's metadata; whoever loses a race retires its key. Only a rotation
  or a renewal changes it, under a condition on the old value. No key is made for a write that the writer refuses.
- A key that is retired, while no rotation is switching the thread's key, is replaced at the next write of its thread.
  What it sealed stays under it. One replacement of a thread runs at a time; the switch is a condition on the stored
  map.
- Once the key service was seen sealed, nothing is sealed until its epoch was judged: it may be an older one after the
  unseal. `conversations.whole` judges.
- Opening uses the record's own key id, in one batch, whatever the number of keys. The audit line of the batch has the
  id of the client's request.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

from minikms import api
from minikms.api.errors import KmsError, KmsRefusedError, LimitExceededError, SealedError
from minikms.client import DecryptItem, EncryptItem
from progressdb_server.kms.provider import (
    LIMITED,
    LISTED_KEYS_MAX,
    READING,
    SEALED,
    Fault,
    Provider,
    fault,
    is_permanent,
)
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import LateStampError, Write
from progressdb_server.store.drafts import Draft, DraftRecord
from progressdb_server.store.engine import Commits, Reads
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import (
    ConditionFailedError,
    KeyServiceRefusedError,
    NotWrittenError,
    RecordUnreadableError,
    StoreError,
    StoreUnavailableError,
    ThreadDeletedError,
    ThreadKeyDestroyedError,
)

THREADS_CACHED_MAX: Final = 16_384
WRITERS_CACHED_MAX: Final = 256
"""Authors known to have written, per cached thread."""
KEY_SWITCH_S_MAX: Final = 2.0
"""How long a write waits for a rotation that has retired the thread's old key and not named the new one yet."""
KEY_SWITCH_POLL_S: Final = 0.02
RENEWALS_MAX: Final = 2
"""New keys for one write, whose thread's key is retired."""
LATE_TRIES_MAX: Final = 64
"""The tries of a write that meets a later version of another server each time; for a change: CHANGE_TRIES_MAX."""
AHEAD_NS_MAX: Final = 1_000_000_000
"""How far the stamp of a write that came too late may be ahead of the clock at its next try."""

UNREADABLE_MAX: Final = 1000
"""Records that could not be read, and are counted."""
_NO_DAMAGE: Final = frozenset({api.CODE_KEY_DESTROYED, api.CODE_FORBIDDEN})

RETRY_AFTER_S: Final = 2
"""How long a client should wait before a retry while the key service is away."""


def store_error(error: KmsError, record_key: bytes | None = None) -> StoreError:
    """What a failure of the key service is to the caller of the store. `record_key`: the storage key of the record that
    it refused to open."""
    if isinstance(error, SealedError):
        return StoreUnavailableError(SEALED, api.SEALED_RETRY_SECONDS)
    if isinstance(error, LimitExceededError):
        return StoreUnavailableError(LIMITED, error.retry_after_s or RETRY_AFTER_S)
    if not isinstance(error, KmsRefusedError) or fault(error) is Fault.SERVICE:
        return StoreUnavailableError("the key service is not available now", RETRY_AFTER_S)
    if record_key is not None and fault(error) is Fault.REQUEST:
        return RecordUnreadableError(f"the record {record_key.decode()} does not open ({error.code})", error.code)
    if error.code == api.CODE_KEY_DESTROYED:
        return ThreadKeyDestroyedError("the thread's key is destroyed")
    if is_permanent(error):
        return KeyServiceRefusedError(error.code)
    return StoreUnavailableError(f"the key service refused ({error.code})")


@contextlib.contextmanager
def _counted(threads: Counter[str], thread: str) -> Iterator[None]:
    """Counts the thread meanwhile."""
    threads[thread] += 1
    try:
        yield
    finally:
        threads[thread] -= 1
        if not threads[thread]:
            del threads[thread]


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
        self.closed_key = keyspace.closed_key(thread)
        self.stands = ((self.map_key, key_raw), (self.closed_key, None))
        """The conditions of every write of the thread."""
        self.writers: set[str] = set()
        """Authors who were members when they last wrote. It only saves work; the condition of the write decides."""

    def remember_writer(self, author: str) -> None:
        if len(self.writers) >= WRITERS_CACHED_MAX:
            self.writers.clear()
        self.writers.add(author)


class Sealer:
    def __init__(self, reads: Reads, writer: Commits, provider: Provider, clock: Clock, metrics: StoreMetrics) -> None:
        self._reads = reads
        self._writer = writer
        self._provider = provider
        self._clock = clock
        self._metrics = metrics
        self._threads: dict[str, ThreadState] = {}
        self.creates: Counter[str] = Counter()
        """Threads that are being made, with the number of creates."""
        self._renewals: dict[str, asyncio.Task[None]] = {}
        self._switching: Counter[str] = Counter()
        """Threads whose key a rotation is switching."""
        self.unreadable: dict[bytes, str] = {}
        """The records that could not be read since they were read last, with a sentence; UNREADABLE_MAX at most."""
        self.halted: str | None = None
        """Why nothing may be sealed, None if it may (see store/epoch.py)."""
        self.seen_sealed = asyncio.Event()
        """Set each time the key service is seen sealed; whoever judges the epoch clears it before."""

    # --- threads and their keys -----------------------------------------------------------------------------------
    def known(self, thread: str) -> ThreadState | None:
        """What is remembered of the thread, None for nothing."""
        state = self._threads.get(thread)
        if state is not None:
            self._metrics.cache_hits += 1
        return state

    async def thread(self, thread: str) -> ThreadState | None:
        """None for an unknown thread."""
        state = self.known(thread)
        if state is not None:
            return state
        self._metrics.cache_misses += 1
        key_raw = await self._reads.get(keyspace.key_map(thread))
        if key_raw is None:
            return None
        state = ThreadState(thread, key_raw, await self._reads.get(keyspace.closed_key(thread)) is not None)
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
    async def append(self, state: ThreadState, draft: Callable[[Stamp, str], Draft], request_id: str | None) -> None:
        """Seals and commits what `draft` returns for a new stamp and the id of the thread's current key; another try
        calls it again. Raises ThreadDeletedError,
        StoreUnavailableError; ConditionFailedError for a condition of the draft's own."""
        deadline: float | None = None
        renewals = late = 0
        while True:
            if state.deleted:
                raise ThreadDeletedError
            began_ns = time.monotonic_ns()
            try:
                pending = self._writer.reserve(state.map_key)
                try:
                    unsealed = draft(self._clock.next(), state.key_id)
                    ciphertexts = await self._seal(state.thread, state.key_id, unsealed.records, request_id)
                    done = self._writer.submit(pending, unsealed.sealed(ciphertexts), state.stands)
                finally:
                    self._writer.leave(pending)
                try:
                    await done
                finally:
                    del done, pending  # the traceback of the error leads to this frame
                return
            except LateStampError as error:
                late += 1
                if late == LATE_TRIES_MAX:
                    raise NotWrittenError("other servers are writing into the thread at the same time") from None
                if error.last is not None:
                    self._clock.recover(error.last)
                # Later than the stamps that other servers write while the next try is on its way.
                self._clock.hurry(min(2 * (time.monotonic_ns() - began_ns), AHEAD_NS_MAX))
                continue
            except ConditionFailedError as error:
                if error.key not in (state.map_key, state.closed_key):
                    raise
            except KmsError as error:
                code = error.code if isinstance(error, KmsRefusedError) else ""
                if code != api.CODE_KEY_RETIRED:
                    raise self._failure(error) from error
                if state.thread not in self._switching:
                    if renewals == RENEWALS_MAX:
                        raise self._failure(error) from error
                    renewals += 1
                    await self._renew(state)
            # The key was switched, or is being switched: the stored map decides.
            self.forget(state.thread)
            renewed = await self.thread(state.thread)
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

    def switching(self, thread: str) -> contextlib.AbstractContextManager[None]:
        """Held from before the thread's old key is retired until the map names another one: writes of the thread that
        meet the retired key wait meanwhile. Otherwise such a write gives the thread another one."""
        return _counted(self._switching, thread)

    async def _renew(self, state: ThreadState) -> None:
        """Gives the thread another key in the place of a retired one; with a renewal of the thread that runs,
        waits for it. Raises StoreUnavailableError."""
        running = self._renewals.get(state.thread)
        if running is None:
            running = asyncio.get_running_loop().create_task(self._replace_key(state))
            self._renewals[state.thread] = running
            running.add_done_callback(lambda _: self._renewals.pop(state.thread, None))
        try:
            await asyncio.shield(running)
        finally:
            del running  # the traceback of its error leads to this frame

    async def _replace_key(self, state: ThreadState) -> None:
        self.check_halted()
        await self._writer.check_writable()
        if await self._reads.get(state.map_key) != state.key_raw:
            return  # replaced meanwhile
        # The old key is retired last: after a crash in between, the thread's key is still one that makes another.
        unused = ""
        try:
            unused = (await self._provider.create_dek_for_thread(state.thread)).key_id
            self.check_halted()
            await self._writer.commit(Write(((state.map_key, unused.encode()),), state.stands))
            unused = state.key_id
            self._metrics.keys_renewed += 1
        except KmsError as error:
            raise self._failure(error) from error
        except ConditionFailedError:
            return  # the stored map decides
        except StoreUnavailableError as error:
            if not isinstance(error, NotWrittenError):
                unused = ""  # the map may name it, or the key service may be an older one
            raise
        finally:
            if unused:
                with contextlib.suppress(KmsError):  # else the key service lists it as one that no record uses
                    await self._provider.retire_key(unused)

    async def make_thread(self, thread: str, draft: Callable[[str], Draft], request_id: str | None) -> None:
        """Makes the key of a new thread, then seals and commits under it. Raises StoreUnavailableError;
        ConditionFailedError when somebody else made the thread first.

        No key is made while the writer refuses writes. If the key turns out to be unused, it is retired. If that fails,
        or the create is cut off, the key is an orphan, which `jobs.orphans` retires. The key stays active after a
        commit that failed halfway, because its records may be stored."""
        with _counted(self.creates, thread):
            await self._make_key_and_commit(thread, draft, request_id)

    async def _make_key_and_commit(self, thread: str, draft: Callable[[str], Draft], request_id: str | None) -> None:
        self.check_halted()
        await self._writer.check_writable()
        try:
            key_id = (await self._provider.create_dek_for_thread(thread, request_id=request_id)).key_id
        except KmsError as error:
            raise self._failure(error) from error
        committing = False
        try:
            unsealed = draft(key_id)
            write = unsealed.sealed(await self._seal(thread, key_id, unsealed.records, request_id))
            committing = True
            await self._writer.commit(write)
        except (KmsError, ConditionFailedError, StoreUnavailableError) as error:
            if not committing or isinstance(error, (ConditionFailedError, NotWrittenError)):
                with contextlib.suppress(KmsError):
                    await self._provider.retire_key(key_id, request_id=request_id)
            if isinstance(error, KmsError):
                raise self._failure(error) from error
            raise

    async def _seal(
        self, thread: str, key_id: str, records: Sequence[DraftRecord], request_id: str | None
    ) -> list[bytes]:
        """Seals the records. Raises KmsError, and StoreUnavailableError even if the key service was seen sealed
        meanwhile, because the answer may be that of an older one.
        """
        self.check_halted()
        sealed = await self._sealed(thread, key_id, records, request_id)
        self.check_halted()
        return sealed

    async def _sealed(
        self, thread: str, key_id: str, records: Sequence[DraftRecord], request_id: str | None
    ) -> list[bytes]:
        if len(records) == 1:
            ((key, _, plaintext),) = records
            alone = await self._provider.encrypt(key_id, plaintext, aad=key, thread_id=thread, request_id=request_id)
            if len(alone) != len(plaintext) + api.SEAL_BYTES:
                raise StoreUnavailableError("the key service answered wrongly")
            return [alone]
        answers = await self._provider.encrypt_batch(
            [
                EncryptItem(key_id=key_id, plaintext=plaintext, aad=key, thread_id=thread, request_id=request_id)
                for key, _, plaintext in records
            ]
        )
        if len(answers) != len(records):
            raise StoreUnavailableError("the key service answered wrongly")
        sealed: list[bytes] = []
        for (_, _, plaintext), answer in zip(records, answers, strict=True):
            if isinstance(answer, KmsRefusedError):
                raise copy.copy(answer)  # its traceback leads to this frame, which has all answers
            if len(answer) != len(plaintext) + api.SEAL_BYTES:
                raise StoreUnavailableError("the key service answered wrongly")
            sealed.append(answer)
        return sealed

    # --- when nothing may be sealed -------------------------------------------------------------------------------
    def check_halted(self) -> None:
        """Before a call that encrypts, and after it: if the key service was seen sealed meanwhile, the answer may be
        that of an older one. Raises StoreUnavailableError if nothing may be encrypted now."""
        if self.halted is not None:
            raise StoreUnavailableError(self.halted, api.SEALED_RETRY_SECONDS if self.halted == SEALED else 1)

    def halt_sealed(self) -> None:
        """The key service was seen sealed."""
        self.halted = SEALED
        self.seen_sealed.set()

    def _failure(self, error: KmsError, record_key: bytes | None = None) -> StoreError:
        """The error of the store for an error of the key service (`store_error`)."""
        if isinstance(error, SealedError):
            self.halt_sealed()
        return store_error(error, record_key)

    # --- reading --------------------------------------------------------------------------------------------------
    async def open(self, records: Sequence[DecryptItem]) -> list[bytes]:
        """The plaintexts, in order; the `aad` of each is its storage key. Raises StoreUnavailableError,
        RecordUnreadableError."""
        opened: list[bytes] = []
        for item, answer in zip(records, await self.open_each(records), strict=True):
            if isinstance(answer, KmsRefusedError):
                raise self._failure(answer, item.aad) from answer
            opened.append(answer)
        return opened

    def making_key(self, thread: str) -> bool:
        """Whether a key is being made that the thread's map may name soon."""
        return thread in self.creates or thread in self._renewals

    async def has_keys(self, thread: str, key_ids: Collection[str]) -> bool:
        """Whether the key service says now that it has all of these keys of the thread. No record is opened. It is also
        false if the key service does not say it, or if the thread has more keys than it lists at once."""
        try:
            page = await self._provider.list_keys(thread_id=thread, state=None, cursor=None, limit=LISTED_KEYS_MAX)
        except KmsError as error:
            if isinstance(error, SealedError):
                self.halt_sealed()
            return False
        return not page.indexing and set(key_ids) <= {key.key_id for key in page.keys}

    async def open_each(self, records: Sequence[DecryptItem]) -> list[bytes | KmsRefusedError]:
        """Opens records like `open`, but gives the refusal of each that does not open. Raises StoreUnavailableError,
        even if the key service can't open one of them now.
        """
        if not records:
            return []
        self._metrics.opened(len(records))
        reading = READING.get()
        if reading is not None:
            reading.opened += len(records)
        try:
            answers = await self._provider.decrypt_batch(
                records, request_id=None if reading is None else reading.request_id
            )
        except KmsError as error:
            raise self._failure(error) from error
        if len(answers) != len(records):
            raise StoreUnavailableError("the key service answered wrongly")
        refused = False
        for answer in answers:
            if isinstance(answer, KmsRefusedError):
                refused = True
                if fault(answer) is Fault.SERVICE:
                    raise self._failure(answer) from answer
        if refused or self.unreadable:
            self._note_read(records, answers)
        return answers

    def _note_read(self, records: Sequence[DecryptItem], answers: Sequence[bytes | KmsRefusedError]) -> None:
        for item, answer in zip(records, answers, strict=True):
            if not isinstance(answer, KmsRefusedError):
                self.unreadable.pop(item.aad, None)
            elif answer.code not in _NO_DAMAGE:
                self.note_unreadable(f"the record {item.aad.decode()} does not open ({answer.code})", item.aad)

    def note_unreadable(self, sentence: str, record: bytes = b"") -> None:
        """`record`: its storage key; without it the sentence stays until the server ends."""
        if len(self.unreadable) < UNREADABLE_MAX and sentence not in self.unreadable.values():
            self.unreadable[record or sentence.encode()] = sentence
