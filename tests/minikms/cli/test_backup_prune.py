"""`minikms backup prune` removes what an interrupted backup left, and leaves one that is being made alone."""

import fcntl
from pathlib import Path

import pytest

from minikms.archives.create import staging_path
from minikms.cli.backup import prune
from minikms.custody.archive_register import ArchiveRegister, RegisteredArchive, new_archive_id


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[ArchiveRegister, Path]:
    """The register of a data directory, and what an interrupted backup has left."""
    data_dir = tmp_path / "d"
    data_dir.mkdir(mode=0o700)
    entry = RegisteredArchive("a_0123456789abcdef", str(tmp_path / "archive"), begun_ms=1)
    register = ArchiveRegister(str(data_dir))
    register.put(entry)
    leftover = Path(staging_path(entry.path, entry.archive_id))
    leftover.write_bytes(b"minikms-backup\0\x01 and some keys")
    return register, leftover


def test_a_leftover_goes_with_its_entry(tmp_path: Path, interrupted: tuple[ArchiveRegister, Path]) -> None:
    register, leftover = interrupted
    assert prune(keep=1, data_dir=str(tmp_path / "d"), yes=True) == 0
    assert not leftover.exists()
    assert register.listed() == []


def test_a_backup_that_is_being_made_is_neither_removed_nor_forgotten(
    tmp_path: Path, interrupted: tuple[ArchiveRegister, Path]
) -> None:
    register, leftover = interrupted
    with leftover.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert prune(keep=1, data_dir=str(tmp_path / "d"), yes=True) == 0
    assert leftover.exists()
    assert len(register.listed()) == 1


def test_a_backup_that_ends_while_prune_asks_is_not_forgotten(
    tmp_path: Path, interrupted: tuple[ArchiveRegister, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipt of a key that is destroyed later must name it."""
    register, leftover = interrupted
    archive = tmp_path / "archive"
    for name in ("older", "old"):
        (tmp_path / name).write_bytes(leftover.read_bytes())
        register.put(RegisteredArchive(new_archive_id(), str(tmp_path / name), begun_ms=0, ended_ms=1))
    monkeypatch.setattr("minikms.cli.backup.confirm", lambda *_, **__: leftover.rename(archive))
    assert prune(keep=1, data_dir=str(tmp_path / "d")) == 0
    assert str(archive) in {entry.path for entry in register.listed()}
