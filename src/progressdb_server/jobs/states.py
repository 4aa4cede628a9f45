"""A job, and the one table of its states. No I/O, no clock.

Rules: a job waits (`queued`), re-encrypts (`running`), reads everything back (`verifying`) and is `done`. While a
verification finds records that are still under another key, the job goes back to `running`. `paused` and `failed` jobs
can be resumed; `cancelled` and `done` are final. A start of the server continues `queued`, `running` and `verifying`
jobs where they were. An illegal move raises and changes nothing; nothing else in the code may assign a state.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from progressdb_server.store.model import StatusError

State = Literal["queued", "running", "paused", "verifying", "done", "failed", "cancelled"]
Move = Literal["start", "verify", "again", "finish", "fail", "pause", "resume", "cancel"]

MOVES: Final[dict[tuple[State, Move], State]] = {
    ("queued", "start"): "running",
    ("running", "verify"): "verifying",
    ("verifying", "again"): "running",
    ("verifying", "finish"): "done",
    ("queued", "fail"): "failed",
    ("running", "fail"): "failed",
    ("verifying", "fail"): "failed",
    ("queued", "pause"): "paused",
    ("running", "pause"): "paused",
    ("verifying", "pause"): "paused",
    ("paused", "resume"): "queued",
    ("failed", "resume"): "queued",
    ("queued", "cancel"): "cancelled",
    ("running", "cancel"): "cancelled",
    ("verifying", "cancel"): "cancelled",
    ("paused", "cancel"): "cancelled",
}
UNFINISHED: Final[frozenset[State]] = frozenset({"queued", "running", "verifying", "paused"})
AT_WORK: Final[frozenset[State]] = frozenset({"queued", "running", "verifying"})
"""States in which the server works on a job."""
FINAL: Final[frozenset[State]] = frozenset({"cancelled", "done"})

FAILURES_NAMED_MAX: Final = 100
"""Records that a job names; it counts all."""
THREADS_NAMED_MAX: Final = 1024
"""The threads that one request may name."""
ALL_THREADS: Final = "*"
"""The thread in the row of a job on many threads; no thread has this id."""
SOURCES_MAX: Final = 32
"""Keys that a job remembers to have found records under."""


class JobError(StatusError):
    """Base of the tree; never raised itself. Its texts may be shown to an operator."""

    status = 409


class JobNotFoundError(JobError):
    status, text = 404, "job not found"


class JobConflictError(JobError):
    """The job, or another one on its thread, is in a state that forbids this."""


class ThreadBusyError(JobConflictError):
    text = "another server works on this thread: try again in a moment"


class TooManyJobsError(JobError):
    """The bound of unfinished jobs is reached."""

    status, text = 503, "too many jobs are unfinished: wait for some of them"
    retry_after_s = 60


class JobFailedError(JobError):
    """The job can't go on; the text says why."""


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """A record that could not be re-encrypted, or does not open any more: its storage key, and the reason in a word."""

    key: str
    code: str


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """The row of a job (docs/spec/jobs.md). `kind` names its kind; keys and backups are those of a rotation.

    `keying`: the new key may have been made already and is not the thread's yet. `sources`: every key that records were
    found under. `cursor`: the last storage key that this pass has finished; `moved` and `failed` count in this pass,
    `done` in all passes; `backups`: how many records are kept. `rate`: records a second; None is the server's own
    bound, 0 none. Times are Unix nanoseconds, 0 for never. `older_than_s` and `kek_version` are those of a walk over
    ALL_THREADS, which counts threads; `receipt` is that of a purge.
    """

    id: str
    thread: str
    created_ns: int
    updated_ns: int
    trigger: str = "admin"
    state: State = "queued"
    old_key: str = ""
    new_key: str = ""
    keying: bool = False
    sources: tuple[str, ...] = ()
    cursor: str = ""
    total: int = 0
    done: int = 0
    moved: int = 0
    failed: int = 0
    failures: tuple[Failure, ...] = ()
    verified: int = 0
    reason: str = ""
    rate: int | None = None
    backups: int = 0
    restored_ns: int = 0
    destroy_after_s: int = 0
    destroy_at_ns: int = 0
    census_ns: int = 0
    destroyed_ns: int = 0
    destroy_waits_for: str = ""
    kind: str = "rotation"
    older_than_s: int = 0
    kek_version: int = 0
    receipt: str = ""

    @property
    def unfinished(self) -> bool:
        return self.state in UNFINISHED


def move(job: Job, event: Move, **changes: Any) -> Job:
    """The job after the event, with further changes. Raises JobConflictError."""
    state = MOVES.get((job.state, event))
    if state is None:
        raise JobConflictError(f"a job that is {job.state} can't be {_DONE[event]}")
    return changed(job, state=state, **changes)


_DONE: Final[dict[Move, str]] = {
    "start": "started",
    "verify": "verified",
    "again": "run again",
    "finish": "finished",
    "fail": "failed",
    "pause": "paused",
    "resume": "resumed",
    "cancel": "cancelled",
}


def changed(job: Job, **changes: Any) -> Job:
    return msgspec.structs.replace(job, **changes)


def add_failures(failures: tuple[Failure, ...], more: list[Failure]) -> tuple[Failure, ...]:
    return (*failures, *more[: FAILURES_NAMED_MAX - len(failures)]) if more else failures


def with_source(sources: tuple[str, ...], key_id: str) -> tuple[str, ...]:
    return sources if key_id in sources or len(sources) >= SOURCES_MAX else (*sources, key_id)


_SHOWN_FIRST: Final = {"id": "job_id", "thread": "thread_id", "kind": "kind", "state": "status"}
_NOT_SHOWN: Final = frozenset(
    {"keying", "sources", "cursor", "moved", "rate", "census_ns", "destroy_after_s", "older_than_s", "kek_version"}
)
SHOWN: Final = _SHOWN_FIRST | {
    name: name for name in Job.__struct_fields__ if name not in _NOT_SHOWN and name not in _SHOWN_FIRST
}
"""The fields of a row that an operator sees, and their names there."""


def view(job: Job) -> dict[str, object]:
    """What an operator sees of a job."""
    fields: dict[str, object] = {public_name: getattr(job, name) for name, public_name in SHOWN.items()}
    failures = [msgspec.structs.asdict(failure) for failure in job.failures]
    return {**fields, "total": max(job.total, job.done + job.failed), "failures": failures}
