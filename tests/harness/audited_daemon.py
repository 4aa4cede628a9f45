"""A daemon whose audit log lies in a directory of its own, and a user who is its auditor.

Owns: the policy that grants the role `ship`, the directory, and reports of a position. It asserts only that a report
that every test needs was taken.
"""

import json
import os
from pathlib import Path
from typing import Any

from minikms.audit.reader import each_segment
from tests import needs
from tests.harness.callers import OTHER, PROXY, ROOT_GRANT, USER, Caller, PolicyDaemon, Reply

ORIGIN = "example.org/log"
POLICY = (
    ROOT_GRANT
    + f"""
[[grant]]
principals = ["uid:{USER}", "spiffe://prod/ship"]
roles = ["ship"]
[[grant]]
principals = ["uid:{OTHER}"]
roles = ["monitor"]
threads = []
[[proxy]]
principals = ["uid:{PROXY}"]
on_behalf_of = ["spiffe://prod/*"]
"""
)


class AuditedDaemon(PolicyDaemon):
    """A daemon whose log lies in a directory of its own, and whose user USER is the auditor."""

    def __init__(self, base: Path, *flags: str, policy: str = POLICY) -> None:
        needs.root()
        self.log_dir = base / "audit"
        self.log_dir.mkdir(mode=0o750)
        os.chown(self.log_dir, 0, USER)
        self.log_dir.chmod(0o2750)
        super().__init__(base, policy, "--audit-dir", str(self.log_dir), *flags)

    def lines(self) -> list[dict[str, Any]]:
        """Every whole line of the log."""
        return [json.loads(line) for file in each_segment(str(self.log_dir)) for line in file.lines()]

    def audited(self, *types: str) -> list[dict[str, Any]]:
        return [line["event"] for line in self.lines() if line["event"]["type"] in types]

    def report(self, seq: int = 0, mac: str = "", *, uid: int = USER, **members: object) -> Reply:
        caller = self.caller(uid)
        try:
            return send_report(caller, seq, mac, **members)
        finally:
            caller.close()

    def shipped(self) -> dict[str, Any]:
        """An auditor that takes every durable line. The answer to its last report."""
        answer = self.report()
        assert answer.status == 200, answer
        log_id, durable = answer.body["log_id"], answer.body["durable"]
        answer = self.report(durable["seq"], durable["mac"], log_id=log_id)
        assert answer.status == 200, answer
        return dict(answer.body)


def send_report(caller: Caller, seq: int = 0, mac: str = "", **members: object) -> Reply:
    return caller.post("/audit/position", {"origin": ORIGIN, "log_id": "", "seq": seq, "mac": mac} | members)
