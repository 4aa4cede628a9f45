"""Delayed destruction of retired keys: some time after a rotation, the old keys and the backups under
them are destroyed.

Owns: the conditions and their order. Invariants:
- Only retired keys of purpose `thread` are destroyed, and only those of the row's thread: the key service says so, and
  compares again. A row of a database is not believed.
- A key is destroyed only after a census found no record of the thread and no job's backup under the key. This census is
  later than the rotation's own, and is repeated directly before the destruction, which can't be undone. It must find as
  many records as the indexes name, and as many backups as the jobs' rows say. A row whose census was before the key's
  successor was made is not believed either.
- A key is kept while a registered backup of the store is older than that census, because it may hold such records. A
  database is backed up by other programs: without any registered backup it is not known what they hold.
- If a condition fails, the key stays, and the job's row names the reason (`destroy_waits_for`).
The receipt is the audit line of the key service, whose request id is the job's id.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Collection, Iterable, Mapping

from minikms.api import CODE_KEY_DESTROYED, SEAL_BYTES, KeyAnswer
from minikms.api.errors import KmsRefusedError
from minikms.client import DecryptItem
from minikms.platform.logs import Log
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs.runner import Kind, Runner
from progressdb_server.jobs.states import Job, JobError, changed
from progressdb_server.kms.provider import Fault, Provider, created_ns, fault, key_pages
from progressdb_server.store.model import RecordUnreadableError, StoreDamagedError

_log = Log()


class KeyDestruction(Kind):
    def __init__(self, runner: Runner, store: Conversations, provider: Provider) -> None:
        self._runner = runner
        self._table = runner.table
        self._store = store
        self._provider = provider

    async def begin(self) -> None:
        """Destroy the old keys that are due. One that can't be destroyed does not delay the others."""
        async for job in self._table.due():
            if not self._runner.has_job(job.thread):
                with contextlib.suppress(JobError):  # a job on the thread was begun, or the row removed, meanwhile
                    async with self._runner.alone(job):
                        await self.attempt(job.id)
            await asyncio.sleep(0)

    async def attempt(self, job_id: str) -> bool:
        """Destroy the old keys of a job if they are due. Returns whether it did. The caller makes sure that no other
        job runs on the thread meanwhile.

        Raises JobNotFoundError, StoreUnavailableError; KmsError when the key service is not available.
        """
        job = await self._table.get(job_id)
        if not 0 < job.destroy_at_ns <= self._table.now_ns():  # cancelled since it was found due
            return False
        try:
            job, why = await self._check_conditions(job)
            if not why:
                for key_id in job.sources:
                    await self._provider.destroy_key(key_id, thread_id=job.thread, request_id=job_id)
                    _log.info("old_key_destroyed", job=job_id, thread=job.thread, key=key_id)
        except KmsRefusedError as error:
            if fault(error) is Fault.SERVICE:
                raise
            why = f"the key service refused ({error.code})"
        except (RecordUnreadableError, StoreDamagedError) as error:
            why = str(error)
        if why:
            if why != job.destroy_waits_for:
                _log.warning("old_key_kept", job=job_id, reason=why)
                await self._table.change(job_id, lambda now: changed(now, destroy_waits_for=why))
            return False
        ends = {"destroyed_ns": self._table.now_ns(), "destroy_at_ns": 0, "destroy_waits_for": ""}
        await self._table.change(job_id, lambda now: changed(now, **ends))
        return True

    async def _check_conditions(self, job: Job) -> tuple[Job, str]:
        """Returns the job, with the time of its census, and the failed condition (empty if all hold)."""
        why = await self._older_store_backup(job.census_ns)
        if why:
            return job, why
        keys = {key.key_id: key async for page in key_pages(self._provider, thread_id=job.thread) for key in page.keys}
        why = await self._obstacle(job, keys)
        if why:
            return job, why
        if job.census_ns <= _replaced_ns(job.sources, keys.values()):
            for of_thread in await self._table.with_backups(job.thread):
                await self._table.drop_backups(of_thread, under=job.sources)
            why = await self._records_left(job)
            if why:
                return job, why
            moment = await self._after_every_backup()
            job = await self._table.change(job.id, lambda now: changed(now, census_ns=moment))
        return job, await self._older_store_backup(job.census_ns) or await self._records_left(job)

    async def _obstacle(self, job: Job, keys: Mapping[str, KeyAnswer]) -> str:
        """`keys`: of the job's thread, those that are not destroyed."""
        current = await self._store.rekeying.key_of_thread(job.thread)
        if current is None or current in job.sources:
            return "the key is the thread's current one"
        if left := await self._store.rekeying.count_under(job.thread, job.sources):
            return f"{left} records are under it: rotate the thread's key again"
        for key_id in job.sources:
            key = keys.get(key_id)
            if key is None and not await self._is_destroyed(key_id):
                return f"the key {key_id} is not listed among those of the thread"
            if key is not None and (key.purpose != "thread" or key.state != "retired"):
                return f"the key {key_id} has purpose {key.purpose} and is {key.state}"
        return ""

    async def _is_destroyed(self, key_id: str) -> bool:
        """Such as by an attempt that was interrupted. The ciphertext is one that no key opens."""
        probe = DecryptItem(key_id=key_id, ciphertext=bytes(SEAL_BYTES), aad=b"")
        (answer,) = await self._provider.decrypt_batch([probe])
        return isinstance(answer, KmsRefusedError) and answer.code == CODE_KEY_DESTROYED

    async def _records_left(self, job: Job) -> str:
        """The census: counts messages, metadata and the backups of jobs that are under the keys."""
        left = await self._store.rekeying.count_under(job.thread, job.sources)
        for of_thread in await self._table.with_backups(job.thread):
            count = 0
            async for chunk in self._store.rekeying.kept_records(of_thread):
                count += len(chunk)
                left += sum(one.key_id in job.sources for one in chunk)
                await asyncio.sleep(0)
            if count != (backups := (await self._table.get(of_thread)).backups):
                return f"job {of_thread} has {backups} backups, and {count} are found"
        return f"{left} records or backups are under it" if left else ""

    async def _after_every_backup(self) -> int:
        """The current time, or a later one if the clock was set back: later than every registered backup."""
        known = [known.created_ns + 1 async for page in self._store.backups.registered() for known in page]
        return max(self._table.now_ns(), *known, 0)

    async def _older_store_backup(self, census_ns: int) -> str:
        none = True
        async for page in self._store.backups.registered():
            for known in page:
                none = False
                if known.created_ns < census_ns:
                    why = f"the store's backup {known.path} is older than the census and needs the key"
                    if known.of_database:
                        return f"{why}; once it has expired: progressdb backup forget {known.name}"
                    return f"{why}; it is not found there: progressdb backup forget {known.name}" if known.gone else why
        if none and not self._store.engine.makes_backups:
            return "no backup of the database is registered: progressdb backup register"
        return ""


def _replaced_ns(sources: Collection[str], keys: Iterable[KeyAnswer]) -> float:
    """When the thread's next key was made, for the last of `sources`: its census must be later. 0 if all are destroyed,
    infinity if there is no next one."""
    created = {key.key_id: created_ns(key) for key in keys}
    later = [ns for key_id, ns in created.items() if key_id not in sources]
    return max(
        (min((ns for ns in later if ns >= created[key]), default=math.inf) for key in sources if key in created),
        default=0,
    )
