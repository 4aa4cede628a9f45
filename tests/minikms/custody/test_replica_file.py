"""The mark of a member: who it is, how far it has come, and who believes that."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from minikms.api.errors import StartError, StartLaterError
from minikms.custody import replica_file
from minikms.custody.replica_file import Mark
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena
from minikms.platform.files import closed_after, open_directory
from tests.minikms.keys import keyrings
from tests.minikms.keys.keyrings import NEW_ROOT

MARK = Mark(member_id="m3", name="b", term=4, number=70, seals=2, begins=True)


@pytest.fixture
def arena() -> Iterator[SecretArena]:
    with keyrings.arena() as made:
        yield made


@pytest.fixture
def unlocked(arena: SecretArena) -> UnlockedKeyring:
    return keyrings.fresh(arena)


@pytest.fixture
def directory_fd(tmp_path: Path) -> Iterator[int]:
    with closed_after(open_directory(tmp_path)) as descriptor:
        yield descriptor


def written(directory_fd: int, mark: Mark, unlocked: UnlockedKeyring | None) -> replica_file.StoredMark:
    replica_file.write(directory_fd, mark, unlocked)
    stored = replica_file.read(directory_fd)
    assert stored is not None
    return stored


def test_a_mark_is_read_as_it_was_written(tmp_path: Path, directory_fd: int, unlocked: UnlockedKeyring) -> None:
    assert (replica_file.read(directory_fd), replica_file.member_id(str(tmp_path))) == (None, "")
    assert written(directory_fd, MARK, unlocked).check(unlocked) == MARK
    assert replica_file.member_id(str(tmp_path)) == "m3"
    assert (tmp_path / replica_file.NAME).stat().st_mode & 0o777 == 0o600


def test_a_mark_stays_authentic_when_a_root_key_is_removed(directory_fd: int, unlocked: UnlockedKeyring) -> None:
    """A crash may leave the keyring of after the removal and the mark of before."""
    keyrings.add(unlocked, NEW_ROOT)
    stored = written(directory_fd, MARK, unlocked)
    keyrings.remove(unlocked, "s1")
    assert stored.check(unlocked) == MARK


def test_a_mark_of_another_keyring_or_with_another_number_is_refused(
    arena: SecretArena, directory_fd: int, unlocked: UnlockedKeyring
) -> None:
    stored = written(directory_fd, MARK, unlocked)
    altered = msgspec.structs.replace(MARK, number=71)
    for bad, of in (
        (stored, keyrings.fresh(arena)),
        (stored._replace(mark=altered, content=msgspec.json.encode(altered)), unlocked),
        (stored._replace(tag=b""), unlocked),
        (written(directory_fd, MARK, None), unlocked),
    ):
        with pytest.raises(StartError, match="was altered, or belongs to another keyring"):
            bad.check(of)


def test_only_a_mark_without_changes_needs_no_tag(directory_fd: int, unlocked: UnlockedKeyring) -> None:
    """So a host can be prepared before it has a keyring."""
    new = Mark(member_id="m3", name="b")
    assert written(directory_fd, new, None).check(unlocked) == new


@pytest.mark.parametrize(
    "change", [{"format": "x"}, {"version": 2}, {"member_id": "s1"}, {"name": ""}, {"number": -1}, {"seals": 2**63}]
)
def test_a_mark_outside_its_bounds_is_refused(directory_fd: int, change: dict[str, object]) -> None:
    replica_file.write(directory_fd, msgspec.structs.replace(MARK, **change), None)
    with pytest.raises(StartError, match="is damaged, or of an unknown format version"):
        replica_file.read(directory_fd)


def test_a_damaged_or_unreadable_mark_never_looks_absent(tmp_path: Path, directory_fd: int) -> None:
    path = tmp_path / replica_file.NAME
    for damaged in (b"", b"{}", b'{"body":{},"tag":""}', b"[" * 4000):
        path.write_bytes(damaged)
        with pytest.raises(StartError, match="is damaged"):
            replica_file.member_id(str(tmp_path))
    path.write_bytes(b" " * (replica_file.FILE_BYTES_MAX + 1))
    with pytest.raises(StartLaterError, match="can't be read"):
        replica_file.read(directory_fd)
    path.unlink()
    os.symlink("elsewhere", path)
    with pytest.raises(StartLaterError, match="can't be read"):
        replica_file.read(directory_fd)
