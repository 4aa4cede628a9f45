"""What each operation on jobs is: as `api.described`, of the routes in `api.jobs`.

Owns: their descriptions. The invariants are those of `api.described`.
"""

from __future__ import annotations

from typing import Final

from progressdb_server.api.openapi.description import DISK, Described, Parameter, Schema, Taken, listed
from progressdb_server.api.routes.jobs import JOBS_NAMED_MAX, REFUSAL, THREADS_NAMED_MAX, RotateMany, RotateOne

_TEXT: Final[Schema] = {"type": "string"}
_COUNT: Final[Schema] = {"type": "integer"}
_DURATION: Final[Schema] = {
    "type": "string",
    "pattern": "^([1-9][0-9]{0,8}[smhd])?$",
    "description": "Such as `90d`, `12h`, `30m`, `45s`; empty: never.",
}
_RATE: Final[Schema] = {
    "type": ["integer", "null"],
    "minimum": 0,
    "maximum": 10_000_000,
    "description": "0 is as fast as it goes; without it, the server's own bound.",
}
_JOB: Final[Schema] = {
    "type": "object",
    "properties": {
        "job_id": _TEXT,
        "thread_id": _TEXT,
        "status": {"enum": ["queued", "running", "paused", "verifying", "done", "failed", "cancelled"]},
        "done": _COUNT,
        "total": _COUNT,
        "failed": _COUNT,
        "old_key": _TEXT,
        "new_key": _TEXT,
        "verified": _COUNT,
        "backups": _COUNT,
        "reason": _TEXT,
        "failures": {
            "type": "array",
            "items": {"type": "object", "properties": {"key": _TEXT, "code": _TEXT}, "required": ["key", "code"]},
        },
        "trigger": _TEXT,
        "created_ns": _COUNT,
        "updated_ns": _COUNT,
        "restored_ns": _COUNT,
        "destroy_at_ns": _COUNT,
        "destroy_waits_for": _TEXT,
        "destroyed_ns": _COUNT,
    },
    "required": ["job_id", "thread_id", "status", "done", "total", "failed", "old_key", "new_key"],
}
_BEGUN: Final[Schema] = {
    "type": "object",
    "properties": {"job_id": _TEXT, "new_key": _TEXT, "status": _TEXT},
    "required": ["job_id", "new_key", "status"],
}
_OVER: Final[Schema] = {
    "type": "object",
    "properties": {"new_key": _TEXT, "status": {"const": "ok"}},
    "required": ["new_key", "status"],
}
_CHOICES: Final[dict[str, Schema]] = {
    "all": {"const": True},
    "thread_ids": {"minItems": 1},
    "older_than": {"minLength": 1},
    "kek_version": {"not": {"const": 0}},
}
_NO_JOB: Final = {404: ("job not found",)}
_UNFINISHED: Final = "a job on this thread is unfinished"
_SWITCHING: Final = "the thread's key is just being switched: try again in a moment"
_RESTORING: Final = "the thread is being worked on: try again in a moment"
_TOO_MANY: Final = "too many jobs are unfinished: wait for some of them"
_AN_ID: Final = "job-01764000000000000000-0a1b2c3d"


def _counted(*names: str) -> Schema:
    return {
        "type": "object",
        "properties": {"job_id": _TEXT, **dict.fromkeys(names, _COUNT)},
        "required": ["job_id", *names],
    }


def _steered(what: str, *conflicts: str) -> Described:
    return Described(tag="operators", summary=what, answer=_JOB, refusals={**_NO_JOB, 409: conflicts}, needs=DISK)


JOBS_DESCRIBED: Final[dict[str, Described]] = {
    "POST /admin/rotate_thread_dek": Described(
        tag="operators",
        summary="Give a thread a new key and re-encrypt its records in a background job",
        answer=_BEGUN,
        status=202,
        answers={200: _OVER},
        body=Taken(
            RotateOne,
            {
                "thread_id": {"type": "string", "minLength": 1},
                "records_per_second": _RATE,
                "destroy_old_after": _DURATION,
            },
            ("thread_id",),
        ),
        parameters=(
            Parameter(
                "wait",
                {"type": "string", "enum": ["true", "false", "1", "0"]},
                "Answer 200 when the job is over, instead of 202 when it has begun.",
            ),
        ),
        refusals={
            400: (REFUSAL, "missing thread_id", "wait must be true or false"),
            404: ("thread not found",),
            409: (_RESTORING, f"the job {_AN_ID} is cancelled"),
            500: (f"the job {_AN_ID} is failed: 7 records could not be re-encrypted",),
            503: (_TOO_MANY, "the server is shutting down; the job goes on after its next start"),
        },
        needs=DISK,
    ),
    "POST /admin/rotate_deks": Described(
        tag="operators",
        summary="Queue the rotation of many threads' keys",
        answer={
            "type": "object",
            "properties": {
                "count": _COUNT,
                "job_ids": {"type": "array", "items": _TEXT, "maxItems": JOBS_NAMED_MAX},
            },
            "required": ["count", "job_ids"],
        },
        status=202,
        body=Taken(
            RotateMany,
            {
                "records_per_second": _RATE,
                "destroy_old_after": _DURATION,
                "older_than": _DURATION,
                "kek_version": {"type": "integer", "minimum": 0, "maximum": 2**31},
                "thread_ids": {"type": "array", "items": _TEXT, "maxItems": THREADS_NAMED_MAX},
            },
            beside={"oneOf": [{"properties": {name: chosen}, "required": [name]} for name, chosen in _CHOICES.items()]},
        ),
        refusals={
            400: (REFUSAL, f"thread_ids holds at most {THREADS_NAMED_MAX}"),
            404: ("thread not found",),
            409: (_RESTORING,),
            503: (_TOO_MANY, "the key service does not list its keys now"),
        },
        needs=DISK,
    ),
    "GET /admin/jobs": Described(
        tag="operators",
        summary="All jobs, newest first",
        answer=listed("jobs", _JOB),
        parameters=(Parameter("status", _TEXT, "Only those in this state."),),
        needs=DISK,
    ),
    "GET /admin/backups": Described(
        tag="operators",
        summary="The jobs that have left backups, newest first",
        answer=listed("jobs", _JOB),
        needs=DISK,
    ),
    "GET /admin/jobs/{job}": Described(tag="operators", summary="A job", answer=_JOB, refusals=_NO_JOB, needs=DISK),
    "GET /admin/jobs/{job}/events": Described(
        tag="operators",
        summary="Server-sent events: `job` after each change, until nobody works on it any more",
        answer={"type": "string"},
        content="text/event-stream",
        refusals=_NO_JOB,
        needs=DISK,
    ),
    "POST /admin/jobs/{job}/pause": _steered("Pause a job", "a job that is done can't be paused", _SWITCHING),
    "POST /admin/jobs/{job}/resume": _steered(
        "Resume a job that is paused or has failed",
        "a job that is done can't be resumed",
        "another job works on this thread",
        "the job's backups were restored: rotate the thread's key again",
        "a later rotation has given the thread another key",
    ),
    "POST /admin/jobs/{job}/cancel": _steered(
        "End a job where it is; what is re-encrypted stays", "a job that is done can't be cancelled", _SWITCHING
    ),
    "POST /admin/jobs/{job}/restore": Described(
        tag="operators",
        summary="Put back the records that a job has re-encrypted",
        answer=_counted("restored", "kept"),
        refusals={**_NO_JOB, 409: (_UNFINISHED, "the key of these backups was destroyed")},
        needs=DISK,
    ),
    "DELETE /admin/jobs/{job}/backups": Described(
        tag="operators",
        summary="Remove the backups that a job has left",
        answer=_counted("removed"),
        refusals={**_NO_JOB, 409: (_UNFINISHED,)},
        needs=DISK,
    ),
}
