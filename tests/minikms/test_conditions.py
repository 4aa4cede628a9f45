"""The list of conditions, and what follows from the members of a status."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms import api, conditions
from minikms.conditions import KEY_SERVICE, SEVERITIES, of_status, reported
from tools import conditions as pages

SOURCES = Path(__file__).parents[2] / "src"
NOW_S = 1_800_000_000.0
WELL: dict[str, Any] = {
    "status": "ok",
    "reason": "",
    "disk_free_bytes": 1 << 40,
    "rotation": None,
    "keks": [{"version": 1, "state": "active", "created_at": "2026-12-01T00:00:00.000Z"}],
    "audit": {"position": {"seq": 9, "age_seconds": 4, "lag_lines": 0}},
    "root": {"lease": None},
    "policy": None,
    "hardening": [{"measure": "landlock", "in_force": True, "why": ""}],
}
ROTATION = {"rewrapped": 3, "total": None, "last_error": ""}
LEASE = {"seconds": 60, "left_seconds": 15, "last_failure": ""}


def auditor(**members: object) -> dict[str, Any]:
    return {"audit": {"position": {**WELL["audit"]["position"], **members}}}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, ""),
        ({"status": "standby", "reason": "another serves"}, "standby"),
        ({"status": "audit_lagging", "reason": "it lags"}, "audit_lagging"),
        ({"disk_free_bytes": (1 << 30) - 1}, "disk_low"),
        ({"rotation": ROTATION}, "kek_rotation_unfinished"),
        ({"rotation": {**ROTATION, "last_error": "EIO"}}, "kek_rotation_failing"),
        ({"keks": [{"version": 1, "state": "active", "created_at": "2026-01-14T07:59:00.000Z"}]}, "kek_old"),
        ({"keks": [{"version": 1, "state": "active", "created_at": "2026-01-15T09:00:00.000Z"}]}, ""),
        ({"audit": {"position": None}}, "auditor_none"),
        (auditor(age_seconds=31), "auditor_silent"),
        (auditor(age_seconds=None), "auditor_silent"),
        (auditor(age_seconds=30), ""),
        (auditor(lag_lines=10_001), "auditor_behind"),
        (auditor(seq=0, lag_lines=14), "auditor_behind"),
        ({"root": {"lease": LEASE}}, ""),
        ({"root": {"lease": {**LEASE, "left_seconds": 14}}}, "root_key_lease_ending"),
        ({"root": {"lease": {**LEASE, "last_failure": "it is away"}}}, "root_key_lease_ending"),
        ({"policy": {"budgets_exhausted": 2}}, "limit_used_up"),
        ({"hardening": [{"measure": "landlock", "in_force": False, "why": "old kernel"}]}, "hardening_missing"),
    ],
)
def test_each_threshold_names_its_condition(change: dict[str, Any], name: str) -> None:
    found = list(of_status({**WELL, **change}, NOW_S))
    assert [one.name for one in found] == ([name] if name else [])
    assert "{" not in "".join(one.text for one in found)


def test_a_condition_of_the_list_is_judged_somewhere() -> None:
    rooms = [SOURCES / "minikms", SOURCES / "minikms_daemon"]
    code = "".join(path.read_text() for room in rooms for path in room.rglob("*.py"))
    judged = set(re.findall(r'\bstate\(\s*"(\w+)"', code)) | set(re.findall(r'\("(\w+)", (?:settings|warning)', code))
    assert judged <= set(KEY_SERVICE)
    assert set(KEY_SERVICE) - judged == {"sealed", "standby", "audit_lagging"}, "these are named by their status"
    assert {one.severity for one in KEY_SERVICE.values()} == set(SEVERITIES)


def test_a_service_that_names_no_condition_is_not_taken_for_well() -> None:
    older = api.StatusAnswer(status="sealed", reason="it is sealed", warnings=["a disk; mend it"])
    assert [one.name for one in reported(older)] == ["sealed", "warning", "conditions_unknown"]
    assert [one.name for one in reported(api.StatusAnswer(status="ok"))] == ["conditions_unknown"]
    newer = msgspec.json.decode(
        b'{"conditions":[{"name":"moon","severity":"odd","sentence":"x"},{"name":"s","severity":"failing","sentence":"y"}]}',
        type=api.StatusAnswer,
    )
    assert [one.name for one in reported(newer)] == ["s", "moon"], "the worst first, and an unknown one is shown"


def test_the_gauge_has_each_condition_of_the_list() -> None:
    held = [conditions.state("auditor_none"), api.Condition("moon", "notice", "x")]
    samples = {labels["condition"]: value for labels, value in conditions.gauge(KEY_SERVICE, held)}
    assert set(samples) == {*KEY_SERVICE, "moon"}
    assert [name for name, value in samples.items() if value] == ["auditor_none", "moon"]


def test_page_and_alerts_are_those_of_the_list() -> None:
    """`python tools/conditions.py` rewrites them."""
    assert pages.PAGE.read_text() == pages.page()
    assert pages.ALERTS.read_text() == pages.alerts(pages.ALERTS.read_text())
    runbook = re.findall(r"(?m)^## (.*)$", (pages.PROJECT / "docs" / "runbook.md").read_text())
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in runbook}
    named = {one.runbook for _, known in pages.LISTS.values() for one in known.values() if one.runbook}
    assert named <= anchors, named - anchors
