"""The part of the auditor in a daemon without `--audit-dir`, beside which none can run.

Owns: the refusal of reports. Invariant: an auditor that was attached to an earlier run has taken nothing of this one,
so its lines stay. `minikms_daemon.service.auditor` has the same with an auditor.
"""

from __future__ import annotations

from concurrent.futures import Executor

from minikms import api
from minikms.api.errors import ConflictError, SealedError
from minikms.audit import AuditLog, Event
from minikms.custody.vault import Permit, Vault
from minikms.seal_files import SEALED_TEXT
from minikms_daemon.service.base import VerbTable


class NoAuditor:
    """The auditor of a process, over all its seals. `seq`: the last line that it has taken."""

    seq: int = 0

    def serve(self, table: VerbTable, *, vault: Vault, log: AuditLog, reader: Executor) -> None:
        """Adds the verb, over an opened data directory. `reader` looks up lines."""
        self._vault = vault
        self._log = log
        table.later(api.REPORT_AUDIT_POSITION, self.report, audited=False)

    async def report(
        self, request: api.ReportAuditPositionRequest, event: Event, permit: Permit
    ) -> api.AuditPositionAnswer:
        raise ConflictError("the daemon was started without --audit-dir, so no auditor can be attached")

    @property
    def lag(self) -> int:
        """The durable lines that it has not taken; before its first report, all of them."""
        return max(0, self._log.sync.durable_line().seq - self.seq)

    def status(self) -> dict[str, object] | None:
        """For `/status`; None if no auditor was ever attached."""
        origin = self._vault.unlocked.audit.audit_origin
        if not origin:
            return None
        return {"seq": self.seq, "origin": origin, "age_seconds": self._age_s(), "lag_lines": self.lag}

    def _age_s(self) -> int | None:
        """The seconds since its last report; None before the first."""
        return None

    def begin_sealed(self, directory: str, *, public_key: bytes, origin: str) -> None:
        """The process starts sealed, beside the log in `directory`. `origin`: of the first auditor."""

    def seal(self) -> None:
        """The log that is served is about to be closed."""

    async def report_sealed(self, request: api.ReportAuditPositionRequest, reader: Executor) -> api.AuditPositionAnswer:
        """Takes a report while the daemon is sealed. Raises SealedError."""
        raise SealedError(SEALED_TEXT)
