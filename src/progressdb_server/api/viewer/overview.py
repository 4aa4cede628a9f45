"""The overview: is all well, and what has the server done lately.

Owns: the parts that it names, each with a sentence and what to do; the charts. Invariants: it asks what `/readyz` asks,
the auditor for its alarm, and the newest backup for the lengths of its files; a part of which nothing is known is not
shown as well. It must never write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

from minikms import api
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.routes.readiness import Readiness
from progressdb_server.api.viewer.history import DAY_S, HOUR_S, History, Point, Totals
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs.states import UNFINISHED, Job
from progressdb_server.metrics import KmsMetrics
from progressdb_server.store.model import StoreUnavailableError

BACKUP_OLD_S: Final = 26 * HOUR_S
"""A nightly backup is younger."""
AUDITOR_OLD_S: Final = 30
"""It reports every 5 s."""
AUDITOR_LAG_LINES: Final = 10_000
KEK_OLD_S: Final = 365 * DAY_S
CHART_WIDTH: Final = 480
CHART_HEIGHT: Final = 120
_APPENDING: Final = re.compile(r"/v1/(threads/\{thread\}/)?messages")
_READING: Final = re.compile(r"/v1/.*")
_ENCRYPTING: Final = frozenset(("encrypt", "encrypt_batch"))
_DECRYPTING: Final = frozenset(("decrypt", "decrypt_batch"))


class Part(NamedTuple):
    """`state`: `good`, `warn` or `bad`. `do`: what to do, and the command for it."""

    name: str
    state: str
    sentence: str
    do: str = ""
    command: str = ""


class Line(NamedTuple):
    """`points`: of an SVG polyline. `last`: the newest value."""

    name: str
    points: str
    last: float


class Chart(NamedTuple):
    title: str
    unit: str
    top: float
    lines: list[Line]


def totals(metrics: ApiMetrics, kms: KmsMetrics) -> Totals:
    requests, seconds, errors = metrics.answered()
    return Totals(
        appends=metrics.counted("POST", _APPENDING),
        reads=metrics.counted("GET", _READING),
        encryptions=kms.answered(_ENCRYPTING),
        decryptions=kms.answered(_DECRYPTING),
        errors=errors,
        requests=requests,
        seconds=seconds,
    )


async def parts(
    store: Conversations, readiness: Readiness, jobs: Sequence[Job] | None, alarm: str | None, *, now_s: float
) -> list[Part]:
    """Each part of the service that this server knows of. `jobs`: None if they can't be read. `alarm`: as in
    `AuditorClient.alarm`."""
    writes, problem = await readiness.problems()
    try:
        damage = await store.backups.damage_of_newest()
    except StoreUnavailableError as error:
        damage = str(error)
    return [
        _store(writes, readiness.damage(), store.notices),
        _key_service(problem, readiness.kms),
        *of_status(readiness.kms.last_status, now_s, known=not problem, alarm=alarm),
        of_backup(store.backups.newest_ns / 1e9, now_s, damage=damage, registered=not store.engine.makes_backups),
        of_jobs(jobs),
    ]


def _store(writes: str, damage: str, notices: Sequence[str]) -> Part:
    if writes:
        return Part("Store", "bad", f"It takes no writes: {writes}", "See what the store says", "progressdb doctor")
    if damage:
        return Part("Store", "bad", damage, "Runbook: Damaged records", "progressdb check")
    if notices:
        return Part("Store", "warn", "; ".join(notices), "See what the store says", "progressdb doctor")
    return Part("Store", "good", "It takes reads and writes")


def _key_service(problem: str, kms: KmsMetrics) -> Part:
    where = f"at {kms.address}" if kms.address and len(kms.addresses) > 1 else ""
    by = "by its gateway" if kms.behind_gateway else ""
    serves = " ".join(filter(None, ("It serves", where, by)))
    if not problem:
        return Part("Key service", "good", serves)
    if "sealed" in problem:
        return Part("Key service", "bad", problem, "On its machine", "minikms unseal")
    return Part("Key service", "bad", problem, "On its machine", "minikms doctor")


def of_status(
    status: api.StatusAnswer | None, now_s: float, *, known: bool, alarm: str | None = None
) -> Iterator[Part]:
    """What the key service says of itself, unless it lets this server read no status. `alarm`: of the auditor."""
    if status is None or not status.root.provider:
        return
    if warnings := status.warnings:
        yield Part("Warnings of the key service", "warn", "; ".join(warnings), "On its machine", "minikms status")
    if not status.audit.writable:
        yield Part("Audit log", "bad", status.audit.unavailable_reason or "it can't be written", "", "minikms doctor")
    if status.replica is not None:
        yield _hosts(status.replica)
    if status.policy is not None and status.policy.budgets_exhausted:
        sentence = f"{status.policy.budgets_exhausted:,} of the policy refuse requests now"
        yield Part("Hourly limits", "warn", sentence, "On its machine", "minikms status")
    position = status.audit.position
    if position is None:
        yield Part(
            "Auditor",
            "warn",
            "None is attached: nobody else has the audit log",
            "To attach one",
            "minikms-auditor --help",
        )
    elif not known or position.age_seconds is None or position.age_seconds > AUDITOR_OLD_S:
        yield Part("Auditor", "bad", "It has not reported lately", "On its machine", "minikms-auditor status")
    elif alarm:
        yield Part("Auditor", "bad", alarm, "On its machine", "minikms-auditor status")
    elif not position.seq or position.lag_lines > AUDITOR_LAG_LINES:
        sentence = f"It has not taken {position.lag_lines:,} durable lines"
        yield Part("Auditor", "warn", sentence, "On its machine", "minikms-auditor status")
    elif alarm is None:
        sentence = "It reports; whether it signs is not seen here, since viewer.audit_socket is not set"
        yield Part("Auditor", "warn", sentence, "On its machine", "minikms-auditor status")
    else:
        yield Part("Auditor", "good", f"It signs, and has taken all but {position.lag_lines:,} durable lines")
    yield from _kek(status, now_s)


def _hosts(replica: api.ReplicaStatus) -> Part:
    """The part for a key service on several hosts, as the one that serves sees them."""
    standbys = [member for member in replica.members if member.member_id != replica.member_id]
    told = [_standby(member, replica.number) for member in standbys]
    good = [
        member for member in standbys if member.mode == "following" and member.seen_seconds <= api.MEMBER_SILENT_SECONDS
    ]
    sentence = f"{replica.serving or 'None'} serves in term {replica.term}; standbys: {', '.join(told) or 'none'}"
    state = "good" if good and len(good) == len(standbys) else "warn"
    return Part("Hosts of the key service", state, sentence, "On its machine", "minikms replica list")


def _standby(member: api.MemberStatus, number: int) -> str:
    if member.seen_seconds > api.MEMBER_SILENT_SECONDS:
        return f"{member.name} silent for {int(member.seen_seconds):,} s"
    return f"{member.name} {member.mode}, {max(0, number - member.number):,} changes behind"


def _kek(status: api.StatusAnswer, now_s: float) -> Iterator[Part]:
    if status.rotation is not None:
        running = status.rotation
        of = "" if running.total is None else f" of {running.total:,}"
        state = "bad" if running.last_error else "good"
        why = f"; {running.last_error}" if running.last_error else ""
        yield Part("KEK rotation", state, f"It runs: {running.rewrapped:,}{of} keys are rewrapped{why}")
        return
    made_s = max((_unix_s(kek.created_at) for kek in status.keks), default=0.0)
    if made_s:
        days = int((now_s - made_s) // DAY_S)
        state = "warn" if now_s - made_s > KEK_OLD_S else "good"
        command = "minikms rotate-kek" if state == "warn" else ""
        yield Part("Key-encryption key (KEK)", state, f"The newest is {days:,} days old", "", command)


def of_backup(newest_s: float, now_s: float, *, damage: str, registered: bool) -> Part:
    """The newest backup. `newest_s`: Unix time, 0 without one, NaN if that can't be read. `registered`: the database
    makes the backups, and this server knows only those that somebody has registered."""
    name, command = "Backup of the store", f"progressdb backup {'register' if registered else 'create'} NAME"
    if math.isnan(newest_s):
        return Part(name, "warn", "It can't be read which ones there are", "", "progressdb doctor")
    if not newest_s and registered:
        return Part(name, "warn", "Those that the database makes are not seen here: none is registered", "", command)
    if not newest_s:
        return Part(name, "warn", "There is none", "Make one", command)
    if damage:
        return Part(name, "bad", damage, "Make another one", command)
    hours = int((now_s - newest_s) // HOUR_S)
    if now_s - newest_s > BACKUP_OLD_S:
        return Part(name, "warn", f"The newest is {hours:,} hours old", "", command)
    return Part(name, "good", f"The newest is {hours:,} hours old; after {BACKUP_OLD_S // HOUR_S} this warns")


def of_jobs(jobs: Sequence[Job] | None) -> Part:
    if jobs is None:
        return Part("Jobs", "bad", "They can't be read now", "", "progressdb doctor")
    working = [job for job in jobs if job.state in UNFINISHED]
    stands = next((job for job in jobs if job.state in ("failed", "paused")), None)
    if stands is not None:
        why = f": {stands.reason}" if stands.reason else ""
        verb = "show" if api.CODE_KEY_DESTROYED in stands.reason else "resume"  # a job without its key can't go on
        return Part("Jobs", "warn", f"One is {stands.state}{why}", "", f"progressdb jobs {verb} {stands.id}")
    failed = next((job for job in working if job.failed), None)
    if failed is not None:
        return Part(
            "Jobs", "warn", f"{failed.failed:,} records of one failed", "Jobs", f"progressdb jobs show {failed.id}"
        )
    return Part("Jobs", "good", f"{len(working):,} of the newest are under way" if working else "None is under way")


def _unix_s(rfc3339: str) -> float:
    try:
        return datetime.fromisoformat(rfc3339).astimezone(UTC).timestamp()
    except ValueError:
        return 0.0


# --- charts -----------------------------------------------------------------------------------------------------------


def charts(history: History, *, day: bool) -> list[Chart]:
    used, latency = history.rates("appends", "reads", day=day), history.latency(day=day)
    keys, errors = history.rates("encryptions", "decryptions", day=day), history.rates("errors", day=day)
    return [
        _chart("Messages", "a second", ("appends", "reads"), used, day=day),
        _chart("Exchanges with the key service", "a second", ("encryptions", "decryptions"), keys, day=day),
        _chart("Mean time of a request", "ms", ("time",), latency, day=day),
        _chart("Answers with an error of the server", "a second", ("errors",), errors, day=day),
    ]


def _chart(title: str, unit: str, names: Sequence[str], points: Sequence[Point], *, day: bool) -> Chart:
    top = max((value for point in points for value in point.values), default=0.0)
    end_s = points[-1].at_s if points else 0.0
    period_s = DAY_S if day else HOUR_S
    lines: list[Line] = []
    for number, name in enumerate(names):
        at = [
            (
                CHART_WIDTH * (1 - (end_s - point.at_s) / period_s),
                CHART_HEIGHT * (1 - point.values[number] / (top or 1.0)),
            )
            for point in points
        ]
        last = points[-1].values[number] if points else 0.0
        lines.append(Line(name, " ".join(f"{x:.1f},{y:.1f}" for x, y in at), last))
    return Chart(title, unit, top, lines)
