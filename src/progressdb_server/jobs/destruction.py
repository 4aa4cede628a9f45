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
from progressdb_server.jobs.runner import WorkingKind
from progressdb_server.jobs.states import Job, JobError, changed
from progressdb_server.kms.provider import Fault, created_ns, fault, key_pages
from progressdb_server.store.model import RecordUnreadableError, StoreDamagedError

_log = Log()


class KeyDestruction(WorkingKind):
    async def begin(self) -> None:
        """Destroy the old keys that are due. One that can't be destroyed does not delay the others."""
        async for job in self.table.due():
            if not self.runner.has_job(job.thread):
                with contextlib.suppress(JobError):  # a job on the thread was begun, or the row removed, meanwhile
                    async with self.runner.alone(job):
                        await self.attempt(job.id)
            await asyncio.sleep(0)

    async def attempt(self, job_id: str) -> bool:
        """Destroy the old keys of a job if they are due. Returns whether it did. The caller makes sure that no other
        job runs on the thread meanwhile.

        Raises JobNotFoundError, StoreUnavailableError; KmsError when the key service is not available.
        """
        job = await self.table.get(job_id)
        if not 0 < job.destroy_at_ns <= self.table.now_ns():  # cancelled since it was found due
            return False
        try:
            job, reason = await self._check_conditions(job)
            if reason is None:
                for key_id in job.sources:
                    await self.provider.destroy_key(key_id, thread_id=job.thread, request_id=job_id)
                    _log.info("old_key_destroyed", job=job_id, thread=job.thread, key=key_id)
        except KmsRefusedError as error:
            if fault(error) is Fault.SERVICE:
                raise
            reason = f"the key service refused ({error.code})"
        except (RecordUnreadableError, StoreDamagedError) as error:
            reason = str(error)
        if reason is not None:
            if reason != job.destroy_waits_for:
                _log.warning("old_key_kept", job=job_id, reason=reason)
                await self.table.change(job_id, lambda now: changed(now, destroy_waits_for=reason))
            return False
        ends = {"destroyed_ns": self.table.now_ns(), "destroy_at_ns": 0, "destroy_waits_for": ""}
        await self.table.change(job_id, lambda now: changed(now, **ends))
        return True

    async def _check_conditions(self, job: Job) -> tuple[Job, str | None]:
        """The job, with the time of its census, and the condition that fails; None if all hold."""
        if reason := await self._needing_backup(job.census_ns):
            return job, reason
        keys = {key.key_id: key async for page in key_pages(self.provider, thread_id=job.thread) for key in page.keys}
        if reason := await self._needed_key(job, keys):
            return job, reason
        if job.census_ns <= _replaced_ns(job.sources, keys.values()):
            for of_thread in await self.table.with_backups(job.thread):
                await self.table.drop_backups(of_thread, under=job.sources)
            if reason := await self._records_left(job):
                return job, reason
            moment = await self._after_every_backup()
            job = await self.table.change(job.id, lambda now: changed(now, census_ns=moment))
        return job, await self._needing_backup(job.census_ns) or await self._records_left(job)

    async def _needed_key(self, job: Job, keys: Mapping[str, KeyAnswer]) -> str | None:
        """Which key can't be destroyed, and why; None if all can. `keys`: the keys of the job's thread that are not
        destroyed."""
        current = await self.store.rekeying.key_of_thread(job.thread)
        if current is None or current in job.sources:
            return "the key is the thread's current one"
        if left := await self.store.rekeying.count_under(job.thread, job.sources):
            return f"{left} records are under it: rotate the thread's key again"
        for key_id in job.sources:
            key = keys.get(key_id)
            if key is None and not await self._is_destroyed(key_id):
                return f"the key {key_id} is not listed among those of the thread"
            if key is not None and (key.purpose != "thread" or key.state != "retired"):
                return f"the key {key_id} has purpose {key.purpose} and is {key.state}"
        return None

    async def _is_destroyed(self, key_id: str) -> bool:
        """Whether the key is destroyed, by an interrupted attempt for example. The probe's ciphertext is one that no
        key opens."""
        probe = DecryptItem(key_id=key_id, ciphertext=bytes(SEAL_BYTES), aad=b"")
        (answer,) = await self.provider.decrypt_batch([probe])
        return isinstance(answer, KmsRefusedError) and answer.code == CODE_KEY_DESTROYED

    async def _records_left(self, job: Job) -> str | None:
        """The result of the census, which counts messages, metadata and the backups of jobs under the keys; None if
        there are none."""
        left = await self.store.rekeying.count_under(job.thread, job.sources)
        for of_thread in await self.table.with_backups(job.thread):
            count = 0
            async for chunk in self.store.rekeying.kept_records(of_thread):
                count += len(chunk)
                left += sum(one.key_id in job.sources for one in chunk)
                await asyncio.sleep(0)
            if count != (backups := (await self.table.get(of_thread)).backups):
                return f"job {of_thread} has {backups} backups, and {count} are found"
        return f"{left} records or backups are under it" if left else None

    async def _after_every_backup(self) -> int:
        """The current time, or a later one if the clock was set back: later than every registered backup."""
        created = [backup.created_ns + 1 async for backup in self.store.backups.registered()]
        return max(self.table.now_ns(), *created, 0)

    async def _needing_backup(self, census_ns: int) -> str | None:
        """Which backup may need the key, as a sentence; None if no backup does."""
        backups = [backup async for backup in self.store.backups.registered()]
        if not backups and not self.store.engine.makes_backups:
            return "no backup of the database is registered: progressdb backup register"
        for backup in backups:
            if backup.created_ns < census_ns:
                reason = f"the store's backup {backup.path} is older than the census and needs the key"
                if not backup.gone:
                    return reason
                when = "once it has expired" if backup.of_database else "it is not found there"
                return f"{reason}; {when}: progressdb backup forget {backup.name}"
        return None


def _replaced_ns(sources: Collection[str], keys: Iterable[KeyAnswer]) -> float:
    """The time of the last replacement of one of `sources`, which a census must follow: when the thread's next key was
    made. 0 if all are destroyed, infinity if there is no next key."""
    created = {key.key_id: created_ns(key) for key in keys}
    later = [ns for key_id, ns in created.items() if key_id not in sources]
    return max(
        (min((ns for ns in later if ns >= created[key]), default=math.inf) for key in sources if key in created),
        default=0,
    )
