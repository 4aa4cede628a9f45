"""The verb by which an auditor reports how far it has taken the audit log.

Owns: its entry, request and answer, as `minikms.api.verbs` for all others. Invariant: it changes nothing but what an
auditor has reported. It must never carry lines of the log: the auditor reads the files.
"""

from __future__ import annotations

from typing import Final

import msgspec

from minikms.api.contract import CODE_CONFLICT, CODE_INTERRUPTED, CODE_STORAGE_UNAVAILABLE
from minikms.api.verb import Base64, Request, Verb


class ReportAuditPositionRequest(Request):
    """`seq` and `mac` name the last line of the log `log_id` (hexadecimal) that the auditor has taken; 0 and empty: it
    has taken none. `origin` names the tree of the auditor: the first report fixes it.
    """

    origin: str
    log_id: str
    seq: int
    mac: Base64


class DurableLine(msgspec.Struct, frozen=True):
    """A line of the audit log: its number and its MAC."""

    seq: int
    mac: bytes


class AuditPositionAnswer(msgspec.Struct, frozen=True):
    """`durable`: the last line that is on the disk for certain; 0 where that is not known. `public_key`: of the audit
    key in use, Ed25519.
    """

    log_id: str
    durable: DurableLine
    public_key: bytes


REPORT_AUDIT_POSITION: Final = Verb(
    "report_audit_position",
    "POST",
    "/audit/position",
    ("ship",),
    ReportAuditPositionRequest,
    AuditPositionAnswer,
    "Report how far an auditor has taken the audit log. Not audited, but for the first report and refused ones",
    (CODE_CONFLICT, CODE_STORAGE_UNAVAILABLE, CODE_INTERRUPTED),
    repeatable=True,
)

AUDIT_VERBS: Final = (REPORT_AUDIT_POSITION,)
