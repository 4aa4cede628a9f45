"""Real processes, killed or failed at one system call after the other (strace injects both).

The normal suite takes a part of the points; `-m torture` takes all of them and prints their number.
"""

import asyncio
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from minikms.api import ReplicaFollowRequest
from minikms.custody import journal
from minikms.custody.journal_format import Change, encode
from minikms.platform.files import open_directory, sweep_temps
from tests import needs
from tests.harness.forked import Forked
from tests.harness.members import join, make_first, opened_member
from tests.harness.replica_database import ReplicaDatabase
from tests.harness.vaults import opened_vault

DRIVER = "tests.minikms.custody.crash_driver"
RUN_S_MAX = 60.0
CALLS = (
    "openat",
    "mkdir",
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "syncfs",
    "renameat",
    "renameat2",
    "linkat",
    "unlinkat",
)
TRACE = "trace=" + ",".join(f"?{call}" for call in CALLS)
SCENARIOS = ("replace", "create", "many", "remove", "destroy", "rewrap", "replay", "creates", "follow")
POINTS_AT_ONCE = 2
SLICE = {
    "replace": 4, "create": 6, "many": 12, "remove": 5, "destroy": 27, "rewrap": 34, "replay": 23, "creates": 34,
    "follow": 17,
}  # fmt: skip
"""The normal suite takes every n-th point."""


class Point(NamedTuple):
    """The call number `nth` of its name since the driver began."""

    call: str
    nth: int


def run(place: Path, scenario: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    """The driver; under strace, which is attached before its first step, if there are options."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, contextlib.ExitStack() as tracing:
        with ours, theirs:
            driver = Forked([DRIVER, scenario, str(place)], theirs.fileno(), out.fileno(), err.fileno())
            assert ours.recv(1)  # it waits
            if options:
                tracing.enter_context(attached(driver.pid, *options))
        try:
            status = driver.wait(RUN_S_MAX)
        finally:
            driver.kill()  # else strace would never end
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(driver.args, status, out.read(), err.read())


@contextlib.contextmanager
def attached(pid: int, *options: str) -> Iterator[None]:
    # Without --seccomp-bpf, under which strace 6.13 delivers no injected signal.
    words = [needs.program("strace"), "-f", "-e", "signal=none", "-e", TRACE, *options, "-p", str(pid)]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as tracer:
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        assert b"attached" in line, line
        yield  # it ends with the process


def prepare(place: Path, scenario: str) -> None:
    """Once for all points of a test, which begin with copies."""
    prepared = place.with_name("prepared")
    if not prepared.exists():
        make(prepared, scenario)
    shutil.copytree(prepared, place)


def make(place: Path, scenario: str) -> None:
    place.mkdir()
    if scenario in ("rewrap", "replay"):
        asyncio.run(keys_to_rewrap(place, interrupted=scenario == "replay"))
        return
    if scenario == "creates":
        asyncio.run(keys_of_a_log(place))
        return
    if scenario == "destroy":
        asyncio.run(keys_to_destroy(place))
        return
    if scenario == "follow":
        asyncio.run(changes_to_follow(place))
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
    if scenario in ("rewrap", "replay"):
        asyncio.run(check_rewrapped(place, lines))
        return
    if scenario == "creates":
        asyncio.run(check_created(place, lines))
        return
    if scenario == "follow":
        asyncio.run(check_followed(place, lines))
        return
    if scenario == "destroy":
        asyncio.run(check_keys(place, {line[1] for line in lines if line[0] == "destroyed"}))
        return
    directory = open_directory(place)
    # In this process they look like those of an earlier one, as they do to a daemon that starts again.
    assert sweep_temps(directory) <= (6 if temps else 0)
    names = {path.name for path in place.iterdir()}
    check_files(place, {line[1]: line[2] for line in lines if line[0] == "told"})
    assert names <= {"f0", "f1", "f2", "f3", "f4", "g0"}
    os.close(directory)


async def keys_to_destroy(place: Path) -> None:
    """Five retired keys, each with a rotation backup, and one active one."""
    (place / "key").touch(0o600)
    (place / "key").write_text("ab" * 32 + "\n")
    async with opened_vault(place / "data", key=place / "key") as one:
        key_ids = await one.make(6)
        for key_id in key_ids[:5]:
            await one.vault.retire(key_id)
        (place / "victims").write_text(" ".join(key_ids[:3]))
        await one.rotate()


async def check_keys(place: Path, told: set[str]) -> None:
    """A start succeeds, twice. Each key that was told to be destroyed is; each other one is destroyed or opens."""
    for _ in range(2):
        async with opened_vault(place / "data", key=place / "key") as one:
            await one.indexing.run()
            destroyed = one.vault.destroyed
            assert all(key_id in destroyed for key_id in told)
            assert one.vault.keyring.body.tombstone_log.count == len(destroyed)
            present = {path.stem for path in (place / "data" / "kms-deks").glob("k_*.json")}
            assert len(present) + len(destroyed) == 6, "no key is lost, and none is left of a destroyed one"
            assert not any(key_id in destroyed for key_id in present)
            assert one.keys(present)
            assert {json.loads(content)["id"] for content in one.backups()} <= present


async def keys_to_rewrap(place: Path, *, interrupted: bool) -> None:
    """Eight keys: the first is retired and about to be destroyed, the second about to be retired.

    With `interrupted` the power failed between two overwrites of a rotation, and the first key was destroyed.
    """
    (place / "key").touch(0o600)
    (place / "key").write_text("ab" * 32 + "\n")
    async with opened_vault(place / "data", key=place / "key") as one:
        key_ids = await one.make(8)
        (place / "keys").write_text(json.dumps({key_id: key.hex() for key_id, key in one.keys(key_ids).items()}))
        (place / "victims").write_text(" ".join(key_ids[:2]))
        await one.vault.retire(key_ids[0])
        await one.rotate()  # so that every key has a backup
        if not interrupted:
            make_older(one.directory)
            return
        olds = {key_id: one.file(key_id).read_bytes() for key_id in key_ids}
        await one.rotate()
        news = {key_id: one.file(key_id).read_bytes() for key_id in key_ids}
        await one.vault.destroy(key_ids[0])
        old, torn, zeros, cut = key_ids[2:6]
        one.file(old).write_bytes(olds[old])
        one.file(torn).write_bytes(news[torn][:200] + olds[torn][200:])
        one.file(zeros).write_bytes(bytes(512) + news[zeros][512:])
        one.file(cut).write_bytes(news[cut][:100])
    make_older(place / "data")
    changes = [Change(key_id, olds[key_id], news[key_id]) for key_id in key_ids]
    (place / "data" / journal.NAME).write_bytes(encode(changes))


def make_older(directory: Path) -> None:
    """A rotation or replay of the same second would not make a directory of its own."""
    for number, made in enumerate(sorted((directory / "kms-deks-backup").iterdir())):
        made.rename(made.with_name(f"20200101T00000{number}"))


async def check_rewrapped(place: Path, told: list[list[str]]) -> None:
    """The rotation completes, every key has its value, a destroyed key is in no file, and what was told is so."""
    keys: dict[str, str] = json.loads((place / "keys").read_text())
    for _ in range(2):
        async with opened_vault(place / "data", key=place / "key") as one:
            assert not (one.directory / journal.NAME).exists()
            await one.indexing.run()
            await one.rotation.run()
            gone = {key_id for key_id in keys if key_id in one.vault.destroyed}
            assert gone >= {line[1] for line in told if line[0] == "destroyed"}
            left = keys.keys() - gone
            assert {key_id: key.hex() for key_id, key in one.keys(left).items()} == {
                key_id: keys[key_id] for key_id in left
            }
            assert len(one.keks_on_disk(left)) == 1
            assert {one.on_disk(line[1]).state for line in told if line[0] == "retired"} <= {"retired"}
            assert_in_no_file(one.directory, gone)


async def keys_of_a_log(place: Path) -> None:
    """Six keys whose creates were answered before the power failed: of most, nothing or a part reached the disk. One
    was retired, one destroyed.
    """
    (place / "key").touch(0o600)
    (place / "key").write_text("ab" * 32 + "\n")
    async with opened_vault(place / "data", key=place / "key") as one:
        key_ids = await one.make(6)
        log = (place / "data" / journal.NAME).read_bytes()
        (place / "keys").write_text(json.dumps({key_id: key.hex() for key_id, key in one.keys(key_ids).items()}))
        for key_id in key_ids[:2]:
            await one.vault.retire(key_id)
        await one.vault.destroy(key_ids[0])
    (place / "data" / journal.NAME).write_bytes(log)
    absent, empty, torn, _ = key_ids[2:]
    one.file(absent).unlink()
    one.file(empty).write_bytes(b"")
    one.file(torn).write_bytes(one.file(torn).read_bytes()[:100])


async def check_created(place: Path, told: list[list[str]]) -> None:
    """Every answered key has its value, a destroyed one is in no file, and no file is unreadable."""
    keys: dict[str, str] = json.loads((place / "keys").read_text())
    keys |= {line[1]: line[2] for line in told if line[0] == "created"}
    for _ in range(2):
        async with opened_vault(place / "data", key=place / "key") as one:
            await one.indexing.run()
            gone = {key_id for key_id in keys if key_id in one.vault.destroyed}
            assert gone >= {line[1] for line in told if line[0] == "destroyed"}
            left = keys.keys() - gone
            assert {key_id: key.hex() for key_id, key in one.keys(left).items()} == {
                key_id: keys[key_id] for key_id in left
            }
            assert one.vault.unreadable.count == 0
            assert_in_no_file(one.directory, gone)


async def changes_to_follow(place: Path) -> None:
    """A member with six keys, each with a rotation backup, which lacks a destruction, a retirement, three creates and a
    rotation: the parts that its database has of these.
    """
    database = ReplicaDatabase()
    key_ids = await make_first(place / "a", keys=6)
    join(place / "data", place / "a")
    shutil.copy2(place / "data.key", place / "key")
    async with opened_member(place / "a", database) as a, opened_member(place / "data", database) as b:
        await a.serve()
        await a.stop()
        await b.serve()
        await b.one.rotate()
        await b.stop()
        await a.serve()
        for key_id in key_ids[:2]:
            await a.vault.retire(key_id)
        await a.vault.destroy(key_ids[0])
        await a.one.make(3)
        await a.one.rotate()
        parts = database.tables.parts(b.directory.mark.number, 0, files_max=4)
    (place / "parts").write_bytes(msgspec.json.encode(parts))
    (place / "victims").write_text(key_ids[0])
    make_older(place / "data")


async def check_followed(place: Path, told: list[list[str]]) -> None:
    """A start succeeds, twice. The mark is that of what was told, and the member follows to what the other one has."""
    parts = msgspec.json.decode((place / "parts").read_bytes(), type=list[ReplicaFollowRequest])
    for _ in range(2):
        async with opened_vault(place / "data", key=place / "key") as one:
            member = one.data.member
            assert member is not None
            assert member.mark.number >= max([int(line[1]) for line in told if line[0] == "followed"], default=0)
            await member.scan()
            for request in parts:
                await member.follow(request)
            assert one.keys(path.stem for path in (place / "data" / "kms-deks").iterdir())
            for name in ("keyring.json", "kms-tombstones"):
                assert (place / "data" / name).read_bytes() == (place / "a" / name).read_bytes()
            followed, first = (place / one / "kms-deks" for one in ("data", "a"))
            assert contents(followed) == contents(first)
            assert_in_no_file(place / "data", [(place / "victims").read_text()])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_in_no_file(directory: Path, key_ids: Iterable[str]) -> None:
    paths = [path for path in directory.rglob("*") if path.is_file() and "audit" not in path.name]
    for key_id in key_ids:
        assert not [path for path in paths if b'"id":"%s"' % key_id.encode() in path.read_bytes()]


def kill_at(tmp_path: Path, scenario: str, point: Point) -> None:
    place = tmp_path / f"{scenario}-kill-{point.call}-{point.nth}"
    prepare(place, scenario)
    done = run(place, scenario, "-o", "/dev/null", f"--inject={point.call}:signal=KILL:when={point.nth}")
    assert done.returncode == -signal.SIGKILL, (point, done)
    assert b"begin" in done.stderr
    assert b"end" not in done.stdout.splitlines()  # as a line: a key id may contain it
    check(place, scenario, done.stdout, temps=True)
    again = run(place, scenario)
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
