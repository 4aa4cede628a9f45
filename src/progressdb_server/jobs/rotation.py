"""The rotation of one thread's key, from any point at which an earlier run of it may have ended, and its pace.

Owns: the steps, what is written in each, and when the next chunk may begin (`Pace`). Invariants:
- The row is stored, then the key is made, then the thread's key and the row are switched in one write. Until that write
  no pause or cancel is accepted (`Job.keying`): the old key may be retired already. Writes of the thread wait while an
  attempt makes and switches the key. Between two attempts, a write may give the thread another key; the next attempt
  replaces that one.
- One write holds the new ciphertexts of a chunk, the old ones as backups, and the cursor: a kill repeats work and loses
  nothing. It fails unless every record is still what was read; then the chunk is read again.
- Plaintext does not leave the key service, neither while records are re-encrypted nor when they are read back.
- A job ends as `done` only after a pass over the whole thread found every record under the new key and opened it, found
  as many backups as it has re-encrypted records, and left the thread one active key.
- Over any longer time a job works at no more than its rate; of an idle time, or of a chunk that took long, no more than
  BEHIND_S_MAX is made up for.
What the store and the key service can't do now is tried again; what they refuse ends the job as `failed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Final, NamedTuple

from minikms import api
from minikms.api.errors import KmsError, KmsRefusedError, LimitExceededError, SealedError
from minikms.client import ReencryptItem
from minikms.logs import structlog
from progressdb_server.jobs.states import AT_WORK, Failure, Job, changed, move, named, with_source
from progressdb_server.jobs.table import JobTable, PendingRow, Row
from progressdb_server.kms.provider import Fault, Provider, fault, key_pages
from progressdb_server.store.model import (
    Chunk,
    ConditionFailedError,
    Record,
    StaleRowError,
    Store,
    StoreUnavailableError,
)

CHUNK_RECORDS_MAX: Final = 512
CHUNKS_AHEAD: Final = 4
WRITES_AHEAD: Final = 8
"""Chunks that the key service has, and chunks on their way to the disk, where they share a sync."""
PACED_CHUNK_RECORDS_MAX: Final = 128
"""Of a job with a bounded rate, so that requests wait for a millisecond or two at most."""
SCAN_COST: Final = 0.1
VERIFY_COST: Final = 0.5
"""What reading a record that needs no re-encryption, and reading one back through the key service, counts against a
rate of records."""
RETRY_S_MIN: Final = 0.1
RETRY_S_MAX: Final = 5.0
PROGRESS_S: Final = 1.0
"""How often a verification stores its progress, which is also when it notices a pause."""

BEHIND_S_MAX: Final = 0.1
"""Beside requests every chunk begins a little late: without making up for that, a rate is never reached."""
MALFORMED: Final = "malformed"

_log = structlog.get_logger("progressdb.jobs")


class RotationFailedError(Exception):
    """The job can't go on; the text says why."""


class Pace:
    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_second` 0: without a bound."""
        self._per_second = per_second
        self._clock = clock
        self._free_at = 0.0

    @property
    def bounded(self) -> bool:
        return self._per_second > 0

    async def take(self, cost: float) -> None:
        """Wait until work of this cost may begin; other tasks always get a turn."""
        if not self.bounded:
            await asyncio.sleep(0)
            return
        now = self._clock()
        begins_at = max(now - BEHIND_S_MAX, self._free_at)
        self._free_at = begins_at + cost / self._per_second
        await asyncio.sleep(max(0.0, begins_at - now))


class _Reencrypted(NamedTuple):
    """A chunk, re-encrypted: records with their new sealed parts, and the failures."""

    moved: list[tuple[Record, bytes]]
    failures: list[Failure]
    chunk: Chunk


class KeyRotation:
    def __init__(self, store: Store, provider: Provider, table: JobTable, *, exclusive: bool) -> None:
        self._store = store
        self._provider = provider
        self._table = table
        self._exclusive = exclusive

    async def run(self, job_id: str, pace: Pace) -> None:
        """Work on the job until it is finished, paused or cancelled."""
        await self._persist(job_id, lambda: self._advance(job_id, pace))

    async def switch_key(self, job_id: str) -> None:
        """Give the thread its new key, unless that was done before. Tries until it has it or the job has failed."""
        await self._persist(job_id, lambda: self._switch_key(job_id))

    async def _persist(self, job_id: str, work: Callable[[], Awaitable[None]]) -> None:
        delay_s, at = RETRY_S_MIN, 0
        while True:
            try:
                job = self._table.get(job_id)
                if job.state not in AT_WORK:
                    return
                if job.updated_ns != at:
                    delay_s, at = RETRY_S_MIN, job.updated_ns
                try:
                    await work()
                    return
                except RotationFailedError as error:
                    await self._fail(job_id, str(error))
                except (StaleRowError, StoreUnavailableError, ConditionFailedError):
                    raise
                except KmsError as error:
                    if not isinstance(error, KmsRefusedError) or fault(error) is Fault.SERVICE:
                        raise
                    await self._fail(job_id, f"the key service refused ({error.code})")
                except Exception as error:  # noqa: BLE001  a defect ends this job, with a reason, and no other one
                    lines = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
                    _log.error("job_broken", job=job_id, error=type(error).__qualname__, at=lines)
                    await self._fail(job_id, f"internal error ({type(error).__qualname__})")
            except StaleRowError:  # an operator changed it, or the disk took more than it reported: read the row again
                await asyncio.sleep(0)
            except (KmsError, StoreUnavailableError, ConditionFailedError) as error:
                if isinstance(error, SealedError):
                    self._store.halt_sealed()
                wait_s = max(delay_s, error.retry_after_s) if isinstance(error, LimitExceededError) else delay_s
                _log.warning("job_waits", job=job_id, reason=str(error), retry_s=wait_s)
                await asyncio.sleep(wait_s)
                delay_s = min(delay_s * 2, RETRY_S_MAX)

    async def _fail(self, job_id: str, reason: str) -> None:
        """The job has failed, unless somebody has paused or cancelled it meanwhile. Raises StaleRowError,
        StoreUnavailableError; then the work fails again."""
        row = self._table.row(job_id)
        if row.job.state in AT_WORK:
            await self._table.store(row, move(row.job, "fail", reason=reason, keying=False))
            _log.error("job_failed", job=job_id, reason=reason)

    async def _advance(self, job_id: str, pace: Pace) -> None:
        await self._switch_key(job_id)
        row = self._table.row(job_id)
        if row.job.state == "queued":
            row = await self._table.store(row, move(row.job, "start"))
        if self._key_of(row.job.thread) != row.job.new_key:
            raise RotationFailedError("a later rotation has given the thread another key")
        if not row.job.total:
            row = await self._table.store(row, changed(row.job, total=await self._count(row.job.thread)))
        while row.job.state in AT_WORK:
            if row.job.state == "running":
                row = await self._migrate(row, pace)
                if row.job.failed and not row.job.moved:
                    raise RotationFailedError(f"{row.job.failed} records could not be re-encrypted")
                row = await self._table.store(row, move(row.job, "verify", cursor="", verified=0))
            row = await self._verify(row, pace)

    async def _count(self, thread: str) -> int:
        total = 0
        for entries in self._store.count_records(thread, CHUNK_RECORDS_MAX):
            total += entries
            await asyncio.sleep(0)
        return total

    # --- the key --------------------------------------------------------------------------------------------------
    def _key_of(self, thread: str) -> str:
        key_id = self._store.key_of_thread(thread)
        if key_id is None:
            raise RotationFailedError("the thread has no key")
        return key_id

    async def _switch_key(self, job_id: str) -> None:
        row = self._table.row(job_id)
        job = row.job
        if job.new_key:
            return
        self._store.check_halted()
        old = self._key_of(job.thread)
        if not job.keying or job.old_key != old:
            row = await self._table.store(row, changed(job, keying=True, old_key=old, sources=(old,)))
        with self._store.switching_key(job.thread):
            made = await self._provider.create_dek_for_thread(job.thread, replaces=old, request_id=job.id)
            self._store.check_halted()
            await self._switch_to(job_id, old, made.key_id)
        _log.info("key_switched", job=job_id, thread=job.thread, old_key=old, new_key=made.key_id)

    async def _switch_to(self, job_id: str, old: str, new: str) -> None:
        job = self._table.get(job_id)
        switch = self._store.key_switched(job.thread, old, new)
        while not (row := self._table.row(job_id)).job.new_key:
            try:
                await self._table.store(row, changed(row.job, new_key=new, keying=False), switch)
            except StaleRowError:
                continue
            except StoreUnavailableError:  # the write may have succeeded: read the row again
                await asyncio.sleep(RETRY_S_MIN)
            except ConditionFailedError:
                with contextlib.suppress(KmsError):  # where it is exclusive, the next rotation retires it
                    await self._provider.retire_key(new, request_id=job_id)
                raise
        # From here on every write is under the new key: it is a condition of each (store/sealer.py).
        self._store.forget_key(job.thread)

    async def _retire_unused(self, job: Job) -> None:
        """Keys that were made for the thread by a call whose answer was lost, and that it never got.

        Only where this server alone makes such keys: a key with this thread id may be another program's.
        """
        if not self._exclusive:
            return
        active: list[str] = []
        try:
            async for page in key_pages(self._provider, thread_id=job.thread, state="active"):
                if page.indexing:
                    raise StoreUnavailableError("the key service is still reading its keys")
                active += [key.key_id for key in page.keys if key.purpose == "thread"]
        except KmsRefusedError as error:
            if fault(error) is Fault.SERVICE:
                raise
            _log.warning("keys_not_listed", job=job.id, code=error.code)  # the policy gives us no role `monitor`
            return
        for key_id in active:
            # The key of a renewal that runs now becomes the thread's own.
            if key_id != self._key_of(job.thread) and not self._store.making_key(job.thread):
                await self._provider.retire_key(key_id, request_id=job.id)

    # --- re-encrypting --------------------------------------------------------------------------------------------
    async def _migrate(self, row: Row, pace: Pace) -> Row:
        """One pass, from the cursor to the newest record. Some chunks are with the key service while others are on
        their way to the disk; each is written after the one before it, or not at all. Whatever fails, the pass begins
        again at the stored cursor."""
        job = row.job
        ahead: deque[asyncio.Task[_Reencrypted]] = deque()
        writing: deque[PendingRow] = deque()
        chunks = self._store.record_chunks(job.thread, _chunk_records(pace), behind=job.cursor, to_now=True)
        try:
            for chunk in chunks:
                left = [found for found in chunk.records if found.key_id != job.new_key]
                await pace.take(len(left) + SCAN_COST * (chunk.entries - len(left)))
                if not left and not chunk.malformed:
                    continue
                ahead.append(asyncio.create_task(self._reencrypt(job, chunk, left)))
                if len(ahead) > CHUNKS_AHEAD:
                    writing.append(self._write(row, await ahead.popleft()))
                    row = writing[-1].row
                if len(writing) > WRITES_AHEAD:
                    await self._table.settle(writing.popleft())
            while ahead:
                writing.append(self._write(row, await ahead.popleft()))
                row = writing[-1].row
            while writing:
                await self._table.settle(writing.popleft())
            return row
        finally:
            await _cancel(ahead)
            await asyncio.gather(*(pending.write.done for pending in writing), return_exceptions=True)

    async def _reencrypt(self, job: Job, chunk: Chunk, left: Sequence[Record]) -> _Reencrypted:
        self._store.check_halted()
        moved: list[tuple[Record, bytes]] = []
        failures = [Failure(_shown(key), MALFORMED) for key in chunk.malformed]
        by_key: dict[str, list[Record]] = {}
        for found in left:
            by_key.setdefault(found.key_id, []).append(found)
        for key_id, records in by_key.items():
            for found, outcome in zip(records, await self._reencrypt_from(job, key_id, records), strict=True):
                if isinstance(outcome, bytes):
                    moved.append((found, outcome))
                else:
                    failures.append(_failure(found, outcome))
        self._store.check_halted()
        return _Reencrypted(moved, failures, chunk)

    async def _reencrypt_from(
        self, job: Job, key_id: str, records: Sequence[Record]
    ) -> Sequence[bytes | KmsRefusedError]:
        try:
            return await self._provider.reencrypt_batch(key_id, job.new_key, _items(records), request_id=job.id)
        except KmsRefusedError as error:
            if fault(error) is Fault.SERVICE:
                raise
            if error.code == api.CODE_KEY_RETIRED:
                raise RotationFailedError(f"the new key can't be used ({error.code})") from error
            # One of the two keys is at fault. If the new one encrypts, it is the one that the records are under.
            await self._provider.encrypt(job.new_key, b"", aad=job.id.encode(), thread_id=job.thread, request_id=job.id)
            return [copy.copy(error)] * len(records)  # without the traceback, which leads to the caller

    def _write(self, row: Row, step: _Reencrypted) -> PendingRow:
        job = row.job
        sources = job.sources
        for key_id in {found.key_id for found, _ in step.moved}:
            sources = with_source(sources, key_id)
        after = changed(
            job,
            cursor=step.chunk.last,
            sources=sources,
            done=job.done + len(step.moved),
            moved=job.moved + len(step.moved),
            backups=job.backups + len(step.moved),
            failed=job.failed + len(step.failures),
            failures=named(job.failures, step.failures),
        )
        return self._table.submit(row, after, self._store.rekeyed(job.id, job.new_key, step.moved, step.chunk.read_at))

    # --- verifying ------------------------------------------------------------------------------------------------
    async def _verify(self, row: Row, pace: Pace) -> Row:
        """The census and the reading back in one pass; after it the job is done or runs again."""
        job = row.job
        left, verified, stored_at = 0, 0, time.monotonic()
        broken: list[Failure] = []
        ahead: deque[asyncio.Task[list[Failure]]] = deque()
        chunks = self._store.record_chunks(job.thread, _chunk_records(pace), to_now=True)
        try:
            for chunk in chunks:
                current = [found for found in chunk.records if found.key_id == job.new_key]
                left += chunk.entries - len(current)
                await pace.take(VERIFY_COST * chunk.entries)
                ahead.append(asyncio.create_task(self._check(job, current)))
                if len(ahead) > CHUNKS_AHEAD:
                    broken += await ahead.popleft()
                verified += len(current)
                if time.monotonic() - stored_at > PROGRESS_S:
                    row = await self._table.store(row, changed(row.job, verified=verified))
                    stored_at = time.monotonic()
            while ahead:
                broken += await ahead.popleft()
        finally:
            await _cancel(ahead)
        if broken:
            row = await self._table.store(
                row, changed(row.job, failed=row.job.failed + len(broken), failures=named(row.job.failures, broken))
            )
            raise RotationFailedError(f"{len(broken)} records do not open under the new key")
        if left:
            again = move(row.job, "again", cursor="", moved=0, failed=0, failures=(), verified=verified)
            return await self._table.store(row, again)
        return await self._finish(row, verified, pace)

    async def _check(self, job: Job, records: Sequence[Record]) -> list[Failure]:
        """Those that do not open under the new key."""
        self._store.check_halted()
        outcomes = await self._provider.check_batch(
            job.new_key, _items(records), thread_id=job.thread, request_id=job.id
        )
        return [
            _failure(found, refused) for found, refused in zip(records, outcomes, strict=True) if refused is not None
        ]

    async def _finish(self, row: Row, verified: int, pace: Pace) -> Row:
        kept = 0
        for entries in self._store.count_kept(row.job.id, _chunk_records(pace)):
            kept += entries
            await pace.take(SCAN_COST * entries)
        if kept != row.job.backups:
            raise RotationFailedError(f"{row.job.backups} backups were made, {kept} are there")
        await self._retire_unused(row.job)
        job = row.job
        due_ns = self._table.now_ns() + job.destroy_after_s * 1_000_000_000 if job.destroy_after_s else 0
        done = move(job, "finish", cursor="", verified=verified, total=job.done, reason="", destroy_at_ns=due_ns)
        row = await self._table.store(row, done)
        _log.info("job_done", job=job.id, thread=job.thread, records=job.done)
        return row


def _chunk_records(pace: Pace) -> int:
    return PACED_CHUNK_RECORDS_MAX if pace.bounded else CHUNK_RECORDS_MAX


def _items(records: Sequence[Record]) -> list[ReencryptItem]:
    return [ReencryptItem(ciphertext=found.sealed, aad=found.key) for found in records]


def _failure(found: Record, refused: KmsRefusedError) -> Failure:
    """Raises the refusal if it says nothing about the record."""
    if fault(refused) is Fault.SERVICE:
        raise copy.copy(refused)  # the caller's frame, to which its traceback leads, has the first one
    return Failure(_shown(found.key), refused.code)


async def _cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _shown(key: bytes) -> str:
    return key.decode("ascii", errors="backslashreplace")
