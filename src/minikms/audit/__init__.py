"""The audit log: one line for each operation, which can't be altered without a trace.

Owns: the log's format, writing, verification, files, and reading; docs/spec/audit.md specifies the format. The
room must never see plaintext, ciphertext, or any key but the audit key.
"""

from minikms.audit.chain import AuditKey
from minikms.audit.log import AuditLog
from minikms.audit.record import Event
from minikms.audit.repair import ExpectedLog

__all__ = ["AuditKey", "AuditLog", "Event", "ExpectedLog"]
