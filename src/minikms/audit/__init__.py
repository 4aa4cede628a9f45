"""The audit log: what every verb did, in lines that can't be altered unseen.

Owns: the log's format, writing, checking, files, and reading. The rest of the service needs `AuditLog` and `Event`
only. docs/spec/audit.md is the format. The room must never see plaintext, ciphertext or any key but the audit key's
view.
"""

from minikms.audit.chain import AuditKey
from minikms.audit.log import AuditLog, Upkeep
from minikms.audit.record import Event
from minikms.audit.recovery import Known

__all__ = ["AuditKey", "AuditLog", "Event", "Known", "Upkeep"]
