"""The reports of an auditor: how far it has taken the audit log.

Owns: recording the origin of the first auditor in the keyring, and what an auditor gets to know of the log, unsealed
and sealed. Invariants: the origin is durable, and so is its line in the log, before the first report is answered;
another origin is refused; what was taken is kept over a seal. It must never write a line about a later report: that
line would be another one to report.
"""

from __future__ import annotations

from concurrent.futures import Executor
from functools import partial

from minikms import api
from minikms.api.errors import SealedError
from minikms.audit import AuditLog, Event
from minikms.custody.vault import Permit, Vault
from minikms.keys import keyring
from minikms.keys.keyring import Body
from minikms.platform.clock import now_rfc3339
from minikms.platform.workers import in_worker
from minikms.seal_files import SEALED_TEXT
from minikms_daemon.audit.position import AuditorPosition, LogView, mac_of, view_on_disk
from minikms_daemon.service.base import VerbTable, another_line
from minikms_daemon.service.no_auditor import NoAuditor


class AttachedAuditor(NoAuditor):
    """The log lies in a directory that an auditor can read."""

    def __init__(self) -> None:
        self._position = AuditorPosition()
        self._sealed_view: LogView | None = None
        """The view of the log while the daemon is sealed."""

    @property
    def seq(self) -> int:  # type: ignore[override]  # a constant without an auditor
        return self._position.seq

    def _age_s(self) -> int | None:
        return self._position.age_s

    def serve(self, table: VerbTable, *, vault: Vault, log: AuditLog, reader: Executor) -> None:
        super().serve(table, vault=vault, log=log, reader=reader)
        self._audit = table.audit
        self._reader = reader
        self._position.begin(log.writer.log_id.hex())
        log.attended = self._position.attached

    def _view(self) -> LogView:
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
        view = self._view()
        keyring.check_audit_origin(view.origin, request.origin)
        await in_worker(self._reader, partial(self._position.check, request, view, mac))
        permit()
        if not view.origin:
            await self._record(request.origin, event, permit)
        self._position.take(request, mac)
        return self._view().answer()

    def begin_sealed(self, directory: str, *, public_key: bytes, origin: str) -> None:
        self._sealed_view = view_on_disk(directory, public_key, origin)
        self._position.begin(self._sealed_view.log_id)

    def seal(self) -> None:
        self._sealed_view = self._view()

    async def report_sealed(self, request: api.ReportAuditPositionRequest, reader: Executor) -> api.AuditPositionAnswer:
        """Takes a report about what the log held at the seal; the auditor goes on with it. Its first report needs the
        keyring, so it is refused. Raises SealedError.
        """
        mac, view = mac_of(request), self._sealed_view
        if view is None or not view.origin:
            raise SealedError(SEALED_TEXT)
        keyring.check_audit_origin(view.origin, request.origin)
        if request.seq <= view.durable.seq:  # otherwise the disk lost the mark of what is durable: after the unseal
            await in_worker(reader, partial(self._position.check, request, view, mac))
            self._position.take(request, mac)
        return view.answer()

    async def _record(self, origin: str, event: Event, permit: Permit) -> None:
        event.facts = {**event.facts, "origin": origin}
        await self._audit.add_written(another_line(event, f"begun: {origin}"), durable=True)

        def record(body: Body) -> Body:
            permit()
            return keyring.with_audit_origin(body, self._vault.unlocked.member_id, origin, at=now_rfc3339())

        body = await self._vault.keyring.change(record)
        event.facts["epoch"] = body.epoch
        await self._audit.add_written(event, durable=True)
