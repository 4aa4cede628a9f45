"""What a replicator does next, from what it has read: no I/O and no clock.

Owns: since when a head has not changed, and whether a member may take over.
"""

from __future__ import annotations

from typing import Final

from minikms.api.replica_verbs import ReplicaPosition
from minikms_replicator.tables import LEASE_NS, Head

WAIT_NS: Final = LEASE_NS + LEASE_NS // 16 + 2 * 1_000_000_000
"""The clocks of two hosts differ in their rates by less than a sixteenth."""


class Watch:
    """The head as it was seen on one node, and since when."""

    def __init__(self) -> None:
        self._seen: tuple[str, int, int] | None = None
        self._since_ns = 0

    def unchanged_ns(self, node: str, head: Head, now_ns: int) -> int:
        """How long the head has had its term and count of renewals. `now_ns`: after it was read."""
        seen = (node, head.term, head.renewals)
        if seen != self._seen:
            self._seen, self._since_ns = seen, now_ns
        return now_ns - self._since_ns


def is_settled(settled_ns: int | None) -> bool:
    """Whether the node has confirmed commits for long enough. `settled_ns`: as `Tables.settled_ns`."""
    return settled_ns is None or settled_ns >= WAIT_NS


def why_not(head: Head, position: ReplicaPosition, *, held_term: int, unchanged_ns: int, settled_ns: int | None) -> str:
    """Why the member does not take over now; empty if it does. `held_term`: of the last lease of this process, which is
    over, because its daemon does not serve. `settled_ns`: as `Tables.settled_ns`.
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
    if not head.member and head.wanted in ("", me):
        return ""
    return f"{head.member or head.wanted} serves" if unchanged_ns <= WAIT_NS else ""
