"""The answer to `GET /status`.

Owns: the status object and its warnings, unsealed and sealed, and what a limited caller gets of it. Invariants: it
contains no secret; every warning says what to do; a principal behind a proxy reads nothing of files, root keys and
other principals. It must never do work that grows with the number of keys: it runs in the loop's thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from minikms import api
from minikms.api.errors import StandbyError
from minikms.http.accepting import bound_warning
from minikms.keys import members
from minikms.keys.keyring import AUDIT_KEYS_COUNT_MAX, AUDIT_KEYS_COUNT_WARN
from minikms.platform.logs import Log

if TYPE_CHECKING:
    from minikms.custody.vault import Indexing
    from minikms.datadir import DataDir
    from minikms.http import HttpServer
    from minikms.memory.arena import SecretArena
    from minikms.memory.process import Measure
    from minikms_daemon.audit.maintenance import Maintenance
    from minikms_daemon.server.admission import Session
    from minikms_daemon.server.policy_file import PolicyInForce
    from minikms_daemon.server.settings import Settings
    from minikms_daemon.service.keks import KekVerbs

_ERROR_HIDDEN: Final = "the file is not valid"
_KEY_HIDDEN: Final = "k_…"


class ReplicaView(Protocol):
    """What the status says of this host, where the key service has several."""

    @property
    def serves(self) -> bool: ...

    def status(self) -> dict[str, object] | None: ...

    def warnings(self) -> list[str]: ...


class StatusPage:
    """`build` makes the status of an unsealed daemon."""

    def __init__(
        self,
        *,
        settings: Settings,
        data: DataDir,
        from_source: bool,
        upkeep: Maintenance,
        position: Callable[[], dict[str, object] | None],
        lagging: Callable[[], str],
        measures: tuple[Measure, ...],
        indexing: Indexing,
        keks: KekVerbs,
        policy: PolicyInForce,
        lease: Callable[[], dict[str, object] | None],
        replica: ReplicaView,
        started_ns: int,
    ) -> None:
        self._replica = replica
        self._policy = policy
        self._lease = lease
        self._settings = settings
        self._started_under = data.slot.fingerprint
        self._provider = settings.root.name if from_source else data.slot.provider
        """The source of the root key; for one that a request gave, what its slot has recorded."""
        self._vault = data.vault
        self._damaged_records = data.replayed.damaged
        self._log = data.log
        self._upkeep = upkeep
        self._position = position
        self._lagging = lagging
        """Why verbs are refused because the auditor lags; empty if they are not."""
        self._measures = measures
        self._indexing = indexing
        self._keks = keks
        self._started_ns = started_ns
        self.server: HttpServer[Session] | None = None
        self._logger = Log()
        self._disk_was_full = self._log_refused = False
        self._dropped_before = data.log.events_dropped

    def build(self) -> dict[str, object]:
        body = self._vault.unlocked.body
        arena = self._vault.arena
        cache = self._vault.cache
        server = self.server
        return {
            **self._service_status(),
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "uptime_seconds": _seconds_since(self._started_ns),
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
            "pruning": self._keks.pruning.progress,
            "keys": self._indexing.status(),
            "audit": {
                **self._log.status(),
                "public_key": self._vault.unlocked.audit.current.public_key.hex(),
                "position": self._position(),
                "upkeep": {"faults": self._upkeep.faults},
            },
            "memory": {
                "arena": arena.backing,
                "locked_bytes": arena.locked_bytes,
                "keys_in_memory": len(cache),
                "cache_hits": cache.hits,
                "cache_misses": cache.misses,
                "cache_evictions": cache.evictions,
            },
            "hardening": [measure.status() for measure in self._measures],
            "http": _http(server),
            "policy": self._policy.status(),
            "replica": self._replica.status(),
            "disk_free_bytes": self._disk_free_bytes(),
            "warnings": [*self._warnings(), *self._policy.warnings(), *self._replica.warnings()],
        }

    def _service_status(self) -> dict[str, str]:
        """The members `status` and `reason`."""
        if self._log.writable and not self._replica.serves:
            return {"status": api.CODE_STANDBY, "reason": str(StandbyError())}
        lagging = self._lagging() if self._log.writable else ""
        return {"status": api.CODE_AUDIT_LAGGING, "reason": lagging} if lagging else self._log.service_status()

    def watch_disk(self) -> None:
        """Logs when the disk has become nearly full and when it has room again; also the audit log's refusals. Asks a
        disk that is nearly full whether keys can be made. Call this every second."""
        full = self._disk_free_bytes() < api.DISK_FREE_BYTES_MIN
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
        disks = map(os.statvfs, {self._settings.data_dir, self._log.directory})
        return min(disk.f_bavail * disk.f_frsize for disk in disks)

    def _root(self) -> dict[str, object]:
        """`fingerprint`: of the root key that this run was started under, or of the one that has replaced it."""
        body = self._vault.keyring.body
        slots = [slot.fingerprint for slot in body.slots]
        replacing = body.slot(self._keks.proved_slot_id)
        return {
            "provider": self._provider,
            "fingerprint": self._started_under
            if self._started_under in slots or replacing is None
            else replacing.fingerprint,
            "slots": slots,
            "lease": self._lease(),
        }

    def _rotation_progress(self) -> dict[str, Any] | None:
        """`total`: how many keys there are to rewrap, including those done; None while the index is not complete."""
        progress = self._keks.progress()
        if progress is None:
            return None
        index = self._vault.index
        left = len(index) - index.by_kek[progress["to_version"]]
        return {**progress, "total": progress["rewrapped"] + left if self._indexing.complete else None}

    def _warnings(self) -> list[str]:
        body = self._vault.unlocked.body
        found: list[str] = []
        if self._settings.root.warning:
            found.append(self._settings.root.warning)
        own, allowed = os.geteuid(), self._policy.policy.allowed
        if own in allowed and not allowed - {own, 0}:  # nobody else can be the message server
            found.append(
                "the daemon's own uid may connect: this protects against leaks, not against a compromised server, "
                "which can read the key file and the data directory; run the two under separate users, as the package "
                "does"
            )
        too_few = None if self.server is None else bound_warning(self.server.limits.connections_max)
        if too_few is not None:
            found.append(too_few)
        if any(slot.replaces for slot in body.slots):
            found.append(
                "more than one root key opens the keyring: start once with the newest root key to drop the older ones"
                if not self._keks.replacing_error
                else f"the root key that was replaced still opens the keyring: {self._keks.replacing_error}"
            )
        pin = self._settings.opening.pin
        pinned = frozenset() if pin is None else pin.pinned()
        others = members.slots_of_others(body, self._vault.unlocked.member_id)
        unpinned = [
            slot.slot_id for slot in body.slots if slot.fingerprint not in pinned and slot.slot_id not in others
        ]
        if pin is not None and unpinned:
            found.append(
                f"root keys that are not pinned can't open the keyring at the next start or unseal: slots "
                f"{', '.join(unpinned)}; name each in the pin file, as root: minikms pin add SOURCE"
            )
        if body.revoking:
            found.append(
                f"{len(body.revoking)} removed root keys could open DEKs until the KEK rotation has ended"
                + (f"; {self._keks.revocation_error}" if self._keks.revocation_error else "")
            )
        if (audit_keys := len(self._vault.unlocked.audit.audit_keys)) >= AUDIT_KEYS_COUNT_WARN:
            found.append(
                f"the keyring holds {audit_keys} of at most {AUDIT_KEYS_COUNT_MAX} audit keys; each removed "
                "root key takes one, and without one none can be removed or replaced"
            )
        if self._keks.rewrite_failed:
            found.append("the root key file could not be rewritten with the new root key; write it there by hand")
        if self._vault.unreadable.count:
            found.append(
                f"{self._vault.unreadable.count} key files can't be read: `minikms doctor` names them; restore them "
                "from a backup"
            )
        if self._damaged_records:
            found.append(
                f"{self._damaged_records} records of the journal of key files were damaged at the start, and keys that "
                "only they had are lost; run minikms doctor, and restore the keys that it names from a backup"
            )
        unreadable = sorted(self._vault.rotation_backups.unreadable)
        if unreadable:
            found.append(
                f"{len(unreadable)} rotation backups can't be read or written, first {unreadable[0]}; destroying a key "
                "that they may hold is refused: correct this, or remove them"
            )
        damaged = sorted(self._vault.rotation_backups.damaged)
        if damaged:
            found.append(
                f"{len(damaged)} rotation backups are damaged, first {damaged[0]}; no KEK is destroyed until "
                "you remove them by hand (the runbook says how)"
            )
        unfinished = len(self._vault.unfinished_destructions)
        if unfinished:
            found.append(
                f"the bytes of {unfinished} destroyed keys could not be removed from the disk; the daemon tries again"
            )
        faults = self._upkeep.faults
        found += [
            f"the {job} of the audit log fails: {reason}. Correct this; the daemon tries again"
            for job, reason in faults.items()
        ]
        free = self._disk_free_bytes()
        if free < api.DISK_FREE_BYTES_MIN:
            found.append(
                f"only {free // 1024:,} KiB are free for the data directory, so new keys are refused or soon will be; "
                "free space on its file system"
            )
        if refusal := self._vault.journal.refusal:
            found.append(f"no key can be made or changed: {refusal}; the daemon tries again")
        if not self._log.writable:
            found.append(
                "the audit log can't be written, so every verb but status and metrics answers 503; free space on its "
                "file system"
            )
        return found


_REDUCED: Final = ("status", "uptime_seconds", "epoch", "keyring_id")
_REDUCED_KEYS: Final = ("indexing", "writable", "unavailable_reason")
_REDUCED_AUDIT: Final = ("head", "writable", "synced")


def reduced(status: dict[str, Any]) -> dict[str, object]:
    """The status for a principal behind a proxy: enough to see that the service works and is not an older one."""
    shown: dict[str, object] = {name: status[name] for name in _REDUCED if name in status}
    if "keys" in status:
        shown["keys"] = {name: status["keys"][name] for name in _REDUCED_KEYS}
    if "audit" in status:
        shown["audit"] = {name: status["audit"][name] for name in _REDUCED_AUDIT}
    return shown


def without_key_files(status: dict[str, Any]) -> dict[str, object]:
    """The status for a principal that may not know of every key: no key id, also not in a warning."""
    status = without_policy_error(status)
    warnings = [api.KEY_ID_PATTERN.sub(_KEY_HIDDEN, text) for text in status["warnings"]]
    return {**status, "keys": {**status["keys"], "unreadable_files": {}}, "warnings": warnings}


def without_policy_error(status: dict[str, Any]) -> dict[str, Any]:
    """The error of the last reload is hidden: it quotes the policy file, which names other principals."""
    policy = status["policy"]
    if policy is None or not policy["last_error"]:
        return status
    warnings = [text.replace(policy["last_error"], _ERROR_HIDDEN) for text in status["warnings"]]
    return {**status, "policy": {**policy, "last_error": _ERROR_HIDDEN}, "warnings": warnings}


def sealed_status(
    settings: Settings,
    *,
    policy: PolicyInForce,
    arena: SecretArena,
    measures: tuple[Measure, ...],
    server: HttpServer[Session],
    started_ns: int,
    reason: str,
    warning: str,
    lease: dict[str, object] | None,
    replica: ReplicaView,
) -> dict[str, object]:
    """The members that a daemon without keys knows. `warning` is empty if there is none."""
    return {
        "status": "sealed",
        "pid": os.getpid(),
        "uid": os.geteuid(),
        "uptime_seconds": _seconds_since(started_ns),
        "reason": reason,
        "root": {"provider": settings.root.name, "lease": lease},
        "memory": {"arena": arena.backing, "locked_bytes": arena.locked_bytes},
        "hardening": [measure.status() for measure in measures],
        "http": _http(server),
        "policy": policy.status(),
        "replica": replica.status(),
        "warnings": [
            *(text for text in (settings.root.warning, warning) if text),
            *policy.warnings(),
            *replica.warnings(),
        ],
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
