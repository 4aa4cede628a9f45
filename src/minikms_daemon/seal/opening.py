"""Opening the data directory, at a start or at an unseal.

Owns: what later openings in one process know of the earlier ones: whether the daemon's own source of the root key can
still be read, which slot's key it holds, and where the audit log must go on. It must never keep a root key.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minikms.audit.record import LineRef
from minikms.datadir import open_for_service
from minikms.roots.providers import RootProvider
from minikms_daemon.seal.no_unlocking import NoUnlocking
from minikms_daemon.server.admission import Admission
from minikms_daemon.server.application import Seal
from minikms_daemon.server.parts import Parts
from minikms_daemon.server.run_context import RunContext
from minikms_daemon.service.no_auditor import NoAuditor

if TYPE_CHECKING:
    from minikms_daemon.seal.unlocking import Unlocking
    from minikms_daemon.server.no_member import NoMember


@dataclass(eq=False, repr=False)
class Opener:
    """Makes the parts of each unsealed time of one process."""

    process: RunContext
    admission: Admission
    seal: Seal
    unlocking: Unlocking | NoUnlocking
    replica: NoMember

    def __post_init__(self) -> None:
        self.auditor = _auditor(self.process)
        self.started_ns = time.time_ns()
        self.later_keyring = b""
        """What the database has, under a keyring key that only the root key of this host opens. Of the next opening
        only: nobody has verified it, and without it the host opens as it is.
        """
        self._source_read = False
        self._source_slot_id = ""
        """The slot whose root key the daemon's own source held when it was last read or rewritten; empty: not known."""
        self._expected_head: LineRef | None = None
        """The last line of the audit log when it was last abandoned: the log must have it when it is opened again."""

    def open(self, root: RootProvider) -> Parts:
        """Opens the data directory. Blocks on the disk. Raises StartError, OSError."""
        process, own = self.process, root.name == self.process.settings.root.name
        options = process.settings.opening._replace(index_threads=process.policy.meters is not None)
        if self._expected_head is not None:  # what the flags say of the audit log is for one start
            options = options._replace(
                accept_restore=False, accept_audit_loss=False, expect_audit_head=self._expected_head
            )
        options, self.later_keyring = options._replace(later_keyring=self.later_keyring), b""
        self._source_read |= own
        data = open_for_service(process.lock, root, arena=process.arena, disk=process.workers.disk, options=options)
        slot_id = data.slot.slot_id
        if own:
            self._source_slot_id = slot_id
        return Parts(
            process,
            admission=self.admission,
            data=data,
            proved_slot_id=slot_id if slot_id == self._source_slot_id else "",
            auditor=self.auditor,
            started_ns=self.started_ns,
            seal=self.seal,
            leased=self.unlocking.leased,
            lease=self.unlocking.status,
            replica=self.replica,
        )

    def interrupted(self, parts: Parts) -> None:
        """A seal has zeroed the keys of `parts`, or an unseal has failed."""
        self._expected_head = parts.audit_head
        self._source_slot_id = parts.keks.proved_slot_id or self._source_slot_id

    @property
    def source_is_readable(self) -> bool:
        return self.process.settings.root.reads_again or not self._source_read

    def discard_source(self) -> None:
        """Closes an unread source that can be read once: it still holds the root key, which root could read there."""
        source = self.process.settings.root
        if not source.reads_again and not self._source_read:
            self._source_read = True
            source.discard()


def _auditor(process: RunContext) -> NoAuditor:
    if process.settings.opening.audit_dir is None:
        return NoAuditor()
    from minikms_daemon.service.auditor import AttachedAuditor  # in a daemon only if one can be attached

    return AttachedAuditor()
