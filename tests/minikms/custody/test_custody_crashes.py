"""Real processes, killed or failed at one system call after the other (strace injects both).

The normal suite takes a part of the points; `-m torture` takes all of them and prints their number.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import minikms
from minikms.custody.files import open_directory, sweep_temps
from minikms.custody.lease_store import JOURNAL_NAME, SNAPSHOT_NAME, LeaseStore
from tests import needs
from tests.minikms.custody.disk_faults import key

CALLS = ("openat", "write", "pwrite64", "fsync", "fdatasync", "syncfs", "renameat", "renameat2", "linkat", "unlinkat")
TRACE = "trace=" + ",".join(f"?{call}" for call in CALLS)
SCENARIOS = ("replace", "create", "many", "remove", "leases")
POINTS_AT_ONCE = 2
SLICE = {"replace": 2, "create": 3, "many": 5, "remove": 2, "leases": 6}
"""The normal suite takes every so manieth point."""


class Point(NamedTuple):
    """The call number `nth` of its name since the process began."""

    call: str
    nth: int


def driver(scenario: str, place: Path) -> list[str]:
    return [sys.executable, "-B", str(Path(__file__).with_name("crash_driver.py")), scenario, str(place)]


def run(place: Path, scenario: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    strace = needs.program("strace")
    return subprocess.run(
        # Without --seccomp-bpf, under which strace 6.13 delivers no injected signal.
        [strace, "-f", "-qq", "-e", "signal=none", "-e", TRACE, *options, *driver(scenario, place)],
        env={"PYTHONPATH": str(Path(minikms.__file__).parents[1]), "PATH": os.defpath},
        capture_output=True,
        timeout=60,
        check=False,
    )


def prepare(place: Path, scenario: str) -> None:
    place.mkdir()
    if scenario == "leases":
        directory = open_directory(place)
        store = LeaseStore.open(directory, create=True)
        store.reserve([key(1), key(4)])
        store.merge()
        store.close()
        os.close(directory)
        return
    for number in range(3):
        (place / f"f{number}").write_bytes(b"old")


def points(tmp_path: Path, scenario: str) -> list[Point]:
    """Every state-changing system call of the scenario, after its preparations."""
    place = tmp_path / "traced"
    prepare(place, scenario)
    log = tmp_path / "log"
    done = run(place, scenario, "-o", str(log))
    assert (done.returncode, done.stdout[-4:]) == (0, b"end\n"), done.stderr
    found: list[Point] = []
    counts: dict[str, int] = {}
    begun = False
    for line in log.read_text().splitlines():
        called = re.match(r"\d+ +(\w+)\((.*)", line)
        if called is None:
            continue
        call, rest = called[1], called[2]
        counts[call] = counts.get(call, 0) + 1
        begun = begun or (call, rest[:3]) == ("write", "2, ")
        talks = call == "write" and rest.startswith(("1,", "2,"))
        reads = call == "openat" and "O_CREAT" not in rest
        if begun and not talks and not reads:
            found.append(Point(call, counts[call]))
    return found


def check_files(place: Path, told: dict[str, str]) -> None:
    for number in range(5):
        path = place / f"f{number}"
        content = path.read_text() if path.exists() else "-"
        assert content == told.get(path.name, content)
        assert content in {"old" if number < 3 else "-", "new", told.get(path.name)} | ({"-"} if number == 0 else set())
    if "g0" in told or (place / "g0").exists():
        assert (place / "g0").read_text() == "new"


def check(place: Path, scenario: str, stdout: bytes, *, temps: bool) -> None:
    """Every promise holds. `temps`: whether temporary files may be left."""
    lines = [line.split() for line in stdout.decode().splitlines()]
    directory = open_directory(place)
    # In this process they look like those of an earlier one, as they do to a daemon that starts again.
    assert sweep_temps(directory) <= (6 if temps else 0)
    names = {path.name for path in place.iterdir()}
    if scenario == "leases":
        store = LeaseStore.open(directory, create=False)
        assert store.status().lost_leases == 0
        granted = [(int(line[1]), int(line[2])) for line in lines if line[0] == "granted"]
        for number, total in [(1, 0), (4, 2 << 16), *granted]:
            assert store.total(key(number)) >= max(total, 1 << 16)
        assert store.total(key(1)) <= 8 << 16, "two runs take three leases each"
        store.close()
        assert names <= {JOURNAL_NAME, SNAPSHOT_NAME}
    else:
        check_files(place, {line[1]: line[2] for line in lines if line[0] == "told"})
        assert names <= {"f0", "f1", "f2", "f3", "f4", "g0"}
    os.close(directory)


def kill_at(tmp_path: Path, scenario: str, point: Point) -> None:
    place = tmp_path / f"{scenario}-kill-{point.call}-{point.nth}"
    prepare(place, scenario)
    done = run(place, scenario, "-o", "/dev/null", f"--inject={point.call}:signal=KILL:when={point.nth}")
    assert done.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}, (point, done)
    assert b"begin" in done.stderr
    assert b"end" not in done.stdout
    check(place, scenario, done.stdout, temps=True)
    again = subprocess.run(
        driver(scenario, place),
        env={"PYTHONPATH": str(Path(minikms.__file__).parents[1])},
        capture_output=True,
        timeout=60,
        check=False,
    )
    # A new name that was in place before the kill is a conflict now; everything else is simply done.
    assert again.returncode == 0 or (scenario == "create" and b"ConflictError" in again.stderr), again.stderr
    check(place, scenario, again.stdout, temps=False)


def refuse_at(tmp_path: Path, scenario: str, point: Point, number: int) -> None:
    name = errno.errorcode[number]
    place = tmp_path / f"{scenario}-{name}-{point.call}-{point.nth}"
    prepare(place, scenario)
    done = run(place, scenario, "-o", "/dev/null", f"--inject={point.call}:error={name}:when={point.nth}")
    assert done.returncode == 0, (point, done)
    assert done.stdout.endswith(b"end\n")
    # Only where a temporary file's own removal is what failed, one may stay.
    check(place, scenario, done.stdout, temps=point.call == "unlinkat")


def at_each(tmp_path: Path, scenario: str, chosen: list[Point], *attempts: Callable[[Point], None]) -> int:
    with ThreadPoolExecutor(POINTS_AT_ONCE) as pool:
        futures = [pool.submit(attempt, point) for point in chosen for attempt in attempts]
        for future in futures:
            future.result()
    return len(futures)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_or_a_failing_disk_at_some_system_calls_breaks_no_promise(tmp_path: Path, scenario: str) -> None:
    needs.program("strace")
    every = points(tmp_path, scenario)
    assert {call for call, _ in every} & {"fsync", "fdatasync", "syncfs"}
    kills = every[:: SLICE[scenario]]
    at_each(tmp_path, scenario, kills, lambda point: kill_at(tmp_path, scenario, point))
    errors = every[1 :: SLICE[scenario] * 2]
    at_each(tmp_path, scenario, errors, lambda point: refuse_at(tmp_path, scenario, point, errno.ENOSPC))


@pytest.mark.torture
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_or_a_failing_disk_at_every_system_call_breaks_no_promise(
    tmp_path: Path, scenario: str, capsys: pytest.CaptureFixture[str]
) -> None:
    count = at_each(
        tmp_path,
        scenario,
        points(tmp_path, scenario),
        lambda point: kill_at(tmp_path, scenario, point),
        lambda point: refuse_at(tmp_path, scenario, point, errno.ENOSPC),
        lambda point: refuse_at(tmp_path, scenario, point, errno.EIO),
    )
    with capsys.disabled():
        print(f"\n{scenario}: {count} kills and refusals")
