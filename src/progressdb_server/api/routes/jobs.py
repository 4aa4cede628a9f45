"""Rotating threads' keys, watching and steering the jobs that do it, and the backups that they leave. For admins only.

Owns: the shapes of these requests and answers, and how the errors of jobs become statuses. What a job is and does is in
the jobs room.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Final

import msgspec

from progressdb_server.api.http import response
from progressdb_server.api.http.errors import ApiError, bad_request, not_found
from progressdb_server.api.http.request import Call
from progressdb_server.api.http.response import Answer, EventStream, JsonList
from progressdb_server.api.routes.table import ADMINS, Handler, Operation, Resource
from progressdb_server.config import duration_s
from progressdb_server.jobs.service import Due, Jobs
from progressdb_server.jobs.states import Job, JobError, JobNotFoundError, TooManyJobsError, view

THREADS_NAMED_MAX: Final = 1024
JOBS_NAMED_MAX: Final = 1000
"""Of one answer; the rest is counted."""
REFUSAL: Final = "invalid request"

# JSON knows one kind of number: 7.0 is as whole as 7
_Rate = Annotated[float, msgspec.Meta(ge=0, le=10_000_000, multiple_of=1)]
_Version = Annotated[float, msgspec.Meta(ge=0, le=2**31, multiple_of=1)]


class _How(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`records_per_second`: 0 is as fast as it goes; the server's own bound without it."""

    records_per_second: _Rate | None = None
    destroy_old_after: str = ""

    @property
    def rate(self) -> int | None:
        return None if self.records_per_second is None else int(self.records_per_second)


class RotateOne(_How, kw_only=True, forbid_unknown_fields=True):
    thread_id: str = ""


class RotateMany(_How, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of the first four."""

    all: bool = False
    thread_ids: list[str] = []
    older_than: str = ""
    kek_version: _Version = 0


_ONE: Final = msgspec.json.Decoder(RotateOne)
_MANY: Final = msgspec.json.Decoder(RotateMany)


def _seconds(text: str) -> int:
    try:
        return duration_s(text) if text else 0
    except ValueError:
        raise bad_request(REFUSAL) from None


def _refusal(error: JobError) -> ApiError:
    if isinstance(error, JobNotFoundError):
        return not_found(str(error))
    if isinstance(error, TooManyJobsError):
        return ApiError(503, str(error), ((b"retry-after", b"60"),))
    return ApiError(409, str(error))


def _selection(asked: RotateMany) -> Due | None:
    """What is due; None is everything. Raises ApiError unless exactly one selection is asked for."""
    if sum(map(bool, (asked.all, asked.thread_ids, asked.older_than, asked.kek_version))) != 1:
        raise bad_request(REFUSAL)
    if asked.older_than:
        return Due(age_s=_seconds(asked.older_than))
    return Due(kek_version=int(asked.kek_version)) if asked.kek_version else None


class JobRoutes:
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    # --- beginning ----------------------------------------------------------------------------------------------
    async def rotate_one(self, call: Call) -> Answer:
        """202 with the job, or with `wait=true` an answer when it is over."""
        asked = await call.json(_ONE, REFUSAL)
        if not asked.thread_id:
            raise bad_request("missing thread_id")
        wait = call.query.get("wait", "false")
        if wait not in ("true", "false", "1", "0"):
            raise bad_request("wait must be true or false")
        after_s = _seconds(asked.destroy_old_after)
        job = await self._jobs.rotate(asked.thread_id, rate=asked.rate, destroy_after_s=after_s)
        if wait in ("false", "0"):
            begun = {"job_id": job.id, "new_key": job.new_key, "status": job.state}
            return Answer(202, response.json_text(begun))
        job = await self._jobs.wait(job.id)
        if job.state == "done":
            return response.json({"new_key": job.new_key, "status": "ok"})
        why = f": {job.reason}" if job.reason else ""
        raise ApiError(500 if job.state == "failed" else 409, f"the job {job.id} is {job.state}{why}")

    async def rotate_many(self, call: Call) -> Answer:
        """202 with how many jobs there are, and the ids of the first."""
        asked = await call.json(_MANY, REFUSAL)
        due = _selection(asked)
        after_s = _seconds(asked.destroy_old_after)
        if len(asked.thread_ids) > THREADS_NAMED_MAX:
            raise bad_request(f"thread_ids holds at most {THREADS_NAMED_MAX}")
        ids: list[str] = []
        count = 0
        if asked.thread_ids:
            self._jobs.require(asked.thread_ids)  # all or none is begun
            jobs = self._listed(asked.thread_ids, asked.rate, after_s)
        else:
            jobs = self._jobs.select(due, rate=asked.rate, destroy_after_s=after_s)
        async for job in jobs:
            count += 1
            if len(ids) < JOBS_NAMED_MAX:
                ids.append(job.id)
        return Answer(202, response.json_text({"count": count, "job_ids": ids}))

    async def _listed(self, threads: list[str], rate: int | None, after_s: int) -> AsyncIterator[Job]:
        for thread in threads:
            yield await self._jobs.rotate_later(thread, rate=rate, destroy_after_s=after_s)

    # --- watching -----------------------------------------------------------------------------------------------
    async def jobs(self, call: Call) -> JsonList:
        """Newest first; `status` names one state."""
        return JsonList(b'{"jobs":[', self._pages(call.query.get("status", ""), with_backups=False))

    async def with_backups(self, call: Call) -> JsonList:
        """The jobs that have backups, newest first."""
        return JsonList(b'{"jobs":[', self._pages("", with_backups=True))

    async def _pages(self, status: str, *, with_backups: bool) -> AsyncIterator[list[dict[str, object]]]:
        for page in self._jobs.table.pages(newest_first=True):
            yield [view(job) for job in page if status in ("", job.state) and (job.backups or not with_backups)]

    async def read(self, call: Call) -> Answer:
        return response.json(view(self._job(call)))

    async def events(self, call: Call) -> EventStream:
        """Server-sent events: `job` after each change, until nobody works on it any more."""
        return EventStream(self._events(self._job(call).id))

    async def _events(self, job_id: str) -> AsyncIterator[bytes]:
        async for job in self._jobs.watch(job_id):
            yield b"event: job\ndata: %b\n\n" % response.json_text(view(job))

    def _job(self, call: Call) -> Job:
        return self._jobs.table.get(call.parameters["job"])

    # --- steering -----------------------------------------------------------------------------------------------
    async def pause(self, call: Call) -> Answer:
        return response.json(view(await self._jobs.pause(call.parameters["job"])))

    async def resume(self, call: Call) -> Answer:
        return response.json(view(await self._jobs.resume(call.parameters["job"])))

    async def cancel(self, call: Call) -> Answer:
        return response.json(view(await self._jobs.cancel(call.parameters["job"])))

    # --- backups ------------------------------------------------------------------------------------------------
    async def restore(self, call: Call) -> Answer:
        """Puts back what the job has re-encrypted."""
        job_id = call.parameters["job"]
        outcome = await self._jobs.restore(job_id)
        return response.json({"job_id": job_id, "restored": outcome.restored, "kept": outcome.kept})

    async def drop_backups(self, call: Call) -> Answer:
        job_id = call.parameters["job"]
        return response.json({"job_id": job_id, "removed": await self._jobs.drop_backups(job_id)})


def _for_admins(handler: Handler) -> Operation:
    async def told(call: Call) -> Answer | JsonList | EventStream:
        try:
            return await handler(call)
        except JobError as error:
            raise _refusal(error) from error

    return Operation(told, ADMINS)


def resources(jobs: Jobs) -> tuple[Resource, ...]:
    """The routes of jobs, each for admins only."""
    routes = JobRoutes(jobs)
    return (
        Resource("/admin/rotate_thread_dek", {"POST": _for_admins(routes.rotate_one)}),
        Resource("/admin/rotate_deks", {"POST": _for_admins(routes.rotate_many)}),
        Resource("/admin/jobs", {"GET": _for_admins(routes.jobs)}),
        Resource("/admin/backups", {"GET": _for_admins(routes.with_backups)}),
        Resource("/admin/jobs/{job}", {"GET": _for_admins(routes.read)}),
        Resource("/admin/jobs/{job}/events", {"GET": _for_admins(routes.events)}),
        Resource("/admin/jobs/{job}/pause", {"POST": _for_admins(routes.pause)}),
        Resource("/admin/jobs/{job}/resume", {"POST": _for_admins(routes.resume)}),
        Resource("/admin/jobs/{job}/cancel", {"POST": _for_admins(routes.cancel)}),
        Resource("/admin/jobs/{job}/restore", {"POST": _for_admins(routes.restore)}),
        Resource("/admin/jobs/{job}/backups", {"DELETE": _for_admins(routes.drop_backups)}),
    )
