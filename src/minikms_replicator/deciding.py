"""What a replicator does next, from what it has read: no I/O and no clock.

Owns: since when a head has not changed, whether the others had time to report, and whether a member may take over.
"""

from __future__ import annotations

from typing import Final

from minikms.api.replica_verbs import ReplicaPosition
from minikms_replicator.tables import LEASE_NS, Head, Reports

WAIT_NS: Final = LEASE_NS + LEASE_NS // 16 + 2 * 1_000_000_000
"""The clocks of two hosts differ in their rates by less than a sixteenth. Each host that runs reports in this time,
even if it has to connect again."""


class Watch:
    """The head as it was seen on one node, and since when."""

    def __init__(self) -> None:
        self._seen = ("", 0, 0)
        self._since_ns = 0
        self._tables_ns: int | None = None
        """When the tables were first seen, or seen in an older state than before."""

    def unchanged_ns(self, node: str, head: Head, now_ns: int) -> int:
        """How long the head has had its term and count of renewals. `now_ns`: after it was read."""
        seen = (node, head.term, head.renewals)
        if self._tables_ns is None or seen[1:] < self._seen[1:]:
            self._tables_ns = now_ns
        if seen != self._seen:
            self._seen, self._since_ns = seen, now_ns
        return now_ns - self._since_ns

    def could_report(self, position: ReplicaPosition, reports: Reports, connected_ns: int, now_ns: int) -> bool:
        """Whether each other host of the keyring has reported to these tables since this process is connected to them,
        or had the time to. Call it after `unchanged_ns`.
        """
        since_ns = max(connected_ns, self._tables_ns or now_ns)
        came = {one.member_id for one in reports.members if reports.read_ns - one.seen_seconds * 1e9 >= since_ns}
        return came.issuperset({*position.members} - {position.member_id}) or now_ns - since_ns > WAIT_NS


def is_settled(settled_ns: int | None) -> bool:
    """Whether the node has confirmed commits for long enough. `settled_ns`: as `Tables.settled_ns`."""
    return settled_ns is None or settled_ns >= WAIT_NS


def why_not(
    head: Head,
    position: ReplicaPosition,
    *,
    held_term: int,
    unchanged_ns: int,
    settled_ns: int | None,
    could_report: bool,
) -> str:
    """Why the member does not take over now; empty if it does. `held_term`: of the last lease of this process, which is
    over, because its daemon does not serve. `settled_ns`: as `Tables.settled_ns`. `could_report`: as that of `Watch`.
    """
    if position.mode != "following" or not position.ready:
        return f"the member is not ready: {position.report.why or position.mode}"
    if head.keyring_id not in ("", position.keyring_id):
        return f"the tables are those of the keyring {head.keyring_id}"
    if head.empty and not position.begins:
        return "the tables are empty, and this member may not fill them"
    if not head.empty and head.number != position.number:
        return f"the member has change {position.number} of {head.number}"
    if not is_settled(settled_ns):
        return "this node of the database has not confirmed commits for long enough"
    me = position.member_id
    if head.member == me and head.term == held_term:
        return ""
    is_free = not head.member and head.wanted in ("", me)
    if unchanged_ns > WAIT_NS or (is_free and (could_report or head.empty)):
        return ""
    return "other hosts had no time yet to report" if is_free else f"{head.member or head.wanted} serves"
