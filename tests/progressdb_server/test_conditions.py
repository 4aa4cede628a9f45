"""The conditions of the message server: their thresholds, and that a key service which can't be seen is not well."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from minikms import api
from progressdb_server import conditions
from progressdb_server.conditions import (
    BACKUP_OLD_S,
    DOCTOR,
    JOB_STALLED_S,
    SERVER,
    Look,
    of_backup,
    of_certificate,
    of_disk,
    of_jobs,
    verb_for,
)
from progressdb_server.config import Config
from progressdb_server.conversations import rekeying
from progressdb_server.jobs.states import Job, changed
from tests.progressdb_server.api.certificates import self_signed
from tests.progressdb_server.jobs.rotating import Place

SOURCES = Path(__file__).parents[2] / "src" / "progressdb_server"
NOW_S = 1_800_000_000.0


@pytest.mark.parametrize(
    ("newest_s", "damage", "made", "name"),
    [
        (NOW_S, "", True, ""),
        (NOW_S, "", False, ""),
        (NOW_S, "a file is not what was backed up", True, "backup_damaged"),
        (0.0, "", True, "backup_none"),
        (0.0, "", False, "backup_none"),
        (float("nan"), "", True, "backups_unknown"),
        (NOW_S - BACKUP_OLD_S - 1, "", True, "backup_old"),
    ],
)
def test_a_backup_is_well_only_if_it_was_looked_at(newest_s: float, damage: str, made: bool, name: str) -> None:
    found = list(of_backup(newest_s, NOW_S, damage=damage, of_server=made))
    assert [one.name for one in found] == ([name] if name else [])
    if name.startswith("backup_"):
        assert found[0].action == f"progressdb backup {'create' if made else 'register'} NAME"


@pytest.mark.parametrize(
    ("job", "name", "verb"),
    [
        ({"state": "failed", "reason": "3 records"}, "job_failed", "resume"),
        ({"state": "failed", "reason": "the key service refused (key_destroyed)"}, "job_failed", "show"),
        ({"state": "paused"}, "job_paused", "resume"),
        ({"state": "running", "updated_ns": int((NOW_S - JOB_STALLED_S - 1) * 1e9)}, "job_stalled", "pause"),
        ({"state": "running", "failed": 2}, "job_records_failed", "pause"),
        ({"state": "running", "failed": 2, "updated_ns": 1}, "job_stalled job_records_failed", "pause"),
        ({"state": "running"}, "", "pause"),
        ({"state": "done"}, "", "show"),
    ],
)
def test_a_job_that_stands_still_has_a_command_that_can_help(job: dict[str, Any], name: str, verb: str) -> None:
    row = Job(**{"id": "job-1", "thread": "t", "created_ns": 1, "updated_ns": int(NOW_S * 1e9), **job})
    assert [one.name for one in of_jobs([row], NOW_S)] == name.split()
    assert verb_for(row) == verb


class Well:
    """Probes of a server and a key service that work."""

    status: api.StatusAnswer | None = api.StatusAnswer(status="ok", conditions=[])

    async def problems(self) -> tuple[str, str]:
        return "", ""

    def damage(self) -> str:
        return ""


async def no_auditor() -> None:
    return None


async def test_no_job_that_stands_still_is_left_out_unsaid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rekeying, "PAGE_ROWS", 1)
    monkeypatch.setattr(conditions, "JOBS_READ_MAX", 2)

    async def of_jobs_now() -> list[str]:
        names = [one.name for one in await look.conditions()]
        return [name for name in names if name.startswith("job")]

    async with Place().opened() as (store, jobs):
        look = Look(store, Well(), jobs, Config(), no_auditor)
        for number, state in enumerate(("failed", "paused", "done", "done", "cancelled")):
            row = Job(store.rekeying.new_job_id(number + 1), "t", 1, int(time.time() * 1e9))
            await jobs.table.add(changed(row, state=state, reason="one record"))
        assert await of_jobs_now() == ["job_failed", "job_paused"]
        await jobs.table.add(Job(store.rekeying.new_job_id(9), "t", 1, int(time.time() * 1e9), state="paused"))
        assert await of_jobs_now() == ["jobs_unseen", "job_paused", "job_paused"]
        jobs.overdue["KeyRotation"] = ""
        assert "due_work_failing" not in [one.name for one in await look.conditions()]
        jobs.overdue["KeyRotation"] = "one record is damaged"
        assert "due_work_failing" in [one.name for one in await look.conditions()]


def test_the_disk_of_the_store_is_low_or_could_not_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [one.name for one in of_disk(str(tmp_path / "none"))] == ["store_unavailable"]
    monkeypatch.setattr(conditions, "DISK_LOW_BYTES", 0)
    assert list(of_disk(str(tmp_path))) == []
    monkeypatch.setattr(conditions, "DISK_LOW_BYTES", 1 << 63)
    assert [one.name for one in of_disk(str(tmp_path))] == ["store_disk_low"]


@pytest.mark.parametrize(("days_to", "name"), [(15, ""), (13, "certificate_ends"), (-1, "certificate_expired")])
def test_a_certificate_is_named_two_weeks_before_its_end(tmp_path: Path, days_to: int, name: str) -> None:
    path = self_signed(tmp_path, days_from=-30, days_to=days_to).cert_file
    found = list(of_certificate(path, time.time()))
    assert [one.name for one in found] == ([name] if name else [])
    assert [one.name for one in of_certificate(str(tmp_path / "none"), 0.0)] == ["certificate_unknown"]


def test_a_condition_of_the_list_is_judged_somewhere() -> None:
    code = "".join(path.read_text() for path in SOURCES.rglob("*.py"))
    judged = set(re.findall(r'\bstate\(\s*"(\w+)"', code)) | set(re.findall(r'\("(keys_\w+)", "', code))
    assert judged == set(SERVER) | set(DOCTOR)
    assert not set(SERVER) & set(DOCTOR)  # a gauge that nobody sets says "ok"
