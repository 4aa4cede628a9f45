"""`progressdb rotate-dek`, `jobs …` and `rotation-backups …`: control of the jobs of a running server.

Owns: what these commands print. Exit status: 0 done, 1 refused or the job did not succeed, 2 no such job, thread or
file. Invariants: `--json` prints only JSON, one object or list; progress bars are drawn only on a terminal; only
`prune`, which destroys something, asks for confirmation.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from urllib.parse import quote

from cyclopts import App, Parameter

from minikms.commands.output import Table, confirm, counted, print_result, progress_bar
from minikms.commands.usage import CommandError
from progressdb_server.cli.admin_client import AdminClient, AdminFlags, UnreachableError
from progressdb_server.cli.flags import Json
from progressdb_server.config import duration_s
from progressdb_server.jobs.states import ALL_THREADS, THREADS_NAMED_MAX

ROTATE_TIMEOUT_S: Final = 600.0
"""For a request that starts many jobs, or that restores or removes all backups of a job."""
JOBS_PAGE: Final = 1000
RECONNECT_S: Final = 60.0
_COUNTED: Final = {"rotations": "threads rotated", "purge": "records removed"}
_OVER: Final = frozenset({"done", "failed", "cancelled", "paused"})

JobId = Annotated[str, Parameter(help="A job's id.")]

app = App(name="jobs", help="List, follow and control the background jobs of a running server.")
backups = App(name="rotation-backups", help="List, restore and remove the backups that key rotations made.")


# --- rotate-dek ---------------------------------------------------------------------------------------------------
def rotate_dek(
    *threads: Annotated[str, Parameter(name="THREAD", help="Ids of the threads.")],
    all_threads: Annotated[bool, Parameter(name="--all", help="Every thread.")] = False,
    older_than: Annotated[str, Parameter(help="Threads whose key is at least this old, as in 90d.")] = "",
    kek_version: Annotated[int, Parameter(help="Threads whose key is wrapped under this KEK version.")] = 0,
    destroy_old_after: Annotated[
        str, Parameter(help="Destroy the old key and the backups under it after this time, as in 30d; default: never.")
    ] = "",
    rate: Annotated[
        int | None, Parameter(help="Records per second; default: the bound of the server's configuration.")
    ] = None,
    unthrottled: Annotated[bool, Parameter(help="Re-encrypt without a bound.")] = False,
    wait: Annotated[bool, Parameter(help="Wait until the jobs have ended.", negative="--no-wait")] = True,
    as_json: Json = False,
    admin: AdminFlags = AdminFlags(),
) -> int:
    """Give threads new keys and re-encrypt their records, in the background, while the server runs.

    For example:
        progressdb rotate-dek thread-1 thread-2
        progressdb rotate-dek --older-than 90d
    """
    selections: dict[str, object] = {
        "thread_ids": list(threads),
        "all": all_threads,
        "older_than": older_than,
        "kek_version": kek_version,
    }
    filters = {name: value for name, value in selections.items() if value}
    if len(filters) != 1:
        raise CommandError("name threads, or give one of --all, --older-than and --kek-version")
    client = admin.client()
    how: dict[str, object] = {}
    if destroy_old_after:
        how["destroy_old_after"] = destroy_old_after
    if unthrottled or rate is not None:
        how["records_per_second"] = 0 if unthrottled else rate
    if len(threads) == 1:
        begun = client.call("POST", "/admin/rotate_thread_dek", {"thread_id": threads[0], **how})
        ids = [begun["job_id"]]
    else:
        starts = range(0, len(threads), THREADS_NAMED_MAX)
        parts: list[dict[str, object]] = [
            {"thread_ids": threads[start : start + THREADS_NAMED_MAX]} for start in starts
        ] or [filters]
        ids = []
        for part in parts:
            ids += client.call("POST", "/admin/rotate_deks", {**part, **how}, timeout_s=ROTATE_TIMEOUT_S)["job_ids"]
        begun = {"count": len(ids), "job_ids": ids}
    if not wait:
        text = f"{counted(len(ids), 'job')} started: {' '.join(ids[:10])}{' …' if len(ids) > 10 else ''}"
        print_result(begun, text, json=as_json)
        return 0
    ended = [_watch(client, job_id) for job_id in ids]
    print_result(ended, [_sentence(job) for job in ended], json=as_json)
    return 0 if all(job["status"] == "done" for job in ended) else 1


# --- jobs ---------------------------------------------------------------------------------------------------------
@app.command(name="list")
def list_jobs(
    *,
    status: Annotated[str, Parameter(help="Only jobs in this state.")] = "",
    limit: Annotated[int, Parameter(help="How many; 0: all.")] = JOBS_PAGE,
    as_json: Json = False,
    admin: AdminFlags = AdminFlags(),
) -> None:
    """List jobs, newest first."""
    jobs = _jobs(admin.client(), f"/admin/jobs?status={quote(status)}&", limit)
    _listed(jobs, as_json, "no jobs")


@app.command(name="show")
def show(job_id: JobId, *, as_json: Json = False, admin: AdminFlags = AdminFlags()) -> None:
    """Show a job, with the records that it could not re-encrypt."""
    job = admin.client().call("GET", _target(job_id))
    lines = [
        f"{name[:-3]}: {_moment(value)}" if name.endswith("_ns") else f"{name}: {value}"
        for name, value in job.items()
        if name != "failures"
    ]
    lines += [f"failed: {failure['key']} ({failure['code']})" for failure in job["failures"]]
    print_result(job, lines, json=as_json)


@app.command(name="watch")
def watch(job_id: JobId, *, as_json: Json = False, admin: AdminFlags = AdminFlags()) -> int:
    """Follow a job until it no longer runs."""
    job = _watch(admin.client(), job_id)
    print_result(job, _sentence(job), json=as_json)
    return 0 if job["status"] == "done" else 1


@app.command(name="pause")
def pause(job_id: JobId, *, as_json: Json = False, admin: AdminFlags = AdminFlags()) -> None:
    """Pause a job until it is resumed."""
    _control(job_id, "pause", as_json, admin.client())


@app.command(name="resume")
def resume(job_id: JobId, *, as_json: Json = False, admin: AdminFlags = AdminFlags()) -> None:
    """Resume a paused job, or retry a failed one."""
    _control(job_id, "resume", as_json, admin.client())


@app.command(name="cancel")
def cancel(job_id: JobId, *, as_json: Json = False, admin: AdminFlags = AdminFlags()) -> None:
    """Cancel a job. Records that it has re-encrypted stay under the new key; the others stay under the old key."""
    _control(job_id, "cancel", as_json, admin.client())


def _control(job_id: str, action: str, as_json: bool, client: AdminClient) -> None:
    job = client.call("POST", f"{_target(job_id)}/{action}")
    print_result(job, _sentence(job), json=as_json)


# --- backups ------------------------------------------------------------------------------------------------------
@backups.command(name="list")
def list_backups(*, as_json: Json = False, admin: AdminFlags = AdminFlags()) -> None:
    """List the jobs that have backups, newest first."""
    jobs = _jobs(admin.client(), "/admin/backups?")
    _listed(jobs, as_json, "no DEK rotation has kept records; backups of the store: progressdb backup list")


@backups.command(name="prune")
def prune(
    *job_ids: Annotated[str, Parameter(name="JOB-ID", help="Ids of the jobs.")],
    older_than: Annotated[
        str, Parameter(help="The backups of jobs that ended at least this long ago, as in 30d.")
    ] = "",
    every: Annotated[bool, Parameter(name="--all", help="The backups of every finished job.")] = False,
    yes: Annotated[bool, Parameter(name=["--yes", "-y"], help="Do not ask.")] = False,
    as_json: Json = False,
    admin: AdminFlags = AdminFlags(),
) -> None:
    """Remove backups permanently. The records themselves do not change."""
    if sum(map(bool, (job_ids, older_than, every))) != 1:
        raise CommandError("name jobs, or give one of --older-than and --all")
    client = admin.client()
    jobs = list(job_ids)
    if not jobs:
        jobs = [job["job_id"] for job in _jobs(client, "/admin/backups?") if _old(job, older_than)]
    if jobs:
        confirm(f"Remove the backups of {counted(len(jobs), 'job')} for good?", yes=yes)
    removed = [client.call("DELETE", f"{_target(job)}/backups", timeout_s=ROTATE_TIMEOUT_S) for job in jobs]
    total = sum(one["removed"] for one in removed)
    print_result(removed, f"{counted(total, 'backup')} of {counted(len(removed), 'job')} removed", json=as_json)


@backups.command(name="restore")
def restore(job_id: JobId, *, as_json: Json = False, admin: AdminFlags = AdminFlags()) -> None:
    """Restore the records that a job re-encrypted. The planned destruction of the old key is cancelled."""
    client = admin.client()
    outcome = client.call("POST", f"{_target(job_id)}/restore", timeout_s=ROTATE_TIMEOUT_S)
    text = f"{counted(outcome['restored'], 'record')} restored, {outcome['kept']} left: they were changed since"
    print_result(outcome, text, json=as_json)


def _old(job: dict[str, Any], older_than: str) -> bool:
    if job["status"] not in ("done", "failed", "cancelled"):
        return False
    try:
        limit_s = duration_s(older_than) if older_than else 0
    except ValueError as error:
        raise CommandError(f"--older-than {error}") from None
    return bool(time.time() - job["updated_ns"] / 1e9 >= limit_s)


# --- printing -----------------------------------------------------------------------------------------------------
def _watch(client: AdminClient, job_id: str) -> dict[str, Any]:
    """The job in the end. With a progress bar on a terminal: first of re-encrypting, then of reading back. A server
    that stops may be away for RECONNECT_S."""
    job: dict[str, Any] = client.call("GET", _target(job_id))
    what = _what(job)
    lost_at: float | None = None
    with progress_bar(f"{what}: rotating", visible=True) as progress:
        while job["status"] not in _OVER:
            try:
                for job in client.events(f"{_target(job_id)}/events"):
                    lost_at = None
                    if job["status"] == "verifying":
                        progress(job["verified"], job["total"] or None, f"{what}: reading back")
                    else:
                        progress(job["done"] + job["failed"], job["total"] or None)
            except UnreachableError:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > RECONNECT_S:
                    raise
                time.sleep(1)
    return job


def _jobs(client: AdminClient, target: str, limit: int = 0) -> list[dict[str, Any]]:
    """Page by page; 0: all."""
    jobs: list[dict[str, Any]] = []
    before: str | None = ""
    while before is not None and not 0 < limit <= len(jobs):
        page = client.call("GET", f"{target}limit={JOBS_PAGE}{before and f'&before={before}'}")
        jobs += page["jobs"]
        before = page.get("older")
    return jobs[: limit or None]


def _target(job_id: str) -> str:
    return f"/admin/jobs/{quote(job_id, safe='')}"


def _what(job: dict[str, Any]) -> str:
    return "all threads" if job["thread_id"] == ALL_THREADS else job["thread_id"]


def _sentence(job: dict[str, Any]) -> str:
    what = _COUNTED.get(job["kind"], "records re-encrypted")
    text = f"{_what(job)}: {job['status']}, {job['done']} of {job['total']} {what}"
    if job["failed"]:
        text += f", {job['failed']} failed (progressdb jobs show {job['job_id']})"
    if job["reason"]:
        text += f": {job['reason']}"
    return f"{text} [{job['job_id']}]"


def _listed(jobs: list[dict[str, Any]], as_json: bool, none: str) -> None:
    counts = ("done", "total", "failed", "backups")
    rows = [
        [job["job_id"], job["thread_id"], job["status"], *(job[name] for name in counts), _moment(job["updated_ns"]),
         job["reason"] or (job["destroy_waits_for"] and f"old key kept: {job['destroy_waits_for']}")]
        for job in jobs
    ]  # fmt: skip
    table = Table(("job", "thread", "status", *counts, "changed", "note"), rows, counts)
    print_result(jobs, table if jobs else none, json=as_json)


def _moment(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if ns else "never"
