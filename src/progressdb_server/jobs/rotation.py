"""Rotations of threads' keys: which threads are due, and the steps of a job, from wherever an earlier run has ended.

Owns: the rule for keys that are due (`Due`), the steps, what is written in each, and the backups that a job keeps.
Invariants:
- Only a thread's current key of purpose `thread` is ever due.
- The row is stored, then the key is made, then the thread's key and the row are switched in one write. Until that write
  no pause or cancel is accepted (`Job.keying`): the old key may be retired already. Writes of the thread wait while an
  attempt makes and switches the key. Between two attempts, a write may give the thread another key; the next attempt
  replaces that one.
- One write holds the new ciphertexts of a chunk, the old ones as backups, and the cursor: a kill repeats work and loses
  nothing. It fails unless every record is still what was read; then the chunk is read again.
- Plaintext does not leave the key service, neither while records are re-encrypted nor when they are read back.
- A job ends as `done` only after a pass over the whole thread found every record under the new key and opened it, found
  as many backups as it has re-encrypted records, and left the thread one active key.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import msgspec

from minikms import api
from minikms.api import KeyAnswer
from minikms.api.errors import KmsError, KmsRefusedError
from minikms.client import ReencryptItem
from minikms.platform.logs import Log
from progressdb_server.config import RotationSection, seconds
from progressdb_server.conversations.reading import cancel
from progressdb_server.jobs.runner import Throttle, WorkingKind
from progressdb_server.jobs.states import (
    AT_WORK,
    Failure,
    Job,
    JobConflictError,
    JobFailedError,
    add_failures,
    changed,
    move,
    with_source,
)
from progressdb_server.jobs.table import PendingRow, Row
from progressdb_server.kms.provider import Fault, created_ns, fault, key_pages
from progressdb_server.store.model import (
    Chunk,
    ClaimLostError,
    ConditionFailedError,
    Record,
    Restored,
    StaleRowError,
    StoreUnavailableError,
    ThreadNotFoundError,
)

CHUNK_RECORDS_MAX: Final = 512
CHUNKS_AHEAD: Final = 4
WRITES_AHEAD: Final = 8
"""Chunks that the key service has, and chunks on their way to the disk, where they share a sync."""
PACED_CHUNK_RECORDS_MAX: Final = 128
"""The records in a chunk of a job with a bounded rate, so that requests wait for a millisecond or two at most."""
SCAN_COST: Final = 0.1
VERIFY_COST: Final = 0.5
"""What reading a record that needs no re-encryption, and reading one back through the key service, counts against a
rate of records."""
PROGRESS_S: Final = 1.0
"""How often a verification stores its progress, which is also when it notices a pause."""
SWITCH_RETRY_S: Final = 0.1
COUNTED_RECORDS: Final = 1024
"""Records of a thread that are counted before other tasks get a turn."""
PAGE_PAUSE_S: Final = 0.02
"""Between two pages of keys, each of which the key service reads from files."""
KEY_WAIT_S: Final = 5.0
"""How long an answer waits for the new key. The job continues after that."""
MALFORMED: Final = "malformed"

_log = Log()


class Due(msgspec.Struct, frozen=True):
    """A key is due when it is at least `age_s` old, when so many records were written under it (`uses`; those that a
    rotation has moved to it don't count), or when it is under this KEK version; None: never for that reason.
    """

    age_s: int | None = None
    uses: int | None = None
    kek_version: int | None = None

    def why(self, key: KeyAnswer, now_ns: int) -> str:
        """The reason in a word, empty when the key is not due; `uses` aside."""
        if self.age_s is not None and now_ns - created_ns(key) >= self.age_s * 1_000_000_000:
            return "age"
        return "kek_version" if self.kek_version is not None and key.kek_version == self.kek_version else ""


class _Reencrypted(NamedTuple):
    """A chunk, re-encrypted: records with their new sealed parts, and the failures."""

    moved: list[tuple[Record, bytes]]
    failures: list[Failure]
    chunk: Chunk


@dataclass(eq=False)
class KeyRotation(WorkingKind):
    name: ClassVar[str] = "rotation"
    every_s = 3600.0

    settings: RotationSection
    exclusive: bool
    destroys: bool

    # --- beginning ------------------------------------------------------------------------------------------------
    async def rotate(
        self,
        thread: str,
        *,
        rate: int | None = None,
        destroy_after_s: int = 0,
        trigger: str = "admin",
        later: bool = False,
    ) -> Job:
        """Start a rotation, or return the unfinished one. When this returns, the thread has the new key, unless the key
        service is unavailable. With `later` it keeps its old key until a worker starts the job. Raises
        ThreadNotFoundError, TooManyJobsError, JobConflictError, StoreUnavailableError."""
        self.check_destroys(destroy_after_s)
        await self.require([thread])
        fields = {"rate": rate, "destroy_after_s": destroy_after_s, "trigger": trigger, "keying": not later}
        job = await self.runner.add(self, thread, **fields)
        if not later:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KEY_WAIT_S):
                    async for now in self.runner.watch(job.id, pause_s=0):
                        if not now.keying:
                            break
        return await self.table.get(job.id)

    def check_destroys(self, destroy_after_s: int) -> None:
        if destroy_after_s and not self.destroys:
            raise JobConflictError("no gateway takes a request to destroy a key: leave destroy_old_after out")

    async def due_threads(self, due: Due, now_ns: int) -> AsyncIterator[tuple[str, str]]:
        """Each thread whose current key is due at that time, with the reason; a later key is not. Raises KmsError,
        StoreUnavailableError."""
        async for page in key_pages(self.provider, state="active"):
            if page.indexing:
                raise StoreUnavailableError("the key service is still reading its keys")
            for key in page.keys:
                if key.purpose != "thread" or created_ns(key) > now_ns:
                    continue
                if await self.store.rekeying.key_of_thread(key.thread_id) != key.key_id:
                    continue
                if reason := due.why(key, now_ns) or await self._worn(key, due.uses):
                    yield key.thread_id, reason
            if page.next_cursor is not None:
                await asyncio.sleep(PAGE_PAUSE_S)

    async def _worn(self, key: KeyAnswer, uses: int | None) -> str:
        """`uses` if so many records were written since the thread has the key; empty if not."""
        left = uses
        if left is None:
            return ""
        since_ns = created_ns(key)
        async for count in self.store.rekeying.count_records(key.thread_id, COUNTED_RECORDS, since_ns=since_ns):
            left -= count
            if left <= 0:
                return "uses"
            await asyncio.sleep(0)
        return ""

    async def require(self, threads: Iterable[str]) -> None:
        """Checks that each thread can be rotated. Raises ThreadNotFoundError."""
        for thread in threads:
            if await self.store.rekeying.key_of_thread(thread) is None:
                raise ThreadNotFoundError

    async def begin(self) -> None:
        """Queue the threads whose keys have reached the configured age or number of records."""
        due = Due(age_s=seconds(self.settings.max_age) or None, uses=self.settings.max_uses or None)
        if due == Due():
            return
        destroy_after_s = seconds(self.settings.destroy_old_after)
        async for thread, reason in self.due_threads(due, self.table.now_ns()):
            await self.runner.place()
            with contextlib.suppress(JobConflictError, ThreadNotFoundError):  # tried again in an hour
                await self.rotate(thread, destroy_after_s=destroy_after_s, trigger=f"max_{reason}", later=True)

    async def resume(self, job: Job) -> Job:
        if job.restored_ns:
            raise JobConflictError("the job's backups were restored: rotate the thread's key again")
        if job.new_key and await self.store.rekeying.key_of_thread(job.thread) != job.new_key:
            raise JobConflictError("a later rotation has given the thread another key")
        if job.state == "failed":
            return move(job, "resume", cursor="", moved=0, failed=0, failures=(), reason="")
        return move(job, "resume")

    # --- backups --------------------------------------------------------------------------------------------------
    async def restore(self, job_id: str) -> Restored:
        """Put the old ciphertexts of the job's records back, and cancel the destruction of the old keys. Raises
        JobConflictError."""
        job = await self.table.get(job_id)
        async with self.runner.alone(job):
            if job.destroyed_ns:
                raise JobConflictError("the key of these backups was destroyed")
            keeps = {"destroy_at_ns": 0, "destroy_after_s": 0, "census_ns": 0, "destroy_waits_for": ""}
            await self.table.change(job_id, lambda now: changed(now, restored_ns=self.table.now_ns(), **keeps))
            restored = await self.store.rekeying.restore_kept(job_id)
        _log.info("backups_restored", job=job_id, restored=restored.restored, kept=restored.kept)
        return restored

    async def drop_backups(self, job_id: str) -> int:
        """Remove the job's backups; returns how many there were. Raises JobConflictError."""
        async with self.runner.alone(await self.table.get(job_id)):
            dropped = await self.table.drop_backups(job_id)
        _log.info("backups_dropped", job=job_id, dropped=dropped)
        return dropped

    # --- the steps ------------------------------------------------------------------------------------------------
    async def step(self, job_id: str, pace: Throttle) -> None:
        await self.prepare(job_id)
        row = await self.table.row(job_id)
        if row.job.state == "queued":
            row = await self.table.store(row, move(row.job, "start"))
        if await self._key_of(row.job.thread) != row.job.new_key:
            raise JobFailedError("a later rotation has given the thread another key")
        if not row.job.total:
            row = await self.table.store(row, changed(row.job, total=await self._count(row.job.thread)))
        while row.job.state in AT_WORK:
            if row.job.state == "running":
                row = await self._migrate(row, pace)
                if row.job.failed and not row.job.moved:
                    raise JobFailedError(f"{row.job.failed} records could not be re-encrypted")
                row = await self.table.store(row, move(row.job, "verify", cursor="", verified=0))
            row = await self._verify(row, pace)

    async def _count(self, thread: str) -> int:
        total = 0
        async for entries in self.store.rekeying.count_records(thread, CHUNK_RECORDS_MAX):
            total += entries
            await asyncio.sleep(0)
        return total

    # --- the key --------------------------------------------------------------------------------------------------
    async def _key_of(self, thread: str) -> str:
        key_id = await self.store.rekeying.key_of_thread(thread)
        if key_id is None:
            raise JobFailedError("the thread has no key")
        return key_id

    async def prepare(self, job_id: str) -> None:
        """Give the thread its new key, unless that was done before."""
        row = await self.table.row(job_id)
        job = row.job
        if job.new_key:
            return
        self.store.sealer.check_halted()
        old = await self._key_of(job.thread)
        if not job.keying or job.old_key != old:
            row = await self.table.store(row, changed(job, keying=True, old_key=old, sources=(old,)))
        with self.store.sealer.switching(job.thread):
            key = await self.provider.create_dek_for_thread(job.thread, replaces=old, request_id=job.id)
            self.store.sealer.check_halted()
            await self._switch_to(job_id, old, key.key_id)
        _log.info("key_switched", job=job_id, thread=job.thread, old_key=old, new_key=key.key_id)

    async def _switch_to(self, job_id: str, old: str, new: str) -> None:
        job = await self.table.get(job_id)
        switch = self.store.rekeying.key_switch(job.thread, old, new)
        while not (row := await self.table.row(job_id)).job.new_key:
            try:
                await self.table.store(row, changed(row.job, new_key=new, keying=False), switch)
            except ClaimLostError:
                raise
            except StaleRowError:
                continue
            except StoreUnavailableError:  # the write may have succeeded: read the row again
                await asyncio.sleep(SWITCH_RETRY_S)
            except ConditionFailedError:
                with contextlib.suppress(KmsError):  # where it is exclusive, the next rotation retires it
                    await self.provider.retire_key(new, request_id=job_id)
                raise
        # From here on every write is under the new key: it is a condition of each (store/sealer.py).
        self.store.sealer.forget(job.thread)

    async def _retire_unused(self, job: Job) -> None:
        """Keys that were made for the thread by a call whose answer was lost, and that it never got.

        Only where this server alone makes such keys: a key with this thread id may be another program's.
        """
        if not self.exclusive:
            return
        active: list[str] = []
        try:
            async for page in key_pages(self.provider, thread_id=job.thread, state="active"):
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
            if key_id != await self._key_of(job.thread) and not self.store.rekeying.making_key(job.thread):
                await self.provider.retire_key(key_id, request_id=job.id)

    # --- re-encrypting --------------------------------------------------------------------------------------------
    async def _migrate(self, row: Row, pace: Throttle) -> Row:
        """One pass, from the cursor to the newest record. Some chunks are with the key service while others are on
        their way to the disk; each is written after the one before it, or not at all. Whatever fails, the pass begins
        again at the stored cursor."""
        job = row.job
        ahead: deque[asyncio.Task[_Reencrypted]] = deque()
        writing: deque[PendingRow] = deque()
        chunks = self.store.rekeying.chunks(job.thread, _chunk_records(pace), behind=job.cursor, to_now=True)
        try:
            async for chunk in chunks:
                left = [each for each in chunk.records if each.key_id != job.new_key]
                await pace.take(len(left) + SCAN_COST * (chunk.entries - len(left)))
                if not left and not chunk.malformed:
                    continue
                ahead.append(asyncio.create_task(self._reencrypt(job, chunk, left)))
                if len(ahead) > CHUNKS_AHEAD:
                    writing.append(self._write(row, await ahead.popleft()))
                    row = writing[-1].row
                if len(writing) > WRITES_AHEAD:
                    await self.table.settle(writing.popleft())
            while ahead:
                writing.append(self._write(row, await ahead.popleft()))
                row = writing[-1].row
            while writing:
                await self.table.settle(writing.popleft())
            return row
        finally:
            await cancel(ahead)
            await asyncio.gather(*(pending.write.done for pending in writing), return_exceptions=True)

    async def _reencrypt(self, job: Job, chunk: Chunk, left: Sequence[Record]) -> _Reencrypted:
        self.store.sealer.check_halted()
        moved: list[tuple[Record, bytes]] = []
        failures = [Failure(name, MALFORMED) for name in chunk.malformed]
        by_key: dict[str, list[Record]] = {}
        for row in left:
            by_key.setdefault(row.key_id, []).append(row)
        for key_id, records in by_key.items():
            for row, outcome in zip(records, await self._reencrypt_from(job, key_id, records), strict=True):
                if isinstance(outcome, bytes):
                    moved.append((row, outcome))
                else:
                    failures.append(_failure(row, outcome))
        self.store.sealer.check_halted()
        return _Reencrypted(moved, failures, chunk)

    async def _reencrypt_from(
        self, job: Job, key_id: str, records: Sequence[Record]
    ) -> Sequence[bytes | KmsRefusedError]:
        try:
            return await self.provider.reencrypt_batch(key_id, job.new_key, _items(records), request_id=job.id)
        except KmsRefusedError as error:
            if fault(error) is Fault.SERVICE:
                raise
            if error.code == api.CODE_KEY_RETIRED:
                raise JobFailedError(f"the new key can't be used ({error.code})") from error
            # One of the two keys is at fault. If the new one encrypts, it is the one that the records are under.
            await self.provider.encrypt(job.new_key, b"", aad=job.id.encode(), thread_id=job.thread, request_id=job.id)
            return [copy.copy(error)] * len(records)  # without the traceback, which leads to the caller

    def _write(self, row: Row, step: _Reencrypted) -> PendingRow:
        job = row.job
        sources = job.sources
        for key_id in {each.key_id for each, _ in step.moved}:
            sources = with_source(sources, key_id)
        after = changed(
            job,
            cursor=step.chunk.cursor,
            sources=sources,
            done=job.done + len(step.moved),
            moved=job.moved + len(step.moved),
            backups=job.backups + len(step.moved),
            failed=job.failed + len(step.failures),
            failures=add_failures(job.failures, step.failures),
        )
        moves = self.store.rekeying.moves(job.id, job.new_key, step.moved, step.chunk.read_at)
        return self.table.submit(row, after, moves)

    # --- verifying ------------------------------------------------------------------------------------------------
    async def _verify(self, row: Row, pace: Throttle) -> Row:
        """The census and the reading back in one pass; after it the job is done or runs again."""
        job = row.job
        left, verified, stored_at = 0, 0, time.monotonic()
        broken: list[Failure] = []
        ahead: deque[asyncio.Task[list[Failure]]] = deque()
        chunks = self.store.rekeying.chunks(job.thread, _chunk_records(pace), to_now=True)
        try:
            async for chunk in chunks:
                current = [each for each in chunk.records if each.key_id == job.new_key]
                left += chunk.entries - len(current)
                await pace.take(VERIFY_COST * chunk.entries)
                ahead.append(asyncio.create_task(self._check(job, current)))
                if len(ahead) > CHUNKS_AHEAD:
                    broken += await ahead.popleft()
                verified += len(current)
                if time.monotonic() - stored_at > PROGRESS_S:
                    row = await self.table.store(row, changed(row.job, verified=verified))
                    stored_at = time.monotonic()
            while ahead:
                broken += await ahead.popleft()
        finally:
            await cancel(ahead)
        if broken:
            row = await self.table.store(
                row,
                changed(row.job, failed=row.job.failed + len(broken), failures=add_failures(row.job.failures, broken)),
            )
            raise JobFailedError(f"{len(broken)} records do not open under the new key")
        if left:
            again = move(row.job, "again", cursor="", moved=0, failed=0, failures=(), verified=verified)
            return await self.table.store(row, again)
        return await self._finish(row, verified, pace)

    async def _check(self, job: Job, records: Sequence[Record]) -> list[Failure]:
        """The records that do not open under the new key."""
        self.store.sealer.check_halted()
        outcomes = await self.provider.check_batch(
            job.new_key, _items(records), thread_id=job.thread, request_id=job.id
        )
        return [_failure(row, refused) for row, refused in zip(records, outcomes, strict=True) if refused is not None]

    async def _finish(self, row: Row, verified: int, pace: Throttle) -> Row:
        count = 0
        async for entries in self.store.rekeying.count_kept(row.job.id, _chunk_records(pace)):
            count += entries
            await pace.take(SCAN_COST * entries)
        if count != row.job.backups:
            raise JobFailedError(f"{row.job.backups} backups were made, {count} are there")
        await self._retire_unused(row.job)
        job = row.job
        due_ns = self.table.now_ns() + job.destroy_after_s * 1_000_000_000 if job.destroy_after_s else 0
        done = move(job, "finish", cursor="", verified=verified, total=job.done, reason="", destroy_at_ns=due_ns)
        row = await self.table.store(row, done)
        _log.info("job_done", job=job.id, thread=job.thread, records=job.done)
        return row


def _chunk_records(pace: Throttle) -> int:
    return PACED_CHUNK_RECORDS_MAX if pace.bounded else CHUNK_RECORDS_MAX


def _items(records: Sequence[Record]) -> list[ReencryptItem]:
    return [ReencryptItem(ciphertext=row.sealed, aad=row.aad) for row in records]


def _failure(row: Record, refused: KmsRefusedError) -> Failure:
    """The failure of the record. A refusal that says nothing about the record is raised."""
    if fault(refused) is Fault.SERVICE:
        raise copy.copy(refused)  # the caller's frame, to which its traceback leads, has the first one
    return Failure(row.name, refused.code)
