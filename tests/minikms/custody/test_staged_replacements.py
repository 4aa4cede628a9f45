"""A series of groups in which one sync serves two: each file is always whole, and new on return."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from minikms.custody import files
from minikms.custody.files import TEMP_PREFIX, FileWrite, StagedReplacements, replace_file
from minikms.errors import InvalidRequestError, MiniKmsError, StorageUnavailableError
from tests.minikms.custody.disk_faults import failing, failing_os
from tests.minikms.custody.power_loss import Disk

NAMES = ("a", "b", "c", "d")


@pytest.fixture(params=["syncfs", "fsync"], autouse=True)
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "syncfs_reports", lambda _directory: request.param == "syncfs")


@pytest.fixture
def groups(directory: int) -> StagedReplacements:
    for name in NAMES:
        replace_file(directory, name, b"old")
    return StagedReplacements(directory, durable_first=directory)


def writes(*names: str) -> list[FileWrite]:
    return [FileWrite(name, b"new") for name in names]


def contents(path: Path) -> dict[str, bytes]:
    """The content of every file that is not a temporary one."""
    return {entry.name: entry.read_bytes() for entry in path.iterdir() if not entry.name.startswith(TEMP_PREFIX)}


def temps(path: Path) -> int:
    return sum(entry.name.startswith(TEMP_PREFIX) for entry in path.iterdir())


def test_a_group_is_put_in_place_by_the_next_step(groups: StagedReplacements, tmp_path: Path) -> None:
    assert groups.step(writes("a", "b")) == {}
    assert contents(tmp_path) == dict.fromkeys(NAMES, b"old")
    assert groups.step(writes("c")) == {"a": None, "b": None}
    assert contents(tmp_path) == {"a": b"new", "b": b"new", "c": b"old", "d": b"old"}
    assert groups.step([]) == {"c": None}
    assert groups.step([]) == {}
    assert contents(tmp_path)["c"] == b"new"
    assert temps(tmp_path) == 0


def test_skipped_and_discarded_files_are_unchanged(groups: StagedReplacements, tmp_path: Path) -> None:
    groups.step(writes("a", "b"))
    assert groups.step(writes("c"), skip={"a"}) == {"b": None}
    groups.discard()
    assert groups.step([]) == {}
    assert contents(tmp_path) == {"a": b"old", "b": b"new", "c": b"old", "d": b"old"}
    assert temps(tmp_path) == 0


@pytest.mark.parametrize("call", ["open", "write"])
def test_a_group_that_cannot_be_written_changes_nothing(
    groups: StagedReplacements, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    groups.step(writes("a", "b"))
    with failing_os(monkeypatch, call, at=2), pytest.raises(StorageUnavailableError):
        groups.step(writes("c", "d"))
    assert contents(tmp_path) == dict.fromkeys(NAMES, b"old")
    assert temps(tmp_path) == 0
    groups.step(writes(*NAMES))
    assert set(groups.step([])) == set(NAMES)
    assert contents(tmp_path) == dict.fromkeys(NAMES, b"new")


def test_a_file_that_cannot_be_put_in_place_is_an_error_of_its_own(
    groups: StagedReplacements, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups.step(writes("a", "b", "c"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", failing(os.rename, at=2, times=1))
        outcomes = groups.step(writes("d"))
    assert {name: type(outcome) for name, outcome in outcomes.items()} == {
        "a": type(None),
        "b": StorageUnavailableError,
        "c": type(None),
    }
    assert groups.step([]) == {"d": None}
    assert contents(tmp_path) == {"a": b"new", "b": b"old", "c": b"new", "d": b"new"}
    assert temps(tmp_path) == 0


def test_after_a_failed_sync_nothing_is_confirmed_and_nothing_is_staged(
    groups: StagedReplacements, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: StagedReplacements) -> None:
        raise OSError(5, "Input/output error", "/a/secret/path")

    groups.step(writes("a"))
    with monkeypatch.context() as patched:
        patched.setattr(StagedReplacements, "_sync", refuse)
        [outcome] = groups.step(writes("b")).values()
    assert isinstance(outcome, StorageUnavailableError)
    assert "secret" not in str(outcome)
    assert groups.step([]) == {}
    assert contents(tmp_path)["b"] == b"old"
    assert temps(tmp_path) == 0


@pytest.mark.parametrize("name", ["../a", "", ".", f"{TEMP_PREFIX}a"])
def test_an_invalid_name_is_refused_before_anything_is_written(
    groups: StagedReplacements, tmp_path: Path, name: str
) -> None:
    with pytest.raises(InvalidRequestError):
        groups.step([*writes("a"), FileWrite(name, b"new")])
    assert temps(tmp_path) == 0


@pytest.mark.parametrize("seed", range(3))
def test_after_a_power_loss_staged_files_are_old_or_new(groups: StagedReplacements, directory: int, seed: int) -> None:
    allowed: dict[str, set[bytes]] = {name: {b"old"} for name in NAMES}
    rng = random.Random(seed)

    def check(disk: Disk) -> None:
        for image in disk.images(rng, 25):
            for name, possible in allowed.items():
                assert image.get(name) in possible, f"{name} after system call {disk.events}"
            assert all(name in allowed or name.startswith(TEMP_PREFIX) for name in image)

    disk = Disk(directory, check)
    with pytest.MonkeyPatch.context() as patch:
        disk.begin(patch)
        placing: list[str] = []
        for batch in (NAMES[:2], NAMES[2:], ()):
            for name in placing:
                allowed[name].add(b"new")
            outcomes: dict[str, MiniKmsError | None] = groups.step(writes(*batch))
            assert set(outcomes) == set(placing)
            for name in outcomes:
                allowed[name].remove(b"old")
            check(disk)
            placing = list(batch)
    assert disk.events > 10
