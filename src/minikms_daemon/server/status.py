"""The answer to `GET /status`.

Owns: the status object, unsealed and sealed, and what a limited caller gets of it. Invariants: it contains no secret;
`warnings` are the conditions that a status of version 0.2.0 named; a principal behind a proxy reads nothing of files,
root keys and other principals. It must never do work that grows with the number of keys: it runs in the loop's thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from minikms import api
from minikms.api import Condition
from minikms.api.errors import StandbyError
from minikms.conditions import DISK_FULL_BYTES, by_severity, hardening, of_status, state
from minikms.http.accepting import bound_warning
from minikms.keys.keyring import AUDIT_KEYS_COUNT_MAX, AUDIT_KEYS_COUNT_WARN
from minikms.platform.logs import Log

if TYPE_CHECKING:
    from minikms.custody.vault import Indexing
    from minikms.datadir import DataDir
    from minikms.http import HttpServer
    from minikms_daemon.audit.maintenance import Maintenance
    from minikms_daemon.server.admission import Session
    from minikms_daemon.server.no_member import NoMember
    from minikms_daemon.server.run_context import RunContext
    from minikms_daemon.service.keks import KekVerbs

_ERROR_HIDDEN: Final = "the file is not valid"
_KEY_HIDDEN: Final = "k_…"


@dataclass(eq=False, repr=False, kw_only=True)
class StatusPage:
    """`build` makes the status of an unsealed daemon."""

    process: RunContext
    data: DataDir
    from_source: bool
    upkeep: Maintenance
    position: Callable[[], dict[str, object] | None]
    lagging: Callable[[], str]
    """Why verbs are refused because the auditor lags; empty if they are not."""
    indexing: Indexing
    keks: KekVerbs
    lease: Callable[[], dict[str, object] | None]
    replica: NoMember
    started_ns: int

    def __post_init__(self) -> None:
        self._started_under = self.data.slot.fingerprint
        self._provider = self.process.settings.root.name if self.from_source else self.data.slot.provider
        """The source of the root key; for one that a request gave, what its slot has recorded."""
        self._vault = self.data.vault
        self._damaged_records = self.data.replayed.damaged
        self._log = self.data.log
        self.server: HttpServer[Session] | None = None
        self._logger = Log()
        self._disk_was_full = self._log_refused = False
        self._dropped_before = self.data.log.events_dropped

    def build(self) -> dict[str, object]:
        body = self._vault.unlocked.body
        arena = self._vault.arena
        cache = self._vault.cache
        server = self.server
        conditions = list(self._conditions())
        status = {
            **self._service_status(),
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "uptime_seconds": _seconds_since(self.started_ns),
            "epoch": body.epoch,
            "keyring_id": body.keyring_id,
            "root": self._root(),
            "keks": [
                {
                    "version": kek.version,
                    "state": kek.state,
                    "created_at": kek.created_at,
                }
                for kek in body.keks
            ],
            "rotation": self._rotation_progress(),
            "pruning": self.keks.pruning.progress,
            "keys": self.indexing.status(),
            "audit": {
                **self._log.status(),
                "public_key": self._vault.unlocked.audit.current.public_key.hex(),
                "position": self.position(),
                "upkeep": {"faults": self.upkeep.faults},
            },
            "memory": {
                "arena": arena.backing,
                "locked_bytes": arena.locked_bytes,
                "keys_in_memory": len(cache),
                "cache_hits": cache.hits,
                "cache_misses": cache.misses,
                "cache_evictions": cache.evictions,
            },
            "hardening": [measure.status() for measure in self.process.measures],
            "http": _http(server),
            "policy": self.process.policy.status(),
            "replica": self.replica.status(),
            "disk_free_bytes": self._disk_free_bytes(),
            "warnings": [condition.text for condition in conditions],
        }
        return {**status, "conditions": by_severity([*conditions, *of_status(status, time.time())])}

    def _service_status(self) -> dict[str, str]:
        """The members `status` and `reason`."""
        if self._log.writable and not self.replica.serves:
            return {"status": api.CODE_STANDBY, "reason": str(StandbyError())}
        lagging = self.lagging() if self._log.writable else ""
        return {"status": api.CODE_AUDIT_LAGGING, "reason": lagging} if lagging else self._log.service_status()

    def watch_disk(self) -> None:
        """Logs when the disk has become nearly full and when it has room again; also the audit log's refusals. Asks a
        disk that is nearly full whether keys can be made. Call this every second."""
        full = self._disk_free_bytes() < DISK_FULL_BYTES
        if full:
            self._vault.journal.check_soon()
        if full != self._disk_was_full:
            self._disk_was_full = full
            say = self._logger.warning if full else self._logger.info
            say("disk nearly full" if full else "disk has room again", disk_free_bytes=self._disk_free_bytes())
        dropped = self._log.events_dropped
        refuses = not self._log.writable or dropped != self._dropped_before
        self._dropped_before = dropped
        if refuses != self._log_refused:
            self._log_refused = refuses
            if refuses:
                self._logger.warning("audit log refused", reason=self._log.status()["unavailable_reason"])
            else:
                self._logger.info("audit log written again", events_dropped=dropped)

    def _disk_free_bytes(self) -> int:
        """Bytes that this user may still write: the lesser of data directory and directory of the audit log."""
        disks = map(os.statvfs, {self.process.settings.flags.data_dir, self._log.directory})
        return min(disk.f_bavail * disk.f_frsize for disk in disks)

    def _root(self) -> dict[str, object]:
        """`fingerprint`: of the root key that this run was started under, or of the one that has replaced it."""
        body = self._vault.keyring.body
        slots = [slot.fingerprint for slot in body.slots]
        replacing = body.slot(self.keks.proved_slot_id)
        return {
            "provider": self._provider,
            "fingerprint": self._started_under
            if self._started_under in slots or replacing is None
            else replacing.fingerprint,
            "slots": slots,
            "lease": self.lease(),
        }

    def _rotation_progress(self) -> dict[str, Any] | None:
        """`total`: how many keys there are to rewrap, including those done; None while the index is not complete."""
        progress = self.keks.progress()
        if progress is None:
            return None
        index = self._vault.index
        left = len(index) - index.by_kek[progress["to_version"]]
        return {**progress, "total": progress["rewrapped"] + left if self.indexing.complete else None}

    def _conditions(self) -> Iterator[Condition]:
        """What no other member of the status shows as a whole."""
        body = self._vault.unlocked.body
        if self.process.settings.root.warning:
            yield state("root_key_source", reason=self.process.settings.root.warning)
        own, allowed = os.geteuid(), self.process.policy.policy.allowed
        if own in allowed and not allowed - {own, 0}:  # nobody else can be the message server
            yield state("own_uid_allowed")
        too_few = None if self.server is None else bound_warning(self.server.limits.connections_max)
        if too_few is not None:
            yield state("connections_few", reason=too_few)
        if any(slot.replaces for slot in body.slots):
            yield state(
                "root_key_replaced",
                reason="more than one root key opens the keyring: start once with the newest root key to drop the "
                "older ones"
                if not self.keks.replacing_error
                else f"the root key that was replaced still opens the keyring: {self.keks.replacing_error}",
            )
        pin = self.process.settings.opening.pin
        pinned = frozenset() if pin is None else pin.pinned()
        others = body.slots_of_others(self._vault.unlocked.member_id)
        unpinned = [
            slot.slot_id for slot in body.slots if slot.fingerprint not in pinned and slot.slot_id not in others
        ]
        if pin is not None and unpinned:
            yield state("root_key_not_pinned", slots=", ".join(unpinned))
        if body.revoking:
            error = self.keks.revocation_error
            yield state("root_key_revoking", count=len(body.revoking), reason=f"; {error}" if error else "")
        if (audit_keys := len(self._vault.unlocked.audit.audit_keys)) >= AUDIT_KEYS_COUNT_WARN:
            yield state("audit_keys_many", count=audit_keys, most=AUDIT_KEYS_COUNT_MAX)
        if self.keks.rewrite_failed:
            yield state("root_key_not_written")
        if self._vault.unreadable.count:
            yield state("keys_unreadable", count=self._vault.unreadable.count)
        if self._damaged_records:
            yield state("journal_damaged", count=self._damaged_records)
        backups = self._vault.rotation_backups
        if unreadable := sorted(backups.unreadable):
            yield state("rotation_backups_unreadable", count=len(unreadable), first=unreadable[0])
        if damaged := sorted(backups.damaged):
            yield state("rotation_backups_damaged", count=len(damaged), first=damaged[0])
        if unfinished := len(self._vault.unfinished_destructions):
            yield state("destruction_unfinished", count=unfinished)
        for job, reason in self.upkeep.faults.items():
            yield state("audit_upkeep_failing", job=job, reason=reason)
        if (free := self._disk_free_bytes()) < DISK_FULL_BYTES:
            yield state("disk_full", free=f"{free // 1024:,}")
        if refusal := self._vault.journal.refusal:
            yield state("storage_unavailable", reason=refusal)
        if not self._log.writable:
            yield state("audit_unavailable", reason=self._log.service_status()["reason"])
        yield from self.process.policy.conditions()
        yield from self.replica.conditions()


_REDUCED: Final = ("status", "uptime_seconds", "epoch", "keyring_id")
_REDUCED_KEYS: Final = ("indexing", "writable", "unavailable_reason")
_REDUCED_AUDIT: Final = ("head", "writable", "synced")


def reduced(status: dict[str, Any]) -> dict[str, object]:
    """The status for a principal behind a proxy: enough to see that the service works and is not an older one."""
    part: dict[str, object] = {name: status[name] for name in _REDUCED if name in status}
    if "keys" in status:
        part["keys"] = {name: status["keys"][name] for name in _REDUCED_KEYS}
    if "audit" in status:
        part["audit"] = {name: status["audit"][name] for name in _REDUCED_AUDIT}
    return part


def without_key_files(status: dict[str, Any]) -> dict[str, object]:
    """The status for a principal that may not know of every key: no key id, also not in a warning."""
    status = without_policy_error(status)
    keys = {**status["keys"], "unreadable_files": {}}
    return {**status, "keys": keys, **_rewritten(status, lambda text: api.KEY_ID_PATTERN.sub(_KEY_HIDDEN, text))}


def without_policy_error(status: dict[str, Any]) -> dict[str, Any]:
    """The error of the last reload is hidden: it quotes the policy file, which names other principals."""
    policy = status["policy"]
    if policy is None or not policy["last_error"]:
        return status
    rewritten = _rewritten(status, lambda text: text.replace(policy["last_error"], _ERROR_HIDDEN))
    return {**status, "policy": {**policy, "last_error": _ERROR_HIDDEN}, **rewritten}


def _rewritten(status: dict[str, Any], hide: Callable[[str], str]) -> dict[str, object]:
    """The sentences of the status, without what `hide` replaces."""
    return {
        "warnings": [hide(text) for text in status["warnings"]],
        "conditions": [replace(condition, sentence=hide(condition.sentence)) for condition in status["conditions"]],
    }


def sealed_status(
    process: RunContext,
    *,
    server: HttpServer[Session],
    started_ns: int,
    reason: str,
    warning: str,
    lease: dict[str, object] | None,
    replica: NoMember,
) -> dict[str, object]:
    """The members that a daemon without keys knows. `warning` is empty if there is none."""
    settings, policy, arena = process.settings, process.policy, process.arena
    named = (("root_key_source", settings.root.warning), ("seal_not_written", warning))
    conditions = [state(name, reason=text) for name, text in named if text]
    conditions += [*policy.conditions(), *replica.conditions()]
    measured = [measure.status() for measure in process.measures]
    sealed = state(api.CODE_SEALED, reason=reason)
    return {
        "status": api.CODE_SEALED,
        "pid": os.getpid(),
        "uid": os.geteuid(),
        "uptime_seconds": _seconds_since(started_ns),
        "reason": reason,
        "root": {"provider": settings.root.name, "lease": lease},
        "memory": {"arena": arena.backing, "locked_bytes": arena.locked_bytes},
        "hardening": measured,
        "http": _http(server),
        "policy": policy.status(),
        "replica": replica.status(),
        "warnings": [condition.text for condition in conditions],
        "conditions": by_severity([sealed, *conditions, *hardening(measured)]),
    }


def _seconds_since(started_ns: int) -> int:
    return (time.time_ns() - started_ns) // 1_000_000_000


def _http(server: HttpServer[Session] | None) -> dict[str, int]:
    return {
        "connections": server.connections_count if server else 0,
        "connections_max": server.limits.connections_max if server else 0,
        "unread_bytes": server.unread if server else 0,
        "requests": server.requests if server else 0,
        "refused": server.refused if server else 0,
        "accept_failures": server.accept_failures if server else 0,
    }
