"""What the overview says of the hosts of a key service, and of limits."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from minikms import api
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.viewer.overview import BACKUP_OLD_S, Part, of_backup, of_jobs, of_status, totals
from progressdb_server.jobs.states import Job
from progressdb_server.metrics import KmsMetrics, Mean

ROOT = api.RootStatus(provider="file")
AUDIT = api.AuditStatus(writable=True)


def said(name: str, status: api.StatusAnswer, alarm: str | None = "") -> Part:
    (part,) = [one for one in of_status(status, 0.0, known=True, alarm=alarm) if one.name == name]
    return part


def member(name: str, mode: str, number: int, seen: float = 1.0) -> api.MemberStatus:
    return api.MemberStatus(f"m{len(name)}", name, mode, number, 3, seen)


@pytest.mark.parametrize(
    ("others", "state", "words"),
    [
        ([], "warn", ["standbys: none"]),
        ([member("bb", "following", 9)], "good", ["a serves in term 3", "bb following, 1 changes behind"]),
        ([member("bb", "following", 9), member("ccc", "sealed", 2)], "warn", ["ccc sealed, 8 changes behind"]),
        ([member("bb", "following", 10, 95.0)], "warn", ["bb silent for 95 s"]),
    ],
)
def test_each_standby_is_named_with_what_it_lacks(
    others: Sequence[api.MemberStatus], state: str, words: Sequence[str]
) -> None:
    members = [member("a", "serving", 10), *others]
    replica = api.ReplicaStatus("m1", "serving", "a", 3, 10, members=members)
    part = said("Hosts of the key service", api.StatusAnswer(root=ROOT, audit=AUDIT, replica=replica))
    assert part.state == state
    assert all(word in part.sentence for word in words), part


def test_an_exhausted_limit_is_named() -> None:
    status = api.StatusAnswer(root=ROOT, audit=AUDIT, policy=api.PolicyStatus(budgets_exhausted=2))
    assert said("Hourly limits", status).state == "warn"


@pytest.mark.parametrize(
    ("state", "shown"), [("failed", "warn"), ("paused", "warn"), ("running", "good"), ("done", "good")]
)
def test_a_job_that_stands_still_is_not_well(state: Any, shown: str) -> None:
    job = Job("job-1", "t", 1, 1, state=state, reason="3 records")
    part = of_jobs([job])
    assert part.state == shown
    assert (part.command == "progressdb jobs resume job-1") is (shown == "warn")


@pytest.mark.parametrize(
    ("position", "alarm", "state"),
    [
        (api.PositionStatus(9, "a", 4, 0), "", "good"),
        (api.PositionStatus(9, "a", 4, 0), "It signs nothing: the log was cut", "bad"),
        (api.PositionStatus(9, "a", 4, 0), None, "warn"),
        (api.PositionStatus(0, "a", 4, 14), "", "warn"),
        (api.PositionStatus(9, "a", 4, 10_001), "", "warn"),
        (api.PositionStatus(9, "a", 31, 0), "", "bad"),
        (api.PositionStatus(9, "a", None, 0), "", "bad"),
        (None, None, "warn"),
    ],
)
def test_an_auditor_is_well_only_if_it_reports_follows_and_signs(
    position: api.PositionStatus | None, alarm: str | None, state: str
) -> None:
    audit = api.AuditStatus(writable=True, position=position)
    assert said("Auditor", api.StatusAnswer(root=ROOT, audit=audit), alarm).state == state


@pytest.mark.parametrize(
    ("newest_s", "damage", "registered", "state"),
    [
        (100.0, "", False, "good"),
        (100.0, "a file is not what was backed up", False, "bad"),
        (100.0, "", True, "good"),
        (0.0, "", False, "warn"),
        (0.0, "", True, "warn"),
        (float("nan"), "", False, "warn"),
        (100.0 - BACKUP_OLD_S - 1, "", False, "warn"),
    ],
)
def test_a_backup_is_well_only_if_it_was_looked_at(newest_s: float, damage: str, registered: bool, state: str) -> None:
    assert of_backup(newest_s, 100.0, damage=damage, registered=registered).state == state


def test_a_job_whose_key_was_destroyed_is_not_to_be_resumed() -> None:
    job = Job("job-1", "t", 1, 1, state="failed", reason="the key service refused (key_destroyed)")
    assert of_jobs([job]).command == "progressdb jobs show job-1"


def test_appends_and_the_slowest_route_are_those_of_the_api() -> None:
    metrics, kms = ApiMetrics(CollectorRegistry()), KmsMetrics()
    routes = {
        "/v1/messages": 0.001,
        "/v1/threads/{thread}/messages": 0.002,
        "/v1/messages/{message}/reactions": 0.5,
        "/viewer/": 9.0,
    }
    for route, seconds in routes.items():
        request: Any = SimpleNamespace(route=route, method="POST")
        for _ in range(10 if route != "/v1/messages/{message}/reactions" else 3):
            metrics.finished(request, 200, seconds)
    assert totals(metrics, kms).appends == 20
    slowest = metrics.slowest()
    assert slowest is not None and slowest.name == "POST /v1/threads/{thread}/messages"
    assert kms.slowest() is None
    for _ in range(10):
        kms.exchanged(b"/encrypt", 0.25, answered=True)
    assert kms.slowest() == Mean(0.25, 10, "encrypt")
