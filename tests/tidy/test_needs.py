"""The rule for a missing need, and the report of what was skipped."""

from __future__ import annotations

import os
import resource

import pytest

from tests import needs

NO_PROGRAM = "no-such-program"


def test_a_missing_program_skips_and_fails_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs the program no-such-program"):
        needs.program(NO_PROGRAM)
    monkeypatch.setenv("CI", "true")
    for uid in (0, 1000):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        with pytest.raises(pytest.fail.Exception, match="must provide"):
            needs.program(NO_PROGRAM)


def test_what_only_root_can_do_skips_for_an_ordinary_user_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="needs root"):
        needs.root()


def test_descriptors_are_given_for_a_while() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with needs.descriptors(before[0] + 1 if before[0] < before[1] else before[0]):
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[0]


def test_the_report_counts_reasons_and_names_one_command() -> None:
    reasons = ["Skipped: needs the program gcore"] * 2 + ["Skipped: needs root", "Skipped: needs the program zstd"]
    assert needs.report(reasons) == [
        "skipped    2: needs the program gcore",
        "skipped    1: needs root",
        "skipped    1: needs the program zstd",
        "to run them too: apt-get install gdb zstd",
    ]
    assert needs.report([]) == []
