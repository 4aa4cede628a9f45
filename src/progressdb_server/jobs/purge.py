"""Purges of deleted threads: some time after a deletion, the thread's keys are destroyed, then its records are removed.

Owns: the conditions and their order. Invariants:
- A thread is purged only if its sealed records say that it was deleted so long ago (`conversations.purging`). While
  any of its keys is left, they are asked again: a row of a database is not believed. The key that opens them goes last.
- A record is removed once the key service says of its key that it is destroyed: a list leaves out unreadable keys.
- Before the first key goes, every record of the thread was read, and as many as the indexes name. Nothing is purged
  while the store has a damaged file.
- Only keys of purpose `thread` that are of this thread, says the key service, are destroyed; on a shared key service
  only those that open a record, or that the row of a job names. Backups of the store do not delay it: they are erased
  too.
- A clock that went forward begins no purge until the server has run for a day, in which an operator may correct it.
  The time is added up over restarts, by a clock that nobody sets.
- The row is the receipt (`Job.receipt`), and stays as long as other rows.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from minikms.api import CODE_KEY_DESTROYED, CODE_KEY_NOT_FOUND, KeyAnswer
from minikms.api.errors import KmsRefusedError
from minikms.client import ReencryptItem
from minikms.platform.logs import Log
from progressdb_server.conversations.purging import SeenClock
from progressdb_server.jobs.runner import Throttle, WorkingKind
from progressdb_server.jobs.states import JobConflictError, JobFailedError, changed, move
from progressdb_server.jobs.table import Row
from progressdb_server.kms.provider import Fault, fault, key_pages
from progressdb_server.store.model import (
    KeyServiceRefusedError,
    Record,
    RecordUnreadableError,
    StoreUnavailableError,
    ThreadNotFoundError,
)

CHUNK_RECORDS: Final = 128
DAY_NS: Final = 86_400 * 1_000_000_000
"""A clock that goes forward by more, since the newest record or the last look, is believed after so much running time.
"""
NAMED_MAX: Final = 32
"""Keys, and backups, that a receipt names; it counts all."""
PURGED: Final = "the thread is purged"

_log = Log()


@dataclass(eq=False)
class ThreadPurge(WorkingKind):
    name: ClassVar[str] = "purge"
    every_s = 3600.0

    after_s: int
    """Since the deletion; 0: never."""
    exclusive: bool
    boot_ns: Callable[[], int]

    def __post_init__(self) -> None:
        self._looked_ns = self.boot_ns()
        """When the clock was looked at last, or the server was started, by `boot_ns`."""
        self._newest_ns = self.store.rekeying.newest_ns or self.table.now_ns()

    @property
    def _before_ns(self) -> int:
        return self.table.now_ns() - self.after_s * 1_000_000_000

    async def _believes_clock(self) -> bool:
        now_ns, boot_ns = self.table.now_ns(), self.boot_ns()
        known = await self.store.purging.clock() or SeenClock(self._newest_ns, 0)
        ran_ns = boot_ns - self._looked_ns
        passed_ns = now_ns - (known.ahead_ns or known.believed_ns)
        jumps = passed_ns > ran_ns + DAY_NS
        # At most what has passed: another server may have counted a part of it.
        waited_ns = 0 if jumps else known.waited_ns + max(0, min(ran_ns, passed_ns))
        believes = not jumps and (not known.ahead_ns or waited_ns >= DAY_NS)
        seen = SeenClock(now_ns, 0) if believes else SeenClock(known.believed_ns, now_ns, waited_ns)
        await self.store.purging.keep_clock(seen)
        self._looked_ns = boot_ns
        return believes

    async def begin(self) -> None:
        """Queue the threads that were deleted so long ago, and of which no purge was begun that is not done: it may be
        cancelled meanwhile."""
        if not self.after_s or not await self._believes_clock():
            return
        await self.provider.list_keys(thread_id=None, state=None, cursor=None, limit=1)  # each purge needs it
        threads: set[str] = set()
        async for jobs in self.table.pages():
            threads |= {job.thread for job in jobs if job.kind == self.name and job.state != "done"}
            await asyncio.sleep(0)
        async for page in self.store.purging.deleted(self._before_ns):
            for thread in page:
                if thread not in threads:
                    await self.runner.place()
                    with contextlib.suppress(JobConflictError):  # tried again in an hour
                        await self.runner.add(self, thread, trigger="deleted_after")
            await asyncio.sleep(0)

    async def step(self, job_id: str, pace: Throttle) -> None:
        row = await self.table.row(job_id)
        if row.job.state == "queued":
            row = await self.table.store(row, move(row.job, "start"))
        try:
            if self.store.engine.damaged:
                raise JobFailedError("the store has damaged files: run progressdb check")
            if keys := await self._keys(row.job.thread):
                row = await self._erase(row, keys)
            await self._remove(row, pace)
        except (RecordUnreadableError, KeyServiceRefusedError, ThreadNotFoundError) as error:
            raise JobFailedError(str(error)) from error

    # --- keys -----------------------------------------------------------------------------------------------------
    async def _keys(self, thread: str) -> list[KeyAnswer]:
        """The keys that are neither destroyed nor unreadable for the key service."""
        keys: list[KeyAnswer] = []
        async for page in key_pages(self.provider, thread_id=thread):
            if page.indexing:
                raise StoreUnavailableError("the key service is still reading its keys")
            keys += [key for key in page.keys if key.purpose == "thread"]
        return keys

    async def _check_gone(self, key_ids: Collection[str], *codes: str) -> None:
        """Checks that no key is left. Raises JobFailedError for one that may still be there, and KmsError."""
        for key_id in sorted(key_ids):
            try:
                await self.provider.get_key(key_id)
            except KmsRefusedError as error:
                if error.code in codes:
                    continue
                if fault(error) is Fault.SERVICE:
                    raise
                raise JobFailedError(f"whether the key {key_id} is destroyed is not known: {error}") from error
            raise JobFailedError(f"the key {key_id} is not destroyed, and not among the keys of the thread")

    async def _erase(self, row: Row, keys: list[KeyAnswer]) -> Row:
        thread, purging = row.job.thread, self.store.purging
        last = await purging.newest(thread)
        named: set[str] = set()
        proofs: set[str] = set()
        listed = {key.key_id for key in keys}
        own: set[str] = set()
        records = 0
        async for chunk in self.store.rekeying.chunks(thread, CHUNK_RECORDS):
            named |= {one.key_id for one in chunk.records}
            proofs |= {one.key_id for one in chunk.records if one.aad == last or not purging.is_message(one.aad)}
            records += len(chunk.records)
            if not self.exclusive:
                own |= await self._opening(thread, chunk.records, listed - own)
            await asyncio.sleep(0)
        with_backups = await self.table.with_backups(thread)
        jobs = await self.table.all_of_thread(thread)
        of_jobs = {key_id for job in jobs for key_id in (job.old_key, job.new_key, *job.sources)}
        named |= of_jobs
        # Without the key that proves the deletion, others stay: of a create that came too late, for example.
        if not self.exclusive or proofs.isdisjoint(listed):
            keys = [key for key in keys if key.key_id in (named if self.exclusive else own | of_jobs)]
        unlisted = named.difference([""], (key.key_id for key in keys))
        if not keys:
            return row
        if not self.after_s:
            raise JobFailedError("retention.deleted_after is never now, or no gateway destroys a key")
        if left := await self.store.rekeying.count_under(thread, ()):
            raise JobFailedError(f"{left} records are malformed: run progressdb check")
        if len(proofs) > 1:
            raise JobFailedError("the thread's records are under two keys: rotate its key, then resume this job")
        if await purging.deleted_ns(thread) >= self._before_ns:
            raise JobFailedError("the thread was not deleted so long ago")
        await self._check_gone(unlisted, CODE_KEY_DESTROYED, CODE_KEY_NOT_FOUND)
        for job_id in with_backups:
            await self.table.drop_backups(job_id)
        for job in jobs:
            if job.destroy_at_ns:
                await self.table.change(job.id, lambda now: changed(now, destroy_at_ns=0, destroy_waits_for=PURGED))
        ids = sorted((key.key_id for key in keys), key=lambda key_id: key_id in proofs)
        names = tuple(dict.fromkeys((*row.job.sources, *ids)))  # with those of an attempt that was interrupted
        row = await self.table.store(row, changed(row.job, total=records, sources=names[:NAMED_MAX]))
        archives: dict[str, None] = {}
        active = {key.key_id for key in keys if key.state == "active"}
        for key_id in ids:
            if key_id in active:
                await self.provider.retire_key(key_id, request_id=row.job.id)
            answer = await self.provider.destroy_key(key_id, thread_id=thread, request_id=row.job.id)
            archives |= dict.fromkeys(answer.archives)
        purging.forget(thread)
        note = [f"; archives that may hold them: {_few(list(archives))}"] * bool(archives)
        receipt = "".join((f"keys destroyed: {_few(names)}", *note))
        return await self.table.store(row, changed(row.job, destroyed_ns=self.table.now_ns(), receipt=receipt))

    async def _opening(self, thread: str, records: Sequence[Record], key_ids: Collection[str]) -> set[str]:
        """The keys that open a record whose header names them: anyone who writes the store makes headers."""
        opening: set[str] = set()
        for key_id in key_ids:
            items = [ReencryptItem(ciphertext=one.sealed, aad=one.aad) for one in records if one.key_id == key_id]
            if items and None in await self.provider.check_batch(key_id, items, thread_id=thread):
                opening.add(key_id)
        return opening

    # --- records --------------------------------------------------------------------------------------------------
    async def _remove(self, row: Row, pace: Throttle) -> None:
        thread, purging = row.job.thread, self.store.purging
        last = await purging.newest(thread)
        # A key service that hides keys, or another one, says "not found": that is believed of keys destroyed here.
        codes = (CODE_KEY_DESTROYED, *([CODE_KEY_NOT_FOUND] if row.job.sources else []))
        gone_keys: set[str] = set()
        async for chunk in self.store.rekeying.chunks(thread, CHUNK_RECORDS):
            if chunk.malformed:
                raise RecordUnreadableError(f"the record {chunk.malformed[0]} is malformed")
            under = {one.key_id for one in chunk.records} - gone_keys
            await self._check_gone(under, *codes)
            gone_keys |= under
            removals = [(one.aad, one.raw) for one in chunk.records if one.aad != last and purging.is_message(one.aad)]
            await pace.take(len(removals))
            if removals:
                after = changed(row.job, done=row.job.done + len(removals))
                row = await self.table.store(row, after, purging.records(thread, removals))
        async for step in purging.members(thread):
            row = await self.table.store(row, row.job, step)
        backups = [backup.name async for backup in self.store.backups.registered()]
        if not self.store.engine.makes_backups:
            backups.append("those of the database")
        receipt = row.job.receipt or f"keys destroyed: {_few(row.job.sources)}"
        if backups:
            receipt += f"; backups of the store that may hold records: {_few(backups)}"
        ends = {"receipt": receipt, "done": row.job.done + (2 if last else 1)}
        done = move(move(row.job, "verify"), "finish", **ends)
        await self.table.store(row, changed(done, total=done.done), await purging.thread(thread))
        purging.forget(thread)
        _log.info("thread_purged", job=row.job.id, thread=thread, records=done.done)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(names[:NAMED_MAX]) + more
