"""`minikms backup prune` removes what an interrupted backup left, leaves one that is being made alone, and keeps the
newest archive that was verified.
"""

import fcntl
from pathlib import Path

import pytest
from msgspec.structs import replace

from minikms.archives.create import staging_path
from minikms.cli.backup import prune
from minikms.custody.archive_register import ArchiveRegister, RegisteredArchive, new_archive_id
from tests.harness import forked


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
    prune(keep=1, data_dir=str(tmp_path / "d"), yes=True)
    assert not leftover.exists()
    assert register.listed() == []


def test_a_backup_that_is_being_made_is_neither_removed_nor_forgotten(
    tmp_path: Path, interrupted: tuple[ArchiveRegister, Path]
) -> None:
    register, leftover = interrupted
    with leftover.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        prune(keep=1, data_dir=str(tmp_path / "d"), yes=True)
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
    prune(keep=1, data_dir=str(tmp_path / "d"))
    assert str(archive) in {entry.path for entry in register.listed()}


def test_the_newest_verified_archive_outlives_damaged_and_interrupted_ones(tmp_path: Path) -> None:
    """Damage is what `verify` has noted, until a later one finds the archive good. Another root key is no damage."""
    archives, root = [tmp_path / f"b{number}" for number in range(4)], tmp_path / "root.key"
    places = ("--data-dir", tmp_path / "d", "--master-key-file", root)
    assert forked.run("minikms", "init", *places).returncode == 0
    for archive in archives:
        assert forked.run("minikms", "backup", "create", archive, *places).returncode == 0
    register = ArchiveRegister(str(tmp_path / "d"))
    register.put(replace(register.listed()[3], ended_ms=0))
    other = tmp_path / "other.key"
    other.touch(0o600)
    other.write_text("ab" * 32)
    refused = forked.run("minikms", "backup", "verify", archives[1], *places[:3], other)
    assert refused.returncode == 1
    content = archives[2].read_bytes()
    altered = content[:-1] + bytes([content[-1] ^ 1])
    for written, status in ((altered, 1), (content, 0), (altered, 1)):
        archives[2].write_bytes(written)
        assert forked.run("minikms", "backup", "verify", archives[2], *places).returncode == status
        assert [entry.damaged for entry in register.listed()] == [False, False, bool(status), False]
    prune(keep=1, data_dir=str(tmp_path / "d"), yes=True)
    assert [archive.exists() for archive in archives] == [False, True, False, True]
