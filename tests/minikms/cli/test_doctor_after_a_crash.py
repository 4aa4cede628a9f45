"""`minikms doctor` over files that a crash left: it names what the next start completes, and what nobody can."""

import time
from pathlib import Path

import pytest

from minikms.cli.doctor import Diagnosis, examine
from minikms.custody import journal, journal_format
from minikms.custody.journal_format import Change
from minikms.roots.providers import KeyFile
from tests.harness.vaults import copied_vault, opened_vault


@pytest.fixture(autouse=True)
def has_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a file system whose `syncfs` is not known to report every failure."""
    monkeypatch.setattr(journal, "syncfs_reports", lambda _directory: True)


def findings(directory: Path) -> list[Diagnosis]:
    root = KeyFile(directory.with_name(directory.name + ".key"))
    return [found for found in examine(str(directory), root, now=time.time()) if found.area == "keys"]


async def test_keys_that_only_the_journal_has_are_judged_and_named(tmp_path: Path) -> None:
    """A key whose record does not unwrap is a problem, like that of a file."""
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(3)
        copied_vault(one, tmp_path / "killed")
    assert findings(tmp_path / "killed") == []
    for key_id in key_ids:
        (tmp_path / "killed" / "kms-deks" / f"{key_id}.json").unlink()
    [found] = findings(tmp_path / "killed")
    assert found.level == "advice"
    assert found.what.startswith("the files of 3 keys are missing")
    log = tmp_path / "killed" / journal.NAME
    intact = journal_format.decode(log.read_bytes()).intact
    log.write_bytes(
        journal_format.encode(Change.summed(key.key_id, b"", key.new.replace(b'"t"', b'"u"')) for key in intact)
    )
    levels = [found.level for found in findings(tmp_path / "killed")]
    assert sorted(levels) == ["advice", "problem", "problem", "problem"]


@pytest.mark.parametrize("started", [False, True])
async def test_keys_that_only_a_damaged_record_had_are_named(tmp_path: Path, started: bool) -> None:
    """Before the start that reads the journal, and after it, in the journal that it has kept. A key that has a file, or
    was destroyed, is not.
    """
    killed = tmp_path / "killed"

    async with opened_vault(tmp_path / "d") as one:
        lost, destroyed, usual = await one.make(3)
        copied_vault(one, killed)
        journalled = (killed / journal.NAME).read_bytes()
    async with opened_vault(killed) as after:
        await after.vault.retire(destroyed)
        await after.vault.destroy(destroyed)
        after.file(lost).unlink()
    damaged = bytearray(journalled)
    for number in range(3):  # in the checksum
        damaged[len(journal_format.MAGIC) + (number + 1) * journal_format.RECORD_BYTES - 1] ^= 1
    (killed / journal.NAME).write_bytes(damaged)
    if started:
        async with opened_vault(killed) as after:
            assert after.replayed.damaged == 3
    [found] = findings(killed)
    assert found.level == "problem"
    assert lost in found.what
    assert usual not in found.what
    assert destroyed not in found.what
    if started:
        [kept] = (killed / "kms-deks-backup").glob("*/*.journal")
        kept.write_bytes(damaged[:-700])
        assert any(kept.name in found.what for found in examine(str(killed), None, now=time.time()))


async def test_a_journal_of_another_version_is_a_problem(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await one.make(1)
        (one.directory / journal.NAME).write_bytes(journal_format.MAGIC[:-1] + b"\x09")
        [found] = findings(one.directory)
        assert (found.level, "another version" in found.what) == ("problem", True)
