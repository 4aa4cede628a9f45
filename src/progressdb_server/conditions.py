"""What can be wrong with a message server: the list of its conditions, and the look at all of them.

Owns: the name, the severity, the threshold and the words of each; those of the key service are what it reports
(`minikms.conditions`). Invariants: what could not be looked at is a condition, never none; one that fails is one for
which `/readyz` refuses. It must never write.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Final, Protocol

from msgspec.structs import replace

from minikms import api
from minikms.api import Condition
from minikms.conditions import DEGRADED, DISK_LOW_BYTES, FAILING, NOTICE, by_severity, listed, reported
from progressdb_server.config import Config, unknown_variables
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs.runner import Runner
from progressdb_server.jobs.states import AT_WORK, Job
from progressdb_server.store.model import StoreUnavailableError

HOUR_S: Final = 3600
BACKUP_OLD_S: Final = 26 * HOUR_S
"""A nightly backup is younger."""
CERTIFICATE_ENDS_S: Final = 14 * 24 * HOUR_S
JOB_STALLED_S: Final = HOUR_S / 2
JOBS_READ_MAX: Final = 1000

# fmt: off
SERVER: Final = listed(
    Condition("store_unavailable", FAILING, "it takes no writes: {reason}", "progressdb doctor", "the-disk-is-full"),
    Condition("store_disk_low", NOTICE, "{free} MiB are free for the store", "make room before it is full",
              "the-disk-is-full"),
    Condition("key_service_unavailable", FAILING, "its key service does not work: {reason}",
              "on its machine: minikms doctor", "it-does-not-answer"),
    Condition("key_service_unseen", NOTICE, "the key service does not show this server its status",
              "give the server's user the role `monitor`", "change-the-policy"),
    Condition("store_damaged", DEGRADED, "{reason}", "progressdb check", "the-store-is-damaged"),
    Condition("store_notice", DEGRADED, "{reason}", "progressdb doctor"),
    Condition("auditor_alarm", DEGRADED, "the auditor signs nothing: {reason}", "minikms-auditor status",
              "a-witness-refuses"),
    Condition("auditor_failing", DEGRADED, "the auditor has {count} problems, first {first}", "minikms-auditor status",
              "the-auditor-is-away"),
    Condition("auditor_unanswering", DEGRADED, "the auditor can't be asked: {reason}", "minikms-auditor status",
              "the-auditor-is-away"),
    Condition("auditor_unseen", NOTICE, "whether the auditor signs is not seen here: viewer.audit_socket is not set",
              "minikms-auditor status", "the-auditor-is-away"),
    Condition("backup_none", NOTICE, "no backup of the store is registered", "{command}", "back-up"),
    Condition("backup_old", DEGRADED, "the newest backup of the store is {hours} hours old", "{command}", "back-up"),
    Condition("backup_damaged", DEGRADED, "the newest backup of the store can't be restored: {reason}", "{command}",
              "back-up"),
    Condition("backups_unknown", DEGRADED, "which backups there are can't be read", "progressdb doctor", "back-up"),
    Condition("job_failed", DEGRADED, "job {job} has failed: {reason}", "progressdb jobs {verb} {job}",
              "jobs-do-not-run"),
    Condition("job_paused", NOTICE, "job {job} is paused{reason}", "progressdb jobs resume {job}", "jobs-do-not-run"),
    Condition("job_stalled", DEGRADED, "job {job} has done nothing for {minutes} minutes",
              "progressdb jobs show {job}", "jobs-do-not-run"),
    Condition("job_records_failed", DEGRADED, "{count} records of job {job} failed", "progressdb jobs show {job}",
              "jobs-do-not-run"),
    Condition("jobs_unseen", DEGRADED, "more than {count} jobs have failed or are unfinished, and older ones were not "
              "looked at", "progressdb jobs list", "jobs-do-not-run"),
    Condition("job_rows_damaged", DEGRADED, "the rows of {count} jobs are damaged", "progressdb check",
              "the-store-is-damaged"),
    Condition("due_work_failing", DEGRADED, "what is due could not be begun the last time: {reason}",
              "it is tried again; rotations and destructions wait", "jobs-do-not-run"),
    Condition("destruction_waiting", NOTICE, "the old key of job {job} is due to be destroyed and is not: {reason}",
              "progressdb jobs show {job}", "jobs-do-not-run"),
    Condition("jobs_unknown", DEGRADED, "the jobs can't be read", "progressdb doctor", "jobs-do-not-run"),
    Condition("certificate_ends", DEGRADED, "the certificate {path} ends in {days} days", "renew it",
              "a-certificate-has-expired"),
    Condition("certificate_expired", DEGRADED, "the certificate {path} has expired", "renew it",
              "a-certificate-has-expired"),
    Condition("certificate_unknown", DEGRADED, "the certificate {path} can't be read: {reason}", "correct the file",
              "a-certificate-has-expired"),
    Condition("settings_ignored", NOTICE, "{reason}", "correct or remove it"),
)
DOCTOR: Final = listed(
    Condition("keys_lost", DEGRADED, "the key service lacks the keys of {count} threads",
              "see `One key file is damaged` and `Restore` in the runbook", "restore"),
    Condition("keys_orphaned", DEGRADED, "no thread names {count} active keys", "progressdb doctor --repair"),
)
# fmt: on
"""Only `progressdb doctor` looks for these, which takes minutes. The server shows `store_damaged` once it reads a
thread whose key is lost."""


def state(name: str, **facts: object) -> Condition:
    """The condition of this name, with the facts in its sentence and in what to do."""
    one = {**SERVER, **DOCTOR}[name]
    return replace(one, sentence=one.sentence.format(**facts), action=one.action.format(**facts))


class Probes(Protocol):
    """What the look needs of `progressdb_server.api.routes.readiness.Readiness`."""

    status: api.StatusAnswer | None

    async def problems(self) -> tuple[str, str]: ...

    def damage(self) -> str: ...


class Look:
    """`auditor`: the conditions that an auditor's answer shows; None where none is configured."""

    def __init__(
        self,
        store: Conversations,
        probes: Probes,
        jobs: Runner,
        config: Config,
        auditor: Callable[[], Awaitable[list[Condition] | None]],
    ) -> None:
        self._store = store
        self._probes = probes
        self._jobs = jobs
        self._auditor = auditor
        self._store_dir = "" if config.store.url else config.storage.db_path
        self._certificates = [path for path in (config.server.tls.cert_file, config.kms.cert) if path]
        self._ignored = [state("settings_ignored", reason=text) for text in unknown_variables(os.environ)]

    async def conditions(self) -> list[Condition]:
        """Everything that this server and its key service know to be wrong, the worst first."""
        store, backups, now_s = self._store, self._store.backups, time.time()
        writes, problem = await self._probes.problems()
        status = self._probes.status
        conditions = [] if status is None else reported(status)
        if writes and writes != problem:
            conditions.append(state("store_unavailable", reason=writes))
        elif self._store_dir:
            conditions += await asyncio.to_thread(lambda: list(of_disk(self._store_dir)))
        if problem and not any(condition.severity == FAILING for condition in conditions):
            conditions.append(state("key_service_unavailable", reason=problem))
        elif status is None and not problem:
            conditions.append(state("key_service_unseen"))
        if damage := self._probes.damage():
            conditions.append(state("store_damaged", reason=damage))
        conditions += [state("store_notice", reason=text) for text in store.notices]
        of_auditor = await self._auditor()
        if of_auditor is None and status is not None and status.audit.position is not None:
            conditions.append(state("auditor_unseen"))
        conditions += of_auditor or []
        try:
            damage = await backups.damage_of_newest()
        except StoreUnavailableError as error:
            damage = str(error)
        conditions += of_backup(backups.newest_ns / 1e9, now_s, damage=damage, of_server=store.engine.makes_backups)
        try:
            conditions += [condition async for condition in self._of_jobs(now_s)]
        except StoreUnavailableError:
            conditions.append(state("jobs_unknown"))
        for path in self._certificates:
            conditions += of_certificate(path, now_s)
        return by_severity([*conditions, *self._ignored])

    async def _of_jobs(self, now_s: float) -> AsyncIterator[Condition]:
        table, read = self._jobs.table, 0
        async for page in table.standing(reverse=True):
            if read >= JOBS_READ_MAX:
                yield state("jobs_unseen", count=f"{read:,}")
                break
            for condition in of_jobs(page, now_s):
                yield condition
            read += len(page)
        async for job in table.due():
            if job.destroy_waits_for:
                yield state("destruction_waiting", job=job.id, reason=job.destroy_waits_for)
        if table.damaged:
            yield state("job_rows_damaged", count=f"{table.damaged:,}")
        for reason in filter(None, self._jobs.overdue.values()):
            yield state("due_work_failing", reason=reason)


def of_disk(directory: str) -> Iterator[Condition]:
    """The conditions of the file system that has the store."""
    try:
        disk = os.statvfs(directory)
    except OSError as error:
        yield state("store_unavailable", reason=f"{directory}: {os.strerror(error.errno or 0)}")
        return
    if (free := disk.f_bavail * disk.f_frsize) < DISK_LOW_BYTES:
        yield state("store_disk_low", free=f"{free // 1024**2:,}")


def of_backup(newest_s: float, now_s: float, *, damage: str, of_server: bool) -> Iterator[Condition]:
    """`newest_s`: Unix time, 0 without one, NaN if that can't be read. `of_server`: this server makes backups; if
    it does not, it knows those that somebody has registered."""
    command = f"progressdb backup {'create' if of_server else 'register'} NAME"
    if math.isnan(newest_s):
        yield state("backups_unknown")
    elif not newest_s:
        yield state("backup_none", command=command)
    elif damage:
        yield state("backup_damaged", reason=damage, command=command)
    elif now_s - newest_s > BACKUP_OLD_S:
        yield state("backup_old", hours=f"{int((now_s - newest_s) // HOUR_S):,}", command=command)


def of_jobs(jobs: Sequence[Job], now_s: float) -> Iterator[Condition]:
    for job in jobs:
        idle_s = now_s - job.updated_ns / 1e9
        if job.state == "failed":
            yield state("job_failed", job=job.id, reason=job.reason, verb=verb_for(job))
        elif job.state == "paused":
            yield state("job_paused", job=job.id, reason=f": {job.reason}" if job.reason else "")
        elif idle_s > JOB_STALLED_S:
            yield state("job_stalled", job=job.id, minutes=f"{int(idle_s // 60):,}")
        if job.failed and job.state in AT_WORK:
            yield state("job_records_failed", job=job.id, count=f"{job.failed:,}")


def verb_for(job: Job) -> str:
    """The subcommand of `progressdb jobs` that can help. A job whose key was destroyed can't go on."""
    if job.state in ("paused", "failed"):
        return "show" if api.CODE_KEY_DESTROYED in job.reason else "resume"
    return "pause" if job.unfinished else "show"


def of_certificate(path: str, now_s: float) -> Iterator[Condition]:
    try:
        end_s = certificate_end_s(path)
    except (OSError, ValueError) as error:
        yield state("certificate_unknown", path=path, reason=getattr(error, "strerror", None) or "it is no certificate")
        return
    if end_s < now_s:
        yield state("certificate_expired", path=path)
    elif end_s - now_s < CERTIFICATE_ENDS_S:
        yield state("certificate_ends", path=path, days=int((end_s - now_s) // (24 * HOUR_S)))


def certificate_end_s(path: str) -> float:
    from cryptography import x509  # a server without TLS does without

    with open(path, "rb") as file:
        return x509.load_pem_x509_certificate(file.read()).not_valid_after_utc.timestamp()
