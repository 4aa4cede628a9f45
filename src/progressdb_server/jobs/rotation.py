"""The rotation of one thread's key, from any point at which an earlier run of it may have ended.

Owns: the steps, and what is written in each. Invariants:
- The row is stored, then the key is made, then map and row are switched in one write. Until that write no pause or
  cancel is taken (`Job.keying`): the old key may be retired already, and then the thread takes no writes.
- One write holds the new ciphertexts of a chunk, the old ones as backups, and the cursor: a kill repeats and loses
  nothing. It is made only while every record is still what was read, or else the chunk is read again.
- Plaintext does not leave the key service, neither while records are re-encrypted nor when they are read back.
- A job ends as `done` only after a pass over the whole thread found every record under the new key and opened it, found
  as many backups as it has re-encrypted records, and left the thread one active key.
What the store and the key service can't do now is tried again; what they refuse ends the job as `failed`.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Final, NamedTuple

import structlog

from minikms import api
from progressdb_server.jobs import record_backups, walk
from progressdb_server.jobs.model import AT_WORK, Failure, Job, changed, move, named, with_source
from progressdb_server.jobs.pace import Pace
from progressdb_server.jobs.table import JobTable, Row, StaleJobError, Storing
from progressdb_server.kms.provider import Provider, ProviderRefusedError, ProviderUnavailableError
from progressdb_server.store import keyspace, record
from progressdb_server.store.conversations import Conversations
from progressdb_server.store.model import StoreUnavailableError
from progressdb_server.store.writer import ConditionFailedError

CHUNK_RECORDS_MAX: Final = 512
CHUNKS_AHEAD: Final = 4
WRITES_AHEAD: Final = 8
"""Chunks that the key service has, and chunks on their way to the disk, where they share a sync."""
PACED_CHUNK_RECORDS_MAX: Final = 128
"""Of a job with a bounded rate: what requests may have to wait for is a millisecond or two."""
SCAN_COST: Final = 0.1
VERIFY_COST: Final = 0.5
"""What reading a record that needs no re-encryption, and reading one back through the key service, counts against a
rate of records."""
RETRY_S_MIN: Final = 0.1
RETRY_S_MAX: Final = 5.0
PROGRESS_S: Final = 1.0
"""How often a verification stores how far it is, which is also when it notices a pause."""

_TRANSIENT: Final = frozenset(
    {
        api.CODE_AUDIT_UNAVAILABLE,
        api.CODE_STORAGE_UNAVAILABLE,
        api.CODE_SHUTTING_DOWN,
        api.CODE_INTERRUPTED,
        api.CODE_TIMEOUT,
        api.CODE_INTERNAL,
    }
)
"""Refusals of an item that say nothing about it."""
_OF_THE_NEW_KEY: Final = frozenset({api.CODE_KEY_RETIRED, api.CODE_KEY_EXHAUSTED})
MALFORMED: Final = "malformed"

_log = structlog.get_logger("progressdb.jobs")


class RotationFailedError(Exception):
    """The job can't go on; the text says why."""


_FOR_NOW: Final = (StaleJobError, ProviderUnavailableError, StoreUnavailableError, ConditionFailedError)
"""What looking at the row again, and trying again, may overcome."""


class _Step(NamedTuple):
    """A chunk, re-encrypted: records with their new sealed parts, the failures, and the last storage key of it.
    `read_at`: the writer's group when it was read."""

    moved: list[tuple[walk.Record, bytes]]
    failures: list[Failure]
    last: bytes
    read_at: int


class KeyRotation:
    def __init__(self, store: Conversations, provider: Provider, table: JobTable) -> None:
        self._engine = store.engine
        self._writer = store.writer
        self._sealer = store.sealer
        self._provider = provider
        self._table = table

    async def run(self, job_id: str, pace: Pace) -> None:
        """Work on the job until it is finished, paused or cancelled."""
        await self._persist(job_id, lambda: self._advance(job_id, pace))

    async def switch_key(self, job_id: str) -> None:
        """Give the thread its new key; nothing if that was done before. Tries until it is, or the job has failed."""
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
                except ProviderRefusedError as error:
                    await self._fail(job_id, f"the key service refused ({error.code})")
                except _FOR_NOW:
                    raise
                except Exception as error:  # noqa: BLE001  a defect ends this job, visibly, and no other
                    lines = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
                    _log.error("job_broken", job=job_id, error=type(error).__qualname__, at=lines)
                    await self._fail(job_id, f"internal error ({type(error).__qualname__})")
            except StaleJobError:  # an operator, or a disk that took more than it said: go by the row
                await asyncio.sleep(0)
            except _FOR_NOW as error:
                _log.warning("job_waits", job=job_id, reason=str(error), retry_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_S_MAX)

    async def _fail(self, job_id: str, reason: str) -> None:
        """The job is over, unless somebody has paused or cancelled it meanwhile. Raises StaleJobError,
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
        if self._mapped(row.job.thread) != row.job.new_key.encode():
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
        for entries in walk.count(self._engine, *walk.bounds(thread), CHUNK_RECORDS_MAX):
            total += entries
            await asyncio.sleep(0)
        return total

    # --- the key --------------------------------------------------------------------------------------------------
    def _mapped(self, thread: str) -> bytes:
        mapped = self._engine.get(keyspace.key_map(thread))
        if mapped is None:
            raise RotationFailedError("the thread has no key")
        return mapped

    async def _switch_key(self, job_id: str) -> None:
        row = self._table.row(job_id)
        job = row.job
        if job.new_key:
            return
        self._check_key_service()
        mapped = self._mapped(job.thread)
        old = mapped.decode()
        if not job.keying or job.old_key != old:
            row = await self._table.store(row, changed(job, keying=True, old_key=old, sources=(old,)))
        made = await self._provider.create_dek_for_thread(job.thread, replaces=old, request_id=job.id)
        switch = [(keyspace.key_map(job.thread), made.key_id.encode())]
        while not (row := self._table.row(job_id)).job.new_key:
            switched = changed(row.job, new_key=made.key_id, keying=False)
            try:
                await self._table.store(row, switched, switch, expect=[(keyspace.key_map(job.thread), mapped)])
            except StaleJobError:
                continue
            except StoreUnavailableError:  # it may be there all the same: look again
                await asyncio.sleep(RETRY_S_MIN)
            except ConditionFailedError:
                await self._sealer.retire(made.key_id, job.id)
                raise
        # From here on every write is under the new key: it is a condition of each (store/sealer.py).
        self._sealer.forget(job.thread)
        _log.info("key_switched", job=job_id, thread=job.thread, old_key=old, new_key=made.key_id)

    def _check_key_service(self) -> None:
        if self._sealer.halted is not None:
            raise ProviderUnavailableError(self._sealer.halted)

    async def _retire_strays(self, job: Job) -> None:
        """Keys that were made for the thread and never became its own: by a create whose answer was lost."""
        cursor: str | None = None
        while True:
            try:
                page = await self._provider.list_keys(thread_id=job.thread, state="active", cursor=cursor)
            except ProviderRefusedError as error:
                _log.warning("keys_not_listed", job=job.id, code=error.code)  # a policy without `monitor` for us
                return
            if page.indexing:
                raise ProviderUnavailableError("the key service is still reading its keys")
            for key in page.keys:
                if key.purpose == "thread" and key.key_id.encode() != self._mapped(job.thread):
                    await self._provider.retire(key.key_id, request_id=job.id)
            cursor = page.next_cursor
            if cursor is None:
                return

    # --- re-encrypting --------------------------------------------------------------------------------------------
    async def _migrate(self, row: Row, pace: Pace) -> Row:
        """One pass, from the cursor to what is the end now. Some chunks are with the key service while others are on
        their way to the disk; each is written after the one before it, or not at all. Whatever fails, the pass begins
        again at the stored cursor."""
        job = row.job
        lower, _ = walk.bounds(job.thread)
        if job.cursor:
            lower = job.cursor.encode() + b"\0"
        ahead: deque[asyncio.Task[_Step]] = deque()
        writing: deque[Storing] = deque()
        try:
            for chunk in walk.chunks(self._engine, lower, walk.end_of(self._engine, job.thread), _chunk_records(pace)):
                read_at = self._writer.group
                left = [found for found in chunk.records if found.key_id != job.new_key]
                await pace.take(len(left) + SCAN_COST * (chunk.entries - len(left)))
                if not left and not chunk.malformed:
                    continue
                ahead.append(asyncio.create_task(self._reencrypt(job, chunk, left, read_at)))
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
            await _dropped(ahead)
            await asyncio.gather(*(storing.done for storing in writing), return_exceptions=True)

    async def _reencrypt(self, job: Job, chunk: walk.Chunk, left: Sequence[walk.Record], read_at: int) -> _Step:
        self._check_key_service()
        moved: list[tuple[walk.Record, bytes]] = []
        failures = [Failure(_shown(key), MALFORMED) for key in chunk.malformed]
        by_key: dict[str, list[walk.Record]] = {}
        for found in left:
            by_key.setdefault(found.key_id, []).append(found)
        for key_id, records in by_key.items():
            for found, outcome in zip(records, await self._reencrypt_from(job, key_id, records), strict=True):
                if isinstance(outcome, bytes):
                    moved.append((found, outcome))
                elif outcome.code in _TRANSIENT:
                    raise ProviderUnavailableError(f"the key service refused an item for now ({outcome.code})")
                else:
                    failures.append(Failure(_shown(found.key), outcome.code))
        return _Step(moved, failures, chunk.last, read_at)

    async def _reencrypt_from(
        self, job: Job, key_id: str, records: Sequence[walk.Record]
    ) -> Sequence[bytes | ProviderRefusedError]:
        items = [(found.sealed, found.key) for found in records]
        try:
            return await self._provider.reencrypt_many(key_id, job.new_key, items, request_id=job.id)
        except ProviderRefusedError as error:
            if error.code in _OF_THE_NEW_KEY:
                raise RotationFailedError(f"the new key can't be used ({error.code})") from error
            # One of the two keys is at fault. If the new one encrypts, it is the one that the records are under.
            await self._provider.encrypt_with_key(
                job.new_key, b"", aad=job.id.encode(), thread_id=job.thread, request_id=job.id
            )
            return [error] * len(records)

    def _write(self, row: Row, step: _Step) -> Storing:
        job = row.job
        puts: list[tuple[bytes, bytes | None]] = []
        kept = record_backups.key_of(job.id, b"")
        renewed: dict[bytes, bytes] = {}  # most records of a thread have one of a few headers
        for found, sealed in step.moved:
            head = renewed.get(found.head)
            if head is None:
                head = renewed[found.head] = record.rekeyed(found.head, job.new_key)
            puts.append((found.key, head + sealed))
            puts.append((kept + found.key, found.raw))
        sources = job.sources
        for key_id in {found.key_id for found, _ in step.moved}:
            sources = with_source(sources, key_id)
        after = changed(
            job,
            cursor=step.last.decode(),
            sources=sources,
            done=job.done + len(step.moved),
            moved=job.moved + len(step.moved),
            backups=job.backups + len(step.moved),
            failed=job.failed + len(step.failures),
            failures=named(job.failures, step.failures),
        )
        read = [(found.key, found.raw) for found, _ in step.moved]
        return self._table.submit(row, after, puts, read=read, read_at=step.read_at)

    # --- verifying ------------------------------------------------------------------------------------------------
    async def _verify(self, row: Row, pace: Pace) -> Row:
        """The census and the reading back in one pass; then the job is done, or goes back to running."""
        job = row.job
        left, verified, stored_at = 0, 0, time.monotonic()
        broken: list[Failure] = []
        ahead: deque[asyncio.Task[list[Failure]]] = deque()
        lower, _ = walk.bounds(job.thread)
        try:
            for chunk in walk.chunks(self._engine, lower, walk.end_of(self._engine, job.thread), _chunk_records(pace)):
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
            await _dropped(ahead)
        if broken:
            row = await self._table.store(
                row, changed(row.job, failed=row.job.failed + len(broken), failures=named(row.job.failures, broken))
            )
            raise RotationFailedError(f"{len(broken)} records do not open under the new key")
        if left:
            again = move(row.job, "again", cursor="", moved=0, failed=0, failures=(), verified=verified)
            return await self._table.store(row, again)
        return await self._finish(row, verified, pace)

    async def _check(self, job: Job, records: Sequence[walk.Record]) -> list[Failure]:
        """Those that do not open under the new key."""
        self._check_key_service()
        items = [(found.sealed, found.key) for found in records]
        outcomes = await self._provider.check_many(job.new_key, items, thread_id=job.thread, request_id=job.id)
        failures: list[Failure] = []
        for found, refused in zip(records, outcomes, strict=True):
            if refused is not None:
                if refused.code in _TRANSIENT:
                    raise ProviderUnavailableError(f"the key service refused an item for now ({refused.code})")
                failures.append(Failure(_shown(found.key), refused.code))
        return failures

    async def _finish(self, row: Row, verified: int, pace: Pace) -> Row:
        kept = 0
        for entries in walk.count(self._engine, *record_backups.bounds(row.job.id), _chunk_records(pace)):
            kept += entries
            await pace.take(SCAN_COST * entries)
        if kept != row.job.backups:
            raise RotationFailedError(f"{row.job.backups} backups were made, {kept} are there")
        await self._retire_strays(row.job)
        job = row.job
        due_ns = self._table.now_ns() + job.destroy_after_s * 1_000_000_000 if job.destroy_after_s else 0
        done = move(job, "finish", cursor="", verified=verified, total=job.done, reason="", destroy_at_ns=due_ns)
        row = await self._table.store(row, done)
        _log.info("job_done", job=job.id, thread=job.thread, records=job.done)
        return row


def _chunk_records(pace: Pace) -> int:
    return PACED_CHUNK_RECORDS_MAX if pace.bounded else CHUNK_RECORDS_MAX


async def _dropped(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _shown(key: bytes) -> str:
    return key.decode("ascii", errors="backslashreplace")
