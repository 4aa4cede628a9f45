"""The audit log: what every verb did, in lines that can't be altered unseen.

Owns: the log's format, writing, checking, files, and reading. The rest of the service needs `AuditLog` and `Event`
only. docs/spec/audit.md is the format. The room must never see plaintext, ciphertext or any key but the audit key's
view.
"""

from minikms.audit.log import AuditLog
from minikms.audit.opening import Known
from minikms.audit.record import Event
from minikms.audit.refusals import RefusalAggregator
from minikms.audit.signer import AuditKey
from minikms.audit.upkeep import Upkeep

__all__ = ["AuditKey", "AuditLog", "Event", "Known", "RefusalAggregator", "Upkeep"]
