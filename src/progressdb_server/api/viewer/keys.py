"""The keys that the viewer shows: what holds a retired one, and the command for each.

Owns: the page of keys. Invariant: a page costs at most PAGE_KEYS look-ups of jobs. It must never change a key.
"""

from __future__ import annotations

import contextlib
from typing import Final, NamedTuple

from minikms import api
from progressdb_server.api.viewer.browsing import format_time
from progressdb_server.jobs.states import Job, JobNotFoundError
from progressdb_server.jobs.table import JobTable
from progressdb_server.kms.provider import Provider
from progressdb_server.store.model import StoreUnavailableError

PAGE_KEYS: Final = 50


class ShownKey(NamedTuple):
    """A key, what holds a retired one, and the command for what can be done about it."""

    key: api.KeyAnswer
    held: str
    command: str


class ViewerKeyPage(NamedTuple):
    """`next_cursor`: empty on the last page."""

    keys: list[ShownKey]
    next_cursor: str = ""


class KeyBrowser:
    """Each method raises KmsError."""

    def __init__(self, provider: Provider, jobs: JobTable) -> None:
        self._provider = provider
        self._jobs = jobs

    async def page(self, *, thread: str, state: api.State | None, cursor: str) -> ViewerKeyPage:
        """Keys that are not destroyed, oldest first."""
        page = await self._provider.list_keys(
            thread_id=thread or None, state=state, cursor=cursor or None, limit=PAGE_KEYS
        )
        return ViewerKeyPage([await self._shown(key) for key in page.keys], page.next_cursor or "")

    async def one(self, key_id: str) -> ViewerKeyPage:
        return ViewerKeyPage([await self._shown(await self._provider.get_key(key_id))])

    async def _shown(self, key: api.KeyAnswer) -> ShownKey:
        if key.purpose != "thread":
            return ShownKey(key, "", f"minikms keys show {key.key_id}")
        if key.state == "active":
            return ShownKey(key, "", f"progressdb rotate-dek {key.thread_id}")
        job = await self._replacing(key)
        if job is None:
            return ShownKey(key, "this server knows no job that replaced it", f"minikms keys show {key.key_id}")
        held = job.destroy_waits_for
        if not held and job.destroy_at_ns:
            held = f"to be destroyed after {format_time(job.destroy_at_ns)} UTC"
        return ShownKey(key, held or "its destruction was not asked for", f"progressdb jobs show {job.id}")

    async def _replacing(self, key: api.KeyAnswer) -> Job | None:
        """The newest job of the thread that re-encrypted what was under the key, of those that this process has read:
        others would cost a walk over all jobs.
        """
        for job_id in reversed(self._jobs.of_thread(key.thread_id)):
            with contextlib.suppress(JobNotFoundError, StoreUnavailableError):
                job = await self._jobs.get(job_id)
                if key.key_id in job.sources:
                    return job
        return None
