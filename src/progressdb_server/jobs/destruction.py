"""The end of an old key: some time after a rotation it is destroyed, with the backups under it.

Owns: the conditions, and their order. Invariants: only keys of purpose `thread` that are retired; nothing is destroyed
before a census, later than that of the rotation, found no record of the thread and no backup of any job under the key;
nor while a registered backup of the store was made before that census, which holds such records; and the census is
repeated at the very end, since destroying is for good. A condition that does not hold leaves the key, and the job says
what it waits for. The receipt is the key service's audit line, whose request id is the job's id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final

import structlog

from progressdb_server.jobs import record_backups, walk
from progressdb_server.jobs.model import Job, changed
from progressdb_server.jobs.table import JobTable
from progressdb_server.kms.provider import Provider, ProviderRefusedError
from progressdb_server.store import keyspace
from progressdb_server.store.backup import registered_in
from progressdb_server.store.engine import Engine

CHUNK_RECORDS_MAX: Final = 256

_log = structlog.get_logger("progressdb.jobs")


class KeyDestruction:
    def __init__(self, engine: Engine, provider: Provider, table: JobTable) -> None:
        self._engine = engine
        self._provider = provider
        self._table = table

    async def attempt(self, job_id: str) -> bool:
        """Destroy the old keys of a job that is due; whether that was done. The thread has no other job meanwhile.

        Raises JobNotFoundError, ProviderUnavailableError, StoreUnavailableError.
        """
        job = self._table.get(job_id)
        if not 0 < job.destroy_at_ns <= self._table.now_ns():  # called off since it was found due
            return False
        try:
            job, why = await self._judged(job)
            if not why:
                for key_id in job.sources:
                    await self._provider.destroy(key_id, request_id=job_id)
                    _log.info("old_key_destroyed", job=job_id, thread=job.thread, key=key_id)
        except ProviderRefusedError as error:
            why = f"the key service refused ({error.code})"
        if why:
            if why != job.destroy_waits_for:
                _log.warning("old_key_kept", job=job_id, reason=why)
                await self._table.change(job_id, lambda now: changed(now, destroy_waits_for=why))
            return False
        ends = {"destroyed_ns": self._table.now_ns(), "destroy_at_ns": 0, "destroy_waits_for": ""}
        await self._table.change(job_id, lambda now: changed(now, **ends))
        return True

    async def _judged(self, job: Job) -> tuple[Job, str]:
        """The job, which may have got its census, and what stands in the way."""
        why = self._older_store_backup(job.census_ns) or await self._obstacle(job)
        if why:
            return job, why
        if not job.census_ns:
            for of_thread in await self._jobs_with_backups(job.thread):
                await record_backups.drop(self._engine, self._table, of_thread, under=job.sources)
            why = await self._records_left(job)
            if why:
                return job, why
            moment = self._after_every_backup()
            job = await self._table.change(job.id, lambda now: changed(now, census_ns=moment))
        return job, self._older_store_backup(job.census_ns) or await self._records_left(job)

    async def _obstacle(self, job: Job) -> str:
        mapped = self._engine.get(keyspace.key_map(job.thread))
        if mapped is None or mapped.decode() in job.sources:
            return "the key is the thread's current one"
        if left := await self._count_records(job.thread, job.sources):
            return f"{left} records are under it: rotate the thread's key again"
        wanted, cursor = set(job.sources), None
        while True:
            page = await self._provider.list_keys(thread_id=job.thread, cursor=cursor)
            for key in page.keys:
                if key.key_id in wanted and (key.purpose != "thread" or key.state != "retired"):
                    return f"the key {key.key_id} has purpose {key.purpose} and is {key.state}"
            cursor = page.next_cursor
            if cursor is None:
                return ""

    async def _records_left(self, job: Job) -> str:
        """The census: messages, metadata, backups of jobs."""
        left = await self._count_records(job.thread, job.sources)
        for of_thread in await self._jobs_with_backups(job.thread):
            left += await record_backups.count_under(self._engine, of_thread, job.sources)
        return f"{left} records or backups are under it" if left else ""

    async def _count_records(self, thread: str, under: Collection[str]) -> int:
        """Malformed ones count: nobody knows what they are under."""
        left = 0
        for chunk in walk.chunks(self._engine, *walk.bounds(thread), CHUNK_RECORDS_MAX):
            left += len(chunk.malformed) + sum(found.key_id in under for found in chunk.records)
            await asyncio.sleep(0)
        return left

    async def _jobs_with_backups(self, thread: str) -> list[str]:
        return [job.id for job in await self._table.of_thread(thread) if job.backups]

    def _after_every_backup(self) -> int:
        """Now, and past every backup that is registered, also where the clock has been set back since."""
        known = (known.created_ns for page in registered_in(self._engine) for known in page)
        return max(self._table.now_ns(), *(created_ns + 1 for created_ns in known), 0)

    def _older_store_backup(self, census_ns: int) -> str:
        for page in registered_in(self._engine):
            for known in page:
                if known.created_ns < census_ns:
                    why = f"the store's backup {known.path} is older than the census and needs the key"
                    return f"{why}; it is not found there: progressdb backup forget {known.name}" if known.gone else why
        return ""
