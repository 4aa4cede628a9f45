"""The verb by which an auditor reports how far it has taken the audit log.

Owns: recording the origin of the first auditor in the keyring, and what an auditor gets to know of the log.
Invariants: the origin is durable, and so is its line in the log, before the first report is answered; another origin is
refused. It must never write a line about a later report: that line would be another one to report.
"""

from __future__ import annotations

from concurrent.futures import Executor
from functools import partial

from minikms import api
from minikms.api.errors import ConflictError
from minikms.audit import AuditLog, Event
from minikms.custody.vault import Permit, Vault
from minikms.keys import keyring
from minikms.keys.keyring import Body
from minikms.platform.clock import now_rfc3339
from minikms.platform.workers import in_worker
from minikms_daemon.audit.position import AuditorPosition, LogView, mac_of
from minikms_daemon.service.base import VerbTable, another_line


class AuditorVerbs:
    """`reader` looks up lines. `has_directory`: the log lies in a directory that an auditor can read."""

    def __init__(
        self,
        *,
        vault: Vault,
        table: VerbTable,
        log: AuditLog,
        position: AuditorPosition,
        reader: Executor,
        has_directory: bool,
    ) -> None:
        self._vault = vault
        self._audit = table.audit
        self._log = log
        self._position = position
        self._reader = reader
        self._has_directory = has_directory
        position.begin(log.writer.log_id.hex())
        log.attended = position.attached
        table.later(api.REPORT_AUDIT_POSITION, self.report, audited=False)

    def view(self) -> LogView:
        audit, log = self._vault.unlocked.audit, self._log
        return LogView(
            log.directory,
            log.writer.log_id.hex(),
            log.sync.durable_line(),
            audit.current.public_key,
            audit.audit_origin,
        )

    async def report(
        self, request: api.ReportAuditPositionRequest, event: Event, permit: Permit
    ) -> api.AuditPositionAnswer:
        """Takes the report, and records the origin if it is the first one."""
        mac = mac_of(request)
        if not self._has_directory:
            raise ConflictError("the daemon was started without --audit-dir, so no auditor can be attached")
        view = self.view()
        keyring.check_audit_origin(view.origin, request.origin)
        await in_worker(self._reader, partial(self._position.check, request, view, mac))
        permit()
        if not view.origin:
            await self._record(request.origin, event, permit)
        self._position.take(request, mac)
        return self.view().answer()

    async def _record(self, origin: str, event: Event, permit: Permit) -> None:
        event.facts = {**event.facts, "origin": origin}
        await self._audit.add_written(another_line(event, f"begun: {origin}"), durable=True)

        def record(body: Body) -> Body:
            permit()
            return keyring.with_audit_origin(body, self._vault.unlocked.member_id, origin, at=now_rfc3339())

        body = await self._vault.keyring.change(record)
        event.facts["epoch"] = body.epoch
        await self._audit.add_written(event, durable=True)
