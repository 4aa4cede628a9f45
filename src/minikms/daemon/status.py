"""The answer to `GET /status`.

Owns: the status object and its warnings. Invariants: it contains no secret; every warning says what to do. It must
never do more than a few microseconds of work: it runs in the loop's thread.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from minikms.daemon.accepting import bound_warning
from minikms.keys.keyring import KEK_WRAPS_WARN

if TYPE_CHECKING:
    from minikms.audit.maintenance import Maintenance
    from minikms.custody.rotation import KekRotation
    from minikms.custody.vault import Indexing
    from minikms.daemon.application import Session
    from minikms.daemon.settings import Settings
    from minikms.datadir import DataDir
    from minikms.http import HttpServer
    from minikms.memory.process import Measure
    from minikms.service.keks import KekVerbs


class StatusPage:
    def __init__(
        self,
        *,
        settings: Settings,
        data: DataDir,
        upkeep: Maintenance,
        measures: tuple[Measure, ...],
        rotation: KekRotation,
        indexing: Indexing,
        keks: KekVerbs,
    ) -> None:
        self._settings = settings
        self._started_under = data.slot.fingerprint
        self._vault = data.vault
        self._log = data.log
        self._upkeep = upkeep
        self._measures = measures
        self._rotation = rotation
        self._indexing = indexing
        self._keks = keks
        self._started_ns = time.time_ns()
        self.server: HttpServer[Session] | None = None

    def build(self) -> dict[str, object]:
        body = self._vault.unlocked.body
        arena = self._vault.arena
        cache = self._vault.cache
        server = self.server
        return {
            "status": "ok" if self._log.writable else "audit_unavailable",
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "uptime_seconds": (time.time_ns() - self._started_ns) // 1_000_000_000,
            "epoch": body.epoch,
            "keyring_id": body.keyring_id,
            "root": self._root(),
            "keks": [
                {
                    "version": kek.version,
                    "state": kek.state,
                    "created_at": kek.created_at,
                    "wraps_reserved": kek.wraps_reserved,
                }
                for kek in body.keks
            ],
            "rotation": self._rotation_progress(),
            "keys": {
                "indexing": not self._indexing.complete,
                "by_state": {state: count for state, count in self._vault.index.by_state.items() if count},
                "by_kek_version": {str(kek): count for kek, count in self._vault.index.by_kek.items() if count},
                "destroyed": len(self._vault.destroyed),
                "unreadable": self._vault.unreadable.count,
                "unreadable_files": self._vault.unreadable.listed(),
            },
            "leases": self._vault.leases.status()._asdict(),
            "audit": {
                **self._log.status(),
                "public_key": body.audit_key.public_key.hex(),
                "upkeep": self._upkeep.status(),
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
            "http": {
                "connections": server.connections_count if server else 0,
                "connections_max": server.limits.connections_max if server else 0,
                "requests": server.requests if server else 0,
                "refused": server.refused if server else 0,
                "accept_failures": server.accept_failures if server else 0,
            },
            "warnings": self._warnings(),
        }

    def _root(self) -> dict[str, object]:
        """`fingerprint`: of the root key that this run was started under, or of the one that has replaced it."""
        slots = [slot.fingerprint for slot in self._vault.keyring.body.slots]
        return {
            "provider": self._settings.root.name,
            "fingerprint": self._started_under if self._started_under in slots else slots[-1],
            "slots": slots,
        }

    def _rotation_progress(self) -> dict[str, object] | None:
        """`total`: how many keys there are to rewrap, including those done; None while the index is not complete."""
        progress = self._rotation.status()
        rotation = self._rotation.running
        if progress is None or rotation is None:
            return None
        index = self._vault.index
        left = len(index) - index.by_kek[rotation.to_version]
        return {**progress, "total": self._rotation.rewrapped + left if self._indexing.complete else None}

    def _warnings(self) -> list[str]:
        body = self._vault.unlocked.body
        found: list[str] = []
        if self._settings.root.warning:
            found.append(self._settings.root.warning)
        if os.geteuid() in self._settings.allowed_uids:
            found.append(
                "the daemon's own uid may connect: this protects against leaks, not against a compromised server, "
                "which can read the key file and the data directory; run the two under separate users (deploy/systemd)"
            )
        too_few = None if self.server is None else bound_warning(self.server.limits.connections_max)
        if too_few is not None:
            found.append(too_few)
        if len(body.slots) > 1:
            found.append(
                "more than one root key opens the keyring: start once with the newest root key to drop the older ones"
            )
        if body.wrapping_kek.wraps_reserved >= KEK_WRAPS_WARN:
            found.append("the KEK has wrapped more than 2^31 keys; rotate it")
        if self._keks.rewrite_failed:
            found.append("the master key file could not be rewritten with the new root key; write it there by hand")
        if self._vault.unreadable.count:
            found.append(
                f"{self._vault.unreadable.count} key files can't be read, see keys.unreadable_files; restore them "
                "from a backup"
            )
        faults = self._upkeep.faults
        found += [
            f"the {job} of the audit log fails: {reason}. Correct this; the daemon tries again"
            for job, reason in faults.items()
        ]
        if not self._log.writable:
            found.append("the audit log can't be written, so every verb answers 503; free space on its file system")
        return found
