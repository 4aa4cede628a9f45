"""`minikms backup create` on a disk that refuses: no archive is left that the register does not name."""

import os
from pathlib import Path

import pytest

from minikms.api.errors import KmsRefusedError, StartError
from minikms.cli.backup import create, prune, verify
from minikms.cli.console import DataFiles, RootKey
from minikms.custody.archive_register import ArchiveRegister
from tests.harness.disk_faults import failing
from tests.harness.vaults import key_file, opened_vault


@pytest.mark.parametrize("times", [1, 1_000])
@pytest.mark.parametrize("call", ["unlink", "link", "rename", "fsync", "mkdir"])
async def test_each_archive_that_is_left_is_in_the_register(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str, times: int
) -> None:
    """At each call of this kind in turn. Status 0 and 1 say that the archive is good, and an error that it is not."""
    async with opened_vault(tmp_path / "d") as one:
        await one.make(2)
    directory, key = tmp_path / "d", key_file(tmp_path / "d")
    kept = {path.name for path in tmp_path.iterdir()}
    register = ArchiveRegister(str(directory))
    statuses: list[int | None] = []
    for at in range(1, 20):
        archive = tmp_path / f"archive-{at}"
        status: int | None = None
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing(getattr(os, call), at=at, times=times))
            try:
                status = create(archive, files=DataFiles(str(directory), RootKey(key)))
            except (KmsRefusedError, OSError):
                assert status is None
        said = capsys.readouterr().err
        entries = {entry.path: entry for entry in register.listed()}
        entry = entries.get(str(archive))
        found = {path.name for path in tmp_path.iterdir()} - kept
        if status is None:
            assert not found or (entry is not None and not entry.ended_ms)
        else:
            verify(archive, files=DataFiles(root_key=RootKey(key)))
            assert entry is not None
            assert entry.ended_ms or status == 1
            assert ("the archive is made and good" in said) is (status == 1)
        statuses.append(status)
        archive.unlink(missing_ok=True)
        prune(keep=1, forget_missing=True, data_dir=str(directory), yes=True)
        assert register.listed() == []
        assert {path.name for path in tmp_path.iterdir()} == kept
        if status == 0:
            break
    assert statuses[-1] == 0


def test_a_backup_of_no_data_directory_leaves_nothing_there(tmp_path: Path) -> None:
    """`init` would take a register beside no keyring for a restore that was interrupted."""
    key = key_file(tmp_path)
    directory = tmp_path / "empty"
    directory.mkdir(0o700)
    with pytest.raises(StartError, match="no keyring"):
        create(tmp_path / "archive", files=DataFiles(str(directory), RootKey(key)))
    assert not list(directory.iterdir())
