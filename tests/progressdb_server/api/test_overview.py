"""What the overview says of the hosts of a key service, and of limits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from minikms import api
from progressdb_server.api.viewer.overview import Part, of_status

ROOT = api.RootStatus(provider="file")
AUDIT = api.AuditStatus(writable=True)


def said(name: str, status: api.StatusAnswer) -> Part:
    (part,) = [one for one in of_status(status, 0.0, known=True) if one.name == name]
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
