"""What can be wrong with a key service, as it sees itself: the list of its conditions.

Owns: the name, the severity, the threshold and the words of each condition, and those that follow from the members of a
status. Invariants: a condition that could not be judged is one of its own, never none; the daemon judges, and every
other program shows what it reports; nothing of another program is listed here, since the daemon loads this module.
The message server has a list of its own. It must never do I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from msgspec.structs import replace

from minikms import api
from minikms.api import Condition
from minikms.platform.clock import unix_seconds

FAILING: Final = "failing"
DEGRADED: Final = "degraded"
NOTICE: Final = "notice"
SEVERITIES: Final = (FAILING, DEGRADED, NOTICE)

DISK_FULL_BYTES: Final = 64 * 1024 * 1024
"""Below this keys can't be made, and soon no audit line fits."""
DISK_LOW_BYTES: Final = 1024 * 1024 * 1024
AUDITOR_SILENT_SECONDS: Final = 30
"""It reports every 5 s."""
AUDITOR_LAG_LINES: Final = 10_000
KEK_OLD_DAYS: Final = 365
LEASE_LEFT_PERCENT: Final = 25
"""A lease of a root key is renewed at half of its time."""
DAY_SECONDS: Final = 86_400


def listed(*conditions: Condition) -> dict[str, Condition]:
    """A list by name. In a sentence, `{fact}` stands for what `state` gets."""
    return {condition.name: condition for condition in conditions}


# fmt: off
KEY_SERVICE: Final = listed(
    Condition("sealed", FAILING, "{reason}", "`minikms status` says what it waits for", "unseal"),
    Condition("standby", FAILING, "{reason}", "minikms replica status", "the-database-of-the-key-service-is-away"),
    Condition("audit_unavailable", FAILING, "{reason}, so every verb but status and metrics answers 503",
              "free space on its file system", "the-disk-is-full"),
    Condition("audit_lagging", FAILING, "{reason}", "minikms-auditor status", "the-auditor-is-away"),
    Condition("storage_unavailable", FAILING, "no key can be made or changed: {reason}", "the daemon tries again",
              "the-disk-is-full"),
    Condition("disk_full", DEGRADED, "only {free} KiB are free for the data directory or the audit log, so new keys "
              "are refused or soon will be", "free space on its file system", "the-disk-is-full"),
    Condition("disk_low", NOTICE, "{free} MiB are free for the data directory or the audit log",
              "make room before it is full", "the-disk-is-full"),
    Condition("keys_unreadable", DEGRADED, "{count} key files can't be read: `minikms doctor` names them",
              "restore them from a backup", "one-key-file-is-damaged"),
    Condition("journal_damaged", DEGRADED, "{count} records of the journal of key files were damaged at the start, and "
              "keys that only they had are lost",
              "run minikms doctor, and restore the keys that it names from a backup",
              "a-rotation-backup-or-the-journal-cant-be-read"),
    Condition("rotation_backups_unreadable", DEGRADED, "{count} rotation backups can't be read or written, first "
              "{first}", "destroying a key that they may hold is refused: correct this, or remove them",
              "a-rotation-backup-or-the-journal-cant-be-read"),
    Condition("rotation_backups_damaged", DEGRADED, "{count} rotation backups are damaged, first {first}",
              "no KEK is destroyed until you remove them by hand (the runbook says how)",
              "a-rotation-backup-or-the-journal-cant-be-read"),
    Condition("destruction_unfinished", DEGRADED, "the bytes of {count} destroyed keys could not be removed from the "
              "disk", "the daemon tries again", "the-disk-is-full"),
    Condition("audit_upkeep_failing", DEGRADED, "the {job} of the audit log fails: {reason}",
              "correct this; the daemon tries again", "the-disk-is-full"),
    Condition("kek_rotation_failing", DEGRADED, "a KEK rotation does not get on: {reason}",
              "remove the cause; the daemon tries again", "rotate-the-kek"),
    Condition("kek_rotation_unfinished", NOTICE, "a KEK rotation has rewrapped {rewrapped} of {total} keys",
              "it goes on while the daemon runs: minikms status", "rotate-the-kek"),
    Condition("kek_old", NOTICE, "the KEK is {days} days old", "minikms rotate-kek", "rotate-the-kek"),
    Condition("root_key_source", NOTICE, "{reason}"),
    Condition("root_key_replaced", NOTICE, "{reason}", "", "change-the-root-key"),
    Condition("root_key_not_pinned", DEGRADED, "root keys that are not pinned can't open the keyring at the next start "
              "or unseal: slots {slots}", "name each in the pin file, as root: minikms pin add SOURCE",
              "pin-the-root-keys"),
    Condition("root_key_revoking", NOTICE, "{count} removed root keys could open DEKs until the KEK rotation has ended"
              "{reason}", "", "several-root-keys"),
    Condition("root_key_not_written", DEGRADED, "the root key file could not be rewritten with the new root key",
              "write it there by hand", "change-the-root-key"),
    Condition("root_key_lease_ending", DEGRADED, "the lease of the root key has {left} s left, and is not renewed: "
              "{reason}", "minikms-unlock and its provider have to answer", "the-hsm-is-gone"),
    Condition("audit_keys_many", NOTICE, "the keyring holds {count} of at most {most} audit keys",
              "each removed root key takes one, and without one none can be removed or replaced"),
    Condition("own_uid_allowed", NOTICE, "the daemon's own uid may connect: this protects against leaks, not against a "
              "compromised server, which can read the key file and the data directory",
              "run the two under separate users, as the package does"),
    Condition("keys_in_server", NOTICE, "embedded: the keys are in the memory of the program that uses them",
              "for development only"),
    Condition("connections_few", NOTICE, "{reason}", "", "connections-wait"),
    Condition("seal_not_written", DEGRADED, "{reason}", "", "the-disk-is-full"),
    Condition("hardening_missing", NOTICE, "not in force: {measures}", "minikms status", "a-measure-is-not-in-force"),
    Condition("policy_not_reloaded", DEGRADED, "the policy file could not be reloaded, and the policy before it is in "
              "force: {reason}", "correct the file, then run `minikms policy reload`", "change-the-policy"),
    Condition("limit_used_up", DEGRADED, "hourly limits of the policy that refuse requests now: {count}",
              "find out who reads so much: `refused` lines with `limit_exceeded` in the audit log name it",
              "a-limit-is-used-up"),
    Condition("limit_nearly_used", NOTICE, "hourly limits of the policy of which less than a tenth is left: {count}",
              "find out who reads so much: minikms status", "a-limit-is-used-up"),
    Condition("auditor_none", NOTICE, "no auditor is attached: nobody else has the audit log",
              "minikms-auditor --help", "the-auditor-is-away"),
    Condition("auditor_silent", DEGRADED, "the auditor has not reported {since}", "minikms-auditor status",
              "the-auditor-is-away"),
    Condition("auditor_behind", DEGRADED, "the auditor has not taken {count} durable lines", "minikms-auditor status",
              "the-auditor-is-away"),
    Condition("replicator_silent", DEGRADED, "no replicator has asked {since}, so this host can't take over",
              "see that minikms-replicator runs", "a-host-of-the-key-service-is-lost"),
    Condition("host_refuses", DEGRADED, "this host follows no more: {reason}", "",
              "the-database-differs-from-its-hosts"),
    Condition("host_not_following", DEGRADED, "this host does not follow: {reason}", "",
              "a-host-of-the-key-service-is-lost"),
    Condition("host_not_taking_over", DEGRADED, "this host does not take over: {reason}", "",
              "the-database-differs-from-its-hosts"),
    Condition("host_behind", NOTICE, "this host lacks {count} changes of the database", "minikms replica status",
              "a-host-of-the-key-service-is-lost"),
    Condition("host_lost", DEGRADED, "the host {host} {reason}", "", "a-host-of-the-key-service-is-lost"),
    Condition("host_differs", DEGRADED, "{host} has another {what} than this host", "make them the same",
              "a-host-of-the-key-service-is-lost"),
    Condition("host_alone", DEGRADED, "no other host of the key service follows, so none can take over",
              "minikms replica list", "a-host-of-the-key-service-is-lost"),
    Condition("conditions_unknown", NOTICE, "the key service does not say here what is wrong with it: it is of an "
              "earlier version, or shows this caller only a part of its status",
              "on its machine, as a user with the role `monitor`: minikms status"),
)
# fmt: on


def state(name: str, **facts: object) -> Condition:
    """The condition of this name, with the facts in its sentence."""
    condition = KEY_SERVICE[name]
    return replace(condition, sentence=condition.sentence.format(**facts))


def reported(status: api.StatusAnswer) -> list[Condition]:
    """The conditions of a status, the worst first."""
    if status.conditions is not None:
        return by_severity(status.conditions)
    older = [Condition("warning", NOTICE, text) for text in status.warnings]
    failing = [state(status.status, reason=status.reason)] if status.status in KEY_SERVICE else []
    return [*failing, *older, state("conditions_unknown")]


def by_severity(conditions: Iterable[Condition]) -> list[Condition]:
    """The worst first. One with a severity that this version does not know is the last."""
    order = {severity: at for at, severity in enumerate(SEVERITIES)}
    return sorted(conditions, key=lambda one: order.get(one.severity, len(order)))


def gauge(listed: Mapping[str, Condition], conditions: Iterable[Condition]) -> Iterator[tuple[dict[str, str], float]]:
    """The samples of a gauge: 1 for a condition that holds, 0 for each other one of the list."""
    names = {one.name: one.severity for one in (*listed.values(), *conditions)}
    now = {one.name for one in conditions}
    for name, severity in names.items():
        yield {"condition": name, "severity": severity}, float(name in now)


def of_status(status: Mapping[str, Any], now_s: float) -> Iterator[Condition]:
    """The conditions that follow from members of a status, of an unsealed daemon."""
    if status["status"] in (api.CODE_STANDBY, api.CODE_AUDIT_LAGGING):
        yield state(status["status"], reason=status["reason"])
    if DISK_FULL_BYTES <= (free := status["disk_free_bytes"]) < DISK_LOW_BYTES:
        yield state("disk_low", free=f"{free // 1024**2:,}")
    yield from _kek(status, now_s)
    yield from _auditor(status["audit"]["position"])
    lease = status["root"]["lease"]
    if lease and (lease["last_failure"] or 100 * lease["left_seconds"] < LEASE_LEFT_PERCENT * lease["seconds"]):
        yield state("root_key_lease_ending", left=lease["left_seconds"], reason=lease["last_failure"] or "no answer")
    if status["policy"] and status["policy"]["budgets_exhausted"]:
        yield state("limit_used_up", count=f"{status['policy']['budgets_exhausted']:,}")
    yield from hardening(status["hardening"])


def hardening(measures: Iterable[Mapping[str, Any]]) -> Iterator[Condition]:
    missing = [f"{one['measure']}: {one['why']}" for one in measures if not one["in_force"]]
    if missing:
        yield state("hardening_missing", measures="; ".join(missing))


def _kek(status: Mapping[str, Any], now_s: float) -> Iterator[Condition]:
    rotation = status["rotation"]
    if rotation is None:
        created = max((kek["created_at"] for kek in status["keks"] if kek["state"] == "active"), default="")
        days = int((now_s - unix_seconds(created)) // DAY_SECONDS) if created else 0
        if days > KEK_OLD_DAYS:
            yield state("kek_old", days=days)
    elif rotation["last_error"]:
        yield state("kek_rotation_failing", reason=rotation["last_error"])
    else:
        total = "?" if rotation["total"] is None else f"{rotation['total']:,}"
        yield state("kek_rotation_unfinished", rewrapped=f"{rotation['rewrapped']:,}", total=total)


def _auditor(position: Mapping[str, Any] | None) -> Iterator[Condition]:
    if position is None:
        yield state("auditor_none")
        return
    age = position["age_seconds"]
    if age is None or age > AUDITOR_SILENT_SECONDS:
        yield state("auditor_silent", since="since the start" if age is None else f"for {age:,} s")
    elif position["lag_lines"] > AUDITOR_LAG_LINES or not position["seq"]:
        yield state("auditor_behind", count=f"{position['lag_lines']:,}")
