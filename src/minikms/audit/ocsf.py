"""Audit lines as OCSF events: class API Activity (6003) of the Open Cybersecurity Schema Framework.

Owns: which member of an event becomes which attribute (docs/siem.md). Invariants: `raw_data` holds the whole line, so
that nothing is lost and the chain can be verified from it; `metadata.sequence` is its `seq`, and `metadata.uid` is the
same for a line that is sent twice. It must never judge a line.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from minikms.audit import record
from minikms.audit.record import Event

VERSION: Final = "1.6.0"
"""The version of the schema."""
EVENT_BYTES_MAX: Final = 4 * record.LINE_BYTES_MAX
"""The size of one encoded event: `raw_data` has at most twice the bytes of the line; the other attributes repeat it
once.
"""
_CLASS: Final = 6003
_CREATE, _READ, _UPDATE, _DELETE, _OTHER = 1, 2, 3, 4, 99
_NAMES: Final = {_CREATE: "Create", _READ: "Read", _UPDATE: "Update", _DELETE: "Delete"}
ACTIVITIES: Final = {
    "create_dek": _CREATE, "generate_data_key": _CREATE, "add_root": _CREATE,
    "get_or_create_dek": _READ, "get_wrapped": _READ, "get_key": _READ, "list_keys": _READ, "list_roots": _READ,
    "status": _READ, "metrics": _READ, "check_batch": _READ, "unseal_status": _READ, "test_root": _READ,
    "rotate_kek": _UPDATE, "retire_key": _UPDATE, "policy_reload": _UPDATE,
    "destroy_key": _DELETE, "prune_kek": _DELETE, "remove_root": _DELETE,
    "encrypt": _OTHER, "decrypt": _OTHER, "encrypt_batch": _OTHER, "decrypt_batch": _OTHER, "reencrypt_batch": _OTHER,
    "mac": _OTHER, "random": _OTHER, "seal": _OTHER, "unseal": _OTHER, "report_audit_position": _OTHER,
    "replica_status": _READ, "invite_replica": _READ, "add_replica": _CREATE, "remove_replica": _DELETE,
    "promote_replica": _UPDATE, "replica_follow": _OTHER, "replica_next": _OTHER,
}  # fmt: skip
"""The activity of every verb. Any other type of line is Other, with its own name."""
_SUCCESS, _FAILURE = 1, 2
_INFORMATIONAL, _LOW = 1, 2
_PEER_UID: Final = "peer_uid:"


def encode(log_id: str, event: Event, line: bytes, proof: str = "") -> bytes:
    """The event of a line as JSON, without a newline in it. proof: as of `minikms audit export`."""
    return msgspec.json.encode(_mapped(log_id, event, line.decode("ascii"), proof))


def _mapped(log_id: str, event: Event, line: str, proof: str) -> dict[str, Any]:
    activity = ACTIVITIES.get(event.type, _OTHER)
    good = event.outcome == "ok"
    user = {"name": event.actor}
    if event.actor.startswith(_PEER_UID):
        user["uid"] = event.actor.removeprefix(_PEER_UID)
    api: dict[str, Any] = {"operation": event.type, "service": {"name": "minikms"}}
    if event.request_id:
        api["request"] = {"uid": event.request_id}
    if not good:
        api["response"] = {"error": event.outcome}
    keys = list(dict.fromkeys(filter(None, (event.key_id, *event.key_ids))))
    resources = [{"type": "key", "uid": key_id} for key_id in keys]
    if event.thread_id:
        resources.append({"type": "thread", "uid": event.thread_id})
    own = {"log_id": log_id, "facts": event.facts, "request_ids": event.request_ids, "proof": proof}
    attributes: dict[str, Any] = {
        "class_uid": _CLASS,
        "class_name": "API Activity",
        "category_uid": _CLASS // 1000,
        "category_name": "Application Activity",
        "activity_id": activity,
        "activity_name": _NAMES.get(activity, event.type),
        "type_uid": _CLASS * 100 + activity,
        "time": event.ts // 1_000_000,
        "severity_id": _INFORMATIONAL if good else _LOW,
        "status_id": _SUCCESS if good else _FAILURE,
        "status_code": event.outcome,
        "metadata": {
            "version": VERSION,
            "product": {"name": "miniKMS", "vendor_name": "ProgressDB"},
            "log_name": "minikms-audit",
            "log_version": str(record.FORMAT_VERSION),
            "event_code": event.type,
            "original_time": str(event.ts),
            "sequence": event.seq,
            "uid": f"{log_id}:{event.seq}",
        },
        "actor": {"user": user} | ({"process": {"pid": event.pid}} if event.pid else {}),
        # A caller is on this host, or comes through a proxy.
        "src_endpoint": {"name": str(event.facts.get("via", "localhost"))},
        "api": api,
        "raw_data": line,
        "unmapped": {name: value for name, value in own.items() if value},
    }
    if resources:
        attributes["resources"] = resources
    if event.count:
        attributes["count"] = event.count
    if event.detail:
        attributes["status_detail"] = event.detail
    return attributes
