"""The jobs of a server: the table of their kinds, and what runs them.

Owns: `Jobs.kinds`, and the removal of old rows and of old backups of rotations. A new kind of job is a module with a
`Kind`, an entry here, and the route that begins it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from minikms.platform import clock
from progressdb_server.config import Retention, RotationSection, seconds
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs.destruction import KeyDestruction
from progressdb_server.jobs.many import RotationsOfMany
from progressdb_server.jobs.orphans import OrphanedKeys
from progressdb_server.jobs.purge import ThreadPurge
from progressdb_server.jobs.rotation import KeyRotation
from progressdb_server.jobs.runner import Kind, Runner
from progressdb_server.jobs.states import FINAL, JobError
from progressdb_server.kms.provider import Provider

KEEP_ALL: Final = Retention(deleted_after="never", rotation_backups_after="never")
ROW_AGE_S: Final = 90 * 86_400
"""Age at which the row of a finished job is removed, if it has left no backups and no key to destroy."""


@dataclass(eq=False)
class OldRows(Kind):
    rotation: KeyRotation
    backups_after_s: int
    every_s = 3600.0

    async def begin(self) -> None:
        table, after_s = self.rotation.table, self.backups_after_s
        oldest_ns = table.now_ns() - ROW_AGE_S * 1_000_000_000
        kept_ns = table.now_ns() - after_s * 1_000_000_000 if after_s else 0
        async for page in table.pages():
            old = [
                job
                for job in page
                if (job.state in FINAL or (job.state == "failed" and not job.new_key))
                and job.updated_ns < oldest_ns
                and not (job.backups or job.destroy_at_ns)
            ]
            if old:
                await table.remove(old)
            for job in page:
                # What is not done has verified no record under the new key.
                if job.backups and job.state == "done" and job.created_ns < kept_ns:
                    with contextlib.suppress(JobError):  # another job is on the thread: in an hour
                        await self.rotation.drop_backups(job.id)
            await asyncio.sleep(0)


class Jobs(Runner):
    """Made in the event loop that uses it."""

    def __init__(
        self,
        store: Conversations,
        provider: Provider,
        settings: RotationSection,
        retention: Retention = KEEP_ALL,
        *,
        exclusive: bool,
        destroys: bool = True,
        stop: asyncio.Event | None = None,
        now_ns: Callable[[], int] = time.time_ns,
        boot_ns: Callable[[], int] = clock.boot_ns,
    ) -> None:
        """`exclusive`: only this server makes keys of purpose `thread` in the key service. `destroys`: it takes
        requests to destroy keys. `stop` as in `Runner`. `boot_ns`: a clock that nobody sets."""
        super().__init__(store, settings.records_per_second, stop or asyncio.Event(), now_ns)
        parts = self, store, provider
        self.rotation = KeyRotation(*parts, settings, exclusive, destroys)
        self.destruction = KeyDestruction(*parts)
        self.orphans = OrphanedKeys(store, provider, self.has_job, exclusive=exclusive)
        self.many = RotationsOfMany(*parts, self.rotation)
        self.purge = ThreadPurge(*parts, seconds(retention.deleted_after) if destroys else 0, exclusive, boot_ns)
        self.kinds = (
            self.rotation,
            self.many,
            self.purge,
            self.destruction,
            self.orphans,
            OldRows(self.rotation, seconds(retention.rotation_backups_after)),
        )
