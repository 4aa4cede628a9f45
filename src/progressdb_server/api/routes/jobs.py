"""Key rotations of threads: starting, watching and controlling their jobs, and the backups that jobs leave.

Owns: the JSON of these requests and responses, for admins only. The jobs room defines what a job is and does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Final, get_args

import msgspec

from minikms.api import KEY_ID_PATTERN
from progressdb_server.api.gate import limits
from progressdb_server.api.gate.errors import ApiError, bad_request
from progressdb_server.api.gate.keys import ADMINS
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import ApiResponse, EventStream, JsonList, encode_json, json_response
from progressdb_server.api.openapi.description import (
    BOTH,
    DISK,
    INTEGER,
    SWITCH,
    TEXT,
    JsonBody,
    Operation,
    Parameter,
    Schema,
    object_of,
    texts,
)
from progressdb_server.api.routes.paging import Paging
from progressdb_server.config import duration_s
from progressdb_server.jobs.rotation import Due
from progressdb_server.jobs.service import Jobs
from progressdb_server.jobs.states import SHOWN, THREADS_NAMED_MAX, Job, JobNotFoundError, State, TooManyJobsError, view
from progressdb_server.store.model import JOB_ID_PATTERN, Page, ThreadNotFoundError

RECORDS_PER_SECOND_MAX: Final = 10_000_000
KEK_VERSION_MAX: Final = 2**31
INVALID_REQUEST: Final = "invalid request"
THREAD_ID_MISSING: Final = "missing thread_id"
INVALID_WAIT: Final = "wait must be true or false"
TOO_MANY_THREADS: Final = f"thread_ids holds at most {THREADS_NAMED_MAX}"

# JSON has one type of number: 7.0 is as whole as 7.
_Rate = Annotated[float, msgspec.Meta(ge=0, le=RECORDS_PER_SECOND_MAX, multiple_of=1)]
_Version = Annotated[float, msgspec.Meta(ge=0, le=KEK_VERSION_MAX, multiple_of=1)]


class _RotationOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    records_per_second: _Rate | None = None
    """0 is without a bound; null is the bound of the server's configuration."""
    destroy_old_after: str = ""
    """A duration such as `30d`; empty is never."""

    @property
    def rate(self) -> int | None:
        return None if self.records_per_second is None else int(self.records_per_second)


class RotateThread(_RotationOptions, kw_only=True, forbid_unknown_fields=True):
    thread_id: str = ""


class RotateThreads(_RotationOptions, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of the four selections is given."""

    all: bool = False
    thread_ids: list[str] = []
    older_than: str = ""
    kek_version: _Version = 0


_ONE: Final = msgspec.json.Decoder(RotateThread)
_MANY: Final = msgspec.json.Decoder(RotateThreads)


def _seconds(text: str) -> int:
    """The seconds of a duration; 0 for an empty text. Raises ApiError 400."""
    try:
        return duration_s(text) if text else 0
    except ValueError:
        raise bad_request(INVALID_REQUEST) from None


def _selection(body: RotateThreads) -> Due | None:
    """Which threads are due; None if they are named. Raises ApiError 400 unless exactly one selection is given."""
    if sum(map(bool, (body.all, body.thread_ids, body.older_than, body.kek_version))) != 1:
        raise bad_request(INVALID_REQUEST)
    if body.older_than:
        return Due(age_s=_seconds(body.older_than))
    if body.kek_version:
        return Due(kek_version=int(body.kek_version))
    return Due() if body.all else None


# --- operations -------------------------------------------------------------------------------------------------------
_DURATION: Final[Schema] = {
    "type": "string",
    "pattern": "^([1-9][0-9]{0,8}[smhd])?$",
    "description": "A duration such as `90d`, `12h`, `30m` or `45s`.",
}
_RATE: Final[Schema] = {
    "type": ["integer", "null"],
    "minimum": 0,
    "maximum": RECORDS_PER_SECOND_MAX,
    "description": "Records to re-encrypt per second. 0: no limit. Null or absent: the limit of the server's "
    "configuration.",
}
_TYPES: Final = {field.name: field.type for field in msgspec.structs.fields(Job)}
_JOB: Final = object_of(
    **{shown: INTEGER if _TYPES[name] is int else TEXT for name, shown in SHOWN.items()}
    | {"status": {"enum": list(get_args(State))}, "failures": {"type": "array", "items": texts("key", "code")}}
)
_SELECTIONS: Final[dict[str, Schema]] = {
    "all": {"const": True},
    "thread_ids": {"minItems": 1},
    "older_than": {"minLength": 1},
    "kek_version": {"not": {"const": 0}},
}
_UNFINISHED: Final = "a job on this thread is unfinished"
_SWITCHING: Final = "the job is switching the thread's key: try again in a moment"
_RESTORING: Final = "another operation is running on this thread: try again in a moment"
_JOB_ID: Final = "job-01764000000000000000-0a1b2c3d"

_JOBS: Final = Paging("jobs", "before", "older", JOB_ID_PATTERN)
_ORPHANS: Final = Paging("keys", "after", "next", KEY_ID_PATTERN)
_LOST: Final = Paging("keys", "after", "next", limits.ID_PATTERN)
_for_admins: Final = partial(Operation, roles=ADMINS, needs=DISK)


def _control(action: str, *conflicts: str) -> Operation:
    """An operation that changes the state of a job."""
    path, errors = f"/admin/jobs/{{job}}/{action}", {409: conflicts}
    return _for_admins("POST", path, response=_JOB, errors=errors, raises=(JobNotFoundError,))


# --- handlers ---------------------------------------------------------------------------------------------------
class JobHandlers:
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    @_for_admins(
        "POST",
        "/admin/rotate_thread_dek",
        response=object_of(job_id=TEXT, new_key=TEXT, status=TEXT),
        status=202,
        other_responses={200: object_of(new_key=TEXT, status={"const": "ok"})},
        body=JsonBody(
            RotateThread,
            {
                "thread_id": {"type": "string", "minLength": 1},
                "records_per_second": _RATE,
                "destroy_old_after": _DURATION,
            },
            ("thread_id",),
        ),
        parameters=(
            Parameter("wait", SWITCH, "Respond with 200 at the end of the job instead of with 202 at its start."),
        ),
        errors={
            409: (_RESTORING, f"the job {_JOB_ID} is cancelled"),
            500: (f"the job {_JOB_ID} is failed: 7 records could not be re-encrypted",),
            503: ("the server is shutting down; the job continues after the next start",),
        },
        raises=(INVALID_REQUEST, THREAD_ID_MISSING, INVALID_WAIT, ThreadNotFoundError, TooManyJobsError),
    )
    async def rotate_one(self, request: ApiRequest) -> ApiResponse:
        """Rotate a thread's key: create a new key, and re-encrypt the records in a background job."""
        body = await request.json(_ONE, INVALID_REQUEST)
        if not body.thread_id:
            raise bad_request(THREAD_ID_MISSING)
        wait = request.query_params.get("wait", "false")
        if wait not in ("true", "false", "1", "0"):
            raise bad_request(INVALID_WAIT)
        after_s = _seconds(body.destroy_old_after)
        job = await self._jobs.rotation.rotate(body.thread_id, rate=body.rate, destroy_after_s=after_s)
        if wait in ("false", "0"):
            return json_response({"job_id": job.id, "new_key": job.new_key, "status": job.state}, 202)
        job = await self._jobs.wait(job.id)
        if job.state == "done":
            return json_response({"new_key": job.new_key, "status": "ok"})
        reason = f": {job.reason}" if job.reason else ""
        raise ApiError(500 if job.state == "failed" else 409, f"the job {job.id} is {job.state}{reason}")

    @_for_admins(
        "POST",
        "/admin/rotate_deks",
        response=object_of(count=INTEGER, job_ids={"type": "array", "items": TEXT, "maxItems": THREADS_NAMED_MAX}),
        status=202,
        body=JsonBody(
            RotateThreads,
            {
                "records_per_second": _RATE,
                "destroy_old_after": _DURATION,
                "older_than": _DURATION,
                "kek_version": {"type": "integer", "minimum": 0, "maximum": KEK_VERSION_MAX},
                "thread_ids": {"type": "array", "items": TEXT, "maxItems": THREADS_NAMED_MAX},
            },
            extra={
                "oneOf": [
                    {"properties": {name: selection}, "required": [name]} for name, selection in _SELECTIONS.items()
                ]
            },
        ),
        errors={409: (_RESTORING, f"{_JOB_ID} rotates other threads, or in another way: wait for it, or cancel it")},
        raises=(INVALID_REQUEST, TOO_MANY_THREADS, ThreadNotFoundError, TooManyJobsError),
    )
    async def rotate_many(self, request: ApiRequest) -> ApiResponse:
        """Rotate the keys of many threads. Without `thread_ids` one job rotates them one after another."""
        body = await request.json(_MANY, INVALID_REQUEST)
        due = _selection(body)
        after_s = _seconds(body.destroy_old_after)
        if len(body.thread_ids) > THREADS_NAMED_MAX:
            raise bad_request(TOO_MANY_THREADS)
        if due is not None:
            walk = await self._jobs.many.rotate(due, rate=body.rate, destroy_after_s=after_s)
            return json_response({"count": 1, "job_ids": [walk.id]}, 202)
        await self._jobs.rotation.require(body.thread_ids)  # either all jobs are started or none
        ids: list[str] = []
        for thread in body.thread_ids:
            job = await self._jobs.rotation.rotate(thread, rate=body.rate, destroy_after_s=after_s, later=True)
            ids.append(job.id)
        return json_response({"count": len(ids), "job_ids": ids}, 202)

    @_for_admins(
        "GET",
        "/admin/jobs",
        response=_JOBS.response(_JOB),
        parameters=(Parameter("status", TEXT, "Only jobs in this state."), *_JOBS.parameters),
        raises=_JOBS.errors,
    )
    async def jobs(self, request: ApiRequest) -> JsonList:
        """List jobs, newest first."""
        status = request.query_params.get("status", "")
        return self._listed(request, lambda job: status in ("", job.state))

    @_for_admins(
        "GET", "/admin/backups", response=_JOBS.response(_JOB), parameters=_JOBS.parameters, raises=_JOBS.errors
    )
    async def with_backups(self, request: ApiRequest) -> JsonList:
        """List the jobs that have backups of records, newest first."""
        return self._listed(request, lambda job: job.backups > 0)

    def _listed(self, request: ApiRequest, keeps: Callable[[Job], bool]) -> JsonList:
        """The list of jobs that `keeps` keeps. Raises ApiError 400."""
        page = _JOBS.read(request.query_params)
        return _JOBS.list(self._found(page, keeps), page)

    async def _found(self, page: Page | None, keeps: Callable[[Job], bool]) -> AsyncIterator[list[dict[str, object]]]:
        left = 0 if page is None else page.limit
        async for jobs in self._jobs.table.newest("" if page is None else page.cursor):
            matches = [job for job in jobs if keeps(job)]
            if page is not None:
                matches = matches[:left]
                left -= len(matches)
                if not left:
                    page.following = matches[-1].id if matches else ""
            yield [view(job) for job in matches]
            if page is not None and not left:
                return

    @_for_admins("GET", "/admin/jobs/{job}", response=_JOB, raises=(JobNotFoundError,))
    async def read(self, request: ApiRequest) -> ApiResponse:
        """Read a job."""
        return json_response(view(await self._job(request)))

    @_for_admins(
        "GET", "/admin/jobs/{job}/events", response=TEXT, content_type="text/event-stream", raises=(JobNotFoundError,)
    )
    async def events(self, request: ApiRequest) -> EventStream:
        """Follow a job: a server-sent event `job` now and after each change, until the job no longer runs."""
        return EventStream(self._events((await self._job(request)).id))

    async def _events(self, job_id: str) -> AsyncIterator[bytes]:
        async for job in self._jobs.watch(job_id):
            yield b"event: job\ndata: %b\n\n" % encode_json(view(job))

    async def _job(self, request: ApiRequest) -> Job:
        return await self._jobs.table.get(request.path_params["job"])

    @_control("pause", "a job that is done can't be paused", _SWITCHING)
    async def pause(self, request: ApiRequest) -> ApiResponse:
        """Pause a job."""
        return json_response(view(await self._jobs.pause(request.path_params["job"])))

    @_control(
        "resume",
        "a job that is done can't be resumed",
        "another job works on this thread",
        "the job's backups were restored: rotate the thread's key again",
        "a later rotation has given the thread another key",
    )
    async def resume(self, request: ApiRequest) -> ApiResponse:
        """Resume a paused or failed job."""
        return json_response(view(await self._jobs.resume(request.path_params["job"])))

    @_control("cancel", "a job that is done can't be cancelled", _SWITCHING)
    async def cancel(self, request: ApiRequest) -> ApiResponse:
        """Cancel a job. Records that it has re-encrypted stay under the new key."""
        return json_response(view(await self._jobs.cancel(request.path_params["job"])))

    @_for_admins(
        "POST",
        "/admin/jobs/{job}/restore",
        response=object_of(job_id=TEXT, restored=INTEGER, kept=INTEGER),
        raises=(JobNotFoundError,),
        errors={409: (_UNFINISHED, "the key of these backups was destroyed")},
    )
    async def restore(self, request: ApiRequest) -> ApiResponse:
        """Restore the records that a job has re-encrypted from the job's backups."""
        job_id = request.path_params["job"]
        outcome = await self._jobs.rotation.restore(job_id)
        return json_response({"job_id": job_id, "restored": outcome.restored, "kept": outcome.kept})

    @_for_admins(
        "GET",
        "/admin/orphaned_keys",
        response=_ORPHANS.response(texts("key_id", "thread_id", "created_at")),
        parameters=_ORPHANS.parameters,
        raises=_ORPHANS.errors,
        needs=BOTH,
    )
    async def orphaned_keys(self, request: ApiRequest) -> JsonList:
        """List the active keys of the key service that no thread of this store names."""
        page = _ORPHANS.read(request.query_params)
        return _ORPHANS.list(self._orphans(page), page)

    async def _orphans(self, selection: Page | None) -> AsyncIterator[list[dict[str, str]]]:
        async for page in self._jobs.orphans.find(selection):
            yield [{"key_id": key.key_id, "thread_id": key.thread_id, "created_at": key.created_at} for key in page]

    @_for_admins(
        "GET",
        "/admin/lost_keys",
        response=_LOST.response(texts("key_id", "thread_id")),
        parameters=_LOST.parameters,
        raises=_LOST.errors,
        needs=BOTH,
    )
    async def lost_keys(self, request: ApiRequest) -> JsonList:
        """List the threads whose key the key service does not have; `limit` is the number of threads to look at."""
        page = _LOST.read(request.query_params)
        return _LOST.list(self._lost(page), page)

    async def _lost(self, selection: Page | None) -> AsyncIterator[list[dict[str, str]]]:
        async for page in self._jobs.orphans.lost(selection):
            yield [{"key_id": key_id, "thread_id": thread_id} for thread_id, key_id in page]

    @_for_admins(
        "POST", "/admin/orphaned_keys/retire", response=object_of(retired=INTEGER, left=INTEGER, why=TEXT), needs=BOTH
    )
    async def retire_orphans(self, request: ApiRequest) -> ApiResponse:
        """Retire the orphaned keys, if only this server makes keys of threads there; `why` says why some are left."""
        return json_response((await self._jobs.orphans.retire())._asdict())

    @_for_admins(
        "DELETE",
        "/admin/jobs/{job}/backups",
        response=object_of(job_id=TEXT, removed=INTEGER),
        raises=(JobNotFoundError,),
        errors={409: (_UNFINISHED,)},
    )
    async def drop_backups(self, request: ApiRequest) -> ApiResponse:
        """Remove the backups of a job."""
        job_id = request.path_params["job"]
        return json_response({"job_id": job_id, "removed": await self._jobs.rotation.drop_backups(job_id)})
