"""When a member takes over: decided from what was read, without a database and without time."""

from typing import Any

import msgspec
import pytest

from minikms.api import MemberReport, ReplicaPosition
from minikms_replicator.deciding import WAIT_NS, Watch, why_not
from minikms_replicator.tables import LEASE_NS, Head, Reports

KEYRING_ID = "kr_0123456789abcdef"
HEAD = Head(KEYRING_ID, 3, "m1", 70, 12, 0, "", b"state", False)
REPORT = MemberReport("m2", "b", "following", 12, 3, "0", "", "", "", 0.0)
POSITION = ReplicaPosition(KEYRING_ID, "m2", "following", 12, 3, 0, 0, True, False, False, REPORT)


def decided(head: dict[str, Any], position: dict[str, Any], **known: Any) -> str:
    facts: dict[str, Any] = {"held_term": 0, "unchanged_ns": 0, "settled_ns": WAIT_NS, "could_report": True} | known
    return why_not(HEAD._replace(**head), msgspec.structs.replace(POSITION, **position), **facts)


@pytest.mark.parametrize(
    ("head", "position", "known", "why"),
    [
        ({}, {}, {}, "m1 serves"),
        ({}, {}, {"unchanged_ns": WAIT_NS}, "m1 serves"),
        ({}, {}, {"unchanged_ns": WAIT_NS + 1}, ""),
        ({}, {"ready": False}, {"unchanged_ns": 2 * WAIT_NS}, "not ready"),
        ({}, {"mode": "sealed"}, {"unchanged_ns": 2 * WAIT_NS}, "not ready"),
        ({}, {"mode": "refused"}, {"unchanged_ns": 2 * WAIT_NS}, "not ready"),
        ({}, {"number": 11}, {"unchanged_ns": 2 * WAIT_NS}, "change 11 of 12"),
        ({}, {"number": 13}, {"unchanged_ns": 2 * WAIT_NS}, "change 13 of 12"),
        ({}, {}, {"unchanged_ns": 2 * WAIT_NS, "settled_ns": WAIT_NS - 1}, "for long enough"),
        ({}, {}, {"unchanged_ns": 2 * WAIT_NS, "settled_ns": None}, ""),
        ({"keyring_id": "kr_another"}, {}, {"unchanged_ns": 2 * WAIT_NS}, "the keyring kr_another"),
        ({"member": ""}, {}, {}, ""),
        ({"member": "", "wanted": "m2"}, {}, {}, ""),
        ({"member": "", "wanted": "m3"}, {}, {}, "m3 serves"),
        ({"member": "", "wanted": "m3"}, {}, {"unchanged_ns": WAIT_NS + 1}, ""),
        ({"member": ""}, {}, {"settled_ns": 0}, "for long enough"),
        ({"member": ""}, {}, {"could_report": False}, "no time yet to report"),
        ({"member": "", "wanted": "m2"}, {}, {"could_report": False}, "no time yet to report"),
        ({"member": ""}, {}, {"could_report": False, "unchanged_ns": WAIT_NS + 1}, ""),
        ({"member": "m2"}, {}, {}, "m2 serves"),  # a copy of this member may serve
        ({"member": "m2"}, {}, {"held_term": 3}, ""),
        ({"member": "m1"}, {}, {"held_term": 3}, "m1 serves"),
        ({"empty": True, "member": "", "keyring_id": ""}, {}, {}, "are empty"),
        ({"empty": True, "member": "", "number": 0}, {"begins": True}, {"could_report": False}, ""),
        ({"empty": True, "number": 0}, {"begins": True}, {}, "m1 serves"),
    ],
)
def test_a_member_takes_over_what_no_other_may_use(
    head: dict[str, Any], position: dict[str, Any], known: dict[str, Any], why: str
) -> None:
    found = decided(head, position, **known)
    assert why in found
    assert bool(found) == bool(why)


def test_a_follower_waits_for_longer_than_a_lease_on_faster_clocks() -> None:
    assert WAIT_NS > LEASE_NS * 17 / 16


@pytest.mark.parametrize(
    ("node", "change"),
    [("2", {}), ("1", {"renewals": 71}), ("1", {"term": 4}), ("1", {"renewals": 69})],
    ids=["another node", "a renewal", "a term", "an older state"],
)
def test_each_sight_of_something_else_begins_the_wait_again(node: str, change: dict[str, Any]) -> None:
    watch = Watch()
    assert watch.unchanged_ns("1", HEAD, 1000) == 0
    assert watch.unchanged_ns("1", HEAD._replace(wanted="m2", seals=4), 1500) == 500
    assert watch.unchanged_ns(node, HEAD._replace(**change), 1700) == 0
    assert watch.unchanged_ns(node, HEAD._replace(**change), 1800) == 100


@pytest.mark.parametrize(
    ("seen_s", "connected_ns", "now_ns", "could"),
    [
        ({"m1": 1.0, "m3": 0.5}, 0, 3_000_000_000, True),
        ({"m1": 1.0}, 0, 3_000_000_000, False),
        ({"m1": 1.0, "m3": 2.5}, 0, 3_000_000_000, False),  # it reported before this connection
        ({"m1": 1.0, "m3": 0.5}, 2_200_000_000, 3_000_000_000, False),
        ({"m1": 1.0}, 0, WAIT_NS + 1_000_000_001, True),
        ({"m1": 1.0}, WAIT_NS, WAIT_NS + 1_000_000_001, False),
    ],
)
def test_the_others_have_reported_or_had_the_time(
    seen_s: dict[str, float], connected_ns: int, now_ns: int, could: bool
) -> None:
    """The tables were first seen at second 1, and the reports were read at second 3."""
    watch = Watch()
    watch.unchanged_ns("1", HEAD, 1_000_000_000)
    position = msgspec.structs.replace(POSITION, members=["m1", "m2", "m3"])
    members = [msgspec.structs.replace(REPORT, member_id=one, seen_seconds=age) for one, age in seen_s.items()]
    assert watch.could_report(position, Reports(members, 3_000_000_000), connected_ns, now_ns) is could


def test_older_tables_need_the_reports_of_all_again() -> None:
    watch = Watch()
    position = msgspec.structs.replace(POSITION, members=["m1", "m2"])
    reports = Reports([msgspec.structs.replace(REPORT, member_id="m1", seen_seconds=1.0)], 3_000_000_000)
    for renewals, could in ((70, True), (71, True), (60, False)):
        watch.unchanged_ns("1", HEAD._replace(renewals=renewals), 1_000_000_000 + renewals * (could is False) * 10**8)
        assert watch.could_report(position, reports, 0, 9_000_000_000) is could
