"""What all sets of verbs share: the audit log's interface, and how a refusal or a cancellation is audited."""

from __future__ import annotations

from typing import Protocol

from minikms import api
from minikms.audit import Event
from minikms.custody.vault import Vault
from minikms.errors import MiniKmsError
from minikms.policy import Principal


class Audit(Protocol):
    """What the service needs of the audit log."""

    def add(self, event: Event) -> None:
        """Queues the event of an answer that is given in this very turn; the two stand or fall together."""

    async def add_written(self, event: Event, *, durable: bool) -> None:
        """Writes the event's line now, for an answer that leaves in a later turn; `durable` also waits for the disk.

        Raises AuditUnavailableError.
        """

    def require_writable(self) -> None:
        """Before a change of keys: raises AuditUnavailableError when the last line could not be written."""


class Verbs:
    """What every set of verbs shares: the vault, the audit, and how a refusal is told."""

    def __init__(self, vault: Vault, audit: Audit) -> None:
        self._vault = vault
        self._audit = audit

    def _event(self, verb: str, who: Principal, request_id: str) -> Event:
        return Event(type=verb, actor=who.actor, pid=who.pid, request_id=request_id)

    def _refused(self, event: Event, error: MiniKmsError) -> None:
        """Audits a refusal that is answered in this turn."""
        event.outcome = error.code
        self._audit.add(event)

    async def _refused_later(self, event: Event, error: MiniKmsError) -> None:
        """Audits a refusal that is answered in a later turn."""
        event.outcome = error.code
        await self._audit.add_written(event, durable=False)

    def _cut_off(self, event: Event) -> None:
        """Audits a request that the end of a stop cuts off: what it had begun may be done."""
        event.outcome = api.CODE_INTERRUPTED
        self._audit.add(event)
